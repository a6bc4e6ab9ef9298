"""kvm-clock of one vCPU: an MSR names a page of the guest, and KVM writes the time there before the guest runs on.

Time stands still at zero here; what counts is that the store is KVM's own and marks the page. Facts: Linux 6.18,
arch/x86/kvm/x86.c (kvm_guest_time_update); checked against a real /dev/kvm.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING, Final

from migsim.kvm.uapi import MSR_KVM_SYSTEM_TIME_NEW, kvm_error
from migsim.units import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from migsim.kvm.vcpu import Vcpu

PVCLOCK_BYTES: Final = 32  # struct pvclock_vcpu_time_info


class PvClock:
    """The clock page, if there is one, and whether it is to be written at the next guest entry."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._gpa: int | None = None
        self._due = False
        self._version = 0

    def set_msr(self, index: int, value: int) -> None:
        """KVM_SET_MSRS of the one register there is. Nothing is written before the next KVM_RUN. OSError EINVAL."""
        if index != MSR_KVM_SYSTEM_TIME_NEW:
            raise kvm_error(EINVAL, f"MSR {index:#x}")
        self._gpa = value & ~1 if value & 1 else None
        self._due = value & 1 == 1

    def update(self) -> None:
        """Guest entry: fill in the page if that is due, and mark it."""
        gpa, due, self._due = self._gpa, self._due, False
        if not due or gpa is None or gpa % PAGE_SIZE > PAGE_SIZE - PVCLOCK_BYTES:
            return
        self._version += 2
        data = self._version.to_bytes(4, "little") + bytes(PVCLOCK_BYTES - 4)
        self._vcpu.vm.access.write_page(gpa >> PAGE_SHIFT, gpa % PAGE_SIZE, data, self._vcpu)
