"""Any mix of operations, on any MMU, format and backing: bulk equals page by page, invariants hold, no page is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from migsim.kvm.config import VmConfig
from migsim.kvm.invariants import entries
from migsim.kvm.ioctl import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
from migsim.kvm.nested import GuestPte, NestedGuest
from migsim.kvm.vm import Vm

PAGE = 4096
PAGES = 2 * 512 + 70
TABLES = 0x8000  # L1's tables for L2, in a slot of their own
CONFIGS = [
    VmConfig(), VmConfig(pml=False), VmConfig(vendor="amd"), VmConfig(ad_bits=False), VmConfig(eager_page_split=False),
    VmConfig(nx_huge_pages=True), VmConfig(mmu="tdp-5.10"), VmConfig(mmu="shadow"), VmConfig(mmu="shadow", pml=False),
    VmConfig(quirk_slot_zap_all=False),
]  # fmt: skip
pages = st.integers(0, PAGES - 1)
few = st.sets(pages, min_size=1, max_size=4)


class Side:
    """One VM with one logged slot and two vCPUs; `bulk` decides how large operations are done."""

    def __init__(self, config: VmConfig, base: int, level: int, manual: int, bulk: bool) -> None:
        self.vm, self.base = Vm(config, bulk=bulk), base
        if bulk and hasattr(self.vm, "bulk_kernel"):
            self.vm.bulk_kernel.min_pages = 1
        self.vm.mmu.state.whole_slots, self.vm.mmu.state.whole_slots_min_pages = bulk, 1
        self.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (manual,))
        self.hva = self.vm.alloc_memory(3 * 512 * PAGE, level) + (base % 512) * PAGE
        self.region(0)
        self.vcpus = [self.vm.create_vcpu(i) for i in range(2)]
        self.l2: NestedGuest | None = None

    def build_l2(self, ad_bits: bool) -> None:
        """L2's pages are L1's, by a table for the first 512 and a huge page for the next."""
        self.vm.set_user_memory_region(2, 0, TABLES * PAGE, 8 * PAGE, self.vm.alloc_memory(8 * PAGE))
        self.l2 = NestedGuest(self.vm, TABLES, ad_bits=ad_bits)
        for depth in range(2):
            self.edit(depth, 0, GuestPte(TABLES + depth + 1))
        self.edit(2, 0, GuestPte(TABLES + 3))
        self.edit(2, 1, GuestPte(-(-self.base // 512) * 512, leaf=True))

    def edit(self, table: int, index: int, pte: GuestPte | None) -> None:
        """L1 stores to one of its tables."""
        assert self.l2 is not None
        guest_mode, self.vcpus[0].guest_mode = self.vcpus[0].guest_mode, False
        self.l2.write_entry(self.vcpus[0], TABLES + table, index, pte)
        self.vcpus[0].guest_mode = guest_mode

    def in_l2(self, kind: str, l2_page: int) -> int | None:
        """L2 loads or stores; the page of L1 it reached, if it reached one."""
        vcpu, seen = self.vcpus[1], []
        guest_mode = vcpu.guest_mode
        self.vm.store_hook = lambda vcpu, slot, gfn: seen.append(gfn - self.base)
        vcpu.enter_guest_mode(self.l2)
        vcpu.run([(kind, l2_page * PAGE, 1)])
        vcpu.leave_guest_mode()
        vcpu.guest_mode = guest_mode
        self.vm.store_hook = None
        return seen[0] if seen else None

    def region(self, flags: int, size: int = PAGES) -> None:
        self.vm.set_user_memory_region(1, flags, self.base * PAGE, size * PAGE, self.hva)

    def access(self, kind: str, which: set[int], vcpu: int) -> None:
        self.vcpus[vcpu].run([(kind, (self.base + page) * PAGE, 1) for page in sorted(which)])

    def get(self) -> list[int]:
        words = np.zeros(-(-PAGES // 64), dtype=np.uint64)
        self.vm.get_dirty_log(1, words)
        return [int(word) for word in words]

    def clear(self, words: list[int]) -> None:
        self.vm.clear_dirty_log(1, 0, PAGES, np.array(words, dtype=np.uint64))

    def picture(self) -> tuple[object, ...]:
        roots = sorted(self.vm.mmu.state.roots, key=lambda root: (root.as_id, root.role.guest_mode))
        leafs = [
            {(root.gfn_of(at), level): spte for at, spte, level in entries(root) if level == 1 or spte >> 7 & 1}
            for root in roots
        ]
        counters = {name: value for name, value in self.vm.stats.read().items() if name != "tlb_flush"}
        shadowed = sorted((page.key, page.sptes, page.unsync) for page in self.vm.mmu.shadow.pages)
        return leafs, [root.n_tables for root in roots], counters, str(shadowed)


class BothWays(RuleBasedStateMachine):
    """The same steps on a bulk VM and on a page-by-page one."""

    @initialize(
        config=st.sampled_from(CONFIGS), base=st.sampled_from([512, 512 + 64, 512 + 7]), level=st.sampled_from([1, 2]),
        manual=st.sampled_from([0, 1, 3]), l2_ad_bits=st.sampled_from([None, False, True]),
    )  # fmt: skip
    def create(self, config: VmConfig, base: int, level: int, manual: int, l2_ad_bits: bool | None) -> None:
        self.sides = [Side(replace(config), base, level, manual, bulk) for bulk in (True, False)]
        self.logging, self.manual = False, manual
        self.unsynced: set[int] = set()  # written since the log began and not reported yet
        if l2_ad_bits is not None:
            self.both(lambda side: side.build_l2(l2_ad_bits))

    def both(self, act: Any) -> Any:
        answers = [act(side) for side in self.sides]
        assert answers[0] == answers[1]
        return answers[0]

    @rule(which=few, vcpu=st.integers(0, 1))
    def write(self, which: set[int], vcpu: int) -> None:
        self.both(lambda side: side.access("w", which, vcpu))
        if self.logging:
            self.unsynced |= which

    @rule(which=few, vcpu=st.integers(0, 1))
    def read(self, which: set[int], vcpu: int) -> None:
        self.both(lambda side: side.access("r", which, vcpu))

    @rule(page=pages)
    def execute(self, page: int) -> None:
        self.both(lambda s: s.vm.mmu.page_fault(s.vcpus[0], (s.base + page) * PAGE, write=False, exec=True))

    @rule(on=st.booleans())
    def switch_log(self, on: bool) -> None:
        self.both(lambda side: side.region(int(on)))
        if on != self.logging:
            self.unsynced.clear()
        self.logging = on

    @precondition(lambda self: self.logging)
    @rule(part=st.integers(0, (1 << 64) - 1))
    def sync(self, part: int) -> None:
        seen = self.both(Side.get)
        reported = {i for i in range(PAGES) if seen[i >> 6] >> (i & 63) & 1}
        assert self.unsynced <= reported, f"lost: {sorted(self.unsynced - reported)}"
        if not self.manual:
            self.unsynced.clear()
            return
        mask = [word & part for word in seen]
        self.both(lambda side: side.clear(mask))
        self.unsynced -= {i for i in range(PAGES) if mask[i >> 6] >> (i & 63) & 1}

    @rule(first=pages, count=st.integers(1, 800))
    def age(self, first: int, count: int) -> None:
        def act(side: Side) -> bool:
            slot = side.vm.gfn_to_slot(0, side.base)
            start = side.base + first
            young = side.vm.mmu.age_gfn_range(slot, start, min(start + count, side.base + PAGES))
            side.vm.flush_remote_tlbs()
            return young

        self.both(act)

    @rule(first=pages, count=st.integers(1, 800))
    def unmap(self, first: int, count: int) -> None:
        end = min(first + count, PAGES)
        self.both(lambda s: s.vm.mmu.unmap_hva_range(s.hva + first * PAGE, s.hva + end * PAGE))

    @rule(page=pages)
    def migrate_host_page(self, page: int) -> None:
        def act(side: Side) -> None:
            hva = side.hva + page * PAGE
            side.vm.mmu.invalidate_range_start(hva, hva + PAGE)
            side.vm.host.replace(hva)
            side.vm.mmu.invalidate_range_end(hva, hva + PAGE)

        self.both(act)

    @rule()
    def recover_nx(self) -> None:
        self.both(lambda side: side.vm.mmu.recover_nx(ratio=1))

    @rule(vcpu=st.integers(0, 1), on=st.booleans())
    def nested(self, vcpu: int, on: bool) -> None:
        def act(side: Side) -> None:
            if side.vcpus[vcpu].guest_mode != on:
                (side.vcpus[vcpu].enter_guest_mode if on else side.vcpus[vcpu].leave_guest_mode)()

        self.both(act)

    @precondition(lambda self: self.sides[0].l2 is not None)
    @rule(index=st.integers(0, 9), page=st.one_of(st.none(), pages))
    def l1_edits_its_lowest_table(self, index: int, page: int | None) -> None:
        """Unseen by KVM where the shadow page is unsync, so that L2 may go on with the old entry."""
        self.l2_runs("r", index)
        self.both(lambda side: side.edit(3, index, None if page is None else GuestPte(side.base + page)))
        self.l2_runs("w", index)

    @precondition(lambda self: self.sides[0].l2 is not None)
    @rule(index=st.integers(0, 2), huge=st.booleans())
    def l1_edits_an_upper_table(self, index: int, huge: bool) -> None:
        def act(side: Side) -> None:
            side.edit(2, index, GuestPte(-(-side.base // 512) * 512, leaf=True) if huge else GuestPte(TABLES + 3))

        self.both(act)

    @precondition(lambda self: self.sides[0].l2 is not None)
    @rule(vcpu=st.integers(0, 1))
    def l1_flushes(self, vcpu: int) -> None:
        self.both(lambda side: side.l2.invept(side.vcpus[vcpu]))

    @precondition(lambda self: self.sides[0].l2 is not None)
    @rule(kind=st.sampled_from("rw"), page=st.one_of(st.integers(0, 9), st.integers(512, 530)))
    def l2_goes_on(self, kind: str, page: int) -> None:
        self.l2_runs(kind, page)

    def l2_runs(self, kind: str, page: int) -> None:
        reached = self.both(lambda side: side.in_l2(kind, page))
        if self.logging and reached is not None:
            self.unsynced.add(reached)

    @rule(limit=st.integers(64, 90))
    def set_nr_mmu_pages(self, limit: int) -> None:
        self.both(lambda side: side.vm.set_nr_mmu_pages(limit))

    @rule()
    def recreate_slot(self) -> None:
        def act(side: Side) -> None:
            side.region(0, 0)
            side.region(int(self.logging))

        self.both(act)
        self.unsynced.clear()

    @rule(page=pages)
    def outside(self, page: int) -> None:
        self.both(lambda s: s.vm.mmu.page_fault(s.vcpus[0], (0x10000 + page) * PAGE, write=False))

    @invariant()
    def equal_and_sound(self) -> None:
        if not hasattr(self, "sides"):
            return
        bulk, plain = (side.picture() for side in self.sides)
        assert bulk == plain
        for side in self.sides:
            assert side.vm.invariants() == []

    def teardown(self) -> None:
        for side in getattr(self, "sides", ()):
            side.vm.close()


BothWays.TestCase.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
test_any_mix_of_operations = BothWays.TestCase
