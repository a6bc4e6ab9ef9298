"""MMU notifiers: the host takes a page away, replaces it, or asks whether it is young (patches 12 to 14).

Between start and end of an invalidation no fault may map the range; after start no SPTE and no TLB entry does.
Source: Linux 6.13 and 5.10, virt/kvm/kvm_main.c and arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

from collections.abc import Iterator

from migsim.kvm.changed_spte import set_spte
from migsim.kvm.make_spte import change_pfn
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.roots import Root
from migsim.kvm.spte import PG_LEVEL_4K
from migsim.kvm.tdp_iter import for_each_tdp_pte
from migsim.units import PAGE_SHIFT, PAGE_SIZE


def gfn_ranges(mmu: MmuState, hva: int, hva_end: int) -> Iterator[tuple[Memslot, int, int]]:
    """(slot, first gfn, end gfn) for every slot, of every address space, whose host memory meets [hva, hva_end)."""
    for as_id in range(mmu.vm.config.nr_as_ids):
        for slot in mmu.vm.memslots(as_id):
            start = max(hva, slot.userspace_addr)
            end = min(hva_end, slot.userspace_addr + (slot.npages << PAGE_SHIFT))
            if start < end:
                first = slot.base_gfn + (start - slot.userspace_addr >> PAGE_SHIFT)
                yield slot, first, slot.base_gfn + (end + PAGE_SIZE - 1 - slot.userspace_addr >> PAGE_SHIFT)


def set_spte_gfn(mmu: MmuState, root: Root, gfn: int, pfn: int, *, writable: bool) -> bool:
    """The host replaced the page behind a 4K mapping: zap, flush, and map a read-only replacement at once.

    Until Linux 6.10 (changed_pte). A writable replacement is left to the next fault.
    """
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, gfn, gfn + 1):
            if it.level != PG_LEVEL_4K or not mmu.fmt.is_present(it.old_spte):
                continue
            old = it.old_spte
            set_spte(mmu, it, mmu.fmt.nonpresent)
            mmu.flush_gfn(root, gfn, 1)
            if not writable:
                set_spte(mmu, it, change_pfn(mmu.fmt, old, pfn))
            return True
    return False
