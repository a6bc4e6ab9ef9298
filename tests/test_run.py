"""Whole runs: the fused loops against the page-at-a-time path, threads, seeds, and each safety step taken away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migsim import simulation
from migsim.cli import main
from migsim.result import Result, to_json
from migsim.scenario import Scenario
from migsim.scenario.load import build
from migsim.validate.faults import CHANGED_NOTHING, FAULTS

MIB = 1 << 20


def scenario(**changes: object) -> Scenario:
    """A guest of 48 MiB that converges after a few rounds; `changes` are merged by section."""
    base: dict[str, dict[str, object]] = {
        "guest": {"memory": "48 MiB", "vcpus": 3, "zero": 0.1, "backing": "2M", "device-state": "64 KiB"},
        "kvm": {},
        "migration": {"max-bandwidth": 0, "downtime-limit": "300 ms", "time-limit": "20 s"},
        "link": {"bandwidth": "100 Mbit/s"},
    }
    for section, values in changes.items():
        base[section] = {**base[section], **values}  # type: ignore[dict-item]
    base["guest"].setdefault(
        "workload",
        [
            {"pattern": "hot-cold", "rate": "9000 pages/s", "working-set": "24 MiB"},
            {"pattern": "sequential", "rate": "1000 pages/s", "working-set": "8 MiB"},
        ],
    )
    return build(base)


def seen_by_user(result: Result) -> bytes:
    """Everything of a result but what only one path counts (TLB flushes, bits of the log looked at)."""
    return msgspec.json.encode((result.verdict, result.migration, result.rounds, result.downtime, result.converged))


PATTERNS = st.sampled_from(["uniform", "sequential", "hot-cold", "zipf"])


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    streams = [
        {
            "pattern": draw(PATTERNS),
            "rate": f"{draw(st.integers(50, 4000))} pages/s",
            "working-set": f"{draw(st.integers(1, 4096)) * 4} KiB",
            "offset": f"{draw(st.integers(0, 1800)) * 4} KiB",
        }
        for _ in range(draw(st.integers(0, 3)))
    ]
    return scenario(
        guest={
            "workload": streams,
            "memory": f"{draw(st.sampled_from([30, 32, 34]))} MiB",
            "zero": draw(st.sampled_from([0.0, 0.2])),
            "backing": draw(st.sampled_from(["4K", "2M"])),
        },
        kvm={
            "vendor": draw(st.sampled_from(["intel", "amd"])),
            "pml": draw(st.booleans()),
            "manual-dirty-log-protect": draw(st.sampled_from(["off", "enable", "initially-set"])),
        },
        migration={"max-bandwidth": draw(st.sampled_from([0, "20 MB/s"])), "time-limit": "2 s"},
    )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios(), st.integers(0, 1000))
def test_fused_loops_give_the_bytes_of_the_page_at_a_time_path(what: Scenario, seed: int) -> None:
    fused = simulation.run(what, seed=seed, threads=1)
    paged = simulation.run(what, seed=seed, page_at_a_time=True)
    assert fused.verify["lost-pages"] == paged.verify["lost-pages"] == 0
    assert seen_by_user(fused) == seen_by_user(paged)


def test_the_json_does_not_depend_on_threads_but_on_the_seed() -> None:
    what = scenario()
    one, two = (to_json(simulation.run(what, seed=7, threads=n)) for n in (1, 2))
    assert one == two
    assert one != to_json(simulation.run(what, seed=8, threads=1))


def test_without_the_oracle_the_migration_is_the_same() -> None:
    what = scenario()
    assert seen_by_user(simulation.run(what)) == seen_by_user(simulation.run(what, verify=False))


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_switching_one_step_off_loses_pages_and_names_them(name: str) -> None:
    busy = {"pattern": "uniform", "rate": "60000 pages/s", "working-set": "40 MiB"}
    what = scenario(guest={"workload": [busy]}, migration={"downtime-limit": "60 ms"}, link={"bandwidth": "4 Gbit/s"})
    assert simulation.run(what, page_at_a_time=True).exit_code == 0
    result = simulation.run(what, page_at_a_time=True, fault=FAULTS[name])
    assert result.exit_code == 3
    assert result.verify["first-lost-pages"][0].startswith("pc.ram page ")
    assert "pc.ram page" in result.verdict


def test_a_guest_too_busy_for_its_link_is_given_up_at_the_round_limit_and_said_so() -> None:
    what = scenario(
        guest={"workload": [{"pattern": "uniform", "rate": "40000 pages/s", "working-set": "40 MiB"}]},
        migration={"downtime-limit": "10 ms", "round-limit": 5},
    )
    result = simulation.run(what)
    assert (result.exit_code, result.migration["status"]) == (1, "cancelled")
    assert "round-limit" in result.verdict and "downtime-limit" in result.verdict
    assert result.verify["lost-pages"] == 0


def test_the_rounds_add_up_to_the_migration() -> None:
    result = simulation.run(scenario())
    ram = result.migration["ram"]
    assert sum(row.sent_pages for row in result.rounds) == ram["normal"]
    assert sum(row.zero_pages for row in result.rounds) == ram["duplicate"]
    setup = ram["transferred"] - sum(row.transferred_bytes for row in result.rounds)
    assert 0 < setup < 1000, "the stream before the first sync"
    old = simulation.run(scenario(migration={"compat": "7.2"}))
    assert sum(row.transferred_bytes for row in old.rounds) == old.migration["ram"]["transferred"]
    assert [row.sync for row in result.rounds] == list(range(1, ram["dirty-sync-count"] + 1))
    for before, after in zip(result.rounds, result.rounds[1:], strict=False):
        left = before.dirty_pages - before.sent_pages - before.zero_pages
        assert after.dirty_pages == left + after.new_dirty_pages
    assert sum(part.duration_ns for part in result.downtime) // 1_000_000 in (
        result.migration["downtime"] - 1, result.migration["downtime"], result.migration["downtime"] + 1
    )  # fmt: skip


def test_the_command_line_switches_a_step_off_and_exits_3() -> None:
    tiny = "configs/tiny.toml"
    command = [sys.executable, "-m", "migsim", "run", tiny, "--quiet", "--fault"]
    small = ["--set", "guest.memory=32MiB", "--set", "guest.workload.0.working-set=24MiB"]
    root = Path(__file__).parents[1]
    assert subprocess.run([*command, "no-protect", *small], cwd=root, check=False).returncode == 3
    refused = subprocess.run([*command, "no-protct", *small], cwd=root, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "must be one of" in refused.stderr


def test_a_fault_that_lost_nothing_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    small = ["--set", "guest.memory=32MiB", "--set", "guest.workload.0.working-set=24MiB"]
    idle = ["--set", "guest.workload=[]", "--set", "guest.memory=32MiB"]
    tiny = str(Path(__file__).parents[1] / "configs" / "tiny.toml")
    assert main(["run", tiny, "--fault", "no-final-sync", *idle]) == 0
    told = "the fault changed nothing: nothing was written between the last two syncs"
    assert capfd.readouterr().err.count(told) == 1
    assert main(["run", tiny, "--fault", "no-final-sync", "--quiet", *idle]) == 0
    assert main(["run", tiny, "--fault", "no-protect", *small]) == 3
    assert "changed nothing" not in capfd.readouterr().err
    assert set(FAULTS) == set(CHANGED_NOTHING)
