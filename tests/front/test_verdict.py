"""The sentence a person reads first names what limits the migration, and who ended it."""

from __future__ import annotations

import pytest

from migsim import load, run
from migsim.quantities import clock, counted

HOT = ["guest.workload.0.rate=10 M pages/s", "guest.workload.0.pattern=uniform", "guest.memory=64 MiB"]
HOT += ["guest.workload.0.working-set=32 MiB", "link.bandwidth=500 Mbit/s"]
GPU = "guest.device=[{{name='gpu', {}}}]"

CASES = {
    "the last pages": ([], ("Converges in 1.", "after 5 bitmap syncs", "of it the last dirty pages on the wire")),
    "the device state": (["guest.workload=[]", "guest.memory=4 KiB"], ("of it the device state", "found nothing new")),
    "the client": (
        ["migration.capabilities=['pause-before-switchover']", "migration.switchover-pause=5 s"],
        ("the blackout is 5.1", "above the downtime-limit of 300 ms", "the client's wait in pre-switchover"),
    ),
    "post-copy": (
        ["migration.capabilities=['postcopy-ram']", "migration.postcopy-after=500 ms"],
        ("Moves by post-copy in 1.", "after 2 bitmap syncs", "to the pages left to send"),
    ),
    "the link": (["migration.time-limit=300 ms"], ("the time-limit of 300 ms: the first pass over 256 MiB",)),
    "the working set": (
        [*HOT, "migration.time-limit=10 s"],
        ("the time-limit of 10 s: each sync leaves 32 MiB dirty, as much as", "300 ms admits 17."),
    ),
    "one round": ([*HOT, "migration.round-limit=1"], ("within the round-limit of 1 bitmap sync (",)),
    "the threshold": (
        [*HOT, "guest.workload.0.rate=40000 pages/s", "migration.time-limit=30 s"],
        ("hovers at that threshold: ", "syncs are less than a second apart, and the last 16 expected a downtime of"),
    ),
    "the operator": (["migration.cancel-after=500 ms"], ("Cancelled by the operator after 50",)),
    "a platform": (
        [*HOT, "migration.time-limit=2 h", "migration.platform=kubevirt"],
        ("Cancelled by kubevirt after ", "(not completed after 150 s): each sync leaves 32 MiB"),
    ),
    "a platform's own limit": (
        [*HOT, "migration.time-limit=20 min", "migration.platform=nova"],
        ("and the downtime-limit of 365 ms admits",),
    ),
    "stop-copy state": (
        [GPU.format("stop-copy='1 GiB'"), "migration.time-limit=3 s"],
        ("the devices' stop-copy state is 1 GiB, and the downtime-limit of 300 ms admits",),
    ),
    "state that changes": (
        [GPU.format("initial='1 GiB', dirty-rate='1 GB/s'"), "migration.time-limit=20 s"],
        ("the devices' pre-copy state changes as fast as it is sent, 1 GiB of it are left",),
    ),
    "the link dies": (["link.fail-at=400 ms"], ("Fails after 40", "the guest goes on at the source")),
}


@pytest.mark.parametrize(("settings", "phrases"), CASES.values(), ids=CASES)
def test_the_limiting_term_is_named(settings, phrases):
    verdict = run(load("configs/tiny.toml", settings)).verdict
    assert [phrase for phrase in phrases if phrase not in verdict] == [], verdict
    assert verdict.endswith(".") and "\n" not in verdict


def test_one_is_singular_and_a_minute_is_read_off_a_clock():
    assert [counted(n, "round") for n in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]
    times = (300_000_000, 59_640_000_000, 1_240 * 10**9, 7_510 * 10**9)
    assert [clock(ns) for ns in times] == ["300 ms", "59.64 s", "20:40 min", "2:05:10 h"]
