"""What a run has cost so far, round by round: it reads what happened and tells the closed loop (`perf.slowdown`).

`simulation` asks it for the guest's pace after each window, tells it when the guest stops and when post-copy has moved
it, and reports its rows. Costs are expectations; what is logged or lost is never decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from migsim.guest.workload import Workload
from migsim.migration.loop_types import RoundLog
from migsim.migration.ram import BlockState
from migsim.perf.pools import Span
from migsim.perf.postcopy_faults import PostcopyFaults
from migsim.perf.slowdown import ClosedLoop, RoundCost, Window
from migsim.units import CHUNK_PAGES, NS_PER_MS, NS_PER_S

__all__ = ["Meters", "RamCounters", "RoundRow", "Switched"]

PACE_NS: Final = NS_PER_S  # how often the guest's pace is solved again
BROKEN_NS: Final = NS_PER_S  # post-copy without a page for so long: the link is gone, not the rate limit's wait


class RamCounters(Protocol):
    """What QEMU's side has done so far, and where its scan stands."""

    clear_calls: int
    rearmed_pages: int
    harvests: int
    harvested_pages: int
    rearmed_leaves: int
    split_in_clear: int
    split_tables: Callable[[], int]
    blocks: list[BlockState]
    block_index: int
    page: int

    def dirty_between(self, first: int, end: int) -> int:
        """How many of the guest pages [first, end) are marked now."""


Switched = Callable[[], PostcopyFaults]


@dataclass(frozen=True)
class RoundRow:
    """What a round cost: shares 0..1, times in ns, stalls by upper bound in us."""

    guest_throughput_share: float
    lock_waiting_share: float
    lock_write_held_ns: int
    longest_hold_ns: int
    migration_thread_cpu_ns: int
    soft_lockups: int
    vcpu_stalls: dict[str, int]


class _Snapshot(NamedTuple):
    """A moment: the write clocks, the duty, and (ioctls that re-armed, their pages, 4K leaves, tables split off)."""

    now_ns: int
    clock: NDArray[np.float64]
    duty: float
    counters: tuple[int, int, int, int]
    scan: int  # guest page up to which CLEAR has been: a chunk is re-armed as a whole


