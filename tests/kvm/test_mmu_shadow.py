"""The shadow MMU: same results through the reverse map, its memory, and nested guests on shadow pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.kvm.config import VmConfig
from migsim.kvm.nested import GuestPte, NestedGuest
from migsim.kvm.rmap import RmapEntry
from migsim.kvm.spte import ACC_ALL, ACC_WRITE, AdType
from migsim.kvm.vintage import SHADOW

PAGE = 4096
SHADOW_VM = VmConfig(smm=False, mmu="shadow")
ROWS = pytest.mark.parametrize("mmu", ["shadow", "tdp-5.10", "tdp"])


# -- direct --------------------------------------------------------------------------------------------------------


def test_without_two_dimensional_paging_only_the_shadow_mmu_serves(mmu_guest) -> None:
    guest = mmu_guest(VmConfig(smm=False, tdp=False, mmu="shadow"))
    assert guest.mmu.state.vintage is SHADOW and not guest.mmu.tdp_enabled
    guest.write(5)
    guest.close()
    with pytest.raises(ValueError, match="needs tdp=True"):
        VmConfig(tdp=False)


def test_the_choice_is_a_snapshot_at_creation(mmu_guest) -> None:
    guest = mmu_guest()
    before = guest.mmu.state.vintage
    guest.vm.config = replace(guest.vm.config, mmu="shadow")
    assert guest.mmu.tdp_enabled and guest.mmu.state.vintage is before
    guest.close()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "read", "log", "unlog", "get", "unmap"]), st.integers(0, 1500)), max_size=12
    )
)
def test_all_mmus_report_the_same_dirty_pages_and_hold_the_same_memory(mmu_guest, steps) -> None:
    guests = [mmu_guest(replace(SHADOW_VM, mmu=mmu), pages=1600, level=2) for mmu in ("shadow", "tdp-5.10", "tdp")]
    for kind, page in steps:
        answers = []
        for guest in guests:
            if kind in ("write", "read"):
                getattr(guest, kind)(page)
            elif kind == "unmap":
                guest.mmu.unmap_hva_range(guest.hva + page * PAGE, guest.hva + (page + 9) * PAGE)
            elif kind in ("log", "unlog"):
                guest.log(kind == "log")
            elif guest.slot.logging:
                answers.append(guest.get())
            guest.check()
        # a store is reported by all; a read only where its fault installed W, which depends on what was mapped
        assert len({frozenset(_written(steps) & answer) for answer in answers}) <= 1
    contents = [[guest.vm.host_read(guest.hva + page * PAGE, 4) for _, page in steps] for guest in guests]
    assert contents[0] == contents[1] == contents[2]
    for guest in guests:
        guest.close()


def _written(steps: list[tuple[str, int]]) -> set[int]:
    """Pages that are written and never merely read."""
    return {page for kind, page in steps if kind == "write"} - {page for kind, page in steps if kind == "read"}


def test_a_fault_prefetches_its_eight_neighbours_as_old_pages(mmu_guest) -> None:
    guest = mmu_guest(SHADOW_VM, level=1)
    guest.read(11)
    mapped = [gfn for gfn in range(32) if guest.mmu.fmt.is_present(guest.spte(gfn)[0])]
    assert mapped == list(range(8, 16))
    assert [gfn for gfn in mapped if guest.mmu.fmt.is_accessed(guest.spte(gfn)[0])] == [11]
    guest.close()


def test_nothing_is_prefetched_in_a_logged_slot_or_without_a_bits(mmu_guest) -> None:
    for config, logged in ((SHADOW_VM, True), (replace(SHADOW_VM, ad_bits=False), False)):
        guest = mmu_guest(config, level=1)
        guest.log(logged)
        guest.write(11)
        assert guest.counts() == (1, 0, 0)
        guest.close()


def test_a_huge_page_in_the_way_is_dropped_to_an_empty_table(mmu_guest) -> None:
    guest = mmu_guest(SHADOW_VM)
    guest.write(5)
    guest.log()
    assert guest.counts() == (0, 1, 0), "eager splitting is the TDP MMU's"
    guest.write(7)
    assert guest.counts() == (1, 0, 0)
    guest.close()


def test_one_exclusive_lock_serves_every_fault(mmu_guest) -> None:
    for mmu, exclusive in (("shadow", True), ("tdp-5.10", True), ("tdp", False)):
        guest = mmu_guest(replace(SHADOW_VM, mmu=mmu), level=1)
        with guest.mmu.lock.read() as shared:
            assert shared == (not exclusive) and guest.mmu.lock.writer == exclusive
        guest.close()


def test_the_reverse_map_costs_a_head_per_gfn_and_level(mmu_guest) -> None:
    guest = mmu_guest(SHADOW_VM, pages=512 * 512)
    assert guest.mmu.memory()["rmap-bytes"] == 8 * (512 * 512 + 512 + 1)
    guest.close()
    guest = mmu_guest(pages=512 * 512)
    guest.write(5)
    assert guest.mmu.memory()["rmap-bytes"] == 0, "the TDP MMU has no rmap"
    assert guest.mmu.memory()["table-bytes"] == 3 * PAGE
    guest.close()


def test_masked_rearming_walks_one_rmap_for_each_set_bit(mmu_guest) -> None:
    guest = mmu_guest(replace(SHADOW_VM, pml=False), level=1)
    guest.log()
    guest.write(1, 5)
    walks: list[int] = []
    guest.vm.meter = type("Meter", (), {"count": lambda _, op, n=1: walks.append(n) if op == "rmap_walk" else None})()
    guest.mmu.enable_log_dirty_pt_masked(guest.slot, 0, 0b100010)
    assert len(walks) == 2
    guest.vm.flush_remote_tlbs()
    guest.mmu.zap_all_fast()
    guest.close()


def test_zap_all_counts_the_pages_it_zapped(mmu_guest) -> None:
    guest = mmu_guest(SHADOW_VM, level=1)
    guest.write(5, 600)
    guest.mmu.zap_all_fast()
    assert guest.vm.stats.mmu_shadow_zapped == 5 and guest.counts() == (0, 0, 0)
    guest.write(5)
    guest.close()


# -- nested --------------------------------------------------------------------------------------------------------

ROOT, L3, L2, L1, DATA = 16, 17, 18, 19, 64


def nested(guest, *, ad_bits: bool = False) -> NestedGuest:
    """L1 has built tables that map L2 gfns 0..7 and 512 + 0..7 to L1 gfns 64..71."""
    guest.write(ROOT, L3, L2, L1, L1 + 1)
    l2 = NestedGuest(guest.vm, ROOT, ad_bits=ad_bits)
    l2.write_entry(guest.vcpu, ROOT, 0, GuestPte(L3))
    l2.write_entry(guest.vcpu, L3, 0, GuestPte(L2))
    for region in range(2):
        l2.write_entry(guest.vcpu, L2, region, GuestPte(L1 + region))
        for i in range(8):
            l2.write_entry(guest.vcpu, L1 + region, i, GuestPte(DATA + i))
    return l2


@ROWS
def test_l2_runs_on_shadow_pages_beside_whatever_serves_l1(mmu_guest, mmu: str) -> None:
    guest = mmu_guest(replace(SHADOW_VM, mmu=mmu), level=1)
    l2 = nested(guest)
    assert l2.access(guest.vcpu, 3 * PAGE, write=True) == guest.vm.host.pfn(guest.hva + (DATA + 3) * PAGE)
    assert l2.access(guest.vcpu, 100 * PAGE, write=False) is None
    assert guest.vm.stats.pf_guest == 0, "an EPT violation for L1 is no #PF"
    assert len(guest.mmu.shadow.pages) == 4 and guest.mmu.rmap_bytes() > 0
    guest.close()


@ROWS
def test_upper_tables_of_l1_are_write_tracked_and_a_store_to_one_is_emulated_and_zaps_the_entry(
    mmu_guest, mmu: str
) -> None:
    guest = mmu_guest(replace(SHADOW_VM, mmu=mmu), level=1)
    l2 = nested(guest)
    l2.access(guest.vcpu, 3 * PAGE, write=True)
    fmt = guest.mmu.fmt
    for table in (ROOT, L3, L2, L1):
        assert guest.mmu.state.is_write_tracked(guest.slot, table) == (table != L1)
        assert not guest.mmu.fmt.is_mmu_writable(guest.spte(table)[0])
    emulated = guest.vm.stats.insn_emulation
    l2.write_entry(guest.vcpu, L2, 0, GuestPte(L1 + 1))
    assert guest.vm.stats.insn_emulation == emulated + 1
    assert guest.vm.stats.mmu_pte_write == 1 and guest.vm.stats.mmu_pde_zapped == 1
    assert not fmt.is_present(l2.walk(3)[0]) and l2.walk(3)[1] == 2
    guest.close()


@ROWS
@pytest.mark.parametrize("pml", [True, False])
def test_dirty_pages_of_l2_are_charged_to_the_l1_frame(mmu_guest, mmu: str, pml: bool) -> None:
    """The kernel's nested_dirty_log_test: two L2 gfns alias one L1 gfn."""
    guest = mmu_guest(replace(SHADOW_VM, mmu=mmu, pml=pml), level=1)
    l2 = nested(guest)
    guest.log()
    guest.get()
    l2.access(guest.vcpu, 0, write=False)
    assert guest.get() & {DATA, DATA + 1} == {DATA}, "a read fault installs W"
    l2.access(guest.vcpu, 512 * PAGE, write=True)
    l2.access(guest.vcpu, 1 * PAGE, write=True)
    assert guest.get() & {DATA, DATA + 1, 512} == {DATA, DATA + 1}
    l2.access(guest.vcpu, 0, write=False)
    assert guest.get() & {DATA, DATA + 1} == set(), "a read of a mapped page is not a write"
    for alias in (0, 512):
        l2.access(guest.vcpu, alias * PAGE, write=True)
        assert guest.get() & {DATA} == {DATA}, "each alias has an SPTE of its own, and each was protected"
    assert guest.mmu.fmt.ad_type(l2.walk(0)[0]) == AdType.DISABLED, "where L1's EPT has no A/D bits, nor has KVM's"
    guest.close()


