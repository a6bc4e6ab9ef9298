"""Tracepoints and statistics carry KVM's names, fields and meaning; the checker finds what is broken on purpose."""

from __future__ import annotations

import io
import json

import pytest

from migsim.kvm.config import VmConfig
from migsim.kvm.invariants import cheap_violations
from migsim.kvm.mmu_lock import MmuLock
from migsim.kvm.stats import VCPU_STATS, Stats
from migsim.kvm.trace import EVENTS, JsonLines
from migsim.sim.meter import NullMeter

PAGE = 4096
SIMPLE = VmConfig(smm=False)


def test_a_run_traces_json_lines_with_the_fields_kvm_has(mmu_guest) -> None:
    out = io.StringIO()
    guest = mmu_guest()
    guest.vm.trace_sink = JsonLines(out)
    guest.write(5)
    guest.log()
    guest.write(5)
    guest.get()
    guest.read(0x90000)
    guest.mmu.age_hva(guest.hva, guest.hva + PAGE)
    guest.vm.flush_remote_tlbs()
    guest.mmu.unmap_hva_range(guest.hva, guest.hva + PAGE)
    guest.mmu.zap_all_fast()
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    names = {event["event"] for event in events}
    assert names >= {
        "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed", "mark_mmio_spte",
        "kvm_mmu_split_huge_page", "kvm_age_hva", "kvm_unmap_hva_range", "kvm_mmu_zap_all_fast", "kvm_entry",
    }  # fmt: skip
    change = next(event for event in events if event["event"] == "kvm_tdp_mmu_spte_changed")
    assert tuple(change)[2:] == EVENTS["kvm_tdp_mmu_spte_changed"] and change["new_spte"].startswith("0x")
    guest.close()


def test_the_fast_path_traces_what_it_changed(mmu_guest) -> None:
    out = io.StringIO()
    guest = mmu_guest(VmConfig(smm=False, pml=False), level=1)
    guest.log()
    guest.write(5)
    guest.get()
    guest.vm.trace_sink = JsonLines(out, frozenset({"fast_page_fault"}))
    guest.write(5)
    (event,) = [json.loads(line) for line in out.getvalue().splitlines()]
    assert event["fixed"] and int(event["new_spte"], 16) == int(event["old_spte"], 16) | guest.mmu.fmt.writable
    guest.close()


def test_the_fast_path_traces_also_what_it_did_not_have_to_or_could_not_repair(mmu_guest) -> None:
    out = io.StringIO()
    guest = mmu_guest(VmConfig(smm=False, pml=False), level=1)
    guest.write(5, 6)
    guest.vm.trace_sink = JsonLines(out, frozenset({"fast_page_fault"}))
    guest.mmu.page_fault(guest.vcpu, 5 * PAGE, write=True)  # as after another vCPU's repair
    at = list(guest.root.walk(6))[-1][0]
    guest.root.clear_bits(at, guest.mmu.fmt.writable | guest.mmu.fmt.mmu_writable)
    guest.mmu.page_fault(guest.vcpu, 6 * PAGE, write=True)
    guest.mmu.page_fault(guest.vcpu, 7 * PAGE, write=True)  # nothing is there: not eligible, so not traced
    guest.vm.trace_sink = None
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(event["spurious"], event["fixed"]) for event in events] == [(True, False), (False, False)]
    assert all(event["new_spte"] == event["old_spte"] for event in events)
    assert guest.vm.stats.pf_fast == 1, "an outcome that is neither is no fast fault"
    guest.vm.flush_remote_tlbs()
    guest.close()


def test_the_valid_generation_toggles_with_every_zap_of_all(mmu_guest) -> None:
    guest, seen = mmu_guest(level=1), []
    guest.vm.trace_sink = lambda name, fields: seen.append(fields.get("mmu_valid_gen"))
    for _ in range(3):
        guest.mmu.zap_all_fast()
    assert [gen for gen in seen if gen is not None] == [1, 0, 1]
    guest.close()


