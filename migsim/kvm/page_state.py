"""What the host's page is told of the guest's use of it: dirty for write-back, accessed for reclaim.

Until Linux 6.12 the SPTE keeps it and the page is told when the SPTE loses it; since 6.13 the page is told when it is
mapped, and the SPTE says nothing any more. Source: Linux 6.8 and 6.18, arch/x86/kvm/mmu/tdp_mmu.c
(handle_changed_spte), mmu.c (mmu_spte_update, kvm_mmu_finish_page_fault).
"""

from __future__ import annotations

from migsim.kvm.mmu_state import MmuState
from migsim.units import pages_per_level


def lost_page_state(mmu: MmuState, old: int, new: int, level: int, *, aging: bool = False) -> None:
    """A leaf `old` became `new`: what it knew and `new` does not is told to the page, until Linux 6.12.

    `aging`: whoever asked gets the answer, so the page is not told that it was accessed.
    """
    state, fmt = mmu.vm.host.page_state, mmu.fmt
    if state is None or not mmu.vintage.pushes_page_state or not fmt.is_present(old) or not fmt.is_leaf(old, level):
        return
    kept = fmt.is_present(new) and fmt.is_leaf(new, level) and fmt.pfn(new) == fmt.pfn(old)
    dirty = fmt.is_dirty(old) and not (kept and fmt.is_dirty(new))
    accessed = not aging and fmt.is_accessed(old) and not (kept and fmt.is_accessed(new))
    state.tell(fmt.pfn(old), pages_per_level(level), dirty=dirty, accessed=accessed)


def mapped_page(mmu: MmuState, pfn: int, *, writable: bool, unused: bool = False) -> None:
    """A fault lets its page go: accessed, and dirty if it may be written through what was mapped, since Linux 6.13.

    `unused`: the fault has to start over, nothing was mapped. Until 6.12 the page is released clean.
    """
    state = mmu.vm.host.page_state
    if state is not None and not mmu.vintage.pushes_page_state and not unused:
        state.tell(pfn, 1, dirty=writable, accessed=True)
