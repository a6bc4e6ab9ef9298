"""Page faults: which level, which result, the fast path, lost races, NX, MMIO."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from migsim.kvm.config import VmConfig
from migsim.kvm.host_mm import Gup
from migsim.kvm.make_spte import make_spte
from migsim.kvm.paging import PagingStructure, Sptep
from migsim.kvm.spte import ACC_ALL
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.vintage import TDP, TDP_5_19, TDP_6_8
from migsim.units import pages_per_level

PAGE = 4096
INTEL, AMD, NO_AD = VmConfig(smm=False), VmConfig(smm=False, vendor="amd"), VmConfig(smm=False, ad_bits=False)


def fault(guest, gfn: int, *, write: bool = False, exec: bool = False) -> RetPf:
    return guest.mmu.page_fault(guest.vcpu, gfn * PAGE, write=write, exec=exec)


def race_once(monkeypatch: pytest.MonkeyPatch, between) -> None:
    """Run `between` just before the next compare-exchange of an SPTE, as another CPU would."""
    honest, armed = PagingStructure.cmpxchg, [True]

    def cmpxchg(self: PagingStructure, at: Sptep, old: int, new: int, publish=None) -> bool:
        if armed.pop() if armed else False:
            between()
        return honest(self, at, old, new, publish)

    monkeypatch.setattr(PagingStructure, "cmpxchg", cmpxchg)


# -- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host_level", "expected"), [(1, 1), (2, 2), (3, 3)])
def test_a_fault_maps_as_large_as_the_host_does(mmu_guest, host_level: int, expected: int) -> None:
    guest = mmu_guest(pages=512 * 512, level=host_level)
    guest.write(5)
    assert guest.spte(5)[1] == expected
    guest.close()


def test_head_and_tail_of_a_misaligned_slot_stay_small(mmu_guest) -> None:
    guest = mmu_guest(base=512, pages=1000)
    guest.write(512, 512 + 512 + 5)
    assert (guest.spte(512)[1], guest.spte(1029)[1]) == (2, 1)
    guest.close()


def test_a_slot_whose_guest_and_host_addresses_are_not_congruent_has_no_huge_page(mmu_guest) -> None:
    guest = mmu_guest(base=100, pages=1500)
    guest.write(100, 700)
    assert guest.counts() == (2, 0, 0)
    guest.close()


def test_logging_forces_4k_and_marks_at_once(mmu_guest) -> None:
    guest = mmu_guest()
    guest.log()
    guest.write(5)
    assert guest.spte(5)[1] == 1 and guest.get() == {5}
    guest.close()


def test_a_read_fault_on_a_writable_page_installs_w_and_so_reports_it(mmu_guest) -> None:
    guest = mmu_guest()
    guest.log()
    guest.read(9)
    assert guest.mmu.fmt.is_writable(guest.spte(9)[0]) and guest.get() == {9}
    guest.close()


def test_a_read_only_host_page_is_mapped_without_w_and_a_store_fails_with_efault(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.vm.host.protect(guest.hva + 5 * PAGE, writable=False)
    assert fault(guest, 5) == RetPf.FIXED
    spte, fmt = guest.spte(5)[0], guest.mmu.fmt
    assert not fmt.is_host_writable(spte) and not fmt.is_mmu_writable(spte) and not fmt.is_writable(spte)
    with pytest.raises(OSError) as refused:
        fault(guest, 5, write=True)
    assert refused.value.errno == errno.EFAULT
    guest.close()


@pytest.mark.parametrize(("how", "number"), [(Gup.ABSENT, errno.EFAULT), (Gup.POISONED, 133)])
def test_a_page_the_host_cannot_give_fails_the_run(mmu_guest, how: Gup, number: int) -> None:
    guest = mmu_guest(level=1)
    guest.vm.host.fail(guest.hva + 5 * PAGE, how)
    with pytest.raises(OSError) as refused:
        fault(guest, 5)
    assert refused.value.errno == number
    guest.close()


def test_a_store_to_a_readonly_slot_is_emulated(mmu_guest) -> None:
    guest = mmu_guest()
    guest.delete_slot()
    guest.set_slot(2)
    assert fault(guest, 5) == RetPf.FIXED and not guest.mmu.fmt.is_host_writable(guest.spte(5)[0])
    assert fault(guest, 5, write=True) == RetPf.EMULATE
    guest.close()


def test_a_prefetch_maps_an_old_page_and_is_spurious_the_second_time(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    assert guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=False, prefetch=True) == RetPf.FIXED
    assert not guest.mmu.fmt.is_accessed(guest.spte(5)[0])
    assert guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=False, prefetch=True) == RetPf.SPURIOUS
    guest.mmu.track_writes(guest.slot, 5)
    guest.mmu.untrack_writes(guest.slot, 5)
    before = guest.spte(5)
    assert guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True, prefetch=True) == RetPf.SPURIOUS
    assert guest.spte(5) == before, "what is mapped already is not changed in advance"
    assert fault(guest, 5, write=True) == RetPf.FIXED
    guest.close()


@pytest.mark.parametrize("mmu", ["tdp", "tdp-5.10", "shadow"])
@pytest.mark.parametrize(("level", "host_writable"), [(1, True), (2, True), (1, False)])
def test_every_mmu_installs_what_make_spte_gives(mmu_guest, mmu: str, level: int, host_writable: bool) -> None:
    guest = mmu_guest(replace(INTEL, mmu=mmu), level=level)
    guest.vm.host.protect(guest.hva + 5 * PAGE, writable=host_writable)
    assert fault(guest, 5) == RetPf.FIXED
    first = 5 & -pages_per_level(level)
    made = make_spte(
        guest.mmu.fmt, gfn=first, pfn=guest.vm.host.pfn(guest.hva + first * PAGE), level=level, access=ACC_ALL,
        host_writable=host_writable,
    )  # fmt: skip
    assert guest.spte(5) == (made.spte, level)
    guest.close()


# -- results and the fast path -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [INTEL, AMD, NO_AD], ids=["ept", "npt", "ept-no-ad"])
def test_a_fault_on_what_another_vcpu_fixed_is_spurious(mmu_guest, config: VmConfig) -> None:
    guest = mmu_guest(config)
    assert fault(guest, 5, write=True) == RetPf.FIXED
    assert fault(guest, 5, write=True) == RetPf.SPURIOUS
    assert guest.vm.stats.pf_taken == 2 and guest.vm.stats.pf_fixed == 1 and guest.vm.stats.pf_spurious == 1
    guest.close()


@pytest.mark.parametrize("mmu", ["tdp", "tdp-5.10", "shadow"])
def test_a_fault_that_finds_the_page_mapped_under_the_lock_is_spurious(mmu_guest, monkeypatch, mmu: str) -> None:
    """Another vCPU mapped it while this one waited for the frame: nothing is written a second time."""
    guest = mmu_guest(replace(INTEL, mmu=mmu), vcpus=2)
    host, honest = guest.vm.host, guest.vm.host.get_user_page

    def resolve_slowly(hva: int) -> object:
        monkeypatch.setattr(host, "get_user_page", honest)
        guest.vcpus[1].run([("w", 5 * PAGE, 1)])
        return honest(hva)

    monkeypatch.setattr(host, "get_user_page", resolve_slowly)
    assert fault(guest, 5, write=True) == RetPf.SPURIOUS
    assert guest.counts() == (0, 1, 0) and guest.vm.stats.pf_spurious == 1 and guest.vm.stats.pf_fixed == 1
    guest.close()


@pytest.mark.parametrize("config", [replace(INTEL, pml=False), AMD, NO_AD], ids=["ept", "npt", "ept-no-ad"])
def test_a_write_protected_4k_page_is_repaired_without_the_lock_and_marked(mmu_guest, config: VmConfig) -> None:
    guest = mmu_guest(config)
    guest.log()
    guest.write(5)
    guest.get()
    locks = guest.mmu.lock

    def refuse(*_: object) -> None:
        raise AssertionError("the fast path took mmu_lock")

    honest, locks.read = locks.read, refuse
    assert fault(guest, 5, write=True) == RetPf.FIXED
    locks.read = honest
    assert guest.vm.stats.pf_fast == 1 and guest.get() == {5}
    guest.close()


def test_5_10_has_no_fast_path_for_the_tdp_mmu(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, mmu="tdp-5.10", pml=False))
    guest.log()
    guest.write(5)
    guest.get()
    guest.write(5)
    assert guest.vm.stats.pf_fast == 0 and guest.get() == {5}
    guest.close()


def test_the_fast_path_leaves_a_huge_page_of_a_logged_slot_to_be_split(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, pml=False, eager_page_split=False))
    guest.write(5)
    guest.log()
    assert guest.spte(5)[1] == 2 and not guest.mmu.fmt.is_writable(guest.spte(5)[0])
    guest.write(7)
    assert guest.vm.stats.pf_fast == 0 and guest.spte(7)[1] == 1 and guest.get() == {7}
    guest.close()


def test_the_fast_path_tries_again_after_a_lost_race(mmu_guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = mmu_guest(replace(INTEL, pml=False), level=1)
    guest.log()
    guest.write(5)
    guest.get()
    at = list(guest.root.walk(5))[-1][0]
    race_once(monkeypatch, lambda: guest.root.clear_bits(at, guest.mmu.fmt.accessed))
    assert fault(guest, 5, write=True) == RetPf.FIXED
    assert guest.mmu.fmt.is_writable(guest.spte(5)[0]) and guest.get() == {5}
    guest.close()


# -- huge pages in the way -----------------------------------------------------------------------------------------


def test_a_huge_page_in_the_way_is_split_and_keeps_its_512_translations(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, eager_page_split=False, pml=False))
    guest.write(5)
    guest.log()
    guest.write(7)
    assert guest.counts() == (512, 0, 0) and guest.spte(100)[1] == 1
    assert not guest.mmu.fmt.is_writable(guest.spte(100)[0]), "W is copied, not invented"
    guest.close()


def test_5_10_zaps_the_huge_page_to_an_empty_table_and_flushes(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, mmu="tdp-5.10", pml=False))
    guest.write(5)
    guest.log()
    flushes = guest.vm.stats.remote_tlb_flush_requests
    guest.write(7)
    assert guest.counts() == (1, 0, 0) and guest.spte(100)[0] == 0
    assert guest.vm.stats.remote_tlb_flush_requests == flushes + 1
    guest.close()


def test_splitting_a_1g_page_makes_512_pages_of_2m(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, eager_page_split=False, pml=False), pages=512 * 512, level=3)
    guest.write(5)
    assert guest.counts() == (0, 0, 1)
    guest.log()
    guest.write(7)
    assert guest.counts() == (512, 511, 0)
    guest.close()


# -- races on the slow path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmu", ["tdp", "tdp-5.10", "shadow"])
@pytest.mark.parametrize("at_the_leaf", [False, True], ids=["table", "leaf"])
def test_a_lost_compare_exchange_changes_nothing_and_retries(
    mmu_guest, monkeypatch, mmu: str, at_the_leaf: bool
) -> None:
    guest = mmu_guest(replace(INTEL, mmu=mmu), vcpus=2)
    other = guest.vcpus[1]
    if at_the_leaf:  # its neighbour's fault has linked the tables
        guest.write(512)
        guest.mmu.unmap_hva_range(guest.hva + 512 * PAGE, guest.hva + 513 * PAGE)

    def other_vcpu_maps_first() -> None:
        guest.mmu.lock.writer, held = False, guest.mmu.lock.writer
        guest.mmu.lock.readers, readers = 0, guest.mmu.lock.readers
        other.run([("w", 5 * PAGE, 1)])
        guest.mmu.lock.writer, guest.mmu.lock.readers = held, readers

    guest.root  # noqa: B018 - the root must exist before the race
    race_once(monkeypatch, other_vcpu_maps_first)
    assert fault(guest, 5, write=True) == RetPf.RETRY
    assert guest.counts() == (0, 1, 0)
    assert fault(guest, 5, write=True) == RetPf.SPURIOUS
    guest.close()


def test_a_walker_that_meets_a_frozen_entry_backs_off(mmu_guest) -> None:
    guest = mmu_guest()
    fault(guest, 5)
    at = list(guest.root.walk(5))[-1][0]
    spte = guest.root.read(at)
    guest.root.write(at, guest.mmu.fmt.frozen)
    assert fault(guest, 5, write=True) == RetPf.RETRY
    assert any("frozen SPTE reachable" in sentence for sentence in guest.mmu.invariants())
    guest.root.write(at, spte)
    guest.close()


@pytest.mark.parametrize("mmu", ["tdp", "tdp-5.10", "shadow"])
def test_a_notifier_between_frame_and_lock_makes_the_fault_start_over(mmu_guest, monkeypatch, mmu: str) -> None:
    guest = mmu_guest(replace(INTEL, mmu=mmu), level=1)
    host, honest = guest.vm.host, guest.vm.host.get_user_page

    def resolve_then_lose(hva: int) -> object:
        page = honest(hva)
        host.get_user_page = honest
        guest.mmu.invalidate_range_start(hva, hva + PAGE)
        host.replace(hva)
        guest.mmu.invalidate_range_end(hva, hva + PAGE)
        return page

    monkeypatch.setattr(host, "get_user_page", resolve_then_lose)
    assert fault(guest, 5) == RetPf.RETRY
    monkeypatch.setattr(host, "get_user_page", honest)
    assert fault(guest, 5) == RetPf.FIXED
    assert guest.mmu.fmt.pfn(guest.spte(5)[0]) == host.pfn(guest.hva + 5 * PAGE)
    guest.close()


def test_no_fault_maps_a_range_while_it_is_being_invalidated(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.mmu.invalidate_range_start(guest.hva + 4 * PAGE, guest.hva + 8 * PAGE)
    assert fault(guest, 5) == RetPf.RETRY and fault(guest, 9) == RetPf.FIXED
    guest.mmu.invalidate_range_end(guest.hva + 4 * PAGE, guest.hva + 8 * PAGE)
    assert fault(guest, 5) == RetPf.FIXED
    guest.close()


def test_a_root_invalidated_before_the_lock_is_retried(mmu_guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = mmu_guest(level=1)
    host, honest = guest.vm.host, guest.vm.host.get_user_page

    def resolve_while_everything_is_zapped(hva: int) -> object:
        guest.mmu.zap_all_fast()
        return honest(hva)

    old = guest.root
    monkeypatch.setattr(host, "get_user_page", resolve_while_everything_is_zapped)
    assert fault(guest, 5) == RetPf.RETRY
    assert old.invalid and sum(old.n_tables) == 1, "nothing was installed into the dead root"
    monkeypatch.setattr(host, "get_user_page", honest)
    assert fault(guest, 5) == RetPf.FIXED
    guest.close()


# -- write tracking ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vintage", "result"), [(TDP, RetPf.WRITE_PROTECTED), (TDP_6_8, RetPf.EMULATE)])
def test_a_store_to_a_tracked_gfn_is_handed_to_the_emulator(mmu_guest, vintage, result: RetPf) -> None:
    guest = mmu_guest(level=1, vintage=vintage)
    guest.mmu.track_writes(guest.slot, 5)
    assert fault(guest, 5, write=True) == result, "not mapped yet: mapped read-only, then refused"
    assert fault(guest, 5, write=True) == result
    guest.mmu.untrack_writes(guest.slot, 5)
    assert fault(guest, 5, write=True) == RetPf.FIXED
    guest.close()


# -- NX huge pages -------------------------------------------------------------------------------------------------


def test_nx_huge_pages_split_on_execution_and_recover(mmu_guest) -> None:
    """The steps and numbers of the kernel's nx_huge_pages_test."""
    guest = mmu_guest(replace(INTEL, nx_huge_pages=True), pages=3 * 512)
    stats, seen = guest.vm.stats, []

    def step(gfn: int, exec: bool) -> None:
        while not guest.mmu.fmt.allows(guest.spte(gfn)[0], write=False, exec=exec) or guest.spte(gfn)[1] > 3:
            fault(guest, gfn, exec=exec)
        seen.append((stats.pages_2m, stats.nx_lpage_splits))

    for gfn, exec in ((0, False), (512, False), (0, True), (1024, True), (0, False)):
        step(gfn, exec)
    assert guest.mmu.recover_nx(ratio=1) == 2
    seen.append((stats.pages_2m, stats.nx_lpage_splits))
    step(1024, False)
    assert seen == [(1, 0), (2, 0), (1, 1), (1, 2), (1, 2), (1, 0), (2, 0)]
    guest.close()


