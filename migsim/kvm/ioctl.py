"""The door: all that user space, and so migration, may know of KVM: calls are those of `Vm` and `Vcpu`."""

from __future__ import annotations

from migsim.kvm.config import VmConfig
from migsim.kvm.exits import Exit, Mmio, Op
from migsim.kvm.memslot import KVM_MEM_MAX_NR_PAGES, KVM_USER_MEM_SLOTS
from migsim.kvm.uapi import (
    DIRTY_GFN,
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_MAX_VCPUS,
    KVM_CAP_MULTI_ADDRESS_SPACE,
    KVM_CAP_NR_MEMSLOTS,
    KVM_CAP_VM_DISABLE_NX_HUGE_PAGES,
    KVM_DIRTY_GFN_F_DIRTY,
    KVM_DIRTY_GFN_F_RESET,
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_EXIT_DIRTY_RING_FULL,
    KVM_EXIT_HLT,
    KVM_EXIT_INTR,
    KVM_EXIT_MMIO,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_X86_QUIRK_SLOT_ZAP_ALL,
    MSR_KVM_SYSTEM_TIME_NEW,
)
from migsim.kvm.vcpu import Vcpu
from migsim.kvm.vm import Vm


def enable_dirty_ring(vm: Vm, entries: int) -> None:
    """Rings of `entries` (a power of two) for each vCPU to come, by the stricter capability where there is one.

    That one asks user space for acquire and release on the flags.
    """
    ordered = vm.check_extension(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) != 0
    cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL if ordered else KVM_CAP_DIRTY_LOG_RING
    vm.enable_cap(cap, 0, (entries * DIRTY_GFN.itemsize,))


__all__ = [
    "DIRTY_GFN", "Exit", "KVM_CAP_DIRTY_LOG_RING", "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP", "KVM_CAP_DISABLE_QUIRKS2", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
    "KVM_CAP_MAX_VCPUS", "KVM_CAP_MULTI_ADDRESS_SPACE", "KVM_CAP_NR_MEMSLOTS", "KVM_CAP_VM_DISABLE_NX_HUGE_PAGES",
    "KVM_DIRTY_GFN_F_DIRTY", "KVM_DIRTY_GFN_F_RESET", "KVM_DIRTY_LOG_INITIALLY_SET",
    "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE", "KVM_EXIT_DIRTY_RING_FULL", "KVM_EXIT_HLT", "KVM_EXIT_INTR",
    "KVM_EXIT_MMIO", "KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_MAX_NR_PAGES", "KVM_MEM_READONLY", "KVM_USER_MEM_SLOTS",
    "KVM_X86_QUIRK_SLOT_ZAP_ALL", "MSR_KVM_SYSTEM_TIME_NEW", "Mmio", "Op", "Vcpu", "Vm", "VmConfig",
    "enable_dirty_ring",
]  # fmt: skip
