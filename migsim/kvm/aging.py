"""Access tracking: is a page young, and make it old (patch 13). No TLB flush: young may show late, which is harmless.

With A/D bits the A bit is cleared; without, R and X are taken away and saved, so that the next access faults.
Source: Linux 6.13 and 5.10, arch/x86/kvm/mmu/tdp_mmu.c (age_gfn_range, test_age_gfn).
"""

from __future__ import annotations

from migsim.kvm.changed_spte import clear_spte_bits, set_spte_atomic
from migsim.kvm.make_spte import mark_for_access_track
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.roots import Root
from migsim.kvm.tdp_iter import for_each_tdp_pte


def age_range(mmu: MmuState, root: Root, start: int, end: int) -> bool:
    """Make every young leaf of gfns [start, end) old; True if one was young."""
    fmt, young, lockless = mmu.fmt, False, mmu.vintage.lockless_aging
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, start, end):
            if not it.is_leaf or not fmt.is_accessed(it.old_spte):
                continue
            young = True
            if fmt.ad_enabled(it.old_spte):
                bits = fmt.accessed | (fmt.dirty if mmu.vintage.age_clears_dirty else 0)
                clear_spte_bits(mmu, it, bits, lockless=lockless)
            else:  # a lost exchange is not tried again: whoever won has just used the page
                set_spte_atomic(mmu, it, mark_for_access_track(fmt, it.old_spte), aging=True)
    return young


def test_age_range(mmu: MmuState, root: Root, start: int, end: int) -> bool:
    """Is any leaf of gfns [start, end) young? Changes nothing."""
    with mmu.rcu.read():
        return any(it.is_leaf and mmu.fmt.is_accessed(it.old_spte) for it in for_each_tdp_pte(root, start, end))
