"""The TLB of one vCPU: translations it may still use although the page tables have changed.

A stale entry that allows stores and has D cached lets a store through with no trace. That is what every flush is for,
so this TLB never forgets by itself: no capacity, no eviction, the worst case a real CPU may show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from migsim.units import pages_per_level


@dataclass(slots=True)
class Translation:
    """Guest frames [gfn, gfn + pages of `level`) are host frames from `pfn` on.

    `writable`: stores are allowed. `dirty`: a store need not walk to set D (also where the SPTE has no D). `of_l1`: the
    guest frame of L1 behind the first one, where L2 runs on shadow pages; L1's tables may name another one by now.
    """

    gfn: int
    level: int
    pfn: int
    writable: bool
    dirty: bool
    of_l1: int = -1

    def l1_gfn_of(self, gfn: int) -> int:
        """The frame of L1's memory a store to one guest frame inside reaches."""
        return gfn if self.of_l1 < 0 else self.of_l1 + gfn - self.gfn

    def pfn_of(self, gfn: int) -> int:
        """Host frame of one guest frame inside."""
        return self.pfn + gfn - self.gfn

    @property
    def silent_store(self) -> bool:
        """May a store go through without anyone noticing?"""
        return self.writable and self.dirty


class Tlb:
    """Translations by tag (the root they were walked from) and guest frame."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[tuple[object, int, int], Translation] = {}

    def lookup(self, tag: object, gfn: int) -> Translation | None:
        """What the CPU believes about `gfn`, or None: it must walk."""
        for level in (1, 2, 3):
            found = self._entries.get((tag, level, gfn & -pages_per_level(level)))
            if found is not None:
                return found
        return None

    def insert(self, tag: object, translation: Translation) -> None:
        """Remember a walk's result, in place of what was believed about that very range."""
        self._entries[tag, translation.level, translation.gfn] = translation

    def invalidate(self, tag: object, gfn: int) -> None:
        """Drop every translation of `gfn`, as a fault on it does."""
        for level in (1, 2, 3):
            self._entries.pop((tag, level, gfn & -pages_per_level(level)), None)

    def flush(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[object, Translation]]:
        """(tag, translation), oldest first."""
        return ((key[0], translation) for key, translation in self._entries.items())
