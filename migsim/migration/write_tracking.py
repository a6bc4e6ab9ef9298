"""A snapshot's race between saving and writing: userfaultfd's write protection, page by page, as expectations.

Source: QEMU 10.0 migration/ram.c (ram_find_and_save_block, get_queued_page, poll_fault_page,
ram_save_release_protection), Linux fs/userfaultfd.c. All of RAM is write-protected when the snapshot begins. The
migration thread saves host pages one after the other and takes the protection off each. A store to a page not saved
yet puts its vCPU to sleep; before each page the thread polls for such a fault, saves that page first and scans on from
there. So each page goes out once, before its first store. A huge page is saved whole before it is released.

vCPUs that sleep on faults and the one thread that serves them are a closed queue: V customers that think between two
faults and one server. The server's free time goes into the scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Segment", "TrackedWrites", "fault_wait_s"]

Floats = NDArray[np.float64]
SUB_STEPS = 16  # of one call: what is not saved yet changes little within one
FEWEST = 1e-9  # faults a second: fewer are none


@dataclass(frozen=True, slots=True)
class Segment:
    """Guest pages [first, end), `zero` of them all zero, written `writes_per_s` times a second at full speed."""

    first: int
    end: int
    zero: int
    writes_per_s: float


def fault_wait_s(customers: float, think_s: float, serve_s: float) -> float:
    """Seconds from a fault to its page released, queueing included: approximate mean-value analysis of one station.

    R = serve (1 + (V - 1) R / (R + think)), solved; for one customer it is the service itself.
    """
    b = serve_s * customers - think_s
    return (b + math.sqrt(b * b + 4 * serve_s * think_s)) / 2


@dataclass
class TrackedWrites:
    """What of each segment is not saved yet, host pages. page_s, zero_s: saving a target page; release_s: a host page's
    flush and its protection taken off; wake_s: a fault read and its vCPU woken, which does not hold up the thread.
    """

    segments: Sequence[Segment]
    vcpus: int
    host_page: int  # target pages
    page_s: float
    zero_s: float
    release_s: float
    wake_s: float
    faults: float = 0.0
    stalled_s: float = 0.0  # of all vCPUs together
    longest_s: float = 0.0
    slowest_share: float = 1.0
    at: int = 0  # the segment the scan stands in
    left: Floats = field(init=False)

    def __post_init__(self) -> None:
        sizes = np.array([s.end - s.first for s in self.segments], dtype=np.float64)
        zeros = np.array([s.zero for s in self.segments], dtype=np.float64)
        self.pages, self.zero_pages = int(sizes.sum()), int(zeros.sum())
        self.units = sizes / self.host_page
        self.left = self.units.copy()
        self.rate = np.array([s.writes_per_s for s in self.segments])
        self.normal_a_unit, self.zero_a_unit = (sizes - zeros) / self.units, zeros / self.units
        self.set_price(self.page_s, self.zero_s)

    def set_price(self, page_s: float, zero_s: float) -> None:
        """What saving a page of data and a zero page takes from now on."""
        self.serve_s = self.normal_a_unit * page_s + self.zero_a_unit * zero_s + self.release_s

    @property
    def whole_s(self) -> float:
        """Seconds all of it takes at the present price."""
        return float(self.units @ self.serve_s)

    @property
    def done(self) -> bool:
        return bool(self.left.sum() < 1e-6)

    def run(self, duration_s: float) -> tuple[float, float, float, float]:
        """Save for so long: (pages of data, zero pages, seconds used, share of its writes the guest made meanwhile)."""
        before, used, made = self.left.copy(), 0.0, 0.0
        while used < duration_s and not self.done:
            took, share = self._step(duration_s / SUB_STEPS)
            used, made = used + took, made + share * took
        saved = before - self.left
        share = made / used if used else 1.0
        return float(saved @ self.normal_a_unit), float(saved @ self.zero_a_unit), used, share

    def _step(self, dt: float) -> tuple[float, float]:
        """(seconds used, the guest's share of its full speed)."""
        hits = self.rate * self.left / self.units  # stores a second to pages still protected, at full speed
        wanted, share, faulted = float(hits.sum()), 1.0, np.zeros(len(hits))
        if wanted > FEWEST:
            serve = float(hits @ self.serve_s) / wanted
            think = self.vcpus / wanted + self.wake_s
            # a page the scan is at is finished first; it never is where faults take all of the thread's time
            wait = fault_wait_s(self.vcpus, think, serve)
            wait += serve / 2 * max(0.0, 1 - self.vcpus / (wait + think) * serve)
            rate = min(self.vcpus / (wait + think), 1 / serve)
            share = min(1.0, rate / wanted)
            faulted = np.minimum(self.left, hits * share * dt)
            self.faults += float(faulted.sum())
            self.stalled_s += float(faulted.sum()) * (wait + self.wake_s)
            self.longest_s, self.slowest_share = max(self.longest_s, wait), min(self.slowest_share, share)
        self.left -= faulted
        busy = float(faulted @ self.serve_s)
        return busy + self._scan(max(0.0, dt - busy), faulted), share

    def _scan(self, time_s: float, faulted: Floats) -> float:
        """The rest of the time: on from where the last fault was, segments in address order; seconds used."""
        if faulted.any():
            self.at = int(np.argmax(faulted))  # most often it was there
        used = 0.0
        for _ in range(len(self.left)):
            left, serve = self.left[self.at], self.serve_s[self.at]
            count = min(left, (time_s - used) / serve)
            self.left[self.at], used = left - count, used + count * serve
            if used >= time_s * (1 - 1e-12):
                break
            self.left[self.at] = 0.0
            self.at = (self.at + 1) % len(self.left)
        return used
