"""Damage done on purpose to the log, the rings, the TLBs and the references is found, and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from migsim.kvm.config import VmConfig
from migsim.kvm.invariants import counter_violations
from migsim.kvm.ioctl import KVM_CAP_DIRTY_LOG_RING, KVM_DIRTY_GFN_F_RESET, Vcpu, Vm
from migsim.kvm.nested import GuestPte, NestedGuest
from migsim.kvm.paging import Sptep
from migsim.kvm.tlb import Translation

PAGE = 4096
BASE, N = 0x200, 200
WP = VmConfig(pml=False)
CONFIGS = pytest.mark.parametrize("config", [VmConfig(), WP, VmConfig(vendor="amd")], ids=["pml", "wrprot", "npt"])


def logged(config: VmConfig, *, ring: bool = False) -> tuple[Vm, Vcpu]:
    vm = Vm(config, bulk=False)
    if ring:
        vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, 0, (16384,))
    vm.set_user_memory_region(1, 1, BASE * PAGE, N * PAGE, vm.alloc_memory(N * PAGE))
    return vm, vm.create_vcpu(0)


def store(vcpu: Vcpu, *pages: int) -> None:
    vcpu.run([("w", (BASE + page) * PAGE, 1) for page in pages])


def leaf(vm: Vm, page: int, as_id: int = 0) -> tuple[Any, Sptep, int]:
    root = vm.mmu.valid_roots(as_id)[0]
    at, spte, _ = list(root.walk(BASE + page))[-1]
    return root, at, spte


def let_stores_pass(vm: Vm, page: int, as_id: int = 0) -> None:
    root, at, spte = leaf(vm, page, as_id)
    root.write(at, spte | vm.mmu.fmt.writable | vm.mmu.fmt.dirty)


def found(vm: Vm, sentence: str) -> bool:
    return any(sentence in violation for violation in vm.invariants())


# -- no clean page without a trap --------------------------------------------------------------------------------------


@CONFIGS
def test_a_clean_page_of_a_ring_vm_must_not_be_writable_unseen(config: VmConfig) -> None:
    vm, vcpu = logged(config, ring=True)
    store(vcpu, 3, 4)
    assert not vm.invariants(), "writable, and named by the ring"
    vcpu.ring.harvest()
    assert not vm.invariants(), "harvested is not reset: the entry still answers for the page"
    vm.reset_dirty_rings()
    assert not vm.invariants()
    let_stores_pass(vm, 3)
    assert found(vm, "page 3: clean, yet SPTE") and not found(vm, "page 4: clean")


def test_an_entry_of_another_slot_is_no_excuse() -> None:
    vm, vcpu = logged(WP, ring=True)
    store(vcpu, 3)
    vcpu.dirty_ring.entries["slot"][0] = 2  # type: ignore[union-attr]
    assert found(vm, "page 3: clean, yet SPTE")


def test_a_ring_reset_that_re_arms_nothing_is_found() -> None:
    vm, vcpu = logged(WP, ring=True)
    store(vcpu, 3)
    vcpu.ring.harvest()
    vm.mmu.enable_log_dirty_pt_masked = lambda slot, offset, mask: None  # type: ignore[method-assign]
    vm.reset_dirty_rings()
    assert found(vm, "page 3: clean, yet SPTE")


def test_what_pml_has_logged_in_the_other_address_space_is_no_excuse() -> None:
    vm, vcpu = logged(VmConfig())
    vm.set_user_memory_region(1 << 16 | 1, 1, BASE * PAGE, N * PAGE, vm.alloc_memory(N * PAGE))
    store(vcpu, 3)
    for slot in (1, 1 << 16 | 1):
        vm.get_dirty_log(slot, np.zeros(4, dtype=np.uint64))
    let_stores_pass(vm, 3)
    vcpu.smm = True
    vcpu.load_root()
    vcpu.pml.log((BASE + 3) * PAGE)
    assert found(vm, "slot 0x1 page 3: clean, yet SPTE")
    vcpu.smm = False
    assert not found(vm, "slot 0x1 page 3: clean, yet SPTE"), "in its own space it is in the log already"


@pytest.mark.parametrize("mmu", ["tdp", "shadow"])
@pytest.mark.parametrize("pml", [True, False])
def test_a_nested_guest_must_not_store_to_a_clean_page_unseen(mmu: str, pml: bool) -> None:
    vm, vcpu = logged(VmConfig(mmu=mmu, pml=pml))  # type: ignore[arg-type]
    tables = 0x1000
    vm.set_user_memory_region(2, 0, tables * PAGE, 16 * PAGE, vm.alloc_memory(16 * PAGE))
    l2 = NestedGuest(vm, tables)
    for depth in range(3):
        l2.write_entry(vcpu, tables + depth, 0, GuestPte(tables + depth + 1))
    l2.write_entry(vcpu, tables + 3, 7, GuestPte(BASE + 3, leaf=True))
    vcpu.enter_guest_mode(l2)
    vcpu.run([("w", 7 * PAGE, 1)])
    assert not vm.invariants()
    slot = vm.gfn_to_slot(0, BASE)
    assert slot is not None and slot.dirty_bitmap is not None
    slot.dirty_bitmap.clear(3)
    assert found(vm, "page 3: clean, yet SPTE") and found(vm, "of a nested guest lets stores pass")
    ((_, _, entry),) = vm.mmu.shadow.rmap.shadowed_in(0, BASE + 3, BASE + 4)
    entry.table.write(entry.at, entry.table.read(entry.at) & ~vm.mmu.fmt.writable)
    assert found(vm, "page 3: clean, yet vCPU 0 may store unseen from L2") and not found(vm, "lets stores pass")
    vm.flush_remote_tlbs()
    assert not vm.invariants()


@pytest.mark.parametrize("ring", [False, True])
def test_a_translation_that_outlives_the_log_bit_is_found(ring: bool) -> None:
    vm, vcpu = logged(WP, ring=ring)
    store(vcpu, 3)
    _, _, spte = leaf(vm, 3)
    vm.dirty_log.flush = lambda slot: None  # type: ignore[method-assign]
    vm.dirty_rings.flush = lambda: None  # type: ignore[method-assign]
    if ring:
        vcpu.ring.harvest()
        vm.reset_dirty_rings()
    else:
        vm.get_dirty_log(1, np.zeros(4, dtype=np.uint64))
    assert found(vm, "page 3: clean, yet vCPU 0 may store unseen") and found(vm, "stale translation")
    vcpu.tlb.flush()
    vcpu.tlb.insert(vcpu.root, Translation(BASE + 3, 1, vm.mmu.fmt.pfn(spte) + 1, False, False))
    assert found(vm, "the SPTE names another frame")


def test_a_bit_beyond_the_slot_is_found() -> None:
    vm, _ = logged(WP)
    slot = vm.gfn_to_slot(0, BASE)
    assert slot is not None and slot.dirty_bitmap is not None
    slot.dirty_bitmap.words[-1] |= np.uint64(1 << 63)
    assert found(vm, f"bits beyond page {N}")


# -- rings -------------------------------------------------------------------------------------------------------------


def test_an_empty_entry_between_the_indices_is_found() -> None:
    vm, vcpu = logged(WP, ring=True)
    store(vcpu, 3, 4)
    vcpu.ring.entries["flags"][1] = 0
    assert found(vm, "ring entry 1 is empty")


def test_an_entry_given_back_out_of_order_is_found() -> None:
    vm, vcpu = logged(WP, ring=True)
    store(vcpu, 3, 4)
    vcpu.ring.entries["flags"][1] = KVM_DIRTY_GFN_F_RESET
    assert found(vm, "ring entry 1 was given back before one that was pushed earlier")


def test_a_ring_that_is_full_to_the_last_entry_is_found() -> None:
    vm, vcpu = logged(WP, ring=True)
    ring = vcpu.dirty_ring
    assert ring is not None
    while ring.used < ring.size - 1:
        ring.push(1, 0)
    assert not vm.invariants()
    ring.push(1, 0)
    assert found(vm, f"ring of {ring.size} entries uses {ring.size}")


# -- references --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [1, -1])
def test_a_reference_nobody_holds_and_one_too_few_are_found(by: int) -> None:
    vm, vcpu = logged(WP)
    store(vcpu, 3)
    root = vm.mmu.valid_roots(0)[0]
    root.root_count += by
    assert any("holders are known" in sentence for sentence in counter_violations(vm.mmu.state))
    root.root_count -= by
    assert not vm.invariants()


def test_references_of_an_invalid_root_are_its_holders_alone() -> None:
    vm, vcpu = logged(WP)
    store(vcpu, 3)
    root = vm.mmu.valid_roots(0)[0]
    vm.mmu.zap_all_fast()
    assert root.invalid and root.root_count == 1 and not vm.invariants()
    vm.mmu.state.roots._roots.remove(root)
    assert found(vm, "has loaded Root(") and found(vm, "which was freed")


def test_a_table_that_waits_to_be_freed_though_nobody_reads_is_found() -> None:
    vm, vcpu = logged(WP)
    store(vcpu, 3)
    vm.mmu.state.rcu._deferred.append(lambda: None)
    assert any("1 table pages wait to be freed" in sentence for sentence in counter_violations(vm.mmu.state))
    with vm.mmu.state.rcu.read():
        assert not list(counter_violations(vm.mmu.state)), "a reader may still be inside"
