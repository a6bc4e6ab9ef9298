"""KVM_SET_USER_MEMORY_REGION: refusals in KVM's order, change kinds, generations, what survives a change."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim.kvm.ioctl import (
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    Vm,
    VmConfig,
)
from migsim.kvm.memslot import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS, Memslot, Memslots
from migsim.kvm.mmio import generation_mask

PAGE = 4096
LOG = KVM_MEM_LOG_DIRTY_PAGES
GPA = 0x100000


def errno_of(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def bits(vm: Vm, slot: int, n_pages: int) -> set[int]:
    bitmap = np.zeros(-(-n_pages // 64), dtype=np.uint64)
    vm.get_dirty_log(slot, bitmap)
    return {i for i in range(len(bitmap) * 64) if int(bitmap[i >> 6]) >> (i & 63) & 1}


@pytest.mark.parametrize(
    ("slot", "flags", "gpa", "size", "hva", "expected"),
    [
        (1, 4, GPA, PAGE, PAGE, "EINVAL"),
        (1, 0, GPA, PAGE + 1, PAGE, "EINVAL"),
        (1, 0, GPA + 1, PAGE, PAGE, "EINVAL"),
        (1, 0, GPA, PAGE, PAGE + 1, "EINVAL"),
        (1, 0, GPA, PAGE, (1 << 47) - PAGE, "EINVAL"),
        (1, 0, GPA, PAGE, (1 << 47) - 2 * PAGE, "ok"),
        (1, 0, GPA, 2 * PAGE, (1 << 47) - 2 * PAGE, "EINVAL"),
        (1, 0, GPA, PAGE, 0, "ok"),
        (1, 0, GPA, PAGE, (1 << 62) + PAGE, "EINVAL"),
        (2 << 16 | 1, 0, GPA, PAGE, PAGE, "EINVAL"),
        (1 << 16 | 1, 0, GPA, PAGE, PAGE, "ok"),
        (32764, 0, GPA, PAGE, PAGE, "EINVAL"),
        (32763, 0, GPA, PAGE, PAGE, "ok"),
        (1, 0, (1 << 64) - PAGE, PAGE, PAGE, "EINVAL"),
        (1, 0, 0, 1 << 43, PAGE, "EINVAL"),
        (1, 0, 0, (1 << 43) - PAGE, PAGE, "ok"),
        (1, 0, 0, 0, PAGE, "EINVAL"),
        (1, 0, 1 << 46, PAGE, PAGE, "EINVAL"),
        (1, 0, (1 << 46) - PAGE, PAGE, PAGE, "ok"),
    ],
)
def test_refuses_what_a_real_kvm_refuses(slot: int, flags: int, gpa: int, size: int, hva: int, expected: str) -> None:
    with Vm() as vm:
        assert errno_of(lambda: vm.set_user_memory_region(slot, flags, gpa, size, hva)) == expected


def test_smm_less_vm_has_one_address_space() -> None:
    with Vm(VmConfig(smm=False)) as vm:
        assert errno_of(lambda: vm.set_user_memory_region(1 << 16, 0, GPA, PAGE, PAGE)) == "EINVAL"


def test_slots_may_not_overlap_in_one_space_and_may_in_two() -> None:
    with Vm() as vm:
        vm.set_user_memory_region(1, 0, GPA, 4 * PAGE, PAGE)
        assert errno_of(lambda: vm.set_user_memory_region(2, 0, GPA + 3 * PAGE, PAGE, PAGE)) == "EEXIST"
        vm.set_user_memory_region(2, 0, GPA + 4 * PAGE, PAGE, PAGE)
        vm.set_user_memory_region(1 << 16 | 2, 0, GPA + PAGE, PAGE, PAGE)
        assert errno_of(lambda: vm.set_user_memory_region(2, 0, GPA, PAGE, PAGE)) == "EEXIST"


def test_overlap_is_found_before_an_address_that_is_too_high_and_a_failed_move_changes_nothing() -> None:
    with Vm() as vm:
        vm.set_user_memory_region(1, LOG, GPA, PAGE, PAGE)
        assert errno_of(lambda: vm.set_user_memory_region(1, LOG, 1 << 50, PAGE, PAGE)) == "EINVAL"
        slot = vm.memslots(0).by_id(1)
        assert slot is not None and not slot.invalid and slot.base_gfn == GPA >> 12
        assert errno_of(lambda: vm.set_user_memory_region(2, 0, GPA, PAGE, PAGE)) == "EEXIST"


def test_address_size_and_readonly_of_a_slot_are_fixed() -> None:
    with Vm() as vm:
        vm.set_user_memory_region(1, 0, GPA, 2 * PAGE, PAGE)
        for flags, size, hva in ((0, PAGE, PAGE), (0, 2 * PAGE, 2 * PAGE), (KVM_MEM_READONLY, 2 * PAGE, PAGE)):
            assert errno_of(lambda f=flags, s=size, h=hva: vm.set_user_memory_region(1, f, GPA, s, h)) == "EINVAL"


def generation_steps(vm: Vm, *calls: Callable[[], object]) -> list[int]:
    steps = []
    for call in calls:
        before = vm.memslots(0).generation
        errno_of(call)
        steps.append(vm.memslots(0).generation - before)
    return steps


def test_every_swap_of_a_slot_set_adds_the_number_of_spaces_to_its_generation() -> None:
    with Vm() as vm:
        assert [vm.memslots(as_id).generation for as_id in (0, 1)] == [0, 1]
        steps = generation_steps(
            vm,
            lambda: vm.set_user_memory_region(1, 0, GPA, PAGE, PAGE),  # create: one swap
            lambda: vm.set_user_memory_region(1, 0, GPA, PAGE, PAGE),  # nothing to do: none
            lambda: vm.set_user_memory_region(1, LOG, GPA, PAGE, PAGE),  # flags: one
            lambda: vm.set_user_memory_region(1, LOG, 2 * GPA, PAGE, PAGE),  # move: INVALID, then the new place
            lambda: vm.set_user_memory_region(1, LOG, 1 << 50, PAGE, PAGE),  # refused move: INVALID and back
            lambda: vm.set_user_memory_region(1, 0, 0, 0, 0),  # delete: INVALID, then gone
        )
        assert steps == [2, 0, 2, 4, 4, 4]
        assert vm.memslots(1).generation == 1


def test_the_generation_says_that_a_change_is_in_progress_and_the_slot_is_invalid_meanwhile() -> None:
    with Vm() as vm:
        vm.set_user_memory_region(1, 0, GPA, PAGE, PAGE)
        seen: list[tuple[str, bool, bool | None]] = []

        def look(point: str) -> None:
            slot = vm.gfn_to_slot(0, GPA >> 12)
            seen.append((point, vm.memslots(0).update_in_progress, slot.invalid if slot else None))

        vm.race_hook = look
        vm.set_user_memory_region(1, 0, 0, 0, 0)
        vm.race_hook = None
        assert seen == [
            ("memslot: in progress", True, True),
            ("memslot: invalid", False, True),
            ("memslot: in progress", True, None),
        ]
        assert not vm.memslots(0).generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS


@pytest.mark.parametrize("as_id", [0, 1])
def test_a_wrap_of_the_mmio_generation_zaps_everything_in_whichever_space(as_id: int) -> None:
    with Vm() as vm:
        zaps: list[int] = []
        original = vm.mmu.zap_all_fast
        vm.mmu.zap_all_fast = lambda: (zaps.append(1), original())[1]  # type: ignore[method-assign]
        mask = generation_mask(vm.mmu.fmt)
        vm.memslots(as_id).generation = mask - 1 + as_id
        vm.set_user_memory_region(as_id << 16 | 1, 0, GPA, PAGE, PAGE)
        assert len(zaps) == 1
        vm.set_user_memory_region(as_id << 16 | 2, 0, 2 * GPA, PAGE, PAGE)
        assert len(zaps) == 1


def test_the_log_survives_a_move_and_not_a_logging_pause_nor_deletion() -> None:
    with Vm() as vm:
        hva = vm.alloc_memory(PAGE)
        vm.set_user_memory_region(1, LOG, GPA, PAGE, hva)
        vcpu = vm.create_vcpu(0)
        vcpu.run([("w", GPA, 1)])
        vm.set_user_memory_region(1, LOG, 2 * GPA, PAGE, hva)
        assert bits(vm, 1, 1) == {0}
        vcpu.run([("w", 2 * GPA, 1)])
        vm.set_user_memory_region(1, 0, 2 * GPA, PAGE, hva)
        vm.set_user_memory_region(1, LOG, 2 * GPA, PAGE, hva)
        assert bits(vm, 1, 1) == set()
        vcpu.run([("w", 2 * GPA, 2)])
        vm.set_user_memory_region(1, 0, 0, 0, 0)
        vm.set_user_memory_region(1, LOG, GPA, PAGE, hva)
        assert bits(vm, 1, 1) == set()


@pytest.mark.parametrize("n_pages", [1, 63, 64, 65, 100, 128, 200])
def test_initially_set_logs_start_full_with_clean_tail_bits(n_pages: int) -> None:
    with Vm() as vm:
        vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (3,))
        vm.set_user_memory_region(1, LOG, GPA, n_pages * PAGE, PAGE)
        assert bits(vm, 1, n_pages) == set(range(n_pages))
        vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (1,))
        vm.set_user_memory_region(2, LOG, 2 * GPA, n_pages * PAGE, PAGE)
        assert bits(vm, 2, n_pages) == set()


def test_deleting_a_slot_zaps_the_whole_vm_unless_the_quirk_is_off() -> None:
    for quirk in (True, False):
        with Vm(VmConfig(quirk_slot_zap_all=quirk, pml=False)) as vm:
            hva = vm.alloc_memory(2 * PAGE)
            vm.set_user_memory_region(1, 0, GPA, PAGE, hva)
            vm.set_user_memory_region(2, 0, 2 * GPA, PAGE, hva + PAGE)
            vcpu = vm.create_vcpu(0)
            vcpu.run([("w", GPA, 1), ("w", 2 * GPA, 1)])
            assert vm.stats_read()["pages_4k"] == 2
            vm.set_user_memory_region(1, 0, 0, 0, 0)
            assert vm.stats_read()["pages_4k"] == (0 if quirk else 1)


def test_the_vm_counts_pages_and_logging_slots() -> None:
    with Vm() as vm:
        vm.set_user_memory_region(1, LOG, GPA, 3 * PAGE, PAGE)
        vm.set_user_memory_region(2, 0, 2 * GPA, PAGE, PAGE)
        vm.set_user_memory_region(2, LOG, 2 * GPA, PAGE, PAGE)
        assert (vm.regions.nr_memslot_pages, vm.regions.nr_memslots_dirty_logging) == (4, 2)
        vm.set_user_memory_region(1, 0, 0, 0, 0)
        vm.set_user_memory_region(2, 0, 2 * GPA, PAGE, PAGE)
        assert (vm.regions.nr_memslot_pages, vm.regions.nr_memslots_dirty_logging) == (1, 0)


def test_huge_pages_are_forbidden_at_ragged_ends_and_where_addresses_are_not_congruent() -> None:
    ragged = Memslot(0, 1, 256, 512 * 3, 256 * PAGE)
    assert [ragged.arch.disallow_lpage(gfn, 2) for gfn in (256, 512, 1024, 1791)] == [1, 0, 0, 1]
    assert ragged.arch.disallow_lpage(512, 3) == 1
    shifted = Memslot(0, 1, 512, 512 * 3, 513 * PAGE)
    assert all(shifted.arch.disallow_lpage(gfn, 2) for gfn in (512, 1024, 1536))
    shifted.arch.update_disallow_lpage(512, 1)
    assert shifted.arch.disallow_lpage(512, 2) == 2


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8), st.integers(0, 60))
def test_lookup_by_gfn_equals_a_search_of_all_slots(wanted: list[tuple[int, int]], gfn: int) -> None:
    memslots = Memslots(0)
    for id, (base, n_pages) in enumerate(wanted):
        if not memslots.overlaps(id, base, base + n_pages):
            memslots.insert(Memslot(0, id, base, n_pages, 0))
    found = [slot for slot in memslots if gfn in slot]
    assert memslots.gfn_to_slot(gfn) is (found[0] if found else None)
    assert [slot.base_gfn for slot in memslots] == sorted(slot.base_gfn for slot in memslots)
