"""KVM_SET_USER_MEMORY_REGION: what is refused, in which order, and how a slot set changes under running vCPUs.

The order of work is the point, so every step is a method: 1 invalidate the old slot (faults on it retry), 2 zap what
is mapped through it, 3 prepare bitmap and metadata, 4 install and swap the set, 5 commit: counters, then the MMU is
told about the LOG flag. Facts: Linux 6.18, virt/kvm/kvm_main.c kvm_set_memory_region, kvm_set_memslot; checked
against a real /dev/kvm.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from errno import EEXIST, EINVAL, ENOMEM
from typing import TYPE_CHECKING, Final

from migsim.kvm.memslot import (
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS,
    KVM_USER_MEM_SLOTS,
    Memslot,
    Memslots,
    SlotArch,
)
from migsim.kvm.mmio import generation_mask
from migsim.kvm.mmu_lock import WouldBlock
from migsim.kvm.uapi import KVM_DIRTY_LOG_MANUAL_CAPS, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_error
from migsim.planes import Plane
from migsim.units import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from migsim.kvm.vm import Vm

USER_PTR_MAX: Final = (1 << 47) - PAGE_SIZE  # access_ok's limit with four-level host paging
_U64: Final = 1 << 64


class Change(enum.Enum):
    """KVM_MR_*: what a call does to the slot."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags-only"


@dataclass(frozen=True, slots=True)
class Region:
    """struct kvm_userspace_memory_region; sizes and addresses in bytes, all unsigned."""

    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int

    @property
    def as_id(self) -> int:
        return self.slot >> 16

    @property
    def id(self) -> int:
        return self.slot & 0xFFFF

    @property
    def base_gfn(self) -> int:
        return self.guest_phys_addr >> PAGE_SHIFT

    @property
    def npages(self) -> int:
        return self.memory_size >> PAGE_SHIFT


