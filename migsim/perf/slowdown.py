"""The closed loop: what faults, logging, flushes and the lock cost the guest, and so how much slower it writes.

A vCPU is taken to be busy: at full speed it makes its share of the workload's writes and nothing is spare, so every
nanosecond spent in an exit or a queue is missing. Each cost slows the guest once: exits and waits by `slowdown` while
it runs, a throttle's sleep by the duty alone, dirty-limit's by the streams' shares. Times are ns; shares 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migsim.perf.locks import Writer, WriterSolution, with_writer
from migsim.perf.migration_thread import ClearCost
from migsim.perf.phases import LockMode
from migsim.perf.pools import FirstWrites, Pools, Span
from migsim.perf.profile import HostProfile
from migsim.perf.rules import Rules
from migsim.perf.stalls import StallHistogram
from migsim.units import NS_PER_S

__all__ = ["ClosedLoop", "Pace", "RoundCost", "Window"]

Floats = NDArray[np.float64]
RARE = 1e-12  # a chance of waiting for the lock below this is none: nobody waits once in 10^12 writes
_PML_ENTRIES: Final = 512
_RING_RESERVE: Final = 64  # KVM_DIRTY_RING_RSVD_ENTRIES: the soft limit leaves them, and room for a PML buffer
_REAPER_NS: Final = NS_PER_S  # QEMU's reaper thread sleeps a second between two rounds (accel/kvm/kvm-all.c)
SOFT_LOCKUP_NS: Final = 20 * NS_PER_S  # watchdog_thresh 10 s, reported at twice that (kernel/watchdog.c)


@dataclass(frozen=True)
class Window:
    """What happened in a stretch of time.

    writes: float64[S] made; rates: float64[S] at full speed, writes a ns; calls: ioctls that re-armed (CLEAR, or GET
    without manual protection); rearmed_pages: bits they took, of which rearmed_leaves were mapped by 4K leaves;
    rearmed_in: the guest pages they went over; duty: 0 with the guest stopped.
    """

    duration_ns: int
    writes: Floats
    rates: Floats
    duty: float
    calls: int
    rearmed_pages: int
    rearmed_leaves: int
    split_tables: int = 0
    rearmed_in: Sequence[Span] = ()


@dataclass(frozen=True)
class Pace:
    """The guest's speed: `slowdown` >= 1 while it runs, and the share of that time waiting for mmu_lock.

    A fault that takes the lock waits queue_ns on average for other vCPUs; caught of them (0..1) also meet a hold of the
    migration thread, and wait up to caught_ns for its end.
    """

    slowdown: float = 1.0
    lock_waiting_share: float = 0.0
    queue_ns: float = 0.0
    caught: float = 0.0
    caught_ns: float = 0.0


@dataclass
class RoundCost:
    """One round: writes made and wanted while the guest ran, the lock, the thread, the stalls."""

    done: float = 0.0
    wanted: float = 0.0
    duration_ns: int = 0
    stopped_ns: int = 0
    running_ns: float = 0.0
    lock_waiting_ns: float = 0.0
    lock_write_held_ns: float = 0.0
    longest_hold_ns: float = 0.0
    soft_lockups: int = 0
    thread_cpu_ns: float = 0.0
    stalls: StallHistogram = field(default_factory=StallHistogram)

    @property
    def guest_throughput_share(self) -> float:
        """Writes made over writes wanted; of an idle guest, the share of time it may run."""
        if self.wanted > 0.0:
            return min(self.done / self.wanted, 1.0)
        if self.duration_ns:
            return self.running_ns / self.duration_ns
        return 0.0 if self.stopped_ns else 1.0

    @property
    def lock_waiting_share(self) -> float:
        """Share of the running vCPUs' time spent waiting for mmu_lock."""
        return self.lock_waiting_ns / self.running_ns if self.running_ns else 0.0

    def add(self, other: RoundCost) -> None:
        """Another round's costs on top of this one's."""
        self.done, self.wanted = self.done + other.done, self.wanted + other.wanted
        self.duration_ns, self.stopped_ns = self.duration_ns + other.duration_ns, self.stopped_ns + other.stopped_ns
        self.running_ns += other.running_ns
        self.lock_waiting_ns += other.lock_waiting_ns
        self.lock_write_held_ns += other.lock_write_held_ns
        self.longest_hold_ns = max(self.longest_hold_ns, other.longest_hold_ns)
        self.soft_lockups += other.soft_lockups
        self.thread_cpu_ns += other.thread_cpu_ns
        self.stalls.merge(other.stalls)


