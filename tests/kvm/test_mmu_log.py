"""Dirty logging in the MMU: what is protected when, by which bit, and what ending the log leaves behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migsim.kvm.config import VmConfig
from migsim.kvm.ioctl import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
from migsim.kvm.levels import max_mapping_level
from migsim.kvm.spte import AdType
from migsim.kvm.tdp_iter import for_each_tdp_pte
from migsim.kvm.tdp_log import clear_dirty_pt_masked, split_range
from migsim.kvm.tdp_mmu import split_huge_page
from migsim.kvm.vintage import TDP, TDP_5_10, TDP_5_15, TDP_5_19, VINTAGES

PML = VmConfig(smm=False)
WP = VmConfig(smm=False, pml=False)
AMD = VmConfig(smm=False, vendor="amd")
NO_AD = VmConfig(smm=False, ad_bits=False)
CONFIGS = pytest.mark.parametrize("config", [PML, WP, AMD, NO_AD], ids=["pml", "wrprot", "npt", "no-ad"])


def bits(guest, gfn: int) -> tuple[bool, bool]:
    """(W, D) of a leaf."""
    spte, _ = guest.spte(gfn)
    return bool(spte & guest.mmu.fmt.writable), bool(spte & guest.mmu.fmt.dirty)


@CONFIGS
@pytest.mark.parametrize("row", sorted(VINTAGES))
def test_only_pages_written_since_are_reported_whatever_the_mmu(mmu_guest, config: VmConfig, row: str) -> None:
    if VINTAGES[row].format_5_10 or row == "shadow":
        guest = mmu_guest(replace(config, mmu=row))
    else:
        guest = mmu_guest(config, vintage=VINTAGES[row])
    guest.write(*range(0, 1024, 100))
    guest.log()
    assert guest.get() == set()
    for round_ in range(3):
        written = {round_, 5, 600 + round_}
        guest.write(*written)
        guest.check()
        assert guest.get() == written, f"round {round_}"
        guest.check()
    guest.log(False)
    guest.write(5)
    guest.close()


@CONFIGS
def test_a_huge_page_is_split_at_enable_before_it_is_protected(mmu_guest, config: VmConfig) -> None:
    guest = mmu_guest(config)
    guest.write(5)
    guest.log()
    assert guest.counts() == (512, 0, 0)
    assert bits(guest, 5) == ((True, False) if config.pml_enabled else (False, True))
    guest.close()


@pytest.mark.parametrize("config", [PML, WP], ids=["pml", "wrprot"])
def test_without_eager_split_the_huge_page_is_write_protected_even_with_pml(mmu_guest, config: VmConfig) -> None:
    guest = mmu_guest(replace(config, eager_page_split=False))
    guest.write(5)
    guest.log()
    assert guest.spte(5)[1] == 2 and not bits(guest, 5)[0]
    guest.close()


@pytest.mark.parametrize(("row", "times"), [("tdp", 3), ("tdp-6.8", 0)])
def test_eager_splitting_lets_the_lock_go_for_each_table_it_allocates(mmu_guest, row: str, times: int) -> None:
    """cf3ff0ee, and parents before children: 1 GiB, then the two 2 MiB asked for."""
    guest = mmu_guest(WP, pages=512 * 512, level=3, vintage=VINTAGES[row])
    guest.write(5)
    state, free, splits = guest.mmu.state, [], []
    state.sched.resched = lambda: free.append(not state.lock.held and not state.rcu.depth)
    guest.vm.trace_sink = lambda name, fields: (
        splits.append((fields["level"], fields["gfn"])) if name == "kvm_mmu_split_huge_page" else None
    )
    with guest.mmu.lock.write():
        split_range(state, guest.root, 0, 1024, 1)
    assert splits == [(3, 0), (2, 0), (2, 512)] and free == [True] * times
    del state.sched.resched
    guest.vm.trace_sink = None
    guest.close()


def test_what_another_vcpu_split_while_the_lock_was_free_is_not_split_again(mmu_guest) -> None:
    guest = mmu_guest(WP)
    guest.write(5)
    state = guest.mmu.state

    def other() -> None:
        del state.sched.resched
        for it in for_each_tdp_pte(guest.root, 0, 1, 2):
            if it.is_leaf:
                with state.lock.read(), state.rcu.read():
                    assert split_huge_page(state, it)

    state.sched.resched = other
    with guest.mmu.lock.read():
        split_range(state, guest.root, 0, 512, 1)
    assert guest.counts() == (512, 0, 0) and guest.root.n_tables[1] == 1
    guest.close()


def test_initially_set_does_no_work_at_enable_and_splits_at_the_first_clear(mmu_guest) -> None:
    guest = mmu_guest(WP)
    guest.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (3,))
    guest.write(5, 600)
    guest.log()
    assert guest.counts() == (0, 2, 0) and bits(guest, 5) == (True, True)
    assert len(guest.get()) == guest.pages
    guest.clear(5)
    assert guest.counts() == (512, 1, 0) and bits(guest, 5)[0] is False and bits(guest, 6)[0] is True
    guest.check()
    guest.clear(*range(guest.pages))
    assert guest.counts() == (1024, 0, 0)
    guest.close()


def _logged_across_a_huge_page(mmu_guest, config):
    """A slot that begins 32 pages before a huge page, under INITIALLY_SET: gfn 512 is bit 32 of the first mask."""
    guest = mmu_guest(config, base=512 - 32, pages=1024)
    guest.delete_slot()
    guest.hva += (512 - 32) * 4096
    guest.pages = 544
    guest.set_slot(0)
    guest.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (3,))
    guest.write(600)
    guest.log()
    return guest


def test_the_last_page_of_a_clear_is_split_too(mmu_guest) -> None:
    """The exclusive end was once passed as inclusive (1aa4bb91)."""
    guest = _logged_across_a_huge_page(mmu_guest, WP)
    guest.clear(512)
    assert guest.spte(600)[1] == 1, "gfn 512 is bit 32 of its mask and the first page of its huge page"
    guest.close()


def test_a_last_page_that_begins_a_huge_page_is_protected_with_it(mmu_guest) -> None:
    """KVM rounds both ends up before it compares them (3c9bd400): it would leave this one writable and clean."""
    guest = _logged_across_a_huge_page(mmu_guest, replace(WP, eager_page_split=False))
    assert guest.spte(600)[1] == 2
    guest.clear(511, 512)
    assert not bits(guest, 512)[0]
    guest.write(512)
    assert 512 in guest.get()
    guest.close()


def test_without_eager_split_a_clear_protects_the_huge_page_of_its_first_and_last_page(mmu_guest) -> None:
    guest = mmu_guest(replace(WP, eager_page_split=False))
    guest.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (3,))
    guest.write(5, 600)
    guest.log()
    guest.clear(5)
    assert not bits(guest, 5)[0] and bits(guest, 600)[0]
    guest.write(5)
    assert guest.spte(5)[1] == 1 and 5 in guest.get()
    guest.close()


def test_5_10_protects_huge_pages_at_enable_even_with_initially_set(mmu_guest) -> None:
    guest = mmu_guest(replace(WP, mmu="tdp-5.10"))
    guest.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (3,))
    guest.write(5)
    guest.log()
    assert not bits(guest, 5)[0]
    guest.close()


@CONFIGS
def test_masked_rearming_touches_only_4k_leaves_whose_bit_is_set(mmu_guest, config: VmConfig) -> None:
    guest = mmu_guest(config, level=1)
    guest.log()
    guest.write(0, 1, 2, 63, 64)
    with guest.mmu.lock.write():
        clear_dirty_pt_masked(guest.mmu.state, guest.root, 0, 1 << 1 | 1 << 5 | 1 << 63, wrprot=not config.pml_enabled)
    guest.vm.flush_remote_tlbs()
    armed = [gfn for gfn in (0, 1, 2, 63, 64) if not all(bits(guest, gfn))]
    assert armed == [1, 63]
    guest.vm.mmu.zap_all_fast()
    guest.close()


def test_masked_rearming_stops_as_soon_as_every_bit_was_visited(mmu_guest, monkeypatch) -> None:
    guest = mmu_guest(WP, level=1)
    guest.log()
    guest.write(0, 1)
    visited = []
    honest = type(guest.root).read
    monkeypatch.setattr(type(guest.root), "read", lambda self, at: visited.append(at) or honest(self, at))
    with guest.mmu.lock.write():
        clear_dirty_pt_masked(guest.mmu.state, guest.root, 0, 0b11, wrprot=True)
        clear_dirty_pt_masked(guest.mmu.state, guest.root, 0, 0b11, wrprot=True)  # nothing to change: still stops
    monkeypatch.undo()
    assert len(visited) < 40, "29f1ddfa: the bit of an entry that needs no change must leave the mask, too"
    guest.vm.mmu.zap_all_fast()
    guest.close()


def test_a_nested_root_logs_by_w_while_pml_logs_the_rest(mmu_guest) -> None:
    """2673dfb5: D of a guest_mode root must not be trusted (CVE-2024-26990)."""
    guest = mmu_guest(PML, level=1, vcpus=2)
    l2 = guest.vcpus[1]
    l2.enter_guest_mode()
    guest.write(5)
    l2.run([("w", 6 * 4096, 1)])
    nested = guest.mmu.root_of(l2)
    assert nested is not guest.root and nested.ad_type == AdType.WRPROT_ONLY
    guest.log()
    fmt = guest.mmu.fmt
    assert bits(guest, 5) == (True, False)
    spte = nested.lookup(6)[0]
    assert not fmt.is_writable(spte) and spte & fmt.dirty
    l2.run([("w", 6 * 4096, 1)])
    guest.write(5)
    guest.check()
    assert guest.get() == {5, 6}
    guest.close()


def test_a_slot_is_logged_in_the_roots_of_its_own_address_space(mmu_guest) -> None:
    guest = mmu_guest(VmConfig(pml=False), level=1)
    guest.vm.set_user_memory_region(1 << 16 | 1, 0, 0, guest.pages * 4096, guest.hva)
    guest.write(5)
    normal = guest.root
    guest.vcpu.smm = True
    guest.write(5)
    smm = guest.root
    guest.vm.set_user_memory_region(1 << 16 | 1, 1, 0, guest.pages * 4096, guest.hva)
    writable = guest.mmu.fmt.writable
    assert not smm.lookup(5)[0] & writable and normal.lookup(5)[0] & writable
    guest.vcpu.smm = False
    guest.close()


# -- logging ends --------------------------------------------------------------------------------------------------


FORMS = [(TDP, "recover"), (TDP_5_19, "zap-tables"), (TDP_5_15, "zap-leafs"), (TDP_5_10, "zap-nothing")]


@pytest.mark.parametrize(("vintage", "form"), FORMS, ids=[form for _, form in FORMS])
def test_what_ending_the_log_recovers_depends_on_the_kernel(mmu_guest, vintage, form: str) -> None:
    guest = mmu_guest(replace(WP, mmu="tdp-5.10") if vintage is TDP_5_10 else WP, vintage=vintage)
    guest.log()
    guest.write(5, 600, 1500)
    tables = guest.root.n_tables[1]
    flushes = guest.vm.stats.remote_tlb_flush_requests
    guest.log(False)
    flushes = guest.vm.stats.remote_tlb_flush_requests - flushes
    after = {
        "recover": ((0, 3, 0), 0, 1), "zap-tables": ((0, 0, 0), 0, 3), "zap-leafs": ((0, 0, 0), tables, 3),
        "zap-nothing": ((3, 0, 0), tables, 0),
    }  # fmt: skip
    assert (guest.counts(), guest.root.n_tables[1], flushes) == after[form]
    guest.write(5, 600, 1500)
    assert guest.counts() == ((3, 0, 0) if form == "zap-nothing" else (0, 3, 0))
    guest.close()


def test_a_recovered_huge_page_takes_its_rights_from_the_first_present_child(mmu_guest) -> None:
    guest = mmu_guest(WP)
    guest.log()
    guest.write(5, 6)
    guest.get()
    guest.write(6)
    guest.log(False)
    assert guest.spte(5)[1] == 2 and not bits(guest, 5)[0], "gfn 5 was protected; write protection outlives the log"
    guest.write(5)
    assert guest.vm.stats.pf_fast >= 1 and bits(guest, 5)[0]
    guest.close()


def test_a_range_that_leaves_the_slot_or_is_small_on_the_host_stays_small(mmu_guest) -> None:
    guest = mmu_guest(WP, base=512, pages=1000)
    guest.log()
    guest.write(512, 1030)
    guest.log(False)
    assert (guest.spte(512)[1], guest.spte(1030)[1]) == (2, 1)
    assert max_mapping_level(guest.mmu.state, guest.slot, 1030) == 1
    guest.close()


def test_recovery_gives_a_1g_page_back(mmu_guest) -> None:
    guest = mmu_guest(WP, pages=512 * 512, level=3)
    guest.mmu.state.whole_slots = False
    guest.log()
    guest.write(5)
    guest.log(False)
    assert guest.counts() == (0, 0, 1) and guest.root.n_tables[1] == guest.root.n_tables[2] == 0
    guest.close()


def test_a_clear_of_two_neighbours_in_two_huge_pages_rearms_both(mmu_guest) -> None:
    """In a slot with an odd base one word's bits may end with the first page of the next huge page."""
    guest = mmu_guest(
        VmConfig(smm=False, pml=False, eager_page_split=False), pages=2041, base=512 + 7, level=2, offset=7
    )
    guest.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (3,))
    guest.write(1023 + 512, 1024 + 512)
    assert guest.spte(1535)[1] == guest.spte(1536)[1] == 2
    guest.log()
    guest.get()
    guest.clear(1535, 1536)
    assert {1535, 1536} & guest.get() == set()
    guest.write(1536)
    assert 1536 in guest.get()
    guest.close()
