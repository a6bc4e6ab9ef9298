"""What a run costs the host and the guest: a scenario's host profile applied to its loop, round by round.

Sits beside `simulation`, which asks it three things: the price of KVM's ioctls (`priced`, `enable_ns`), the guest's
pace after each window (`Meters.window`), and what to report of a round (`Meters.rows`). Costs are expectations; what is
logged or lost is never decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from migsim.guest.memory import layout
from migsim.guest.workload import SEQUENTIAL, Workload
from migsim.migration.loop_types import RoundLog
from migsim.migration.ram import BlockState
from migsim.perf.memstress import Memstress
from migsim.perf.migration_thread import clear_cost, enable_ns
from migsim.perf.pools import Pools, Span
from migsim.perf.profile import HostProfile, ProfileError, load_profile
from migsim.perf.rules import default_kernel, rules_for
from migsim.perf.slowdown import ClosedLoop, RoundCost, Window
from migsim.qemu_costs import ASSUMED_NS
from migsim.scenario import Scenario, ScenarioError
from migsim.units import CHUNK_PAGES, NS_PER_S, PAGE_SIZE

__all__ = ["HostCosts", "Meters"]

PACE_NS: Final = NS_PER_S  # how often the guest's pace is solved again
BACKING_PAGES: Final[Mapping[str, int]] = {"4K": 1, "2M": 512, "1G": 262144}
_BACKING_SOURCE: Final = {"4K": "anonymous", "2M": "anonymous_hugetlb_2mb", "1G": "anonymous_hugetlb_1gb"}
_MANUAL: Final = {"off": 0, "enable": 1, "initially-set": 3}
_RMAP_HEAD_BYTES: Final = 8  # struct kvm_rmap_head


class RamCounters(Protocol):
    """What QEMU's side has done so far, and where its scan stands."""

    clear_calls: int
    rearmed_pages: int
    blocks: list[BlockState]
    block_index: int
    page: int


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


