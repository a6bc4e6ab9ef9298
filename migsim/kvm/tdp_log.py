"""Dirty logging in the TDP MMU, one root and one gfn range at a time (patches 15 and 16).

A write is found out by W (write-protect) or by D (PML); which of the two is chosen per root, because a nested guest's
D bits cannot be used. Protection is taken page by page here; whole_slot.py does the same to whole slots.
Source: Linux 6.13, 5.19 and 5.10, arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

from migsim.kvm.changed_spte import clear_spte_bits, set_spte_atomic, zap_spte_atomic
from migsim.kvm.levels import max_mapping_level
from migsim.kvm.make_spte import make_huge_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.roots import Root
from migsim.kvm.spte import MAX_HUGEPAGE_LEVEL, PG_LEVEL_2M, PG_LEVEL_4K, AdType
from migsim.kvm.tdp_iter import TdpIter, cond_resched, for_each_tdp_pte, let_others_run
from migsim.kvm.tdp_mmu import split_huge_page
from migsim.units import WORD_BITS, pages_per_level


def needs_write_protect(root: Root) -> bool:
    """Must this root log by W even while PML is in use (tdp_mmu_need_write_protect)?"""
    return root.ad_type != AdType.ENABLED


def log_bit(mmu: MmuState, root: Root, *, wrprot: bool) -> int:
    """The bit to clear so that the next store is noticed: W, or D where PML watches it."""
    return mmu.fmt.writable if wrprot or needs_write_protect(root) else mmu.fmt.dirty


def wrprot_range(mmu: MmuState, root: Root, start: int, end: int, min_level: int) -> bool:
    """Take W from present leaves of `min_level` and above; MMU-writable stays, so the fast path may give it back."""
    changed = False
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, start, end, min_level):
            if cond_resched(mmu, it, flush=False):
                continue
            while it.is_leaf and mmu.fmt.is_writable(it.old_spte):
                if set_spte_atomic(mmu, it, it.old_spte & ~mmu.fmt.writable):
                    changed = True
                    break
    return changed


def clear_dirty_range(mmu: MmuState, root: Root, start: int, end: int) -> bool:
    """Clear D (or W, by the root's kind) on every present leaf: logging starts."""
    bit = log_bit(mmu, root, wrprot=False)
    changed = False
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, start, end):
            if cond_resched(mmu, it, flush=False):
                continue
            while it.is_leaf and it.old_spte & bit:
                if set_spte_atomic(mmu, it, it.old_spte & ~bit):
                    changed = True
                    break
    return changed


def clear_dirty_pt_masked(mmu: MmuState, root: Root, gfn: int, mask: int, *, wrprot: bool) -> None:
    """Re-arm the 4K leaves of the 64-page window at `gfn` whose bit is set in `mask`. No flush: the ioctl does it.

    A leaf that is visited leaves the local mask even if it needs no change, so that the walk can end early.
    """
    assert mmu.lock.writer, f"gfn {gfn:#x}: masked re-arming needs the exclusive mmu_lock"
    bit = log_bit(mmu, root, wrprot=wrprot)
    if not mask:
        return
    first = gfn + (mask & -mask).bit_length() - 1
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, first, gfn + WORD_BITS):
            if not mask:
                break
            if not it.is_leaf or it.level > PG_LEVEL_4K or not mask >> (it.gfn - gfn) & 1:
                continue
            mask &= ~(1 << (it.gfn - gfn))
            if it.old_spte & bit:
                clear_spte_bits(mmu, it, bit)