@ROWS
def test_with_guest_d_bits_a_read_leaves_the_page_clean(mmu_guest, mmu: str) -> None:
    guest = mmu_guest(replace(SHADOW_VM, mmu=mmu), level=1)
    l2 = nested(guest, ad_bits=True)
    guest.log()
    guest.get()
    l2.access(guest.vcpu, 0, write=False)
    assert DATA not in guest.get()
    l2.access(guest.vcpu, 0, write=True)
    assert guest.get() >= {DATA, L1}, "setting D in L1's entry is a store to L1's table"
    assert l2.entries[L1, 0].dirty
    l2.access(guest.vcpu, PAGE, write=False)
    assert guest.get() >= {L1} and l2.entries[L1, 1].accessed, "so is setting A, which a load does"
    guest.close()


@pytest.mark.parametrize(
    ("vendor", "pml", "ad_bits", "expected"),
    [
        ("intel", True, True, AdType.WRPROT_ONLY), ("intel", False, True, AdType.ENABLED),
        ("intel", True, False, AdType.DISABLED), ("amd", False, False, AdType.ENABLED),
    ],
)  # fmt: skip
def test_how_l2s_leaves_are_logged_follows_from_l1s_ept_and_pml(mmu_guest, vendor, pml, ad_bits, expected) -> None:
    guest = mmu_guest(VmConfig(smm=False, vendor=vendor, pml=pml), level=1)
    l2 = nested(guest, ad_bits=ad_bits)
    l2.access(guest.vcpu, 0, write=True)
    assert guest.mmu.fmt.ad_type(l2.walk(0)[0]) == expected
    guest.close()


