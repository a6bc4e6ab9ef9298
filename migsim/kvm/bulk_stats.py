"""KVM's statistics and meter for what the fused kernels did to a memslot in bulk: faults, locks, flushes, walks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.bulk import FLUSHES, HOLDS, MAPPED, PF_FAST, PF_FIXED, PML_LOGGED, REARMED, WALKS
from migsim.kvm.spte import PG_LEVEL_4K

if TYPE_CHECKING:
    from migsim.kvm.mmu_state import MmuState
    from migsim.kvm.vm import Vm

__all__ = ["count", "flush"]


def flush(vm: Vm, times: int) -> None:
    """`times` flushes of all TLBs: one is enough to carry out, all are counted."""
    if not times:
        return
    vm.flush_remote_tlbs()
    stats, vcpus = vm.stats, len(vm.vcpus)
    stats.remote_tlb_flush_requests += times - 1
    stats.remote_tlb_flush += (times - 1) * bool(vcpus)
    stats.tlb_flush += (times - 1) * vcpus
    vm.meter.count("remote_tlb_flush", times - 1)


def count(vm: Vm, mmu: MmuState, counts: NDArray[np.int64]) -> None:
    """Add what the kernels counted to KVM's statistics."""
    sums = counts.tolist()
    if not any(sums):
        return
    meter, vintage, slow = vm.meter, mmu.vintage, sums[PF_FIXED]
    if slow or sums[PF_FAST]:
        _count_faults(vm, sums[PF_FAST], slow, sums[MAPPED])
    meter.count("pml_logged", sums[PML_LOGGED])
    if slow:
        meter.count("get_user_page", slow)
        meter.count("mmu_lock_read" if vintage.shared_lock else "mmu_lock_write", slow)
    meter.count("mmu_lock_write", sums[HOLDS])
    flush(vm, sums[FLUSHES])
    if not vintage.tdp:
        meter.count("rmap_add", slow)
        meter.count("rmap_walk", sums[REARMED] + sums[WALKS])


def _count_faults(vm: Vm, fast: int, slow: int, mapped: int) -> None:
    stats = vm.stats
    stats.pf_taken += fast + slow
    stats.pf_fast += fast
    stats.pf_fixed += fast + slow
    stats.exits += fast + slow
    stats.update_page_stats(PG_LEVEL_4K, mapped)
    vm.meter.count("fast_page_fault", fast)
