"""One logged memslot as the fused loops see it: the planes behind its SPTEs and log, and what they hand back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.bulk import PF_FAST, PF_FIXED, PML_LOGGED
from migsim.kvm.memslot import Memslot
from migsim.kvm.populate import split_range
from migsim.kvm.roots import Root
from migsim.planes import Plane
from migsim.units import CHUNK_PAGES, PAGE_SHIFT, REGION_PAGES, chunks_of

if TYPE_CHECKING:
    from migsim.kvm.mmu_state import MmuState
    from migsim.kvm.vm import Vm


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
        self.eager = vm.config.eager_page_split
        self.tabled: NDArray[np.uint8] = np.ones(chunks_of(slot.npages), dtype=np.uint8)
        for chunk in range(len(self.tabled)):
            self.tabled[chunk] = not self._has_huge(chunk)

    def _has_huge(self, chunk: int) -> bool:
        """Does a leaf of 2M or 1G map part of the chunk?"""
        root, fmt = self._root, self._mmu.fmt
        first = self._slot.base_gfn + chunk * CHUNK_PAGES
        end = min(first + CHUNK_PAGES, self._slot.end_gfn)
        gfn = first
        while gfn < end:
            stop = min((gfn | CHUNK_PAGES - 1) + 1, end)
            row = root.l2_row(gfn)
            if row < 0:
                spte, level = root.lookup(gfn)
                if fmt.is_present(spte) and fmt.is_leaf(spte, level):
                    return True
            else:
                low = gfn >> 9 & 511
                entries = root.tables[row, low : low + -(-(stop - gfn) // REGION_PAGES)]
                wanted = np.uint64(fmt.present | 1 << 7)
                if ((entries & wanted) == wanted).any():
                    return True
            gfn = stop
        return False

    def split(self, chunk: int) -> None:
        """Eager page splitting of one chunk."""
        pages = min(CHUNK_PAGES, self._slot.npages - chunk * CHUNK_PAGES)
        split_range(self._mmu, self._root, self._slot, chunk * CHUNK_PAGES, pages)
        self.tabled[chunk] = 1

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
