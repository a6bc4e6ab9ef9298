"""Ending the log for whole slots: tdp_log's collapsing forms on rows and planes, one aligned GiB at a time.

Regions (2M) whose range lies in the slot and could be one page are found by masks; the huge leaf takes its rights from
the first present page of its range, as page by page. tests/kvm/test_mmu_whole_slot.py holds both equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.leaf_planes import LeafPlanes
from migsim.kvm.levels import max_mapping_level
from migsim.kvm.make_spte import make_huge_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import present_entries
from migsim.kvm.plane_ranges import erase_range
from migsim.kvm.roots import Root
from migsim.kvm.spte import ENTRIES, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from migsim.kvm.tdp_log import DISABLE_FORMS
from migsim.kvm.whole_slot import suits
from migsim.planes import Plane
from migsim.units import CHUNK_PAGES, PAGE_SHIFT, REGION_PAGES, WORD_BITS

_REGION_WORDS = REGION_PAGES // WORD_BITS
Regions = NDArray[np.int64]


def collapse_slot(mmu: MmuState, root: Root, slot: Memslot) -> bool:
    """What ending the log does to one root, in the vintage's form. True: one flush of the slot is due."""
    form = mmu.vintage.disable
    if form not in ("recover", "zap-tables") or not _suits(mmu, root, slot):
        return DISABLE_FORMS[form](mmu, root, slot)
    planes, flush = root.leaf[slot.id], False
    for row, base in list(root.tables_at(PG_LEVEL_2M, slot.base_gfn, slot.end_gfn)):
        if _whole_gib(mmu, slot, base):
            flush = DISABLE_FORMS[form](mmu, root, _Part(slot, base)) or flush  # type: ignore[arg-type]
            continue
        which = _collapsible(mmu, slot, root.tables[row], base)
        if form == "recover":
            which, small = _first_leafs(planes, which, base)
        if len(which):
            table_sptes = root.tables[row, which].copy()
            if form == "recover":
                root.tables[row, which] = small_to_huge(mmu, small)
                mmu.stats.update_page_stats(PG_LEVEL_2M, len(which))
                flush = True
            else:
                root.tables[row, which] = mmu.fmt.nonpresent
                _flush_each(mmu, root, base, len(which))
            _drop_tables(mmu, root, planes, base, which, table_sptes)
    return flush


def _suits(mmu: MmuState, root: Root, slot: Memslot) -> bool:
    """Whole words per region, every frame where the address says, nothing but W, D and A to tell leaves apart."""
    planes = root.leaf[slot.id]
    rare = (planes.not_mmu_writable, planes.not_host_writable, planes.acc_tracked, planes.not_exec)
    plain = not planes.pfns and not any(plane is not None for plane in rare) and not mmu.nx_huge_pages
    return plain and slot.base_gfn % REGION_PAGES == 0 and suits(mmu, slot.npages)


class _Part:
    """One GiB of a slot, for the page-by-page form: a 1G page is rebuilt from its first leaf, found at once."""

    def __init__(self, slot: Memslot, base: int) -> None:
        self.base_gfn, self.end_gfn = base, base + CHUNK_PAGES
        self.hva, self.arch = slot.hva, slot.arch


def _whole_gib(mmu: MmuState, slot: Memslot, base: int) -> bool:
    inside = base >= slot.base_gfn and base + CHUNK_PAGES <= slot.end_gfn
    return inside and max_mapping_level(mmu, slot, base) >= PG_LEVEL_1G


def _collapsible(mmu: MmuState, slot: Memslot, entries: NDArray[np.uint64], base: int) -> Regions:
    """Which entries of a level-2 table point to tables that one 2M page could replace."""
    tables = present_entries(mmu.fmt, entries) & (entries & np.uint64(1 << 7) == 0)
    gfns = base + np.arange(ENTRIES) * REGION_PAGES
    tables &= (gfns >= slot.base_gfn) & (gfns + REGION_PAGES <= slot.end_gfn)
    which = np.flatnonzero(tables)
    if not len(which):
        return which
    spanned = (int(which[-1] - which[0]) + 1) * REGION_PAGES << PAGE_SHIFT
    huge = mmu.vm.host.uniform_level(slot.hva(int(gfns[which[0]])), spanned)
    counts = slot.arch.counts[PG_LEVEL_2M]
    allowed = counts[(gfns[which] >> 9) - (slot.base_gfn >> 9)] == 0
    if huge is None:
        allowed &= np.array([mmu.vm.host.level(slot.hva(int(gfns[i]))) >= PG_LEVEL_2M for i in which])
    elif huge < PG_LEVEL_2M:
        allowed[:] = False
    return np.asarray(which[allowed])


