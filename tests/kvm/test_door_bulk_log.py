"""The log chunk by chunk leaves exactly what the log word by word leaves: bits, SPTEs, page counts, huge pages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.kvm.ioctl import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, Vm, VmConfig

PAGE = 4096
REGION = 512
GPA = 1 << 30
CONFIGS = {
    "pml": VmConfig(),
    "wrprot": VmConfig(pml=False),
    "lazy-split": VmConfig(pml=False, eager_page_split=False),
    "lazy-split-pml": VmConfig(eager_page_split=False),
    "npt": VmConfig(vendor="amd"),
    "no-ad": VmConfig(ad_bits=False),
    "5.10": VmConfig(mmu="tdp-5.10"),
}
N = 3 * REGION + 70


def guest(config: VmConfig, bulk: bool, manual: int, level: int) -> Vm:
    vm = Vm(replace(config, smm=False), bulk=bulk)
    vm.bulk_kernel.min_pages = 1
    vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (manual,))
    hva = vm.alloc_memory(4 * REGION * PAGE, level)
    vm.set_user_memory_region(1, 0, GPA, N * PAGE, hva)
    vm.create_vcpu(0).run([("w", GPA + page * PAGE, 1) for page in range(0, N, 37)])
    vm.set_user_memory_region(1, 1, GPA, N * PAGE, hva)
    return vm


def picture(vm: Vm) -> tuple[object, ...]:
    root = vm.mmu.root_of(vm.vcpus[0])
    first = GPA >> 12
    sptes = []
    for gfn in range(first, first + N):
        spte, level = vm.mmu.walk(root, gfn)
        sptes.append((level, spte if vm.mmu.fmt.is_leaf(spte, level) else vm.mmu.fmt.is_present(spte)))
    slot = vm.memslots(0).by_id(1)
    assert slot is not None and slot.dirty_bitmap is not None
    stats = vm.stats_read()
    counts = {name: stats[name] for name in ("pages_4k", "pages_2m", "remote_tlb_flush", "pf_taken", "pf_fast")}
    return sptes, slot.dirty_bitmap.slice_words(0, N).tolist(), counts, len(vm.vcpus[0].tlb)


step = st.one_of(
    st.tuples(st.just("store"), st.lists(st.integers(0, N - 1), min_size=1, max_size=6)),
    st.tuples(st.just("load"), st.lists(st.integers(0, N - 1), min_size=1, max_size=3)),
    st.tuples(st.just("get"), st.just([])),
    st.tuples(st.just("clear"), st.lists(st.integers(0, N - 1), min_size=1, max_size=5)),
    st.tuples(st.just("clear-from"), st.lists(st.integers(0, N - 1), min_size=1, max_size=1)),
)


def play(vm: Vm, act: str, pages: list[int]) -> list[int]:
    if act in ("store", "load"):
        vm.vcpus[0].run([("w" if act == "store" else "r", GPA + page * PAGE, 7) for page in pages])
        return []
    bitmap = np.zeros(-(-N // 64), dtype=np.uint64)
    if act == "get":
        vm.get_dirty_log(1, bitmap)
        return [int(word) for word in bitmap]
    if act == "clear":
        for page in pages:
            bitmap[page >> 6] |= np.uint64(0xFF << (page & 63) & (2**64 - 1))
        vm.clear_dirty_log(1, 0, N, bitmap)
    else:
        first = pages[0] & -64
        bitmap[:] = np.uint64(2**64 - 1)
        vm.clear_dirty_log(1, first, N - first, bitmap)
    return []


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(CONFIGS)), st.sampled_from([0, 1, 3]), st.sampled_from([1, 2]), st.lists(step, max_size=8)
)
def test_both_kernels_leave_the_same_state(
    name: str, manual: int, level: int, script: list[tuple[str, list[int]]]
) -> None:
    with guest(CONFIGS[name], True, manual, level) as bulk, guest(CONFIGS[name], False, manual, level) as words:
        for act, pages in script:
            assert play(bulk, act, pages) == play(words, act, pages)
            assert picture(bulk) == picture(words), (act, pages)
        assert not bulk.invariants()


def test_large_aligned_slots_are_served_in_bulk_unless_somebody_watches() -> None:
    with Vm() as vm:
        for id, (gpa, n_pages) in enumerate(((GPA, 1 << 20), (GPA * 8 + PAGE, 1 << 20), (GPA * 16, 64))):
            vm.set_user_memory_region(id, 1, gpa, n_pages * PAGE, GPA)
        large, ragged, small = vm.memslots(0)
        assert vm.log_kernel(large) is vm.bulk_kernel
        assert vm.log_kernel(ragged) is vm.word_kernel and vm.log_kernel(small) is vm.word_kernel
        vm.race_hook = lambda point: None
        assert vm.log_kernel(large) is vm.word_kernel
    with Vm(bulk=False) as vm:
        vm.set_user_memory_region(1, 1, GPA, PAGE << 20, GPA)
        assert vm.log_kernel(next(iter(vm.memslots(0)))) is vm.word_kernel


@pytest.mark.parametrize("manual", [0, 3])
def test_a_64_gib_log_is_got_and_cleared_without_looking_at_pages(manual: int) -> None:
    n_pages = 16 << 20
    with Vm(VmConfig(smm=False)) as vm:
        vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (manual,))
        vm.set_user_memory_region(1, 1, 4 * GPA, n_pages * PAGE, vm.alloc_memory(n_pages * PAGE, 2))
        vcpu = vm.create_vcpu(0)
        written = [0, 63, 64, 262144, n_pages - 1]
        bitmap = np.zeros(n_pages // 64, dtype=np.uint64)
        if manual:
            vm.get_dirty_log(1, bitmap)
            assert int(np.bitwise_count(bitmap).sum()) == n_pages
            vm.clear_dirty_log(1, 0, n_pages, bitmap)
        for _ in range(2):
            vcpu.run([("w", 4 * GPA + page * PAGE, 1) for page in written])
            vm.get_dirty_log(1, bitmap)
            assert [int(i) for i in np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little"))] == written
            if manual:
                vm.clear_dirty_log(1, 0, n_pages, bitmap)
