"""Numbers and layouts of ``linux/kvm.h`` that only the real device needs; the shared ones are in ``kvm.uapi``.

Source: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h, Linux 6.18.
"""

from __future__ import annotations

import struct

from migsim.kvm import uapi

DEVICE = "/dev/kvm"
API_VERSION = 12

# ioctl numbers, _IO/_IOR/_IOW/_IOWR('\xAE', nr, size), size in bits 16-29.
KVM_GET_API_VERSION = 0xAE00
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84

RING_MMAP_OFFSET = uapi.KVM_DIRTY_LOG_PAGE_OFFSET * 4096  # bytes into the vCPU's fd

# struct kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size, userspace_addr
MEMORY_REGION = struct.Struct("<IIQQQ")
# struct kvm_dirty_log: slot, padding, dirty_bitmap
DIRTY_LOG = struct.Struct("<I4xQ")
# struct kvm_clear_dirty_log: slot, num_pages, first_page, dirty_bitmap
CLEAR_DIRTY_LOG = struct.Struct("<IIQQ")
# struct kvm_enable_cap: cap, flags, args[4], pad[64]
ENABLE_CAP = struct.Struct("<II4Q64x")
# struct kvm_regs: rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags
REGS = struct.Struct("<18Q")
REG_RIP = 16
# struct kvm_msrs with one entry: nmsrs, pad, index, reserved, data
ONE_MSR = struct.Struct("<I4xI4xQ")
# struct kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
SEGMENT = struct.Struct("<QIH10B")
SREGS_SIZE = 312
SREGS_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
SREGS_CR0_OFFSET = len(SREGS_SEGMENTS) * SEGMENT.size + 2 * 16  # past gdt and idt, 16 bytes each
CR0_PE = 1
RFLAGS_FIXED = 2

# struct kvm_run: fields used here.
RUN_IMMEDIATE_EXIT = 1  # byte offset
RUN_EXIT_REASON = struct.Struct("<I")  # at byte 8
RUN_EXIT_REASON_OFFSET = 8
RUN_MMIO = struct.Struct("<Q8sIB")  # at byte 32: phys_addr, data, len, is_write
RUN_MMIO_OFFSET = 32

# struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset
STATS_HEADER = struct.Struct("<6I")
# struct kvm_stats_desc before its name: flags, exponent, size, offset, bucket_size
STATS_DESC = struct.Struct("<IhHII")

assert (ENABLE_CAP.size, REGS.size, SEGMENT.size, DIRTY_LOG.size, CLEAR_DIRTY_LOG.size) == (104, 144, 24, 16, 24)
for _number, _layout in (
    (uapi.KVM_SET_USER_MEMORY_REGION, MEMORY_REGION),
    (uapi.KVM_GET_DIRTY_LOG, DIRTY_LOG),
    (uapi.KVM_CLEAR_DIRTY_LOG, CLEAR_DIRTY_LOG),
    (uapi.KVM_ENABLE_CAP, ENABLE_CAP),
    (KVM_SET_REGS, REGS),
):
    assert (_number >> 16) & 0x3FFF == _layout.size
