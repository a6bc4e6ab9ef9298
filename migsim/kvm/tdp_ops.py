"""Operations on every root the TDP MMU serves: the same set of methods the shadow MMU offers (shadow_mmu.py).

Each takes mmu_lock as its kernel does, goes through the roots of the slot's address space, and says whether a flush is
due where the caller decides about it. `ranges` holds the inner loops: page at a time, or whole slots at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from migsim.kvm import whole_slot
from migsim.kvm.aging import age_range, test_age_range
from migsim.kvm.collapse import collapse_slot
from migsim.kvm.levels import PageFault
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.notifier import set_spte_gfn
from migsim.kvm.roots import Root
from migsim.kvm.spte import PG_LEVEL_4K
from migsim.kvm.tdp_log import clear_dirty_pt_masked, clear_dirty_range, split_range, wrprot_range
from migsim.kvm.tdp_mmu import RetPf, tdp_mmu_map
from migsim.kvm.write_protect import write_protect_gfn
from migsim.kvm.zap import invalidate_all_roots, zap_invalidated_roots, zap_leafs, zap_root


class TdpMmu:
    """The TDP MMU of one VM."""

    def __init__(self, mmu: MmuState) -> None:
        self.mmu = mmu

    def _write(self) -> AbstractContextManager[bool]:
        """The exclusive lock, unless the caller holds it for a loop of such calls."""
        return nullcontext(False) if self.mmu.lock.writer else self.mmu.lock.write()

    def map(self, root: Root, fault: PageFault) -> RetPf:
        """Install a mapping; mmu_lock is held."""
        return tdp_mmu_map(self.mmu, root, fault)

    # -- logging -----------------------------------------------------------------------------------------------------

    def split_slot(self, slot: Memslot, start: int, end: int) -> None:
        """Eager splitting of gfns [start, end) to 4K, under whichever lock is held, else the read lock."""
        held = nullcontext(True) if self.mmu.lock.held else self.mmu.lock.read()
        split = whole_slot.split_range if whole_slot.suits(self.mmu, end - start) else split_range
        with held:
            for root in self.mmu.roots.valid(slot.as_id):
                split(self.mmu, root, start, end, PG_LEVEL_4K)

    def wrprot_slot(self, slot: Memslot, min_level: int) -> bool:
        """Take W from the slot's leaves at `min_level` and above."""
        wrprot = whole_slot.wrprot_range if whole_slot.suits(self.mmu, slot.npages) else wrprot_range
        with self.mmu.lock.read():
            roots = list(self.mmu.roots.valid(slot.as_id))
            return sum(wrprot(self.mmu, root, slot.base_gfn, slot.end_gfn, min_level) for root in roots) > 0

    def clear_dirty_slot(self, slot: Memslot) -> bool:
        """Clear D, or W on roots that cannot log by D."""
        clear = whole_slot.clear_dirty_range if whole_slot.suits(self.mmu, slot.npages) else clear_dirty_range
        with self.mmu.lock.read():
            roots = list(self.mmu.roots.valid(slot.as_id))
            return sum(clear(self.mmu, root, slot.base_gfn, slot.end_gfn) for root in roots) > 0

    def clear_dirty_pt_masked(self, slot: Memslot, gfn: int, mask: int, *, wrprot: bool) -> None:
        """Re-arm the pages of `mask`."""
        with self._write():
            for root in self.mmu.roots.valid(slot.as_id):
                clear_dirty_pt_masked(self.mmu, root, gfn, mask, wrprot=wrprot)

    def collapse_slot(self, slot: Memslot) -> None:
        """Logging is off: make small mappings huge again, in the vintage's way; each root flushes for itself."""
        with self.mmu.lock.read():
            for root in self.mmu.roots.valid(slot.as_id):
                collapse_slot(self.mmu, root, slot)

    # -- zapping -----------------------------------------------------------------------------------------------------

    def zap_range(self, as_id: int, start: int, end: int) -> bool:
        """Zap the leaves of gfns [start, end), in invalid roots too: a TLB may still hold what they map."""
        at_once = whole_slot.suits(self.mmu, end - start) and not self.mmu.vintage.zaps_tables
        zap = whole_slot.zap_leafs if at_once else zap_leafs
        with self._write():
            flush = False
            for root in self.mmu.roots.of(as_id):
                flush = zap(self.mmu, root, start, end, flush=flush)
            return flush

    def zap_all(self) -> None:
        """Everything goes: fast by invalidating roots, or (5.10) root by root under the exclusive lock."""
        if self.mmu.vintage.fast_zap:
            invalidate_all_roots(self.mmu)
            zap_invalidated_roots(self.mmu)
            return
        with self.mmu.lock.write():
            for root in self.mmu.roots.valid():
                zap_root(self.mmu, root)
            self.mmu.vm.flush_remote_tlbs()

    def destroy(self) -> None:
        """Zap the roots that pre_destroy invalidated."""
        zap_invalidated_roots(self.mmu)

    # -- single pages ------------------------------------------------------------------------------------------------

    def write_protect_gfn(self, slot: Memslot, gfn: int, min_level: int = PG_LEVEL_4K) -> bool:
        """Sticky write protection; mmu_lock is held for write."""
        return sum(write_protect_gfn(self.mmu, root, gfn, min_level) for root in self.mmu.roots.valid(slot.as_id)) > 0

    def age(self, slot: Memslot, start: int, end: int) -> bool:
        """Make old; True if one was young."""
        by_a = self.mmu.ad_enabled and not self.mmu.vintage.age_clears_dirty
        age = whole_slot.age_range if by_a and whole_slot.suits(self.mmu, end - start) else age_range
        with self.mmu.aging_lock():
            return sum(age(self.mmu, root, start, end) for root in self.mmu.roots.valid(slot.as_id)) > 0

    def test_age(self, slot: Memslot, start: int, end: int) -> bool:
        """Is any young?"""
        with self.mmu.aging_lock():
            return any(test_age_range(self.mmu, root, start, end) for root in self.mmu.roots.valid(slot.as_id))

    def set_spte_gfn(self, slot: Memslot, gfn: int, pfn: int, *, writable: bool) -> bool:
        """changed_pte notifier."""
        with self._write():
            roots = list(self.mmu.roots.of(slot.as_id))
            return sum(set_spte_gfn(self.mmu, root, gfn, pfn, writable=writable) for root in roots) > 0