class Meters:
    """Reads what happened since it last looked, tells the closed loop, and keeps a row a round.

    charged: without KVM the source is charged nothing.
    """

    def __init__(
        self,
        loop: ClosedLoop,
        workload: Workload,
        ram: RamCounters,
        charged: bool,
        switched: Switched,
    ) -> None:
        self.loop, self.workload, self.ram, self._charged = loop, workload, ram, charged
        self._switched, self.faults = switched, None
        self._rows: dict[int, RoundRow] = {}
        self.total = RoundCost()
        self._rounds: Sequence[RoundLog] = ()
        self._round = 0
        self._seen = self._last = self._snapshot(0)

    faults: PostcopyFaults | None  # since post-copy moved the guest

    # -- the source --------------------------------------------------------------------------------------------------

    def window(self, now_ns: int, rounds: Sequence[RoundLog]) -> float | None:
        """Called between two windows; the guest's slowdown from now on, or None to leave it. `rounds`: so far."""
        self._rounds = rounds
        new_round = self._enter_round()
        self._last = self._snapshot(now_ns)
        if not new_round and now_ns - self._seen.now_ns < PACE_NS:
            return None
        self._look(self._last)
        return self.loop.pace.slowdown

    def stop_or_resume(self, now_ns: int) -> None:
        """The guest is about to stop, or to run again: what follows is charged at another duty."""
        self._enter_round()
        self._last = self._snapshot(now_ns)
        self._look(self._last)

    def finish(self, now_ns: int, rounds: Sequence[RoundLog]) -> None:
        """The migration is over: closes the last round."""
        self._rounds = rounds
        self._enter_round()
        self._look(self._snapshot(max(now_ns, self._last.now_ns)))
        self._end_round()

    def row(self, sync: int) -> RoundRow:
        """What the round that began with that sync cost."""
        if sync in self._rows:
            return self._rows[sync]
        # Two syncs in one window: the first was over at once, at the pace of the round before.
        before = next((self._rows[known] for known in range(sync - 1, 0, -1) if known in self._rows), None)
        share = before.guest_throughput_share if before is not None else 1.0
        return replace(_row(RoundCost()), guest_throughput_share=share)

    def totals(self) -> dict[str, object]:
        """The whole run, for the result's `host`. The shares are the source's, while the guest ran there."""
        row = _row(self.total)
        out: dict[str, object] = {
            "guest-throughput-share": row.guest_throughput_share,
            "lock-waiting-share": row.lock_waiting_share,
            "lock-write-held-ns": row.lock_write_held_ns,
            "longest-hold-ns": row.longest_hold_ns,
            "soft-lockups": row.soft_lockups,
            "vcpu-stalls": row.vcpu_stalls,
        }
        if self.faults is not None:
            out["postcopy"] = {
                "guest-throughput-share": round(self.faults.guest_throughput_share, 6),
                "faults": round(self.faults.faults),
                "fault-latency-ns": round(self.faults.latency_ns + self.faults.answer_ns),
                "vcpu-stalls": self.faults.stalls.as_json(),
            }
        return out

    def _enter_round(self) -> bool:
        """Has another round begun since the last look? What was seen then is the end of the one before."""
        sync = self._rounds[-1].sync if self._rounds else 0
        if sync == self._round:
            return False
        self._look(self._last)
        self._end_round()
        self._round = sync
        return True

    def _snapshot(self, now_ns: int) -> _Snapshot:
        w, ram, counters = self.workload, self.ram, (0, 0, 0, 0)
        if self._charged:
            pages = ram.rearmed_pages + ram.harvested_pages
            leaves = ram.rearmed_leaves + ram.harvested_pages
            counters = (ram.clear_calls + ram.harvests, pages, leaves, ram.split_in_clear)
        block = ram.blocks[ram.block_index].block
        scan = min(-(-ram.page // CHUNK_PAGES) * CHUNK_PAGES, block.pages)
        return _Snapshot(now_ns, w.clock.copy(), w.duty, counters, block.first_page + scan)

    def _look(self, now: _Snapshot) -> None:
        """Account for what happened between the last look and `now`."""
        before, self._seen = self._seen, now
        calls, rearmed, leaves, splits = (b - a for a, b in zip(before.counters, now.counters, strict=True))
        duration = now.now_ns - before.now_ns
        if duration > 0 or calls:
            writes, where = now.clock - before.clock, self._scanned(before.scan, now.scan)
            full = self._full_rates(now.now_ns)
            self.loop.window(Window(duration, writes, full, now.duty, calls, rearmed, leaves, splits, where))

    def _full_rates(self, now_ns: int) -> NDArray[np.float64]:
        """Writes a ns every stream wants to make."""
        return np.array([s.pages_per_s * s.factor(now_ns) / NS_PER_S for s in self.workload.streams])

    def _scanned(self, start: int, stop: int) -> tuple[Span, ...]:
        """The guest pages the scan went over; () for all of them, as a GET that re-arms does."""
        if self.ram.harvests or start == stop:
            return ()
        if start < stop:
            return ((start, stop),)
        last = self.ram.blocks[-1].block
        return ((start, last.first_page + last.pages), (0, stop))

    def _end_round(self) -> None:
        done = self.loop.end_round()
        self.total.add(done)
        if not self._round:  # what precedes the first sync belongs to no round
            return
        row = _row(done)
        if self.faults is not None:
            share, stalls = self.faults.guest_throughput_share, self.faults.stalls
            done.stalls.merge(stalls)
            row = replace(row, guest_throughput_share=round(share, 6), vcpu_stalls=done.stalls.as_json())
        self._rows[self._round] = row

    # -- the destination ---------------------------------------------------------------------------------------------

    def postcopy(self, now_ns: int, resumed_ns: int, missing_pages: int) -> None:
        """Called at the switch and after each push: `missing_pages` are still to come, the guest runs from resumed."""
        if self.faults is None:
            self.faults = self._switched()
            self._missing = self._left = max(missing_pages, 1)
            self._ran_ns = resumed_ns
            return
        duration, rates = now_ns - self._ran_ns, self._full_rates(now_ns)
        if duration <= 0:
            return
        if missing_pages >= self._left and duration > BROKEN_NS:
            self.faults.stand_still(duration, rates)
        else:
            self.faults.advance(duration, rates, missing_pages / self._missing)
        self._ran_ns, self._left = now_ns, missing_pages

    def blocktime(self, writing: int) -> dict[str, Any]:
        """What postcopy-blocktime adds to the destination's query-migrate, ms; `writing` vCPUs write, the others idle.

        The first figure is the time in which every vCPU of the guest waited.
        """
        faults = self.faults
        if faults is None:
            return {}
        each = round(faults.blocked_ns / writing / NS_PER_MS) if writing else 0
        everyone = faults.all_blocked_ns if writing == faults.vcpus else 0.0
        return {
            "postcopy-blocktime": round(everyone / NS_PER_MS),
            "postcopy-vcpu-blocktime": [each] * writing + [0] * (faults.vcpus - writing),
        }

    def pages_asked_for(self) -> int:
        """Post-copy's page requests so far, expected."""
        return round(self.faults.faults) if self.faults is not None else 0


def _row(cost: RoundCost) -> RoundRow:
    return RoundRow(
        guest_throughput_share=round(cost.guest_throughput_share, 6),
        lock_waiting_share=round(cost.lock_waiting_share, 6),
        lock_write_held_ns=round(cost.lock_write_held_ns),
        longest_hold_ns=round(cost.longest_hold_ns),
        migration_thread_cpu_ns=round(cost.thread_cpu_ns),
        soft_lockups=cost.soft_lockups,
        vcpu_stalls=cost.stalls.as_json(),
    )