class MemoryRegions:
    """The one door through which the slot sets of a VM change."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.nr_memslot_pages = 0
        self.nr_memslots_dirty_logging = 0
        self.external_write_tracking = False  # a user of KVM's page tracking (mediated graphics) exists

    def set(self, region: Region) -> None:
        """Create, delete, move or re-flag a slot. Raises OSError: EINVAL, EEXIST, ENOMEM."""
        self.check_arguments(region)
        old = self._vm.memslots(region.as_id).by_id(region.id)
        change = self.classify(region, old)
        if change is None:
            return
        if change in (Change.CREATE, Change.MOVE):
            self.check_overlap(region)
        self.apply(region, old, change)

    # -- checks, in KVM's order --------------------------------------------------------------------------------------

    def check_arguments(self, region: Region) -> None:
        """Everything that can be refused without looking at a slot: flags, size, gpa, hva, ids, wrap, pages."""
        if region.flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY):
            raise kvm_error(EINVAL, f"flags {region.flags:#x}: only LOG_DIRTY_PAGES and READONLY are known")
        if region.memory_size % PAGE_SIZE or not 0 <= region.memory_size < _U64:
            raise kvm_error(EINVAL, f"memory_size {region.memory_size:#x} is not page aligned")
        if region.guest_phys_addr % PAGE_SIZE or not 0 <= region.guest_phys_addr < _U64:
            raise kvm_error(EINVAL, f"guest_phys_addr {region.guest_phys_addr:#x} is not page aligned")
        hva = region.userspace_addr
        if hva % PAGE_SIZE or hva < 0 or hva + region.memory_size > USER_PTR_MAX:
            raise kvm_error(EINVAL, f"userspace_addr {hva:#x} is not a page-aligned user address")
        if region.as_id >= self._vm.config.nr_as_ids or region.id >= KVM_USER_MEM_SLOTS:
            raise kvm_error(EINVAL, f"slot {region.slot:#x}: no such address space or id")
        if region.guest_phys_addr + region.memory_size >= _U64:
            raise kvm_error(EINVAL, f"guest_phys_addr {region.guest_phys_addr:#x} + memory_size wraps")
        if region.npages > KVM_MEM_MAX_NR_PAGES:
            raise kvm_error(EINVAL, f"{region.npages} pages: a slot holds at most {KVM_MEM_MAX_NR_PAGES}")

    def classify(self, region: Region, old: Memslot | None) -> Change | None:
        """What the call would change; None if nothing."""
        if not region.memory_size:
            if old is None:
                raise kvm_error(EINVAL, f"slot {region.slot:#x} does not exist, so it cannot be deleted")
            return Change.DELETE
        if old is None:
            if self.nr_memslot_pages + region.npages >= _U64:
                raise kvm_error(EINVAL, "the VM's pages would not fit an unsigned long")
            return Change.CREATE
        if (
            region.userspace_addr != old.userspace_addr
            or region.npages != old.npages
            or (region.flags ^ old.flags) & KVM_MEM_READONLY
        ):
            raise kvm_error(EINVAL, f"slot {region.slot:#x}: address, size and READONLY cannot change")
        if region.base_gfn != old.base_gfn:
            return Change.MOVE
        return Change.FLAGS_ONLY if region.flags != old.flags else None

    def check_overlap(self, region: Region) -> None:
        """EEXIST if another slot of the address space holds a page of the region."""
        memslots = self._vm.memslots(region.as_id)
        if memslots.overlaps(region.id, region.base_gfn, region.base_gfn + region.npages):
            raise kvm_error(EEXIST, f"slot {region.slot:#x} would overlap another")

    # -- the change --------------------------------------------------------------------------------------------------

    def apply(self, region: Region, old: Memslot | None, change: Change) -> None:
        """kvm_set_memslot: the five steps; a failure in 3 takes the INVALID of 1 back."""
        gone = old if change in (Change.DELETE, Change.MOVE) else None
        if gone is not None:
            self.invalidate(gone)
            self.flush_shadow(gone)
        try:
            bitmap = self.prepare(region, old, change)
        except OSError:
            if gone is not None:
                self.reactivate(gone)
            raise
        old_flags = old.flags if old else 0
        old_bitmap = old.dirty_bitmap if old else None
        slot = self.install(region, old, change, bitmap)
        self.commit(slot, old_flags, change)
        if old_bitmap is not None and old_bitmap is not bitmap:
            self._vm.race("memslot: bitmap freed")

    def invalidate(self, slot: Memslot) -> None:
        """Step 1: swap in a set in which the slot is INVALID; from here on faults on it retry."""

        def mark() -> None:
            slot.invalid = True

        self.swap_active(self._vm.memslots(slot.as_id), mark)

    def flush_shadow(self, slot: Memslot) -> None:
        """Step 2: zap every SPTE of the VM (quirk SLOT_ZAP_ALL, the default) or those of the slot alone."""
        if self._vm.quirk_slot_zap_all:
            self._vm.mmu.zap_all_fast()
        else:
            self._vm.mmu.zap_slot(slot)
        self._vm.race("memslot: invalid")

    def reactivate(self, slot: Memslot) -> None:
        """Take step 1 back."""

        def unmark() -> None:
            slot.invalid = False

        self.swap_active(self._vm.memslots(slot.as_id), unmark)

    def prepare(self, region: Region, old: Memslot | None, change: Change) -> Plane | None:
        """Step 3: the slot's log from now on (fresh, kept or none), then the architecture's checks.

        A log that exists survives a MOVE and a FLAGS_ONLY that keeps LOG; off and on again gives a fresh one.
        """
        if change is Change.DELETE:
            return None
        bitmap = self.prepare_bitmap(region, old)
        if change in (Change.CREATE, Change.MOVE):
            self.check_arch(region, change)
        return bitmap

    def prepare_bitmap(self, region: Region, old: Memslot | None) -> Plane | None:
        """None without LOG or with rings; else the old one, or a new one (all ones with INITIALLY_SET)."""
        if not region.flags & KVM_MEM_LOG_DIRTY_PAGES:
            return None
        if old is not None and old.dirty_bitmap is not None:
            return old.dirty_bitmap
        if not self._vm.use_dirty_bitmap:
            return None
        try:
            return Plane(region.npages, ones=self.initially_set())
        except MemoryError as error:
            raise kvm_error(ENOMEM, f"no memory for the log of {region.npages} pages") from error

    def initially_set(self) -> bool:
        """Does a new log start with every page set, and enabling protect nothing?"""
        return self._vm.manual_dirty_log_protect & KVM_DIRTY_LOG_MANUAL_CAPS == KVM_DIRTY_LOG_MANUAL_CAPS

    def check_arch(self, region: Region, change: Change) -> None:
        """kvm_arch_prepare_memory_region: the last gfn must be addressable; a tracked slot must not move."""
        if region.base_gfn + region.npages - 1 > self._vm.config.max_gfn:
            raise kvm_error(EINVAL, f"the last gfn lies above {self._vm.config.max_gfn:#x}")
        if change is Change.MOVE and self.external_write_tracking:
            raise kvm_error(EINVAL, "a user of page tracking exists, so no slot may move")

    def install(self, region: Region, old: Memslot | None, change: Change, bitmap: Plane | None) -> Memslot:
        """Step 4: the final slot goes in and the set is swapped; returns the slot (DELETE: the one that left)."""
        memslots = self._vm.memslots(region.as_id)
        slot = old or Memslot(region.as_id, region.id, region.base_gfn, region.npages, region.userspace_addr)
        if change is Change.DELETE:
            self.swap_active(memslots, lambda: memslots.remove(slot))
            self._vm.mmu.slot_deleted(slot)
            return slot
        if change is Change.MOVE:
            self._vm.mmu.slot_deleted(slot)

        def put() -> None:
            if change is Change.MOVE:
                memslots.remove(slot)
                slot.base_gfn, slot.invalid = region.base_gfn, False
                slot.arch = SlotArch(slot.base_gfn, slot.npages, slot.userspace_addr)
            slot.flags, slot.dirty_bitmap = region.flags, bitmap
            if change is not Change.FLAGS_ONLY:
                memslots.insert(slot)
                self._vm.mmu.slot_created(slot)

        self.swap_active(memslots, put)
        return slot

    def commit(self, slot: Memslot, old_flags: int, change: Change) -> None:
        """Step 5: page count, count of logging slots, PML switched on or off, then the LOG flag's MMU work."""
        new_flags = 0 if change is Change.DELETE else slot.flags
        if change is Change.DELETE:
            self.nr_memslot_pages -= slot.npages
        elif change is Change.CREATE:
            self.nr_memslot_pages += slot.npages
        if change in (Change.CREATE, Change.DELETE):
            self._vm.mmu.slot_pages_changed(self.nr_memslot_pages)
        if (old_flags ^ new_flags) & KVM_MEM_LOG_DIRTY_PAGES:
            self.nr_memslots_dirty_logging += 1 if new_flags & KVM_MEM_LOG_DIRTY_PAGES else -1
            self.update_cpu_dirty_logging(enable=bool(new_flags & KVM_MEM_LOG_DIRTY_PAGES))
        if change is Change.FLAGS_ONLY and not slot.readonly:
            self.apply_log_flag(slot)

    def update_cpu_dirty_logging(self, enable: bool) -> None:
        """Ask every vCPU to switch PML when the first slot starts, or the last stops, logging (Linux 5.12)."""
        count = self.nr_memslots_dirty_logging
        if self._vm.pml_enabled and ((enable and count == 1) or not count):
            for vcpu in self._vm.vcpus:
                vcpu.update_cpu_dirty_logging()

    def apply_log_flag(self, slot: Memslot) -> None:
        """kvm_mmu_slot_apply_flags: nothing is mapped at CREATE and MOVE, READONLY slots cannot get dirty."""
        if not slot.logging:
            self._vm.mmu.slot_disable_log(slot)
            return
        initially_set = self.initially_set()
        self._vm.mmu.slot_enable_log(slot, initially_set)
        if not initially_set or self._vm.mmu.state.vintage.protects_huge_at_enable:
            self.flush_after_enable(slot)

    def flush_after_enable(self, slot: Memslot) -> None:
        """Unconditional, outside mmu_lock: an entry may have been made read-only earlier and not be flushed yet."""
        self._vm.race("enable: protected")
        self._vm.flush_remote_tlbs_memslot(slot)

    # -- generations -------------------------------------------------------------------------------------------------

    def swap_active(self, memslots: Memslots, change: Callable[[], None]) -> None:
        """kvm_swap_active_memslots: in progress, the new set, wait for readers, then the next generation.

        Raises WouldBlock while an MMU notifier runs: its start and its end must see the same slots.
        """
        if self._vm.mmu.state.invalidate.active:
            raise WouldBlock("the memslots cannot be swapped before the running MMU notifier has ended")
        memslots.generation |= KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
        change()
        self._vm.race("memslot: in progress")
        memslots.generation = self.next_generation(memslots)

    def next_generation(self, memslots: Memslots) -> int:
        """The in-progress flag dropped and the number of address spaces added; MMIO SPTEs go if that wraps."""
        spaces = self._vm.config.nr_as_ids
        generation = (memslots.generation & ~KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS) + spaces
        if self.mmio_generation_wrapped(generation):
            self._vm.mmu.zap_all_fast()
        return generation

    def mmio_generation_wrapped(self, generation: int) -> bool:
        """Have the bits an MMIO SPTE remembers come round, in whichever address space (its id is stripped)?"""
        return not generation & generation_mask(self._vm.mmu.fmt) & ~(self._vm.config.nr_as_ids - 1)
