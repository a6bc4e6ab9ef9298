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
from migsim.kvm.vm import Vm

PAGE = 4096
PAGES = 2 * 512 + 70
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
        return leafs, [root.n_tables for root in roots], counters


class BothWays(RuleBasedStateMachine):
    """The same steps on a bulk VM and on a page-by-page one."""

    @initialize(
        config=st.sampled_from(CONFIGS), base=st.sampled_from([512, 512 + 64, 512 + 7]), level=st.sampled_from([1, 2]),
        manual=st.sampled_from([0, 1, 3]),
    )  # fmt: skip
    def create(self, config: VmConfig, base: int, level: int, manual: int) -> None:
        self.sides = [Side(replace(config), base, level, manual, bulk) for bulk in (True, False)]
        self.logging, self.manual = False, manual
        self.unsynced: set[int] = set()  # written since the log began and not reported yet

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
