"""Others run in the middle of an ioctl: what must hold whatever they do, and how a wrong order or a lost step shows."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest

from migsim.kvm.dirty_log import WordKernel
from migsim.kvm.dirty_ring import DirtyRing
from migsim.kvm.ioctl import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_EXIT_INTR,
    KVM_EXIT_MMIO,
    Vcpu,
    Vm,
    VmConfig,
)
from migsim.kvm.memslot import Memslot
from migsim.kvm.nested import GuestPte, NestedGuest
from migsim.planes import Words

PAGE = 4096
GPA = 0x200000
N = 100
CONFIGS = {"pml": VmConfig(), "wrprot": VmConfig(pml=False), "npt": VmConfig(vendor="amd")}


def guest(config: VmConfig, manual: int = 0, flags: int = 1) -> tuple[Vm, Vcpu, Vcpu]:
    vm = Vm(config)
    vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (manual,))
    vm.set_user_memory_region(1, flags, GPA, N * PAGE, vm.alloc_memory(N * PAGE))
    return vm, vm.create_vcpu(0), vm.create_vcpu(1)


def store(vcpu: Vcpu, *pages: int) -> int:
    return vcpu.run([("w", GPA + page * PAGE, page + 1) for page in pages]).done


def get(vm: Vm) -> set[int]:
    bitmap = np.zeros(2, dtype=np.uint64)
    vm.get_dirty_log(1, bitmap)
    return {i for i in range(N) if int(bitmap[i >> 6]) >> (i & 63) & 1}


def once(vm: Vm, point: str, act: Callable[[], object]) -> list[object]:
    """Do `act` the first time the VM comes to `point`."""
    results: list[object] = []

    def race(where: str) -> None:
        if where == point and not results:
            results.append(act())

    vm.race_hook = race
    return results


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("point", ["log: synced", "log: taken", "log: protected", "log: before flush"])
def test_a_store_at_any_point_of_clear_is_in_the_copy_or_in_the_log(name: str, point: str) -> None:
    vm, first, other = guest(CONFIGS[name], manual=1)
    with vm:
        store(first, 7, 80)
        store(other, 7)
        seen = get(vm)
        done = once(vm, point, lambda: store(other, 7))
        mask = np.array([1 << 7, 1 << 16], dtype=np.uint64)
        vm.clear_dirty_log(1, 0, N, mask)
        vm.race_hook = None
        assert done == [1] and seen == {7, 80}
        # Page 7 is read after CLEAR; a store before that is in the copy, one after it must be noticed.
        assert get(vm) <= {7}
        assert not vm.invariants()
        mask[:] = np.uint64(2**64 - 1)
        vm.clear_dirty_log(1, 0, N, mask)
        store(other, 7)
        assert get(vm) == {7}


def test_a_vcpu_that_would_wait_for_the_lock_comes_back_and_one_on_the_fast_path_does_not() -> None:
    vm, first, other = guest(CONFIGS["wrprot"])
    with vm:
        store(first, 3)
        other.run([])  # its root is loaded: that would have to wait as well
        exits = once(vm, "log: protected", lambda: other.run([("w", GPA + 3 * PAGE, 9), ("w", GPA + 50 * PAGE, 9)]))
        assert get(vm) == {3}
        vm.race_hook = None
        exit = exits[0]
        assert (exit.reason, exit.done) == (KVM_EXIT_INTR, 1)  # type: ignore[attr-defined]
        assert get(vm) == {3}, "the fast fault after protection was logged anew"


def test_a_fault_on_a_slot_that_is_being_deleted_retries_and_afterwards_is_mmio() -> None:
    vm, first, _ = guest(CONFIGS["wrprot"])
    with vm:
        store(first, 1)
        exits = once(vm, "memslot: invalid", lambda: first.run([("w", GPA, 1)]))
        vm.set_user_memory_region(1, 0, 0, 0, 0)
        vm.race_hook = None
        assert exits[0].reason == KVM_EXIT_INTR  # type: ignore[attr-defined]
        assert first.run([("w", GPA, 1)]).reason == KVM_EXIT_MMIO
        assert not vm.invariants()


def test_a_store_between_protection_and_flush_when_logging_starts_precedes_the_log() -> None:
    for name in CONFIGS:
        vm, first, other = guest(CONFIGS[name], flags=0)
        with vm:
            store(first, 1)
            store(other, 1)
            slot = vm.memslots(0).by_id(1)
            assert slot is not None
            done = once(vm, "enable: protected", lambda v=other: store(v, 1))
            vm.set_user_memory_region(1, 1, GPA, N * PAGE, slot.userspace_addr)
            vm.race_hook = None
            assert done == [1]
            store(other, 1)
            assert get(vm) == {1} and not vm.invariants()


def test_pushes_during_a_reset_stay_for_the_next_one() -> None:
    vm = Vm(CONFIGS["wrprot"])
    with vm:
        vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, 0, (4096,))
        vm.set_user_memory_region(1, 1, GPA, N * PAGE, vm.alloc_memory(N * PAGE))
        vcpu = vm.create_vcpu(0)
        store(vcpu, 1, 2, 90)
        assert len(vcpu.ring.harvest()) == 3
        done = once(vm, "ring: protected", lambda: store(vcpu, 1, 2))
        assert vm.reset_dirty_rings() == 3
        vm.race_hook = None
        assert done == [2]
        store(vcpu, 1, 2)
        assert [offset for _, offset in vcpu.ring.harvest()] == [1, 2]
        assert not vm.invariants()


# -- one step replaced, as the seeded bugs do it ---------------------------------------------------------------------


def test_protecting_before_taking_loses_a_store_in_between() -> None:
    """The oldest bug of all: the page is left writable, and its bit is gone."""
    vm, first, other = guest(CONFIGS["wrprot"])
    kernel = vm.word_kernel

    def protect_first(slot: Memslot, scratch: Words) -> bool:
        log = slot.dirty_bitmap
        assert log is not None
        scratch[:] = 0
        for i in map(int, np.flatnonzero(log.words)):
            old = int(log.words[i])
            WordKernel.protect(kernel, slot, i * 64, old)
            WordKernel.take(kernel, log, i, 2**64 - 1)
            scratch[i] = old
        return True

    kernel.harvest = protect_first  # type: ignore[method-assign]
    vm.flush_remote_tlbs()
    store(first, 7)
    once(vm, "log: protected", lambda: (vm.flush_remote_tlbs(), store(other, 7)))
    assert get(vm) == {7}
    vm.race_hook = None
    assert any("page 7: clean" in sentence for sentence in vm.invariants())


def test_an_unmarked_atomic_store_is_lost() -> None:
    vm, first, _ = guest(VmConfig(instruction_emulation=True))
    vm.access.mark_atomic = lambda slot, gfn, vcpu: None  # type: ignore[method-assign]
    first.run([("a", GPA, 1)])
    assert get(vm) == set()


def test_a_flag_written_before_its_fields_shows_the_old_entry() -> None:
    seen: list[tuple[int, int]] = []

    class FlagFirst(DirtyRing):
        def write_fields(self, at: int, slot_key: int, offset: int) -> None:
            self.set_dirtied(at)
            seen.append((int(self.entries["slot"][at]), int(self.entries["offset"][at])))
            super().write_fields(at, slot_key, offset)

    FlagFirst(64, 8).push(1, 5)
    assert seen == [(0, 0)]


def test_kvms_own_map_marks_when_it_is_given_back() -> None:
    vm, first, _ = guest(CONFIGS["pml"])
    with vm:
        held = vm.access.map_guest((GPA >> 12) + 3, first)
        vm.memory.store(held.pfn, 0, 7)
        assert get(vm) == set()
        vm.access.unmap_guest(held, first, dirty=True)
        assert get(vm) == {3}
        with pytest.raises(OSError) as caught:
            vm.access.map_guest(1, first)
        assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("name", list(CONFIGS))
def test_l2_stores_are_charged_to_l1s_pages(name: str) -> None:
    """Two L2 pages alias one L1 page; the log is by L1's page whichever is written (nested_dirty_log_test)."""
    vm, vcpu, _ = guest(CONFIGS[name])
    with vm:
        tables = vm.alloc_memory(8 * PAGE)
        vm.set_user_memory_region(2, 0, 0x800000, 8 * PAGE, tables)
        root = 0x800
        nested = NestedGuest(vm, root)
        for depth in range(3):
            nested.write_entry(vcpu, root + depth, 0, GuestPte(root + depth + 1))
        for index in (4, 5):
            nested.write_entry(vcpu, root + 3, index, GuestPte((GPA >> 12) + 9, leaf=True))
        for _ in range(2):
            for l2_page in (4, 5):
                vcpu.enter_guest_mode(nested)
                assert vcpu.run([("w", l2_page * PAGE, l2_page)]).done == 1
                vcpu.leave_guest_mode()
                assert get(vm) == {9}
                assert not vm.invariants()
        assert vcpu.run([("r", GPA + 9 * PAGE, 0)]).data == (5,)


