"""Eager splitting of a nested guest's huge pages, the page limit, NX and prefetch where KVM shadows L1's tables."""

from __future__ import annotations

import errno
import io
import json
from dataclasses import replace

import pytest

from migsim.kvm.config import VmConfig
from migsim.kvm.ioctl import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
from migsim.kvm.mmu_state import Sched
from migsim.kvm.nested import GuestPte, NestedGuest
from migsim.kvm.shadow_pages import hash_bucket
from migsim.kvm.spte import ACC_ALL, ACC_WRITE
from migsim.kvm.trace import JsonLines
from migsim.kvm.vintage import TDP, TDP_5_19

PAGE = 4096
ROOT, L3, L2, L1, DATA = 16, 17, 18, 19, 1024
INTEL = VmConfig(smm=False)
WP = VmConfig(smm=False, pml=False)


def huge(guest, regions: int = 2, *, level: int = 2) -> NestedGuest:
    """L1 maps L2's first `regions` pages of `level` to its own from DATA (2M) or one 1G page on."""
    guest.write(ROOT, L3, L2, L1)
    l2 = NestedGuest(guest.vm, ROOT)
    l2.write_entry(guest.vcpu, ROOT, 0, GuestPte(L3))
    if level == 3:
        l2.write_entry(guest.vcpu, L3, 0, GuestPte(512 * 512, leaf=True))
        return l2
    l2.write_entry(guest.vcpu, L3, 0, GuestPte(L2))
    for region in range(regions):
        l2.write_entry(guest.vcpu, L2, region, GuestPte(DATA + 512 * region, leaf=True))
    return l2


def splits(out: io.StringIO) -> list[tuple[int, int]]:
    """(level, errno) of each traced split, in order."""
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    return [(e["level"], e["errno"]) for e in events if e["event"] == "kvm_mmu_split_huge_page"]


@pytest.mark.parametrize("config", [INTEL, WP, VmConfig(smm=False, vendor="amd")], ids=["pml", "wrprot", "npt"])
def test_a_nested_huge_page_is_split_when_logging_starts(mmu_guest, config: VmConfig) -> None:
    guest = mmu_guest(config, pages=4096)
    l2, fmt = huge(guest), guest.mmu.fmt
    for region in (0, 512):
        l2.access(guest.vcpu, region * PAGE, write=True)
        assert l2.walk(region)[1] == 2
    flushes = guest.vm.stats.remote_tlb_flush_requests
    guest.log()
    assert guest.vm.stats.remote_tlb_flush_requests == flushes + 1, "splitting flushes nothing"
    assert guest.vm.stats.pages_2m == 0
    for gfn in (0, 511, 512, 1023):
        spte, level = l2.walk(gfn)
        assert level == 1 and fmt.is_mmu_writable(spte) and not fmt.is_writable(spte), "split first, then protected"
        assert fmt.pfn(spte) == guest.vm.host.pfn(guest.hva + (DATA + gfn) * PAGE)
    guest.check()
    guest.get()
    assert l2.access(guest.vcpu, 700 * PAGE, write=True) is not None
    assert guest.get() == {DATA + 700}
    guest.close()


@pytest.mark.parametrize("mmu", ["tdp", "shadow"])
def test_ending_the_log_drops_the_small_pages_l2s_huge_page_was_split_to(mmu_guest, mmu: str) -> None:
    guest = mmu_guest(replace(WP, mmu=mmu), pages=4096)
    l2, fmt = huge(guest), guest.mmu.fmt
    guest.write(L1)
    l2.write_entry(guest.vcpu, L2, 1, GuestPte(L1))
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(DATA + 512))
    guest.log()
    for gfn in (3, 512):
        l2.access(guest.vcpu, gfn * PAGE, write=True)
    assert l2.walk(3)[1] == l2.walk(512)[1] == 1
    flushes = guest.vm.stats.remote_tlb_flush_requests
    guest.log(False)
    assert guest.vm.stats.remote_tlb_flush_requests > flushes
    assert not fmt.is_present(l2.walk(3)[0])
    guest.check()
    l2.access(guest.vcpu, 3 * PAGE, write=False)
    assert l2.walk(3)[1] == 2
    if mmu == "tdp":
        assert fmt.is_present(l2.walk(512)[0]), "L1 itself maps that page small"
    guest.close()


