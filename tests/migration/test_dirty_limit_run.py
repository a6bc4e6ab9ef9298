"""dirty-limit end to end: a guest with dirty rings, held to its quota by sleeping on full rings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from migsim import simulation
from migsim.result import Result
from migsim.scenario import ScenarioError, build

LIFTED = {"at": "1500 ms", "dirty-rate": 0}


def run(*capabilities: str, limits: Sequence[dict[str, Any]] = (), **migration: Any) -> Result:
    stream = {"pattern": "uniform", "rate": "40000 pages/s", "working-set": "120 MiB", "vcpus": 1}
    return simulation.run(
        build(
            {
                "guest": {"memory": "128 MiB", "vcpus": 2, "workload": [stream]},
                "kvm": {"dirty-ring-size": 1024},
                "migration": {
                    "capabilities": list(capabilities), "max-bandwidth": 0, "downtime-limit": "100 ms",
                    "time-limit": "12 s", **migration,
                },
                "link": {"bandwidth": "400 Mbit/s"},
                "set-vcpu-dirty-limit": list(limits),
            }
        ),
        threads=1,
    )  # fmt: skip


def test_the_quota_makes_a_guest_converge_that_never_would() -> None:
    free, held = run(**{"time-limit": "6 s"}), run("dirty-limit", **{"vcpu-dirty-limit": 5})
    assert not free.converged
    assert held.converged and held.verify["lost-pages"] == 0
    assert held.migration["dirty-limit-throttle-time-per-round"] > 0
    rates = [row.new_dirty_pages for row in held.rounds if row.new_dirty_pages]
    assert min(rates) < max(rates) / 2


def test_a_quota_above_what_the_guest_writes_changes_nothing() -> None:
    short = {"time-limit": "3 s"}
    free, loose = run(**short), run("dirty-limit", **short, **{"vcpu-dirty-limit": 1000})
    assert [r.dirty_pages for r in free.rounds[:3]] == [r.dirty_pages for r in loose.rounds[:3]]
    assert loose.migration.get("dirty-limit-throttle-time-per-round", 0) == 0


def test_a_limit_set_by_command_holds_the_vcpu_it_names_and_is_told_until_it_is_taken_away() -> None:
    short: dict[str, Any] = {"time-limit": "3 s"}
    held = run(**short, limits=[{"dirty-rate": 5, "cpu-index": 0}])
    freed = run(**short, limits=[{"dirty-rate": 5}, {"at": "300 ms", "dirty-rate": 0}])
    assert [(row["cpu-index"], row["limit-rate"]) for row in held.vcpu_dirty_limit] == [(0, 5)]
    assert held.vcpu_dirty_limit[0]["current-rate"] < 60
    assert freed.vcpu_dirty_limit == ()
    assert freed.rounds[1].new_dirty_pages > 2 * held.rounds[1].new_dirty_pages


@pytest.mark.parametrize("compat", ["7.2", "10.0"])
def test_query_migrate_tells_of_sleeps_under_the_capability_and_while_a_quota_is_in_force(compat: str) -> None:
    short: dict[str, Any] = {"time-limit": "4 s", "postcopy-after": "2500 ms"}
    told = {"dirty-limit-throttle-time-per-round", "dirty-limit-ring-full-time"}
    by_command = run("postcopy-ram", **short, compat=compat, limits=[{"dirty-rate": 5}])
    assert by_command.vcpu_dirty_limit and not told & set(by_command.migration)
    if compat == "10.0":
        on: dict[str, Any] = {"vcpu-dirty-limit": 5, "limits": [{"dirty-rate": 5}]}
        held = run("dirty-limit", "postcopy-ram", **short, **on)
        freed = run("dirty-limit", "postcopy-ram", **short, **on | {"limits": [*on["limits"], LIFTED]})
        assert told <= set(held.migration) and not told & set(freed.migration)
        assert freed.vcpu_dirty_limit == ()


def test_a_limit_of_a_vcpu_that_writes_nothing_changes_nothing() -> None:
    short: dict[str, Any] = {"time-limit": "1500 ms"}
    free, other = run(**short), run(**short, limits=[{"dirty-rate": 5, "cpu-index": 1}])
    assert [r.dirty_pages for r in other.rounds] == [r.dirty_pages for r in free.rounds]
    assert free.vcpu_dirty_limit == ()
    assert other.vcpu_dirty_limit == ({"cpu-index": 1, "limit-rate": 5, "current-rate": 0},)


@pytest.mark.parametrize(
    ("limit", "kvm", "problem"),
    [
        ({"dirty-rate": 1, "cpu-index": 2}, {"dirty-ring-size": 1024}, "incorrect cpu index specified"),
        ({"dirty-rate": 1}, {}, "accelerator property 'dirty-ring-size' set"),
        ({"cpu-index": 1}, {"dirty-ring-size": 1024}, "dirty-rate: is missing"),
    ],
)
def test_a_limit_qemu_refuses_is_refused(limit: dict[str, Any], kvm: dict[str, Any], problem: str) -> None:
    with pytest.raises(ScenarioError, match=problem):
        build({"guest": {"memory": "128 MiB", "vcpus": 2}, "kvm": kvm, "set-vcpu-dirty-limit": [limit]})
