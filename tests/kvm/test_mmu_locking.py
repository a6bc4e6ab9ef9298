"""Who holds mmu_lock how, which bits a locked AND leaves alone, and what is not re-armed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migsim.kvm.changed_spte import clear_spte_bits
from migsim.kvm.config import VmConfig
from migsim.kvm.spte import EPT
from migsim.kvm.tdp_iter import for_each_tdp_pte
from migsim.kvm.tdp_log import clear_dirty_range
from migsim.kvm.vintage import TDP, VINTAGES
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
    ("drop", "volatile"), [(0, False), (EPT.dirty, True), (EPT.accessed, True), (EPT.writable, True)]
)
def test_an_spte_is_volatile_while_the_cpu_or_the_fast_path_may_change_it(mmu_guest, drop: int, volatile: bool) -> None:
    guest = mmu_guest(level=1)
    guest.write(5)
    spte, level = guest.spte(5)
    assert EPT.is_volatile(spte & ~drop, level) == volatile
    guest.close()