def test_without_the_workaround_execution_maps_huge(mmu_guest) -> None:
    guest = mmu_guest()
    fault(guest, 0, exec=True)
    assert guest.counts() == (0, 1, 0) and guest.vm.stats.nx_lpage_splits == 0
    guest.close()


def test_a_read_fault_does_not_map_huge_over_a_table_kept_small_for_nx(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, nx_huge_pages=True), pages=512)
    fault(guest, 0, exec=True)
    fault(guest, 1)
    assert guest.spte(1)[1] == 1 and guest.counts() == (2, 0, 0)
    guest.close()


@pytest.mark.parametrize(("vintage", "level"), [(TDP, 1), (TDP_5_19, 2)], ids=lambda value: str(value))
def test_what_execution_made_small_stays_small_even_if_nothing_huge_was_possible_then(
    mmu_guest, vintage, level: int
) -> None:
    """428e9216: the table is tagged, though it is not on the list of those that recovery could make huge."""
    guest = mmu_guest(replace(INTEL, nx_huge_pages=True), pages=512, vintage=vintage)
    guest.mmu.track_writes(guest.slot, 300)
    fault(guest, 0, exec=True)
    assert guest.spte(0)[1] == 1 and guest.vm.stats.nx_lpage_splits == 0
    guest.mmu.untrack_writes(guest.slot, 300)
    fault(guest, 1)
    assert guest.spte(1)[1] == level
    guest.close()