def test_until_6_0_the_fault_splits_a_nested_guests_huge_page(mmu_guest) -> None:
    guest = mmu_guest(WP, pages=4096, vintage=TDP_5_19)
    l2 = huge(guest)
    l2.access(guest.vcpu, 0, write=True)
    guest.log()
    assert l2.walk(0)[1] == 2 and not guest.mmu.fmt.is_writable(l2.walk(0)[0])
    l2.access(guest.vcpu, 5 * PAGE, write=True)
    assert l2.walk(5)[1] == 1 and not guest.mmu.fmt.is_present(l2.walk(300)[0]), "dropped to an empty table"
    guest.close()


def test_clear_under_initially_set_splits_what_it_rearms(mmu_guest) -> None:
    guest = mmu_guest(WP, pages=4096)
    guest.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (3,))
    l2 = huge(guest)
    for region in (0, 512):
        l2.access(guest.vcpu, region * PAGE, write=True)
    guest.log()
    assert l2.walk(0)[1] == l2.walk(512)[1] == 2, "enabling does no work"
    guest.get()
    guest.clear(DATA + 5)
    assert l2.walk(5)[1] == 1 and l2.walk(512)[1] == 2
    assert guest.mmu.fmt.is_writable(l2.walk(6)[0]) and not guest.mmu.fmt.is_writable(l2.walk(5)[0])
    guest.check()
    guest.close()


def test_a_1g_page_is_split_twice(mmu_guest) -> None:
    guest = mmu_guest(WP, pages=2 * 512 * 512, level=3)
    l2, out = huge(guest, level=3), io.StringIO()
    l2.access(guest.vcpu, 5 * PAGE, write=True)
    assert l2.walk(0)[1] == 3
    guest.mmu.shadow.limit.set_nr_mmu_pages(2000)
    guest.vm.trace_sink = JsonLines(out, frozenset({"kvm_mmu_split_huge_page"}))
    start = 512 * 512
    guest.mmu.shadow.split_slot(guest.slot, start, start + 1024)
    guest.vm.trace_sink = None
    assert splits(out) == [(3, -errno.EAGAIN), (3, 0), (2, 0), (2, 0)]
    assert l2.walk(0)[1] == l2.walk(1023)[1] == 1 and l2.walk(1024)[1] == 2
    guest.check()
    guest.close()


def test_aliases_share_the_page_they_are_split_to(mmu_guest) -> None:
    guest = mmu_guest(WP, pages=4096)
    l2 = huge(guest)
    l2.write_entry(guest.vcpu, L2, 7, GuestPte(DATA, leaf=True))
    for region in (0, 7):
        l2.access(guest.vcpu, 512 * region * PAGE, write=True)
    before = len(guest.mmu.shadow.pages)
    guest.log()
    assert len(guest.mmu.shadow.pages) == before + 1 and l2.walk(5) == l2.walk(7 * 512 + 5)
    guest.close()


def test_memory_for_splitting_is_fetched_with_the_lock_dropped(mmu_guest) -> None:
    guest, out, held = mmu_guest(WP, pages=60 * 512), io.StringIO(), []

    class Watch(Sched):
        def resched(self) -> None:
            held.append(guest.mmu.lock.held)

    l2 = huge(guest, regions=45)
    for region in range(45):
        l2.access(guest.vcpu, 512 * region * PAGE, write=True)
    guest.mmu.state.sched = Watch()
    guest.vm.trace_sink = JsonLines(out, frozenset({"kvm_mmu_split_huge_page"}))
    guest.log()
    guest.vm.trace_sink = None
    assert splits(out).count((2, -errno.EAGAIN)) == 2, "a cache holds 40 pages"
    assert held == [False] * 3, "twice for that, and once for the huge page that L1 itself uses"
    assert splits(out).count((2, 0)) >= 45
    guest.mmu.state.sched = Sched()
    guest.close()


