"""One logged memslot as the fused loops see it: the planes behind its SPTEs and log, and what they hand back.

The kernels work on 4K leaves. What lies above level 1 is done here, in rows of tables at once: huge pages that a store
or a CLEAR meets (split, zapped or write-protected, as the vintage does it), and tables that are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migsim.kvm import bulk_stats
from migsim.kvm.bulk import (
    EMPTY,
    HUGE,
    HUGE_WRITABLE,
    PF_FAST,
    PF_FIXED,
    PML_LOGGED,
    TABLE,
    Leaves,
)
from migsim.kvm.bulk_log import region_runs
from migsim.kvm.host_mm import LEAF_TABLE_PFN_BASE, TABLE_PFN_BASE
from migsim.kvm.make_spte import make_nonleaf_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.paging import huge_leafs, present_entries
from migsim.kvm.roots import Root
from migsim.kvm.spte import ENTRIES, PAGE_SIZE_BIT, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from migsim.kvm.uapi import KVM_DIRTY_LOG_MANUAL_CAPS
from migsim.kvm.whole_slot import split_1g, split_2m, split_range
from migsim.planes import Plane, Words
from migsim.units import (
    CHUNK_PAGES,
    CHUNK_WORDS,
    LEVEL_BITS,
    PAGE_SHIFT,
    REGION_PAGES,
    REGION_WORDS,
    chunks_of,
    pages_per_level,
)

if TYPE_CHECKING:
    from migsim.kvm.mmu_state import MmuState
    from migsim.kvm.vm import Vm

_STEPS = np.arange(ENTRIES, dtype=np.uint64) << np.uint64(PAGE_SHIFT)  # frames one apart
_CHUNK_REGIONS = CHUNK_PAGES // REGION_PAGES
_NOTHING: Words = np.zeros(0, dtype=np.uint64)

Flags = NDArray[np.uint8]
Regions = NDArray[np.bool_]


class BulkSlot:
    """Planes `log`, `writable`, `dirty`, `present` (bit i = gfn base_gfn + i) of a slot in the root all vCPUs share.

    `leaves`: these and the rarer ones, and what each 2 MiB of the slot is mapped by. `tabled`: uint8[chunks], 1 where
    there is a level-1 table everywhere. `reach`: uint8[chunks], 1 where a CLEAR has to do something about huge pages
    first (INITIALLY_SET leaves them alone until then). `pml`: writes are found by D instead of W. `fast_path`: the MMU
    has a fast page fault. `plain`: it has, and every leaf without W is MMU-writable. `silent`: while every page of a
    chunk is marked, no store to it faults. `walks`: CLEAR goes through an rmap. Raises ValueError for a slot the
    word-parallel kernels cannot serve.
    """

    def __init__(self, vm: Vm, mmu: MmuState, root: Root, slot: Memslot) -> None:
        if slot.base_gfn % REGION_PAGES or slot.dirty_bitmap is None:
            raise ValueError(f"{slot!r} does not start on 2 MiB, or is not logged in a bitmap")
        planes = root.leaf[slot.id]
        rare = (planes.not_host_writable, planes.acc_tracked, planes.not_exec)
        if planes.pfns or any(plane is not None for plane in rare) or not mmu.ad_enabled or mmu.stores_matter:
            raise ValueError(f"{slot!r} has pages that are not plain memory")
        self._vm, self._mmu, self._root, self._slot = vm, mmu, root, slot
        self._initially_set = vm.manual_dirty_log_protect & KVM_DIRTY_LOG_MANUAL_CAPS == KVM_DIRTY_LOG_MANUAL_CAPS
        self._eager = vm.config.eager_page_split and mmu.vintage.eager_split
        self.log: Plane = slot.dirty_bitmap
        self.writable, self.dirty, self.present = planes.writable, planes.dirty, planes.present
        self.pml, self.fast_path = vm.pml_enabled, mmu.vintage.fast_page_fault
        self.walks = self._initially_set and not mmu.vintage.tdp
        if self._initially_set and not self._eager and mmu.vintage.splits_on_fault and planes.not_mmu_writable is None:
            planes.not_mmu_writable = Plane(slot.npages)  # children of what CLEAR write-protected
        locked = planes.not_mmu_writable
        self.plain = self.fast_path and locked is None
        self.silent = not mmu.vintage.protects_huge_at_enable
        self._level_3_rows: dict[int, int] = {}
        fmt = mmu.fmt
        plain = fmt.present | fmt.writable | fmt.dirty | fmt.accessed | fmt.mmu_writable
        self._plain_1g = plain | PAGE_SIZE_BIT  # of a 1G leaf that is split to 4K in one step
        self._region: Flags = np.full(-(-slot.npages // REGION_PAGES), EMPTY, dtype=np.uint8)
        self.leaves = Leaves(
            self._region, self.present.words, self.present.full, self.writable.words, self.writable.full,
            self.dirty.words, self.dirty.full, planes.accessed.words, planes.accessed.full,
            _NOTHING if locked is None else locked.words, self._region[:0] if locked is None else locked.full,
        )  # fmt: skip
        self._read_regions()
        regions = np.full((chunks_of(slot.npages), _CHUNK_REGIONS), TABLE, dtype=np.uint8)
        regions.reshape(-1)[: len(self._region)] = self._region
        self.tabled: Flags = np.asarray(np.all(regions == TABLE, axis=1), dtype=np.uint8)
        self.reach: Flags = np.asarray(np.any(regions >= HUGE, axis=1) & self._initially_set, dtype=np.uint8)

    # -- where things are --------------------------------------------------------------------------------------------

    def _read_regions(self) -> None:
        """Fill in what every 2 MiB is mapped by, from the tables."""
        root, start, end = self._root, self._slot.base_gfn, self._slot.end_gfn
        for level in (PG_LEVEL_1G, PG_LEVEL_2M):
            regions = pages_per_level(level) // REGION_PAGES
            for row, base in root.tables_at(level, start, end):
                states = self._states(root.tables[row])
                states[states == TABLE] = TABLE if level == PG_LEVEL_2M else EMPTY
                first = (base - start) // REGION_PAGES
                low, high = max(first, 0), min(first + ENTRIES * regions, len(self._region))
                of_all = np.repeat(states, regions)[low - first : high - first]
                here = self._region[low:high]
                here[of_all != EMPTY] = of_all[of_all != EMPTY]

    def _states(self, entries: Words) -> Flags:
        """What each entry of a level-2 table is to a store (see bulk.py)."""
        fmt = self._mmu.fmt
        huge = huge_leafs(fmt, entries)
        states = np.where(present_entries(fmt, entries), np.uint8(TABLE), np.uint8(EMPTY))
        states[huge] = HUGE
        states[huge & (entries & np.uint64(fmt.writable) != 0)] = HUGE_WRITABLE
        return states

    def _level_3(self, gfn: int) -> int:
        """Row of the level-3 table (512 entries of 1G) that covers gfn, or -1."""
        key = gfn >> 2 * LEVEL_BITS + LEVEL_BITS
        if key not in self._level_3_rows:
            rows = [at.table_pfn - TABLE_PFN_BASE for at, _, level in self._root.walk(gfn) if level == PG_LEVEL_1G]
            if not rows:
                return -1
            self._level_3_rows[key] = rows[0]
        return self._level_3_rows[key]

    def _pieces(self, chunk: int) -> Iterator[tuple[int, slice]]:
        """(gfn, regions of the slot) of each part of a chunk that one level-2 table covers."""
        gfn = self._slot.base_gfn + chunk * CHUNK_PAGES
        end = min(gfn + CHUNK_PAGES, self._slot.end_gfn)
        while gfn < end:
            stop = min((gfn | CHUNK_PAGES - 1) + 1, end)
            first = gfn - self._slot.base_gfn >> LEVEL_BITS
            yield gfn, slice(first, first + -(-(stop - gfn) // REGION_PAGES))
            gfn = stop

    def _huge_1g(self, gfn: int) -> int:
        """The 1G leaf that maps gfn, or 0."""
        above = self._level_3(gfn)
        spte = int(self._root.tables[above, gfn >> 2 * LEVEL_BITS & 511]) if above >= 0 else 0
        fmt = self._mmu.fmt
        return spte if fmt.is_present(spte) and fmt.is_leaf(spte, PG_LEVEL_1G) else 0

    def _level_2(self, gfn: int, count: int) -> Words | None:
        """`count` entries of the level-2 table from gfn on, as a view; None if there is no such table."""
        row, entry = self._root.l2_row(gfn), gfn >> LEVEL_BITS & 511
        return None if row < 0 else self._root.tables[row, entry : entry + count]

    def _refresh(self, chunk: int) -> None:
        """Look again at what maps a chunk's regions."""
        huge, fmt = False, self._mmu.fmt
        wanted = np.uint64(fmt.present if self._eager else fmt.writable | fmt.mmu_writable)
        tabled = True
        for gfn, regions in self._pieces(chunk):
            count = regions.stop - regions.start
            entries = self._level_2(gfn, count)
            if entries is None:
                entries = np.full(count, self._huge_1g(gfn) or self._mmu.fmt.nonpresent, dtype=np.uint64)
            self._region[regions] = self._states(entries)
            huge = huge or bool((huge_leafs(fmt, entries) & (entries & wanted != 0)).any())
            tabled = tabled and bool((self._region[regions] == TABLE).all())
        self.tabled[chunk] = tabled
        self.reach[chunk] = huge and self._initially_set

    # -- stores ------------------------------------------------------------------------------------------------------

    def make_tables(self, chunk: int, hits: Words, counts: NDArray[np.int64]) -> None:
        """What the slow page faults of the stores `hits` (uint64[4096]) do above level 1, once for each region.

        A huge page in the way is split, or (until Linux 6.2, and by the shadow MMU) zapped with a flush, whereupon its
        other pages fault again; then a level-1 table is linked.
        """
        hit = _regions_with(hits)
        base = chunk * _CHUNK_REGIONS
        for gfn, regions in self._pieces(chunk):
            state = self._region[regions]
            lacking = hit[regions.start - base : regions.stop - base] & ((state == EMPTY) | (state == HUGE))
            if lacking.any():
                self._open_1g(gfn)
                before = self._tables()
                self._root.ensure_table(gfn, PG_LEVEL_2M)
                self._vm.meter.count("table_alloc", self._tables() - before)
                entries = self._level_2(gfn, len(lacking))
                assert entries is not None
                self._open_2m(entries, gfn, lacking, counts)
        self._refresh(chunk)

    def _tables(self) -> int:
        return sum(self._root.n_tables)

    def _open_1g(self, gfn: int) -> None:
        """Get a 1G leaf at gfn out of the way."""
        if not self._huge_1g(gfn):
            return
        above, entry = self._level_3(gfn), gfn >> 2 * LEVEL_BITS & 511
        if self._mmu.vintage.splits_on_fault:
            split_1g(self._mmu, self._root, above, entry, gfn & -CHUNK_PAGES)
            return
        self._root.tables[above, entry] = self._mmu.fmt.nonpresent
        self._mmu.stats.update_page_stats(PG_LEVEL_1G, -1)
        self.flush(1)

    def _open_2m(self, entries: Words, gfn: int, lacking: Regions, counts: NDArray[np.int64]) -> None:
        """Get the 2M leaves among the `lacking` entries out of the way and link the tables that are missing then."""
        mmu, root = self._mmu, self._root
        if mmu.vintage.splits_on_fault:
            self._first_is_slow(entries[huge_leafs(mmu.fmt, entries) & lacking], counts)
            split_2m(mmu, root, entries, gfn, lacking)
        else:
            zapped = huge_leafs(mmu.fmt, entries) & lacking
            entries[zapped] = mmu.fmt.nonpresent
            mmu.stats.update_page_stats(PG_LEVEL_2M, -int(zapped.sum()))
            self.flush(int(zapped.sum()))
        empty = np.flatnonzero(lacking & (entries == np.uint64(mmu.fmt.nonpresent)))
        first = make_nonleaf_spte(mmu.fmt, LEAF_TABLE_PFN_BASE + (gfn >> LEVEL_BITS), root.ad_type)
        entries[empty] = np.uint64(first) + _STEPS[empty]
        root.n_tables[PG_LEVEL_4K] += len(empty)
        self._vm.meter.count("table_alloc", len(empty))

    def _first_is_slow(self, huge: Words, counts: NDArray[np.int64]) -> None:
        """The store that meets a huge page goes the slow path, where store_faulting, after the split, sees a fast one.

        A new leaf has D, so PML does not log the page either.
        """
        fmt = self._mmu.fmt
        fast = huge[huge & np.uint64(fmt.mmu_writable) != 0] if self.fast_path else huge[:0]
        counts[PF_FAST] -= len(fast)
        counts[PF_FIXED] += len(fast)
        if self.pml:
            counts[PML_LOGGED] -= int((fast & np.uint64(fmt.dirty) == 0).sum())

    # -- CLEAR with INITIALLY_SET ------------------------------------------------------------------------------------

    def reach_4k(self, chunk: int, taken: Words | None = None) -> None:
        """Split the huge pages that hold a page of `taken` (uint64[4096]; None: all), or write-protect them.

        BulkKernel.reach_4k for one chunk.
        """
        if self._eager:
            self.split(chunk, taken)
        else:
            self._write_protect(chunk, taken)
            self._refresh(chunk)

    def split(self, chunk: int, taken: Words | None = None) -> None:
        """Eager page splitting of the part of a chunk that holds pages of `taken`."""
        gfn, pages = self._slot.base_gfn + chunk * CHUNK_PAGES, self._slot.npages - chunk * CHUNK_PAGES
        if taken is None and gfn % CHUNK_PAGES == 0 and pages >= CHUNK_PAGES and self._split_1g_leaf(chunk, gfn):
            return
        runs = [(0, min(pages, CHUNK_PAGES))] if taken is None else region_runs(0, taken)
        for first, end in runs:
            split_range(self._mmu, self._root, gfn + first, gfn + min(end, pages), PG_LEVEL_4K)
        self._refresh(chunk)

    def _split_1g_leaf(self, chunk: int, gfn: int) -> bool:
        """The common case, a chunk that is one 1G leaf with W, D and A, in one step to 4K; False: not that case."""
        root, fmt, stats, above = self._root, self._mmu.fmt, self._mmu.stats, self._level_3(gfn)
        entry = gfn >> 2 * LEVEL_BITS & 511
        if above < 0 or int(root.tables[above, entry]) & self._plain_1g != self._plain_1g:
            return False
        table = root.alloc_table(PG_LEVEL_2M, gfn)
        first = make_nonleaf_spte(fmt, LEAF_TABLE_PFN_BASE + (gfn >> LEVEL_BITS), root.ad_type)
        np.add(_STEPS, np.uint64(first), out=root.tables[table - TABLE_PFN_BASE])
        root.tables[above, entry] = make_nonleaf_spte(fmt, table, root.ad_type)
        root.n_tables[PG_LEVEL_4K] += ENTRIES
        for full in (self.present.full, self.writable.full, self.dirty.full, self.leaves.accessed_full):
            full[chunk] = 2  # planes are zero where nothing is present, so nothing has to be written
        stats.update_page_stats(PG_LEVEL_1G, -1)
        stats.update_page_stats(PG_LEVEL_4K, CHUNK_PAGES)
        self._vm.meter.count("huge_page_split", 1 + ENTRIES)
        self._region[chunk * _CHUNK_REGIONS : (chunk + 1) * _CHUNK_REGIONS] = TABLE
        self.tabled[chunk], self.reach[chunk] = 1, 0
        return True

    def _write_protect(self, chunk: int, taken: Words | None) -> None:
        """W and MMU-writable go, so that the fast path cannot give W back to a whole huge page."""
        fmt, root = self._mmu.fmt, self._root
        both = np.uint64(fmt.writable | fmt.mmu_writable)
        hit = np.ones(_CHUNK_REGIONS, dtype=np.bool_) if taken is None else _regions_with(taken)
        base = chunk * _CHUNK_REGIONS
        for gfn, regions in self._pieces(chunk):
            part = hit[regions.start - base : regions.stop - base]
            if self._huge_1g(gfn):
                if part.any():
                    root.tables[self._level_3(gfn), gfn >> 2 * LEVEL_BITS & 511] &= ~both
                continue
            entries = self._level_2(gfn, len(part))
            if entries is not None:
                entries[huge_leafs(fmt, entries) & part] &= ~both

    # -- counting ----------------------------------------------------------------------------------------------------

    def flush(self, times: int) -> None:
        """Flush all vCPUs' TLBs so often."""
        bulk_stats.flush(self._vm, times)

    def harvested(self, taken: int) -> None:
        """A GET without manual protection went through the whole slot and re-armed `taken` pages."""
        self._vm.meter.count("mmu_lock_write")
        self.flush(int(taken > 0))
        if not self._mmu.vintage.tdp:
            self._vm.meter.count("rmap_walk", taken)

    def count(self, counts: NDArray[np.int64]) -> None:
        """Add what the kernels counted to KVM's statistics."""
        bulk_stats.count(self._vm, self._mmu, counts)


def _regions_with(words: Words) -> Regions:
    """bool[512]: which regions of a chunk hold a bit of `words` (uint64[4096])."""
    return np.asarray(np.any(words.reshape(-1, REGION_WORDS), axis=1))


assert CHUNK_WORDS == _CHUNK_REGIONS * REGION_WORDS
