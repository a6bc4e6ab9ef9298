"""The VMM's own address space: memory it allocates, its own loads and stores, and what it does to the mapping.

Its stores are not logged by KVM: who migrates must track them (QEMU's own bitmaps). Changes of the mapping reach KVM
through MMU notifiers: the translations go before the page does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from migsim.kvm.host_mm import HostPage
from migsim.kvm.memory import pages_spanned
from migsim.units import GIB, MIB, PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from migsim.kvm.vm import Vm

_FIRST_HVA: Final = 1 << 44  # anywhere in user space; frames follow from addresses modulo 32 TiB (host_mm.py)
_GAP: Final = PAGE_SIZE  # nothing is mapped between two allocations


class UserMemory:
    """Allocations of one VMM process. Addresses and sizes in bytes."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._next = _FIRST_HVA

    def alloc(self, size: int, level: int) -> int:
        """Fresh zeroed memory backed by host pages of `level`; aligned as the kernel aligns large areas."""
        if size <= 0 or size % PAGE_SIZE:
            raise ValueError(f"{size} bytes: allocations are whole pages")
        align = GIB if level == 3 or size >= GIB else 2 * MIB if level == 2 or size >= 2 * MIB else PAGE_SIZE
        hva = -(-self._next // align) * align
        self._vm.host.add(hva, size, level)
        self._next = hva + size + _GAP
        return hva

    def write(self, hva: int, data: bytes) -> None:
        """A store by the VMM. ValueError where nothing is mapped for writing."""
        done = 0
        for page, offset, length in pages_spanned(hva, len(data)):
            found = self._page(page << PAGE_SHIFT)
            if not found.writable:
                raise ValueError(f"hva {hva:#x}: the page is read-only")
            self._vm.memory.write(found.pfn, offset, data[done : done + length])
            done += length

    def read(self, hva: int, n_bytes: int) -> bytes:
        """A load by the VMM. ValueError where nothing is mapped."""
        pieces = pages_spanned(hva, n_bytes)
        return b"".join(self._vm.memory.read(self._page(at << PAGE_SHIFT).pfn, off, n) for at, off, n in pieces)

    def _page(self, hva: int) -> HostPage:
        found = self._vm.host.get_user_page(hva)
        if not isinstance(found, HostPage):
            raise ValueError(f"hva {hva:#x}: not memory of alloc_memory")
        return found

    def discard(self, hva: int, n_bytes: int) -> None:
        """MADV_DONTNEED: the next access finds a fresh zero page."""
        for page in self._notified(hva, n_bytes):
            self._vm.host.replace(page)

    def protect(self, hva: int, n_bytes: int, *, writable: bool) -> None:
        """mprotect."""
        for page in self._notified(hva, n_bytes):
            self._vm.host.protect(page, writable=writable)

    def replace(self, hva: int, n_bytes: int) -> None:
        """Move contents to other frames, as copy on write, KSM and page migration do."""
        for page in self._notified(hva, n_bytes):
            old = self._page(page).pfn
            self._vm.memory.copy_page(old, self._vm.host.replace(page))

    def _notified(self, hva: int, n_bytes: int) -> Iterator[int]:
        """Addresses of the range's pages, between the notifier's start (KVM has unmapped them) and its end."""
        if hva % PAGE_SIZE or n_bytes % PAGE_SIZE:
            raise ValueError(f"hva {hva:#x}+{n_bytes}: not whole pages")
        self._deliver(hva, hva + n_bytes)
        start, end = self._whole_host_pages(hva, n_bytes)
        self._vm.mmu.invalidate_range_start(start, end)
        self._vm.race("host: invalidated")
        yield from range(hva, hva + n_bytes, PAGE_SIZE)
        self._vm.mmu.invalidate_range_end(start, end)

    def _whole_host_pages(self, hva: int, n_bytes: int) -> tuple[int, int]:
        """A host page changed in part is split first, and KVM is told of the whole of it (__split_huge_pmd)."""
        last = hva + n_bytes - PAGE_SIZE
        first_size, last_size = (PAGE_SIZE << 9 * (self._vm.host.level(at) - 1) for at in (hva, last))
        return hva & -first_size, (last & -last_size) + last_size

    def _deliver(self, start: int, end: int) -> None:
        """Lazy writers of every slot that maps part of the range come first."""
        for as_id in range(self._vm.config.nr_as_ids):
            for slot in self._vm.memslots(as_id):
                first = max(start, slot.userspace_addr)
                stop = min(end, slot.userspace_addr + (slot.npages << PAGE_SHIFT))
                if first < stop:
                    self._vm.observe(slot, first - slot.userspace_addr >> PAGE_SHIFT, stop - first >> PAGE_SHIFT)
