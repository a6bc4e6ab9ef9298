"""Unsync shadow pages: the guest writes its lowest tables unseen, and what it maps is right again once it flushes."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.kvm.config import VmConfig
from migsim.kvm.mmu_state import Sched
from migsim.kvm.nested import GuestPte, NestedGuest
from migsim.kvm.spte import ACC_ALL, ACC_WRITE
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.trace import JsonLines
from migsim.sim.meter import CountingMeter

PAGE = 4096
ROOT, L3, L2, L1, DATA = 16, 17, 18, 19, 64
TDP = VmConfig(smm=False)
ROWS = pytest.mark.parametrize("mmu", ["shadow", "tdp-5.10", "tdp"])
NO_TDP = VmConfig(smm=False, tdp=False, mmu="shadow", vendor="amd")


def nested(guest, *, ad_bits: bool = False, entries: int = 8) -> NestedGuest:
    """The guest's tables map its pages 0..7 and 512 + 0..7 to gfns 64..71."""
    guest.write(ROOT, L3, L2, L1, L1 + 1)
    l2 = NestedGuest(guest.vm, ROOT, ad_bits=ad_bits)
    l2.write_entry(guest.vcpu, ROOT, 0, GuestPte(L3))
    l2.write_entry(guest.vcpu, L3, 0, GuestPte(L2))
    for region in range(2):
        l2.write_entry(guest.vcpu, L2, region, GuestPte(L1 + region))
        for i in range(entries):
            l2.write_entry(guest.vcpu, L1 + region, i, GuestPte(DATA + i))
    return l2


def frame(guest, gfn: int) -> int:
    return guest.vm.host.pfn(guest.hva + (gfn - guest.base) * PAGE)


@ROWS
def test_a_store_to_a_lowest_table_is_not_emulated_and_shows_after_the_flush(mmu_guest, mmu: str) -> None:
    guest = mmu_guest(replace(TDP, mmu=mmu), level=1)
    l2, stats, fmt = nested(guest), guest.vm.stats, guest.mmu.fmt
    assert l2.access(guest.vcpu, 3 * PAGE, write=False) == frame(guest, DATA + 3)
    assert not fmt.is_mmu_writable(guest.spte(L1)[0]), "a table that is shadowed is write-protected"
    emulated = stats.insn_emulation
    l2.write_entry(guest.vcpu, L1, 3, GuestPte(DATA + 9))
    assert stats.insn_emulation == emulated and stats.mmu_pte_write == 0
    assert stats.mmu_unsync == 1 and fmt.is_writable(guest.spte(L1)[0])
    guest.check()
    assert l2.access(guest.vcpu, 3 * PAGE, write=False) == frame(guest, DATA + 3), "the old entry, as in a TLB"
    l2.invept(guest.vcpu)
    assert l2.access(guest.vcpu, 3 * PAGE, write=False) == frame(guest, DATA + 9)
    assert stats.mmu_unsync == 0 and not fmt.is_mmu_writable(guest.spte(L1)[0])
    guest.close()


@pytest.mark.parametrize("how", ["flush", "invlpg"])
def test_a_guest_without_tdp_brings_its_entries_up_to_date_by_flush_or_invlpg(mmu_guest, how: str) -> None:
    guest = mmu_guest(NO_TDP, level=1, vcpus=2)
    tables, paging = nested(guest), guest.vcpus[1]
    paging.set_paging(tables)
    assert paging.run([("w", 3 * PAGE, 33), ("w", 4 * PAGE, 44)]).done == 2
    for page in (3, 4):
        tables.write_entry(guest.vcpu, L1, page, GuestPte(DATA + 6 + page, accessed=True, dirty=True))
    assert guest.vm.stats.mmu_unsync == 1
    if how == "invlpg":
        tables.invlpg(paging, 3 * PAGE)
        assert guest.vm.stats.mmu_unsync == 1, "INVLPG makes one entry right, the page stays out of step"
    else:
        tables.flush(paging)
        assert guest.vm.stats.mmu_unsync == 0
    assert paging.run([("w", 3 * PAGE, 1), ("w", 4 * PAGE, 2)]).done == 2
    moved = {page: guest.vm.host_read(guest.hva + (DATA + 6 + page) * PAGE, 4) != bytes(4) for page in (3, 4)}
    assert moved == {3: True, 4: how != "invlpg"}
    assert guest.vm.stats.invlpg == (how == "invlpg")
    paging.set_paging(None)
    guest.close()


