"""A guest access the hardware refused: what kind, the fast repair without mmu_lock, and the slow path's steps.

Source: Linux 6.13, arch/x86/kvm/mmu/mmu.c (kvm_mmu_page_fault, fast_page_fault, kvm_mmu_faultin_pfn,
kvm_tdp_mmu_page_fault). The steps are numbered as they must come.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, NamedTuple

from migsim.kvm.changed_spte import assert_protected
from migsim.kvm.host_mm import Gup, HostPage
from migsim.kvm.levels import PageFault, hugepage_adjust
from migsim.kvm.make_spte import restore_acc_track
from migsim.kvm.mmio import check_mmio_spte, mmio_gfn
from migsim.kvm.mmu_state import MmuState, VcpuSeam
from migsim.kvm.page_state import mapped_page
from migsim.kvm.paging import Sptep
from migsim.kvm.roots import Root
from migsim.kvm.spte import ACC_ALL, PG_LEVEL_4K
from migsim.kvm.tdp_mmu import RetPf

FAST_PF_TRIES: Final = 4
EHWPOISON: Final = 133  # Linux asm-generic/errno.h; Python's errno has it only since 3.14
PFERR_PRESENT: Final = 1
PFERR_WRITE: Final = 2
PFERR_RSVD: Final = 8
PFERR_FETCH: Final = 16
_STAT_OF: Final = {
    RetPf.FIXED: "pf_fixed", RetPf.EMULATE: "pf_emulate", RetPf.WRITE_PROTECTED: "pf_emulate",
    RetPf.SPURIOUS: "pf_spurious",
}  # fmt: skip

MapHandler = Callable[[MmuState, Root, PageFault], RetPf]


def error_code(fault: PageFault) -> int:
    """The PFERR_* bits of a fault."""
    flags = ((fault.present, PFERR_PRESENT), (fault.write, PFERR_WRITE), (fault.rsvd, PFERR_RSVD))
    return sum(bit for on, bit in flags if on) | (PFERR_FETCH if fault.exec else 0)


def count_result(mmu: MmuState, vcpu: VcpuSeam, result: RetPf, *, prefetch: bool = False) -> None:
    """What a fault came to. KVM_PRE_FAULT_MEMORY counts nothing (Linux 6.11)."""
    if result in _STAT_OF and not prefetch:
        mmu.stats.count_vcpu(vcpu.id, _STAT_OF[result])


def classify(mmu: MmuState, root: Root, fault: PageFault) -> None:
    """Fill in what the hardware tells with a fault: was a translation present, was a reserved bit set."""
    spte, level = root.lookup(fault.gfn)
    fault.rsvd = mmu.fmt.is_mmio(spte)
    # EPT reports "present" if any of R, W, X is set, which an access-tracked SPTE has lost; NPT goes by P.
    fault.present = mmu.fmt.is_present(spte) and mmu.fmt.is_leaf(spte, level) and bool(spte & 7)


def write_protected(mmu: MmuState) -> RetPf:
    """What a store to a tracked gfn comes to: a result of its own since Linux 6.12."""
    return RetPf.WRITE_PROTECTED if mmu.vintage.write_protected else RetPf.EMULATE


def handle_mmio_page_fault(mmu: MmuState, root: Root, fault: PageFault) -> RetPf:
    """Step 0, a reserved-bit fault: emulate if the vCPU knows the page, or the MMIO SPTE is of this generation.

    INVALID: handle it in full. RETRY: the entry has gone meanwhile.
    """
    vm = mmu.vm
    if fault.vcpu.mmio.match_gpa(fault.gpa, vm.memslots(0).generation):
        return RetPf.EMULATE
    spte, _ = root.lookup(fault.gfn)
    if not mmu.fmt.is_mmio(spte):
        return RetPf.RETRY
    if not check_mmio_spte(vm, mmu.fmt, spte, vm.memslots(root.as_id)):
        return RetPf.INVALID
    gfn, access = mmio_gfn(mmu.fmt, spte), spte & mmu.fmt.mmio_access
    vm.trace("handle_mmio_page_fault", addr=0, gfn=gfn, access=access)  # a direct root has no guest address
    fault.vcpu.mmio.cache(0, gfn, access, vm.memslots(0).generation)
    return RetPf.EMULATE


# -- fast page fault -----------------------------------------------------------------------------------------------


class FastTry(NamedTuple):
    """One round of the fast path: the result (None: lost the race, look again), where, and what was there."""

    result: RetPf | None
    at: Sptep
    old_spte: int


def fast_page_fault(mmu: MmuState, root: Root, fault: PageFault) -> RetPf:
    """Give W (or R and X of an access-tracked SPTE) back without mmu_lock; INVALID: not a case for this path.

    FIXED and SPURIOUS count as pf_fast; the tracepoint shows whichever it came to.
    """
    eligible = fault.write if fault.present else not mmu.ad_enabled
    if fault.rsvd or not eligible or not mmu.vintage.fast_page_fault:
        return RetPf.INVALID
    with mmu.rcu.read():
        for _ in range(FAST_PF_TRIES + 1):
            step = _fast_try(mmu, root, fault)
            if step.result is not None:
                break
        result = RetPf.INVALID if step.result is None else step.result
        mmu.vm.trace(
            "fast_page_fault",
            vcpu_id=fault.vcpu.id, cr2_or_gpa=fault.gpa, error_code=error_code(fault), sptep=step.at.table_pfn,
            old_spte=step.old_spte, new_spte=root.read(step.at), spurious=result == RetPf.SPURIOUS,
            fixed=result == RetPf.FIXED,
        )  # fmt: skip
    if result != RetPf.INVALID:
        mmu.stats.count_vcpu(fault.vcpu.id, "pf_fast")
    return result


def _fast_try(mmu: MmuState, root: Root, fault: PageFault) -> FastTry:
    """One round. A FROZEN entry is not present: not a case for this path."""
    fmt = mmu.fmt
    *_, (at, old, level) = root.walk(fault.gfn)
    if not fmt.is_present(old) or not fmt.is_leaf(old, level):
        return FastTry(RetPf.INVALID, at, old)
    if fmt.allows(old, write=fault.write, exec=fault.exec):
        return FastTry(RetPf.SPURIOUS, at, old)
    new = old if mmu.ad_enabled else restore_acc_track(fmt, old)
    if fault.write and fmt.is_mmu_writable(old):
        new |= fmt.writable
        # A huge page would become writable as a whole although one bit is logged: the slow path splits it.
        if level > PG_LEVEL_4K and fault.slot is not None and fault.slot.logging:
            return FastTry(RetPf.INVALID, at, old)
    if new == old or not fmt.allows(new, write=fault.write, exec=fault.exec):
        return FastTry(RetPf.INVALID, at, old)
    assert_protected(mmu, fault.gfn, lockless=True)
    if not root.cmpxchg(at, old, new):
        return FastTry(None, at, old)
    if fault.slot is not None and fmt.is_writable(new) and not fmt.is_writable(old):
        mmu.vm.mark_page_dirty_in_slot(fault.slot, fault.gfn, fault.vcpu)
    return FastTry(RetPf.FIXED, at, old)


# -- slow path -----------------------------------------------------------------------------------------------------


def faultin_pfn(mmu: MmuState, fault: PageFault, *, gva: int = 0, access: int = ACC_ALL) -> RetPf:
    """Resolve the frame; nothing is locked. The sequence is read first, so that a notifier from here on is noticed.

    `gva`, `access`: the guest's address and its rights, for the vCPU's MMIO cache; 0 where there is no such address.
    Raises OSError: EFAULT for an address user space has not mapped, EHWPOISON (the SIGBUS) for a poisoned page, EAGAIN
    for a prefetch while the slot changes.
    """
    fault.invalidate_seq = mmu.invalidate.seq
    slot = fault.slot
    if slot is None:
        fault.vcpu.mmio.cache(gva, fault.gfn, access & mmu.fmt.mmio_access, mmu.vm.memslots(0).generation)
        uncached = not mmu.mmio_caching or fault.gfn > mmu.vm.config.max_gfn
        return RetPf.EMULATE if uncached else RetPf.CONTINUE
    if slot.invalid and fault.prefetch:
        raise OSError(errno.EAGAIN, f"gfn {fault.gfn:#x}: {slot!r} is being deleted or moved")
    if slot.invalid or mmu.invalidate.covers(fault.gfn):
        return RetPf.RETRY
    if slot.readonly and fault.write:
        return RetPf.EMULATE
    mmu.vm.meter.count("get_user_page")
    page = mmu.vm.host.get_user_page(slot.hva(fault.gfn))
    if not isinstance(page, HostPage):
        how = EHWPOISON if page is Gup.POISONED else errno.EFAULT
        raise OSError(how, f"gfn {fault.gfn:#x}: host page at {slot.hva(fault.gfn):#x} is {page.value}")
    if fault.write and not page.writable:
        raise OSError(errno.EFAULT, f"gfn {fault.gfn:#x}: store to a host page that is read-only")
    fault.pfn, fault.host_writable = page.pfn, page.writable and not slot.readonly
    # a second look, so that a fault that will have to start over does not wait for the lock first
    return RetPf.RETRY if mmu.invalidate.retry(fault.invalidate_seq, fault.gfn) else RetPf.CONTINUE


def is_stale(mmu: MmuState, root: Root, fault: PageFault) -> bool:
    """Did the root die, or a notifier run, since the frame was resolved? To be asked with mmu_lock held."""
    if root.invalid:
        return True
    return fault.slot is not None and mmu.invalidate.retry(fault.invalidate_seq, fault.gfn)


def direct_page_fault(mmu: MmuState, root: Root, fault: PageFault, map_handler: MapHandler) -> RetPf:
    """The fault of a direct MMU, step by step."""
    fault.slot = mmu.vm.gfn_to_slot(root.as_id, fault.gfn)
    fault.nx_workaround = mmu.nx_huge_pages
    # 1 a store to a write-tracked gfn belongs to whoever shadows it
    if fault.write and fault.present and fault.slot is not None and mmu.is_write_tracked(fault.slot, fault.gfn):
        return write_protected(mmu)
    # 2 repair without the lock
    fast = fast_page_fault(mmu, root, fault)
    if fast != RetPf.INVALID:
        return fast
    # 3, 4 memory for tables, then the frame: both may sleep, so both come before the lock
    resolved = faultin_pfn(mmu, fault)
    if resolved != RetPf.CONTINUE:
        return resolved
    # 5 - 8 lock, look again, map, let the page go
    page, result = fault.pfn, RetPf.RETRY
    with mmu.lock.read():
        if not is_stale(mmu, root, fault):
            hugepage_adjust(mmu, fault)
            result = map_handler(mmu, root, fault)
        if fault.slot is not None:
            mapped_page(mmu, page, writable=fault.host_writable, unused=result == RetPf.RETRY)
    return result