def test_a_vm_with_too_many_shadow_pages_leaves_splitting_to_the_fault(mmu_guest) -> None:
    guest, out = mmu_guest(WP, pages=80 * 512), io.StringIO()
    l2 = huge(guest, regions=70)
    for region in range(70):
        l2.access(guest.vcpu, 512 * region * PAGE, write=True)
    guest.vm.set_nr_mmu_pages(64)
    guest.vm.trace_sink = JsonLines(out, frozenset({"kvm_mmu_split_huge_page"}))
    guest.log()
    guest.vm.trace_sink = None
    assert (2, -errno.ENOSPC) in splits(out) and splits(out).count((2, 0)) >= 50
    assert len(guest.mmu.shadow.pages) == 64 - 5
    split = {region for region in range(70) if l2.walk(512 * region)[1] == 1}
    assert 50 <= len(split) < 70
    guest.check()
    guest.get()
    whole = next(region for region in range(70) if region not in split)
    assert l2.access(guest.vcpu, (512 * whole + 3) * PAGE, write=True) is not None
    assert guest.get() == {DATA + 512 * whole + 3}
    guest.close()


def test_of_a_huge_page_of_l1_a_run_of_neighbours_that_leaves_the_slot_is_left_out(mmu_guest) -> None:
    guest = mmu_guest(pages=DATA + 4, level=1)
    l2, fmt = huge(guest), guest.mmu.fmt
    l2.access(guest.vcpu, PAGE, write=False)
    assert [gfn for gfn in range(8) if fmt.is_present(l2.walk(gfn)[0])] == [0, 1], "2 to 7 end beyond the slot"
    guest.close()


def test_execution_in_l2_takes_the_huge_page_apart_and_recovery_puts_it_together(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, nx_huge_pages=True), pages=4096)
    l2, stats = huge(guest), guest.vm.stats
    l2.access(guest.vcpu, 0, write=True)
    assert l2.walk(0)[1] == 2
    assert l2.access(guest.vcpu, 7 * PAGE, write=False, exec=True) is not None
    assert l2.walk(7)[1] == 1 and stats.nx_lpage_splits == 1
    l2.access(guest.vcpu, 200 * PAGE, write=True)
    assert l2.walk(200)[1] == 1, "a load or store does not map huge over a table kept small"
    assert guest.mmu.recover_nx(ratio=1) == 1 and stats.nx_lpage_splits == 0
    l2.access(guest.vcpu, 200 * PAGE, write=True)
    assert l2.walk(200)[1] == 2
    guest.close()


@pytest.mark.parametrize(("vintage", "level"), [(TDP, 1), (TDP_5_19, 2)], ids=lambda value: str(value))
def test_what_execution_in_l2_made_small_stays_small_even_if_nothing_huge_was_possible_then(
    mmu_guest, vintage, level: int
) -> None:
    guest = mmu_guest(replace(INTEL, nx_huge_pages=True), pages=4096, vintage=vintage)
    l2 = huge(guest)
    guest.mmu.track_writes(guest.slot, DATA + 300)
    l2.access(guest.vcpu, 0, write=False, exec=True)
    assert l2.walk(0)[1] == 1 and guest.vm.stats.nx_lpage_splits == 0
    guest.mmu.untrack_writes(guest.slot, DATA + 300)
    l2.access(guest.vcpu, 100 * PAGE, write=False)
    assert l2.walk(100)[1] == level
    guest.close()


def test_nx_recovery_leaves_pages_of_logged_slots_in_l2_too(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, nx_huge_pages=True), pages=4096)
    l2 = huge(guest)
    l2.access(guest.vcpu, 7 * PAGE, write=False, exec=True)
    guest.log()
    zapped = guest.vm.stats.mmu_shadow_zapped
    assert guest.mmu.recover_nx(ratio=1) == 1
    assert guest.vm.stats.mmu_shadow_zapped == zapped and l2.walk(7)[1] == 1
    guest.close()


# -- the page limit ------------------------------------------------------------------------------------------------


def test_the_page_limit_follows_the_slots_until_user_space_sets_it(mmu_guest) -> None:
    guest = mmu_guest(pages=512)
    limit = guest.mmu.shadow.limit
    assert limit.limit == 64
    hva = guest.vm.alloc_memory(16384 * PAGE)
    guest.vm.set_user_memory_region(2, 0, 1 << 32, 16384 * PAGE, hva)
    assert limit.limit == (512 + 16384) // 50
    with pytest.raises(OSError, match="at least 64") as refused:
        guest.vm.set_nr_mmu_pages(63)
    assert refused.value.errno == errno.EINVAL
    guest.vm.set_nr_mmu_pages(100)
    guest.vm.set_user_memory_region(2, 0, 1 << 32, 0, hva)
    assert limit.limit == 100
    guest.close()


