"""The closed loop: what faults, logging, flushes and the lock cost the guest, and so how much slower it writes.

A vCPU is taken to be busy: at full speed it makes its share of the workload's writes and nothing is spare, so every
nanosecond spent in an exit or a queue is missing. Times are ns; shares 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migsim.perf.locks import Writer, with_writer
from migsim.perf.migration_thread import ClearCost
from migsim.perf.phases import LockMode
from migsim.perf.pools import FirstWrites, Pools, Span
from migsim.perf.profile import HostProfile
from migsim.perf.rules import Rules
from migsim.perf.stalls import StallHistogram

__all__ = ["ClosedLoop", "Pace", "RoundCost", "Window"]

Floats = NDArray[np.float64]
RARE = 1e-12  # a chance of waiting for the lock below this is none: nobody waits once in 10^12 writes
_PML_ENTRIES: Final = 512
_RING_RESERVE: Final = 64  # KVM_DIRTY_RING_RSVD_ENTRIES: the soft limit leaves them, and room for a PML buffer
SOFT_LOCKUP_NS: Final = 20 * 10**9  # watchdog_thresh 10 s, reported at twice that (kernel/watchdog.c)


@dataclass(frozen=True)
class Window:
    """What happened in a stretch of time.

    writes: float64[S] made; rates: float64[S] at full speed, writes a ns; rearmed_in: the guest pages CLEAR went over.
    """

    duration_ns: int
    writes: Floats
    rates: Floats
    duty: float
    clear_calls: int
    rearmed_pages: int
    split_tables: int = 0
    rearmed_in: Sequence[Span] = ()


@dataclass(frozen=True)
class Pace:
    """The guest's speed: `slowdown` >= 1 while it runs, the share of its time waiting for mmu_lock, one such wait."""

    slowdown: float = 1.0
    lock_waiting_share: float = 0.0
    lock_wait_ns: float = 0.0


@dataclass
class RoundCost:
    """One round: writes made and wanted, the lock, the thread, the stalls."""

    done: float = 0.0
    wanted: float = 0.0
    duration_ns: int = 0
    running_ns: float = 0.0
    lock_waiting_ns: float = 0.0
    lock_write_held_ns: float = 0.0
    longest_hold_ns: float = 0.0
    thread_cpu_ns: float = 0.0
    stalls: StallHistogram = field(default_factory=StallHistogram)

    @property
    def guest_throughput_share(self) -> float:
        """Writes made over writes wanted; of an idle guest, the share of time it may run."""
        if self.wanted > 0.0:
            return min(self.done / self.wanted, 1.0)
        return self.running_ns / self.duration_ns if self.duration_ns else 1.0

    @property
    def lock_waiting_share(self) -> float:
        """Share of the running vCPUs' time spent waiting for mmu_lock."""
        return self.lock_waiting_ns / self.running_ns if self.running_ns else 0.0

    @property
    def soft_lockups(self) -> int:
        """Would the watchdog have warned of a hold?"""
        return int(self.longest_hold_ns > SOFT_LOCKUP_NS)


class ClosedLoop:
    """Told after each window what happened, it answers how fast the guest runs in the next.

    ring_entries: of each vCPU's dirty ring; 0 for the bitmap.
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
        self._logged_ns = (host.ns("pml-entry") + host.ns("pml-full-exit") / _PML_ENTRIES) * smt
        self._slow_ns = (exit_ns + host.ns("fault-prepare")) * smt
        self._flush_ns = host.ns("flush-ipi") * smt
        self._set_ring(ring_entries, smt)
        self._set_lock(smt)

    def _set_ring(self, entries: int, smt: float) -> None:
        """A first write pushes an entry; a vCPU whose ring is full reaps and resets it itself (QEMU kvm-all.c)."""
        self._ring_room = max(entries - _RING_RESERVE - (_PML_ENTRIES if self.pools.pml else 0), 1) if entries else 0
        if not entries:
            return
        reap = self._ring_room * self.host.ns("ring-reset-entry")
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
        held = self.clear.held_ns(window.clear_calls, window.rearmed_pages, window.split_tables)
        self._account(window, first, held)
        self.pace = self._next_pace(window, held)
        return self.pace

    def end_round(self) -> RoundCost:
        """The round so far; the next begins."""
        done, self.round = self.round, RoundCost()
        return done

    def _account(self, window: Window, first: FirstWrites, held: float) -> None:
        r, calls = self.round, window.clear_calls
        r.done += float(window.writes.sum())
        r.wanted += float(window.rates.sum()) * window.duration_ns
        r.duration_ns += window.duration_ns
        running = window.duration_ns * window.duty
        r.running_ns += running
        r.lock_waiting_ns += running * self.pace.lock_waiting_share
        r.lock_write_held_ns += held
        r.longest_hold_ns = max(r.longest_hold_ns, held / calls if calls else held)
        r.thread_cpu_ns += held + calls * (self.clear.call_ns if window.duty else self.clear.stopped_call_ns)
        r.stalls.add(self._fast_ns, first.fast)
        r.stalls.add(self._flush_ns, float(calls * self.vcpus) if window.duty else 0.0)
        if self._ring_room:
            r.stalls.add(self._ring_full_ns, (first.logged + first.fast + first.locked) / self._ring_room)
        r.stalls.add_exponential(self.pace.lock_wait_ns, first.locked, self._slow_ns + self._lock_ns)

    def _next_pace(self, window: Window, held: float) -> Pace:
        """Solve the network for the chances of a first write as they are now."""
        wanted = float(window.rates.sum())
        if wanted <= 0.0:
            return Pace()
        chance = self.pools.chances(window.rates)
        write_ns = self.vcpus / wanted + chance.fast * self._fast_ns + chance.logged * self._logged_ns
        flushed = min(window.clear_calls * self._flush_ns / window.duration_ns, 0.9) if window.duration_ns else 0.0
        write_ns /= 1.0 - flushed
        if chance.locked <= RARE:
            return Pace(max(write_ns * wanted / self.vcpus, 1.0))
        calls = window.clear_calls
        hold = held / calls if calls else 0.0
        away = max(window.duration_ns / calls - hold, 0.0) if calls else 0.0
        think = write_ns / chance.locked + self._slow_ns
        found = with_writer((self._lock_ns,), think, self.vcpus, Writer(hold, away))
        per_write = found.cycle_ns * chance.locked
        wait = max(found.cycle_ns - think - self._lock_ns, 0.0)
        return Pace(max(per_write * wanted / self.vcpus, 1.0), wait / found.cycle_ns, wait)
