"""Whole ranges at once leave exactly what page by page leaves: SPTEs, tables, counters, and the need for a flush."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.kvm import whole_slot
from migsim.kvm.config import VmConfig
from migsim.kvm.invariants import entries
from migsim.kvm.make_spte import make_split_spte
from migsim.kvm.vintage import SHADOW, TDP, TDP_5_15, TDP_6_8

CONFIGS = {
    "pml": VmConfig(smm=False),
    "wrprot": VmConfig(smm=False, pml=False),
    "npt": VmConfig(smm=False, vendor="amd"),
    "no-ad": VmConfig(smm=False, ad_bits=False),
    "lazy": VmConfig(smm=False, pml=False, eager_page_split=False),
    "nx": VmConfig(smm=False, nx_huge_pages=True),
    "shadow": VmConfig(smm=False, mmu="shadow"),
}
PAGES = 3 * 512 + 70


def picture(guest: Any) -> tuple[object, ...]:
    """Everything a form may change."""
    stats = guest.vm.stats
    sptes = {(at, level): spte for at, spte, level in entries(guest.root)}
    frames = {guest.root.gfn_of(at): (spte, level) for (at, level), spte in sptes.items() if level == 1}
    counters = stats.read()
    del counters["tlb_flush"]  # a vCPU with several requests pending flushes once
    return frames, sorted((level, spte) for (_, level), spte in sptes.items()), guest.root.n_tables, counters


def prepared(mmu_guest: Any, name: str, level: int, writes: set[int], whole: bool, vintage: Any = None) -> Any:
    config = CONFIGS[name]
    guest = mmu_guest(config, pages=PAGES, base=512, level=level, vintage=vintage)
    guest.mmu.state.whole_slots = whole
    guest.mmu.state.whole_slots_min_pages = 1
    guest.write(*(512 + page for page in sorted(writes)))
    return guest


operations = st.lists(
    st.one_of(
        st.just(("log",)), st.just(("unlog",)), st.just(("get",)),
        st.tuples(st.sampled_from(["write", "read", "exec"]), st.sets(st.integers(0, PAGES - 1), max_size=4)),
        st.tuples(st.sampled_from(["age", "unmap"]), st.integers(0, PAGES - 1), st.integers(1, 1500)),
        st.tuples(st.just("replace"), st.integers(0, PAGES - 1)),
    ),
    max_size=8,
)  # fmt: skip


def act(guest: Any, step: tuple[Any, ...]) -> object:
    """One step; what it answers."""
    kind, *rest = step
    if kind in ("log", "unlog"):
        guest.log(kind == "log")
    elif kind == "get":
        return guest.get() if guest.slot.logging else None
    elif kind in ("write", "read"):
        getattr(guest, kind)(*(512 + page for page in sorted(rest[0])))
    elif kind == "exec":
        for page in sorted(rest[0]):
            guest.mmu.page_fault(guest.vcpu, (512 + page) << 12, write=False, exec=True)
    elif kind == "replace":
        hva = guest.hva + (rest[0] << 12)
        guest.mmu.invalidate_range_start(hva, hva + 4096)
        guest.vm.host.replace(hva)
        guest.mmu.invalidate_range_end(hva, hva + 4096)
    else:
        first, last = rest[0], min(rest[0] + rest[1], PAGES)
        if kind == "unmap":
            return guest.mmu.unmap_hva_range(guest.hva + (first << 12), guest.hva + (last << 12))
        young = guest.mmu.age_gfn_range(guest.slot, 512 + first, 512 + last)
        guest.vm.flush_remote_tlbs()
        return young
    return None


@pytest.mark.parametrize("name", sorted(CONFIGS))
@settings(max_examples=20, deadline=None)
@given(level=st.sampled_from([1, 2]), writes=st.sets(st.integers(0, PAGES - 1), max_size=20), steps=operations)
def test_any_sequence_of_operations_ends_the_same_both_ways(mmu_guest, name, level, writes, steps) -> None:
    guests = [prepared(mmu_guest, name, level, writes, whole) for whole in (False, True)]
    for step in steps:
        assert act(guests[0], step) == act(guests[1], step), step
        assert picture(guests[0]) == picture(guests[1]), step
        guests[1].check()
    for guest in guests:
        guest.close()


@pytest.mark.parametrize("vintage", [TDP, TDP_6_8, TDP_5_15, SHADOW], ids=lambda v: v.name)
@settings(max_examples=20, deadline=None)
@given(writes=st.sets(st.integers(0, PAGES - 1), min_size=1), again=st.sets(st.integers(0, PAGES - 1), max_size=9))
def test_ending_the_log_is_the_same_both_ways_in_every_kernel(mmu_guest, vintage, writes, again) -> None:
    pictures = []
    for whole in (False, True):
        guest = prepared(mmu_guest, "wrprot", 2, writes, whole, vintage)
        guest.log()
        guest.write(*(512 + page for page in sorted(again)))
        guest.log(False)
        guest.check()
        pictures.append(picture(guest))
        guest.close()
    assert pictures[0] == pictures[1]


def test_a_1g_page_is_split_and_recovered_at_once(mmu_guest) -> None:
    guest = mmu_guest(CONFIGS["wrprot"], pages=512 * 512, level=3)
    guest.write(5)
    fmt, (huge, level) = guest.mmu.fmt, guest.spte(5)
    assert level == 3
    guest.log()
    assert guest.counts() == (512 * 512, 0, 0) and guest.root.n_tables[1:4] == [512, 1, 1]
    for gfn in (0, 77, 600, 512 * 512 - 1):
        child = make_split_spte(fmt, huge, 3, gfn // 512, nx_huge_pages=False)
        child = make_split_spte(fmt, child, 2, gfn % 512, nx_huge_pages=False)
        assert guest.spte(gfn) == (child & ~fmt.writable, 1)
    guest.log(False)
    assert guest.counts() == (0, 0, 1) and guest.spte(5) == (huge & ~fmt.writable, 3)
    assert guest.root.n_tables[1:4] == [0, 0, 1]
    guest.close()


def test_small_ranges_go_page_by_page(mmu_guest) -> None:
    guest = mmu_guest()
    assert not whole_slot.suits(guest.mmu.state, 64)
    guest.close()
    guest = mmu_guest(replace(CONFIGS["pml"], mmu="tdp-5.10"))
    assert whole_slot.suits(guest.mmu.state, 1 << 30)
    guest.close()
