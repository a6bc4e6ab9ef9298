"""Run one scenario: source VM, QEMU's loop, link and ground truth, from the migrate command to the verdict.

`run` is the whole of it. Guests that the fused loops can serve go through them; `page_at_a_time` takes the readable
path (every store through a vCPU, every bitmap through an ioctl) with the same result, byte for byte, and is what the
fault wrappers of validate/ take apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict

from msgspec import structs

from migsim import dirty_rate
from migsim.fused import FusedRam
from migsim.host_costs import HostCosts
from migsim.kvm.vm import TraceSink
from migsim.meters import Meters, RoundRow
from migsim.migration.background_snapshot import SnapshotRam
from migsim.migration.events import both_sides
from migsim.migration.marked import between
from migsim.migration.precopy import Interrupted, Knobs, Limits, Precopy, RoundLog
from migsim.migration.ram import PS_PER_NS, Ram
from migsim.qemu_costs import QemuCosts
from migsim.qemu_options import loop_options, wire_ram
from migsim.quantities import in_words
from migsim.result import DirtyRate, DowntimePart, Progress, Result, Round
from migsim.scenario import Scenario, ScenarioError
from migsim.sides import destination_told, file_told, host_memory, kvm_told
from migsim.snapshot import snapshot_of, snapshot_ram, verified
from migsim.units import CHUNK_PAGES, GIB, NS_PER_S, PAGE_SIZE, chunks_of
from migsim.verdict import verdict_of
from migsim.watch import Watch
from migsim.world import World, link_bytes_per_s

THREADS_MAX = 2  # more do not help: dense passes run at memory speed
BASE_BYTES = 350 << 20  # interpreter, numpy, numba and the compiled kernels
PLANES = 6  # log, W or D, last GET, bmap, stale, and one more for guests with huge pages write-protected
PROGRESS_NS = NS_PER_S
PAGED_MAX = 64 * GIB  # half a minute; the time goes with the size
TRACED_MAX = 2 * GIB

ABOUT = {
    "stop": "vm_stop: every vCPU kicked and waited for",
    "pre-switchover": "the client holds the migration there",
    "final-sync": "KVM's log of every slot copied and merged",
    "suspended": "the guest was stopped before, and the migration went on",
    "clear": "KVM_CLEAR_DIRTY_LOG of each chunk before its first page, with no vCPU running",
    "wire": "pages dirty at the stop, as fast as the link or storage takes them",
    "device": "device state saved, sent and loaded",
    "vfio": "state of VFIO devices that only a stopped one gives",
    "flush": "last bytes on the way",
    "load": "the destination loads device state; in QEMU's own downtime only with a return path",
    "resume": "the destination's vCPUs start; in QEMU's own downtime only with a return path",
    "return-path": "the destination's end of the return path reaches the source",
    "protect": "every page write-protected for the snapshot (userfaultfd)",
    "discard": "pages still dirty named to the destination",
}

Fault = Callable[[World, Ram], None]


def memory_needed(scenario: Scenario) -> int:
    """Bytes this process will take at the peak for a scenario; nothing is allocated to find out."""
    pages = scenario.guest.pages
    streams = 64 * max(1, len(scenario.guest.workload))
    return BASE_BYTES + PLANES * pages // 8 + chunks_of(pages) * (4096 + 8 * streams)


def fused_serves(scenario: Scenario) -> bool:
    """Can the fused loops run this guest? They need the bitmap log and slots that start on a chunk of their block."""
    from migsim.guest.memory import layout

    guest = scenario.guest
    blocks = layout(guest.memory, guest.numa_nodes, guest.machine)
    return not scenario.kvm.dirty_ring_size and all(
        where.first % CHUNK_PAGES == 0 and where.gfn % 512 == 0 for _, _, slots in blocks for where in slots
    )


def refuse_page_at_a_time(scenario: Scenario, *, traced: bool) -> None:
    """Raises ScenarioError if the page-at-a-time path would take hours for a guest of this size."""
    most = TRACED_MAX if traced else PAGED_MAX
    if scenario.guest.memory > most:
        why = "tracepoints are followed page by page" if traced else "a guest with dirty rings goes page by page"
        if not traced and not scenario.kvm.dirty_ring_size:
            why = "memslots that begin inside a GiB go page by page"
        raise ScenarioError("guest.memory", f"{why}, for guests up to {in_words(most, 'size')}")


def run(
    scenario: Scenario,
    *,
    seed: int = 0,
    threads: int | None = None,
    verify: bool = True,
    progress: Callable[[Progress], None] | None = None,
    page_at_a_time: bool = False,
    fault: Fault | None = None,
    trace: TraceSink | None = None,
) -> Result:
    """Migrate the guest of `scenario`; the same result for the same seed, whatever `threads`.

    `fault(world, ram)` may replace steps of either before the migration starts (validate.faults does). A Ctrl-C ends
    the run with `interrupted` set and the rounds so far. `trace(name, fields)` sees KVM's tracepoints from migrate on,
    page by page (kvm.trace.JsonLines writes them). Raises ScenarioError for what a scenario cannot ask for.
    """
    bulk = fused_serves(scenario) and not page_at_a_time and trace is None
    if not bulk and not page_at_a_time:
        refuse_page_at_a_time(scenario, traced=trace is not None)
    rates = dirty_rate.measure(scenario, seed, fused=bulk) if scenario.calc_dirty_rate else ()
    host = HostCosts(scenario)
    costs = QemuCosts(scenario, host.priced())
    world = World(scenario, costs, seed, bulk=bulk)
    loop: Precopy

    def tick(elapsed_ps: int) -> None:
        world.run_within(now() + elapsed_ps // PS_PER_NS)

    def now() -> int:
        return loop.now_ns + ram.spent_ps // PS_PER_NS

    lazy = scenario.kvm.lazy_clear
    speed = link_bytes_per_s(scenario, 0)
    page = costs.save(speed, first_pass=True)
    ram = Ram(world.memory, world.vm, world.slot_ids, page, lazy, tick, with_bitmaps=not bulk)
    if bulk:
        count = threads or min(THREADS_MAX, os.cpu_count() or 1)
        ram = FusedRam(ram, world.kvm_slots, world.workload, now, count, verify)
    if fault is not None:
        fault(world, ram)
    world.vm.trace_sink = trace
    watch = Watch(world.vm) if verify else None
    meters = host.meters(world.workload, ram, world.meter.totals)
    leaves = world.vm.mmu.root_of(world.vcpus[0]).leaf
    ram.leaves_in = lambda slot_id, first, pages: between(leaves[slot_id].present, first, first + pages)
    world.before_stop_or_resume, world.pages_asked_for = meters.stop_or_resume, meters.pages_asked_for
    snapshot = snapshot_ram(scenario, ram, world, costs) if scenario.migration.is_snapshot else None
    carried = snapshot or wire_ram(scenario, ram, world, costs)
    loop = Precopy(
        carried, world, _knobs(scenario), costs.loop(), _limits(scenario),
        lambda now: link_bytes_per_s(scenario, now),
        progress=_Reporter(progress, scenario, ram, costs, world, meters, watch), **loop_options(scenario, seed, costs),
    )  # fmt: skip
    if snapshot is not None:
        loop.snapshot = snapshot_of(scenario, snapshot, costs)
    interrupted = False
    try:
        loop.run()
    except (KeyboardInterrupt, Interrupted):
        interrupted = True
    if watch is not None and not interrupted:
        watch.at_the_end()
    meters.finish(loop.now_ns, loop.rounds)
    result = _result(scenario, seed, world, ram, loop, costs, verify, interrupted, host, meters)
    return structs.replace(result, dirty_rate=rates) if rates else result


def calc_dirty_rate(scenario: Scenario, *, seed: int = 0) -> tuple[DirtyRate, ...]:
    """What every [[calc-dirty-rate]] of `scenario` answers, in order, without migrating. Raises ScenarioError."""
    bulk = fused_serves(scenario)
    if not bulk:
        refuse_page_at_a_time(scenario, traced=False)
    return dirty_rate.measure(scenario, seed, fused=bulk)


class _Reporter:
    """Called between two windows: the link's phases, the guest's pace, and how far the run is."""

    def __init__(
        self, progress: Callable[[Progress], None] | None, scenario: Scenario, ram: Ram, costs: QemuCosts,
        world: World, meters: Meters, watch: Watch | None,
    ) -> None:  # fmt: skip
        self.progress, self.scenario, self.ram, self.costs = progress, scenario, ram, costs
        self.world, self.meters, self.watch = world, meters, watch
        self.next_ns, self.first_pass = 0, not scenario.host.destination_prealloc
        self.closed: list[Round] = []  # rounds that are over: a run that hovers has tens of thousands

    def __call__(self, loop: Precopy) -> None:
        if self.watch is not None:
            self.watch.between_windows(loop.stats.dirty_sync_count, loop.now_ns)
        if loop.status == "postcopy-active":
            resumed_ns = next(at for at, name, _ in reversed(loop.events) if name == "RESUME")
            self.meters.postcopy(loop.now_ns, resumed_ns, loop.ram.dirty_pages)
        slowdown = self.meters.window(loop.now_ns, loop.rounds)
        if slowdown is not None:
            self.world.workload.set_pace(self.world.workload.duty, slowdown)
        self._price_pages(loop)
        if self.progress is None or loop.now_ns < self.next_ns:
            return
        self.next_ns = loop.now_ns + PROGRESS_NS
        self.progress(
            Progress(
                now_ns=loop.now_ns, phase=loop.status, sync=loop.stats.dirty_sync_count,
                remaining_bytes=loop.ram.dirty_pages * PAGE_SIZE, total_bytes=loop.ram.total_bytes,
                rounds=self._rounds(loop), time_limit_ns=loop.limits.time_ns,
                downtime_limit_ms=loop.knobs.downtime_limit_ms,
            )
        )  # fmt: skip

    def _rounds(self, loop: Precopy) -> tuple[Round, ...]:
        """Those so far, of which the last may still be going on."""
        self.closed += map(_round, loop.rounds[len(self.closed) : -1])
        return *self.closed, *map(_round, loop.rounds[-1:])

    def _price_pages(self, loop: Precopy) -> None:
        """The link's share of the moment; and once every page has been sent, the destination has memory for each."""
        sent = loop.stats.normal_pages + loop.stats.zero_pages
        first_pass = self.first_pass and sent * PAGE_SIZE < loop.ram.total_bytes
        if self.scenario.link.phases or first_pass != self.first_pass:
            self.ram.costs = self.costs.save(link_bytes_per_s(self.scenario, loop.now_ns), first_pass=first_pass)
        self.first_pass = first_pass


