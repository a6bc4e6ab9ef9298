"""Taking mappings away: leaves of a range, one table, a whole root, all roots (patches 7 and 20's mechanism).

Leaves only where the range may come back soon (notifiers, slot removal); by root invalidation where everything goes:
marking is short, and zapping then runs beside new faults. Source: Linux 6.13 and 5.10, arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

from typing import Final

from migsim.kvm import whole_slot
from migsim.kvm.changed_spte import set_spte, set_spte_atomic
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep
from migsim.kvm.roots import Root
from migsim.kvm.tdp_iter import TdpIter, cond_resched, for_each_tdp_pte
from migsim.units import pages_per_level

WHOLE_ROOT_TABLES: Final = 64  # from here on a root is emptied at once and not entry by entry


def zap_leafs(mmu: MmuState, root: Root, start: int, end: int, *, flush: bool = False) -> bool:
    """Zap the leaves wholly or partly inside gfns [start, end); tables stay. True: a TLB flush is due.

    5.10 also zaps the tables that lie wholly inside. `flush`: one was due already; a yield does it. An invalid root
    needs none: loading a new root flushes.
    """
    assert mmu.lock.writer, f"zap of gfns {start:#x}..{end:#x} without the exclusive mmu_lock"
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, start, end):
            if cond_resched(mmu, it, flush=flush):
                flush = False
                continue
            if not it.is_leaf and not _table_goes_too(mmu, it, start, end):
                continue
            set_spte(mmu, it, mmu.fmt.nonpresent)
            flush = flush or not root.invalid
    return flush


def _table_goes_too(mmu: MmuState, it: TdpIter, start: int, end: int) -> bool:
    inside = start <= it.gfn and it.gfn + pages_per_level(it.level) <= end
    return mmu.vintage.zaps_tables and inside and mmu.fmt.is_present(it.old_spte)


def zap_table(mmu: MmuState, root: Root, table_pfn: int) -> bool:
    """Zap one table by clearing the entry that points to it (kvm_tdp_mmu_zap_sp); False if none does any more."""
    level, gfn = root.level_of(table_pfn), root.gfn_of(Sptep(table_pfn, 0))
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, gfn, gfn + 1, level + 1):
            if it.level != level + 1:
                continue
            if not mmu.fmt.is_present(it.old_spte) or it.is_leaf or mmu.fmt.pfn(it.old_spte) != table_pfn:
                return False
            # the only legal changes of a table's entry are its removal and its replacement: who lost was too late
            return set_spte_atomic(mmu, it, mmu.fmt.nonpresent)
    return False


def zap_root(mmu: MmuState, root: Root) -> None:
    """Empty a root in passes, today at 4K, 2M, 1G and the root's level, so that no single step is long (Linux 6.9).

    A valid root (5.10 zaps those) is flushed before every yield; an invalid one by whoever loads a new root.
    """
    if mmu.at_once and sum(root.n_tables) > WHOLE_ROOT_TABLES:
        whole_slot.zap_root(mmu, root)
        return
    flush = False
    for level in (*mmu.vintage.zap_root_levels, root.level):
        with mmu.rcu.read():
            for it in for_each_tdp_pte(root, 0, 1 << 9 * root.level, level):
                if cond_resched(mmu, it, flush=flush):
                    flush = False
                    continue
                if it.level > level or not mmu.fmt.is_present(it.old_spte):
                    continue
                # an entry that became FROZEN meanwhile is going already: it is not present, and so left alone
                while mmu.fmt.is_present(it.old_spte) and not set_spte_atomic(mmu, it, mmu.fmt.nonpresent):
                    pass
                flush = not root.invalid
    assert sum(root.n_tables) == 1, f"{root!r} zapped, yet tables {root.count_tables()} are linked"


def invalidate_all_roots(mmu: MmuState) -> list[Root]:
    """Mark every root invalid under the exclusive lock; vCPUs load new ones before they run again."""
    with mmu.lock.write():
        return mmu.roots.invalidate(mmu.roots.valid())


def zap_invalidated_roots(mmu: MmuState) -> None:
    """Zap what invalidate_all_roots left, under the read lock, and drop the MMU's own reference to each."""
    while (root := mmu.roots.next_scheduled()) is not None:
        with mmu.lock.read():
            root.zap_scheduled = False
            zap_root(mmu, root)
        mmu.roots.put(root)
