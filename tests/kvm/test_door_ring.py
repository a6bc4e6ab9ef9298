"""Dirty rings: enabling, push, soft-full at entry, harvest, reset with coalescing, the quirks of a real KVM."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.kvm.dirty_ring import DirtyRing, RingView, coalesce
from migsim.kvm.ioctl import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_GFN_F_RESET,
    KVM_EXIT_DIRTY_RING_FULL,
    KVM_EXIT_HLT,
    KVM_MEM_LOG_DIRTY_PAGES,
    Vcpu,
    Vm,
    VmConfig,
)

PAGE = 4096
LOG = KVM_MEM_LOG_DIRTY_PAGES
GPA = 0x200000
RING = KVM_CAP_DIRTY_LOG_RING
WRPROT = VmConfig(pml=False)
EMULATED = VmConfig(pml=False, instruction_emulation=True)


def errno_of(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def ring_vm(config: VmConfig, n_pages: int, ring_bytes: int = 4096) -> tuple[Vm, Vcpu]:
    vm = Vm(config)
    vm.enable_cap(RING, 0, (ring_bytes,))
    vm.set_user_memory_region(1, LOG, GPA, n_pages * PAGE, vm.alloc_memory(n_pages * PAGE))
    return vm, vm.create_vcpu(0)


def stores(*pages: int) -> list[tuple[str, int, int]]:
    return [("w", GPA + page * PAGE, page) for page in pages]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "EINVAL"), (1, "EINVAL"), (2048, "EINVAL"), (4096, "ok"), (4097, "EINVAL"), (6144, "EINVAL"),
        (1 << 20, "ok"), (1 << 21, "E2BIG"), ((1 << 32) + 4096, "ok"), (1 << 32, "EINVAL"),
    ],
)  # fmt: skip
def test_ring_sizes_are_judged_as_a_real_kvm_does(size: int, expected: str) -> None:
    with Vm(WRPROT) as vm:
        assert errno_of(lambda: vm.enable_cap(RING, 7, (size,))) == expected
        assert errno_of(lambda: vm.enable_cap(RING, 0, (1 << 21,))) == "E2BIG"
        again = errno_of(lambda: vm.enable_cap(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 0, (4096,)))
        assert again == ("EINVAL" if expected == "ok" else "ok")


def test_with_pml_a_ring_must_hold_a_buffer_more() -> None:
    with Vm() as vm:
        assert errno_of(lambda: vm.enable_cap(RING, 0, (8192,))) == "EINVAL"
        vm.enable_cap(RING, 0, (16384,))
        ring = vm.create_vcpu(0).dirty_ring
        assert ring is not None and (ring.size, ring.soft_limit) == (1024, 1024 - 576)


def test_a_ring_comes_before_the_first_vcpu_and_bitmaps_beside_it_never() -> None:
    with Vm(WRPROT) as vm:
        vm.create_vcpu(0)
        assert errno_of(lambda: vm.enable_cap(RING, 0, (4096,))) == "EINVAL"
        assert errno_of(lambda: vm.enable_cap(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0, (0,))) == "EINVAL"
        assert errno_of(vm.reset_dirty_rings) == "EINVAL"
        with pytest.raises(RuntimeError):
            _ = vm.vcpus[0].ring
    with Vm(WRPROT) as vm:
        vm.enable_cap(RING, 0, (4096,))
        assert vm.reset_dirty_rings() == 0


def test_manual_protect_options() -> None:
    with Vm() as vm:
        cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        tried = (0, 1, 2, 3, 4, 5, 7, 1 << 32, 1 << 32 | 1)
        assert [a for a in tried if errno_of(lambda a=a: vm.enable_cap(cap, 0, (a,))) == "ok"] == [0, 1, 3]
        assert errno_of(lambda: vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1, (1,))) == "EINVAL"
        assert errno_of(lambda: vm.enable_cap(166, 0, (1,))) == "EINVAL"
        assert vm.check_extension(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) == 3 and vm.check_extension(166) == 0


@pytest.mark.parametrize("config", [WRPROT, VmConfig(), VmConfig(vendor="amd")], ids=["wrprot", "pml", "npt"])
def test_stores_are_pushed_harvested_and_noticed_again_after_reset(config: VmConfig) -> None:
    vm, vcpu = ring_vm(config, 300, 16384)
    with vm:
        vcpu.run(stores(1, 2, 2, 70, 1))
        assert vcpu.ring.harvest() == [(1, 1), (1, 2), (1, 70)]
        assert vm.reset_dirty_rings() == 3
        vcpu.run(stores(70, 1))
        assert vcpu.ring.harvest() == [(1, 70), (1, 1)]
        assert not vm.invariants()


def test_an_unreset_page_is_not_pushed_again() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    with vm:
        vcpu.run(stores(1))
        assert vcpu.ring.harvest() == [(1, 1)]
        vcpu.run(stores(1))
        assert vcpu.ring.harvest() == []


def test_emulated_stores_are_pushed_every_time() -> None:
    vm, vcpu = ring_vm(EMULATED, 10)
    with vm:
        vcpu.run(stores(1, 1, 2, 1))
        assert vcpu.ring.harvest() == [(1, 1), (1, 1), (1, 2), (1, 1)]


@pytest.mark.parametrize("config", [WRPROT, EMULATED], ids=["cpu", "emulated"])
def test_a_soft_full_ring_stops_the_vcpu_at_entry_until_enough_is_reset(config: VmConfig) -> None:
    vm, vcpu = ring_vm(config, 300)
    with vm:
        exit = vcpu.run(stores(*range(250)))
        assert exit.reason == KVM_EXIT_DIRTY_RING_FULL
        assert exit.done == 192 - (config is WRPROT), "on a CPU the store that filled the ring is still to come"
        assert vcpu.run([]).reason == KVM_EXIT_DIRTY_RING_FULL
        assert len(vcpu.ring.harvest(10)) == 10
        assert vcpu.run([]).reason == KVM_EXIT_DIRTY_RING_FULL, "harvested is not reset"
        assert vm.reset_dirty_rings() == 10
        assert vcpu.run(stores(0)).reason == KVM_EXIT_HLT


def test_reset_stops_at_the_first_entry_not_harvested() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    with vm:
        vcpu.run(stores(1, 2, 3))
        vcpu.ring.entries["flags"][1] = KVM_DIRTY_GFN_F_RESET
        assert vm.reset_dirty_rings() == 0
        vcpu.ring.entries["flags"][0] = KVM_DIRTY_GFN_F_RESET | 1
        assert vm.reset_dirty_rings() == 2
        assert list(vcpu.ring.entries["flags"][:4]) == [0, 0, 1, 0]
        assert list(vcpu.ring.entries["offset"][:3]) == [1, 2, 3], "slot and offset stay"


def test_entries_that_name_no_page_are_counted_and_ignored() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    with vm:
        vcpu.run(stores(1, 2, 3, 4))
        entries = vcpu.ring.entries
        entries["slot"][0], entries["slot"][1] = 9 << 16, 77
        entries["offset"][2] = 1000
        vcpu.ring.harvest()
        assert vm.reset_dirty_rings() == 4
        vcpu.run(stores(1, 2, 3, 4))
        assert vcpu.ring.harvest() == [(1, 4)], "only the sound entry was re-armed"


def test_an_offset_near_the_end_of_u64_does_not_wrap_into_the_slot() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    with vm:
        vcpu.run(stores(1, 2))
        vcpu.ring.entries["offset"][0] = 2**64 - 1
        vcpu.ring.harvest()
        seen: list[int] = []
        vm.mmu.enable_log_dirty_pt_masked = lambda slot, offset, mask: seen.append(offset)  # type: ignore[method-assign]
        assert vm.reset_dirty_rings() == 2
        assert seen == []


def test_resetting_what_was_never_pushed_counts_and_corrupts_the_index() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    with vm:
        vcpu.ring.entries["flags"][0] = KVM_DIRTY_GFN_F_RESET
        assert vm.reset_dirty_rings() == 1
        ring = vcpu.dirty_ring
        assert ring is not None and ring.used == 2**32 - 1
        assert vcpu.run(stores(1)).reason == KVM_EXIT_HLT, "soft-full is asked for by a push alone"
        assert ring.used == 0 and vm.warnings
        vcpu.ring.entries["flags"][1] = KVM_DIRTY_GFN_F_RESET
        assert vm.reset_dirty_rings() == 1
        assert any("reset what was not pushed" in sentence for sentence in vm.invariants())


def test_a_signal_ends_a_reset_early_with_the_count_so_far() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    with vm:
        vcpu.run(stores(1, 2, 3))
        vcpu.ring.harvest()
        asked: list[int] = []
        vm.signal_pending = lambda: len(asked) >= 2 or bool(asked.append(1))
        assert vm.reset_dirty_rings() == 2
        vm.signal_pending = lambda: False
        assert vm.reset_dirty_rings() == 1


def test_reset_bounds_how_many_entries_one_ioctl_takes() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    with vm:
        vcpu.run(stores(1, 2, 3))
        vcpu.ring.harvest()
        vm.dirty_rings.entries_max = 2
        assert vm.reset_dirty_rings() == 2


def test_a_write_by_kvm_with_no_vcpu_running_is_lost_with_a_warning() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    with vm:
        vm.access.write_guest(GPA, b"x")
        assert vcpu.ring.harvest() == [] and vm.warnings
        vm.access.write_guest(GPA, b"x", vcpu)
        assert vcpu.ring.harvest() == [(1, 0)]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_coalescing_keeps_every_page(offsets: list[int]) -> None:
    rearmed: set[int] = set()
    base, mask = offsets[0], 1
    for offset in offsets[1:]:
        joined = coalesce(base, mask, offset)
        if joined is None:
            rearmed |= {base + i for i in range(64) if mask >> i & 1}
            joined = offset, 1
        base, mask = joined
        assert 0 < mask < 2**64
    rearmed |= {base + i for i in range(64) if mask >> i & 1}
    assert rearmed == set(offsets)


def test_neighbours_share_one_re_arming_forward_and_backward() -> None:
    assert coalesce(100, 1, 163) == (100, 1 | 1 << 63)
    assert coalesce(100, 1, 164) is None
    assert coalesce(100, 1, 37) == (37, 1 << 63 | 1)
    assert coalesce(100, 1, 36) is None
    assert coalesce(100, 1 << 63, 99) is None, "a bit would be shifted out"


@given(st.lists(st.sampled_from(["push", "harvest", "reset"]), max_size=200))
def test_the_ring_never_loses_or_reorders_an_entry(script: list[str]) -> None:
    ring = DirtyRing(8, 2)
    view = RingView(ring.entries)
    pushed: list[tuple[int, int]] = []
    seen: list[tuple[int, int]] = []
    for act in script:
        if act == "push" and ring.used < ring.size:
            pushed.append((1, len(pushed)))
            ring.push(*pushed[-1])
        elif act == "harvest":
            seen += view.harvest()
        elif act == "reset":
            while ring.used and ring.harvested():
                ring.pop()
        assert view.used() == ring.used
    assert seen + view.harvest() == pushed
    assert np.all(ring.entries["flags"] != 1)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["wrprot", "pml", "npt", "emulated"]),
    st.lists(st.tuples(st.sampled_from("0011hrr"), st.lists(st.integers(0, 129), min_size=1, max_size=30)), max_size=9),
)
def test_no_store_is_ever_missing_from_the_rings(name: str, script: list[tuple[str, list[int]]]) -> None:
    config = {"wrprot": WRPROT, "pml": VmConfig(), "npt": VmConfig(vendor="amd"), "emulated": EMULATED}[name]
    vm, first = ring_vm(config, 130, 16384)
    with vm:
        vcpus = [first, vm.create_vcpu(1)]
        unseen: set[int] = set()  # stored and neither harvested since, nor covered by an entry not yet reset
        held: set[int] = set()  # harvested, not reset: a store to these need not be pushed again
        for act, pages in script:
            if act in "01":
                assert vcpus[int(act)].run(stores(*pages)).reason == KVM_EXIT_HLT
                unseen |= set(pages) - held
            elif act == "h" or act == "r":
                found = {offset for vcpu in vcpus for _, offset in vcpu.ring.harvest()}
                assert unseen <= found, "a store left no entry"
                unseen, held = set(), held | found
                if act == "r":
                    assert vm.reset_dirty_rings() >= len(found)
                    held = set()
            assert not vm.invariants()


def test_one_exit_may_push_a_whole_pml_buffer_past_the_soft_limit_and_never_past_the_end() -> None:
    n = 1500
    vm, vcpu = ring_vm(VmConfig(), n, 16384)
    with vm:
        ring = vcpu.dirty_ring
        assert ring is not None
        for _ in range(3):
            done, seen = 0, set()
            while done < n:
                exit = vcpu.run(stores(*range(done, n)))
                done += exit.done
                assert ring.used < ring.size
                seen |= {offset for _, offset in vcpu.ring.harvest()}
                vm.reset_dirty_rings()
            assert seen == set(range(n))


def test_an_entry_names_the_address_space_with_the_slot() -> None:
    vm, vcpu = ring_vm(WRPROT, 10)
    hva = vm.memslots(0).by_id(1).userspace_addr  # type: ignore[union-attr]
    vm.set_user_memory_region(1 << 16 | 1, LOG, GPA, 10 * PAGE, hva)
    vcpu.run(stores(4))
    vcpu.smm = True
    vcpu.run(stores(4, 6))
    assert vcpu.ring.harvest() == [(1, 4), (1 << 16 | 1, 4), (1 << 16 | 1, 6)]
    vm.reset_dirty_rings()
    assert not vm.invariants()
