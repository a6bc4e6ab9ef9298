"""Who holds mmu_lock how, which bits a locked AND leaves alone, and what is not re-armed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migsim.kvm.changed_spte import clear_spte_bits, set_spte, set_spte_atomic
from migsim.kvm.config import VmConfig
from migsim.kvm.mmu_lock import WouldBlock
from migsim.kvm.spte import EPT
from migsim.kvm.tdp_iter import for_each_tdp_pte
from migsim.kvm.tdp_log import clear_dirty_range, split_range, wrprot_range
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.vintage import TDP, TDP_6_8, VINTAGES
from migsim.kvm.write_protect import write_protect_gfn
from migsim.kvm.zap import zap_root
from migsim.sim.meter import CountingMeter

PAGE = 4096
PML, WP = VmConfig(smm=False), VmConfig(smm=False, pml=False)


@pytest.mark.parametrize("row", sorted(VINTAGES))
def test_a_fault_takes_mmu_lock_for_read_since_5_12_on_the_tdp_mmu(mmu_guest, row: str) -> None:
    modern = row not in ("shadow", "tdp-5.10")
    guest = mmu_guest(PML, vintage=VINTAGES[row]) if modern else mmu_guest(replace(PML, mmu=row))
    guest.root  # noqa: B018 - loaded before the count
    meter = CountingMeter()
    guest.mmu.lock._meter = meter
    guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True)
    assert (meter.totals.get("mmu_lock_read", 0), meter.totals.get("mmu_lock_write", 0)) == (
        (1, 0) if modern else (0, 1)
    )
    guest.close()


def test_a_locked_and_keeps_what_the_cpu_sets_meanwhile(mmu_guest) -> None:
    """A is cleared from the SPTE as it is now, not as the walk read it: D set in between stays."""
    guest = mmu_guest(level=1)
    guest.write(5)
    fmt, root = guest.mmu.fmt, guest.root
    root.clear_bits(list(root.walk(5))[-1][0], fmt.dirty)
    with guest.mmu.lock.read(), guest.mmu.state.rcu.read():
        it = next(it for it in for_each_tdp_pte(root, 5, 6) if it.is_leaf)
        guest.mmu.set_dirty_bit(guest.vcpu, root, 5)
        clear_spte_bits(guest.mmu.state, it, fmt.accessed)
    assert fmt.is_dirty(guest.spte(5)[0]) and not fmt.is_accessed(guest.spte(5)[0])
    guest.vm.flush_remote_tlbs()
    guest.close()


@pytest.mark.parametrize("config", [PML, WP], ids=["pml", "wrprot"])
def test_re_arming_leaves_the_bits_of_tables_alone(mmu_guest, config: VmConfig) -> None:
    """45a61ebb: a non-leaf SPTE whose W or D is cleared would make its whole range fault."""
    guest = mmu_guest(replace(config, ad_bits=config is PML), level=1)
    guest.write(5)
    tables = [(at, spte) for at, spte, _ in list(guest.root.walk(5))[:-1]]
    with guest.mmu.lock.read():
        assert clear_dirty_range(guest.mmu.state, guest.root, 0, 64)
    guest.vm.flush_remote_tlbs()
    assert [guest.root.read(at) for at, _ in tables] == [spte for _, spte in tables]
    guest.close()


def test_one_flush_is_enough_for_every_recovered_page(mmu_guest) -> None:
    guest = mmu_guest(WP, vintage=TDP)
    guest.log()
    guest.write(5, 600, 1500)
    before = guest.vm.stats.remote_tlb_flush_requests
    guest.log(False)
    assert guest.counts() == (0, 3, 0) and guest.vm.stats.remote_tlb_flush_requests == before + 1
    guest.close()


def test_a_table_replaced_by_a_huge_page_is_flushed(mmu_guest) -> None:
    guest = mmu_guest(replace(PML, mmu="tdp-5.10"))
    guest.log()
    guest.write(5)
    guest.log(False)
    with guest.mmu.lock.write():
        flush = guest.mmu.tdp.zap_range(0, 5, 6)
    assert flush and guest.spte(6)[1] == 1
    guest.vm.flush_remote_tlbs()
    before = guest.vm.stats.remote_tlb_flush_requests
    guest.write(6)
    assert guest.spte(6)[1] == 2 and guest.vm.stats.remote_tlb_flush_requests == before + 1
    guest.close()


@pytest.mark.parametrize(
    ("drop", "volatile"), [(0, False), (EPT.dirty, True), (EPT.accessed, False), (EPT.writable, True)]
)
@pytest.mark.parametrize("vintage", [TDP, TDP_6_8], ids=["6.18", "6.8"])
def test_only_an_spte_that_may_change_at_any_time_is_exchanged(mmu_guest, drop, volatile, vintage) -> None:
    """Of any other the value that was read is taken for the one that goes; a clear A counted until 6.12."""
    guest = mmu_guest(WP, level=1, vintage=vintage)
    guest.write(5)
    state, root = guest.mmu.state, guest.root
    at = list(root.walk(5))[-1][0]
    root.clear_bits(at, drop)
    with guest.mmu.lock.write(), state.rcu.read():
        it = next(it for it in for_each_tdp_pte(root, 5, 6) if it.is_leaf)
        root.write(at, it.old_spte | EPT.writable | EPT.dirty | EPT.accessed)
        meanwhile = root.read(at)
        read, seen = it.old_spte, []
        guest.vm.trace_sink = lambda _, fields: seen.append(fields["old_spte"])
        set_spte(state, it, guest.mmu.fmt.nonpresent)
        guest.vm.trace_sink = None
    expected = volatile or (drop == EPT.accessed and vintage is TDP_6_8)
    assert seen == [meanwhile if expected else read]
    guest.vm.flush_remote_tlbs()
    guest.close()


# -- roots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", sorted(VINTAGES))
def test_roots_are_taken_and_given_back_under_the_read_lock_since_6_9(mmu_guest, row: str) -> None:
    guest = mmu_guest(PML, vintage=VINTAGES[row], vcpus=3)
    meter = guest.vm.meter = guest.mmu.lock._meter = CountingMeter()
    roots = [guest.mmu.root_of(vcpu) for vcpu in guest.vcpus]
    assert roots[0] is roots[1] is roots[2] and roots[0].root_count == 4
    kind = "mmu_lock_read" if row == "tdp" else "mmu_lock_write"
    assert meter.totals.get(kind) == 3 and sum(n for op, n in meter.totals.items() if op.startswith("mmu_lock")) == 3
    assert meter.totals.get("tdp_mmu_pages_lock", 0) == (row == "tdp"), "only who finds none takes the list's lock"
    guest.mmu.zap_all_fast()
    before = dict(meter.totals)
    for vcpu in guest.vcpus:
        guest.mmu.unload(vcpu)
    assert meter.totals.get(kind, 0) == before.get(kind, 0) + 3
    assert meter.totals.get("tdp_mmu_pages_lock", 0) - before.get("tdp_mmu_pages_lock", 0) == (row == "tdp")
    guest.close()


def test_a_vcpu_without_a_root_waits_for_a_writer(mmu_guest) -> None:
    guest = mmu_guest(PML, level=1, vcpus=2)
    with guest.mmu.lock.write(), pytest.raises(WouldBlock):
        guest.mmu.root_of(guest.vcpus[1])
    with guest.mmu.lock.read():
        assert guest.mmu.root_of(guest.vcpus[1]) is guest.mmu.root_of(guest.vcpu)
    guest.mmu.zap_all_fast()
    with guest.mmu.lock.write(), pytest.raises(WouldBlock):
        guest.mmu.root_of(guest.vcpu)
    guest.check()  # the reference it could not give back is still its own
    guest.close()


@pytest.mark.parametrize(("vintage", "tables"), [(TDP, 0), (VINTAGES["tdp-5.19"], 3)], ids=["6.18", "5.19"])
def test_until_6_1_every_table_goes_onto_a_list_under_tdp_mmu_pages_lock(mmu_guest, vintage, tables: int) -> None:
    guest = mmu_guest(PML, vintage=vintage, level=1)
    guest.root  # noqa: B018 - loaded before the count
    meter = guest.vm.meter = CountingMeter()
    guest.write(5, 600)
    assert meter.totals.get("tdp_mmu_pages_lock", 0) == (4 if tables else 0)
    guest.vm.trace_sink = lambda *_: None
    guest.mmu.zap_all_fast()
    guest.vm.trace_sink = None
    assert meter.totals.get("tdp_mmu_pages_lock", 0) == (8 if tables else 0)
    guest.close()


def test_tables_kept_small_for_nx_are_listed_under_tdp_mmu_pages_lock(mmu_guest) -> None:
    guest = mmu_guest(replace(PML, nx_huge_pages=True))
    guest.root  # noqa: B018 - loaded before the count
    meter = guest.vm.meter = CountingMeter()
    guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=False, exec=True)
    assert meter.totals["tdp_mmu_pages_lock"] == 1
    guest.mmu.recover_nx(ratio=1)
    assert meter.totals["tdp_mmu_pages_lock"] == 2, "off the list before it is zapped, so zapping takes it no more"
    guest.close()


# -- frozen entries --------------------------------------------------------------------------------------------------


def _freezes_before(monkeypatch: pytest.MonkeyPatch, guest, at) -> None:
    """Another task freezes the entry just before the next compare-exchange of it."""
    root, honest = guest.root, type(guest.root).cmpxchg
    frozen = []

    def exchange(self, where, old, new, publish=None):
        if where == at and not frozen:
            frozen.append(self.write(at, self.fmt.frozen))
        return honest(self, where, old, new, publish)

    monkeypatch.setattr(type(root), "cmpxchg", exchange)


@pytest.mark.parametrize(
    "loop",
    [
        lambda s, root: wrprot_range(s, root, 0, 1024, 1),
        lambda s, root: clear_dirty_range(s, root, 0, 1024),
        lambda s, root: split_range(s, root, 0, 1024, 1),
        lambda s, root: write_protect_gfn(s, root, 5),
    ],
    ids=["write-protect", "clear dirty", "split", "write-protect one gfn"],
)
def test_a_loop_that_meets_an_entry_frozen_under_it_leaves_it_alone(mmu_guest, monkeypatch, loop) -> None:
    guest = mmu_guest(WP)
    guest.write(5, 600)
    root, state, fmt = guest.root, guest.mmu.state, guest.mmu.fmt
    at = list(root.walk(5))[-1][0]
    spte = root.read(at)
    _freezes_before(monkeypatch, guest, at)
    with guest.mmu.lock.read():
        loop(state, root)
    assert root.read(at) == fmt.frozen, "whoever froze it goes on with it"
    root.write(at, spte)
    guest.vm.flush_remote_tlbs()
    monkeypatch.undo()
    guest.close()


def test_zapping_a_root_passes_over_an_entry_that_somebody_else_is_removing(mmu_guest, monkeypatch) -> None:
    guest = mmu_guest(WP)
    guest.write(5, 600)
    root = guest.root
    _freezes_before(monkeypatch, guest, list(root.walk(5))[-1][0])
    guest.vm.trace_sink = lambda *_: None  # entry by entry
    with guest.mmu.lock.read():
        zap_root(guest.mmu.state, root)
    guest.vm.trace_sink = None
    assert sum(root.n_tables) == 1
    guest.vm.stats.update_page_stats(2, -1)  # which the other one would have done
    guest.vm.flush_remote_tlbs()
    monkeypatch.undo()
    guest.close()


def test_a_frozen_entry_is_no_case_for_the_fast_path_and_the_slow_one_retries(mmu_guest) -> None:
    guest = mmu_guest(WP, level=1)
    guest.log()
    guest.write(5)
    guest.get()
    at = list(guest.root.walk(5))[-1][0]
    spte = guest.root.read(at)
    guest.root.write(at, guest.mmu.fmt.frozen)
    assert guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True) == RetPf.RETRY
    assert guest.vm.stats.pf_fast == 0 and guest.get() == set()
    guest.root.write(at, spte)
    guest.vm.flush_remote_tlbs()
    guest.close()


def test_aging_reaches_nothing_in_a_table_that_is_being_torn_down(mmu_guest) -> None:
    guest = mmu_guest(WP, level=1)
    guest.write(5)
    root, state, fmt = guest.root, guest.mmu.state, guest.mmu.fmt
    with guest.mmu.lock.read(), state.rcu.read():
        inside = next(it for it in for_each_tdp_pte(root, 5, 6) if it.is_leaf)
        above = next(it for it in for_each_tdp_pte(root, 5, 6, 2) if it.level == 2)
        assert set_spte_atomic(state, above, fmt.nonpresent)
        clear_spte_bits(state, inside, fmt.accessed)
        assert root.read(inside.at) == fmt.frozen
    guest.vm.flush_remote_tlbs()
    guest.close()
