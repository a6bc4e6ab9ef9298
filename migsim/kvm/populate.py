"""Map and split whole ranges at once: what many faults, or one eager split, leave behind, written in one go.

The page-at-a-time rules are tdp_mmu.tdp_mmu_map and tdp_mmu.split_huge_page; a test holds planes, tables and counters
equal. Only plain memory: no write tracking, no NX workaround, no exceptions in the host's page tables.
"""

from __future__ import annotations

import numpy as np

from migsim.kvm.host_mm import LEAF_TABLE_PFN_BASE, TABLE_PFN_BASE, linear_pfn
from migsim.kvm.make_spte import make_nonleaf_spte, make_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep, huge_leafs
from migsim.kvm.roots import Root
from migsim.kvm.spte import ACC_ALL, ENTRIES, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, spte_index
from migsim.units import LEVEL_BITS, PAGE_SHIFT, pages_per_level


def ensure_table(root: Root, gfn: int, level: int) -> int:
    """Frame of the table of `level` (2 or more) that covers gfn, linked together with those above where missing."""
    table, at_level = root.root_pfn, root.level
    while at_level > level:
        at = Sptep(table, spte_index(gfn, at_level))
        spte = root.read(at)
        if not root.fmt.is_present(spte):
            spte = make_nonleaf_spte(root.fmt, root.alloc_table(at_level - 1, gfn), root.ad_type)
            root.write(at, spte)
        assert not root.fmt.is_leaf(spte, at_level), f"SPTE {spte:#018x} gfn {gfn:#x} level {at_level} is a leaf"
        table, at_level = root.fmt.pfn(spte), at_level - 1
    return table


def populate(mmu: MmuState, root: Root, slot: Memslot, first: int, pages: int) -> None:
    """Map pages [first, first + pages) of a slot as write faults would, as large as host and alignment allow."""
    gfn, end = slot.base_gfn + first, slot.base_gfn + first + pages
    while gfn < end:
        level = _level_at(mmu, slot, gfn, end)
        span = pages_per_level(level)
        # as far as one table of this level goes; for 4K, as far as one level-2 table goes
        table_end = min((gfn | max(pages_per_level(level + 1), pages_per_level(PG_LEVEL_1G)) - 1) + 1, end)
        count = 1
        if level == PG_LEVEL_4K:
            aligned = min((gfn | pages_per_level(PG_LEVEL_2M) - 1) + 1, end)
            whole = mmu.vm.host.level(slot.hva(gfn)) == PG_LEVEL_4K or slot.logging
            count = (table_end if whole else aligned) - gfn
        else:
            while gfn + (count + 1) * span <= table_end and _level_at(mmu, slot, gfn + count * span, end) == level:
                count += 1
        _map_run(mmu, root, slot, gfn, level, count)
        gfn += count * span


def _level_at(mmu: MmuState, slot: Memslot, gfn: int, end: int) -> int:
    """Largest level a fault at gfn may use, with the whole page inside [gfn, end)."""
    for level in (PG_LEVEL_1G, PG_LEVEL_2M):
        span = pages_per_level(level)
        fits = gfn % span == 0 and gfn + span <= end and not slot.logging
        if fits and not slot.arch.disallow_lpage(gfn, level) and mmu.vm.host.level(slot.hva(gfn)) >= level:
            return level
    return PG_LEVEL_4K


def _map_run(mmu: MmuState, root: Root, slot: Memslot, gfn: int, level: int, count: int) -> None:
    """Install `count` leaves of `level`, all in one table."""
    hva = slot.hva(gfn)
    made = make_spte(
        mmu.fmt, gfn=gfn, pfn=linear_pfn(hva), level=level, access=ACC_ALL, host_writable=mmu.vm.host.writable(hva),
        ad_type=root.ad_type,
    ).spte  # fmt: skip
    mmu.stats.update_page_stats(level, count)
    if level > PG_LEVEL_4K:
        table, entry = ensure_table(root, gfn, level), spte_index(gfn, level)
        root.tables[table - TABLE_PFN_BASE, entry : entry + count] = _series(made, pages_per_level(level), count)
        return
    table, entry = ensure_table(root, gfn, PG_LEVEL_2M), spte_index(gfn, PG_LEVEL_2M)
    tables = (gfn + count - 1 >> LEVEL_BITS) - (gfn >> LEVEL_BITS) + 1
    entries = root.tables[table - TABLE_PFN_BASE, entry : entry + tables]
    missing = entries == np.uint64(mmu.fmt.nonpresent)
    first_table = LEAF_TABLE_PFN_BASE + (gfn >> LEVEL_BITS)
    entries[missing] = _series(make_nonleaf_spte(mmu.fmt, first_table, root.ad_type), 1, tables)[missing]
    root.n_tables[PG_LEVEL_4K] += int(missing.sum())
    _set_leaves(mmu, root, slot.id, gfn - slot.base_gfn, count, made)


