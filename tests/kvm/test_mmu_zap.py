"""Zapping, MMU notifiers, aging and write protection of single gfns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migsim.kvm.changed_spte import handle_changed_spte, set_spte, zap_spte_atomic
from migsim.kvm.config import VmConfig
from migsim.kvm.mmu_lock import WouldBlock
from migsim.kvm.tdp_iter import for_each_tdp_pte
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.vintage import TDP_5_10, VINTAGES
from migsim.kvm.zap import zap_leafs
from migsim.sim.meter import CountingMeter

PAGE = 4096
TDP = VmConfig(smm=False)
MMUS = pytest.mark.parametrize("mmu", ["tdp", "tdp-5.10", "shadow"])


# -- zapping -------------------------------------------------------------------------------------------------------


def test_a_range_zap_takes_leaves_and_leaves_tables(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(0, 1, 511, 512, 1024)
    with guest.mmu.lock.write():
        assert zap_leafs(guest.mmu.state, guest.root, 1, 1024)
    guest.vm.flush_remote_tlbs()
    assert [gfn for gfn in (0, 1, 511, 512, 1024) if guest.mmu.fmt.is_present(guest.spte(gfn)[0])] == [0, 1024]
    assert guest.root.n_tables[1] == 3
    guest.close()


def test_5_10_takes_tables_that_lie_wholly_inside_the_range_along(mmu_guest) -> None:
    guest = mmu_guest(replace(TDP, mmu="tdp-5.10"), level=1)
    guest.write(0, 512, 1024)
    with guest.mmu.lock.write():
        zap_leafs(guest.mmu.state, guest.root, 1, 1024)
    guest.vm.flush_remote_tlbs()
    assert guest.root.n_tables[1] == 2 and guest.counts() == (2, 0, 0) and TDP_5_10.zaps_tables
    guest.close()


def test_zapping_needs_the_exclusive_lock(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(0)
    with pytest.raises(AssertionError, match="without the exclusive mmu_lock"):
        zap_leafs(guest.mmu.state, guest.root, 0, 1)
    guest.close()


def test_a_zap_under_the_read_lock_is_frozen_then_flushed_then_empty(mmu_guest, monkeypatch) -> None:
    guest = mmu_guest()
    guest.write(5)
    fmt, seen = guest.mmu.fmt, []
    at = list(guest.root.walk(5))[-1][0]
    honest = guest.vm.flush_remote_tlbs
    monkeypatch.setattr(guest.vm, "flush_remote_tlbs", lambda: seen.append(guest.root.read(at)) or honest())
    with guest.mmu.lock.read(), guest.mmu.state.rcu.read():
        for it in for_each_tdp_pte(guest.root, 5, 6):
            if it.is_leaf:
                assert zap_spte_atomic(guest.mmu.state, it)
    assert seen == [fmt.frozen] and guest.root.read(at) == fmt.nonpresent
    guest.close()


def test_a_walker_inside_a_table_removed_under_the_read_lock_sees_frozen_entries(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(5)
    leaf_at = list(guest.root.walk(5))[-1][0]
    with guest.mmu.lock.read(), guest.mmu.state.rcu.read():
        for it in for_each_tdp_pte(guest.root, 5, 6, 2):
            if it.level == 2:
                zap_spte_atomic(guest.mmu.state, it)
        assert guest.root.read(leaf_at) == guest.mmu.fmt.frozen
        assert guest.root.n_tables[1] == 1, "freed only when no reader is left"
    assert guest.root.n_tables[1] == 0 and guest.counts() == (0, 0, 0)
    guest.close()


def test_an_mmio_spte_goes_with_its_table_unseen_under_the_exclusive_lock(mmu_guest) -> None:
    guest = mmu_guest(level=1, pages=100)
    guest.write(5)
    guest.mmu.page_fault(guest.vcpu, 300 * PAGE, write=True)
    changed: list[int] = []
    guest.vm.trace_sink = lambda name, fields: (
        changed.append(fields["gfn"]) if name == "kvm_tdp_mmu_spte_changed" and fields["level"] == 1 else None
    )
    with guest.mmu.lock.write(), guest.mmu.state.rcu.read():
        for it in for_each_tdp_pte(guest.root, 0, 1, 2):
            if it.level == 2:
                set_spte(guest.mmu.state, it, guest.mmu.fmt.nonpresent)
    assert changed == [5] and not guest.root.mmio
    guest.vm.trace_sink = None
    guest.vm.flush_remote_tlbs()
    guest.close()


def test_a_present_leaf_must_not_change_its_frame_in_place(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(5)
    spte, _ = guest.spte(5)
    with pytest.raises(AssertionError, match=r"SPTE 0x\w+ -> 0x\w+ gfn 0x5 level 1: a present leaf changes its frame"):
        handle_changed_spte(guest.mmu.state, guest.root, 5, spte, spte ^ 1 << 20, 1, shared=False)
    with pytest.raises(AssertionError, match=r"gfn 0x5 level 2: gfn not aligned"):
        handle_changed_spte(guest.mmu.state, guest.root, 5, spte, 0, 2, shared=False)
    guest.close()


def test_plain_stores_keep_bits_the_cpu_sets_meanwhile(mmu_guest) -> None:
    """ba3a6120: a volatile SPTE is exchanged, so that D set since it was read still counts."""
    guest = mmu_guest(level=1)
    guest.write(5)
    guest.root.clear_bits(list(guest.root.walk(5))[-1][0], guest.mmu.fmt.dirty)
    it = next(it for it in for_each_tdp_pte(guest.root, 5, 6) if it.is_leaf)
    guest.mmu.set_dirty_bit(guest.vcpu, guest.root, 5)
    seen: list[int] = []
    guest.vm.trace_sink = lambda _, fields: seen.append(fields["old_spte"])
    with guest.mmu.lock.write(), guest.mmu.state.rcu.read():
        set_spte(guest.mmu.state, it, guest.mmu.fmt.nonpresent)
    guest.vm.trace_sink = None
    assert seen[0] & guest.mmu.fmt.dirty
    guest.vm.flush_remote_tlbs()
    guest.close()


@MMUS
@pytest.mark.parametrize("quirk", [True, False])
def test_deleting_a_slot_zaps_the_vm_or_only_the_slot(mmu_guest, mmu: str, quirk: bool) -> None:
    guest = mmu_guest(replace(TDP, mmu=mmu, quirk_slot_zap_all=quirk))
    hva = guest.vm.alloc_memory(512 * PAGE, 2)
    guest.vm.set_user_memory_region(2, 0, 4096 * PAGE, 512 * PAGE, hva)
    guest.write(5, 4096)
    guest.vm.set_user_memory_region(2, 0, 4096 * PAGE, 0, hva)
    assert guest.counts() == ((0, 0, 0) if quirk else (0, 1, 0))
    guest.write(5)
    guest.close()


# -- notifiers -----------------------------------------------------------------------------------------------------


@MMUS
def test_after_an_invalidation_nothing_maps_the_old_frame(mmu_guest, mmu: str) -> None:
    guest = mmu_guest(replace(TDP, mmu=mmu))
    guest.write(5, 600, 1100)
    start, end = guest.hva + 512 * PAGE, guest.hva + 1024 * PAGE
    guest.mmu.invalidate_range_start(start, end)
    assert not guest.mmu.fmt.is_present(guest.spte(600)[0]) and guest.vcpu.tlb.lookup(guest.root, 600) is None
    frame = guest.vm.host.replace(start)
    guest.mmu.invalidate_range_end(start, end)
    guest.write(512, 600)
    assert guest.mmu.fmt.pfn(guest.spte(512)[0]) == frame and guest.spte(600)[1] == 1
    assert guest.spte(5)[1] == guest.spte(1100)[1] == 2
    guest.close()


@pytest.mark.parametrize(("mmu", "locks"), [("tdp", 0), ("tdp-5.10", 2)])
def test_a_notifier_over_memory_that_no_slot_maps_is_nobodys_business(mmu_guest, mmu: str, locks: int) -> None:
    """8931a454: before it, mmu_lock was taken and every fault under way had to start over."""
    guest = mmu_guest(replace(TDP, mmu=mmu), level=1)
    elsewhere, meter, seq = guest.vm.alloc_memory(PAGE), CountingMeter(), guest.mmu.state.invalidate.seq
    guest.mmu.lock._meter = meter
    guest.mmu.invalidate_range_start(elsewhere, elsewhere + PAGE)
    with pytest.raises(WouldBlock, match="before the running MMU notifier has ended"):
        guest.log()
    guest.mmu.invalidate_range_end(elsewhere, elsewhere + PAGE)
    assert meter.totals.get("mmu_lock_write", 0) == locks
    assert (guest.mmu.state.invalidate.seq == seq) == (not locks)
    guest.log()
    guest.close()


def test_an_invalidation_reaches_invalidated_roots_too(mmu_guest) -> None:
    guest = mmu_guest()
    guest.write(5)
    root = guest.root
    with guest.mmu.lock.write():
        guest.mmu.state.roots.invalidate([root])
    guest.mmu.unmap_hva_range(guest.hva, guest.hva + PAGE)
    assert not guest.mmu.fmt.is_present(root.lookup(5)[0]) and guest.counts() == (0, 0, 0)
    guest.close()


def test_a_range_aliased_by_two_slots_is_unmapped_in_both(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.vm.set_user_memory_region(2, 0, 8192 * PAGE, 512 * PAGE, guest.hva)
    guest.write(5, 8192 + 5)
    guest.mmu.unmap_hva_range(guest.hva + 5 * PAGE, guest.hva + 6 * PAGE)
    assert guest.counts() == (0, 0, 0)
    guest.close()


@pytest.mark.parametrize("mmu", ["tdp-5.10"])
@pytest.mark.parametrize("writable", [True, False])
def test_until_6_10_a_replaced_page_is_remapped_read_only_by_the_notifier(mmu_guest, mmu: str, writable: bool) -> None:
    guest = mmu_guest(replace(TDP, mmu=mmu), level=1)
    guest.write(5)
    hva = guest.hva + 5 * PAGE
    frame = guest.vm.host.replace(hva)
    guest.vm.host.protect(hva, writable=writable)
    assert guest.mmu.change_pte(hva)
    spte, _ = guest.spte(5)
    if writable:
        assert not guest.mmu.fmt.is_present(spte)
    else:
        assert guest.mmu.fmt.pfn(spte) == frame and not guest.mmu.fmt.is_host_writable(spte)
    guest.close()


def test_the_changed_pte_notifier_is_gone_today(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    with pytest.raises(AssertionError, match=r"gone since Linux 6\.10"):
        guest.mmu.change_pte(guest.hva)
    guest.close()


# -- aging ---------------------------------------------------------------------------------------------------------


@MMUS
@pytest.mark.parametrize("ad", [True, False], ids=["ad", "no-ad"])
def test_aging_makes_old_and_an_access_makes_young_again(mmu_guest, mmu: str, ad: bool) -> None:
    guest = mmu_guest(replace(TDP, mmu=mmu, ad_bits=ad), level=1)
    guest.write(5)
    assert guest.mmu.test_age_gfn(guest.slot, 5) and guest.mmu.test_age_gfn(guest.slot, 5), "asking changes nothing"
    assert guest.mmu.age_gfn_range(guest.slot, 0, 64)
    assert not guest.mmu.test_age_gfn(guest.slot, 5) and not guest.mmu.age_gfn_range(guest.slot, 0, 64)
    assert guest.mmu.fmt.is_access_tracked(guest.spte(5)[0]) == (not ad)
    guest.vm.flush_remote_tlbs()
    faults = guest.vm.stats.pf_taken
    guest.read(5)
    assert guest.mmu.test_age_gfn(guest.slot, 5)
    assert guest.vm.stats.pf_taken - faults == (0 if ad else 1), "without A/D bits the first touch faults"
    if not ad and mmu != "tdp-5.10":
        assert guest.vm.stats.pf_fast == 1
    guest.close()


def test_5_10_aging_takes_d_along(mmu_guest) -> None:
    for mmu, kept in (("tdp", True), ("tdp-5.10", False)):
        guest = mmu_guest(replace(TDP, mmu=mmu), level=1)
        guest.write(5)
        guest.mmu.age_gfn_range(guest.slot, 5, 6)
        assert guest.mmu.fmt.is_dirty(guest.spte(5)[0]) == kept
        guest.vm.flush_remote_tlbs()
        guest.close()


def test_host_addresses_are_aged_through_every_slot(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(5)
    assert guest.mmu.test_age_hva(guest.hva + 5 * PAGE)
    assert guest.mmu.age_hva(guest.hva, guest.hva + 64 * PAGE)
    assert not guest.mmu.test_age_hva(guest.hva + 5 * PAGE)
    guest.vm.flush_remote_tlbs()
    guest.close()


# -- write protection of one gfn -----------------------------------------------------------------------------------


@MMUS
@pytest.mark.parametrize("logged_first", [False, True])
def test_write_protection_of_a_gfn_is_sticky(mmu_guest, mmu: str, logged_first: bool) -> None:
    """7c8a4742: an SPTE that lost W to the log but is still MMU-writable must be changed, too."""
    guest = mmu_guest(replace(TDP, mmu=mmu, pml=False), level=1)
    guest.write(5)
    if logged_first:
        guest.log()
    guest.mmu.track_writes(guest.slot, 5)
    spte, fmt = guest.spte(5)[0], guest.mmu.fmt
    assert not fmt.is_writable(spte) and not fmt.is_mmu_writable(spte)
    assert guest.vcpu.tlb.lookup(guest.root, 5) is None, "flushed before the lock was dropped"
    result = guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True)
    assert result in (RetPf.WRITE_PROTECTED, RetPf.EMULATE)
    assert guest.vm.stats.pf_fast == 0 and not fmt.is_writable(guest.spte(5)[0])
    guest.mmu.untrack_writes(guest.slot, 5)
    guest.close()


def test_a_tracked_gfn_forbids_huge_pages_over_it(mmu_guest) -> None:
    guest = mmu_guest()
    guest.mmu.track_writes(guest.slot, 5)
    guest.write(6, 600)
    assert (guest.spte(6)[1], guest.spte(600)[1]) == (1, 2)
    guest.mmu.untrack_writes(guest.slot, 5)
    with pytest.raises(AssertionError, match="is not write-tracked"):
        guest.mmu.untrack_writes(guest.slot, 5)
    guest.close()


@pytest.mark.parametrize(("name", "locks"), [("tdp", 0), ("tdp-6.8", 2), ("shadow", 0)])
def test_aging_takes_mmu_lock_only_in_older_kernels(mmu_guest, name: str, locks: int) -> None:
    guest = mmu_guest(TDP, level=1, vintage=VINTAGES[name])
    guest.write(5)
    meter = CountingMeter()
    guest.mmu.lock._meter = meter
    guest.mmu.age_gfn_range(guest.slot, 5, 6)
    guest.mmu.test_age_gfn(guest.slot, 5)
    assert meter.totals.get("mmu_lock_read", 0) + meter.totals.get("mmu_lock_write", 0) >= locks
    assert bool(meter.totals) == bool(locks)
    guest.vm.flush_remote_tlbs()
    guest.close()