def test_a_guest_may_write_the_table_it_runs_on(mmu_guest) -> None:
    """It is mapped in its own address space: the store goes through, its own flush makes it count."""
    guest = mmu_guest(NO_TDP, level=1, vcpus=2)
    tables, paging = nested(guest), guest.vcpus[1]
    tables.write_entry(guest.vcpu, L1, 7, GuestPte(L1))
    paging.set_paging(tables)
    assert paging.run([("r", 5 * PAGE, 0)]).done == 1
    tables.write_entry(paging, L1, 5, GuestPte(DATA + 20, accessed=True), at=7 * PAGE)
    assert guest.vm.stats.mmu_unsync == 1 and guest.vm.stats.insn_emulation == 0
    tables.invlpg(paging, 5 * PAGE)
    paging.run([("w", 5 * PAGE, 0xABCD)])
    assert guest.vm.host_read(guest.hva + (DATA + 20) * PAGE, 2) == b"\xcd\xab"
    guest.check()
    paging.set_paging(None)
    guest.close()


def test_an_entry_that_is_gone_or_other_is_dropped_and_one_with_other_rights_is_changed(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2, fmt = nested(guest, ad_bits=True), guest.mmu.fmt
    for page in range(5):
        l2.access(guest.vcpu, page * PAGE, write=True)
    kept = l2.walk(1)[0]
    l2.write_entry(guest.vcpu, L1, 0, None)
    l2.write_entry(guest.vcpu, L1, 2, GuestPte(DATA + 2, access=ACC_ALL & ~ACC_WRITE, accessed=True, dirty=True))
    l2.write_entry(guest.vcpu, L1, 3, GuestPte(DATA + 30, accessed=True))
    l2.write_entry(guest.vcpu, L1, 4, GuestPte(DATA + 4, dirty=True))
    l2.invept(guest.vcpu)
    l2.load(guest.vcpu)
    present = [fmt.is_present(l2.walk(page)[0]) for page in range(5)]
    assert present == [False, True, True, False, False], "4: without A nothing is kept unasked"
    assert l2.walk(1)[0] == kept
    assert not fmt.is_writable(l2.walk(2)[0]) and not fmt.is_mmu_writable(l2.walk(2)[0])
    guest.close()


def test_the_tables_are_protected_before_they_are_read_and_flushed_in_between(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    for region in (0, 512):
        l2.access(guest.vcpu, region * PAGE, write=True)
        l2.write_entry(guest.vcpu, L1 + region // 512, 0, GuestPte(DATA + 10))
    assert guest.vm.stats.mmu_unsync == 2
    order: list[str] = []
    honest_flush, honest_sync = guest.vm.flush_remote_tlbs, guest.mmu.shadow.unsync.sync_page
    protect = guest.mmu.shadow.unsync._protect
    unsync = guest.mmu.shadow.unsync
    guest.vm.flush_remote_tlbs = lambda: (order.append("flush"), honest_flush())[1]
    unsync.sync_page = lambda page: (order.append("sync"), honest_sync(page))[1]
    unsync._protect = lambda slot, gfn: (order.append("protect"), protect(slot, gfn))[1]
    l2.invept(guest.vcpu)
    l2.load(guest.vcpu)
    assert order[:5] == ["protect", "protect", "flush", "sync", "sync"] and order.count("flush") == 2
    del guest.vm.flush_remote_tlbs
    guest.close()


def test_an_smi_leaves_l2_before_smm_begins(mmu_guest) -> None:
    """KVM leaves guest mode on an SMI: else an access would go through one address space and be logged in another."""
    guest = mmu_guest(VmConfig(), level=1)
    l2 = nested(guest)
    guest.vm.set_user_memory_region(1 << 16 | 1, 0, 0, 64 * PAGE, guest.vm.alloc_memory(64 * PAGE))
    guest.vcpu.enter_guest_mode(l2)
    assert guest.vcpu.run([("w", 3 * PAGE, 1)]).done == 1
    guest.vcpu.smm = True
    with pytest.raises(AssertionError, match="vCPU 0: SMM begins with leaving the tables it ran on"):
        guest.vcpu.run([("w", 3 * PAGE, 1)])
    guest.vcpu.leave_guest_mode()
    assert guest.vcpu.run([("w", 3 * PAGE, 1)]).done == 1
    guest.close()


@pytest.mark.parametrize("mmu", ["shadow", "tdp"])
def test_a_store_from_smm_where_the_other_address_space_has_an_upper_table_is_warned_of(mmu_guest, mmu: str) -> None:
    guest = mmu_guest(VmConfig(mmu=mmu), level=1)
    guest.vm.set_user_memory_region(1 << 16 | 1, 0, 0, 64 * PAGE, guest.vm.alloc_memory(64 * PAGE))
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=True)
    guest.vcpu.smm = True
    assert guest.vcpu.run([("w", L2 * PAGE, 1), ("w", L1 * PAGE, 1)]).done == 2
    assert [f"gfn={L2}," in warning for warning in guest.vm.warnings] == [True]
    assert guest.vm.stats.mmu_unsync == 1, "the table of level 1 goes out of step whoever may write its gfn"
    guest.vcpu.smm = False
    guest.close()


def test_no_prefetch_makes_a_table_go_out_of_step(mmu_guest) -> None:
    """With tdp_mmu off a fault maps its neighbours: one that is a table of level 1 is mapped read-only."""
    guest = mmu_guest(replace(TDP, mmu="shadow"), level=1)
    l2, fmt = nested(guest), guest.mmu.fmt
    l2.access(guest.vcpu, 0, write=False)
    guest.mmu.unmap_hva_range(guest.hva + 16 * PAGE, guest.hva + 24 * PAGE)
    guest.read(L1 + 2)
    assert fmt.is_present(guest.spte(L1)[0]) and not fmt.is_mmu_writable(guest.spte(L1)[0])
    assert fmt.is_writable(guest.spte(L1 + 3)[0]), "no table, so writable"
    assert guest.vm.stats.mmu_unsync == 0
    guest.close()


def test_while_entries_are_synced_no_other_table_goes_out_of_step(mmu_guest) -> None:
    """L2 maps L1's second table; the right to write it, newly given, is not believed by the sync but by the fault."""
    guest = mmu_guest(level=1)
    l2, fmt = nested(guest), guest.mmu.fmt
    l2.write_entry(guest.vcpu, L1, 7, GuestPte(L1 + 1, access=ACC_ALL & ~ACC_WRITE))
    l2.access(guest.vcpu, 512 * PAGE, write=False)
    l2.access(guest.vcpu, 7 * PAGE, write=False)
    l2.write_entry(guest.vcpu, L1, 7, GuestPte(L1 + 1))
    seen: list[str] = []
    guest.vm.trace_sink = lambda name, fields: seen.append(name)
    l2.invept(guest.vcpu)
    l2.load(guest.vcpu)
    guest.vm.trace_sink = None
    assert "kvm_mmu_sync_page" in seen and "kvm_mmu_unsync_page" not in seen
    assert not fmt.is_writable(l2.walk(7)[0]) and guest.vm.stats.mmu_unsync == 0
    assert l2.access(guest.vcpu, 7 * PAGE, write=True) == frame(guest, L1 + 1)
    assert guest.vm.stats.mmu_unsync == 1
    guest.close()


def test_a_table_that_becomes_an_upper_one_loses_its_unsync_page(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=True)
    l2.write_entry(guest.vcpu, L1, 1, GuestPte(DATA + 1))
    assert guest.vm.stats.mmu_unsync == 1
    l2.write_entry(guest.vcpu, L3, 1, GuestPte(L1))  # now it is to be a table of level 2, too
    l2.write_entry(guest.vcpu, L1, 2, GuestPte(L1 + 1))
    assert l2.access(guest.vcpu, (512 * 512 + 2 * 512) * PAGE, write=False) == frame(guest, DATA)
    assert guest.vm.stats.mmu_unsync == 0 and guest.mmu.state.is_write_tracked(guest.slot, L1)
    guest.close()


def test_a_page_found_again_is_brought_up_to_date_but_stays_out_of_step(mmu_guest) -> None:
    """Linked a second time: what it maps is right at once, as a new mapping needs no flush by the guest."""
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    for page in (0, 1):
        l2.access(guest.vcpu, page * PAGE, write=False)
        l2.write_entry(guest.vcpu, L1, page, GuestPte(DATA + 11 + page))
    l2.write_entry(guest.vcpu, L2, 3, GuestPte(L1))
    assert l2.access(guest.vcpu, 3 * 512 * PAGE, write=False) == frame(guest, DATA + 11)
    assert l2.access(guest.vcpu, (3 * 512 + 1) * PAGE, write=False) == frame(guest, DATA + 12)
    assert guest.vm.stats.mmu_unsync == 1 and guest.mmu.fmt.is_writable(guest.spte(L1)[0])
    guest.check()
    guest.close()


def test_an_upper_table_found_again_is_in_step_with_all_below_before_it_is_linked(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=False)
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(DATA + 11))
    guest.write(30)
    second = NestedGuest(guest.vm, 30)
    second.write_entry(guest.vcpu, 30, 0, GuestPte(L3))
    assert second.access(guest.vcpu, 0, write=False) == frame(guest, DATA + 11)
    assert guest.vm.stats.mmu_unsync == 0 and not guest.mmu.fmt.is_mmu_writable(guest.spte(L1)[0])
    guest.close()


@pytest.mark.parametrize("config", [TDP, NO_TDP], ids=["nested", "no TDP"])
def test_zapping_an_upper_page_takes_the_unsync_pages_below_along(mmu_guest, config: VmConfig) -> None:
    guest = mmu_guest(config, level=1)
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=True)
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(DATA + 1))
    for i in range(3):
        l2.write_entry(guest.vcpu, L2, 100 + i, GuestPte(L1))
    assert guest.vm.stats.mmu_flooded == 1 and guest.vm.stats.mmu_unsync == 0
    assert [page.key.level for page in guest.mmu.shadow.pages] == [4, 3]
    guest.close()


