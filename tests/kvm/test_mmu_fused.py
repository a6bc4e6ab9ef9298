"""Operation by operation: the fused kernels, BulkSlot and populate against one store, one ioctl, one page at a time.

Two guests take the same steps. `Plain` is the readable path: a vCPU stores page by page, migration.ram.Ram works
through the ioctls, and nothing is done at once. `Fused` is FusedRam over the planes. After every step SPTEs, tables,
log, QEMU's bitmap, the ground truth and the counters are equal, and KVM's invariants hold on both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from migsim.fused import FusedRam
from migsim.guest.memory import GuestMemory, SlotRange
from migsim.guest.workload import SEQUENTIAL, Stream, Workload
from migsim.kvm.bulk_slot import BulkSlot
from migsim.kvm.config import VmConfig
from migsim.kvm.invariants import cheap_violations, entries
from migsim.kvm.ioctl import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
from migsim.kvm.memslot import Memslot
from migsim.kvm.paging import huge_leafs
from migsim.kvm.populate import populate
from migsim.kvm.spte import PG_LEVEL_4K
from migsim.kvm.vm import Vm
from migsim.migration.ram import NO_LIMITS, Ram, SaveCosts, SaveLimits
from migsim.planes import Plane
from migsim.sim.meter import CountingMeter
from migsim.units import CHUNK_PAGES

PAGE = 4096
PAGES = 2 * 512 + 70
STREAMS = 4
COSTS = SaveCosts(200_000, 60_000, 300, 2_000_000, 7_000, PAGE + 8, 9)
SMALL = VmConfig(smm=False, maxphyaddr=52)
CONFIGS = {
    "pml": SMALL,
    "wrprot": replace(SMALL, pml=False),
    "npt": replace(SMALL, vendor="amd"),
    "lazy-split": replace(SMALL, eager_page_split=False),
    "lazy-split-npt": replace(SMALL, eager_page_split=False, vendor="amd"),
    "nx": replace(SMALL, nx_huge_pages=True),
    "nx-lazy-split": replace(SMALL, nx_huge_pages=True, eager_page_split=False),
    "5.10": replace(SMALL, mmu="tdp-5.10"),
    "5.10-npt": replace(SMALL, mmu="tdp-5.10", vendor="amd"),
    "shadow": replace(SMALL, mmu="shadow", tdp=False),
}
COUNTED = ("pf_taken", "pf_fixed", "pf_fast", "pf_emulate", "pf_spurious", "pages_4k", "pages_2m", "pages_1g",
           "nx_lpage_splits", "remote_tlb_flush", "remote_tlb_flush_requests", "tlb_flush")  # fmt: skip
METERED = ("get_user_page", "table_alloc", "huge_page_split", "mmu_lock_write", "mmu_lock_read", "rmap_add",
           "rmap_walk", "remote_tlb_flush")  # fmt: skip


class Side:
    """A VM with one slot of `pages` pages at gfn `base`, and QEMU's RAMState over it."""

    def __init__(self, config: VmConfig, base: int, pages: int, level: int, manual: int, at_once: bool) -> None:
        self.meter, self.base, self.pages = CountingMeter(), base, pages
        self.vm = Vm(config, bulk=False, meter=self.meter)
        self.vm.mmu.state.whole_slots, self.vm.mmu.state.whole_slots_min_pages = at_once, 1
        if manual:
            self.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (manual,))
        self.vcpus = [self.vm.create_vcpu(i) for i in range(2)]
        for vcpu in self.vcpus:
            self.vm.mmu.root_of(vcpu)
        self.hva = self.vm.alloc_memory(-(-pages // 512) * 512 * PAGE, level)
        self.flags(0)
        memory = GuestMemory([("pc.ram", pages, (SlotRange(0, pages, base),))], [(0, pages * 4 // 5)])
        self.memory, self.block = memory, memory.blocks[0]
        self.ram = Ram(memory, self.vm, [[1]], COSTS, manual != 0, lambda ps: None, with_bitmaps=not at_once)

    def flags(self, flags: int) -> None:
        self.vm.set_user_memory_region(1, flags, self.base * PAGE, self.pages * PAGE, self.hva)

    @property
    def slot(self) -> Memslot:
        slot = self.vm.memslots(0).by_id(1)
        assert slot is not None
        return slot

    def leafs(self) -> dict[tuple[int, int], int]:
        """(gfn, level) to SPTE of every leaf."""
        (root,) = self.vm.mmu.state.roots
        return {(root.gfn_of(at), level): s for at, s, level in entries(root) if level == PG_LEVEL_4K or s >> 7 & 1}

    def packed(self) -> tuple[object, ...]:
        """The same for many pages: huge leaves as they are, 4K leaves as planes."""
        (root,) = self.vm.mmu.state.roots
        planes = root.leaf[1]
        names = ("present", "writable", "dirty", "accessed", "not_mmu_writable", "not_exec")
        found = [getattr(planes, name) or Plane(self.pages) for name in names]
        huge = np.sort(root.tables[huge_leafs(root.fmt, root.tables)]).tolist()
        return huge, [plane.slice_words(0, self.pages).tobytes() for plane in found]

    def tables(self) -> list[int]:
        (root,) = self.vm.mmu.state.roots
        return root.n_tables

    def counters(self) -> dict[str, int]:
        stats = self.vm.stats.read()
        out = {name: stats[name] for name in COUNTED} | {name: self.meter.totals.get(name, 0) for name in METERED}
        out["exits for faults"] = stats["exits"] - stats["halt_exits"]
        return out

    def bits(self) -> dict[str, bytes]:
        """The log, QEMU's bitmap, the ground truth, the zero pages."""
        log = self.slot.dirty_bitmap
        planes = {"bmap": self.ram.blocks[0].bmap, "stale": self.block.stale, "zero": self.block.zero}
        planes |= {"log": log} if log is not None else {}
        return {name: plane.slice_words(0, self.pages).tobytes() for name, plane in planes.items()}


class Plain(Side):
    """One page at a time."""

    def __init__(self, config: VmConfig, base: int, pages: int, level: int, manual: int) -> None:
        super().__init__(config, base, pages, level, manual, at_once=False)

    def fill(self, count: int) -> None:
        for page in range(count):
            self.store(page)
        self.vm.store_hook = lambda vcpu, slot, gfn: self.memory.write(self.block, gfn - self.base)

    def store(self, page: int) -> None:
        self.vcpus[page % 2].run([("w", (self.base + page) * PAGE, 1)])

    def stores(self, ranges: list[tuple[int, int]]) -> None:
        for first, count in ranges:
            for page in range(first, first + count):
                self.store(page)

    def split(self) -> None:
        self.vm.mmu.tdp.split_slot(self.slot, self.slot.base_gfn, self.slot.end_gfn)
        self.meter.totals["mmu_lock_read"] -= 1  # inside CLEAR, where it belongs, the lock is held already


class Fused(Side):
    """Planes and kernels."""

    def __init__(self, config: VmConfig, base: int, pages: int, level: int, manual: int) -> None:
        super().__init__(config, base, pages, level, manual, at_once=True)
        sweeps = [Stream(SEQUENTIAL, 0, 1, 0.0)] * STREAMS
        self.workload = Workload(sweeps, self.memory.chunks, 1)
        self.fused = FusedRam(self.ram, lambda: [[self.bulk()]], self.workload, lambda: 0, 1, True)
        self.ram = self.fused

    def bulk(self) -> BulkSlot:
        root = self.vm.mmu.root_of(self.vcpus[0])
        return BulkSlot(self.vm, self.vm.mmu.state, root, self.slot)

    def fill(self, count: int) -> None:
        if count:
            populate(self.vm.mmu.state, self.vm.mmu.root_of(self.vcpus[0]), self.slot, 0, count)

    def stores(self, ranges: list[tuple[int, int]]) -> None:
        """A sweep of each stream over its range, and then somebody looks."""
        w = self.workload
        w.seen[:] = w.clock
        for i, (first, count) in enumerate(ranges):
            w.first[i], w.end[i] = first, first + count
            w.clock[i] = w.seen[0, i] + count
        self.fused.catch_up()

    def split(self) -> None:
        (extent,) = self.fused.extents[0]
        kvm: Any = extent.kvm
        for chunk in range(len(kvm.tabled)):
            kvm.split(chunk)

    def bits(self) -> dict[str, bytes]:
        self.fused.lost()  # the chunk being sent is written back where others look
        return super().bits()


def same(plain: Side, fused: Side, before: tuple[dict[str, int], dict[str, int]]) -> None:
    """Everything that both sides keep is equal, but for the leaves; counters since `before`."""
    assert fused.tables() == plain.tables()
    assert fused.bits() == plain.bits()
    sides = ((plain, before[0]), (fused, before[1]))
    since = [{name: value - old[name] for name, value in side.counters().items()} for side, old in sides]
    assert since[1] == since[0]
    levels = ("pages_4k", "pages_2m", "pages_1g")
    assert [fused.counters()[name] for name in levels] == [plain.counters()[name] for name in levels]
    for name in ("dirty_pages", "rearmed_pages", "clear_calls", "page"):
        assert getattr(fused.ram, name) == getattr(plain.ram, name), name


ranges = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 90)), min_size=1, max_size=STREAMS)


class Machine(RuleBasedStateMachine):
    """Any order of stores, syncs and sends after logging has begun."""

    @initialize(
        name=st.sampled_from(sorted(CONFIGS)), base=st.sampled_from([512, CHUNK_PAGES - 1024, CHUNK_PAGES]),
        level=st.sampled_from([1, 2]), manual=st.sampled_from([0, 1, 3]), regions=st.integers(0, 3),
    )  # fmt: skip
    def start(self, name: str, base: int, level: int, manual: int, regions: int) -> None:
        self.config, self.manual = CONFIGS[name], manual
        self.populated = min(regions * 512, PAGES)
        self.plain = Plain(self.config, base, PAGES, level, manual)
        self.fused = Fused(self.config, base, PAGES, level, manual)
        for side in (self.plain, self.fused):
            side.fill(self.populated)
            side.vm.flush_remote_tlbs()
        assert self.fused.leafs() == self.plain.leafs() and self.fused.tables() == self.plain.tables()
        for side in (self.plain, self.fused):
            side.flags(1)
        self.before = self.plain.counters(), self.fused.counters()
        self.synced = False

    @rule(where=ranges)
    def stores(self, where: list[tuple[int, int]]) -> None:
        """Memory that was never touched is written only once its log is no longer all set (workloads never do)."""
        log = self.fused.slot.dirty_bitmap
        assert log is not None
        end = self.populated if log.full.any() else PAGES
        where = [(first, min(first + count, end) - first) for first, count in where if first < end]
        self.plain.stores(where)
        self.fused.stores(where)

    @rule()
    def sync(self) -> None:
        assert self.fused.ram.sync() == self.plain.ram.sync()
        self.synced = True

    @precondition(lambda self: self.synced)
    @rule(pages=st.integers(0, 700))
    def save(self, pages: int) -> None:
        limits = SaveLimits(pages * COSTS.normal_bytes, NO_LIMITS.ps)
        assert self.fused.ram.save(limits) == self.plain.ram.save(limits)

    @precondition(lambda self: self.config.mmu == "tdp" and self.config.eager_page_split)
    @rule()
    def split(self) -> None:
        self.plain.split()
        self.fused.split()

    @invariant()
    def equal_and_sound(self) -> None:
        if not hasattr(self, "plain"):
            return
        assert self.fused.leafs() == self.plain.leafs()
        same(self.plain, self.fused, self.before)
        assert self.fused.fused.lost()[0] == 0
        for side in (self.plain, self.fused):
            assert side.vm.invariants() == []

    def teardown(self) -> None:
        if not hasattr(self, "plain"):
            return
        for side in (self.plain, self.fused):
            side.flags(0)
        assert self.fused.leafs() == self.plain.leafs() and self.fused.tables() == self.plain.tables()
        for side in (self.plain, self.fused):
            side.vm.close()


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=8, deadline=None)
test_any_order_of_stores_syncs_and_sends = Machine.TestCase


@pytest.mark.parametrize("name", ["pml", "lazy-split-npt", "5.10", "shadow"])
def test_a_1g_page_is_met_by_stores_and_a_clear_as_page_by_page(name: str) -> None:
    plain, fused = (kind(CONFIGS[name], CHUNK_PAGES, CHUNK_PAGES, 3, 3) for kind in (Plain, Fused))
    plain.vm.mmu.state.whole_slots = True  # splitting 262 144 pages one by one is tested above, on 2M pages
    plain.store(7)
    plain.fill(0)
    fused.fill(CHUNK_PAGES)
    for side in (plain, fused):
        side.vm.flush_remote_tlbs()
        side.flags(1)
    before = plain.counters(), fused.counters()
    for side in (plain, fused):
        side.stores([(3, 2)])
        side.ram.sync()
        side.ram.save(SaveLimits(100 * COSTS.normal_bytes, NO_LIMITS.ps))
        side.stores([(5, 3), (CHUNK_PAGES - 600, 200)])
        side.ram.sync()
    same(plain, fused, before)
    assert fused.packed() == plain.packed()
    assert fused.fused.lost()[0] == 0 and not list(cheap_violations(fused.vm.mmu.state))
    for side in (plain, fused):
        side.flags(0)
    assert fused.packed() == plain.packed() and fused.tables() == plain.tables()
    for side in (plain, fused):
        side.vm.close()
