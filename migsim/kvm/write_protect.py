"""One gfn made read-only for good, because somebody shadows or tracks it (patch 17).

W and MMU-writable both go, so the fast path cannot undo it; the TLBs must be flushed before mmu_lock is dropped.
Source: Linux 6.13, arch/x86/kvm/mmu/tdp_mmu.c (write_protect_gfn) and page_track.c.
"""

from __future__ import annotations

from migsim.kvm.changed_spte import set_spte_atomic
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.roots import Root
from migsim.kvm.spte import PG_LEVEL_4K
from migsim.kvm.tdp_iter import for_each_tdp_pte


def write_protect_gfn(mmu: MmuState, root: Root, gfn: int, min_level: int = PG_LEVEL_4K) -> bool:
    """Take W and MMU-writable from the leaf at or above `min_level` that maps gfn; True: a flush is due.

    An SPTE that has lost W already but is still MMU-writable must be changed too (Linux commit 7c8a4742).
    """
    both, changed = mmu.fmt.writable | mmu.fmt.mmu_writable, False
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, gfn, gfn + 1, min_level):
            while it.is_leaf and it.old_spte & both:
                if set_spte_atomic(mmu, it, it.old_spte & ~both):
                    changed = True
                    break
    return changed


def write_track_add(mmu: MmuState, slot: Memslot, gfn: int) -> None:
    """One more tracker of gfn: no huge page may cover it, no store to it may go unseen. The caller write-protects."""
    key = slot.as_id, gfn
    mmu.write_tracked[key] = mmu.write_tracked.get(key, 0) + 1
    slot.arch.update_disallow_lpage(gfn, 1)


def write_track_remove(mmu: MmuState, slot: Memslot, gfn: int) -> None:
    """One tracker fewer; raises AssertionError if there was none."""
    key = slot.as_id, gfn
    left = mmu.write_tracked.get(key, 0) - 1
    assert left >= 0, f"gfn {gfn:#x} of address space {slot.as_id} is not write-tracked"
    if left:
        mmu.write_tracked[key] = left
    else:
        mmu.write_tracked.pop(key)
    slot.arch.update_disallow_lpage(gfn, -1)
