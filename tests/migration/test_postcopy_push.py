"""Post-copy's pushes: what a page costs while the guest still misses pages it writes to, and once it does not."""

from __future__ import annotations

from collections.abc import Mapping

from migsim import simulation
from migsim.guest.workload import UNIFORM, Stream, Workload
from migsim.host_costs import HostCosts
from migsim.qemu_costs import QemuCosts
from migsim.result import Result
from migsim.scenario import build
from migsim.units import PAGE_SIZE


def run(writes_in: str) -> Result:
    """Post-copy 100 ms after migrate at 20 MB/s: nearly all of 256 MiB is still to come."""
    return simulation.run(
        build(
            {
                "guest": {
                    "memory": "256 MiB", "machine": "pc", "data": [{"offset": "0 B", "size": "256 MiB"}],
                    "workload": [{"pattern": "uniform", "rate": "40 MB/s", "offset": "0 B", "working-set": writes_in}],
                },
                "migration": {
                    "compat": "7.2", "capabilities": ["events", "postcopy-ram"], "postcopy-after": "100 ms",
                    "max-bandwidth": "20 MB/s",
                },
                "link": {"bandwidth": "100 Gbit/s"},
                "host": {"profile": "qemu-7.2-loopback"},
            }
        ),
        seed=1, threads=1,
    )  # fmt: skip


def test_pages_the_guest_writes_to_are_dearer_than_the_rest() -> None:
    costs = _profile_ns(run("16 MiB"))
    assert costs["qemu_postcopy_page"] > 2 * costs["qemu_postcopy_page_calm"]
    pages = 256 * 256 - 2 * (20_000_000 // 10 // PAGE_SIZE)  # two windows went before the switch
    for writes_in, share in (("16 MiB", 16 / 256), ("128 MiB", 0.5), ("256 MiB", 1.0)):
        result = run(writes_in)
        at_us = {event["event"]: event["timestamp"]["microseconds"] for event in result.events}  # the last of each
        pushed_ns = 1000 * (at_us["MIGRATION"] - at_us["RESUME"]) + costs["qemu_postcopy_run"]
        mean = share * costs["qemu_postcopy_page"] + (1 - share) * costs["qemu_postcopy_page_calm"]
        assert abs(pushed_ns / pages / mean - 1) < 0.05, writes_in


def _profile_ns(result: Result) -> Mapping[str, float]:
    costs = QemuCosts(result.scenario, HostCosts(result.scenario).priced())
    return {op: costs.ns(op) for op in ("qemu_postcopy_page", "qemu_postcopy_page_calm", "qemu_postcopy_run")}


def test_what_several_streams_write_counts_once() -> None:
    streams = [Stream(UNIFORM, 5, 20, 1.0), Stream(UNIFORM, 0, 10, 1.0), Stream(UNIFORM, 40, 50, 1.0)]
    assert Workload(streams, 1, 0).ranges() == [(0, 20), (40, 50)]