def split_range(mmu: MmuState, root: Root, start: int, end: int, target_level: int) -> None:
    """Split every huge page that touches gfns [start, end) down to `target_level`; translations stay as they were.

    Parents are visited before their children, so one walk does it. Since Linux 6.11 (cf3ff0ee) mmu_lock is let go for
    the allocation of each table; the entry is read again afterwards.
    """
    allocated = not mmu.vintage.split_drops_lock
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, start, end, target_level + 1):
            if cond_resched(mmu, it, flush=False) or not it.is_leaf:
                continue
            if not allocated:
                let_others_run(mmu, it)
                allocated = True
                continue
            while it.is_leaf and not split_huge_page(mmu, it):
                pass
            allocated = not mmu.vintage.split_drops_lock


# -- logging ends ----------------------------------------------------------------------------------------------------


def _could_be_huge(mmu: MmuState, slot: Memslot, it: TdpIter, start: int, end: int) -> bool:
    """Is the entry a table whose whole range lies in the slot and could be mapped by one page?"""
    if it.level > MAX_HUGEPAGE_LEVEL or not mmu.fmt.is_present(it.old_spte) or it.is_leaf:
        return False
    if it.gfn < start or it.gfn + pages_per_level(it.level) > end:
        return False
    return max_mapping_level(mmu, slot, it.gfn) >= it.level


def zap_collapsible_5_10(mmu: MmuState, root: Root, slot: Memslot) -> None:
    """As first merged: asks whether the *table's* frame is part of a huge page, which it never is. Recovers nothing."""
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, slot.base_gfn, slot.end_gfn):
            if not mmu.fmt.is_present(it.old_spte) or it.is_leaf:
                continue
            frame = mmu.fmt.pfn(it.old_spte)
            assert root.level_of(frame) == it.level - 1, f"gfn {it.gfn:#x}: frame {frame:#x} is not a page table"


def zap_collapsible_leafs(mmu: MmuState, root: Root, slot: Memslot) -> None:
    """5.12 to 5.18: zap each leaf that could be larger, with a flush for every one of them."""
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, slot.base_gfn, slot.end_gfn):
            if cond_resched(mmu, it, flush=False) or not it.is_leaf:
                continue
            while it.is_leaf and it.level < max_mapping_level(mmu, slot, it.gfn) and not zap_spte_atomic(mmu, it):
                pass


def zap_collapsible_tables(mmu: MmuState, root: Root, slot: Memslot) -> None:
    """5.19 to 6.12: zap every table whose range could be one page; later faults map it huge."""
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, slot.base_gfn, slot.end_gfn, PG_LEVEL_2M):
            if cond_resched(mmu, it, flush=False):
                continue
            while _could_be_huge(mmu, slot, it, slot.base_gfn, slot.end_gfn) and not zap_spte_atomic(mmu, it):
                pass


def recover_huge_pages(mmu: MmuState, root: Root, slot: Memslot) -> None:
    """6.13: rebuild the huge leaf in place from the table's first present leaf, with one flush at the end.

    The flush comes while RCU still holds the tables back: a CPU may be walking them until it is done.
    """
    flush = False
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, slot.base_gfn, slot.end_gfn, PG_LEVEL_2M):
            if cond_resched(mmu, it, flush=flush):
                flush = False
                continue
            while _could_be_huge(mmu, slot, it, slot.base_gfn, slot.end_gfn):
                small = _first_leaf(root, it)
                if small is None:
                    break
                huge = make_huge_spte(mmu.fmt, small, it.level, nx_huge_pages=mmu.nx_huge_pages)
                if set_spte_atomic(mmu, it, huge):
                    flush = True
                    break
        if flush:
            mmu.vm.flush_remote_tlbs_memslot(slot)


def _first_leaf(root: Root, table: TdpIter) -> int | None:
    """The first present leaf below a non-leaf entry."""
    for child in for_each_tdp_pte(root, table.gfn, table.gfn + pages_per_level(table.level)):
        if child.is_leaf:
            return child.old_spte
    return None


DISABLE_FORMS = {
    "zap-nothing": zap_collapsible_5_10,
    "zap-leafs": zap_collapsible_leafs,
    "zap-tables": zap_collapsible_tables,
    "recover": recover_huge_pages,
}
