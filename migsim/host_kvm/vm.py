"""``HostVm``: a virtual machine of the real KVM with the methods of the emulated ``Vm``."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from migsim.host_kvm import abi
from migsim.host_kvm.device import open_device
from migsim.host_kvm.guest_code import Op
from migsim.host_kvm.mapping import PROT_NONE, PROT_READ, PROT_READ_WRITE, Mapping
from migsim.host_kvm.stats import read_stats
from migsim.host_kvm.vcpu import CONTROL_BYTES, HostExit, HostVcpu
from migsim.kvm import uapi
from migsim.units import PAGE_SIZE

CONTROL_SLOT = 32700  # an id that no caller should use; the slot appears with the first vCPU
CONTROL_GPA = 0xFF00_0000
VCPUS_MAX = 32


class _Held:
    """Everything a VM owns, in the order in which it must go.  Apart from HostVm so that a finalizer can hold it."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.vcpus: list[HostVcpu] = []
        self.mappings: list[Mapping] = []

    def release(self) -> None:
        """vCPUs, then VM and device, then the memory they used."""
        while self.vcpus:
            self.vcpus.pop().close()
        while self.fds:
            os.close(self.fds.pop())
        while self.mappings:
            self.mappings.pop().close()


class HostVm:
    """Drives ``/dev/kvm``.  Raises HostUnavailable where there is none, OSError with KVM's errno otherwise.

    ``CONTROL_SLOT`` and the guest addresses from ``CONTROL_GPA`` to 4 GiB belong to the guest's code; the rest is the
    caller's.  A context manager; what is not closed goes with the object or the process: nothing is left behind.
    """

    def __init__(self, device: str = abi.DEVICE) -> None:
        self._held = _Held()
        self._finalizer = weakref.finalize(self, self._held.release)
        try:
            self._kvm_fd = open_device(device)
            self._held.fds.append(self._kvm_fd)
            self._fd = fcntl.ioctl(self._kvm_fd, uapi.KVM_CREATE_VM, 0)
            self._held.fds.append(self._fd)
            self._run_bytes = fcntl.ioctl(self._kvm_fd, abi.KVM_GET_VCPU_MMAP_SIZE, 0)
            self._bad_pointer = self._map(PAGE_SIZE, PROT_NONE)
        except BaseException:
            self.close()
            raise
        self._control: Mapping | None = None
        self._ring_bytes = 0
        self._slot_pages: dict[int, int] = {}

    def _map(self, size: int, prot: int | None = None) -> Mapping:
        mapping = Mapping(size) if prot is None else Mapping(size, prot=prot)
        self._held.mappings.append(mapping)
        return mapping

    # -- system and VM

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where the kernel has no such capability."""
        return fcntl.ioctl(self._fd, uapi.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, flags: int = 0, args: Sequence[int] = (0, 0, 0, 0)) -> int:
        """KVM_ENABLE_CAP on the VM."""
        padded = (*args, 0, 0, 0, 0)[:4]
        packed = bytearray(abi.ENABLE_CAP.pack(cap, flags, *padded))
        result: int = fcntl.ioctl(self._fd, uapi.KVM_ENABLE_CAP, packed, True)
        if cap in (uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL):
            self._ring_bytes = padded[0]
        return result

    def create_vcpu(self, id: int) -> HostVcpu:
        """KVM_CREATE_VCPU.  EEXIST for an id in use; ValueError past ``VCPUS_MAX`` (the control slot's room)."""
        if id >= VCPUS_MAX:
            raise ValueError(f"vCPU id {id}: the control slot has room for {VCPUS_MAX}")
        control = self._control_slot()
        fd = fcntl.ioctl(self._fd, uapi.KVM_CREATE_VCPU, id)
        vcpu = HostVcpu(fd, id, self._run_bytes, control, CONTROL_GPA, self._ring_bytes)
        self._held.vcpus.append(vcpu)
        return vcpu

    def _control_slot(self) -> Mapping:
        if self._control is None:
            control = self._map(VCPUS_MAX * CONTROL_BYTES)
            region = abi.MEMORY_REGION.pack(CONTROL_SLOT, 0, CONTROL_GPA, control.size, control.address)
            fcntl.ioctl(self._fd, uapi.KVM_SET_USER_MEMORY_REGION, region)
            self._control = control
        return self._control

    def run_together(self, work: MappingType[HostVcpu, Sequence[Op]]) -> dict[HostVcpu, HostExit]:
        """Each vCPU runs its operations in a thread of its own; KVM_RUN lets go of the interpreter lock."""
        with ThreadPoolExecutor(max_workers=len(work)) as pool:
            running = {vcpu: pool.submit(vcpu.run, ops) for vcpu, ops in work.items()}
            return {vcpu: future.result() for vcpu, future in running.items()}

    # -- slots and dirty logging

    def set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION; ``slot`` is as_id << 16 | id, sizes and addresses in bytes."""
        region = abi.MEMORY_REGION.pack(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        fcntl.ioctl(self._fd, uapi.KVM_SET_USER_MEMORY_REGION, region)
        self._slot_pages[slot] = memory_size // PAGE_SIZE

    def get_dirty_log(self, slot: int, dirty_bitmap: NDArray[np.uint64] | None) -> None:
        """KVM_GET_DIRTY_LOG into ``dirty_bitmap`` (bit i = page i of the slot).

        None or a read-only array stands for a bad pointer: EFAULT.  ValueError if the array is shorter than the slot.
        """
        if dirty_bitmap is None or not dirty_bitmap.flags.writeable:
            address = self._bad_pointer.address
        else:
            _require_words(dirty_bitmap, self._slot_pages.get(slot, 0))
            address = dirty_bitmap.ctypes.data
        fcntl.ioctl(self._fd, uapi.KVM_GET_DIRTY_LOG, abi.DIRTY_LOG.pack(slot, address))

    def clear_dirty_log(
        self, slot: int, first_page: int, num_pages: int, dirty_bitmap: NDArray[np.uint64] | None
    ) -> None:
        """KVM_CLEAR_DIRTY_LOG of the pages set in ``dirty_bitmap`` (bit 0 = ``first_page``).  None: a bad pointer."""
        address = self._bad_pointer.address
        if dirty_bitmap is not None:
            if num_pages <= self._slot_pages.get(slot, 0):  # beyond it KVM refuses before it reads
                _require_words(dirty_bitmap, num_pages)
            address = dirty_bitmap.ctypes.data
        packed = abi.CLEAR_DIRTY_LOG.pack(slot, num_pages, first_page, address)
        fcntl.ioctl(self._fd, uapi.KVM_CLEAR_DIRTY_LOG, bytearray(packed), True)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: entries taken back, over all vCPUs."""
        return fcntl.ioctl(self._fd, uapi.KVM_RESET_DIRTY_RINGS, 0)

    def stats_read(self) -> dict[str, int]:
        """The VM's statistics under KVM's names (values that are one number)."""
        return read_stats(self._fd)

    # -- the VMM's own memory

    def alloc_memory(self, size: int) -> int:
        """The address of ``size`` bytes of fresh zeroed anonymous memory, freed with the VM."""
        return self._map(size).address

    def host_write(self, hva: int, data: bytes) -> None:
        """A store by the VMM itself: KVM does not log it."""
        mapping = self._mapping_of(hva, len(data))
        mapping.write(hva - mapping.address, data)

    def host_read(self, hva: int, n_bytes: int) -> bytes:
        """A load by the VMM itself."""
        mapping = self._mapping_of(hva, n_bytes)
        return mapping.read(hva - mapping.address, n_bytes)

    def host_discard(self, hva: int, n_bytes: int) -> None:
        """madvise(MADV_DONTNEED) over whole pages: zero afterwards, unmapped by KVM's MMU notifier."""
        mapping = self._mapping_of(hva, n_bytes)
        mapping.discard(hva - mapping.address, n_bytes)

    def host_protect(self, hva: int, n_bytes: int, *, writable: bool) -> None:
        """mprotect over whole pages, read-only or back to read-write."""
        mapping = self._mapping_of(hva, n_bytes)
        mapping.protect(PROT_READ_WRITE if writable else PROT_READ, hva - mapping.address, n_bytes)

    def _mapping_of(self, hva: int, n_bytes: int) -> Mapping:
        for mapping in self._held.mappings:
            if mapping.address <= hva and hva + n_bytes <= mapping.address + mapping.size:
                return mapping
        raise ValueError(f"hva {hva:#x}+{n_bytes}: not memory of alloc_memory")

    # -- the end

    def close(self) -> None:
        """Give everything back.  Idempotent."""
        self._finalizer()

    def __enter__(self) -> HostVm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _require_words(bitmap: NDArray[np.uint64], n_pages: int) -> None:
    """KVM writes ALIGN(n_pages, 64) / 8 bytes through a bare pointer: never past the array's end."""
    words = (n_pages + 63) // 64
    if bitmap.dtype != np.uint64 or not bitmap.flags.c_contiguous or bitmap.size < words:
        raise ValueError(f"bitmap for {n_pages} pages: a contiguous uint64 array of at least {words} words is needed")

