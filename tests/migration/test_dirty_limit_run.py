"""dirty-limit end to end: a guest with dirty rings, held to its quota by sleeping on full rings."""

from __future__ import annotations

from typing import Any

from migsim import simulation
from migsim.result import Result
from migsim.scenario import build


def run(*capabilities: str, **migration: Any) -> Result:
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