def test_lowering_the_limit_zaps_the_oldest_pages_at_once(mmu_guest) -> None:
    guest = mmu_guest(WP, pages=80 * 512)
    l2 = huge(guest, regions=70)
    guest.log()
    for region in range(70):
        l2.access(guest.vcpu, 512 * region * PAGE, write=True)
    used, flushes = guest.mmu.shadow.limit.used, guest.vm.stats.remote_tlb_flush_requests
    assert used > 70
    guest.vm.set_nr_mmu_pages(64)
    assert guest.vm.stats.mmu_recycled == used - 1 and guest.vm.stats.remote_tlb_flush_requests == flushes + 1
    assert guest.mmu.shadow.limit.limit == 1, "L2's tree hung on its oldest page; what is left becomes the limit"
    guest.check()
    with pytest.raises(OSError, match="in use by roots") as refused:
        l2.access(guest.vcpu, 0, write=True)
    assert refused.value.errno == errno.ENOSPC
    guest.vm.set_nr_mmu_pages(64)
    for region in range(70):
        assert l2.access(guest.vcpu, 512 * region * PAGE, write=True) is not None
        assert guest.mmu.shadow.limit.used <= 64 + 1
    guest.close()


def test_direct_tables_count_and_are_recycled_where_the_shadow_mmu_keeps_them(mmu_guest) -> None:
    guest = mmu_guest(replace(INTEL, mmu="shadow"), pages=100 * 512, level=1)
    guest.vm.set_nr_mmu_pages(64)
    for region in range(100):
        guest.write(512 * region)
        assert guest.mmu.shadow.limit.used <= 64
    guest.check()
    assert guest.vm.stats.mmu_recycled >= 100 + 3 - 64
    assert guest.vm.host_read(guest.hva, 4) == b"\x01\0\0\0"
    guest.write(0)
    guest.close()
    guest = mmu_guest(pages=100 * 512, level=1)
    guest.vm.set_nr_mmu_pages(64)
    guest.write(*(512 * region for region in range(100)))
    assert guest.mmu.shadow.limit.used == 0 and guest.vm.stats.mmu_recycled == 0, "tables of the TDP MMU do not count"
    guest.close()


# -- stores to tables, hashing, prefetch -----------------------------------------------------------------------------


def test_every_emulated_store_asks_and_only_entries_count_as_upper_ones(mmu_guest) -> None:
    guest = mmu_guest(level=1, pages=2048)
    l2, stats = huge(guest), guest.vm.stats
    guest.mmu.track_writes(guest.slot, 700)
    guest.write(700)
    assert stats.mmu_pte_write == 0, "nothing is shadowed yet"
    l2.access(guest.vcpu, 0, write=True)
    guest.write(700)
    assert (stats.mmu_pte_write, stats.mmu_pde_zapped) == (1, 0)
    l2.write_entry(guest.vcpu, L2, 9, GuestPte(DATA, leaf=True))
    assert (stats.mmu_pte_write, stats.mmu_pde_zapped) == (2, 1), "a new entry, though nothing was there"
    l2.write_entry(guest.vcpu, L2, 9, None)
    assert (stats.mmu_pte_write, stats.mmu_pde_zapped) == (3, 1)
    guest.mmu.untrack_writes(guest.slot, 700)
    guest.close()


def test_a_store_across_two_entries_is_none_of_a_page_table(mmu_guest) -> None:
    guest = mmu_guest(level=1, pages=2048)
    l2 = huge(guest)
    l2.access(guest.vcpu, 0, write=True)
    guest.vcpu.run([("w", L2 * PAGE + 6, 0)])
    assert guest.vm.stats.mmu_flooded == 1 and not guest.mmu.state.is_write_tracked(guest.slot, L2)
    guest.close()


