"""What the host is told of its pages: by the SPTE that goes until Linux 6.12, by the fault that maps since then."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.kvm.config import VmConfig
from migsim.kvm.host_mm import PageState
from migsim.kvm.nested import GuestPte, NestedGuest
from migsim.kvm.vintage import SHADOW, TDP, TDP_6_8

PAGE = 4096
SIMPLE = VmConfig(smm=False)


def watched(mmu_guest, config: VmConfig = SIMPLE, **more):
    guest = mmu_guest(config, level=more.pop("level", 1), **more)
    guest.vm.host.page_state = PageState()
    return guest


def told(guest) -> tuple[set[int], set[int]]:
    """(dirty, accessed) as gfns."""
    first = guest.vm.host.pfn(guest.hva)
    state = guest.vm.host.page_state
    return {pfn - first for pfn in state.dirty}, {pfn - first for pfn in state.accessed}


def test_today_the_page_is_told_when_it_is_mapped_by_whether_it_may_be_written(mmu_guest) -> None:
    guest = watched(mmu_guest)
    guest.vm.host_protect(guest.hva + 6 * PAGE, PAGE, writable=False)
    guest.read(5, 6)
    assert told(guest) == ({5}, {5, 6}), "a load too: the SPTE lets stores through"
    guest.vm.host.page_state = PageState()
    guest.mmu.unmap_hva_range(guest.hva, guest.hva + 8 * PAGE)
    assert told(guest) == (set(), set())
    guest.close()


def test_until_6_12_the_page_is_told_when_the_spte_goes(mmu_guest) -> None:
    guest = watched(mmu_guest, vintage=TDP_6_8)
    guest.write(5)
    assert told(guest) == (set(), set())
    guest.mmu.unmap_hva_range(guest.hva, guest.hva + 8 * PAGE)
    assert told(guest) == ({5}, {5})
    guest.close()


@pytest.mark.parametrize("pml", [True, False])
def test_until_6_12_what_rearming_takes_away_is_told_before(mmu_guest, pml: bool) -> None:
    guest = watched(mmu_guest, replace(SIMPLE, pml=pml), vintage=TDP_6_8)
    guest.log()
    guest.write(5)
    assert told(guest)[0] == set()
    guest.get()
    assert told(guest) == ({5} if pml else set(), set()), "D goes, W says nothing where there is a D"
    guest.mmu.unmap_hva_range(guest.hva, guest.hva + 8 * PAGE)
    assert told(guest) == ({5}, {5})
    guest.close()


@pytest.mark.parametrize("ad_bits", [True, False])
def test_who_ages_a_page_is_answered_and_the_page_not_told_that_it_was_accessed(mmu_guest, ad_bits: bool) -> None:
    guest = watched(mmu_guest, replace(SIMPLE, ad_bits=ad_bits), vintage=replace(TDP_6_8, format_5_10=True))
    guest.write(5)
    assert guest.mmu.age_gfn_range(guest.slot, 0, 8)
    guest.vm.flush_remote_tlbs()
    assert told(guest) == (set() if ad_bits else {5}, set()), "without A/D bits W goes with R and X, and W meant dirty"
    guest.close()


def test_of_a_huge_page_all_frames_are_told(mmu_guest) -> None:
    guest = watched(mmu_guest, vintage=TDP_6_8, level=2)
    guest.write(5)
    guest.mmu.unmap_hva_range(guest.hva, guest.hva + PAGE)
    assert told(guest) == (set(range(512)), set(range(512)))
    guest.close()


def test_prefetched_pages_count_as_written(mmu_guest) -> None:
    """KVM asks the host for pages to write to, and the fast path may make them writable without telling anyone."""
    guest = watched(mmu_guest, replace(SIMPLE, mmu="shadow"))
    guest.read(3)
    assert told(guest) == (set(range(8)), set(range(8)))
    guest.close()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["w", "r", "log", "get", "age", "unmap", "zap", "l2", "move"]), st.integers(0, 40)
        ),
        max_size=14,
    ),
    st.sampled_from([TDP, TDP_6_8, SHADOW, replace(SHADOW, name="shadow-6.8", pushes_page_state=True)]),
    st.booleans(),
)
def test_no_page_the_guest_wrote_is_taken_back_clean(mmu_guest, steps, vintage, pml: bool) -> None:
    """At every moment: a frame that was stored to has been told so, or an SPTE of it still will."""
    guest = watched(mmu_guest, replace(SIMPLE, pml=pml), vintage=vintage, pages=512)
    guest.write(16, 17, 18, 19)
    l2 = NestedGuest(guest.vm, 16, ad_bits=True)
    for depth in range(3):
        l2.write_entry(guest.vcpu, 16 + depth, 0, GuestPte(17 + depth))
    for page in range(41):
        l2.write_entry(guest.vcpu, 19, page, GuestPte(64 + page))
    written: set[int] = set()
    for kind, page in steps:
        gfn = 64 + page
        if kind in ("w", "r"):
            guest.vcpu.run([(kind, gfn * PAGE, 1)])
        elif kind == "l2":
            guest.vcpu.enter_guest_mode(l2)
            guest.vcpu.run([("w", page * PAGE, 1)])
            guest.vcpu.leave_guest_mode()
        if kind in ("w", "l2"):
            written.add(guest.vm.host.pfn(guest.hva + gfn * PAGE))
        elif kind == "log":
            guest.log(not guest.slot.logging)
        elif kind == "get" and guest.slot.logging:
            guest.get()
        elif kind == "age":
            guest.mmu.age_gfn_range(guest.slot, gfn, gfn + 8)
            guest.vm.flush_remote_tlbs()
        elif kind == "unmap":
            guest.mmu.unmap_hva_range(guest.hva + gfn * PAGE, guest.hva + (gfn + 4) * PAGE)
        elif kind == "move":
            guest.vm.user.replace(guest.hva + gfn * PAGE, PAGE)
        elif kind == "zap":
            guest.mmu.zap_all_fast()
        guest.check()
        assert written - guest.vm.host.page_state.dirty <= _still_known(guest, l2)
    guest.close()


def _still_known(guest, l2: NestedGuest) -> set[int]:
    fmt = guest.mmu.fmt
    found = [guest.spte(gfn)[0] for gfn in range(64, 108)] + [l2.walk(page)[0] for page in range(41)]
    return {fmt.pfn(spte) for spte in found if fmt.is_present(spte) and fmt.is_dirty(spte)}
