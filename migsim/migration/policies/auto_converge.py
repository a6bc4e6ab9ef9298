"""Auto-converge: each second period that dirties too much takes another slice of the guest's CPU time.

Source of the rules: QEMU 10.0 migration/ram.c (migration_trigger_throttle, mig_throttle_guest_down) and
migration/cpu-throttle.c; the forced sync is of QEMU 9.2 (575c2c5f6fcb).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from migsim.migration.policies.protocol import Period
from migsim.units import NS_PER_S

__all__ = [
    "CPU_THROTTLE_PCT_MAX", "CPU_THROTTLE_PCT_MIN", "TIMESLICE_NS", "AutoConverge", "Cycle", "DirtyTrigger",
    "ThrottleTimer", "cycle_of", "duty",
]  # fmt: skip

CPU_THROTTLE_PCT_MIN: Final = 1
CPU_THROTTLE_PCT_MAX: Final = 99
TIMESLICE_NS: Final = 10_000_000  # a vCPU runs 10 ms, then sleeps
HIGH_PERIODS: Final = 2  # bad periods that make one step; a good one between them does not reset the count
SYNC_INTERVAL_NS: Final = 5 * NS_PER_S  # 9.2: a sync is forced where none happened for so long


@dataclass(slots=True)
class DirtyTrigger:
    """Counts periods in which the guest dirtied more than `threshold_pct` of what went out; fires at each second."""

    threshold_pct: int = 50
    high: int = 0

    def fires(self, period: Period) -> bool:
        if period.dirty_bytes <= self.limit(period):
            return False
        self.high += 1
        if self.high < HIGH_PERIODS:
            return False
        self.high = 0
        return True

    def limit(self, period: Period) -> int:
        """Bytes the guest may dirty in `period` without counting as high."""
        return period.transferred_bytes * self.threshold_pct // 100


@dataclass(slots=True)
class AutoConverge:
    """cpu-throttle-initial at the first trigger, then one increment each, up to max-cpu-throttle; never down again.

    tailslow takes steps no larger than the last bad period asks for. `sync_interval_ns` is 5 s since QEMU 9.2.
    """

    initial: int = 20
    increment: int = 10
    maximum: int = 99
    tailslow: bool = False
    trigger: DirtyTrigger = field(default_factory=DirtyTrigger)
    sync_interval_ns: int | None = SYNC_INTERVAL_NS
    percentage: int = 0

    def after_period(self, period: Period) -> int | None:
        if not self.trigger.fires(period):
            return None
        self.percentage = self._next(period)
        return self.percentage

    def _next(self, period: Period) -> int:
        if not self.percentage:
            wanted = self.initial
        else:
            wanted = min(self.percentage + self._step(period), self.maximum)
        return max(CPU_THROTTLE_PCT_MIN, min(wanted, CPU_THROTTLE_PCT_MAX))

    def _step(self, period: Period) -> int:
        if not self.tailslow:
            return self.increment
        now = 100 - self.percentage
        ideal = now * self.trigger.limit(period) // period.dirty_bytes
        return min(now - ideal, self.increment)


@dataclass(frozen=True, slots=True)
class Cycle:
    """Tick after tick of the throttle's timer from `start_ns` on: at each the vCPUs sleep, then run until the next.

    sleep_ns counts until a vCPU runs again, period_ns from tick to tick.
    """

    start_ns: int
    sleep_ns: int
    period_ns: int

    def run_ns(self, until_ns: int) -> int:
        """How long a vCPU has run from `start_ns` until then."""
        ticks, gone_ns = divmod(until_ns - self.start_ns, self.period_ns)
        return ticks * (self.period_ns - self.sleep_ns) + max(0, gone_ns - self.sleep_ns)

    def sleeps_for_ns(self, now_ns: int) -> int:
        """What is left of the sleep at a moment, 0 for a vCPU that runs."""
        return max(0, self.sleep_ns - (now_ns - self.start_ns) % self.period_ns)

    def next_tick_ns(self, now_ns: int) -> int:
        """The first tick after a moment."""
        return now_ns + self.period_ns - (now_ns - self.start_ns) % self.period_ns


def cycle_of(percentage: int, start_ns: int, *, wake_ns: int = 0, tick_delay_ns: int = 0) -> Cycle:
    """A timer fires each 10 ms/(1-p) and puts the vCPU to sleep for 10 ms * p/(1-p) (QEMU migration/cpu-throttle.c).

    wake_ns: how much longer than asked a sleep lasts; tick_delay_ns: how much later than asked the timer fires (the
    next tick counts from there, so a late tick is run time won).
    """
    assert CPU_THROTTLE_PCT_MIN <= percentage <= CPU_THROTTLE_PCT_MAX
    sleep_ns = TIMESLICE_NS * percentage // (100 - percentage) + wake_ns
    period_ns = TIMESLICE_NS * 100 // (100 - percentage) + tick_delay_ns
    return Cycle(start_ns, min(sleep_ns, period_ns), period_ns)


def duty(percentage: int, *, wake_ns: int = 0, tick_delay_ns: int = 0) -> float:
    """Share of its time a vCPU runs under `percentage` of throttle: 1-p on an ideal host."""
    if not percentage:
        return 1.0
    cycle = cycle_of(percentage, 0, wake_ns=wake_ns, tick_delay_ns=tick_delay_ns)
    return 1.0 - cycle.sleep_ns / cycle.period_ns


@dataclass(slots=True)
class ThrottleTimer:
    """The cycles in force, one after the other: the first sleeps at once, a new percentage from the next tick on."""

    cycles: list[Cycle] = field(default_factory=list)

    def follow(self, cycle: Cycle) -> None:
        """`cycle` begins where the one in force has its next tick, or where it says if there is none."""
        if self.cycles:
            start_ns = self.cycles[-1].next_tick_ns(max(cycle.start_ns, self.cycles[-1].start_ns))
            cycle = Cycle(start_ns, cycle.sleep_ns, cycle.period_ns)
        self.cycles = [*self.cycles[-1:], cycle]

    def run_ns(self, begin_ns: int, end_ns: int) -> int:
        """How long a vCPU runs between two moments; before the first tick it runs all the time."""
        run_ns = 0
        for at, cycle in enumerate(self.cycles):
            begin = max(begin_ns, cycle.start_ns)
            end = min(end_ns, self.cycles[at + 1].start_ns) if at + 1 < len(self.cycles) else end_ns
            run_ns += max(0, cycle.run_ns(end) - cycle.run_ns(begin)) if end > begin else 0
        first_ns = self.cycles[0].start_ns if self.cycles else end_ns
        return run_ns + max(0, min(end_ns, first_ns) - begin_ns)

    def sleeps_for_ns(self, now_ns: int) -> int:
        """What is left of the sleep at a moment."""
        in_force = [cycle for cycle in self.cycles if cycle.start_ns <= now_ns]
        return in_force[-1].sleeps_for_ns(now_ns) if in_force else 0
