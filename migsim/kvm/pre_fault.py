"""KVM_PRE_FAULT_MEMORY: map a range before the guest touches it, old, as faults nobody took.

Source: Linux 6.18, virt/kvm/kvm_main.c (kvm_vcpu_pre_fault_memory), arch/x86/kvm/mmu/mmu.c
(kvm_arch_vcpu_pre_fault_memory, kvm_tdp_page_prefault).
"""

from __future__ import annotations

from errno import EINTR, EINVAL, ENOENT, EOPNOTSUPP
from typing import TYPE_CHECKING, NamedTuple

from migsim.kvm.exits import GuestLivelock
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.uapi import kvm_error
from migsim.units import PAGE_SHIFT, PAGE_SIZE, pages_per_level

if TYPE_CHECKING:
    from migsim.kvm.vcpu import Vcpu

RETRIES_MAX = 100  # of one page; KVM itself goes on until a signal comes


class PreFaultRange(NamedTuple):
    """struct kvm_pre_fault_memory: what is still to do when the call comes back, in bytes."""

    gpa: int
    size: int


def pre_fault_memory(vcpu: Vcpu, gpa: int, size: int, flags: int = 0) -> PreFaultRange:
    """Map [gpa, gpa + size) page by page, huge pages at once; returns the rest, empty if all is mapped.

    Raises OSError only where not even the first page could be: EINVAL flags, alignment or a range that is empty or
    wraps; EINTR; EOPNOTSUPP without TDP or for an L2 on shadow pages; ENOENT no memory there; EAGAIN the slot changes;
    EFAULT. After the first page an error ends the call as a success with the rest.
    """
    if flags or gpa % PAGE_SIZE or size % PAGE_SIZE or not gpa < gpa + size < 1 << 64:
        raise kvm_error(EINVAL, f"pre-fault of {gpa:#x}+{size:#x}, flags {flags:#x}")
    rest = PreFaultRange(gpa, size)
    with vcpu.vm.running(vcpu):
        while rest.size:
            try:
                done = _one(vcpu, rest)
            except OSError:
                if rest.size == size:
                    raise
                break
            rest = PreFaultRange(rest.gpa + done, rest.size - done)
    return rest


def _one(vcpu: Vcpu, rest: PreFaultRange) -> int:
    """Map the page at the beginning of `rest`; returns how many bytes of `rest` it covers."""
    if vcpu.vm.signal_pending():
        raise kvm_error(EINTR, "a signal is pending")
    if not vcpu.vm.config.tdp or vcpu.l2 is not None:
        raise kvm_error(EOPNOTSUPP, "only an MMU that is indexed by guest-physical addresses can be pre-faulted")
    for _ in range(RETRIES_MAX):
        if vcpu.vm.signal_pending():
            raise kvm_error(EINTR, "a signal is pending")
        result = vcpu.vm.mmu.page_fault(vcpu, rest.gpa, write=False, prefetch=True)
        if result == RetPf.EMULATE:
            raise kvm_error(ENOENT, f"gpa {rest.gpa:#x} is no memory")
        if result != RetPf.RETRY:
            _, level = vcpu.vm.mmu.walk(vcpu.load_root(), rest.gpa >> PAGE_SHIFT)
            span = pages_per_level(level) << PAGE_SHIFT
            return min(rest.size, (rest.gpa & -span) + span - rest.gpa)
    raise GuestLivelock(f"pre-fault of gpa {rest.gpa:#x} was to be tried again {RETRIES_MAX} times")
