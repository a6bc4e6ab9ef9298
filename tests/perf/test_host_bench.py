"""`migsim bench --host`: what it measures becomes a profile that loads, with or without KVM."""

from __future__ import annotations

from pathlib import Path

import pytest

from migsim import host_bench, simulation
from migsim.cli import main
from migsim.host_kvm.device import unavailable_reason
from migsim.perf.profile import load_profile
from migsim.scenario import load
from migsim.units import MIB


def test_the_written_profile_loads_and_says_it_was_measured(tmp_path: Path) -> None:
    measured = host_bench.measure(size=4 * MIB, touched_pages=64)
    path = tmp_path / "here.toml"
    path.write_text(host_bench.profile_text("here", measured), encoding="utf-8")
    profile = load_profile(str(path))
    assert profile.name == "here"
    assert profile.machine.memory_bandwidth.source.startswith("measured:")
    for number in measured:
        if not number.machine:
            assert profile.ns(number.name) == pytest.approx(number.value, rel=1e-4)
    assert profile.ns("shadow-map") > 0, "what is not measured is inherited"


@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
def test_the_real_log_is_measured_where_there_is_kvm() -> None:
    names = {number.name for number in host_bench.measure(size=4 * MIB, touched_pages=64)}
    assert {"bitmap-word", "kvm-clear-page"} <= names


def test_the_profile_is_named_after_its_file_and_a_scenario_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_bench, "measure", lambda: [host_bench.Measured("vm-exit", 700.0, "a test")])
    path = str(tmp_path / "mine.toml")
    assert main(["bench", "--host", path]) == 0
    assert load_profile(path).name == "mine"
    scenario = tmp_path / "small.toml"
    scenario.write_text(f'[guest]\nmemory = "16 MiB"\n\n[host]\nprofile = "{path}"\n', encoding="utf-8")
    result = simulation.run(load(str(scenario)))
    assert (result.converged, result.host["profile"]) == (True, "mine")


def test_without_kvm_the_profile_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_bench, "unavailable_reason", lambda: "no /dev/kvm here")
    measured = host_bench.measure(size=4 * MIB, touched_pages=64)
    assert {number.name for number in measured if not number.machine} == {"bitmap-scan-word", "host-fault"}
    path = tmp_path / "bare.toml"
    path.write_text(host_bench.profile_text('a "bad" \\ name', measured), encoding="utf-8")
    assert "without KVM: no /dev/kvm here" in load_profile(str(path)).about
