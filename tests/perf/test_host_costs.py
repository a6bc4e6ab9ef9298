"""The closed loop inside a run: reported per round, the same on both paths, and silent where there is no KVM."""

from __future__ import annotations

from pathlib import Path

import pytest

from migsim import simulation
from migsim.host_costs import HostCosts
from migsim.result import Result
from migsim.scenario import Scenario, ScenarioError, load

_TINY = str(Path(__file__).resolve().parents[2] / "configs" / "tiny.toml")


def _run(*settings: str, page_at_a_time: bool = False) -> Result:
    return simulation.run(_scenario(*settings), page_at_a_time=page_at_a_time)


def _scenario(*settings: str) -> Scenario:
    return load(_TINY, ["guest.memory=64 MiB", "guest.workload.0.working-set=32 MiB", *settings])


def test_every_round_reports_its_cost_and_the_last_has_no_guest() -> None:
    result = _run()
    running = [row for row in result.rounds if not row.stopped]
    assert all(0.9 < row.guest_throughput_share <= 1.0 for row in running)
    assert result.rounds[-1].guest_throughput_share == 0.0
    assert all(row.migration_thread_cpu_ns > 0 for row in result.rounds)
    assert sum(row.lock_write_held_ns for row in result.rounds) == pytest.approx(
        float(result.host["lock-write-held-ns"]), rel=1e-6, abs=len(result.rounds)
    )


def test_both_paths_charge_the_same() -> None:
    fused, plain = _run(), _run(page_at_a_time=True)
    for a, b in zip(fused.rounds, plain.rounds, strict=True):
        assert a == b


def test_write_protection_stalls_vcpus_and_pml_does_not() -> None:
    pml, protected = _run("kvm.pml=true"), _run("kvm.pml=false")
    assert protected.host["guest-throughput-share"] < pml.host["guest-throughput-share"]
    assert sum(protected.host["vcpu-stalls"].values()) > 100 + sum(pml.host["vcpu-stalls"].values())


def test_without_manual_protection_the_hold_is_that_of_a_whole_get() -> None:
    lazy, at_once = _run(), _run("kvm.manual-dirty-log-protect=off")
    assert at_once.host["longest-hold-ns"] > 0
    assert at_once.host["lock-write-held-ns"] > 0
    assert lazy.migration["setup-time"] <= at_once.migration["setup-time"]


def test_tcg_is_charged_nothing() -> None:
    result = _run("kvm.accel=tcg")
    assert result.host["lock-write-held-ns"] == 0
    assert result.host["vcpu-stalls"] == {}


def test_an_unknown_profile_is_a_scenario_error() -> None:
    with pytest.raises(ScenarioError, match=r"host\.profile.*no host profile"):
        HostCosts(_scenario("host.profile=nowhere"))


def test_enabling_a_huge_guest_at_once_takes_minutes_and_initially_set_does_not() -> None:
    guest = ("guest.memory=12 TiB", "guest.backing=1G", "guest.vcpus=416")
    at_once = HostCosts(_scenario(*guest, "kvm.manual-dirty-log-protect=enable")).enable_ns()
    in_chunks = HostCosts(_scenario(*guest)).enable_ns()
    assert at_once > 60 * 10**9
    assert in_chunks < 10**9


def test_only_todays_tdp_mmu_is_spared_the_reverse_maps() -> None:
    """Heads came with every slot until 5.14, with the TDP MMU too; now with the first shadow root."""
    held = {mmu: _run(f"kvm.mmu={mmu}").host["memory"]["rmap-bytes"] for mmu in ("shadow", "tdp-5.10", "tdp")}
    assert held["shadow"] == held["tdp-5.10"] == pytest.approx(8 * (64 << 20) // 4096, rel=0.01)
    assert held["tdp"] == 0