@ROWS
def test_every_operation_acts_on_both_mmus(mmu_guest, mmu: str) -> None:
    guest = mmu_guest(replace(SHADOW_VM, mmu=mmu, pml=False), level=1)
    l2 = nested(guest)
    fmt = guest.mmu.fmt
    guest.write(DATA)
    l2.access(guest.vcpu, 0, write=True)
    guest.log()
    assert not fmt.is_writable(guest.spte(DATA)[0]) and not fmt.is_writable(l2.walk(0)[0])
    l2.access(guest.vcpu, 0, write=True)
    assert guest.mmu.age_gfn_range(guest.slot, DATA, DATA + 1)
    assert not guest.mmu.test_age_gfn(guest.slot, DATA)
    guest.vm.flush_remote_tlbs()
    l2.access(guest.vcpu, 0, write=True)
    guest.mmu.unmap_hva_range(guest.hva + DATA * PAGE, guest.hva + (DATA + 1) * PAGE)
    assert not fmt.is_present(guest.spte(DATA)[0]) and not fmt.is_present(l2.walk(0)[0])
    l2.access(guest.vcpu, 0, write=True)
    guest.mmu.zap_all_fast()
    assert list(guest.mmu.shadow.pages) == [] and guest.counts() == (0, 0, 0)
    assert len(guest.mmu.shadow.pages) == 1, "a root stays, invalid, until its vCPU loads another"
    l2.access(guest.vcpu, 0, write=True)
    assert len(guest.mmu.shadow.pages) == 4
    guest.close()


