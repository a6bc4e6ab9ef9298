"""The door: all that user space, and so migration, may know of KVM. Calls, constants, and the table of logging modes.

`Kvm` and `KvmVcpu` say what a VM offers; the emulated `Vm` and the one over the real /dev/kvm both do. `LOG_MODES` is
the table that dirty_log_test.c calls log_modes[]: how a VM is prepared for each way of logging, how a round's pages
are collected, how they are made to be noticed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

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
from migsim.units import words_of

Words = NDArray[np.uint64]


class Ring(Protocol):
    """A dirty ring as user space maps it."""

    size: int
    entries: NDArray[Any]

    def harvest(self, limit: int | None = None) -> list[tuple[int, int]]: ...
    def used(self) -> int: ...


class ExitInfo(Protocol):
    """Why KVM_RUN came back."""

    @property
    def reason(self) -> int: ...
    @property
    def done(self) -> int: ...
    @property
    def data(self) -> tuple[int, ...]: ...


class KvmVcpu(Protocol):
    """A vCPU as user space sees it."""

    id: int

    @property
    def ring(self) -> Ring: ...
    def run(self, ops: Sequence[Op]) -> ExitInfo: ...
    def set_msr(self, index: int, value: int) -> None: ...
    def stats_read(self) -> dict[str, int]: ...


class Kvm(Protocol):
    """A VM as user space sees it; errors are OSError with KVM's errno."""

    def check_extension(self, cap: int) -> int: ...
    def enable_cap(self, cap: int, flags: int = 0, args: Sequence[int] = (0, 0, 0, 0)) -> int: ...
    def set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None: ...
    def get_dirty_log(self, slot: int, dirty_bitmap: Words | None) -> None: ...
    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty_bitmap: Words | None) -> None: ...
    def reset_dirty_rings(self) -> int: ...
    def stats_read(self) -> dict[str, int]: ...
    def alloc_memory(self, size: int) -> int: ...
    def host_write(self, hva: int, data: bytes) -> None: ...
    def host_read(self, hva: int, n_bytes: int) -> bytes: ...
    def close(self) -> None: ...


Collect = Callable[[Kvm, Sequence[KvmVcpu], int, int], Words]
Clear = Callable[[Kvm, int, int, Words], None]


@dataclass(frozen=True, slots=True)
class LogMode:
    """One way of logging, as data.

    `pml`: logging by D bits where the VM is configured so. `initially_set`: the first collection shows every page.
    `supported(vm)`. `create(vm)`: capabilities to enable before the first vCPU. `collect(vm, vcpus, slot, n_pages)`:
    uint64[ceil(n_pages / 64)] of the pages reported. `clear(vm, slot, n_pages, collected)`: what of the collection
    must be done before its pages are read.
    """

    name: str
    pml: bool
    initially_set: bool
    supported: Callable[[Kvm], bool]
    create: Callable[[Kvm], None]
    collect: Collect
    clear: Clear

    @property
    def title(self) -> str:
        """The mode's name with the kind of protection."""
        return f"{self.name}/{'pml' if self.pml else 'wrprot'}"


def _always(vm: Kvm) -> bool:
    return True


def _nothing(vm: Kvm) -> None:
    return None


def _manual_supported(vm: Kvm) -> bool:
    return vm.check_extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) != 0


def _enable_manual(vm: Kvm) -> None:
    """Everything offered, which is ENABLE with INITIALLY_SET on any kernel since 5.7."""
    vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (vm.check_extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),))


def _ring_cap(vm: Kvm) -> int:
    """The stricter capability where there is one; it asks user space for acquire and release on the flags."""
    ordered = vm.check_extension(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) != 0
    return KVM_CAP_DIRTY_LOG_RING_ACQ_REL if ordered else KVM_CAP_DIRTY_LOG_RING


def _ring_supported(vm: Kvm) -> bool:
    return vm.check_extension(_ring_cap(vm)) != 0


def ring_creator(entries: int) -> Callable[[Kvm], None]:
    """How to prepare a VM for rings of `entries` (a power of two) a vCPU."""

    def create(vm: Kvm) -> None:
        vm.enable_cap(_ring_cap(vm), 0, (entries * DIRTY_GFN.itemsize,))

    return create


def _get(vm: Kvm, vcpus: Sequence[KvmVcpu], slot: int, n_pages: int) -> Words:
    bitmap = np.zeros(words_of(n_pages), dtype=np.uint64)
    vm.get_dirty_log(slot, bitmap)
    return bitmap


def _harvest(vm: Kvm, vcpus: Sequence[KvmVcpu], slot: int, n_pages: int) -> Words:
    bitmap = np.zeros(words_of(n_pages), dtype=np.uint64)
    for vcpu in vcpus:
        for key, offset in vcpu.ring.harvest():
            if key == slot and offset < n_pages:
                bitmap[offset >> 6] |= np.uint64(1 << (offset & 63))
    return bitmap


def _cleared_already(vm: Kvm, slot: int, n_pages: int, collected: Words) -> None:
    """GET took the bits and protected the pages."""


def _clear(vm: Kvm, slot: int, n_pages: int, collected: Words) -> None:
    vm.clear_dirty_log(slot, 0, n_pages, collected)


def _reset(vm: Kvm, slot: int, n_pages: int, collected: Words) -> None:
    vm.reset_dirty_rings()


DEFAULT_RING_ENTRIES: Final = 65536


def _rows(pml: bool) -> tuple[LogMode, ...]:
    return (
        LogMode("dirty-log", pml, False, _always, _nothing, _get, _cleared_already),
        LogMode("clear-log", pml, True, _manual_supported, _enable_manual, _get, _clear),
        LogMode("dirty-ring", pml, False, _ring_supported, ring_creator(DEFAULT_RING_ENTRIES), _harvest, _reset),
    )


LOG_MODES: Final = (*_rows(pml=False), *_rows(pml=True))

__all__ = [
    "DEFAULT_RING_ENTRIES", "DIRTY_GFN", "Exit", "ExitInfo", "KVM_CAP_DIRTY_LOG_RING",
    "KVM_CAP_DIRTY_LOG_RING_ACQ_REL", "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP", "KVM_CAP_DISABLE_QUIRKS2",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "KVM_CAP_MAX_VCPUS", "KVM_CAP_MULTI_ADDRESS_SPACE", "KVM_CAP_NR_MEMSLOTS",
    "KVM_CAP_VM_DISABLE_NX_HUGE_PAGES", "KVM_DIRTY_GFN_F_DIRTY", "KVM_DIRTY_GFN_F_RESET",
    "KVM_DIRTY_LOG_INITIALLY_SET", "KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE", "KVM_EXIT_DIRTY_RING_FULL", "KVM_EXIT_HLT",
    "KVM_EXIT_INTR", "KVM_EXIT_MMIO", "KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_MAX_NR_PAGES", "KVM_MEM_READONLY",
    "KVM_USER_MEM_SLOTS", "KVM_X86_QUIRK_SLOT_ZAP_ALL", "Kvm", "KvmVcpu", "LOG_MODES", "LogMode",
    "MSR_KVM_SYSTEM_TIME_NEW", "Mmio", "Op", "Ring", "Vcpu", "Vm", "VmConfig", "ring_creator",
]  # fmt: skip