def forty_out_of_step(guest) -> NestedGuest:
    """Of 40 tables of level 1 the first entry was mapped and then changed."""
    l2, tables = nested(guest), range(200, 240)
    guest.write(*tables, 30)
    for i, table in enumerate(tables):
        l2.write_entry(guest.vcpu, L2, 10 + i, GuestPte(table))
        l2.write_entry(guest.vcpu, table, 0, GuestPte(DATA))
        l2.access(guest.vcpu, (10 + i) * 512 * PAGE, write=False)
        l2.write_entry(guest.vcpu, table, 0, GuestPte(DATA + 1))
    assert guest.vm.stats.mmu_unsync == 40
    return l2


def test_what_a_round_of_16_makes_stale_is_flushed_with_the_tables_of_the_next(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = forty_out_of_step(guest)
    l2.invept(guest.vcpu)
    before = guest.vm.stats.remote_tlb_flush_requests
    l2.load(guest.vcpu)
    assert guest.vm.stats.mmu_unsync == 0
    assert guest.vm.stats.remote_tlb_flush_requests == before + 4, "three rounds, and one at the end"
    guest.close()


def test_a_sync_that_must_let_others_run_is_broken_off_and_goes_on_later(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = forty_out_of_step(guest)
    yields: list[bool] = []

    class Busy(Sched):
        def need_resched(self) -> bool:
            return len(yields) < 5

        def resched(self) -> None:
            yields.append(guest.mmu.lock.held)

    guest.mmu.state.sched = Busy()
    l2.invept(guest.vcpu)
    l2.load(guest.vcpu)
    assert guest.vm.stats.mmu_unsync == 0 and 3 <= len(yields) <= 5 and not any(yields), "rounds of at most 16"
    guest.mmu.state.sched = Sched()
    guest.close()


def test_unsync_marks_are_guarded_by_a_lock_of_their_own(mmu_guest) -> None:
    """A TDP fault holds mmu_lock for read only; a page that is out of step already takes no lock."""
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=True)
    meter = guest.vm.meter = CountingMeter()
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(DATA + 1))
    assert meter.totals["mmu_unsync_pages_lock"] == 1 and guest.mmu.lock.readers == 0
    guest.mmu.unmap_hva_range(guest.hva + L1 * PAGE, guest.hva + (L1 + 1) * PAGE)
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(DATA + 2))
    assert meter.totals["mmu_unsync_pages_lock"] == 1
    guest.close()


