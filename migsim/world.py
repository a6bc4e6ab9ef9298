"""The source VM of a scenario: guest memory, KVM's VM with its slots mapped, the workload, and time between them.

Where the two sides meet. `World` is the Machine of migration.precopy; it owns the clock's consequences: when time
passes, write clocks advance; when somebody looks, the guest's writes are drawn and happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from migsim.guest.catch_up import draw_hits
from migsim.guest.memory import GuestMemory, RamBlock, layout
from migsim.guest.workload import SEQUENTIAL, UNIFORM, Phase, Stream, Workload, hot_cold, zipf
from migsim.kvm.bulk_slot import BulkSlot
from migsim.kvm.config import VmConfig
from migsim.kvm.ioctl import (
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_MEM_LOG_DIRTY_PAGES,
)
from migsim.kvm.memslot import Memslot
from migsim.kvm.populate import populate
from migsim.kvm.vcpu import Vcpu
from migsim.kvm.vm import Vm
from migsim.migration.policies.auto_converge import ThrottleTimer, cycle_of
from migsim.migration.policies.dirty_limit import throttled_rate
from migsim.migration.policies.protocol import VcpuDirtyRate
from migsim.migration.zero_pages import rule_of
from migsim.planes import new_summary
from migsim.qemu_costs import QemuCosts
from migsim.scenario import Guest, Scenario
from migsim.scenario import Workload as WorkloadConfig
from migsim.scenario.host import Storage
from migsim.sim.meter import CountingMeter
from migsim.sim.prng import stream_key
from migsim.units import CHUNK_PAGES, CHUNK_WORDS, NS_PER_S, PAGE_SHIFT, PAGE_SIZE

MANUAL_PROTECT = {"off": 0, "enable": 1, "initially-set": 3}
LEVELS = {"4K": 1, "2M": 2, "1G": 3}
MAXPHYADDR = 52  # a host that can hold the guest; TDP of 5 levels
NEVER_NS = 1 << 62
NEVER_PAGE = 1 << 50  # beyond any guest


def rom_data(guest: Guest) -> list[tuple[int, int]]:
    """Guest pages of the ROM blocks that are not zero; the blocks lie behind RAM in the order of the scenario."""
    out, base = [], guest.pages
    for rom in guest.rom:
        out += [(base + e.offset // PAGE_SIZE, base + (e.offset + e.size) // PAGE_SIZE) for e in rom.data]
        base += rom.size // PAGE_SIZE
    return out


def streams_of(config: WorkloadConfig) -> list[Stream]:
    """The write streams of one [[guest.workload]]; phases carry start, stop and rate factors."""
    if config.pattern == "idle":
        return []
    assert isinstance(config.working_set, int) and config.offset is not None, "resolved by the scenario"
    first, pages = config.offset // PAGE_SIZE, config.working_set // PAGE_SIZE
    end, rate = first + pages, float(config.pages_per_s)
    if config.pattern == "hot-cold":
        plain = hot_cold(first, end, rate, config.hot_pages, config.hot_writes)
    elif config.pattern == "zipf":
        plain = zipf(first, end, rate, config.theta)
    else:
        plain = [Stream(SEQUENTIAL if config.pattern == "sequential" else UNIFORM, first, end, rate)]
    phases = _phases(config)
    return [Stream(s.law, s.first, s.end, s.pages_per_s, phases) for s in plain]


def _phases(config: WorkloadConfig) -> tuple[Phase, ...]:
    changes = {0: 1.0} | {phase.at: phase.rate_factor for phase in config.phases}
    at_start = [factor for at, factor in sorted(changes.items()) if at <= config.start][-1]
    out = {at: factor for at, factor in changes.items() if at >= config.start and (config.stop or NEVER_NS) > at}
    if config.start:
        out |= {0: 0.0, config.start: out.get(config.start, at_start)}
    if config.stop is not None:
        out[config.stop] = 0.0
    return tuple(Phase(at, factor) for at, factor in sorted(out.items()) if (at, factor) != (0, 1.0))


@dataclass
class SlotOf:
    """One memslot and the block pages behind it."""

    slot: Memslot
    block: RamBlock
    first: int  # page of the block


class World:
    """Built from a scenario. `bulk`: the guest's writes reach KVM through the fused loops, not one by one."""

    def __init__(self, scenario: Scenario, costs: QemuCosts, seed: int, *, bulk: bool) -> None:
        guest, kvm = scenario.guest, scenario.kvm
        self.scenario, self.costs, self.bulk = scenario, costs, bulk
        self.memory = GuestMemory(
            [
                *layout(guest.memory, guest.numa_nodes, guest.machine),
                *((rom.name, rom.size // PAGE_SIZE, ()) for rom in guest.rom),
            ],
            guest.data_pages + rom_data(guest) if self._looks_for_zero_pages() else [(0, NEVER_PAGE)],
        )
        self.meter = CountingMeter()
        config = VmConfig(
            vendor=kvm.vendor, mmu=kvm.mmu, pml=kvm.pml, smm=False,
            eager_page_split=kvm.eager_page_split, nx_huge_pages=kvm.nx_huge_pages, maxphyaddr=MAXPHYADDR,
        )  # fmt: skip
        self.vm = Vm(config, bulk=bulk, meter=self.meter)
        self.slots: list[SlotOf] = []
        self.slot_ids: list[list[int]] = []
        if kvm.accel == "kvm":  # TCG resets its tracking at the sync, as KVM's GET does without manual protection
            self._set_capabilities()
        self.vcpus: list[Vcpu] = [self.vm.create_vcpu(i) for i in range(guest.vcpus)]
        self._map_memory()
        streams = [self._paced(stream, config) for config in guest.workload for stream in streams_of(config)]
        self.workload = Workload(streams, self.memory.chunks, stream_key(seed))
        self._start_streams()
        self.throttle = ThrottleTimer()
        # Who keeps the costs: told the time before either, and asked for what faults of post-copy fetched.
        self.before_stop_or_resume: Callable[[int], None] = lambda now_ns: None
        self.pages_asked_for: Callable[[], int] = lambda: 0
        self._buffers = np.zeros((2, CHUNK_WORDS), dtype=np.uint64)
        self._summary = new_summary(CHUNK_PAGES)
        self._by_slot = {of.slot.id: of for of in self.slots}
        if not bulk:
            self.vm.observer = self._observe
            self.vm.store_hook = self._stored

    def _looks_for_zero_pages(self) -> bool:
        """With zero-page-detection=none every page goes out whole, as one with data does."""
        m = self.scenario.migration
        return rule_of(m.zero_page_detection, m.capabilities, m.compat).looked_for

    def _paced(self, stream: Stream, config: WorkloadConfig) -> Stream:
        """What the accelerator makes of a stream: its speed limit, and under TCG what syncs and TLB resets take."""
        tcg = self.scenario.kvm.accel == "tcg"
        if tcg and not (config.catch_up and config.catch_up_limit is None):
            stream = replace(stream, pages_per_s=stream.pages_per_s * (1.0 - self.costs.ns("qemu_tcg_slowdown")))
        if not config.catch_up or not stream.pages_per_s:
            return stream
        write_ns = self.costs.ns("qemu_tcg_write" if tcg else "qemu_kvm_write")
        fastest = NS_PER_S / write_ns * (config.vcpus or 1)
        most_ns = NEVER_NS if config.catch_up_limit is None else config.catch_up_limit
        return replace(stream, headroom=max(1.0, fastest / stream.pages_per_s), made_up_ns=most_ns)

    def _start_streams(self) -> None:
        """A sweep that was under way before migrate starts where it stood; other laws have no memory."""
        at = 0
        for config in self.scenario.guest.workload:
            for stream in streams_of(config):
                swept = stream.pages_per_s * config.running / NS_PER_S
                self.workload.clock[at] = swept
                self.workload.seen[:, at] = swept
                at += 1

    def _set_capabilities(self) -> None:
        protect = MANUAL_PROTECT[self.scenario.kvm.manual_dirty_log_protect]
        if protect:
            self.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(protect, 0, 0, 0))

    def _map_memory(self) -> None:
        guest, slot_id = self.scenario.guest, 0
        root = [self.vm.mmu.root_of(vcpu) for vcpu in self.vcpus][0]  # all have run: each holds the one root
        for block in self.memory.blocks:
            hva = self.vm.alloc_memory(block.pages << PAGE_SHIFT, LEVELS[guest.backing])
            ids = []
            for where in block.slots:
                address = hva + (where.first << PAGE_SHIFT)
                self.vm.set_user_memory_region(slot_id, 0, where.gfn << PAGE_SHIFT, where.pages << PAGE_SHIFT, address)
                slot = self.vm.memslots(0).by_id(slot_id)
                assert slot is not None
                self.slots.append(SlotOf(slot, block, where.first))
                touched = min(where.pages, max(0, guest.populated_pages - block.first_page - where.first))
                if touched:
                    populate(self.vm.mmu.state, root, slot, 0, touched)
                ids.append(slot_id)
                slot_id += 1
            self.slot_ids.append(ids)

    def kvm_slots(self) -> list[list[BulkSlot]]:
        """The bulk form of every memslot, by block; after logging has started."""
        root = self.vm.mmu.root_of(self.vcpus[0])
        return [
            [BulkSlot(self.vm, self.vm.mmu.state, root, self._by_slot[i].slot) for i in ids] for ids in self.slot_ids
        ]

    # -- Machine (migration.precopy) ---------------------------------------------------------------------------------

    def log_start(self) -> int:
        """KVM_MEM_LOG_DIRTY_PAGES on every slot."""
        for of in self.slots:
            self._set_flags(of.slot, KVM_MEM_LOG_DIRTY_PAGES)
        return round(self.costs.ns("qemu_setup"))

    def log_stop(self) -> None:
        """Logging off, if the guest runs on here; else it waits until it does (memory_global_dirty_log_stop)."""
        if self.workload.duty:
            for of in self.slots:
                self._set_flags(self._current(of), 0)

    def _current(self, of: SlotOf) -> Memslot:
        slot = self.vm.memslots(0).by_id(of.slot.id)
        assert slot is not None
        return slot

    def _set_flags(self, slot: Memslot, flags: int) -> None:
        self.vm.set_user_memory_region(
            slot.key, flags, slot.base_gfn << PAGE_SHIFT, slot.npages << PAGE_SHIFT, slot.userspace_addr
        )
        of = self._by_slot[slot.id]
        of.slot = self._current(of)

    def run_until(self, now_ns: int) -> None:
        """The guest has run until now."""
        self.workload.settle(now_ns)

    def run_within(self, now_ns: int) -> None:
        """The same for a moment inside a call of the loop, at the mean rate: bursts are settled between calls."""
        self.workload.advance(now_ns)

    def stop(self) -> int:
        """vm_stop: no write happens from here on."""
        self.before_stop_or_resume(self.workload.now_ns)
        self.workload.set_pace(0.0, 1.0)
        return self.costs.stop_ns()

    def resume(self) -> None:
        """The guest runs again."""
        self.before_stop_or_resume(self.workload.now_ns)
        self.workload.set_pace(1.0, 1.0)

    def set_throttle(self, percentage: int) -> None:
        """cpu-throttle-percentage: a timer puts every vCPU to sleep, all at once, and lets it run in between."""
        if not percentage:
            self.throttle = ThrottleTimer()
            self.workload.set_bursts(None)
            self.workload.set_pace(1.0, self.workload.slowdown)
            return
        wake_ns, late_ns = round(self.costs.ns("qemu_throttle_wake")), self.costs.throttle_tick_delay_ns(percentage)
        cycle = cycle_of(percentage, self.workload.now_ns, wake_ns=wake_ns, tick_delay_ns=late_ns)
        self.throttle.follow(cycle)
        self.workload.set_bursts(self.throttle.run_ns, cycle.sleep_ns)
        self.workload.set_pace(1.0 - cycle.sleep_ns / cycle.period_ns, self.workload.slowdown)

    def sync_wait_ns(self) -> int:
        """TCG's sync runs a no-op on every vCPU after it (tcg_log_global_after_sync), which a sleep holds up.

        The vCPU that wakes keeps the CPU until the host's scheduler gives it to the thread that waited.
        """
        left_ns = self.throttle.sleeps_for_ns(self.workload.now_ns) if self.scenario.kvm.accel == "tcg" else 0
        return left_ns + round(self.costs.ns("qemu_sync_handover")) if left_ns else 0

    def vcpu_dirty_rates(self) -> list[VcpuDirtyRate]:
        """What the dirty rings count for each vCPU: first writes to pages between two reaps, a second apart."""
        rates = np.zeros(len(self.vcpus))
        for config, stream, rate in self._streams_in_force():
            pages = (stream.end - stream.first) * -np.expm1(-rate / (stream.end - stream.first))
            rates[: config.vcpus or 1] += pages / (config.vcpus or 1)
        return [VcpuDirtyRate(vcpu, int(pages) * PAGE_SIZE >> 20) for vcpu, pages in enumerate(rates)]

    def set_vcpu_sleeps(self, sleeps_us: list[int]) -> None:
        """dirty-limit: a vCPU sleeps so long at each full ring; streams of many vCPUs slow down by their mean."""
        ring, shares = self.scenario.kvm.dirty_ring_size, np.ones(len(self.workload.streams))
        for at, (config, stream, _) in enumerate(self._streams_in_force()):
            each = stream.pages_per_s / (config.vcpus or 1)
            if each:
                slowed = [throttled_rate(each, ring, us) / each for us in sleeps_us[: config.vcpus or 1]]
                shares[at] = sum(slowed) / len(slowed)
        self.workload.set_shares(shares)

    def _streams_in_force(self) -> Iterator[tuple[WorkloadConfig, Stream, float]]:
        """(config, stream, writes a second now) of every stream."""
        rates = iter(zip(self.workload.streams, self.workload.rate * NS_PER_S, strict=True))
        for config in self.scenario.guest.workload:
            for _ in streams_of(config):
                stream, rate = next(rates)
                yield config, stream, float(rate)

    def written(self) -> list[tuple[int, int]]:
        """Where the guest writes."""
        return self.workload.ranges()

    def missing_page_requests(self) -> int:
        """Post-copy: what the destination's faults asked for."""
        return self.pages_asked_for()

    # -- writes one by one: the readable form of fused_kernels.catch_up_chunk ----------------------------------------

    def catch_up(self) -> None:
        """Let every write the guest has made happen: the oracle is an observer too."""
        for of in self.slots:
            self._observe(of.slot, 0, of.slot.npages)

    def _observe(self, slot: Memslot, first: int, pages: int) -> None:
        of = self._by_slot[slot.id]
        for chunk in range((of.first + first) // CHUNK_PAGES, (of.first + first + pages - 1) // CHUNK_PAGES + 1):
            self._catch_up(of, chunk)

    def _catch_up(self, of: SlotOf, chunk: int) -> None:
        """Draw what was written to a chunk of the block and let vCPUs store it, page by page."""
        block, w = of.block, self.workload
        unit, base, pages = block.first_chunk + chunk, chunk * CHUNK_PAGES, block.chunk_pages(chunk)
        log = of.slot.dirty_bitmap
        marked = log is not None and of.first % CHUNK_PAGES == 0 and log.full[chunk - of.first // CHUNK_PAGES]
        marked = marked and not self.vm.mmu.state.vintage.protects_huge_at_enable  # and so unprotected
        has_zero = block.zero.full[chunk] or block.zero.words[block.zero.chunk_words(chunk)].any()
        if marked and block.stale.full[chunk] and not has_zero:  # no write can change a thing
            w.seen[unit, :] = w.clock
            return
        hits, scratch = self._buffers
        if not draw_hits(
            hits, self._summary, scratch, block.first_page + base, pages, unit, w.law, w.first, w.end, w.clock,
            w.seen[unit], w.visits, w.seed_key,
        ):  # fmt: skip
            return
        for word in np.flatnonzero(hits[: pages + 63 >> 6]):
            bits, at = int(hits[word]), base + (int(word) << 6)
            while bits:
                low = bits & -bits
                self._write(block, at + low.bit_length() - 1)
                bits ^= low

    def _write(self, block: RamBlock, page: int) -> None:
        for where, slot_id in zip(block.slots, self.slot_ids[self.memory.blocks.index(block)], strict=True):
            if where.first <= page < where.first + where.pages:
                slot = self._by_slot[slot_id].slot
                gfn = slot.base_gfn + page - where.first
                self.vcpus[page % len(self.vcpus)].run([("w", gfn << PAGE_SHIFT, 1)])

    def _stored(self, vcpu: Vcpu, slot: Memslot | None, gfn: int) -> None:
        """The ground truth of a store (guest.memory): set by the write itself."""
        assert slot is not None, f"a store to gfn {gfn:#x}, which is in no slot"
        of = self._by_slot[slot.id]
        self.memory.write(of.block, of.first + gfn - slot.base_gfn)


def link_bytes_per_s(scenario: Scenario, now_ns: int) -> float:
    """The migration's share of the link at a moment, or what its file takes, bytes/s."""
    if scenario.migration.to_file:
        return float((scenario.storage or Storage()).bandwidth)
    share = 1.0
    for phase in scenario.link.phases:
        if phase.at <= now_ns:
            share = phase.share
    return max(1.0, scenario.link.bandwidth * share)