def _knobs(scenario: Scenario) -> Knobs:
    m = scenario.migration
    return Knobs(
        max_bandwidth=m.max_bandwidth, downtime_limit_ms=m.downtime_limit,
        avail_switchover_bandwidth=m.avail_switchover_bandwidth, max_postcopy_bandwidth=m.max_postcopy_bandwidth,
        pause_before_switchover="pause-before-switchover" in m.capabilities, compat=m.compat,
        stop_first=m.mode == "cpr-reboot",
    )  # fmt: skip


def _limits(scenario: Scenario) -> Limits:
    m = scenario.migration
    return Limits(m.time_limit, m.round_limit, m.cancel_after, m.switchover_pause)


def _round(row: RoundLog) -> Round:
    return Round(
        sync=row.sync, start_ns=row.start_ns, duration_ns=row.duration_ns, dirty_pages=row.dirty_pages,
        new_dirty_pages=row.new_dirty_pages, sent_pages=row.sent_pages, zero_pages=row.zero_pages,
        transferred_bytes=row.transferred_bytes,
        bandwidth=row.transferred_bytes * NS_PER_S / row.duration_ns if row.duration_ns else 0.0,
        threshold_bytes=row.threshold_bytes, expected_downtime_ms=row.expected_downtime_ms,
        cpu_throttle_percentage=row.cpu_throttle_percentage, stopped=row.stopped,
    )  # fmt: skip


