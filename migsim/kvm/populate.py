"""Map whole ranges at once: what one write fault after the other leaves behind, written in one go.

The page-at-a-time rule is tdp_mmu.tdp_mmu_map; tests/kvm/test_mmu_fused.py holds planes, tables and counters equal.
Only plain memory: no write tracking, no exceptions in the host's page tables, and no log (faults would mark pages).
"""

from __future__ import annotations

import numpy as np

from migsim.kvm.host_mm import LEAF_TABLE_PFN_BASE, TABLE_PFN_BASE, linear_pfn
from migsim.kvm.make_spte import make_nonleaf_spte, make_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.roots import Root
from migsim.kvm.spte import ACC_ALL, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, spte_index
from migsim.units import LEVEL_BITS, PAGE_SHIFT, REGION_PAGES, pages_per_level


def populate(mmu: MmuState, root: Root, slot: Memslot, first: int, pages: int) -> None:
    """Map pages [first, first + pages) of a slot as write faults would, as large as host and alignment allow."""
    assert not slot.logging, f"{slot!r} logs: faults would mark its pages"
    gfn, end = slot.base_gfn + first, slot.base_gfn + first + pages
    while gfn < end:
        level = _level_at(mmu, slot, gfn, end)
        span = pages_per_level(level)
        # as far as one table of this level goes; for 4K, as far as one level-2 table goes
        table_end = min((gfn | max(pages_per_level(level + 1), pages_per_level(PG_LEVEL_1G)) - 1) + 1, end)
        if level == PG_LEVEL_4K:
            whole = mmu.vm.host.level(slot.hva(gfn)) == PG_LEVEL_4K
            count = (table_end if whole else min((gfn | REGION_PAGES - 1) + 1, end)) - gfn
        else:
            count = _alike(mmu, slot, gfn, level, (table_end - gfn) // span, end)
        _map_run(mmu, root, slot, gfn, level, count)
        gfn += count * span


def _alike(mmu: MmuState, slot: Memslot, gfn: int, level: int, most: int, end: int) -> int:
    """How many pages of `level` from gfn on, at most `most`, may be mapped so."""
    span = pages_per_level(level)
    first = gfn // span - slot.base_gfn // span
    refused = np.flatnonzero(slot.arch.counts[level][first : first + most])
    run = int(refused[0]) if len(refused) else most
    if (mmu.vm.host.uniform_level(slot.hva(gfn), run * span << PAGE_SHIFT) or 0) >= level:
        return run
    count = 1
    while count < most and _level_at(mmu, slot, gfn + count * span, end) == level:
        count += 1
    return count


def _level_at(mmu: MmuState, slot: Memslot, gfn: int, end: int) -> int:
    """Largest level a fault at gfn may use, with the whole page inside [gfn, end)."""
    for level in (PG_LEVEL_1G, PG_LEVEL_2M):
        span = pages_per_level(level)
        fits = gfn % span == 0 and gfn + span <= end
        if fits and not slot.arch.disallow_lpage(gfn, level) and mmu.vm.host.level(slot.hva(gfn)) >= level:
            return level
    return PG_LEVEL_4K


def _map_run(mmu: MmuState, root: Root, slot: Memslot, gfn: int, level: int, count: int) -> None:
    """Install `count` leaves of `level`, all in one table."""
    hva = slot.hva(gfn)
    made = make_spte(
        mmu.fmt, gfn=gfn, pfn=linear_pfn(hva), level=level, access=ACC_ALL, host_writable=mmu.vm.host.writable(hva),
        ad_type=root.ad_type, nx_huge_pages=mmu.nx_huge_pages,
    ).spte  # fmt: skip
    mmu.stats.update_page_stats(level, count)
    if level > PG_LEVEL_4K:
        table, entry = root.ensure_table(gfn, level), spte_index(gfn, level)
        root.tables[table - TABLE_PFN_BASE, entry : entry + count] = _series(made, pages_per_level(level), count)
        return
    table, entry = root.ensure_table(gfn, PG_LEVEL_2M), spte_index(gfn, PG_LEVEL_2M)
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
