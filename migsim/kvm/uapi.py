"""Numbers of linux/kvm.h that the emulated door speaks: ioctls, capabilities, flags, exit reasons, ring layout.

Source: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h, Linux 6.18. `ioctl.py` re-exports all of it.
"""

from __future__ import annotations

import os
from typing import Any, Final

import numpy as np

KVM_CREATE_VM: Final = 0xAE01
KVM_CHECK_EXTENSION: Final = 0xAE03
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_NR_MMU_PAGES: Final = 0xAE44
KVM_GET_DIRTY_LOG: Final = 0x4010AE42
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_RUN: Final = 0xAE80
KVM_SET_MSRS: Final = 0x4008AE89
KVM_ENABLE_CAP: Final = 0x4068AEA3
KVM_CLEAR_DIRTY_LOG: Final = 0xC018AEC0
KVM_RESET_DIRTY_RINGS: Final = 0xAEC7
KVM_PRE_FAULT_MEMORY: Final = 0xC040AED5
KVM_GET_STATS_FD: Final = 0xAECE

KVM_CAP_USER_MEMORY: Final = 3
KVM_CAP_NR_VCPUS: Final = 9
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_SYNC_MMU: Final = 16
KVM_CAP_DESTROY_MEMORY_REGION_WORKS: Final = 21
KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: Final = 30
KVM_CAP_MAX_VCPUS: Final = 66
KVM_CAP_READONLY_MEM: Final = 81
KVM_CAP_ENABLE_CAP_VM: Final = 98
KVM_CAP_MULTI_ADDRESS_SPACE: Final = 118
KVM_CAP_MAX_VCPU_ID: Final = 128
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: Final = 168
KVM_CAP_DIRTY_LOG_RING: Final = 192
KVM_CAP_BINARY_STATS_FD: Final = 203
KVM_CAP_DISABLE_QUIRKS2: Final = 213
KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: Final = 220
KVM_CAP_DIRTY_LOG_RING_ACQ_REL: Final = 223
KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: Final = 225
KVM_CAP_PRE_FAULT_MEMORY: Final = 236

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: Final = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET: Final = 1 << 1
KVM_DIRTY_LOG_MANUAL_CAPS: Final = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET

KVM_X86_QUIRK_SLOT_ZAP_ALL: Final = 1 << 7

KVM_DIRTY_GFN_F_DIRTY: Final = 1 << 0
KVM_DIRTY_GFN_F_RESET: Final = 1 << 1
KVM_DIRTY_LOG_PAGE_OFFSET: Final = 64
DIRTY_GFN: Final[np.dtype[Any]] = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])

KVM_EXIT_IO: Final = 2
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_DIRTY_RING_FULL: Final = 31

MSR_KVM_SYSTEM_TIME_NEW: Final = 0x4B564D01

assert DIRTY_GFN.itemsize == 16


def kvm_error(number: int, what: str) -> OSError:
    """The OSError of a refused ioctl: KVM's errno, and `what` was wrong in the text."""
    return OSError(number, f"{os.strerror(number)}: {what}")
