"""A guest whose vCPUs log into dirty rings, page by page: what QEMU's reaper sees of each of them.

QEMU reaps all rings once a second from its own thread, whenever a vCPU leaves the guest with its ring full, and at a
sync (QEMU 10.0 accel/kvm/kvm-all.c: kvm_dirty_ring_reaper_thread, kvm_dirty_ring_reap). Reaping re-arms: a page that
is written again after it is logged, and counted, again. Each page has one vCPU that writes it, so that a stream's
entries spread evenly over the vCPUs that run it.
"""

from __future__ import annotations

from typing import Any

from migsim.guest.memory import RamBlock
from migsim.kvm.ioctl import KVM_EXIT_DIRTY_RING_FULL, enable_dirty_ring
from migsim.kvm.vcpu import Vcpu
from migsim.sim.prng import stream_key
from migsim.units import NS_PER_MS, NS_PER_S, PAGE_SHIFT
from migsim.world import World

__all__ = ["REAPER_NS", "RingGuest"]

REAPER_NS = NS_PER_S  # the reaper thread sleeps so long between two reaps
REAPER_STREAM = 13  # of randomness: where in its second the reaper stands
STEPS_PER_RING = 8  # writes are drawn so often while a ring fills: inside a step a page counts once
STEP_NS = 125 * NS_PER_MS


class RingGuest(World):
    """A World with rings of `kvm.dirty-ring-size` entries. `dirty_pages[vcpu]`: entries reaped so far (CPUState's)."""

    def __init__(self, *arguments: Any, bulk: bool) -> None:
        super().__init__(*arguments, bulk=bulk)
        self.vm.observer = None  # writes are drawn step by step here, never in the middle of a reset
        self.dirty_pages = [0] * len(self.vcpus)
        self.reaps = self.full_exits = 0
        seed = arguments[2]
        self.next_reap_ns = stream_key(seed, REAPER_STREAM) % REAPER_NS
        self._writers = [
            (stream.first, stream.end, config.vcpus or 1) for config, stream, _ in self._streams_in_force()
        ]

    def _set_capabilities(self) -> None:
        """The ring, and then no manual protection (QEMU enables either)."""
        enable_dirty_ring(self.vm, self.scenario.kvm.dirty_ring_size)

    def start(self, now_ns: int) -> None:
        """What was written before is nobody's concern: every page is clean, as after a first look."""
        self.run_until(now_ns)
        self.workload.seen[:, :] = self.workload.clock
        for block in self.memory.blocks:
            block.stale.clear_all()
        while self.next_reap_ns <= now_ns:
            self.next_reap_ns += REAPER_NS

    def run_and_reap(self, end_ns: int) -> None:
        """The guest runs until `end_ns`; the reaper and full rings reap meanwhile, and a sync at the end."""
        while self.workload.now_ns < end_ns:
            until = min(end_ns, self.next_reap_ns, self.workload.now_ns + self._step_ns())
            self.run_until(until)
            self.catch_up()
            if until == self.next_reap_ns:
                self.reap()
                self.next_reap_ns += REAPER_NS
        self.reap()

    def reap(self) -> None:
        """kvm_dirty_ring_reap: every vCPU out of the guest, its entries collected, all of them re-armed at once."""
        self.reaps += 1
        for vcpu in self.vcpus:
            vcpu.kick()
            self.dirty_pages[vcpu.id] += len(vcpu.ring.harvest())
        self.vm.reset_dirty_rings()

    def _step_ns(self) -> int:
        """An eighth of the time the busiest vCPU takes to fill its ring, if that is shorter than the usual step."""
        busiest = max((rate / (config.vcpus or 1) for config, _, rate in self._streams_in_force()), default=0.0)
        if not busiest:
            return STEP_NS
        fills_ns = self.scenario.kvm.dirty_ring_size / busiest * NS_PER_S
        return max(1, min(STEP_NS, int(fills_ns / STEPS_PER_RING)))

    def _write(self, block: RamBlock, page: int) -> None:
        """A store by the page's vCPU, which leaves for user space when its ring is full and then comes back."""
        slot, first = self._slot_of(block, page)
        gfn = slot.base_gfn + page - first
        vcpu = self._writer(block.first_page + page)
        while vcpu.run([("w", gfn << PAGE_SHIFT, 1)]).reason == KVM_EXIT_DIRTY_RING_FULL:
            self.full_exits += 1
            self.reap()

    def _slot_of(self, block: RamBlock, page: int) -> Any:
        for where, slot_id in zip(block.slots, self.slot_ids[self.memory.blocks.index(block)], strict=True):
            if where.first <= page < where.first + where.pages:
                return self._by_slot[slot_id].slot, where.first
        raise AssertionError(f"page {page} of {block.idstr} is in no slot")

    def _writer(self, guest_page: int) -> Vcpu:
        """Of the first stream that writes there."""
        vcpus = next((n for first, end, n in self._writers if first <= guest_page < end), 1)
        return self.vcpus[guest_page % vcpus]
