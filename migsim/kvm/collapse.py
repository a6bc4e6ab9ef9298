"""Ending the log for whole slots: tdp_log's collapsing forms on rows and planes, one aligned GiB at a time.

Regions (2M) whose range lies in the slot and could be one page are found by masks; the huge leaf takes its rights from
the first present page of its range, as page by page. tests/kvm/test_mmu_whole_slot.py holds both equal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.changed_spte import untrack_nx
from migsim.kvm.host_mm import DATA_PFNS, TABLE_PFN_BASE
from migsim.kvm.leaf_planes import LeafPlanes
from migsim.kvm.levels import max_mapping_level
from migsim.kvm.make_spte import make_huge_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import huge_leafs, present_entries
from migsim.kvm.plane_ranges import erase_range
from migsim.kvm.roots import Root
from migsim.kvm.spte import ENTRIES, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from migsim.kvm.tdp_log import DISABLE_FORMS
from migsim.kvm.whole_slot import suits
from migsim.planes import Plane
from migsim.units import CHUNK_PAGES, PAGE_SHIFT, REGION_PAGES, WORD_BITS

_REGION_WORDS = REGION_PAGES // WORD_BITS
Regions = NDArray[np.int64]


def collapse_slot(mmu: MmuState, root: Root, slot: Memslot) -> None:
    """What ending the log does to one root, in the vintage's form, flushes included."""
    form = mmu.vintage.disable
    if form == "zap-nothing" and suits(mmu, slot.npages):
        return
    if form not in ("recover", "zap-tables") or not _suits(mmu, root, slot):
        DISABLE_FORMS[form](mmu, root, slot)
        return
    with mmu.rcu.read():  # no table is freed before the flush
        if _collapse_rows(mmu, root, slot):
            mmu.vm.flush_remote_tlbs_memslot(slot)


def _collapse_rows(mmu: MmuState, root: Root, slot: Memslot) -> bool:
    """recover_huge_pages or zap_collapsible_tables; True: one flush of the slot is due."""
    form, planes, flush = mmu.vintage.disable, root.leaf[slot.id], False
    for row, base in list(root.tables_at(PG_LEVEL_2M, slot.base_gfn, slot.end_gfn)):
        if _whole_gib(mmu, slot, base):
            if form == "recover":
                flush = _recover_gib(mmu, root, planes, row, base) or flush
            else:
                DISABLE_FORMS[form](mmu, root, _Part(slot, base))  # type: ignore[arg-type]
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
    """One GiB of a slot, for the page-by-page form."""

    def __init__(self, slot: Memslot, base: int) -> None:
        self.base_gfn, self.end_gfn = base, base + CHUNK_PAGES
        self.hva, self.arch = slot.hva, slot.arch


def _recover_gib(mmu: MmuState, root: Root, planes: LeafPlanes, row: int, base: int) -> bool:
    """recover_huge_pages for a level-2 table whose whole range may be one 1G page; False: nothing is mapped there."""
    small = _first_leaf(mmu, planes, root.tables[row], base)
    if small is None:
        return False
    above = next(at for at, _, level in root.walk(base) if level == PG_LEVEL_1G)
    huge = huge_leafs(mmu.fmt, root.tables[row])
    tables = np.flatnonzero(present_entries(mmu.fmt, root.tables[row]) & ~huge)
    table_sptes = np.append(root.tables[row, tables], np.uint64(root.read(above)))
    root.write(above, make_huge_spte(mmu.fmt, small, PG_LEVEL_1G, nx_huge_pages=False))
    mmu.vm.meter.count("spte_cmpxchg")
    mmu.stats.update_page_stats(PG_LEVEL_1G, 1)
    mmu.stats.update_page_stats(PG_LEVEL_2M, -int(huge.sum()))
    _drop_tables(mmu, root, planes, base, tables, table_sptes)
    mmu.rcu.call(lambda: root.free_table(TABLE_PFN_BASE + row))
    return True