def test_collisions_in_the_page_hash_are_counted(mmu_guest) -> None:
    guest = mmu_guest(level=1, pages=40000)
    buckets: dict[int, list[int]] = {}
    for gfn in range(2048, 40000):
        buckets.setdefault(hash_bucket(gfn), []).append(gfn)
    alike = next(gfns for gfns in buckets.values() if len(gfns) >= 3)[:3]
    guest.write(*alike)
    l2 = huge(guest)
    for i, table in enumerate(alike):
        l2.write_entry(guest.vcpu, L2, 10 + i, GuestPte(table))
        l2.write_entry(guest.vcpu, table, 0, GuestPte(DATA))
        l2.access(guest.vcpu, 512 * (10 + i) * PAGE, write=False)
    assert guest.vm.stats.max_mmu_page_hash_collisions == 2
    assert guest.vm.stats.mmu_cache_miss == len(guest.mmu.shadow.pages)
    guest.close()


@pytest.mark.parametrize("logged", [False, True])
def test_a_fault_of_l2_maps_its_neighbours_too(mmu_guest, logged: bool) -> None:
    guest = mmu_guest(level=1, pages=2048)
    guest.write(ROOT, L3, L2, L1)
    l2, fmt = NestedGuest(guest.vm, ROOT, ad_bits=True), guest.mmu.fmt
    for table, entry, to in ((ROOT, 0, L3), (L3, 0, L2), (L2, 0, L1)):
        l2.write_entry(guest.vcpu, table, entry, GuestPte(to))
    for i in range(16):
        rights = ACC_ALL & ~ACC_WRITE if i == 2 else ACC_ALL
        l2.write_entry(guest.vcpu, L1, i, GuestPte(DATA + i, access=rights, accessed=i != 5, dirty=True))
    guest.log(logged)
    l2.access(guest.vcpu, 3 * PAGE, write=False)
    present = [i for i in range(16) if fmt.is_present(l2.walk(i)[0])]
    assert present == ([3] if logged else [0, 1, 2, 3, 4]), "until one that was never used; never to store into a log"
    assert [i for i in present if fmt.is_accessed(l2.walk(i)[0])] == [3]
    guest.check()
    guest.close()


def small(guest) -> NestedGuest:
    """L1 maps L2's first 2M by a table of small pages, empty so far."""
    guest.write(ROOT, L3, L2, L1)
    l2 = NestedGuest(guest.vm, ROOT)
    for table, to in ((ROOT, L3), (L3, L2), (L2, L1)):
        l2.write_entry(guest.vcpu, table, 0, GuestPte(to))
    return l2


def test_neighbours_of_an_mmio_page_are_mapped_on_both_sides(mmu_guest) -> None:
    guest = mmu_guest(level=1, pages=2048)
    l2, fmt = small(guest), guest.mmu.fmt
    for i in range(8):
        l2.write_entry(guest.vcpu, L1, i, GuestPte(0x50000 if i == 2 else DATA + i))
    l2.page_fault(guest.vcpu, 2, write=False)
    assert [i for i in range(8) if fmt.is_present(l2.walk(i)[0])] == [0, 1, 3, 4, 5, 6, 7]
    guest.close()


def test_an_entry_moved_to_another_slot_with_the_same_memory_is_logged_there(mmu_guest) -> None:
    guest, other = mmu_guest(level=1, pages=2048), 1 << 20
    guest.vm.set_user_memory_region(2, 0, other * PAGE, 64 * PAGE, guest.hva + 64 * PAGE)
    l2 = small(guest)
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(64, access=ACC_ALL & ~ACC_WRITE))
    l2.access(guest.vcpu, 0, write=False)
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(other))
    l2.access(guest.vcpu, 0, write=True)
    guest.vm.set_user_memory_region(2, 1, other * PAGE, 64 * PAGE, guest.hva + 64 * PAGE)
    assert not guest.mmu.fmt.is_writable(l2.walk(0)[0])
    guest.check()
    guest.vm.host_discard(guest.hva + 64 * PAGE, PAGE)
    guest.close()


def test_a_vm_without_tdp_counts_the_page_faults_it_gives_to_the_guest(mmu_guest) -> None:
    guest = mmu_guest(VmConfig(smm=False, tdp=False, mmu="shadow", vendor="amd"), level=1, pages=2048)
    guest.write(ROOT)
    tables = NestedGuest(guest.vm, ROOT)
    assert tables.access(guest.vcpu, 5 * PAGE, write=False) is None and guest.vm.stats.pf_guest == 1
    guest.close()


def test_eager_splitting_is_a_column_of_the_vintage(mmu_guest) -> None:
    assert TDP.nested_eager_split and TDP.eager_split and TDP_5_19.eager_split and not TDP_5_19.nested_eager_split
