"""The 100 ms window of QEMU's migration thread: its clock of whole ms, its quantum of bytes, its sleep.

QEMU reads a clock of whole milliseconds (qemu_clock_get_ms) and sleeps whole milliseconds on a semaphore, so a window
that was to last 100 ms lasts 100 or 101, seldom more, and a little is lost between reading the clock and starting the
next window (QEMU 7.2 migration.c: migration_update_counters, migration_rate_limit). A recording shows 100.1 to 100.3
ms a window; the two host costs named here explain it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from migsim.sim.prng import uniform
from migsim.units import NS_PER_MS

__all__ = ["BUFFER_DELAY_MS", "QUANTA_PER_S", "UNLIMITED", "HostClock", "Window", "quantum"]

BUFFER_DELAY_MS: Final = 100
QUANTA_PER_S: Final = 1000 // BUFFER_DELAY_MS
UNLIMITED: Final = 1 << 62


@dataclass
class HostClock:
    """Whole ms of a clock that is `phase_ns` past one of its ticks at the migrate command; and the host's jitter."""

    phase_ns: int = 0
    key: int = 0
    draws: int = 0

    def ms(self, now_ns: int) -> int:
        """qemu_clock_get_ms."""
        return (now_ns + self.phase_ns) // NS_PER_MS

    def spread(self, mean_ns: int) -> int:
        """A delay around its mean: half to one and a half times, evenly."""
        return round(mean_ns * (0.5 + self.draw()))

    def draw(self) -> float:
        """Uniform in (0, 1)."""
        self.draws += 1
        return uniform(self.key, self.draws)


@dataclass
class Window:
    """What was sent since the window began. bytes: for the rate limit and the bandwidth, everything on the stream."""

    start_ms: int = 0
    bytes: int = 0
    pages: int = 0

    def over(self, now_ms: int) -> bool:
        """Is it time for migration_update_counters to do its work?"""
        return now_ms >= self.start_ms + BUFFER_DELAY_MS

    def left_ms(self, now_ms: int) -> int:
        """What the semaphore waits for."""
        return max(0, self.start_ms + BUFFER_DELAY_MS - now_ms)

    def restart(self, now_ms: int) -> None:
        """update_iteration_initial_status."""
        self.start_ms, self.bytes, self.pages = now_ms, 0, 0


def quantum(max_bandwidth: int) -> int:
    """Bytes a window may send before the next page is refused; 0 bytes/s is unlimited."""
    return max_bandwidth // QUANTA_PER_S if max_bandwidth else UNLIMITED
