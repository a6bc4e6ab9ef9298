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
    back at 4K for ever.
    """
    done, flush = 0, False
    with mmu.lock.write(), mmu.rcu.read():
        to_zap = tables_to_zap(mmu.stats.nx_lpage_splits, ratio)
        for root, table in mmu.nx:
            if done == to_zap:
                break
            slot = mmu.vm.gfn_to_slot(root.as_id, root.gfn_of(Sptep(table, 0)))
            if mmu.vintage.nx_skips_logged and slot is not None and slot.logging:
                untrack_nx(mmu, root, table)
            else:
                flush = zap_table(mmu, root, table) or flush
            done += 1
            assert (root, table) not in mmu.nx, f"table {table:#x} still tracked after recovery"
        if flush:
            mmu.vm.flush_remote_tlbs()
    return done
