"""One sentence about a run, the limiting term named: what a person reads first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from migsim.migration.precopy import Precopy
from migsim.quantities import in_words
from migsim.result import DowntimePart, Round
from migsim.scenario import Scenario
from migsim.units import NS_PER_MS, NS_PER_S, PAGE_SIZE

PART_WORDS = {
    "stop": "stopping the vCPUs",
    "pre-switchover": "the client's wait in pre-switchover",
    "final-sync": "the final bitmap sync",
    "ram": "the last dirty pages",
    "device": "the device state",
    "flush": "the link's latency",
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
        down = loop.stats.downtime_ns
        longest = max(parts, key=lambda part: part.duration_ns)
        share = 100 * longest.duration_ns // max(1, down)
        over = down > scenario.migration.downtime_limit * NS_PER_MS
        note = f", above the downtime-limit of {scenario.migration.downtime_limit} ms" if over else ""
        return (
            f"Converges in {when} after {loop.stats.dirty_sync_count} bitmap syncs; the blackout is "
            f"{down / NS_PER_MS:.0f} ms{note}, {share} % of it {PART_WORDS[longest.name]}."
        )
    return f"Does not converge within {loop.why} ({when}): {_limit(scenario, loop, rounds)}."


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