def test_an_mmio_translation_is_not_trusted_while_slots_change() -> None:
    """The new slot is visible before its generation is: a store then must reach memory, not user space."""
    vm = Vm(VmConfig())
    with vm:
        vcpu = vm.create_vcpu(0)
        assert vcpu.run([("w", GPA, 1)]).reason == KVM_EXIT_MMIO
        exits = once(vm, "memslot: in progress", lambda: vcpu.run([("w", GPA, 2), ("w", GPA + PAGE, 3)]))
        vm.set_user_memory_region(1, 1, GPA, N * PAGE, vm.alloc_memory(N * PAGE))
        vm.race_hook = None
        assert exits[0].done == 2  # type: ignore[attr-defined]
        assert get(vm) == {0, 1}
        assert not vm.invariants()


@pytest.mark.parametrize("zapped", [True, False])
def test_an_mmio_spte_whose_generation_came_round_hides_a_new_slot_unless_it_was_zapped(zapped: bool) -> None:
    vm = Vm(VmConfig(smm=False))
    vcpu = vm.create_vcpu(0)
    memslots, hva = vm.memslots(0), vm.alloc_memory(N * PAGE)
    memslots.generation = 2
    assert vcpu.run([("w", GPA, 1)]).reason == KVM_EXIT_MMIO
    if not zapped:
        vm.regions.mmio_generation_wrapped = lambda generation: False  # type: ignore[method-assign]
    memslots.generation = (1 << 19) - 1  # as half a million changes would leave it
    vm.set_user_memory_region(5, 0, 1 << 30, PAGE, hva)
    vm.set_user_memory_region(1, 0, GPA, N * PAGE, hva)
    vm.set_user_memory_region(6, 0, 1 << 31, PAGE, hva)
    assert memslots.generation & (1 << 19) - 1 == 2
    assert (vcpu.run([("w", GPA, 2)]).reason == KVM_EXIT_MMIO) is not zapped