@pytest.mark.parametrize(("skips", "left"), [(True, 1), (False, 0)])
def test_nx_recovery_leaves_tables_of_logged_slots(mmu_guest, skips: bool, left: int) -> None:
    guest = mmu_guest(replace(INTEL, nx_huge_pages=True), vintage=replace(TDP, nx_skips_logged=skips))
    fault(guest, 0, exec=True)
    guest.log()
    assert guest.mmu.recover_nx(ratio=1) == 1
    assert guest.vm.stats.nx_lpage_splits == 0 and guest.vm.stats.pages_4k == left
    guest.close()


# -- MMIO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [INTEL, AMD, replace(INTEL, mmu="tdp-5.10")], ids=["ept", "npt", "5.10"])
def test_an_access_outside_every_slot_installs_an_mmio_spte(mmu_guest, config: VmConfig) -> None:
    guest = mmu_guest(config, vcpus=2)
    assert fault(guest, 0x10000) == RetPf.EMULATE
    assert guest.mmu.fmt.is_mmio(guest.spte(0x10000)[0])
    assert guest.vm.stats.pf_mmio_spte_created == 1
    other = guest.vcpus[1]
    assert guest.mmu.page_fault(other, 0x10000 * PAGE, write=False) == RetPf.EMULATE
    assert guest.vm.stats.pf_taken == 1, "answered from the SPTE"
    guest.close()