def test_going_out_of_step_and_back_is_traced(mmu_guest) -> None:
    guest, out = mmu_guest(level=1), io.StringIO()
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=True)
    guest.vm.trace_sink = JsonLines(out, frozenset({"kvm_mmu_unsync_page", "kvm_mmu_sync_page"}))
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(DATA + 1))
    l2.invept(guest.vcpu)
    l2.load(guest.vcpu)
    guest.vm.trace_sink = None
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(event["event"], event["gfn"]) for event in events] == [
        ("kvm_mmu_unsync_page", hex(L1)), ("kvm_mmu_sync_page", hex(L1)),
    ]  # fmt: skip
    guest.close()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("map"), st.integers(0, 1), st.integers(0, 5), st.one_of(st.none(), st.integers(0, 9))),
        st.tuples(st.just("link"), st.integers(0, 2), st.integers(0, 1), st.none()),
        st.tuples(st.sampled_from(["read", "write"]), st.integers(0, 2), st.integers(0, 5), st.none()),
        st.tuples(st.sampled_from(["invept", "log", "get", "unmap", "age"]), st.integers(0, 9), st.just(0), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(steps, st.sampled_from(["shadow", "tdp"]), st.booleans())
def test_every_access_goes_where_the_tables_led_at_some_moment_since_the_last_flush(
    mmu_guest, steps, mmu: str, ad_bits: bool
) -> None:
    guest = mmu_guest(replace(TDP, mmu=mmu), level=1, pages=1024)
    l2 = nested(guest, ad_bits=ad_bits, entries=6)
    since: dict[tuple[int, int], set[int | None]] = {}

    def now(region: int, page: int) -> int | None:
        walked = l2.walk_guest(512 * region + page)
        return None if walked is None else walked.pte.gfn

    def note() -> None:
        for region in range(3):
            for page in range(6):
                since.setdefault((region, page), set()).add(now(region, page))

    note()
    logged: set[int] = set()
    for kind, a, b, c in steps:
        if kind == "map":
            l2.write_entry(guest.vcpu, L1 + a, b, None if c is None else GuestPte(DATA + c))
            logged.add(L1 + a)
        elif kind == "link":
            l2.write_entry(guest.vcpu, L2, a, GuestPte(L1 + b))
            logged.add(L2)
        elif kind in ("read", "write"):
            reached = l2.access(guest.vcpu, (512 * a + b) * PAGE, write=kind == "write")
            legal = {None if gfn is None else frame(guest, gfn) for gfn in since[a, b]}
            assert reached in legal, f"{reached} is none of {legal}"
        elif kind == "invept":
            l2.invept(guest.vcpu)
            l2.load(guest.vcpu)
            since.clear()
        elif kind == "log":
            guest.log(not guest.slot.logging)
            logged.clear()
        elif kind == "get" and guest.slot.logging:
            assert logged <= guest.get(), "stores to tables are logged, seen or unseen"
            logged.clear()
        elif kind == "unmap":
            first = DATA + a
            guest.mmu.unmap_hva_range(guest.hva + first * PAGE, guest.hva + (first + 2) * PAGE)
        elif kind == "age":
            guest.mmu.age_gfn_range(guest.slot, DATA, DATA + 10)
            guest.vm.flush_remote_tlbs()
        note()
        guest.check()
    guest.close()


def test_l2_outside_every_slot_gets_an_mmio_spte_of_its_own(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(0x9000))
    for _ in range(2):
        assert l2.page_fault(guest.vcpu, 0, write=False) == RetPf.EMULATE
    stats = guest.vm.stats
    assert guest.mmu.fmt.is_mmio(l2.walk(0)[0])
    assert (stats.pf_mmio_spte_created, stats.pf_emulate) == (1, 1), "the second is answered from the SPTE"
    guest.vm.set_user_memory_region(2, 0, 0x9000 * PAGE, PAGE, guest.vm.alloc_memory(PAGE))
    assert l2.page_fault(guest.vcpu, 0, write=True) == RetPf.FIXED
    guest.close()


# -- the checker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda g, page: setattr(page, "unsync", False), "mmu_unsync is 1, a recount finds 0"),
        (lambda g, page: setattr(page, "unsync", False), "is in step, yet SPTE"),
        (lambda g, page: [p.unsync_children.clear() for p in g.mmu.shadow.pages], "is not marked"),
        (lambda g, page: page.parents.clear(), "which does not know"),
        (lambda g, page: g.mmu.shadow.held_roots.clear(), "1 references to shadow roots, 0 vCPUs hold one"),
        (lambda g, page: g.mmu.state.write_tracked.pop((0, L2)), "not write-tracked"),
        (lambda g, page: setattr(g.mmu.state, "indirect_shadow_pages", 9), "a recount finds 4"),
    ],
)
def test_the_checker_finds_what_is_wrong_with_shadow_pages(mmu_guest, damage, sentence: str) -> None:
    guest = mmu_guest(level=1)
    l2 = nested(guest)
    l2.access(guest.vcpu, 0, write=True)
    l2.write_entry(guest.vcpu, L1, 0, GuestPte(DATA + 1))
    guest.check()
    page = next(page for page in guest.mmu.shadow.pages if page.unsync)
    damage(guest, page)
    assert any(sentence in found for found in guest.mmu.invariants()), guest.mmu.invariants()