class ClosedLoop:
    """Told after each window what happened, it answers how fast the guest runs in the next.

    ring_entries: of each vCPU's dirty ring; 0 for the bitmap. With rings everything written is re-armed within a
    second, by the reaper or by a vCPU whose ring is full, whatever the migration thread does.
    """

    def __init__(
        self, host: HostProfile, vcpus: int, rules: Rules, pools: Pools, clear: ClearCost, ring_entries: int = 0
    ) -> None:
        self.host, self.vcpus, self.rules, self.pools, self.clear = host, vcpus, rules, pools, clear
        self.round = RoundCost()
        self.pace = Pace()
        smt = host.machine.slowdown(vcpus)
        exit_ns = host.ns("vm-exit")
        self._fast_ns = (exit_ns + host.ns("fast-page-fault")) * smt
        self._pml_full_ns = host.ns("pml-full-exit") * smt
        self._logged_ns = host.ns("pml-entry") * smt + self._pml_full_ns / _PML_ENTRIES
        self._slow_ns = (exit_ns + host.ns("fault-prepare")) * smt
        # An ioctl that re-arms interrupts every vCPU: for the flush, and with PML before it to have the buffer drained.
        self._flush_ns, self._kick_ns = host.ns("flush-ipi") * smt, exit_ns * smt if pools.pml else 0.0
        self._ring_room = 0
        self._set_ring(ring_entries, smt)
        self._set_lock(smt)

    def _set_ring(self, entries: int, smt: float) -> None:
        """A first write pushes an entry; a vCPU whose ring is full reaps and resets it itself (QEMU kvm-all.c)."""
        if not entries:
            return
        self._ring_room = max(entries - _RING_RESERVE - (_PML_ENTRIES if self.pools.pml else 0), 1)
        reap = self._ring_room * (self.host.ns("ring-reset-entry") + self.clear.written_page_ns) + self.clear.call_ns
        self._ring_full_ns = (self.host.ns("vm-exit") + self.host.ns("ring-full-exit") + reap) * smt
        pushed = self.host.ns("ring-push") * smt + self._ring_full_ns / self._ring_room
        self._fast_ns += pushed
        self._logged_ns += pushed
        self._slow_ns += pushed

    def _set_lock(self, smt: float) -> None:
        """What the lock station serves in this mode; what is done under a shared lock is nobody else's wait."""
        mode: LockMode = "read" if self.rules.shared_faults else "exclusive-rmap" if self.rules.rmap else "exclusive"
        held = {"read": "tdp-fault-lock", "exclusive": "tdp-map-exclusive", "exclusive-rmap": "shadow-map"}[mode]
        self._lock_ns = self.host.ns(held, self.vcpus)
        if mode == "read":
            split = self.host.ns("split-table") if self.rules.split_on_fault else 0.0
            self._slow_ns += (self.host.ns("tdp-map") + split) * smt

    def window(self, window: Window) -> Pace:
        """Account for a window that ran at the last pace, and set the next."""
        first = self.pools.write(window.writes)
        self.pools.rearm(float(window.rearmed_pages), window.rearmed_in)
        held = self.clear.held_ns(window.rearmed_pages, window.rearmed_leaves, window.split_tables)
        self._account_thread(window, held)
        calls = float(window.calls)
        if self._ring_room:
            calls += self._reset_rings(window, first)
        if window.duty > 0.0:
            self._account_guest(window, first, calls)
        else:
            self.round.stopped_ns += window.duration_ns
        self.pace = self._next_pace(window, held, calls)
        return self.pace

    def end_round(self) -> RoundCost:
        """The round so far; the next begins."""
        done, self.round = self.round, RoundCost()
        return done

    def _account_thread(self, window: Window, held: float) -> None:
        r, calls, holds = self.round, window.calls, self._holds(window)
        hold = held / holds if holds else held
        r.lock_write_held_ns += held
        r.longest_hold_ns = max(r.longest_hold_ns, hold)
        r.soft_lockups += max(holds, 1) if hold > SOFT_LOCKUP_NS else 0
        r.thread_cpu_ns += held + calls * (self.clear.call_ns if window.duty else self.clear.stopped_call_ns)

    def _holds(self, window: Window) -> int:
        """How often mmu_lock was held for write: once a CLEAR, and again after each table that it split into."""
        return window.calls + (window.split_tables if self.rules.split_drops_lock else 0)

    def _reset_rings(self, window: Window, first: FirstWrites) -> float:
        """KVM_RESET_DIRTY_RINGS by reaper and full rings: everything pushed is armed again. How many resets."""
        pushed = first.total
        self.pools.rearm(float(self.pools.pages.sum()))
        resets = pushed / self._ring_room + (window.duration_ns / _REAPER_NS if pushed else 0.0)
        r, held = self.round, pushed * self.clear.written_page_ns
        r.lock_write_held_ns += held
        r.longest_hold_ns = max(r.longest_hold_ns, held / max(resets, 1.0))
        return resets

    def _account_guest(self, window: Window, first: FirstWrites, calls: float) -> None:
        r, pace = self.round, self.pace
        r.done += float(window.writes.sum())
        r.wanted += float(window.rates.sum()) * window.duration_ns
        r.duration_ns += window.duration_ns
        running = window.duration_ns * window.duty
        r.running_ns += running
        r.lock_waiting_ns += running * pace.lock_waiting_share
        r.stalls.add(self._fast_ns, first.fast)
        r.stalls.add(self._pml_full_ns, first.logged / _PML_ENTRIES)
        r.stalls.add(self._flush_ns, calls * self.vcpus)
        if self._kick_ns:
            r.stalls.add(self._kick_ns, calls * self.vcpus)
        if self._ring_room:
            r.stalls.add(self._ring_full_ns, first.total / self._ring_room)
        caught, own_ns = first.locked * pace.caught, self._slow_ns + self._lock_ns
        r.stalls.add_exponential(pace.queue_ns, first.locked - caught, own_ns)
        r.stalls.add_uniform(pace.caught_ns, caught, own_ns + pace.queue_ns)

    def _next_pace(self, window: Window, held: float, calls: float) -> Pace:
        """Solve the network for the chances of a first write as they are now."""
        wanted = float(window.rates.sum())
        if wanted <= 0.0 or window.duty <= 0.0:
            return Pace()
        chance = self.pools.chances(window.rates)
        write_ns = self.vcpus / wanted + chance.fast * self._fast_ns + chance.logged * self._logged_ns
        interrupts_ns = calls * (self._flush_ns + self._kick_ns)
        write_ns /= 1.0 - (min(interrupts_ns / window.duration_ns, 0.9) if window.duration_ns else 0.0)
        if chance.locked <= RARE:
            return Pace(max(write_ns * wanted / self.vcpus, 1.0))
        holds = self._holds(window)
        hold = held / holds if holds else 0.0
        away = max(window.duration_ns / holds - hold, 0.0) if holds else 0.0
        think = write_ns / chance.locked + self._slow_ns
        # The throttle puts all vCPUs to sleep at once (QEMU cpu-throttle.c): one that runs meets all the others.
        found = with_writer((self._lock_ns,), think, self.vcpus, Writer(hold, away))
        slowdown = max(found.cycle_ns * chance.locked * wanted / self.vcpus, 1.0)
        return self._waits(slowdown, max(found.cycle_ns - think - self._lock_ns, 0.0), found, hold)

    def _waits(self, slowdown: float, wait: float, found: WriterSolution, hold: float) -> Pace:
        """How a mean wait divides: a short queue for most, up to a whole hold for those it meets."""
        cycle = found.cycle_ns
        queue = min(found.free.waiting_ns(0), wait)
        extra = wait - queue
        caught = min(2.0 * extra / hold, 1.0) if hold > 0.0 else 0.0
        return Pace(slowdown, wait / cycle, queue, caught, 2.0 * extra / caught if caught else 0.0)