def test_a_stale_mmio_spte_does_not_hide_a_new_slot(mmu_guest) -> None:
    guest = mmu_guest()
    fault(guest, 0x10000)
    hva = guest.vm.alloc_memory(4 * PAGE)
    guest.vm.set_user_memory_region(2, 0, 0x10000 * PAGE, 4 * PAGE, hva)
    assert fault(guest, 0x10000) == RetPf.FIXED and guest.spte(0x10000)[1] == 1
    guest.close()


def test_without_mmio_caching_nothing_is_installed(mmu_guest) -> None:
    for config in (replace(INTEL, mmio_caching=False), replace(AMD, maxphyaddr=52)):
        guest = mmu_guest(config)
        assert fault(guest, 0x10000) == RetPf.EMULATE and not guest.mmu.fmt.is_mmio(guest.spte(0x10000)[0])
        guest.close()


def test_a_generation_that_wraps_takes_every_mmio_spte_along(mmu_guest) -> None:
    guest = mmu_guest()
    fault(guest, 0x10000)
    old = guest.root
    guest.vm.memslots(0).generation = (1 << 19) - 1
    guest.vm.set_user_memory_region(2, 0, 0x40000 * PAGE, PAGE, guest.hva)
    assert old.invalid and not guest.mmu.fmt.is_mmio(guest.spte(0x10000)[0])
    guest.close()
