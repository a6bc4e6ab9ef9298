"""calc-dirty-rate on the emulated guest, while nobody migrates it: QEMU's answer beside what the guest really wrote.

Each measurement has a guest of its own, so none disturbs another or the migration. Page-sampling looks at the guest's
pages and nothing else; dirty-bitmap goes through KVM's log, with what that costs the guest; dirty-ring through every
vCPU's ring (migsim.ring_guest). Steps are those of QEMU 10.0 migration/dirtyrate.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from migsim.fused import FusedRam
from migsim.guest.catch_up import draw_hits
from migsim.guest.memory import RamBlock
from migsim.host_costs import HostCosts
from migsim.migration.dirty_rate import dirty_bitmap_rate, dirty_ring_rates, page_sampling_rate, reply, sampled_pages
from migsim.migration.dirty_rate_commands import SAMPLE_PAGES_DEFAULT, CalcDirtyRate
from migsim.migration.loop_types import RoundLog
from migsim.migration.ram import NO_LIMITS, PS_PER_NS, Ram, SaveCosts
from migsim.planes import new_summary
from migsim.qemu_costs import QemuCosts
from migsim.result import DirtyRate
from migsim.ring_guest import RingGuest
from migsim.scenario import Scenario
from migsim.units import CHUNK_PAGES, CHUNK_WORDS, MIB, NS_PER_MS, NS_PER_S, PAGE_SIZE
from migsim.world import World

__all__ = ["measure"]

PAGES_PER_MIB: Final = MIB // PAGE_SIZE
LOOK_NS: Final = NS_PER_S  # between two looks at the guest's pace


@dataclass
class Found:
    """One measurement's outcome: QEMU's rates, whole MiB/s, and what was true over `elapsed_ns`."""

    rates: int | list[int]
    elapsed_ns: int
    writes: float
    distinct_pages: int
    cost: Mapping[str, Any] = field(default_factory=dict)


def measure(scenario: Scenario, seed: int = 0, *, fused: bool) -> tuple[DirtyRate, ...]:
    """Every [[calc-dirty-rate]] of the scenario, in order. `fused`: the fused loops can run this guest."""
    host = HostCosts(scenario)
    costs = QemuCosts(scenario, host.priced())
    out = []
    for command in scenario.calc_dirty_rate:
        request = command.request()
        if request.mode == "page-sampling":
            found = _page_sampling(World(scenario, costs, seed, bulk=fused), request, command.at, seed)
        elif request.mode == "dirty-bitmap":
            found = _DirtyBitmap(World(scenario, costs, seed, bulk=fused), host).run(request, command.at)
        else:
            found = _dirty_ring(RingGuest(scenario, costs, seed, bulk=False), request, command.at)
        out.append(_told(found, request, command.at, scenario))
    return tuple(out)


def _told(found: Found, request: CalcDirtyRate, at_ns: int, scenario: Scenario) -> DirtyRate:
    elapsed_ms = found.elapsed_ns // NS_PER_MS
    return DirtyRate(
        reply=reply(request, scenario.migration.compat, at_ns // NS_PER_S, found.rates, elapsed_ms),
        at_ns=at_ns, elapsed_ns=found.elapsed_ns,
        write_rate=round(found.writes / PAGES_PER_MIB * NS_PER_S / found.elapsed_ns, 6),
        distinct_rate=round(found.distinct_pages / PAGES_PER_MIB * NS_PER_S / found.elapsed_ns, 6),
        cost=dict(found.cost),
    )  # fmt: skip


# -- page-sampling ---------------------------------------------------------------------------------------------------


def _page_sampling(world: World, request: CalcDirtyRate, at_ns: int, seed: int) -> Found:
    """Hash the sample, wait, hash it again: a page's hash differs where the guest wrote to the page in between.

    A block's samples are hashed as its pass begins; all are exposed equally long, as the second pass takes as long as
    the first. calc-time counts from the first pass' beginning to the second's, and is longer than asked for where
    the first pass alone takes longer.
    """
    w, old = world.workload, world.scenario.migration.compat == "7.2"
    hash_ns = world.costs.ns("qemu_sample_page_crc32" if old else "qemu_sample_page")
    per_gib = request.sample_pages or SAMPLE_PAGES_DEFAULT
    samples = [(b, sampled_pages(b.pages, per_gib, seed, i)) for i, b in enumerate(world.memory.blocks)]
    pass_ns = [round(len(pages) * hash_ns) for _, pages in samples]
    w.advance(at_ns)
    before = w.writes
    for (block, _), takes_ns in zip(samples, pass_ns, strict=True):
        _looked_at(world, block)
        w.advance(w.now_ns + takes_ns)
    elapsed_ns = max(request.calc_time_ms * NS_PER_MS, w.now_ns - at_ns)
    w.advance(at_ns + elapsed_ns)
    writes = w.writes - before
    dirty = distinct = sampled = total_mib = 0
    for (block, pages), takes_ns in zip(samples, pass_ns, strict=True):
        hit, written = _compare(world, block, pages)
        dirty, distinct, sampled = dirty + hit, distinct + written, sampled + len(pages)
        total_mib += block.pages // PAGES_PER_MIB if len(pages) else 0
        w.advance(w.now_ns + takes_ns)
    rate = page_sampling_rate(dirty, sampled, total_mib, elapsed_ns // NS_PER_MS)
    cost = {"sampled-pages": sampled, "hashing-ns": 2 * sum(pass_ns)}
    return Found(rate, elapsed_ns, writes, distinct, cost)


def _looked_at(world: World, block: RamBlock) -> None:
    """What was written until now is in the first hash."""
    chunks = slice(block.first_chunk, block.first_chunk + block.chunks)
    world.workload.seen[chunks, :] = world.workload.clock


def _compare(world: World, block: RamBlock, pages: NDArray[np.int64]) -> tuple[int, int]:
    """(samples written since the first look, pages of the block written since)."""
    ordered, dirty, distinct = np.sort(pages), 0, 0
    edges = np.searchsorted(ordered, np.arange(block.chunks + 1) * CHUNK_PAGES)
    for chunk, hits in _hits(world, block):
        mine = ordered[edges[chunk] : edges[chunk + 1]] - chunk * CHUNK_PAGES
        dirty += int((hits[mine >> 6] >> (mine & 63).astype(np.uint64) & np.uint64(1)).sum())
        distinct += int(np.bitwise_count(hits).sum())
    return dirty, distinct


def _hits(world: World, block: RamBlock) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """(chunk, its pages written since they were last looked at) of every chunk that may have any."""
    w = world.workload
    hits, scratch = np.zeros((2, CHUNK_WORDS), dtype=np.uint64)
    summary = new_summary(CHUNK_PAGES)
    for chunk in range(block.chunks):
        unit, base = block.first_chunk + chunk, block.first_page + chunk * CHUNK_PAGES
        if draw_hits(
            hits, summary, scratch, base, block.chunk_pages(chunk), unit, w.law, w.first, w.end, w.clock, w.seen[unit],
            w.visits, w.seed_key,
        ):  # fmt: skip
            yield chunk, hits


# -- dirty-bitmap ----------------------------------------------------------------------------------------------------


class _DirtyBitmap:
    """Start the log, throw the first sync away, re-arm everything at once, wait, sync, count."""

    def __init__(self, world: World, host: HostCosts) -> None:
        self.world, self.host, self.now_ns = world, host, 0
        costs = world.costs.save(1e18)
        # nothing is sent (1 ps and 1 byte a page: the kernels divide by them), and CLEAR is one call a memslot: its
        # own cost is charged below, its pages' as it goes
        free = SaveCosts(1, 1, 0, 0, costs.clear_page_ps, 1, 1, clear_stopped_ps=0, clear_leaf_ps=costs.clear_leaf_ps)
        lazy = world.scenario.kvm.lazy_clear
        self.ram = Ram(world.memory, world.vm, world.slot_ids, free, lazy, self._tick, with_bitmaps=not world.bulk)
        if world.bulk:
            self.ram = FusedRam(self.ram, world.kvm_slots, world.workload, lambda: self.now_ns, 1, True)
        self.clear_call_ns = round(costs.clear_ps / PS_PER_NS) * len(world.slots) if lazy else 0
        self.sync_ns = world.costs.loop().sync_ns + world.memory.pages * world.costs.loop().sync_page_ps // PS_PER_NS

    def _tick(self, elapsed_ps: int) -> None:
        self.world.run_until(self.now_ns + elapsed_ps // PS_PER_NS)

    def _pass(self, duration_ns: int) -> int:
        self.now_ns += duration_ns
        self.world.run_until(self.now_ns)
        return duration_ns

    def run(self, request: CalcDirtyRate, at_ns: int) -> Found:
        """What QEMU answers to `request`, given at `at_ns`."""
        world = self.world
        self._pass(at_ns)
        cost: dict[str, Any] = {"log-start-ns": self._pass(world.log_start())}
        meters = self.host.meters(world.workload, self.ram, world.meter.totals)
        rounds = [RoundLog(1, at_ns, world.memory.pages, 0)]
        meters.window(self.now_ns, rounds)
        # 1. the first sync may return all ones: nobody counts it
        self.ram.sync()
        cost["sync-ns"] = self._pass(self.sync_ns)
        # 2. dirtyrate_manual_reset_protect, under the BQL. A chunk is exposed from its CLEAR on, before the clock runs
        splits = world.meter.totals.get("huge_page_split", 0)
        saved = self.ram.save(NO_LIMITS)
        splits = world.meter.totals.get("huge_page_split", 0) - splits
        split_ns = round(splits * self.host.clear.table_ns) if self.host.kvm else 0
        cost["reset-ns"] = self._pass(saved.elapsed_ps // PS_PER_NS + self.clear_call_ns + split_ns)
        # 3. wait
        rounds.append(RoundLog(2, self.now_ns, 0, 0))
        before, start_ns = world.workload.writes, self.now_ns
        wanted = self._wait(request.calc_time_ms * NS_PER_MS, lambda: meters.window(self.now_ns, rounds))
        writes = world.workload.writes - before
        # 4. sync, and tracking stops
        pages = self.ram.sync()
        meters.finish(self.now_ns, rounds)
        (self.ram if isinstance(self.ram, FusedRam) else world).catch_up()
        elapsed_ns = self.now_ns - start_ns
        totals = meters.totals()
        cost |= {name: totals[name] for name in ("lock-write-held-ns", "longest-hold-ns", "soft-lockups")}
        cost |= {"guest-throughput-share": round(writes / wanted, 6) if wanted else 1.0, "dirty-pages": pages}
        rate = dirty_bitmap_rate(pages, elapsed_ns // NS_PER_MS)
        return Found(rate, elapsed_ns, writes, world.memory.stale_pages(), cost)

    def _wait(self, duration_ns: int, pace: Callable[[], float | None]) -> float:
        """Let the guest run, as fast as its faults on re-armed pages let it; the page writes it wanted to make."""
        end, wanted, streams = self.now_ns + duration_ns, 0.0, self.world.workload.streams
        while self.now_ns < end:
            slowdown = pace()
            if slowdown is not None:
                self.world.workload.set_pace(1.0, slowdown)
            full = sum(stream.pages_per_s * stream.factor(self.now_ns) for stream in streams)
            wanted += full * self._pass(min(LOOK_NS, end - self.now_ns)) / NS_PER_S
        return wanted


# -- dirty-ring ------------------------------------------------------------------------------------------------------


def _dirty_ring(guest: RingGuest, request: CalcDirtyRate, at_ns: int) -> Found:
    """Start the log, count every vCPU's entries over the time asked for, reap once more, and count again."""
    guest.run_until(at_ns)
    cost: dict[str, Any] = {"log-start-ns": guest.log_start()}
    start_ns = at_ns + int(cost["log-start-ns"])
    guest.start(start_ns)
    before, writes = list(guest.dirty_pages), guest.workload.writes
    guest.run_and_reap(start_ns + request.calc_time_ms * NS_PER_MS)
    writes = guest.workload.writes - writes
    entries = [after - at_start for at_start, after in zip(before, guest.dirty_pages, strict=True)]
    elapsed_ns = guest.workload.now_ns - start_ns
    cost |= {"ring-full-exits": guest.full_exits, "reaps": guest.reaps, "ring-entries": sum(entries)}
    rates = dirty_ring_rates(entries, elapsed_ns // NS_PER_MS)
    return Found(rates, elapsed_ns, writes, guest.memory.stale_pages(), cost)