def _first_leaf(mmu: MmuState, planes: LeafPlanes, entries: NDArray[np.uint64], base: int) -> int | None:
    """The first present leaf below a level-2 table over one GiB, of 2M or of 4K."""
    index = base - planes.base_gfn
    huge = np.flatnonzero(huge_leafs(mmu.fmt, entries))
    words = np.flatnonzero(planes.present.slice_words(index, CHUNK_PAGES))
    if len(huge) and (not len(words) or int(huge[0]) * _REGION_WORDS < int(words[0])):
        return int(entries[huge[0]])
    if not len(words):
        return None
    first = index + int(words[0]) * WORD_BITS
    return planes.compose(next(i for i in range(first, first + WORD_BITS) if planes.present.get(i)))


def zap_small_leafs(mmu: MmuState, root: Root, slot: Memslot) -> int:
    """The shadow MMU's form: leaves that could be mapped larger go, their tables stay; returns how many went."""
    planes, zapped = root.leaf[slot.id], 0
    for row, base in list(root.tables_at(PG_LEVEL_2M, slot.base_gfn, slot.end_gfn)):
        entries = root.tables[row]
        allowed = _max_levels(mmu, slot, base)
        huge = huge_leafs(mmu.fmt, entries)
        small = np.flatnonzero(present_entries(mmu.fmt, entries) & ~huge & (allowed >= PG_LEVEL_2M))
        for first, count in _runs(small) if len(small) else ():
            at = base - planes.base_gfn + first * REGION_PAGES
            gone = erase_range(planes, at, count * REGION_PAGES)
            mmu.stats.update_page_stats(PG_LEVEL_4K, -gone)
            zapped += gone
        huge &= allowed >= PG_LEVEL_1G
        entries[huge] = mmu.fmt.nonpresent
        mmu.stats.update_page_stats(PG_LEVEL_2M, -int(huge.sum()))
        zapped += int(huge.sum())
    return zapped


def _max_levels(mmu: MmuState, slot: Memslot, base: int) -> Regions:
    """levels.max_mapping_level of each 2 MiB of one GiB; 0 outside the slot."""
    out = np.zeros(ENTRIES, dtype=np.int64)
    low, high = max(base, slot.base_gfn) >> 9, min(base + CHUNK_PAGES, slot.end_gfn) - 1 >> 9
    first, count = low - (slot.base_gfn >> 9), high + 1 - low
    whole = slot.arch.counts[PG_LEVEL_2M][first : first + count] == 0
    allowed = np.where(whole, PG_LEVEL_2M, PG_LEVEL_4K)
    if not slot.arch.disallow_lpage(max(base, slot.base_gfn), PG_LEVEL_1G):
        allowed[:] = PG_LEVEL_1G
    start = max(low << 9, slot.base_gfn)
    of_host = mmu.vm.host.uniform_level(slot.hva(start), min(count * REGION_PAGES, slot.end_gfn - start) << PAGE_SHIFT)
    if of_host is None:
        gfns = np.maximum(np.arange(low, high + 1) << 9, slot.base_gfn).tolist()
        allowed = np.minimum(allowed, [mmu.vm.host.level(slot.hva(gfn)) for gfn in gfns])
    else:
        allowed = np.minimum(allowed, of_host)
    out[low - (base >> 9) : high + 1 - (base >> 9)] = allowed
    return out


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
    frames = ((planes.hva >> PAGE_SHIFT) + at & DATA_PFNS - 1).astype(np.uint64)  # no exceptions: see _suits
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
    """Erase the leaves of tables that were just unlinked, and free the tables once no reader is left."""
    for first, count in _runs(which):
        gone = erase_range(planes, base - planes.base_gfn + first * REGION_PAGES, count * REGION_PAGES)
        mmu.stats.update_page_stats(PG_LEVEL_4K, -gone)

    def free() -> None:
        root.n_tables[PG_LEVEL_4K] -= len(which)

    mmu.rcu.call(free)
    if root.nx_disallowed:
        for spte in sptes.tolist():
            untrack_nx(mmu, root, mmu.fmt.pfn(spte))


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
