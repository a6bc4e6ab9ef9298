"""SPTE bits: both formats and vintages, made, packed and read back bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim.kvm import mmio
from migsim.kvm.host_mm import LEAF_TABLE_PFN_BASE, linear_pfn
from migsim.kvm.leaf_planes import LeafPlanes
from migsim.kvm.make_spte import (
    make_huge_spte,
    make_nonleaf_spte,
    make_split_spte,
    make_spte,
    mark_for_access_track,
    restore_acc_track,
)
from migsim.kvm.spte import (
    ACC_ALL,
    ACC_EXEC,
    ACC_WRITE,
    EPT,
    EPT_5_10,
    FORMATS,
    NPT,
    NPT_5_10,
    AdType,
    SpteFormat,
    spte_format,
)

formats = st.sampled_from(FORMATS)
AD_OFF = {EPT: AdType.DISABLED, EPT_5_10: AdType.DISABLED, NPT: AdType.ENABLED, NPT_5_10: AdType.ENABLED}


def leaf(fmt: SpteFormat, **changes: object) -> int:
    values = {"gfn": 5, "pfn": 0x1005, "level": 1, "access": ACC_ALL, "host_writable": True, **changes}
    return make_spte(fmt, **values).spte  # type: ignore[arg-type]


def test_a_writable_ept_leaf_of_today_has_these_bits() -> None:
    assert leaf(EPT) == 0x1005 << 12 | 1 << 63 | 1 << 58 | 1 << 57 | 1 << 11 | 1 << 9 | 1 << 8 | 1 << 6 | 6 << 3 | 7


def test_a_writable_npt_leaf_of_today_has_these_bits() -> None:
    assert leaf(NPT) == 0x1005 << 12 | 1 << 11 | 1 << 10 | 1 << 9 | 1 << 6 | 1 << 5 | 7


def test_5_10_has_its_software_bits_at_10_and_11() -> None:
    assert leaf(EPT_5_10) == 0x1005 << 12 | 1 << 11 | 1 << 10 | 1 << 9 | 1 << 8 | 1 << 6 | 6 << 3 | 7


def test_nothing_is_bit_63_today_and_zero_in_5_10() -> None:
    for vendor in ("intel", "amd"):
        today, before = (spte_format(vendor, vintage_5_10=old) for old in (False, True))
        assert (today.nonpresent, before.nonpresent) == (1 << 63, 0)
        assert (today.frozen, before.frozen) == (1 << 63 | 0x5A0, 0x5A0)


@pytest.mark.parametrize(("today", "before"), [(EPT, EPT_5_10), (NPT, NPT_5_10)], ids=["ept", "npt"])
def test_presence_is_bit_11_today_and_was_whatever_is_not_zero_nor_mmio(today: SpteFormat, before: SpteFormat) -> None:
    for fmt in (today, before):
        assert fmt.is_present(leaf(fmt)) and fmt.is_present(make_nonleaf_spte(fmt, 0x77))
        assert not fmt.is_present(fmt.nonpresent) and not fmt.is_present(fmt.frozen)
        assert not fmt.is_present(mmio.make_mmio_spte(fmt, generation=3, gfn=9))
    assert not today.is_present(leaf(today) & ~(1 << 11)), "whatever else is set"
    assert before.is_present(1 << 12), "an address is enough"
    gone = mark_for_access_track(EPT, leaf(EPT, ad_type=AdType.DISABLED))
    assert not gone & 7 and EPT.is_present(gone), "R, W and X may all be gone"


def test_a_and_d_are_kept_in_software_today_where_the_cpu_has_none() -> None:
    today, before = (spte_format("intel", vintage_5_10=old, ad_bits=False) for old in (False, True))
    young, spte = leaf(today, ad_type=AdType.DISABLED), leaf(before, ad_type=AdType.DISABLED)
    assert young & 1 << 8 and young & 1 << 9 and not spte & (1 << 8 | 1 << 9)
    assert today.is_accessed(young) and not today.is_accessed(young & ~(1 << 8)), "the A bit answers"
    assert today.is_dirty(young & ~today.writable) and not today.is_dirty(young & ~(1 << 9)), "the D bit answers"
    assert before.is_accessed(spte) and not before.is_accessed(mark_for_access_track(before, spte))
    assert before.is_dirty(spte) and not before.is_dirty(spte & ~before.writable), "W answered"
    tracked = mark_for_access_track(today, young)
    assert not today.is_accessed(tracked) and today.is_accessed(restore_acc_track(today, tracked))


def test_a_nonleaf_spte_grants_everything_and_is_young_or_tagged() -> None:
    assert make_nonleaf_spte(EPT, 0x77) == 0x77 << 12 | 1 << 63 | 1 << 11 | 1 << 8 | 7
    assert make_nonleaf_spte(EPT, 0x77, AdType.DISABLED) == 0x77 << 12 | 1 << 63 | 1 << 52 | 1 << 11 | 7
    assert not EPT.is_leaf(make_nonleaf_spte(EPT, LEAF_TABLE_PFN_BASE), 2)


@given(formats, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([ACC_ALL, ACC_EXEC, 4]))
def test_make_spte_obeys_the_writability_rules(
    fmt: SpteFormat, host: bool, tracked: bool, prefetch: bool, nx: bool, access: int
) -> None:
    made = make_spte(
        fmt, gfn=512, pfn=1024, level=2, access=access, host_writable=host, prefetch=prefetch, write_tracked=tracked,
        nx_huge_pages=nx,
    )  # fmt: skip
    writable = bool(access & ACC_WRITE) and host and not tracked
    assert fmt.is_writable(made.spte) == fmt.is_mmu_writable(made.spte) == writable
    assert fmt.is_dirty(made.spte) == writable
    assert made.wrprot == (bool(access & ACC_WRITE) and host and tracked)
    assert fmt.is_accessed(made.spte) == (not prefetch)
    assert fmt.is_executable(made.spte) == (bool(access & ACC_EXEC) and not nx)
    fmt.validate_leaf(made.spte, 512, 2)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_what_kvm_would_warn_about_names_spte_gfn_and_level(fmt: SpteFormat) -> None:
    spte = leaf(fmt) & ~fmt.host_writable
    with pytest.raises(AssertionError, match=rf"{spte:#018x} gfn 0x5 level 1: MMU-writable without Host-writable"):
        fmt.validate_leaf(spte, 5, 1)
    with pytest.raises(AssertionError, match="writable but not MMU-writable"):
        fmt.validate_leaf(leaf(fmt) & ~fmt.mmu_writable, 5, 1)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_special_values_are_neither_present_nor_mmio_nor_each_other(fmt: SpteFormat) -> None:
    for value in (fmt.frozen, fmt.nonpresent):
        assert not fmt.is_present(value) and not fmt.is_mmio(value)
    assert fmt.frozen != fmt.nonpresent


@given(formats, st.integers(0, (1 << 39) - 1), st.integers(0, (1 << 64) - 1))
def test_mmio_sptes_keep_gfn_and_generation(fmt: SpteFormat, gfn: int, generation: int) -> None:
    spte = mmio.make_mmio_spte(fmt, generation=generation, gfn=gfn)
    assert fmt.is_mmio(spte) and not fmt.is_present(spte)
    assert mmio.mmio_gfn(fmt, spte) == gfn
    assert mmio.is_current(fmt, spte, generation)
    assert not mmio.is_current(fmt, spte, generation ^ 1)
    assert mmio.is_current(fmt, spte, generation ^ 1 << 63), "the in-progress bit is never stored"


def test_mmio_generation_has_19_bits_today_and_18_in_5_10() -> None:
    assert mmio.generation_bits(EPT) == mmio.generation_bits(NPT) == 19
    assert mmio.generation_bits(EPT_5_10) == 18


@pytest.mark.parametrize("fmt", [EPT, EPT_5_10], ids=lambda f: f.name)
def test_access_tracking_saves_r_and_x_and_rederives_w(fmt: SpteFormat) -> None:
    spte = leaf(fmt, ad_type=AdType.DISABLED)
    tracked = mark_for_access_track(fmt, spte)
    assert fmt.is_access_tracked(tracked) and not fmt.is_accessed(tracked) and fmt.is_present(tracked)
    assert tracked >> 54 & 7 == 0b101 and not tracked & 7
    back = restore_acc_track(fmt, tracked)
    assert back == spte & ~fmt.writable
    assert mark_for_access_track(fmt, tracked) == tracked


@given(formats, st.integers(0, 511), st.booleans(), st.booleans())
def test_children_of_a_huge_page_map_the_same_and_copy_w_and_d(
    fmt: SpteFormat, index: int, w: bool, nx: bool
) -> None:
    huge = leaf(fmt, gfn=1024, pfn=0x10000, level=2, nx_huge_pages=nx)
    if not w:
        huge &= ~(fmt.writable | fmt.dirty)
    child = make_split_spte(fmt, huge, 2, index, nx_huge_pages=nx)
    assert fmt.pfn(child) == 0x10000 + index
    assert fmt.is_writable(child) == fmt.is_dirty(child) == w
    assert fmt.is_executable(child), "4K pages may be executed whatever the workaround did to the huge one"
    assert make_huge_spte(fmt, child, 2, nx_huge_pages=nx) == huge


@given(
    formats, st.booleans(), st.sampled_from(["ad", "off"]), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 99), st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_4k_spte_read_through_the_planes_equals_what_make_spte_gave(
    fmt: SpteFormat, exec: bool, ad: str, host: bool, tracked: bool, prefetch: bool, wrprot: bool, i: int, old: bool,
    elsewhere: bool,
) -> None:  # fmt: skip
    ad_type = AD_OFF[fmt] if ad == "off" else AdType.ENABLED
    planes = LeafPlanes(SimpleNamespace(id=1, base_gfn=1000, npages=100, userspace_addr=0x7F0000000000), fmt, ad_type)
    pfn = 0x123456 if elsewhere else linear_pfn(0x7F0000000000 + (i << 12))
    spte = make_spte(
        fmt, gfn=1000 + i, pfn=pfn, level=1, access=ACC_ALL if exec else ACC_ALL & ~ACC_EXEC, host_writable=host,
        ad_type=ad_type, prefetch=prefetch, write_tracked=tracked,
    ).spte  # fmt: skip
    if wrprot:
        spte &= ~(fmt.writable | fmt.dirty)
    if old:
        spte = mark_for_access_track(fmt, spte)
    planes.store(i, spte)
    assert planes.compose(i) == spte
    assert [planes.compose(j) for j in range(100) if j != i] == [fmt.nonpresent] * 99
    planes.erase(i, 1)
    assert planes.compose(i) == fmt.nonpresent and not any(plane.count() for plane in planes.planes())


def test_a_value_the_planes_cannot_hold_is_an_assertion() -> None:
    planes = LeafPlanes(SimpleNamespace(id=1, base_gfn=0, npages=9, userspace_addr=0), EPT, AdType.ENABLED)
    with pytest.raises(AssertionError, match=r"gfn 0x3 level 1 is packed as"):
        planes.store(3, leaf(EPT, gfn=3, pfn=3) | AdType.WRPROT_ONLY << 52)
