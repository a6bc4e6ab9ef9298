"""One sentence about a run, the limiting term named: what a person reads first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from migsim.migration.failure import LINK
from migsim.migration.precopy import Precopy
from migsim.quantities import clock, counted, in_words
from migsim.result import DowntimePart, Round
from migsim.scenario import Scenario
from migsim.units import NS_PER_MS, NS_PER_S, PAGE_SIZE

_ALIKE = 0.02  # two rates that differ by less are told as one
_NEAR = 2  # thresholds: what is left where a run is called hovering
_HOVERS = 16  # rounds in a row

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
    "protect": "write-protecting every page",
    "discard": "naming the dirty pages to the destination",
}

FILE_WORDS = {"wire": "the last dirty pages to storage"}


def verdict_of(
    scenario: Scenario, loop: Precopy, rounds: Sequence[Round], parts: Sequence[DowntimePart],
    verify: Mapping[str, object], interrupted: bool,
) -> str:  # fmt: skip
    """The sentence."""
    when = clock(loop.now_ns)
    if lost := verify.get("lost-pages"):
        differ = "1 page differs at the destination:" if lost == 1 else f"{lost} pages differ at the destination, first"
        return f"Page lost: {differ} {_first(verify)}."
    if interrupted:
        done = counted(len(rounds), "round")
        return f"Interrupted after {when} of simulated time and {done}; the rest is unknown."
    if loop.status == "completed":
        how = "Moves by post-copy in" if any(part.name == "discard" for part in parts) else "Converges in"
        how = "Is saved to its file in" if loop.to_file else how
        if scenario.migration.is_snapshot:
            return f"{_snapshot(loop, when, rounds)}."
        syncs = counted(loop.stats.dirty_sync_count, "bitmap sync")
        short = _short(rounds)
        near = f", {short} of them less than a second apart" if short >= _HOVERS else ""
        stood = _stays_stopped(loop, parts) if loop.to_file else _blackout(loop, parts)
        return f"{how} {when} after {syncs}{near}; {stood}."
    if loop.why == LINK:
        return _cut_off(loop, when)
    return f"{_called_off(scenario, loop, when)}: {_limit(loop, rounds)}{_hovering(rounds)}."


def _snapshot(loop: Precopy, when: str, rounds: Sequence[Round]) -> str:
    """A snapshot is whole and the guest runs on: what it stood still for, and how fast it ran meanwhile."""
    stood = clock(sum(ns for _, ns in loop.parts))
    pace = rounds[-1].guest_throughput_share
    return (
        f"The snapshot is complete in {when}; the guest stood still for {stood}, "
        f"made {pace:.0%} of its writes while pages were saved, and runs on"
    )


def _called_off(scenario: Scenario, loop: Precopy, when: str) -> str:
    """Who ended it."""
    migration = scenario.migration
    if loop.why == "time-limit" and migration.time_limit is not None:
        return f"Does not converge within the time-limit of {clock(migration.time_limit)}"
    if loop.why == "round-limit" and migration.round_limit is not None:
        most = counted(migration.round_limit, "bitmap sync")
        return f"Does not converge within the round-limit of {most} ({when})"
    if loop.why == "cancel-after":
        return f"Cancelled by the operator after {when}"
    return f"Cancelled by {migration.platform} after {when} ({loop.why})"


def _blackout(loop: Precopy, parts: Sequence[DowntimePart]) -> str:
    """How long the guest stood still, from the first STOP to RESUME, and what most of that was.

    QEMU's own `downtime` begins at the switch-over and, without a return path, ends before the destination runs.
    """
    down = sum(part.duration_ns for part in parts)
    over = down > loop.knobs.downtime_limit_ms * NS_PER_MS
    note = f", above the downtime-limit of {loop.knobs.downtime_limit_ms} ms" if over else ""
    return f"the blackout is {clock(down)}{note}, {_most(loop, parts)}; {_final_sync(loop)}"


def _stays_stopped(loop: Precopy, parts: Sequence[DowntimePart]) -> str:
    """A guest saved to a file, which nobody resumes: its standstill has a beginning and no end."""
    down = sum(part.duration_ns for part in parts)
    after = loop.now_ns - down
    since = f"{clock(after)} after the start" if after else "the start"
    told = f"the guest stays stopped, since {since}; saving took {clock(down)} from there"
    return f"{told}, {_most(loop, parts)}; {_final_sync(loop)}"


def _most(loop: Precopy, parts: Sequence[DowntimePart]) -> str:
    """The longest part of the standstill, and its share."""
    longest = max(parts, key=lambda part: part.duration_ns)
    share = 100 * longest.duration_ns // max(1, sum(part.duration_ns for part in parts))
    by = f" by {loop.suspended_by}" if longest.name == "suspended" else ""
    words = FILE_WORDS.get(longest.name) if loop.to_file else None
    return f"{share} % of it {words or PART_WORDS[longest.name]}{by}"


def _final_sync(loop: Precopy) -> str:
    new = loop.rounds[-1].new_dirty_pages * PAGE_SIZE
    found = f"added {in_words(new, 'size')} to the pages left to send" if new else "found nothing new"
    return f"the final sync {found}"


def _cut_off(loop: Precopy, when: str) -> str:
    """The connection died and nobody brought it back."""
    left = in_words(loop.ram.dirty_pages * PAGE_SIZE, "size")
    if loop.status == "postcopy-paused":
        return (
            f"Stays in postcopy-paused: the link died after {when} with {left} still at the source, "
            "and the guest at the destination stands still at the first page it lacks; nobody recovers it."
        )
    stood = sum(ns for _, ns in loop.parts)
    still = f", after standing still for {clock(stood)}" if stood else ""
    return f"Fails after {when}: the link died with {left} to go; the guest goes on at the source{still}."


def _first(verify: Mapping[str, object]) -> str:
    names = verify.get("first-lost-pages")
    return str(names[0]) if isinstance(names, list) and names else "?"


def _short(rounds: Sequence[Round]) -> int:
    """How many syncs of the running guest came less than a second before the next."""
    return sum(r.duration_ns < NS_PER_S for r in rounds[:-1] if not r.stopped)


def _last_at_threshold(rounds: Sequence[Round]) -> Sequence[Round]:
    """The last rounds, all of them short and near the threshold that ends them; () if the run does not hover there."""
    last = [r for r in rounds[-_HOVERS - 2 : -1] if not r.stopped][-_HOVERS:]
    if len(last) < _HOVERS or any(r.duration_ns >= NS_PER_S for r in last):
        return ()
    near = all(r.dirty_pages * PAGE_SIZE < _NEAR * r.threshold_bytes for r in last)
    return last if near else ()


def _balance(some: Sequence[Round], after: Round) -> tuple[int, float]:
    """Bytes/s dirtied and sent over `some` rounds, to the sync that begins `after`, which follows them."""
    duration_ns = sum(r.duration_ns for r in some)
    found = sum(r.new_dirty_pages for r in (*some[1:], after)) * PAGE_SIZE
    return found * NS_PER_S // duration_ns, sum(r.transferred_bytes for r in some) * NS_PER_S / duration_ns


def _hovering(rounds: Sequence[Round]) -> str:
    """Said of a run that ends while a sync a moment finds just too much left."""
    last = _last_at_threshold(rounds)
    if not last:
        return ""
    expected = [r.expected_downtime_ms * NS_PER_MS for r in last]
    span = f"{clock(min(expected))} to {clock(max(expected))}" if min(expected) < max(expected) else clock(expected[0])
    return (
        f"; it hovers at that threshold: {_short(rounds)} of {len(rounds)} syncs are less than a second apart, "
        f"and the last {_HOVERS} expected a downtime of {span}"
    )


def _limit(loop: Precopy, rounds: Sequence[Round]) -> str:
    """What keeps it from converging: compare what gets dirty with what is sent, and the floor with the threshold."""
    seen = [r for r in rounds if r.duration_ns > NS_PER_S and r.sync > 1] or list(rounds)
    bandwidth = seen[-1].bandwidth
    # what a sync finds was dirtied in the round before it
    rates = [
        after.new_dirty_pages * PAGE_SIZE * NS_PER_S // before.duration_ns
        for before, after in pairwise(rounds)
        if before.duration_ns > NS_PER_S // 10
    ]
    dirtied = max(rates[-3:], default=0)
    if short := _last_at_threshold(rounds):  # one alone is a window or two long
        dirtied, bandwidth = _balance(short, rounds[-1])
    if loop.devices.stop_copy >= loop.stats.threshold_bytes > 0:
        state, admits = in_words(loop.devices.stop_copy, "size"), in_words(loop.stats.threshold_bytes, "size")
        limit = loop.knobs.downtime_limit_ms
        return f"the devices' stop-copy state is {state}, and the downtime-limit of {limit} ms admits {admits} in all"
    if not loop.devices.may_switch_over(loop.now_ns, loop.guest_stopped):
        state = in_words(loop.devices.pending, "size")
        return f"the destination has not acknowledged the devices' initial state, {state} of which are still to be sent"
    left, admitted = loop.devices.pending, loop.stats.threshold_bytes
    if left > max(admitted, loop.ram.dirty_pages * PAGE_SIZE):
        state, admits = in_words(left, "size"), in_words(admitted, "size")
        return (
            f"the devices' pre-copy state changes as fast as it is sent, {state} of it are left, "
            f"and the downtime-limit of {loop.knobs.downtime_limit_ms} ms admits {admits}"
        )
    sent = in_words(round(bandwidth), "rate")
    if loop.stats.dirty_sync_count < 2:
        return f"the first pass over {in_words(loop.ram.total_bytes, 'size')} is not finished at {sent}"
    floor = in_words(loop.stats.dirty_bytes_last_sync, "size")
    need = in_words(max(1, loop.stats.threshold_bytes), "size")
    balance = f" (the guest dirties {in_words(dirtied, 'rate')} of distinct pages, the migration sends {sent})"
    if abs(dirtied - bandwidth) < _ALIKE * bandwidth:
        balance = f", as much as the migration sends between two ({sent})"
    return (
        f"each sync leaves {floor} dirty{balance}, "
        f"and the downtime-limit of {loop.knobs.downtime_limit_ms} ms admits {need}"
    )
