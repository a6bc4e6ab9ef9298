"""One logged memslot as the fused loops see it: the planes behind its SPTEs and log, and what they hand back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.bulk import PF_FAST, PF_FIXED, PML_LOGGED
from migsim.kvm.host_mm import LEAF_TABLE_PFN_BASE, TABLE_PFN_BASE
from migsim.kvm.make_spte import make_nonleaf_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.populate import split_range
from migsim.kvm.roots import Root
from migsim.kvm.spte import ENTRIES, PAGE_SIZE_BIT, PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from migsim.planes import Plane
from migsim.units import CHUNK_PAGES, LEVEL_BITS, PAGE_SHIFT, REGION_PAGES, chunks_of

if TYPE_CHECKING:
    from migsim.kvm.mmu_state import MmuState
    from migsim.kvm.vm import Vm

_STEPS = np.arange(ENTRIES, dtype=np.uint64) << np.uint64(PAGE_SHIFT)  # frames one apart


class BulkSlot:
    """Planes `log`, `writable`, `dirty`, `present` (bit i = gfn base_gfn + i) of a slot in the root all vCPUs share.

    `tabled`: uint8[chunks], 1 where no huge leaf is left, so that the planes tell everything. `pml`: writes are found
    by D instead of W. Raises ValueError for a slot the word-parallel kernels cannot serve.
    """

    def __init__(self, vm: Vm, mmu: MmuState, root: Root, slot: Memslot) -> None:
        if slot.base_gfn % REGION_PAGES or slot.dirty_bitmap is None:
            raise ValueError(f"{slot!r} does not start on 2 MiB, or is not logged in a bitmap")
        planes = root.leaf[slot.id]
        self._vm, self._mmu, self._root, self._slot = vm, mmu, root, slot
        self.log: Plane = slot.dirty_bitmap
        self.writable, self.dirty, self.present = planes.writable, planes.dirty, planes.present
        self.pml = vm.pml_enabled
        self._level_3_rows: dict[int, int] = {}
        self.tabled: NDArray[np.uint8] = np.ones(chunks_of(slot.npages), dtype=np.uint8)
        for chunk in range(len(self.tabled)):
            self.tabled[chunk] = not self._has_huge(chunk)

    def _level_3(self, gfn: int) -> int:
        """Row of the level-3 table (512 entries of 1G) that covers gfn, or -1."""
        key = gfn >> 2 * LEVEL_BITS + LEVEL_BITS
        if key not in self._level_3_rows:
            rows = [at.table_pfn - TABLE_PFN_BASE for at, _, level in self._root.walk(gfn) if level == PG_LEVEL_1G]
            self._level_3_rows[key] = rows[0] if rows else -1
        return self._level_3_rows[key]

    def _has_huge(self, chunk: int) -> bool:
        """Does a leaf of 2M or 1G map part of the chunk?"""
        first = self._slot.base_gfn + chunk * CHUNK_PAGES
        end = min(first + CHUNK_PAGES, self._slot.end_gfn)
        gfn = first
        while gfn < end:
            stop = min((gfn | CHUNK_PAGES - 1) + 1, end)
            if self._huge_in_1g(gfn, stop):
                return True
            gfn = stop
        return False

    def _huge_in_1g(self, gfn: int, end: int) -> bool:
        root, fmt, above = self._root, self._mmu.fmt, self._level_3(gfn)
        if above < 0:
            return False
        spte = int(root.tables[above, gfn >> 2 * LEVEL_BITS & 511])
        if not fmt.is_present(spte):
            return False
        if fmt.is_leaf(spte, PG_LEVEL_1G):
            return True
        low = gfn >> LEVEL_BITS & 511
        entries = root.tables[fmt.pfn(spte) - TABLE_PFN_BASE, low : low + -(-(end - gfn) // REGION_PAGES)]
        leaf = np.uint64(fmt.present | PAGE_SIZE_BIT)
        return bool(((entries & leaf) == leaf).any())

    def split(self, chunk: int) -> None:
        """Eager page splitting of one chunk."""
        gfn = self._slot.base_gfn + chunk * CHUNK_PAGES
        pages = min(CHUNK_PAGES, self._slot.npages - chunk * CHUNK_PAGES)
        if gfn % CHUNK_PAGES or pages < CHUNK_PAGES or not self._split_1g_leaf(chunk, gfn):
            split_range(self._mmu, self._root, self._slot, chunk * CHUNK_PAGES, pages)
        self.tabled[chunk] = 1

    def _split_1g_leaf(self, chunk: int, gfn: int) -> bool:
        """The common case, a chunk that is one 1G leaf with W, D and A, in one step to 4K; False: not that case."""
        root, fmt, stats, above = self._root, self._mmu.fmt, self._mmu.stats, self._level_3(gfn)
        entry = gfn >> 2 * LEVEL_BITS & 511
        huge = int(root.tables[above, entry]) if above >= 0 else 0
        wanted = fmt.present | fmt.writable | fmt.dirty | fmt.accessed | fmt.mmu_writable | PAGE_SIZE_BIT
        if huge & wanted != wanted or self._mmu.nx_huge_pages:
            return False
        planes = root.leaf[self._slot.id]
        table = root.alloc_table(PG_LEVEL_2M, gfn)
        first = make_nonleaf_spte(fmt, LEAF_TABLE_PFN_BASE + (gfn >> LEVEL_BITS), root.ad_type)
        np.add(_STEPS, np.uint64(first), out=root.tables[table - TABLE_PFN_BASE])
        root.tables[above, entry] = make_nonleaf_spte(fmt, table, root.ad_type)
        root.n_tables[PG_LEVEL_4K] += ENTRIES
        for plane in (planes.present, planes.writable, planes.dirty, planes.accessed):
            plane.full[chunk] = 2  # planes are zero where nothing is present, so nothing has to be written
        stats.update_page_stats(PG_LEVEL_1G, -1)
        stats.update_page_stats(PG_LEVEL_4K, CHUNK_PAGES)
        self._vm.meter.count("huge_page_split", 1 + ENTRIES)
        return True

    def store(self, page: int) -> None:
        """A store by vCPU 0 to one page, fault and all; its PML buffer is drained."""
        vcpu = self._vm.vcpus[0]
        vcpu.run([("w", self._slot.base_gfn + page << PAGE_SHIFT, 1)])

    def count(self, counts: NDArray[np.int64]) -> None:
        """Add what the kernels counted to KVM's statistics."""
        stats, meter = self._vm.stats, self._vm.meter
        fast = int(counts[PF_FAST])
        stats.pf_taken += fast
        stats.pf_fast += fast
        stats.pf_fixed += fast
        stats.exits += fast
        meter.count("fast_page_fault", fast)
        meter.count("pml_logged", int(counts[PML_LOGGED]))
        assert not counts[PF_FIXED], "slow faults take the long way"
