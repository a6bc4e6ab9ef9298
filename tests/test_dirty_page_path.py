"""The path of one dirty page, station by station, on a VM of 64 pages (README tells it in prose).

 1 guest/workload.py        a write to guest frame 5
 2 kvm/vcpu.py              the vCPU misses its TLB, walks, and finds no W
 3 kvm/page_fault.py        the leaf is write-protected: the fast page fault sets W
 4 kvm/vm.py                mark_page_dirty_in_slot: a bit of the slot's log
 5 guest/memory.py          the page differs from the destination's copy
 6 kvm/dirty_log.py         GET copies (manual protection); CLEAR takes, protects, flushes
 7 migration/ram.py         sync ORs the log into RAMBlock.bmap
 8 migration/ram.py         CLEAR the chunk, clear the page's bit, read the page: that order is the law
 9 migration/precopy.py     bytes and time
10 guest/memory.py          the destination has the page: it no longer differs
11 simulation.py            nothing differs at the end
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from migsim.guest.catch_up import draw_hits
from migsim.guest.memory import GuestMemory, SlotRange
from migsim.guest.workload import SEQUENTIAL, Stream, Workload
from migsim.kvm.config import VmConfig
from migsim.kvm.ioctl import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES
from migsim.kvm.vm import Vm
from migsim.migration.ram import NO_LIMITS, Ram, SaveCosts
from migsim.migration.ram_kernels import END_OF_SPAN

PAGES, GFN = 64, 5
COSTS = SaveCosts(
    normal_ps=1_000_000, zero_ps=100_000, word_ps=0, clear_ps=0, clear_page_ps=0, normal_bytes=4104, zero_bytes=9
)


class Bench:
    """One vCPU, one slot of 64 pages logged by write protection, QEMU's RAM over it; everything was sent once."""

    def __init__(self) -> None:
        self.memory = GuestMemory([("pc.ram", PAGES, (SlotRange(0, PAGES, 0),))], [(0, PAGES)])
        self.block = self.memory.blocks[0]
        self.vm = Vm(VmConfig(vendor="amd", smm=False), bulk=False)
        self.vm.store_hook = lambda vcpu, slot, gfn: self.memory.write(self.block, gfn)
        self.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(3, 0, 0, 0))
        self.vcpu = self.vm.create_vcpu(0)
        hva = self.vm.alloc_memory(PAGES * 4096)
        self.vm.set_user_memory_region(0, 0, 0, PAGES * 4096, hva)
        self.vcpu.run([("w", gfn << 12, 1) for gfn in range(PAGES)])
        self.vm.set_user_memory_region(0, KVM_MEM_LOG_DIRTY_PAGES, 0, PAGES * 4096, hva)
        self.ram = Ram(self.memory, self.vm, [[0]], COSTS, True, lambda elapsed_ps: None)
        self.ram.sync()
        self.ram.save(NO_LIMITS)
        assert self.ram.dirty_pages == self.memory.stale_pages() == 0

    @property
    def slot(self) -> Any:
        return self.vm.memslots(0).by_id(0)

    def spte(self) -> tuple[bool, bool]:
        """(present, writable) of the leaf of GFN."""
        spte, level = self.vm.mmu.walk(self.vm.mmu.root_of(self.vcpu), GFN)
        assert level == 1
        return self.vm.mmu.fmt.is_present(spte), self.vm.mmu.fmt.is_writable(spte)


def test_one_dirty_page_passes_every_station() -> None:
    b = Bench()
    order: list[str] = []

    # 1. the workload's law: five writes of a sweep have gone to gfns 0..4, the next one hits gfn 5 alone
    w = Workload([Stream(SEQUENTIAL, 0, PAGES, 1e9)], 1, 0)
    w.clock[0] = w.seen[0, 0] = GFN
    w.advance(1)
    hits, scratch, summary = (np.zeros(n, dtype=np.uint64) for n in (1, 1, 65))
    assert draw_hits(
        hits, summary, scratch, 0, PAGES, 0, w.law, w.first, w.end, w.clock, w.seen[0], w.visits, w.seed_key
    )
    assert int(hits[0]) == 1 << GFN

    # 2. the vCPU may not write: the leaf lost W in the CLEAR before, and the TLB was flushed with it
    assert b.spte() == (True, False)
    cached = b.vcpu.tlb.lookup(b.vm.mmu.root_of(b.vcpu), GFN)
    assert cached is None or not cached.silent_store
    fast, marked = b.vm.stats.pf_fast, []
    mark = b.vm.mark_page_dirty_in_slot
    b.vm.mark_page_dirty_in_slot = lambda slot, gfn, vcpu=None: (marked.append(gfn), mark(slot, gfn, vcpu))  # type: ignore[method-assign,assignment]
    b.vcpu.run([("w", GFN << 12, 42)])

    # 3. the fast page fault gave W back, without mmu_lock, 4. and marked the page, once
    assert b.vm.stats.pf_fast > fast and b.spte() == (True, True)
    assert marked == [GFN] and b.slot.dirty_bitmap.get(GFN) and b.slot.dirty_bitmap.count() == 1
    # 5. the truth knows, from the store itself
    assert b.memory.stale_pages() == 1 and b.block.stale.get(GFN)
    # a second store is silent: marked already
    b.vcpu.run([("w", GFN << 12, 43)])
    assert marked == [GFN]

    # 6. GET copies and keeps; 7. sync merges it into QEMU's bitmap
    seen = np.zeros(1, dtype=np.uint64)
    b.vm.get_dirty_log(0, seen)
    assert int(seen[0]) == 1 << GFN and b.slot.dirty_bitmap.get(GFN) and b.spte() == (True, True)
    assert b.ram.sync() == 1 and b.ram.dirty_pages == 1 and b.ram.blocks[0].bmap.get(GFN)
    assert b.memory.stale_pages() == 1, "syncing sends nothing"

    # 8. CLEAR (take, protect, flush) comes before the bit is cleared and the page is read
    for thing, name in (
        (b.vm.word_kernel, "take"), (b.vm.word_kernel, "protect"), (b.vm.dirty_log, "flush"), (b.ram, "send_chunk"),
    ):  # fmt: skip
        _note(thing, name, order)
    saved = b.ram.save(NO_LIMITS)
    assert order == ["take", "protect", "flush", "send_chunk"]
    assert not b.slot.dirty_bitmap.get(GFN) and b.spte() == (True, False)

    # 9. one page, its bytes and its time; 10. the destination has it; 11. nothing differs
    assert (saved.normal, saved.duplicate, saved.why) == (1, 0, END_OF_SPAN)
    assert (saved.page_bytes, saved.elapsed_ps) == (4104, 1_000_000)
    assert b.memory.stale_pages() == b.ram.dirty_pages == 0

    # and the next store is noticed again
    b.vcpu.run([("w", GFN << 12, 44)])
    assert marked == [GFN, GFN] and b.block.stale.get(GFN)
    b.vm.close()


def _note(thing: Any, name: str, order: list[str]) -> None:
    step = getattr(thing, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        order.append(name)
        return step(*args, **kwargs)

    setattr(thing, name, noted)


def test_the_search_gives_up_once_it_has_been_round_all_of_ram() -> None:
    b = Bench()
    b.ram.costs = replace(COSTS, word_ps=7)
    assert b.ram.save(NO_LIMITS).elapsed_ps == 7, "nothing is dirty, and one word says so"
    b.vcpu.run([("w", GFN << 12, 1)])
    b.ram.sync()
    assert b.ram.save(NO_LIMITS).elapsed_ps >= 1_000_000 + 2 * 7, "found in a word, and round again behind it"
    b.vm.close()
