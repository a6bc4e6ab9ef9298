"""KVM_CHECK_EXTENSION and KVM_ENABLE_CAP of a VM: which capabilities exist, what they answer, how they are refused.

Facts: Linux 6.18 virt/kvm/kvm_main.c kvm_vm_ioctl_enable_cap_generic, arch/x86/kvm/x86.c; the values were read from a
real /dev/kvm where they do not follow from the VM's configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import E2BIG, EINVAL, EPERM
from typing import TYPE_CHECKING, Final

from migsim.kvm import uapi
from migsim.kvm.dirty_ring import KVM_DIRTY_RING_MAX_ENTRIES, KVM_DIRTY_RING_RSVD_ENTRIES
from migsim.kvm.memslot import KVM_USER_MEM_SLOTS
from migsim.kvm.pml import PML_LOG_NR_ENTRIES
from migsim.kvm.uapi import DIRTY_GFN, kvm_error
from migsim.units import PAGE_SIZE

if TYPE_CHECKING:
    from migsim.kvm.vm import Vm

KVM_MAX_VCPUS: Final = 1024
KVM_MAX_VCPU_IDS: Final = 4 * KVM_MAX_VCPUS
_U32: Final = (1 << 32) - 1

_FIXED: Final = {
    uapi.KVM_CAP_USER_MEMORY: 1,
    uapi.KVM_CAP_NR_VCPUS: KVM_MAX_VCPUS,  # in the kernel: online CPUs, at most this
    uapi.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    uapi.KVM_CAP_SYNC_MMU: 1,
    uapi.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    uapi.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    uapi.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPUS,
    uapi.KVM_CAP_READONLY_MEM: 1,
    uapi.KVM_CAP_ENABLE_CAP_VM: 1,
    uapi.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPU_IDS,
    uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: uapi.KVM_DIRTY_LOG_MANUAL_CAPS,
    uapi.KVM_CAP_BINARY_STATS_FD: 1,
    uapi.KVM_CAP_DISABLE_QUIRKS2: uapi.KVM_X86_QUIRK_SLOT_ZAP_ALL,
    uapi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: 1,
}
_RINGS: Final = (uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)


def reserved_entries(pml: bool) -> int:
    """Entries of a ring kept free above the soft limit: one exit can drain a whole PML buffer."""
    return KVM_DIRTY_RING_RSVD_ENTRIES + (PML_LOG_NR_ENTRIES if pml else 0)


class Caps:
    """The capabilities of one VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def check_extension(self, cap: int) -> int:
        """The capability's value, 0 if there is no such one."""
        if cap == uapi.KVM_CAP_MULTI_ADDRESS_SPACE:
            return self._vm.config.nr_as_ids if self._vm.config.smm else 0
        if cap in _RINGS:
            return KVM_DIRTY_RING_MAX_ENTRIES * DIRTY_GFN.itemsize if self._vm.config.dirty_ring else 0
        if cap == uapi.KVM_CAP_PRE_FAULT_MEMORY:
            return int(self._vm.config.tdp)
        return _FIXED.get(cap, 0)

    def enable(self, cap: int, flags: int, args: Sequence[int]) -> int:
        """KVM_ENABLE_CAP; returns 0. Raises OSError: EINVAL, E2BIG for a ring past its maximum, EPERM."""
        arg = args[0] if args else 0
        if cap == uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
            self.enable_manual_protect(flags, arg)
        elif cap in _RINGS and self.check_extension(cap):
            self.enable_dirty_ring(arg & _U32)  # the flags are not looked at; the size is a u32
        elif cap == uapi.KVM_CAP_DISABLE_QUIRKS2 and not flags:
            self.disable_quirks(arg)
        elif cap == uapi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES and not flags:
            self.disable_nx_huge_pages(arg)
        else:  # also RING_WITH_BITMAP, which x86 does not have, and 166, the withdrawn predecessor of 168
            raise kvm_error(EINVAL, f"capability {cap} cannot be enabled")
        return 0

    def enable_manual_protect(self, flags: int, options: int) -> None:
        """0, 1 (ENABLE) or 3 (with INITIALLY_SET), at any time; acts at once on slots that log already."""
        allowed = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        if options & uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
            allowed = uapi.KVM_DIRTY_LOG_MANUAL_CAPS
        if flags or options & ~allowed:
            raise kvm_error(EINVAL, f"manual dirty log protect: flags {flags:#x}, options {options:#x}")
        self._vm.manual_dirty_log_protect = options

    def enable_dirty_ring(self, size_bytes: int) -> None:
        """Rings of `size_bytes` for every vCPU to come; once, and before the first vCPU."""
        if not size_bytes or size_bytes & (size_bytes - 1):
            raise kvm_error(EINVAL, f"ring size {size_bytes} is no power of two")
        if size_bytes < reserved_entries(self._vm.pml_enabled) * DIRTY_GFN.itemsize or size_bytes < PAGE_SIZE:
            raise kvm_error(EINVAL, f"ring size {size_bytes} leaves no room above the reserved entries")
        if size_bytes > KVM_DIRTY_RING_MAX_ENTRIES * DIRTY_GFN.itemsize:
            raise kvm_error(E2BIG, f"ring size {size_bytes}")
        if self._vm.dirty_ring_size:
            raise kvm_error(EINVAL, "the dirty ring is enabled already")
        if self._vm.vcpus:
            raise kvm_error(EINVAL, "the dirty ring must be enabled before the first vCPU")
        self._vm.dirty_ring_size = size_bytes

    def disable_quirks(self, quirks: int) -> None:
        """Quirks can be switched off, never on again."""
        if quirks & ~uapi.KVM_X86_QUIRK_SLOT_ZAP_ALL:
            raise kvm_error(EINVAL, f"quirks {quirks:#x}")
        if quirks:
            self._vm.quirk_slot_zap_all = False

    def disable_nx_huge_pages(self, arg: int) -> None:
        """Opt this VM out of the NX huge page workaround, before its first vCPU.

        A guest could then crash the host, so the process must be allowed to do as much (CAP_SYS_BOOT): asked first.
        """
        if not self._vm.config.cap_sys_boot:
            raise kvm_error(EPERM, "NX huge pages may be disabled only by who has CAP_SYS_BOOT")
        if arg or self._vm.vcpus:
            raise kvm_error(EINVAL, "NX huge pages can be disabled only before the first vCPU, without arguments")
        self._vm.mmu.state.nx_huge_pages = False
