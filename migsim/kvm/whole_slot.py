"""The operations of tdp_log, zap and aging on whole ranges: numpy on table rows and bit planes, no step per page.

Each function states the same rule as its namesake that goes page by page, leaves the same state behind and counts the
same; tests/kvm/test_mmu_whole_slot.py holds the two equal. Tracepoints per SPTE exist only page by page.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.host_mm import LEAF_TABLE_PFN_BASE
from migsim.kvm.make_spte import make_nonleaf_spte, make_split_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import huge_leafs
from migsim.kvm.plane_ranges import clear_range, erase_range
from migsim.kvm.roots import Root
from migsim.kvm.spte import ENTRIES, MAX_HUGEPAGE_LEVEL, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from migsim.kvm.tdp_log import log_bit
from migsim.units import CHUNK_PAGES, PAGE_SHIFT, REGION_PAGES, pages_per_level

Row = NDArray[np.uint64]


def suits(mmu: MmuState, pages: int) -> bool:
    """Is a range large enough for these forms (and nobody wants a tracepoint for every SPTE)?"""
    return mmu.at_once and pages >= mmu.whole_slots_min_pages


# -- pieces ------------------------------------------------------------------------------------------------------------


def _entries(root: Root, level: int, start: int, end: int) -> Iterator[tuple[Row, int, int]]:
    """(entries, gfn of the first, row number) of each table at `level`: a writable view of what touches the range."""
    span = pages_per_level(level)
    for row, base in list(root.tables_at(level, start, end)):
        low, high = max(start - base, 0) // span, min(-(-(end - base) // span), ENTRIES)
        yield root.tables[row, low:high], base + low * span, row


def _clear_leaf_bit(mmu: MmuState, root: Root, start: int, end: int, bit: int) -> bool:
    """Clear one SPTE bit on every huge leaf of the range."""
    changed = False
    for level in range(PG_LEVEL_2M, MAX_HUGEPAGE_LEVEL + 1):
        for entries, _, _ in _entries(root, level, start, end):
            hit = huge_leafs(mmu.fmt, entries) & ((entries & np.uint64(bit)) != 0)
            if hit.any():
                entries[hit] &= ~np.uint64(bit)
                changed = True
    return changed


# -- logging -----------------------------------------------------------------------------------------------------------


def wrprot_range(mmu: MmuState, root: Root, start: int, end: int, min_level: int) -> bool:
    """tdp_log.wrprot_range."""
    changed = _clear_leaf_bit(mmu, root, start, end, mmu.fmt.writable)
    if min_level == PG_LEVEL_4K:
        for planes, first, count in root.planes_in(start, end):
            changed = clear_range(planes.writable, first, count) or changed
    return changed


def clear_dirty_range(mmu: MmuState, root: Root, start: int, end: int) -> bool:
    """tdp_log.clear_dirty_range."""
    bit = log_bit(mmu, root, wrprot=False)
    changed = _clear_leaf_bit(mmu, root, start, end, bit)
    for planes, first, count in root.planes_in(start, end):
        plane = planes.writable if bit == mmu.fmt.writable else planes.dirty
        changed = clear_range(plane, first, count) or changed
    return changed


def clear_dirty_leafs_4k(mmu: MmuState, root: Root, slot: Memslot) -> bool:
    """Of clear_dirty_range the part that 4K rmaps reach."""
    planes = root.leaf[slot.id]
    plane = planes.writable if log_bit(mmu, root, wrprot=False) == mmu.fmt.writable else planes.dirty
    return clear_range(plane, 0, slot.npages)


def leafs_of(mmu: MmuState, root: Root, slot: Memslot, level: int) -> Iterator[int]:
    """First gfn of every leaf of `level` in a slot, ascending."""
    if level > PG_LEVEL_4K:
        for entries, first, _ in _entries(root, level, slot.base_gfn, slot.end_gfn):
            yield from (first + int(i) * pages_per_level(level) for i in np.flatnonzero(huge_leafs(mmu.fmt, entries)))
        return
    present = root.leaf[slot.id].present
    for first in range(0, slot.npages, CHUNK_PAGES):
        words = present.slice_words(first, min(CHUNK_PAGES, slot.npages - first))
        bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        yield from (slot.base_gfn + first + int(i) for i in bits)


def split_range(mmu: MmuState, root: Root, start: int, end: int, target_level: int) -> None:
    """tdp_log.split_range."""
    assert target_level == PG_LEVEL_4K, f"whole ranges are split to 4K, not to level {target_level}"
    for row, base in list(root.tables_at(PG_LEVEL_1G, start, end)):
        for entry in np.flatnonzero(huge_leafs(mmu.fmt, root.tables[row])):
            gfn = base + int(entry) * CHUNK_PAGES
            if gfn < end and gfn + CHUNK_PAGES > start:
                split_1g(mmu, root, row, int(entry), gfn)
    for row, base in list(root.tables_at(PG_LEVEL_2M, start, end)):
        low, high = max(start - base, 0) // REGION_PAGES, min(-(-(end - base) // REGION_PAGES), ENTRIES)
        split_2m(mmu, root, root.tables[row, low:high], base + low * REGION_PAGES)


def split_1g(mmu: MmuState, root: Root, row: int, entry: int, gfn: int) -> None:
    """Split the 1G leaf at gfn, entry `entry` of the table in row `row`, to 512 of 2M."""
    huge = int(root.tables[row, entry])
    table = root.alloc_table(PG_LEVEL_2M, gfn)
    child = make_split_spte(mmu.fmt, huge, PG_LEVEL_1G, 0, nx_huge_pages=mmu.nx_huge_pages)
    below = root.table_row(table)
    root.tables[below] = np.uint64(child) + (np.arange(ENTRIES, dtype=np.uint64) << np.uint64(PAGE_SHIFT + 9))
    root.tables[row, entry] = make_nonleaf_spte(mmu.fmt, table, root.ad_type)
    mmu.stats.update_page_stats(PG_LEVEL_1G, -1)
    mmu.stats.update_page_stats(PG_LEVEL_2M, ENTRIES)
    mmu.vm.meter.count("huge_page_split")


def split_2m(mmu: MmuState, root: Root, entries: Row, gfn: int, wanted: NDArray[np.bool_] | None = None) -> None:
    """Split the 2M leaves among `entries` (those `wanted`), run by run of neighbours that differ in their frame alone.

    `gfn`: what the first entry maps.
    """
    huge = huge_leafs(mmu.fmt, entries)
    where = np.flatnonzero(huge if wanted is None else huge & wanted)
    if not len(where):
        return
    frames = np.uint64(mmu.fmt.pfn((1 << 64) - 1) << PAGE_SHIFT)
    flags = entries[where] & ~frames
    breaks = np.flatnonzero((np.diff(where) != 1) | (flags[1:] != flags[:-1])) + 1
    for run in np.split(where, breaks):
        first, last = int(run[0]), int(run[-1])
        child = make_split_spte(mmu.fmt, int(entries[first]), PG_LEVEL_2M, 0, nx_huge_pages=mmu.nx_huge_pages)
        found = root.planes_at(gfn + first * REGION_PAGES)
        assert found is not None, f"a huge page at gfn {gfn + first * REGION_PAGES:#x} lies in no memslot"
        planes, at = found
        planes.store_run(at, (last - first + 1) * REGION_PAGES, child, entries[run] & frames)
    numbers = (gfn >> 9) + where.astype(np.uint64) + np.uint64(LEAF_TABLE_PFN_BASE)
    entries[where] = np.uint64(make_nonleaf_spte(mmu.fmt, 0, root.ad_type)) | numbers << np.uint64(PAGE_SHIFT)
    root.n_tables[PG_LEVEL_4K] += len(where)
    mmu.stats.update_page_stats(PG_LEVEL_2M, -len(where))
    mmu.stats.update_page_stats(PG_LEVEL_4K, ENTRIES * len(where))
    mmu.vm.meter.count("huge_page_split", len(where))


# -- zapping and aging -------------------------------------------------------------------------------------------------


def zap_leafs(mmu: MmuState, root: Root, start: int, end: int, *, flush: bool = False) -> bool:
    """zap.zap_leafs."""
    zapped = 0
    for level in range(PG_LEVEL_2M, MAX_HUGEPAGE_LEVEL + 1):
        for entries, _, _ in _entries(root, level, start, end):
            hit = huge_leafs(mmu.fmt, entries)
            entries[hit] = mmu.fmt.nonpresent
            mmu.stats.update_page_stats(level, -int(hit.sum()))
            zapped += int(hit.sum())
    for planes, first, count in root.planes_in(start, end):
        gone = erase_range(planes, first, count)
        mmu.stats.update_page_stats(PG_LEVEL_4K, -gone)
        zapped += gone
    return flush or (zapped > 0 and not root.invalid)


def zap_root(mmu: MmuState, root: Root) -> None:
    """zap.zap_root: the structure becomes an empty root table."""
    for level in range(PG_LEVEL_2M, MAX_HUGEPAGE_LEVEL + 1):
        rows = root.tables[root.table_level == level]
        mmu.stats.update_page_stats(level, -int(huge_leafs(mmu.fmt, rows).sum()))
    for planes in root.leaf.values():
        mmu.stats.update_page_stats(PG_LEVEL_4K, -planes.present.count())
        planes.reset()
    for other, table in mmu.nx:
        if other is root and mmu.nx.discard(root, table):
            mmu.stats.add("nx_lpage_splits", -1)
    root.reset()


def age_range(mmu: MmuState, root: Root, start: int, end: int) -> bool:
    """aging.age_range, for leaves with A/D bits; without them page by page (each becomes access-tracked)."""
    young = _clear_leaf_bit(mmu, root, start, end, mmu.fmt.accessed)
    for planes, first, count in root.planes_in(start, end):
        young = clear_range(planes.accessed, first, count) or young
    return young