def test_an_event_kvm_does_not_have_is_an_assertion() -> None:
    sink = JsonLines(io.StringIO())
    with pytest.raises(AssertionError, match="tracepoint kvm_age_hva has fields"):
        sink("kvm_age_hva", {"start": 1})


def test_tracing_does_not_change_what_happens(mmu_guest) -> None:
    pictures = []
    for sink in (None, JsonLines(io.StringIO())):
        guest = mmu_guest(pages=4096)
        guest.vm.trace_sink = sink
        guest.write(5, 600, 4000)
        guest.log()
        guest.write(6)
        guest.log(False)
        guest.write(7)
        pictures.append((guest.counts(), guest.root.n_tables, guest.vm.stats.read()))
        guest.close()
    assert pictures[0] == pictures[1]


def test_statistics_have_kvms_names_and_add_up() -> None:
    stats = Stats()
    stats.count_vcpu(0, "pf_taken", 2)
    stats.count_vcpu(3, "pf_taken")
    assert stats.pf_taken == 3 and stats.read_vcpu(3)["pf_taken"] == 1 and tuple(stats.read_vcpu(0)) == VCPU_STATS
    stats.update_page_stats(2, 5)
    stats.peak("max_mmu_rmap_size", 4)
    stats.peak("max_mmu_rmap_size", 2)
    assert stats.read()["pages_2m"] == 5 and stats.read()["max_mmu_rmap_size"] == 4
    with pytest.raises(AttributeError):
        stats.add("pages_64k")


def test_the_lock_knows_readers_and_writers() -> None:
    lock = MmuLock(NullMeter(), shared=True)
    with lock.read(), lock.read():
        assert lock.readers == 2
        with pytest.raises(AssertionError, match="write-locked with 2 readers"), lock.write():
            pass
    with lock.write(), pytest.raises(AssertionError, match="read-locked while a writer"), lock.read():
        pass
    assert not lock.held


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda g, at: g.root.write(at, g.root.read(at) & ~g.mmu.fmt.mmu_writable), "writable but not MMU-writable"),
        (lambda g, at: g.root.write(at, g.root.read(at) + (1 << 30)), "the host's frame is"),
        (lambda g, at: g.root.write(at, g.mmu.fmt.nonpresent), "a recount finds"),
        (lambda g, at: g.vm.stats.update_page_stats(1, 1), "pages_4k is"),
        (lambda g, at: g.mmu.state.nx.add(g.root, 1 << 38), "nx_lpage_splits is 0, the list holds 1 tables"),
        (lambda g, at: g.root.n_tables.__setitem__(2, 7), "level 2: 7 tables counted, 1 linked"),
        (lambda g, at: g.mmu.lock.__setattr__("readers", 1) or g.mmu.lock.__setattr__("writer", True), "at once"),
    ],
)
def test_the_checker_names_what_is_broken(mmu_guest, level: int, damage, sentence: str) -> None:
    guest = mmu_guest(level=level)
    guest.write(5)
    guest.check()
    damage(guest, list(guest.root.walk(5))[-1][0])
    assert any(sentence in violation for violation in guest.vm.invariants()), guest.vm.invariants()


def test_bits_of_unmapped_pages_and_leaves_without_a_table_are_found(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.write(5)
    guest.root.leaf[1].writable.set(9)
    assert any("without a present SPTE" in violation for violation in cheap_violations(guest.mmu.state))
    guest.root.leaf[1].present.set(1000)
    assert any("gfn 0x3e8 has a 4K SPTE but no level-1 table" in violation for violation in guest.mmu.invariants())


def test_a_current_mmio_spte_inside_a_slot_is_found(mmu_guest) -> None:
    guest = mmu_guest(level=1)
    guest.read(0x9000)
    spte = guest.root.mmio.pop(0x9000)
    guest.root.mmio[7] = spte
    assert any("is current, yet slot 1 is there" in violation for violation in guest.mmu.invariants())
