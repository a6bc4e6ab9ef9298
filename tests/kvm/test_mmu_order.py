"""What another CPU would see between two steps: walks from the trace hook, flushes before frees, marks before maps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from migsim.kvm.changed_spte import clear_spte_bits, set_spte_atomic
from migsim.kvm.config import VmConfig
from migsim.kvm.log_invariants import stale_translations
from migsim.kvm.mmu_lock import WouldBlock
from migsim.kvm.paging import PagingStructure, Sptep
from migsim.kvm.tdp_iter import for_each_tdp_pte
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.vintage import VINTAGES

PAGE = 4096
PML, WP = VmConfig(smm=False), VmConfig(smm=False, pml=False)
INVISIBLE = nullcontext


def leaf(guest, gfn: int) -> Any:
    return next(it for it in for_each_tdp_pte(guest.root, gfn, gfn + 1) if it.is_leaf)


# -- lock and RCU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lock", "rcu", "sentence"),
    [(True, False, "outside an RCU read section"), (False, True, "without mmu_lock"), (False, False, "outside an RCU")],
)
@pytest.mark.parametrize("change", ["exchange", "clear"])
def test_an_spte_changes_under_rcu_and_mmu_lock_both(mmu_guest, lock: bool, rcu: bool, sentence: str, change) -> None:
    guest = mmu_guest(level=1)
    guest.write(5)
    state, fmt = guest.mmu.state, guest.mmu.fmt
    with (
        guest.mmu.lock.read() if lock else INVISIBLE(), state.rcu.read() if rcu else INVISIBLE(),
        pytest.raises(AssertionError, match=sentence),
    ):  # fmt: skip
        if change == "exchange":
            set_spte_atomic(state, leaf(guest, 5), guest.spte(5)[0] & ~fmt.writable)
        else:
            clear_spte_bits(state, leaf(guest, 5), fmt.dirty)
    guest.close()


@pytest.mark.parametrize("ad", [True, False], ids=["ad", "no-ad"])
def test_aging_may_do_without_the_lock_and_never_without_rcu(mmu_guest, ad: bool) -> None:
    guest = mmu_guest(replace(PML, ad_bits=ad), level=1)
    guest.write(5)
    assert guest.mmu.age_gfn_range(guest.slot, 5, 6)
    guest.vm.flush_remote_tlbs()
    guest.read(5)
    guest.mmu.state.rcu.read = INVISIBLE
    with pytest.raises(AssertionError, match="outside an RCU read section"):
        guest.mmu.age_gfn_range(guest.slot, 5, 6)


def test_the_changed_pte_notifier_holds_rcu(mmu_guest) -> None:
    guest = mmu_guest(replace(PML, mmu="tdp-5.10"), level=1)
    guest.write(5)
    guest.mmu.state.rcu.read = INVISIBLE
    with pytest.raises(AssertionError, match="outside an RCU read section"):
        guest.mmu.change_pte(guest.hva + 5 * PAGE)


# -- nothing half done is visible --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "expected"), [(2, 1), (3, 2)])
def test_a_walk_at_any_moment_of_a_split_finds_a_leaf_with_the_same_frame(mmu_guest, level: int, expected: int) -> None:
    guest = mmu_guest(replace(WP, eager_page_split=False), pages=512 * 512, level=level)
    guest.write(5)
    guest.log()
    frame = guest.mmu.fmt.pfn(guest.spte(5)[0])
    seen: list[tuple[bool, int, int]] = []

    def walk(name: str, fields: dict[str, Any]) -> None:
        spte, at_level = guest.spte(100)
        mapped = guest.mmu.fmt.is_present(spte) and guest.mmu.fmt.is_leaf(spte, at_level)
        seen.append((mapped, at_level, guest.mmu.fmt.pfn(spte) + 100 % 512 ** (at_level - 1)))

    honest = PagingStructure.write

    def write(self: PagingStructure, at: Sptep, spte: int) -> int:
        old = honest(self, at, spte)
        if self is guest.root:
            walk("after a store", {})
        return old

    guest.vm.trace_sink = walk
    PagingStructure.write = write  # type: ignore[method-assign]
    try:
        guest.write(7)
    finally:
        PagingStructure.write = honest  # type: ignore[method-assign]
    assert {at_level for _, at_level, _ in seen} >= {level, expected}
    assert {(mapped, pfn) for mapped, _, pfn in seen} == {(True, frame + 100)}
    guest.vm.trace_sink = None
    guest.close()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "exclusive"])
def test_no_entry_of_a_dying_table_can_be_installed_into_at_any_moment(mmu_guest, shared: bool) -> None:
    guest = mmu_guest(level=1)
    guest.write(5, 6, 7)
    state, fmt = guest.mmu.state, guest.mmu.fmt
    inside = [list(guest.root.walk(gfn))[-1][0] for gfn in (5, 6, 7)]
    seen: set[int] = set()
    guest.vm.trace_sink = lambda name, fields: (
        seen.update(guest.root.read(at) for at in inside) if "new_spte" in fields and fields["level"] == 1 else None
    )
    with guest.mmu.lock.read() if shared else guest.mmu.lock.write(), state.rcu.read():
        for it in for_each_tdp_pte(guest.root, 5, 6, 2):
            if it.level == 2:
                assert set_spte_atomic(state, it, fmt.nonpresent)
        assert {guest.root.read(at) for at in inside} == {fmt.frozen}
    assert seen == {fmt.frozen}
    guest.vm.trace_sink = None
    guest.vm.flush_remote_tlbs()
    guest.close()


@pytest.mark.parametrize("whole", [True, False], ids=["at-once", "page-by-page"])
@pytest.mark.parametrize("level", [2, 3])
def test_recovered_huge_pages_are_flushed_under_the_lock_before_their_tables_are_freed(
    mmu_guest, whole: bool, level: int
) -> None:
    guest = mmu_guest(WP, pages=512 * 512, level=level)
    guest.mmu.state.whole_slots = whole
    guest.log()
    guest.write(5, 600)
    tables, seen = list(guest.root.n_tables), []
    honest = guest.vm.flush_remote_tlbs

    def flush() -> None:
        state = guest.mmu.state
        seen.append((state.lock.held, state.rcu.depth > 0, guest.root.n_tables == tables))
        honest()

    guest.vm.flush_remote_tlbs = flush
    guest.log(False)
    assert seen == [(True, True, True)]
    assert guest.spte(5)[1] == level and guest.root.n_tables[1] == 0
    guest.close()


# -- marking and results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "expected"), [("tdp", True), ("tdp-5.10", False)])
def test_a_page_is_marked_before_it_becomes_writable_since_5_11(mmu_guest, row: str, expected: bool) -> None:
    guest = mmu_guest(replace(WP, mmu=row), level=1)
    guest.log()
    log, seen = guest.slot.dirty_bitmap, []
    honest = PagingStructure.write

    def write(self: PagingStructure, at: Sptep, spte: int) -> int:
        if guest.mmu.fmt.is_present(spte) and at.table_pfn >= 1 << 38 and self.fmt.is_writable(spte):
            seen.append(bool(log.get(5)))
        return honest(self, at, spte)

    guest.root  # noqa: B018 - loaded before the hook
    PagingStructure.write = write  # type: ignore[method-assign]
    try:
        guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True)
    finally:
        PagingStructure.write = honest  # type: ignore[method-assign]
    assert seen[-1:] == [expected] and guest.get() == {5}
    guest.close()


def test_a_lost_race_leaves_one_page_too_many_in_the_log(mmu_guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = mmu_guest(WP, level=1)
    guest.log()
    guest.write(6)
    guest.get()
    monkeypatch.setattr(PagingStructure, "cmpxchg", lambda *_: False)
    assert guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True) == RetPf.RETRY
    monkeypatch.undo()
    assert guest.get() == {5}
    guest.close()


@pytest.mark.parametrize("row", ["tdp", "tdp-6.8"])
def test_a_tracked_page_is_emulated_even_where_nothing_changes(mmu_guest, row: str) -> None:
    """Two vCPUs: the other has installed the very same read-only SPTE meanwhile."""
    vintage = VINTAGES[row]
    guest = mmu_guest(level=1, vintage=vintage)
    guest.mmu.track_writes(guest.slot, 5)
    result = RetPf.WRITE_PROTECTED if vintage.write_protected else RetPf.EMULATE
    assert guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True) == result
    root, state = guest.root, guest.mmu.state
    honest = guest.mmu.state.is_write_tracked
    asked = iter([False])
    state.is_write_tracked = lambda slot, gfn: next(asked, True) and honest(slot, gfn)
    before = root.lookup(5)
    assert guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True) == result and root.lookup(5) == before
    state.is_write_tracked = honest
    guest.mmu.untrack_writes(guest.slot, 5)
    guest.close()




# -- yields ------------------------------------------------------------------------------------------------------------


def test_5_10_zap_all_flushes_before_it_yields_on_a_valid_root(mmu_guest) -> None:
    guest = mmu_guest(replace(PML, mmu="tdp-5.10"), level=1)
    guest.write(*range(0, 2048, 100))
    sched, yields = guest.mmu.state.sched, []

    def resched() -> None:
        yields.append(list(stale_translations(guest.vm)))

    sched.need_resched, sched.resched = lambda: True, resched
    guest.mmu.zap_all_fast()
    assert len(yields) > 20 and not any(yields)
    del sched.need_resched, sched.resched
    guest.close()


@pytest.mark.parametrize(("row", "beside_faults"), [("tdp", True), ("tdp-6.8", False)])
def test_nx_recovery_takes_the_oldest_first_and_flushes_before_it_yields(mmu_guest, row: str, beside_faults) -> None:
    guest = mmu_guest(replace(PML, nx_huge_pages=True), pages=4 * 512, vintage=VINTAGES[row])
    order = (2, 0, 3, 1)
    for region in order:
        guest.mmu.page_fault(guest.vcpu, region * 512 * PAGE, write=False, exec=True)
        guest.read(region * 512)
    state, zapped, stale = guest.mmu.state, [], []

    def resched() -> None:
        assert not state.lock.held and not state.rcu.depth
        zapped.append([region for region in order if not guest.mmu.fmt.is_present(guest.spte(region * 512)[0])])
        stale.extend(stale_translations(guest.vm))

    state.sched.need_resched, state.sched.resched = lambda: True, resched
    seen = []
    state.lock.read, honest = lambda: seen.append("read") or honest(), state.lock.read
    assert guest.mmu.recover_nx(ratio=2) == 2
    assert zapped == [[2], [2, 0]] and not stale
    assert bool(seen) == beside_faults, "a5775090 (6.18): mmu_lock for read"
    del state.sched.need_resched, state.sched.resched, state.lock.read
    guest.close()


def test_a_table_that_went_while_recovery_yielded_is_not_zapped_twice(mmu_guest) -> None:
    guest = mmu_guest(replace(PML, nx_huge_pages=True), pages=4 * 512)
    for region in range(4):
        guest.mmu.page_fault(guest.vcpu, region * 512 * PAGE, write=False, exec=True)
    sched = guest.mmu.state.sched
    sched.need_resched, sched.resched = lambda: True, guest.mmu.zap_all_fast
    assert guest.mmu.recover_nx(ratio=1) == 1 and guest.vm.stats.nx_lpage_splits == 0
    del sched.need_resched, sched.resched
    guest.close()


# -- slots that change -------------------------------------------------------------------------------------------------


def test_a_cached_mmio_spte_is_not_believed_while_the_slots_change(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    assert guest.mmu.page_fault(guest.vcpu, 0x10000 * PAGE, write=True) == RetPf.EMULATE
    seen: list[RetPf] = []

    def access(point: str) -> None:
        if point == "memslot: in progress":
            seen.append(guest.mmu.page_fault(guest.vcpu, 0x10000 * PAGE, write=True))

    guest.vm.race_hook = access
    guest.vm.set_user_memory_region(2, 0, 0x10000 * PAGE, 4 * PAGE, guest.vm.alloc_memory(4 * PAGE))
    guest.vm.race_hook = None
    assert seen == [RetPf.FIXED], "the new slot is there, and the SPTE is from before"
    guest.close()


def test_slots_wait_for_a_running_notifier(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(5)
    guest.mmu.invalidate_range_start(guest.hva, guest.hva + PAGE)
    generation = guest.vm.memslots(0).generation
    with pytest.raises(WouldBlock, match="before the running MMU notifier has ended"):
        guest.log()
    assert guest.vm.memslots(0).generation == generation and not guest.slot.logging
    guest.mmu.invalidate_range_end(guest.hva, guest.hva + PAGE)
    guest.log()
    guest.close()


# -- prefetch ----------------------------------------------------------------------------------------------------------


def test_a_prefetched_page_without_a_bits_faults_at_its_first_use(mmu_guest) -> None:
    guest = mmu_guest(replace(PML, ad_bits=False), level=1)
    guest.log()
    stats, fmt = guest.vm.stats, guest.mmu.fmt
    assert guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=False, prefetch=True) == RetPf.FIXED
    assert fmt.is_access_tracked(guest.spte(5)[0]) and not fmt.is_writable(guest.spte(5)[0])
    assert (stats.pf_taken, stats.pf_fixed) == (0, 0) and guest.get() == set()
    guest.read(5)
    assert fmt.is_accessed(guest.spte(5)[0]) and stats.pf_taken == stats.pf_fast == 1
    guest.close()


def test_no_prefetch_is_counted_whatever_it_comes_to(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    results = [guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=False, prefetch=True) for _ in range(2)]
    assert results == [RetPf.FIXED, RetPf.SPURIOUS]
    assert (guest.vm.stats.pf_taken, guest.vm.stats.pf_fixed, guest.vm.stats.pf_spurious) == (0, 0, 0)
    guest.close()
