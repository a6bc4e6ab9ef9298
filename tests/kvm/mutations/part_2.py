"""Part 2, Linux 5.12: parallel page faults."""

from __future__ import annotations

from typing import Any

from migsim.kvm import changed_spte, tdp_log
from migsim.kvm.paging import PagingStructure, Sptep
from migsim.kvm.tdp_iter import for_each_tdp_pte

from .declare import inside, unflushed, without


@without("mmu_lock is an rwlock, faults", "mmu_lock.MmuLock.read", "is the exclusive lock")
def _(honest: Any) -> Any:
    from migsim.kvm.mmu_lock import MmuLock

    return MmuLock.write


without("compare-exchange; a lost one", "changed_spte.set_spte_atomic", "takes a lost exchange for a done one",
        lambda honest: lambda *args, **more: honest(*args, **more) or True)  # fmt: skip


@without("compare-exchange; a lost one", "changed_spte.set_spte_atomic", "keeps account of an exchange that was lost")
def _(honest: Any) -> Any:
    def exchange(mmu: Any, it: Any, new: int, **more: Any) -> bool:
        old = it.old_spte
        done = honest(mmu, it, new, **more)
        if not done:
            changed_spte.handle_changed_spte(mmu, it.root, it.gfn, old, new, it.level, shared=True)
        return done

    return exchange


@without("compare-exchange; a lost one", "changed_spte.set_spte_atomic", "is a plain store")
def _(honest: Any) -> Any:
    def store(mmu: Any, it: Any, new: int, **more: Any) -> bool:
        compared, PagingStructure.cmpxchg = PagingStructure.cmpxchg, stored_over(PagingStructure.cmpxchg)
        try:
            return honest(mmu, it, new, **more)
        finally:
            PagingStructure.cmpxchg = compared

    return store


def stored_over(cmpxchg: Any) -> Any:
    """A compare-exchange that stores whatever it finds, after the other vCPU (of the test) had its turn."""

    def store(root: Any, at: Sptep, old: int, new: int, publish: Any = None) -> bool:
        cmpxchg(root, at, -1, new)
        if publish is not None:
            publish()
        root.write(at, new)
        return True

    return store


without("tables are freed by RCU", "mmu_state.Rcu.call", "frees at once, readers or not",
        lambda honest: lambda rcu, callback: callback())  # fmt: skip
without("entries of a dying table are FROZEN", "spte.SpteFormat.frozen", "is the value of an empty entry",
        lambda honest: property(lambda fmt: fmt.nonpresent))  # fmt: skip


@without("entries of a dying table are FROZEN", "changed_spte.handle_removed_pt", "leaves the entries empty")
def _(honest: Any) -> Any:
    def removed(mmu: Any, root: Any, table_pfn: int, *, shared: bool) -> None:
        honest(mmu, root, table_pfn, shared=shared)
        root.dying.clear()
        root.tables[root.tables == mmu.fmt.frozen] = mmu.fmt.nonpresent

    return removed


@without("zap under the read lock", "changed_spte.zap_spte_atomic", "empties the entry and then flushes")
def _(honest: Any) -> Any:
    def zap(mmu: Any, it: Any) -> bool:
        if not changed_spte.set_spte_atomic(mmu, it, mmu.fmt.nonpresent):
            return False
        mmu.flush_gfn(it.root, it.gfn, 1)
        return True

    return zap


without("zap under the read lock", "changed_spte.zap_spte_atomic", "does not flush",
        lambda honest: lambda mmu, it: unflushed(honest)(mmu, it))  # fmt: skip
inside("a table replaced by a huge page", "tdp_mmu.map_target_level", "does not flush", "tdp_mmu._needs_flush",
       lambda _: lambda *_: False)  # fmt: skip


@without("entries that need no change", "tdp_log.clear_dirty_pt_masked", "leaves the bit of such an entry in the mask")
def _(honest: Any) -> Any:
    def masked(mmu: Any, root: Any, gfn: int, mask: int, *, wrprot: bool) -> None:
        bit = tdp_log.log_bit(mmu, root, wrprot=wrprot)
        with mmu.rcu.read():
            for it in for_each_tdp_pte(root, gfn, gfn + 64):
                if it.is_leaf and it.level == 1 and mask >> (it.gfn - gfn) & 1 and it.old_spte & bit:
                    changed_spte.clear_spte_bits(mmu, it, bit)

    return masked


without("yields make progress", "tdp_iter.cond_resched", "forgets what is to be flushed",
        lambda honest: lambda mmu, it, *, flush: honest(mmu, it, flush=False))  # fmt: skip


@without("yields make progress", "tdp_iter.cond_resched", "yields twice at one place")
def _(honest: Any) -> Any:
    def resched(mmu: Any, it: Any, *, flush: bool) -> bool:
        it.yielded_gfn = -1
        return honest(mmu, it, flush=flush)

    return resched


@without("yields make progress", "tdp_iter.TdpIter.restart", "goes on with the entry after the one it yielded at")
def _(honest: Any) -> Any:
    def restart(it: Any) -> None:
        it.next_last_level_gfn += getattr(it, "yielded", False)
        honest(it)

    return restart