class HostCosts:
    """The host profile of a scenario. Raises ScenarioError (field host.profile) when there is no such profile."""

    def __init__(self, scenario: Scenario) -> None:
        try:
            self.profile: HostProfile = load_profile(scenario.host.profile)
        except ProfileError as error:
            raise ScenarioError("host.profile", str(error), value=scenario.host.profile) from None
        guest, kvm = scenario.guest, scenario.kvm
        self.scenario = scenario
        self.kvm = kvm.accel == "kvm"
        self.rules = rules_for(kvm.mmu, default_kernel(kvm.mmu))
        self.pml = kvm.pml and kvm.vendor == "intel"  # AMD has none in the kernels read
        self.clear = clear_cost(self.rules, self.profile, guest.vcpus, pml=self.pml)

    @property
    def _armed_at_enable(self) -> bool:
        """Does enabling the log arm every page: without INITIALLY_SET, and until 5.10 under huge leaves with it."""
        kvm = self.scenario.kvm
        huge = self.rules.protects_huge_at_enable and self.scenario.guest.backing != "4K"
        return kvm.manual_dirty_log_protect != "initially-set" or huge

    def priced(self) -> dict[str, float]:
        """ns of the operations qemu_costs knows, where this host's profile says something about them."""
        own = {
            op.replace("-", "_"): self.profile.ns(op)
            for op in self.profile.costs
            if op.startswith(("qemu-", "multifd-"))
        }
        if not self.kvm:
            return own
        setup = {"qemu_setup": own.get("qemu_setup", ASSUMED_NS["qemu_setup"]) + self.enable_ns()}
        return {**own, **setup, **self._clear_ns()}

    def _clear_ns(self) -> dict[str, float]:
        clear = self.clear
        return {
            "kvm_clear": clear.call_ns,
            "kvm_clear_stopped": clear.stopped_call_ns,
            "kvm_clear_page": clear.page_ns,
        }

    def enable_ns(self) -> int:
        """KVM_MEM_LOG_DIRTY_PAGES on every slot: what it does to the populated part, and the bitmaps of all of it."""
        guest, kvm = self.scenario.guest, self.scenario.kvm
        slots = sum(len(found) for _, _, found in layout(guest.memory, guest.numa_nodes, guest.machine))
        per_vcpu = -(-guest.populated_pages // guest.vcpus) * PAGE_SIZE
        counts, _ = Memstress(
            vcpus=guest.vcpus, memory_per_vcpu=max(per_vcpu, PAGE_SIZE), mmu=kvm.mmu, slots=slots, pml=self.pml,
            backing=_BACKING_SOURCE[guest.backing], manual=_MANUAL[kvm.manual_dirty_log_protect],
            eager_page_split=kvm.eager_page_split,
        ).enable()  # fmt: skip
        return enable_ns(counts, self.profile)

    def rmap_bytes(self) -> int:
        """Reverse map of the legacy MMU: a head for every gfn of a slot at 4K, 2M and 1G."""
        pages = self.scenario.guest.pages
        return _RMAP_HEAD_BYTES * (pages + pages // 512 + pages // 262144) if self.rules.rmap else 0

    def meters(self, workload: Workload, ram: RamCounters, operations: Mapping[str, int], slots: int) -> Meters:
        """The closed loop of a run. `operations`: the meter's totals; `slots`: a GET without manual caps re-arms."""
        guest, kvm = self.scenario.guest, self.scenario.kvm
        pools = Pools(
            workload.first.astype(np.float64), workload.end.astype(np.float64), workload.law == SEQUENTIAL,
            float(guest.pages), BACKING_PAGES[guest.backing], self.rules, pml=self.pml, eager=kvm.eager_page_split,
            protected=self.kvm and self._armed_at_enable,
        )  # fmt: skip
        loop = ClosedLoop(self.profile, guest.vcpus, self.rules, pools, self.clear, kvm.dirty_ring_size)
        get_slots = slots if kvm.manual_dirty_log_protect == "off" else 0
        return Meters(loop, workload, ram, operations if self.kvm else None, get_slots)


class _Snapshot(NamedTuple):
    """A moment: the write clocks, the duty, and (CLEAR calls, pages re-armed, splits)."""

    now_ns: int
    clock: NDArray[np.float64]
    duty: float
    counters: tuple[int, int, int]
    scan: int  # guest page up to which CLEAR has been: a chunk is re-armed as a whole


class Meters:
    """Reads what happened since it last looked, tells the closed loop, and keeps a row a round.

    operations: the meter's totals, None where there is no KVM (then nothing is charged). get_slots: memslots whose GET
    re-arms, each under one hold of the lock; 0 with manual protection.
    """

    def __init__(
        self,
        loop: ClosedLoop,
        workload: Workload,
        ram: RamCounters,
        operations: Mapping[str, int] | None,
        get_slots: int,
    ) -> None:
        self.loop, self.workload, self.ram, self._get_slots = loop, workload, ram, get_slots
        self._operations = operations
        self._rows: dict[int, RoundRow] = {}
        self.total = RoundCost()
        self._round = self._found = 0
        self._seen = self._last = self._snapshot(0)

    def window(self, now_ns: int, rounds: Sequence[RoundLog]) -> float | None:
        """Called between two windows; the guest's slowdown from now on, or None to leave it. `rounds`: so far."""
        sync = rounds[-1].sync
        new_round = sync != self._round
        if new_round:
            self._look(self._last)  # what was seen last is the end of the round before
            self._end_round()
            self._round = sync
            self._found = _found(rounds)
        self._last = self._snapshot(now_ns)
        if not new_round and now_ns - self._seen.now_ns < PACE_NS:
            return None
        self._look(self._last)
        return self.loop.pace.slowdown

    def finish(self, stopped_ns: int, rounds: Sequence[RoundLog]) -> None:
        """The migration is over; the guest ran until `stopped_ns`. Closes the last round."""
        self._found = _found(rounds)
        end = self._snapshot(max(stopped_ns, self._last.now_ns))
        self._look(end._replace(duty=self._last.duty))
        self._end_round()

    def row(self, sync: int) -> RoundRow:
        """What the round that began with that sync cost."""
        if sync in self._rows:
            return self._rows[sync]
        # Two syncs in one window: the first was over at once, at the pace of the round before.
        before = max((known for known in self._rows if known < sync), default=None)
        share = self._rows[before].guest_throughput_share if before is not None else 1.0
        return replace(_row(RoundCost()), guest_throughput_share=share)

    def totals(self) -> dict[str, object]:
        """The whole run, for the result's `host`."""
        row = _row(self.total)
        return {
            "guest-throughput-share": row.guest_throughput_share,
            "lock-waiting-share": row.lock_waiting_share,
            "lock-write-held-ns": row.lock_write_held_ns,
            "longest-hold-ns": row.longest_hold_ns,
            "soft-lockups": row.soft_lockups,
            "vcpu-stalls": row.vcpu_stalls,
        }

    def _snapshot(self, now_ns: int) -> _Snapshot:
        w, counters = self.workload, (0, 0, 0)
        if self._operations is not None:
            splits = self._operations.get("huge_page_split", 0)
            counters = (self.ram.clear_calls, self._found if self._get_slots else self.ram.rearmed_pages, splits)
        block = self.ram.blocks[self.ram.block_index].block
        scan = min(-(-self.ram.page // CHUNK_PAGES) * CHUNK_PAGES, block.pages)
        return _Snapshot(now_ns, w.clock.copy(), w.duty, counters, block.first_page + scan)

    def _look(self, now: _Snapshot) -> None:
        """Account for what happened between the last look and `now`."""
        before, self._seen = self._seen, now
        calls, rearmed, splits = (b - a for a, b in zip(before.counters, now.counters, strict=True))
        duration = now.now_ns - before.now_ns
        if duration > 0 or rearmed:
            calls = calls or (self._get_slots if rearmed else 0)
            streams = self.workload.streams
            full = np.array([stream.pages_per_s * stream.factor(now.now_ns) / NS_PER_S for stream in streams])
            writes, where = now.clock - before.clock, self._scanned(before.scan, now.scan)
            self.loop.window(Window(duration, writes, full, now.duty, calls, rearmed, splits, where))

    def _scanned(self, start: int, stop: int) -> tuple[Span, ...]:
        """The guest pages the scan went over; () for all of them, as a GET that re-arms does."""
        if self._get_slots or start == stop:
            return ()
        if start < stop:
            return ((start, stop),)
        last = self.ram.blocks[-1].block
        return ((start, last.first_page + last.pages), (0, stop))

    def _end_round(self) -> None:
        done = self.loop.end_round()
        self._add(done)
        if self._round:  # what precedes the first sync belongs to no round
            self._rows[self._round] = _row(done)

    def _add(self, done: RoundCost) -> None:
        t = self.total
        t.done, t.wanted, t.duration_ns = t.done + done.done, t.wanted + done.wanted, t.duration_ns + done.duration_ns
        t.running_ns += done.running_ns
        t.lock_waiting_ns += done.lock_waiting_ns
        t.lock_write_held_ns += done.lock_write_held_ns
        t.longest_hold_ns = max(t.longest_hold_ns, done.longest_hold_ns)
        t.thread_cpu_ns += done.thread_cpu_ns
        t.stalls.merge(done.stalls)


def _found(rounds: Sequence[RoundLog]) -> int:
    """Pages the syncs found newly dirty: what GETs without manual protection re-armed.

    But for pages QEMU had marked already, so the hold errs towards the short.
    """
    return sum(row.new_dirty_pages for row in rounds)


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