def _costed(row: Round, cost: RoundRow, costs: QemuCosts, pages: int) -> Round:
    """The round with what it cost; the migration thread's own work on top of KVM's (multifd's channels are others)."""
    page, zero = ("qemu_page_multifd",) * 2 if costs.multifd else ("qemu_page", "qemu_zero_page")
    own = row.sent_pages * costs.ns(page) + row.zero_pages * costs.ns(zero)
    own += costs.ns("qemu_sync") + pages * costs.ns("qemu_sync_page")
    thread = cost.migration_thread_cpu_ns + round(own)
    return structs.replace(row, **{**asdict(cost), "migration_thread_cpu_ns": thread})


def _result(
    scenario: Scenario, seed: int, world: World, ram: Ram, loop: Precopy, costs: QemuCosts, verify: bool,
    interrupted: bool, host: HostCosts, meters: Meters,
) -> Result:  # fmt: skip
    converged = loop.status == "completed"
    rounds = tuple(_costed(_round(row), meters.row(row.sync), costs, world.memory.pages) for row in loop.rounds)
    parts = tuple(DowntimePart(name=name, duration_ns=ns, about=ABOUT[name]) for name, ns in loop.parts)
    snapshot = loop.ram if isinstance(loop.ram, SnapshotRam) else None
    checked = (verified(snapshot, converged) if snapshot else _verify(world, ram, converged)) if verify else {}
    migration = loop.stats.reply(loop.status, loop.ram.dirty_pages)
    return Result(
        verdict=verdict_of(scenario, loop, rounds, parts, checked, interrupted),
        converged=converged and not interrupted,
        interrupted=interrupted,
        scenario=scenario,
        seed=seed,
        migration=migration,
        rounds=rounds,
        downtime=parts if converged else (),
        events=both_sides(loop.events, scenario.migration.capabilities),
        kvm=kvm_told(world),
        host={
            "profile": host.profile.name,
            **meters.totals(),
            "assumed-ns": costs.assumed_costs(),
            "not-modelled": scenario.migration.not_modelled(),
            "clear-calls": ram.clear_calls,
            "rearmed-pages": ram.rearmed_pages + ram.harvested_pages,
            "memory": host_memory(world),
            **({"snapshot": snapshot.told()} if snapshot else {}),
        },
        verify=checked,
        vcpu_dirty_limit=tuple(loop.limited),
        destination=destination_told(scenario, meters) if converged else {},
        file=file_told(loop, costs) if converged and scenario.migration.to_file else {},
    )


