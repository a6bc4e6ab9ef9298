"""The NX huge-page recovery worker: tables kept small only for the workaround are zapped, oldest first (patch 20).

Source: Linux 6.13, arch/x86/kvm/mmu/mmu.c (kvm_recover_nx_huge_pages).
"""

from __future__ import annotations

from typing import Final

from migsim.kvm.changed_spte import untrack_nx
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep
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
    done, flush = 0, False
    with mmu.lock.read() if mmu.vintage.nx_read_lock else mmu.lock.write(), mmu.rcu.read():
        to_zap = tables_to_zap(mmu.stats.nx_lpage_splits, ratio)
        while done < to_zap and len(mmu.nx):
            flush = _recover_oldest(mmu) or flush
            done += 1
            if mmu.sched.need_resched():
                flush = _yield(mmu, flush=flush)
        if flush:
            mmu.vm.flush_remote_tlbs()
    return done


def _recover_oldest(mmu: MmuState) -> bool:
    """The first table of the list leaves it; True: a flush is due."""
    root, table = next(iter(mmu.nx))
    slot = mmu.vm.gfn_to_slot(root.as_id, root.gfn_of(Sptep(table, 0)))
    flush = False
    if mmu.vintage.nx_skips_logged and slot is not None and slot.logging:
        untrack_nx(mmu, root, table)
    else:
        flush = zap_table(mmu, root, table)
    assert (root, table) not in mmu.nx, f"table {table:#x} still tracked after recovery"
    return flush


def _yield(mmu: MmuState, *, flush: bool) -> bool:
    """Let others run; nothing is left to flush afterwards."""
    if flush:
        mmu.vm.flush_remote_tlbs()
    with mmu.rcu.dropped(), mmu.lock.dropped():
        mmu.sched.resched()
    return False
