"""A dirty bitmap of somebody else's as the smallest VM: slots, stores that mark, GET that takes.

The bitmap is made as ``Class(n_bytes, page_size)`` and needs three methods, as rust-vmm's vm-memory has them:
``mark_dirty(offset, length)`` and ``dirty_at(offset)`` in bytes, and ``get_and_reset()`` giving the words of the whole
bitmap (page i is bit i & 63 of word i >> 6) and leaving it clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from errno import EINVAL, ENOENT
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migsim.kvm import uapi
from migsim.units import PAGE_SIZE, words_of
from migsim.validate.door import Op

_BASE_HVA = 1 << 40


def is_dirty_bitmap(made: Any) -> bool:
    """Has the class a bitmap's three methods?"""
    return all(hasattr(made, method) for method in ("mark_dirty", "dirty_at", "get_and_reset"))


@dataclass(frozen=True)
class BitmapExit:
    """As KVM_RUN's: always HLT, everything done."""

    reason: int
    done: int
    data: tuple[int, ...]


@dataclass
class _Slot:
    gpa: int
    size: int
    hva: int
    bitmap: Any


class BitmapVcpu:
    """Executes stores into the VM's memory and tells the slot's bitmap of every one."""

    def __init__(self, vm: BitmapVm) -> None:
        self._vm = vm

    def run(self, ops: Sequence[Op]) -> BitmapExit:
        data = []
        for kind, gpa, value in ops:
            loaded = self._vm.access(kind, gpa, value)
            if kind == "r":
                data.append(loaded)
        return BitmapExit(uapi.KVM_EXIT_HLT, len(ops), tuple(data))

    @property
    def ring(self) -> Any:
        raise RuntimeError("a dirty bitmap has no ring")


class BitmapVm:
    """The door over a bitmap class.  Only the log of GET; OSError EINVAL and ENOENT as KVM gives them."""

    def __init__(self, bitmap_class: Any) -> None:
        self._bitmap_class = bitmap_class
        self._slots: dict[int, _Slot] = {}
        self._memory = bytearray()

    def check_extension(self, cap: int) -> int:
        return 0

    def enable_cap(self, cap: int, flags: int = 0, args: Any = (0, 0, 0, 0)) -> int:
        raise OSError(EINVAL, "a dirty bitmap has no capabilities")

    def create_vcpu(self, id: int) -> BitmapVcpu:
        return BitmapVcpu(self)

    def set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        old = self._slots.pop(slot, None)
        if memory_size == 0:
            if old is None:
                raise OSError(EINVAL, "no such slot")
            return
        bitmap = None
        if flags & uapi.KVM_MEM_LOG_DIRTY_PAGES:
            kept = old.bitmap if old is not None else None
            bitmap = kept if kept is not None else self._bitmap_class(memory_size, PAGE_SIZE)
        self._slots[slot] = _Slot(guest_phys_addr, memory_size, userspace_addr, bitmap)

    def get_dirty_log(self, slot: int, dirty_bitmap: NDArray[np.uint64] | None) -> None:
        found = self._slots.get(slot)
        if found is None or found.bitmap is None:
            raise OSError(ENOENT, "no such slot, or it is not logged")
        assert dirty_bitmap is not None
        words = np.asarray(found.bitmap.get_and_reset(), dtype=np.uint64)
        dirty_bitmap[: words_of(found.size // PAGE_SIZE)] = words

    def clear_dirty_log(
        self, slot: int, first_page: int, num_pages: int, dirty_bitmap: NDArray[np.uint64] | None
    ) -> None:
        raise OSError(EINVAL, "a dirty bitmap has no CLEAR")

    def reset_dirty_rings(self) -> int:
        raise OSError(EINVAL, "a dirty bitmap has no ring")

    def stats_read(self) -> dict[str, int]:
        return {}

    def alloc_memory(self, size: int) -> int:
        at = len(self._memory)
        self._memory.extend(bytes(size))
        return _BASE_HVA + at

    def host_write(self, hva: int, data: bytes) -> None:
        at = hva - _BASE_HVA
        self._memory[at : at + len(data)] = data

    def host_read(self, hva: int, n_bytes: int) -> bytes:
        at = hva - _BASE_HVA
        return bytes(self._memory[at : at + n_bytes])

    def access(self, kind: str, gpa: int, value: int) -> int:
        """One load or store of a u32, told to the bitmap if it stores."""
        slot = next((slot for slot in self._slots.values() if slot.gpa <= gpa < slot.gpa + slot.size), None)
        if slot is None:
            raise ValueError(f"gpa {gpa:#x} lies in no slot")
        hva = slot.hva + gpa - slot.gpa
        old = int.from_bytes(self.host_read(hva, 4), "little")
        if kind == "r":
            return old
        new = value if kind == "w" else old + value & 0xFFFFFFFF
        self.host_write(hva, new.to_bytes(4, "little"))
        if slot.bitmap is not None:
            slot.bitmap.mark_dirty(gpa - slot.gpa, 4)
        return new

    def close(self) -> None:
        self._slots.clear()
