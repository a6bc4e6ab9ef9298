"""The host page tables as KVM sees them: which frame backs an address, at which size, and whether it is writable.

Frames are linear in the address (one 32 TiB window), so nothing is stored per page; pages that differ (replaced by
KSM or copy on write, read-only, absent, poisoned) are kept as exceptions.
"""

from __future__ import annotations

import bisect
import enum
from dataclasses import dataclass
from typing import Final

from migsim.kvm.spte import MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, gfn_round
from migsim.units import PAGE_SHIFT, PAGE_SIZE, pages_per_level

DATA_PFNS: Final = 1 << 33  # data pages use frames below 32 TiB
TABLE_PFN_BASE: Final = 1 << 37  # page tables above level 1: frame = base + row
LEAF_TABLE_PFN_BASE: Final = 1 << 38  # packed level-1 tables: frame = base + (gfn >> 9)
REPLACED_PFN_BASE: Final = 1 << 34  # frames that stand in for a replaced page


class Gup(enum.Enum):
    """Why get_user_pages gives no frame."""

    ABSENT = "absent"
    POISONED = "poisoned"


@dataclass(frozen=True, slots=True)
class HostPage:
    """One resolved host page."""

    pfn: int
    writable: bool


@dataclass(slots=True)
class _Range:
    hva: int
    size: int
    level: int
    writable: bool


def linear_pfn(hva: int) -> int:
    """The frame behind `hva` unless it was replaced; keeps alignment up to 1G and beyond."""
    return hva >> PAGE_SHIFT & (DATA_PFNS - 1)


class PageState:
    """What KVM has told the host about its pages, by frame: PG_dirty and PG_accessed of struct page.

    For small guests whose every page is looked at; `HostMm.page_state` is None where nobody asks.
    """

    def __init__(self) -> None:
        self.dirty: set[int] = set()
        self.accessed: set[int] = set()

    def tell(self, pfn: int, pages: int, *, dirty: bool, accessed: bool) -> None:
        """kvm_set_pfn_dirty, kvm_set_pfn_accessed: of a huge page the host marks the whole, as a folio."""
        frames = range(pfn, pfn + pages)
        if dirty:
            self.dirty.update(frames)
        if accessed:
            self.accessed.update(frames)


class HostMm:
    """Backing of the VMM's address space.

    `add(hva, size, level)`: bytes [hva, hva + size) are backed by pages of `level` (1 = 4K, 2 = 2M, 3 = 1G). An
    address in no range is absent, as an unmapped address is. Sizes in bytes.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[_Range] = []
        self._replaced: dict[int, int] = {}  # virtual page -> frame
        self._read_only: set[int] = set()
        self._failed: dict[int, Gup] = {}
        self._next_replacement = REPLACED_PFN_BASE
        self.page_state: PageState | None = None

    # -- layout ------------------------------------------------------------------------------------------------------

    def add(self, hva: int, size: int, level: int = PG_LEVEL_4K, *, writable: bool = True) -> None:
        """Map a new range; raises ValueError on overlap, a bad level or bounds that are not page multiples."""
        if hva % PAGE_SIZE or size % PAGE_SIZE or size <= 0 or not 1 <= level <= MAX_HUGEPAGE_LEVEL:
            raise ValueError(f"host range {hva:#x}+{size:#x} at level {level}")
        at = bisect.bisect_left(self._starts, hva)
        follows = at > 0 and self._ranges[at - 1].hva + self._ranges[at - 1].size > hva
        if follows or (at < len(self._starts) and self._starts[at] < hva + size):
            raise ValueError(f"host range {hva:#x}+{size:#x} overlaps another")
        self._starts.insert(at, hva)
        self._ranges.insert(at, _Range(hva, size, level, writable))

    def remove(self, hva: int) -> None:
        """Unmap the range that starts at `hva`; the caller ran the notifier first."""
        at = self._starts.index(hva)
        del self._starts[at], self._ranges[at]

    def _range(self, hva: int) -> _Range | None:
        at = bisect.bisect_right(self._starts, hva) - 1
        if at < 0 or hva >= self._ranges[at].hva + self._ranges[at].size:
            return None
        return self._ranges[at]

    # -- what KVM asks -----------------------------------------------------------------------------------------------

    def pfn(self, hva: int) -> int:
        """The frame behind a mapped address."""
        return self._replaced.get(hva >> PAGE_SHIFT, linear_pfn(hva))

    def level(self, hva: int) -> int:
        """Size of the host mapping at `hva`: the largest level whose aligned block is wholly and uniformly backed."""
        found = self._range(hva)
        if found is None:
            return PG_LEVEL_4K
        page = hva >> PAGE_SHIFT
        for level in range(found.level, PG_LEVEL_4K, -1):
            first, span = gfn_round(page, level), pages_per_level(level)
            inside = first << PAGE_SHIFT >= found.hva and first + span << PAGE_SHIFT <= found.hva + found.size
            if inside and not self._exception_in(first, span):
                return level
        return PG_LEVEL_4K

    def uniform_level(self, hva: int, size: int) -> int | None:
        """The level of every page of [hva, hva + size) if one answer fits them all, else None."""
        found = self._range(hva)
        if found is None or hva + size > found.hva + found.size:
            return None
        if self._exception_in(hva >> PAGE_SHIFT, size >> PAGE_SHIFT):
            return None
        block = PAGE_SIZE << 9 * (found.level - 1)
        return found.level if not hva % block and not size % block else None

    def writable(self, hva: int) -> bool:
        """Is the host's mapping of this page writable?"""
        found = self._range(hva)
        return found is not None and found.writable and hva >> PAGE_SHIFT not in self._read_only

    def get_user_page(self, hva: int) -> HostPage | Gup:
        """Resolve one page as GUP does (write access is tried first, then read)."""
        page = hva >> PAGE_SHIFT
        if page in self._failed:
            return self._failed[page]
        if self._range(hva) is None:
            return Gup.ABSENT
        return HostPage(self.pfn(hva), self.writable(hva))

    def _exception_in(self, first: int, span: int) -> bool:
        exceptions = len(self._replaced) + len(self._read_only) + len(self._failed)
        if not exceptions:
            return False
        return any(
            first <= page < first + span for pages in (self._replaced, self._read_only, self._failed) for page in pages
        )

    # -- what happens to pages; callers run KVM's notifier around these ----------------------------------------------

    def replace(self, hva: int) -> int:
        """Back one page by a fresh frame (KSM, copy on write, migration); returns the frame."""
        self._replaced[hva >> PAGE_SHIFT] = self._next_replacement
        self._next_replacement += 1
        return self._next_replacement - 1

    def protect(self, hva: int, *, writable: bool) -> None:
        """Make one page read-only or writable."""
        if writable:
            self._read_only.discard(hva >> PAGE_SHIFT)
        else:
            self._read_only.add(hva >> PAGE_SHIFT)

    def fail(self, hva: int, how: Gup | None) -> None:
        """Make one page absent or poisoned, or (None) sound again."""
        if how is None:
            self._failed.pop(hva >> PAGE_SHIFT, None)
        else:
            self._failed[hva >> PAGE_SHIFT] = how
