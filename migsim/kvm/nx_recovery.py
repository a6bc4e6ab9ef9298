"""The NX huge-page recovery worker: tables kept small only for the workaround are zapped, oldest first (patch 20).

Source: Linux 6.13, arch/x86/kvm/mmu/mmu.c (kvm_recover_nx_huge_pages).
"""

from __future__ import annotations

from typing import Final

from migsim.kvm.changed_spte import untrack_nx
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep
from migsim.kvm.shadow_pages import ShadowPages
from migsim.kvm.zap import zap_table

RECOVERY_RATIO: Final = 60  # module parameter nx_huge_pages_recovery_ratio


def tables_to_zap(splits: int, ratio: int = RECOVERY_RATIO) -> int:
    """How many tables one period recovers: nx_lpage_splits / ratio, rounded up; 0 switches recovery off."""
    return -(-splits // ratio) if ratio else 0


def recover_nx_huge_pages(mmu: MmuState, ratio: int = RECOVERY_RATIO) -> int:
    """One period; returns how many tables left the list. Zapped ranges are mapped huge again by the next fault.

    A table of a logged slot must stay small, so it is only forgotten (Linux 6.2); before, it was zapped and faulted
    back at 4K for ever. Between two tables others may run, after a flush of what was zapped so far.
    """
    done, flush, to_zap = 0, False, tables_to_zap(len(mmu.nx), ratio)
    with mmu.lock.read() if mmu.vintage.nx_read_lock else mmu.lock.write(), mmu.rcu.read():
        while done < to_zap and len(mmu.nx):
            flush = _recover_oldest(mmu) or flush
            done += 1
            if mmu.sched.need_resched():
                flush = _yield(mmu, flush=flush)
        if flush:
            mmu.vm.flush_remote_tlbs()
    return done


def _recover_oldest(mmu: MmuState) -> bool:
    """The first table of the list leaves it, and then goes itself; True: a flush is due."""
    with mmu.tdp_mmu_pages_lock:
        root, table = next(iter(mmu.nx))
        untrack_nx(mmu, root, table)
    if _is_logged(mmu, root.as_id, root.gfn_of(Sptep(table, 0))):
        return False
    return zap_table(mmu, root, table)


def _is_logged(mmu: MmuState, as_id: int, gfn: int) -> bool:
    slot = mmu.vm.gfn_to_slot(as_id, gfn)
    return mmu.vintage.nx_skips_logged and slot is not None and slot.logging


def recover_nx_shadow_pages(mmu: MmuState, pages: ShadowPages, ratio: int = RECOVERY_RATIO) -> int:
    """The same for pages of shadowed guests: a list of their own since Linux 6.18, always under the exclusive lock."""
    done, zapped, to_zap = 0, 0, tables_to_zap(len(mmu.nx_shadow), ratio)
    if not to_zap:
        return 0
    with mmu.lock.write():
        while done < to_zap and len(mmu.nx_shadow):
            page, table = next(iter(mmu.nx_shadow))
            mmu.nx_shadow.discard(page, table)
            mmu.stats.add("nx_lpage_splits", -1)
            page.nx_disallowed = False
            if not _is_logged(mmu, page.key.as_id, page.key.gfn):
                zapped += pages.zap(page)
            done += 1
            if mmu.sched.need_resched():
                zapped = int(_yield(mmu, flush=zapped > 0))
        if zapped:
            mmu.vm.flush_remote_tlbs()
    return done


def _yield(mmu: MmuState, *, flush: bool) -> bool:
    """Let others run; nothing is left to flush afterwards."""
    if flush:
        mmu.vm.flush_remote_tlbs()
    with mmu.rcu.dropped(), mmu.lock.dropped():
        mmu.sched.resched()
    return False