def test_a_huge_page_of_l1_tables_is_mapped_as_large_as_both_allow(mmu_guest) -> None:
    for level, expected in ((1, 1), (2, 2)):
        guest = mmu_guest(level=level, pages=4096)
        guest.write(ROOT, L3, L2)
        l2 = NestedGuest(guest.vm, ROOT)
        l2.write_entry(guest.vcpu, ROOT, 0, GuestPte(L3))
        l2.write_entry(guest.vcpu, L3, 0, GuestPte(L2))
        l2.write_entry(guest.vcpu, L2, 0, GuestPte(1024, leaf=True))
        assert l2.access(guest.vcpu, 7 * PAGE, write=True) == guest.vm.host.pfn(guest.hva + 1031 * PAGE)
        assert l2.walk(7)[1] == expected
        guest.close()


def test_a_table_that_is_written_and_never_used_is_unshadowed(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=True)
    for i in range(3):
        assert guest.mmu.state.is_write_tracked(guest.slot, L2)
        l2.write_entry(guest.vcpu, L2, 100 + i, GuestPte(L1))
    assert guest.vm.stats.mmu_flooded == 1 and not guest.mmu.state.is_write_tracked(guest.slot, L2)
    for i in range(5):
        l2.write_entry(guest.vcpu, L1, 100 + i, GuestPte(DATA))
    assert guest.vm.stats.mmu_flooded == 1, "the lowest level is exempt"
    assert l2.access(guest.vcpu, 0, write=True) is not None
    for _ in range(5):
        l2.write_entry(guest.vcpu, L2, 100, GuestPte(L1))
        l2.write_entry(guest.vcpu, L2, 0, GuestPte(L1))
        l2.access(guest.vcpu, 0, write=True)
    assert guest.vm.stats.mmu_flooded == 1, "use in between starts the count anew"
    guest.close()


def test_too_many_shadow_pages_are_recycled_oldest_first(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    tables = range(200, 300)
    guest.write(*tables)
    for i, table in enumerate(tables):
        l2.write_entry(guest.vcpu, L2, 10 + i, GuestPte(table))
        l2.write_entry(guest.vcpu, table, 0, GuestPte(DATA + 100))
        assert l2.access(guest.vcpu, (10 + i) * 512 * PAGE, write=False) is not None
        assert len(guest.mmu.shadow.pages) <= 64
    assert guest.vm.stats.mmu_recycled >= 40 and guest.vm.stats.max_mmu_rmap_size > 20
    guest.close()


def test_rights_of_l1_tables_add_up_along_the_walk(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    l2.write_entry(guest.vcpu, L2, 0, GuestPte(L1, access=ACC_ALL & ~ACC_WRITE))
    assert l2.access(guest.vcpu, 0, write=True) is None and l2.access(guest.vcpu, 0, write=False) is not None
    assert l2.access(guest.vcpu, 512 * PAGE, write=True) is not None
    guest.close()


def test_the_end_of_the_log_leaves_what_follows_a_table_of_the_guest(mmu_guest) -> None:
    """Only direct tables are looked at for what could be larger (sp->role.direct)."""
    guest, far = mmu_guest(SHADOW_VM, pages=4096), 1024
    l2 = nested(guest)
    l2.write_entry(guest.vcpu, L1, 3, GuestPte(far + 3))
    guest.log()
    guest.write(far + 3)
    l2.access(guest.vcpu, 3 * PAGE, write=True)
    assert guest.mmu.fmt.is_present(guest.spte(far + 3)[0]) and guest.spte(far + 3)[1] == 1
    guest.log(False)
    assert not guest.mmu.fmt.is_present(guest.spte(far + 3)[0]), "the direct leaf could be larger"
    assert guest.mmu.fmt.is_present(l2.walk(3)[0])
    guest.close()


def test_an_rmap_without_the_entry_to_remove_is_an_assertion(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=True)
    rmap, (_, _, entry) = guest.mmu.shadow.rmap, guest.mmu.shadow.rmap.shadowed_in(0, DATA, DATA + 1)[0]
    with pytest.raises(AssertionError, match=rf"is not in the rmap of gfn {DATA + 5:#x} level 1"):
        rmap.remove(0, 1, DATA + 5, RmapEntry(entry.table, entry.at))
    with pytest.raises(AssertionError, match="is in the rmap of gfn 0x40 level 1 already"):
        rmap.add(0, 1, DATA, entry)
    guest.close()
