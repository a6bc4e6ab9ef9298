"""KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG: refusals in KVM's order, what is cleared, what is re-armed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.kvm.ioctl import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_EXIT_INTR,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    Vcpu,
    Vm,
    VmConfig,
)

PAGE = 4096
LOG = KVM_MEM_LOG_DIRTY_PAGES
GPA = 0x200000
CONFIGS = {
    "pml": VmConfig(),
    "wrprot": VmConfig(pml=False),
    "no-ad": VmConfig(ad_bits=False),
    "npt": VmConfig(vendor="amd"),
    "5.10": VmConfig(mmu="tdp-5.10"),
    "5.10-wrprot": VmConfig(mmu="tdp-5.10", pml=False),
    "shadow": VmConfig(mmu="shadow", pml=False),
    "emulated": VmConfig(instruction_emulation=True),
}


def errno_of(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def words(n_pages: int, pages: set[int] | None = None) -> np.ndarray:
    bitmap = np.zeros(-(-n_pages // 64), dtype=np.uint64)
    for page in range(n_pages) if pages is None else pages:
        bitmap[page >> 6] |= np.uint64(1 << (page & 63))
    return bitmap


def get(vm: Vm, n_pages: int, slot: int = 1) -> set[int]:
    bitmap = words(n_pages, set())
    vm.get_dirty_log(slot, bitmap)
    return {i for i in range(len(bitmap) * 64) if int(bitmap[i >> 6]) >> (i & 63) & 1}


@pytest.fixture(params=list(CONFIGS))
def vm(request: pytest.FixtureRequest) -> Iterator[Vm]:
    with Vm(CONFIGS[request.param]) as made:
        yield made


def small(vm: Vm, n_pages: int, flags: int = LOG, manual: int = 0) -> Vcpu:
    if manual:
        vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (manual,))
    vm.set_user_memory_region(1, flags, GPA, n_pages * PAGE, vm.alloc_memory(n_pages * PAGE))
    return vm.create_vcpu(0)


def store(vcpu: Vcpu, *pages: int) -> None:
    exit = vcpu.run([("w", GPA + page * PAGE, page + 1) for page in pages])
    assert exit.done == len(pages), exit


def test_get_reports_each_store_once_and_protects_again(vm: Vm) -> None:
    vcpu = small(vm, 100)
    store(vcpu, 0, 63, 64, 99)
    assert get(vm, 100) == {0, 63, 64, 99}
    assert get(vm, 100) == set()
    store(vcpu, 99, 99, 5)
    assert get(vm, 100) == {5, 99}
    assert not vm.invariants()


def test_enabling_the_log_on_a_mapped_slot_catches_the_next_store(vm: Vm) -> None:
    vcpu = small(vm, 70, flags=0)
    store(vcpu, *range(70))
    hva = vm.memslots(0).by_id(1).userspace_addr  # type: ignore[union-attr]
    vm.set_user_memory_region(1, LOG, GPA, 70 * PAGE, hva)
    assert get(vm, 70) == set()
    store(vcpu, 3, 65)
    assert get(vm, 70) == {3, 65}


def test_manual_get_only_copies_and_clear_takes_what_is_named(vm: Vm) -> None:
    vcpu = small(vm, 100, manual=1)
    store(vcpu, 1, 2, 70)
    assert get(vm, 100) == {1, 2, 70} == get(vm, 100)
    store(vcpu, 1)
    vm.clear_dirty_log(1, 0, 64, words(64, {1, 9}))
    assert get(vm, 100) == {2, 70}
    store(vcpu, 1)
    assert get(vm, 100) == {1, 2, 70}
    vm.clear_dirty_log(1, 64, 36, words(64, set(range(64))))
    assert get(vm, 100) == {1, 2}
    assert not vm.invariants()


def test_initially_set_protects_nothing_until_cleared(vm: Vm) -> None:
    vcpu = small(vm, 130, flags=0, manual=3)
    store(vcpu, *range(130))
    hva = vm.memslots(0).by_id(1).userspace_addr  # type: ignore[union-attr]
    flushes = vm.stats_read()["remote_tlb_flush"]
    vm.set_user_memory_region(1, LOG, GPA, 130 * PAGE, hva)
    if vm.config.mmu != "tdp-5.10":  # which protected huge pages and flushed
        assert vm.stats_read()["remote_tlb_flush"] == flushes
    assert get(vm, 130) == set(range(130))
    vm.clear_dirty_log(1, 0, 130, words(130))
    assert get(vm, 130) == set()
    store(vcpu, 64, 129)
    assert get(vm, 130) == {64, 129}
    assert not vm.invariants()


def test_clear_of_pages_that_are_clean_re_arms_nothing() -> None:
    with Vm(CONFIGS["wrprot"]) as vm:
        vcpu = small(vm, 64, manual=1)
        store(vcpu, 1)
        vm.clear_dirty_log(1, 0, 64, words(64, {1}))
        store(vcpu, 1)
        before = vm.stats_read()
        vm.clear_dirty_log(1, 0, 64, words(64, {2}))
        assert vm.stats_read() == before
        store(vcpu, 1)
        assert vm.stats_read()["pf_taken"] == before["pf_taken"]


@pytest.mark.parametrize(
    ("n_pages", "first", "count", "expected"),
    [
        (100, 0, 64, "ok"), (100, 0, 65, "EINVAL"), (100, 0, 99, "EINVAL"), (100, 0, 100, "ok"),
        (100, 0, 128, "EINVAL"), (100, 64, 36, "ok"), (100, 64, 64, "EINVAL"), (100, 64, 0, "ok"), (100, 0, 0, "ok"),
        (100, 128, 0, "EINVAL"), (100, 1, 64, "EINVAL"), (128, 128, 0, "ok"), (200, 192, 8, "ok"),
        (200, 64, 136, "ok"), (200, 64, 128, "ok"), (200, 192, 64, "EINVAL"), (200, 0, 0xFFFFFFC0, "EINVAL"),
        (200, 1 << 63, 64, "EINVAL"),
    ],
)  # fmt: skip
def test_clear_accepts_the_ranges_a_real_kvm_accepts(n_pages: int, first: int, count: int, expected: str) -> None:
    with Vm() as vm:
        small(vm, n_pages)
        mask = np.zeros(4, dtype=np.uint64)
        assert errno_of(lambda: vm.clear_dirty_log(1, first, count, mask)) == expected


def test_errors_come_in_kvms_order() -> None:
    with Vm() as vm:
        small(vm, 100)
        vm.set_user_memory_region(2, 0, 2 * GPA, PAGE, PAGE)
        mask = words(128)
        clear = vm.clear_dirty_log
        assert errno_of(lambda: clear(7 << 16, 1, 64, None)) == "EINVAL"
        assert errno_of(lambda: clear(32764, 0, 64, None)) == "EINVAL"
        assert errno_of(lambda: clear(9, 1, 64, None)) == "EINVAL"  # first_page before the slot is looked up
        assert errno_of(lambda: clear(9, 0, 64, None)) == "ENOENT"
        assert errno_of(lambda: clear(2, 0, 64, None)) == "ENOENT"
        assert errno_of(lambda: clear(1, 0, 65, None)) == "EINVAL"  # the range before the pointer
        assert errno_of(lambda: clear(1, 0, 64, None)) == "EFAULT"
        assert errno_of(lambda: clear(1, 64, 0, None)) == "ok"
        assert errno_of(lambda: vm.get_dirty_log(2, None)) == "ENOENT"
        assert errno_of(lambda: vm.get_dirty_log(1, None)) == "EFAULT"
        mask.flags.writeable = False
        assert errno_of(lambda: vm.get_dirty_log(1, mask)) == "EFAULT"
        assert errno_of(lambda: clear(1, 0, 64, mask)) == "ok"


def test_efault_loses_the_bits_unless_they_are_cleared_by_hand() -> None:
    for manual, left in ((0, set()), (1, {3})):
        with Vm() as vm:
            vcpu = small(vm, 10, manual=manual)
            store(vcpu, 3)
            assert errno_of(lambda v=vm: v.get_dirty_log(1, None)) == "EFAULT"
            assert get(vm, 10) == left
            store(vcpu, 3)
            assert get(vm, 10) == {3}


def test_ring_vms_have_no_log() -> None:
    with Vm() as vm:
        vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, 0, (1 << 20,))
        small(vm, 10)
        assert errno_of(lambda: vm.get_dirty_log(99 << 16, None)) == "ENXIO"
        assert errno_of(lambda: vm.clear_dirty_log(99 << 16, 1, 1, None)) == "ENXIO"


def test_readonly_slots_log_nothing(vm: Vm) -> None:
    vcpu = small(vm, 10, flags=LOG | KVM_MEM_READONLY)
    exit = vcpu.run([("r", GPA, 0), ("w", GPA, 1), ("w", GPA + PAGE, 1)])
    assert (exit.reason, exit.done, exit.data) == (6, 1, (0,))
    assert exit.mmio is not None and exit.mmio[:2] == (GPA, True)
    assert get(vm, 10) == set()


def test_the_vmms_own_stores_are_not_logged(vm: Vm) -> None:
    vcpu = small(vm, 10)
    hva = vm.memslots(0).by_id(1).userspace_addr  # type: ignore[union-attr]
    vm.host_write(hva + PAGE, b"\1\2\3\4")
    assert get(vm, 10) == set()
    assert vcpu.run([("r", GPA + PAGE, 0)]).data == (0x04030201,)
    store(vcpu, 2)
    assert vm.host_read(hva + 2 * PAGE, 4) == (3).to_bytes(4, "little")


def test_kvms_own_writes_are_logged_each_in_its_way() -> None:
    with Vm() as vm:
        vcpu = small(vm, 10)
        vm.access.write_guest(GPA + PAGE - 2, b"abcd")
        assert get(vm, 10) == {0, 1}
        vcpu.set_msr(0x4B564D01, GPA + 5 * PAGE | 1)
        assert get(vm, 10) == set()
        vcpu.run([])
        assert get(vm, 10) == {5}
        vcpu.run([])
        assert get(vm, 10) == set()
        assert vm.access.compare_exchange(GPA + 7 * PAGE, 1, 2, vcpu) is False
        assert get(vm, 10) == {7}
        assert vm.access.compare_exchange(GPA + 7 * PAGE, 0, 2, vcpu) is True
        assert errno_of(lambda: vm.access.write_guest(0, b"x")) == "EFAULT"


def test_both_address_spaces_log_apart() -> None:
    with Vm() as vm:
        vcpu = small(vm, 10)
        hva = vm.memslots(0).by_id(1).userspace_addr  # type: ignore[union-attr]
        vm.set_user_memory_region(1 << 16 | 1, LOG, GPA, 10 * PAGE, hva)
        vcpu.smm = True
        store(vcpu, 4)
        vcpu.smm = False
        store(vcpu, 6)
        assert get(vm, 10) == {6}
        assert get(vm, 10, 1 << 16 | 1) == {4}
        assert vcpu.run([("r", GPA + 4 * PAGE, 0)]).data == (5,)


def test_turning_manual_protection_on_and_off_acts_at_once_on_logged_slots(vm: Vm) -> None:
    vcpu = small(vm, 10)
    store(vcpu, 1)
    vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (3,))
    assert get(vm, 10) == {1} == get(vm, 10)
    vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (0,))
    assert get(vm, 10) == {1}
    assert get(vm, 10) == set()
    store(vcpu, 1)
    assert get(vm, 10) == {1}


RACES = ["log: synced", "log: taken", "log: protected", "log: before flush"]


@pytest.mark.parametrize("point", RACES)
def test_a_store_at_any_point_of_get_is_reported_then_or_next_time(vm: Vm, point: str) -> None:
    vcpu, other = small(vm, 100), vm.create_vcpu(1)
    store(vcpu, 7, 80)
    stored: list[int] = []

    def race(where: str) -> None:
        if where == point and not stored:
            exit = other.run([("w", GPA + 7 * PAGE, 1000)])
            assert exit.done == 1 or exit.reason == KVM_EXIT_INTR
            stored.append(exit.done)

    vm.race_hook = race
    first = get(vm, 100)
    vm.race_hook = None
    assert {7, 80} <= first and stored, point
    assert get(vm, 100) <= {7}
    assert not vm.invariants()
    store(other, 7)
    assert get(vm, 100) == {7}


def test_a_missing_flush_is_seen_by_the_invariants_and_loses_a_page() -> None:
    for name in ("pml", "wrprot"):
        vm = Vm(CONFIGS[name])
        vcpu = small(vm, 10)
        vm.flush_remote_tlbs_memslot = lambda slot: None  # type: ignore[method-assign]
        store(vcpu, 3)
        assert get(vm, 10) == {3}
        assert any("stale translation" in sentence for sentence in vm.invariants())
        store(vcpu, 3)
        assert get(vm, 10) == set()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(CONFIGS)),
    st.integers(1, 200),
    st.sampled_from([0, 1, 3]),
    st.lists(st.tuples(st.sampled_from("wwrgcm"), st.integers(0, 199), st.integers(0, 2**200 - 1)), max_size=25),
)
def test_no_store_is_ever_missing_from_the_log(
    config: str, n_pages: int, manual: int, script: list[tuple[str, int, int]]
) -> None:
    with Vm(CONFIGS[config]) as vm:
        vcpu = small(vm, n_pages, manual=manual)
        must: set[int] = set(range(n_pages)) if manual == 3 else set()
        may = set(must)
        for act, at, bits in script:
            page = at % n_pages
            if act in "rw":
                vcpu.run([(act, GPA + page * PAGE, 1)])
                may.add(page)
                must |= {page} if act == "w" else set()
            elif act == "g":
                seen = get(vm, n_pages)
                assert must <= seen <= may
                must, may = (must, may) if manual else (set(), set())
            elif act == "c":
                first = page & -64
                named = {i for i in range(n_pages - first) if bits >> i & 1}
                vm.clear_dirty_log(1, first, n_pages - first, words(n_pages - first, named))
                must -= {first + i for i in named}
                may -= {first + i for i in named}
            assert not vm.invariants()


def test_lazy_writers_deliver_before_anybody_looks() -> None:
    with Vm() as vm:
        vcpu = small(vm, 100, manual=1)
        slot = vm.memslots(0).by_id(1)
        assert slot is not None
        asked: list[tuple[int, int]] = []

        def deliver(of: object, first: int, n_pages: int) -> None:
            assert of is slot
            asked.append((first, n_pages))
            store(vcpu, first)

        vm.observer = deliver
        assert get(vm, 100) == {0}
        vm.clear_dirty_log(1, 64, 36, words(64, {0}))
        assert get(vm, 100) == {0}, "page 64 was delivered before it was cleared"
        vm.host_discard(slot.userspace_addr + 2 * PAGE, PAGE)
        assert asked == [(0, 100), (64, 36), (0, 100), (2, 1)]
        vm.observer = None
        assert get(vm, 100) == {0, 2}


def test_efault_and_refusals_come_after_and_before_the_writers_are_asked() -> None:
    with Vm() as vm:
        small(vm, 100)
        asked: list[int] = []
        vm.observer = lambda slot, first, n_pages: asked.append(n_pages)
        assert errno_of(lambda: vm.clear_dirty_log(1, 0, 65, None)) == "EINVAL"
        assert asked == []
        assert errno_of(lambda: vm.get_dirty_log(1, None)) == "EFAULT"
        assert asked == [100]