def _verify(world: World, ram: Ram, converged: bool) -> dict[str, object]:
    """The ground truth's counts. After completion every page must equal the destination's."""
    lost, first = ram.lost() if isinstance(ram, FusedRam) else (0, -1)
    if converged:
        (ram if isinstance(ram, FusedRam) else world).catch_up()
        lost = max(lost, world.memory.stale_pages())
    bits = ram.bits_verified if isinstance(ram, FusedRam) else 0
    out: dict[str, object] = {
        "lost-pages": lost,
        "pages-checked": world.memory.pages,
        "bits-verified": bits + world.memory.pages,
    }
    if lost:
        out["first-lost-pages"] = _name_lost(world, first)
    return out


def _name_lost(world: World, first: int, most: int = 8) -> list[str]:
    """Some lost pages by block and page (and gfn), for the report."""
    names: list[str] = []
    for block in world.memory.blocks:
        for chunk in range(block.chunks):
            block.stale.settle(chunk)
            words = block.stale.words[block.stale.chunk_words(chunk)]
            for word in words.nonzero()[0]:
                bits = int(words[word])
                page = chunk * CHUNK_PAGES + (int(word) << 6) + (bits & -bits).bit_length() - 1
                gfn = next((s.gfn + page - s.first for s in block.slots if s.first <= page < s.first + s.pages), -1)
                names.append(f"{block.idstr} page {page} (gfn {gfn:#x})")
                if len(names) == most:
                    return names
    return names or [f"guest page {first}"]


assert GIB == CHUNK_PAGES * PAGE_SIZE
