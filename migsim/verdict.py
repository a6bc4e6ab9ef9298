"""One sentence about a run, the limiting term named: what a person reads first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from migsim.migration.failure import LINK
from migsim.migration.precopy import Precopy
from migsim.quantities import in_words
from migsim.result import DowntimePart, Round
from migsim.scenario import Scenario
from migsim.units import NS_PER_MS, NS_PER_S, PAGE_SIZE

PART_WORDS = {
    "stop": "stopping the vCPUs",
    "pre-switchover": "the client's wait in pre-switchover",
    "final-sync": "the final bitmap sync",
    "suspended": "suspended",
    "clear": "KVM's CLEAR of each chunk",
    "wire": "the last dirty pages on the wire",
    "device": "the device state",
    "vfio": "the staged devices' stop-copy state",
    "flush": "the link's latency",
    "load": "the destination's loading of device state",
    "return-path": "the destination's last word",
    "resume": "the destination's start",
    "discard": "naming the dirty pages to the destination",
}


def verdict_of(
    scenario: Scenario, loop: Precopy, rounds: Sequence[Round], parts: Sequence[DowntimePart],
    verify: Mapping[str, object], interrupted: bool,
) -> str:  # fmt: skip
    """The sentence."""
    when = in_words(loop.now_ns, "duration")
    if verify.get("lost-pages"):
        return f"Page lost: {verify['lost-pages']} pages differ at the destination, {_first(verify)} among them."
    if interrupted:
        return f"Interrupted after {when} of simulated time and {len(rounds)} rounds; the rest is unknown."
    if loop.status == "completed":
        syncs, blackout = loop.stats.dirty_sync_count, _blackout(scenario, loop, parts)
        return f"Converges in {when} after {syncs} bitmap syncs; {blackout}."
    if loop.why == LINK:
        return _cut_off(loop, when)
    return f"Does not converge within {loop.why} ({when}): {_limit(scenario, loop, rounds)}."


def _blackout(scenario: Scenario, loop: Precopy, parts: Sequence[DowntimePart]) -> str:
    """How long the guest stood still, from the first STOP to RESUME, and what most of that was.

    QEMU's own `downtime` begins at the switch-over and, without a return path, ends before the destination runs.
    """
    down = sum(part.duration_ns for part in parts)
    longest = max(parts, key=lambda part: part.duration_ns)
    share = 100 * longest.duration_ns // max(1, down)
    over = down > scenario.migration.downtime_limit * NS_PER_MS
    note = f", above the downtime-limit of {scenario.migration.downtime_limit} ms" if over else ""
    by = f" by {loop.suspended_by}" if longest.name == "suspended" else ""
    last = loop.rounds[-1]
    found = f"the final sync added {in_words(last.new_dirty_pages * PAGE_SIZE, 'size')} to the pages left to send"
    return f"the blackout is {down / NS_PER_MS:.0f} ms{note}, {share} % of it {PART_WORDS[longest.name]}{by}; {found}"


def _cut_off(loop: Precopy, when: str) -> str:
    """The connection died and nobody brought it back."""
    left = in_words(loop.ram.dirty_pages * PAGE_SIZE, "size")
    if loop.status == "postcopy-paused":
        return (
            f"Stays in postcopy-paused: the link died after {when} with {left} still at the source, "
            "and the guest at the destination stands still at the first page it lacks; nobody recovers it."
        )
    stood = sum(ns for _, ns in loop.parts)
    still = f", after standing still for {stood / NS_PER_MS:.0f} ms" if stood else ""
    return f"Fails after {when}: the link died with {left} to go; the guest goes on at the source{still}."


def _first(verify: Mapping[str, object]) -> str:
    names = verify.get("first-lost-pages")
    return str(names[0]) if isinstance(names, list) and names else "?"


def _limit(scenario: Scenario, loop: Precopy, rounds: Sequence[Round]) -> str:
    """What keeps it from converging: compare what gets dirty with what is sent, and the floor with the threshold."""
    seen = [r for r in rounds if r.duration_ns > NS_PER_S and r.sync > 1] or list(rounds)
    last = seen[-1]
    # what a sync finds was dirtied in the round before it
    rates = [
        after.new_dirty_pages * PAGE_SIZE * NS_PER_S // before.duration_ns
        for before, after in pairwise(rounds)
        if before.duration_ns > NS_PER_S // 10
    ]
    if loop.devices.stop_copy >= loop.stats.threshold_bytes > 0:
        state, admits = in_words(loop.devices.stop_copy, "size"), in_words(loop.stats.threshold_bytes, "size")
        limit = scenario.migration.downtime_limit
        return f"the devices' stop-copy state is {state}, and the downtime-limit of {limit} ms admits {admits} in all"
    if not loop.devices.may_switch_over(loop.now_ns, loop.guest_stopped):
        state = in_words(loop.devices.pending, "size")
        return f"the destination has not acknowledged the devices' initial state, {state} of which are still to be sent"
    sent = in_words(round(last.bandwidth), "rate")
    if loop.stats.dirty_sync_count < 2:
        return f"the first pass over {in_words(loop.ram.total_bytes, 'size')} is not finished at {sent}"
    floor = in_words(loop.stats.dirty_bytes_last_sync, "size")
    need = in_words(max(1, loop.stats.threshold_bytes), "size")
    rate = in_words(max(rates[-3:], default=0), "rate")
    return (
        f"each sync leaves {floor} dirty (the guest dirties {rate} of distinct pages, the migration sends {sent}), "
        f"and the downtime-limit of {scenario.migration.downtime_limit} ms admits {need}"
    )
