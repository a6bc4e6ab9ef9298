"""The iterator's order, yields and restarts; roots: shared, refcounted, invalidated, gone at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from migsim.kvm.changed_spte import set_spte, set_spte_atomic
from migsim.kvm.config import VmConfig
from migsim.kvm.mmu_state import Sched
from migsim.kvm.spte import PG_LEVEL_2M
from migsim.kvm.tdp_iter import TdpIter, cond_resched, for_each_tdp_pte
from migsim.kvm.tdp_log import wrprot_range
from migsim.kvm.vintage import VINTAGES
from migsim.kvm.zap import invalidate_all_roots, zap_invalidated_roots, zap_root
from migsim.units import pages_per_level


class Impatient(Sched):
    """Wants the CPU at every chance; `meanwhile` runs while the lock is free."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.meanwhile = meanwhile
        self.yields = 0

    def need_resched(self) -> bool:
        return True

    def resched(self) -> None:
        self.yields += 1
        self.meanwhile()


def test_the_walk_goes_down_then_side_then_up(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(0, 1, 512)
    steps = [(it.level, it.gfn) for it in for_each_tdp_pte(guest.root, 0, 1024)]
    assert steps[:5] == [(4, 0), (3, 0), (2, 0), (1, 0), (1, 1)]
    assert steps[3 + 511 : 3 + 514] == [(1, 511), (2, 512), (1, 512)], "up and side are one step"
    assert [it.level for it in for_each_tdp_pte(guest.root, 0, 1024, PG_LEVEL_2M)].count(1) == 0
    guest.close()


def test_each_step_reads_its_entry_anew(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(0, 512)
    fmt, seen = guest.mmu.fmt, []
    for it in for_each_tdp_pte(guest.root, 0, 1024):
        if (it.level, it.gfn) == (2, 512):
            assert fmt.is_present(it.old_spte)
            it.root.write(it.at, fmt.nonpresent)  # somebody else zaps it between two steps
            table = fmt.pfn(it.old_spte)
        seen.append((it.level, it.gfn))
    assert (1, 512) not in seen, "a table that has gone since it was read must not be entered"
    it.root._write_leaf(512, fmt.nonpresent)
    it.root.free_table(table)
    guest.vm.stats.pages_4k -= 1
    guest.vm.flush_remote_tlbs()
    guest.close()


def test_a_yield_flushes_what_is_pending_and_restarts_without_advancing(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(0, 1, 2)
    guest.mmu.state.sched = Impatient()
    it = TdpIter(guest.root, 1)
    with guest.mmu.state.lock.read(), guest.mmu.state.rcu.read():
        assert not cond_resched(guest.mmu.state, it, flush=True), "no step was made since the start: no progress"
        while it.level > 1:
            it.next()
        it.next()
        flushes = guest.vm.stats.remote_tlb_flush_requests
        assert (it.level, it.gfn) == (1, 2) and cond_resched(guest.mmu.state, it, flush=True)
        assert guest.vm.stats.remote_tlb_flush_requests == flushes + 1
        it.next()
        assert (it.level, it.gfn) == (4, 0), "a restart begins at the root"
        while it.level > 1:
            it.next()
        assert it.gfn == 2, "the entry it yielded at is visited, not skipped (3a0f64de)"
        assert not cond_resched(guest.mmu.state, it, flush=True), "yielding twice at one place would never end"
    guest.close()


@pytest.mark.parametrize("change", [set_spte, set_spte_atomic])
def test_no_spte_may_be_changed_between_a_yield_and_the_next_step(mmu_guest, change) -> None:
    guest = mmu_guest(level=1)
    guest.write(0, 1)
    state = guest.mmu.state
    state.sched = Impatient()
    with guest.mmu.state.lock.write(), guest.mmu.state.rcu.read():
        it = next(it for it in for_each_tdp_pte(guest.root, 0, 2) if it.is_leaf and it.gfn == 1)
        assert cond_resched(state, it, flush=False)
        with pytest.raises(AssertionError, match="gfn 0x1 level 1 changed after a yield"):
            change(state, it, guest.mmu.fmt.nonpresent)
    guest.close()


@pytest.mark.parametrize("mmu", ["tdp", "tdp-5.10"])
def test_yielding_at_every_entry_protects_every_page(mmu_guest, mmu: str) -> None:
    guest = mmu_guest(VmConfig(smm=False, mmu=mmu, pml=False), level=1, pages=1200)
    guest.write(*range(0, 1200, 7))
    guest.mmu.state.sched = sched = Impatient()
    with guest.mmu.state.lock.read():
        assert wrprot_range(guest.mmu.state, guest.root, 0, 1200, 1)
    assert sched.yields > 100
    assert not any(guest.mmu.fmt.is_writable(guest.spte(gfn)[0]) for gfn in range(0, 1200, 7))
    guest.vm.flush_remote_tlbs()
    guest.close()


def test_all_vcpus_share_one_root_and_smm_has_its_own(mmu_guest) -> None:
    guest = mmu_guest(VmConfig(smm=True), vcpus=5)
    guest.write(3)
    roots = {guest.mmu.root_of(vcpu) for vcpu in guest.vcpus}
    assert len(roots) == 1 and roots.pop().root_count == 1 + 5
    guest.vcpu.smm = True
    smm = guest.mmu.load_root(guest.vcpu, guest.vcpu.root)
    assert smm.as_id == 1 and smm is not guest.mmu.root_of(guest.vcpus[1])
    assert smm.lookup(3)[0] == guest.mmu.fmt.nonpresent
    guest.vcpu.root = smm
    guest.close()


def test_an_invalidated_root_takes_no_new_mapping_and_goes_with_its_last_user(mmu_guest) -> None:
    guest = mmu_guest(vcpus=2)
    guest.write(3)
    old = guest.root
    assert invalidate_all_roots(guest.mmu.state) == [old]
    assert guest.counts() == (0, 1, 0), "marking does not zap"
    guest.write(600)
    assert guest.root is not old and old.lookup(600)[0] == guest.mmu.fmt.nonpresent
    zap_invalidated_roots(guest.mmu.state)
    assert guest.counts() == (0, 1, 0) and old.lookup(3)[0] == guest.mmu.fmt.nonpresent
    guest.mmu.root_of(guest.vcpus[1])
    assert list(guest.mmu.state.roots) == [guest.root], "nobody holds the old root any more"
    guest.close()


def test_each_table_knows_its_level_and_what_it_maps(mmu_guest) -> None:
    guest = mmu_guest(level=1, base=1 << 18, pages=4096)
    gfn = (1 << 18) + 3 * 512 + 7
    guest.write(gfn)
    for at, _, level in guest.root.walk(gfn):
        assert guest.root.level_of(at.table_pfn) == level
        assert guest.root.gfn_of(at) == gfn & -pages_per_level(level)
    guest.close()


def test_destruction_leaves_no_table_no_root_and_no_page(mmu_guest) -> None:
    guest = mmu_guest(level=1, vcpus=3)
    guest.write(0, 700, 1500)
    root = guest.root
    assert root.count_tables() == {1: 3, 2: 1, 3: 1, 4: 1}
    guest.close()
    assert not any(root.n_tables) and not len(guest.mmu.state.roots) and guest.counts() == (0, 0, 0)


def test_a_leaked_reference_is_reported_at_destruction(mmu_guest) -> None:
    guest = mmu_guest()
    guest.write(0)
    guest.root.root_count += 1
    assert any("is left at destruction" in leak for leak in guest.mmu.pre_destroy())


@pytest.mark.parametrize(
    ("row", "order"),
    [("tdp", [1, 1, 2, 2, 3, 4]), ("tdp-6.8", [3, 2, 1, 2, 1, 4]), ("tdp-5.15", [4, 3, 2, 1, 2, 1])],
)
def test_a_root_is_zapped_level_by_level_so_that_no_step_is_long(mmu_guest, row: str, order: list[int]) -> None:
    """8ca98363: from 4K up; before it 1G at once (1b6043e8), and first of all the whole tree."""
    guest = mmu_guest(level=1, vintage=VINTAGES[row])
    guest.write(0, 700)
    changed: list[int] = []

    def sink(name: str, fields: dict[str, int]) -> None:
        if name == "kvm_tdp_mmu_spte_changed" and guest.mmu.fmt.is_present(fields["old_spte"]):
            changed.append(fields["level"])

    guest.vm.trace_sink = sink
    with guest.mmu.state.lock.read():
        zap_root(guest.mmu.state, guest.root)
    assert changed == order
    guest.vm.flush_remote_tlbs()
    guest.close()
