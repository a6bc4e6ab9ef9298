"""How many of a guest's pages would fault, or be logged, on their next write: the expected state between two looks.

The emulator draws which pages were written only when somebody looks, minutes later; what the guest pays must be known
while it runs. So each write stream keeps expected numbers of its pages by what the next write to them does. Streams
are treated as if no two wrote the same page, which overstates faults where ranges overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migsim.perf.rules import Rules
from migsim.units import REGION_PAGES

__all__ = ["FirstWrites", "Pools", "Span"]

Floats = NDArray[np.float64]
Span = tuple[float, float]


@dataclass(frozen=True)
class FirstWrites:
    """Expected first writes of a stretch of time, all streams: PML entries, fast faults, faults that take mmu_lock."""

    logged: float = 0.0
    fast: float = 0.0
    locked: float = 0.0

    @property
    def total(self) -> float:
        """All of them: what a dirty ring gets an entry for."""
        return self.logged + self.fast + self.locked


class Pools:
    """Pages per stream: `logged` (D clear), `protected` (W clear, 4K), `huge` (W clear, above 4K), `small` (mapped 4K).

    first, end: float64[S], the streams' ranges of guest pages; one more pool stands for the pages no stream writes.
    sweeps: bool[S], the stream writes its range in order. guest_pages: all of them. backing_pages: 4 KiB pages a leaf
    maps before anything is split.
    """

    def __init__(
        self, first: Floats, end: Floats, sweeps: NDArray[np.bool_], guest_pages: float, backing_pages: int,
        rules: Rules, *, pml: bool, eager: bool, protected: bool,
    ) -> None:  # fmt: skip
        self.first, self.end, self.guest_pages = first, end, guest_pages
        written = (end - first).astype(np.float64)
        self.pages: Floats = np.append(written, max(guest_pages - float(written.sum()), 0.0))
        self.sweeps = np.append(sweeps, False)
        self.rules, self.pml, self.eager = rules, pml, eager and rules.eager_split
        zero = np.zeros(len(self.pages))
        self.logged, self.protected, self.huge = zero.copy(), zero.copy(), zero.copy()
        self.small: Floats = self.pages.copy() if backing_pages == 1 else zero.copy()
        if protected:
            self.rearm(float(self.pages.sum()))

    @property
    def armed(self) -> Floats:
        """Pages of each pool a write to which will show."""
        return self.logged + self.protected + self.huge

    def rearm(self, pages: float, where: Sequence[Span] = ()) -> None:
        """`pages` of those written since they were last armed are armed again, in the spans of guest pages `where`.

        No span: anywhere. Within a stream's range its dirty pages are taken to lie evenly.
        """
        dirty = np.maximum(self.pages - self.armed, 0.0)
        weight = dirty * self._covered(where)
        total = weight.sum()
        if total <= 0.0 or pages <= 0.0:
            return
        taken = np.minimum(weight * (pages / total), dirty)
        small_share = np.clip((self.small - self.logged - self.protected) / np.maximum(dirty, 1.0), 0.0, 1.0)
        small = taken if self.eager else taken * small_share
        self.small = np.minimum(np.maximum(self.small, self.logged + self.protected + small), self.pages)
        if self.pml:
            self.logged += small
        else:
            self.protected += small
        self.huge += taken - small

    def _covered(self, where: Sequence[Span]) -> Floats:
        """Share of each pool's pages that lies in the spans."""
        if not where:
            return np.ones(len(self.pages))
        inside = np.zeros(len(self.pages))
        for low, high in where:
            overlap = np.maximum(np.minimum(self.end, high) - np.maximum(self.first, low), 0.0)
            inside[:-1] += overlap
            inside[-1] += max(high - low - float(overlap.sum()), 0.0)
        covered: Floats = np.minimum(inside / np.maximum(self.pages, 1.0), 1.0)
        return covered

    def write(self, writes: Floats) -> FirstWrites:
        """`writes` page writes happened, float64[S]; what was armed and written is armed no more."""
        hit = self._hit(np.append(writes, 0.0), 1)
        logged, protected = self.logged * hit, self.protected * hit
        self.logged -= logged
        self.protected -= protected
        locked = self._write_huge(np.append(writes, 0.0), hit)
        fast = float(protected.sum())
        if not self.rules.fast_faults:
            return FirstWrites(float(logged.sum()), 0.0, locked + fast)
        return FirstWrites(float(logged.sum()), fast, locked)

    def chances(self, rates: Floats) -> FirstWrites:
        """Chance that one write, drawn by the streams' rates, is each kind of first write just now."""
        total = rates.sum()
        if total <= 0.0:
            return FirstWrites()
        weight = np.append(rates, 0.0) / total / np.maximum(self.pages, 1.0)
        logged, fast, locked = (float(weight @ pool) for pool in (self.logged, self.protected, self.huge))
        if not self.rules.fast_faults:
            fast, locked = 0.0, fast + locked
        return FirstWrites(logged, fast, locked)

    def _hit(self, writes: Floats, group: int) -> Floats:
        """Chance that a given group of `group` neighbouring pages was written at least once."""
        share = writes * group / np.maximum(self.pages, 1.0)
        hit: Floats = np.where(self.sweeps, np.minimum(writes / np.maximum(self.pages, 1.0), 1.0), -np.expm1(-share))
        return hit

    def _write_huge(self, writes: Floats, hit: Floats) -> float:
        """First writes to pages under a write-protected huge leaf; every one of them takes the slow path."""
        if not self.rules.split_on_fault:
            # Zapped: the other 511 pages are not mapped any more, so each takes the slow path on its own first write.
            written = self.huge * hit
            self.huge -= written
            self.small += written
            return float(written.sum())
        regions = self.huge / REGION_PAGES * self._hit(writes, REGION_PAGES)
        pages = regions * REGION_PAGES
        self.huge -= pages
        self.small += pages
        self.protected += pages - regions
        return float(regions.sum())