def _first_leafs(planes: LeafPlanes, which: Regions, base: int) -> tuple[Regions, NDArray[np.uint64]]:
    """Regions of `which` with a present page, and the SPTE of the first one in each."""
    at = base - planes.base_gfn + which * REGION_PAGES
    words = _region_words(planes.present, at)
    some = words.any(axis=1)
    which, at, words = which[some], at[some], words[some]
    first = np.argmax(words != 0, axis=1)
    word = words[np.arange(len(words)), first] if len(words) else np.zeros(0, dtype=np.uint64)
    lowest = np.bitwise_count((word & -word) - np.uint64(1)).astype(np.int64)
    page = at + first * WORD_BITS + lowest
    fmt = planes.fmt
    sptes = np.full(len(page), planes.constant | 1 | fmt.exec | fmt.host_writable | fmt.mmu_writable, dtype=np.uint64)
    for plane, bit in ((planes.writable, fmt.writable), (planes.dirty, fmt.dirty), (planes.accessed, fmt.accessed)):
        sptes |= np.where(_bits(plane, page), np.uint64(bit), np.uint64(0))
    frames = np.array([planes.pfn(int(i)) for i in at], dtype=np.uint64)
    return which, sptes | frames << np.uint64(PAGE_SHIFT)


def _region_words(plane: Plane, at: Regions) -> NDArray[np.uint64]:
    """uint64[regions, 8]: the words of each 2M region."""
    if not len(at):
        return np.zeros((0, _REGION_WORDS), dtype=np.uint64)
    first, last = int(at[0]), int(at[-1]) + REGION_PAGES
    words = plane.slice_words(first, last - first).reshape(-1, _REGION_WORDS)
    return words[(at - first) // REGION_PAGES]


def _bits(plane: Plane, pages: Regions) -> NDArray[np.bool_]:
    if not len(pages):
        return np.zeros(0, dtype=np.bool_)
    first = int(pages[0]) & -WORD_BITS
    words = plane.slice_words(first, int(pages[-1]) + 1 - first)
    return np.asarray((words[(pages - first) >> 6] >> (pages & 63).astype(np.uint64) & np.uint64(1)) != 0)


def small_to_huge(mmu: MmuState, small: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """make_huge_spte of many."""
    same, where = np.unique(small & np.uint64(0xFFF0000000000FFF), return_inverse=True)
    flags = np.array([make_huge_spte(mmu.fmt, int(f), PG_LEVEL_2M, nx_huge_pages=False) for f in same], dtype=np.uint64)
    return flags[where] | small & np.uint64(0x000FFFFFFFE00000)


def _drop_tables(
    mmu: MmuState, root: Root, planes: LeafPlanes, base: int, which: Regions, sptes: NDArray[np.uint64]
) -> None:
    """Erase the leaves of tables that were just unlinked, and free the tables."""
    for first, count in _runs(which):
        gone = erase_range(planes, base - planes.base_gfn + first * REGION_PAGES, count * REGION_PAGES)
        mmu.stats.update_page_stats(PG_LEVEL_4K, -gone)
    root.n_tables[PG_LEVEL_4K] -= len(which)
    if len(mmu.nx):
        for spte in sptes.tolist():
            if mmu.nx.discard(root, mmu.fmt.pfn(spte)):
                mmu.stats.add("nx_lpage_splits", -1)


def _runs(which: Regions) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of neighbours."""
    for run in np.split(which, np.flatnonzero(np.diff(which) != 1) + 1):
        yield int(run[0]), len(run)


def _flush_each(mmu: MmuState, root: Root, base: int, tables: int) -> None:
    """Every table was zapped with a flush of its own; one is enough to carry out here, all are counted."""
    mmu.flush_gfn(root, base, CHUNK_PAGES)
    mmu.stats.add("remote_tlb_flush_requests", tables - 1)
    mmu.stats.add("remote_tlb_flush", (tables - 1) * min(mmu.stats.remote_tlb_flush, 1))
    mmu.vm.meter.count("remote_tlb_flush", tables - 1)