def _set_leaves(mmu: MmuState, root: Root, slot_id: int, index: int, count: int, spte: int) -> None:
    planes, fmt = root.leaf[slot_id], mmu.fmt
    planes.present.set_range(index, count)
    for plane, bit in ((planes.writable, fmt.writable), (planes.dirty, fmt.dirty), (planes.accessed, fmt.accessed)):
        if spte & bit:
            plane.set_range(index, count)
    assert fmt.is_mmu_writable(spte), f"SPTE {spte:#018x} is not plain memory"


def _series(spte: int, pages: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """`spte` and its successors, `pages` frames apart."""
    steps = np.arange(count, dtype=np.uint64) * np.uint64(pages << PAGE_SHIFT)
    return np.uint64(spte) + steps


def split_range(mmu: MmuState, root: Root, slot: Memslot, first: int, pages: int) -> None:
    """Split every huge leaf that touches pages [first, first + pages) of a slot to 4K; W, D and A are copied."""
    gfn, end = slot.base_gfn + first, slot.base_gfn + first + pages
    while gfn < end:
        table = _split_1g(mmu, root, gfn)
        stop = min(end, (gfn | pages_per_level(PG_LEVEL_1G) - 1) + 1)
        if table is not None:
            _split_2m(mmu, root, slot, table, gfn & -pages_per_level(PG_LEVEL_2M), stop)
        gfn = stop


def _split_1g(mmu: MmuState, root: Root, gfn: int) -> int | None:
    """Frame of the level-2 table at gfn after splitting a 1G leaf in the way; None if nothing is mapped there."""
    for at, spte, level in root.walk(gfn):
        if level == PG_LEVEL_2M:
            return at.table_pfn
        if not mmu.fmt.is_present(spte):
            return None
        if mmu.fmt.is_leaf(spte, level):
            table = root.alloc_table(PG_LEVEL_2M, gfn)
            children = _series(spte, pages_per_level(PG_LEVEL_2M), ENTRIES)
            root.tables[table - TABLE_PFN_BASE] = children
            root.write(at, make_nonleaf_spte(mmu.fmt, table, root.ad_type))
            mmu.stats.update_page_stats(PG_LEVEL_1G, -1)
            mmu.stats.update_page_stats(PG_LEVEL_2M, ENTRIES)
            mmu.vm.meter.count("huge_page_split")
            return table
    return None


def _split_2m(mmu: MmuState, root: Root, slot: Memslot, table: int, gfn: int, end: int) -> None:
    """Replace the 2M leaves of one level-2 table over gfns [gfn, end) by packed level-1 tables."""
    fmt, span = mmu.fmt, pages_per_level(PG_LEVEL_2M)
    row = root.tables[table - TABLE_PFN_BASE]
    first = spte_index(gfn, PG_LEVEL_2M)
    entries = row[first : first + -(-(end - gfn) // span)]
    which = np.flatnonzero(huge_leafs(fmt, entries))
    if not len(which):
        return
    values = np.unique(entries[which] & ~np.uint64(((1 << 40) - 1) << PAGE_SHIFT))
    runs = np.split(which, np.flatnonzero(np.diff(which) != 1) + 1)
    for run in runs if len(values) == 1 else np.split(which, len(which)):
        at, count = int(run[0]), len(run)
        huge, base = int(entries[at]), gfn + at * span
        nonleaf = make_nonleaf_spte(fmt, LEAF_TABLE_PFN_BASE + (base >> LEVEL_BITS), root.ad_type)
        entries[at : at + count] = _series(nonleaf, 1, count)
        root.n_tables[PG_LEVEL_4K] += count
        _set_leaves(mmu, root, slot.id, base - slot.base_gfn, count * span, huge)
    n = len(which)
    mmu.stats.update_page_stats(PG_LEVEL_2M, -n)
    mmu.stats.update_page_stats(PG_LEVEL_4K, n * span)
    mmu.vm.meter.count("huge_page_split", n)
