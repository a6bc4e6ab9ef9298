"""A scenario's background-snapshot: who writes where, which pages are zero, what saving and protecting them costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from migsim.guest.memory import GuestMemory
from migsim.migration import background_snapshot, marked
from migsim.migration.background_snapshot import PS_PER_S, SnapshotCosts, SnapshotRam
from migsim.migration.precopy import Precopy
from migsim.migration.ram import Ram
from migsim.migration.wire import block_header
from migsim.migration.write_tracking import Segment, TrackedWrites
from migsim.qemu_costs import QemuCosts
from migsim.scenario import BACKING_BYTES, Scenario
from migsim.units import NS_PER_S, PAGE_SIZE
from migsim.world import World, link_bytes_per_s

__all__ = ["snapshot_of", "snapshot_ram", "verified"]

SECTION_BYTES = {"7.2": 8, "10.0": 18}  # as `transferred` counts them


def snapshot_ram(scenario: Scenario, ram: Ram, world: World, costs: QemuCosts) -> SnapshotRam:
    """RAM as the snapshot saves it."""
    host_page = BACKING_BYTES[scenario.guest.backing] // PAGE_SIZE
    writing = [config.vcpus or 1 for config in scenario.guest.workload if config.pages_per_s]
    page = costs.save(link_bytes_per_s(scenario, 0))
    tracked = TrackedWrites(
        segments(world), max(writing, default=1), host_page, page.normal_ps / PS_PER_S, page.zero_ps / PS_PER_S,
        costs.ns("qemu_snapshot_release") / NS_PER_S, costs.ns("qemu_snapshot_fault") / NS_PER_S,
    )  # fmt: skip
    names = sum(block_header(state.block.idstr) for state in ram.blocks)

    def set_slowdown(slowdown: float) -> None:
        world.workload.set_pace(world.workload.duty, slowdown)

    return SnapshotRam(
        ram, tracked, lambda: costs.save(link_bytes_per_s(scenario, world.workload.now_ns)), set_slowdown, names,
        SECTION_BYTES[scenario.migration.compat],
    )  # fmt: skip


def segments(world: World) -> list[Segment]:
    """All pages, cut where a stream or a block begins or ends; rates are those of the workload's beginning."""
    memory, streams = world.memory, world.workload.streams
    cuts = {0, memory.pages} | {block.first_page for block in memory.blocks}
    cuts |= {edge for stream in streams for edge in (stream.first, stream.end)}
    out = []
    for first, end in pairwise(sorted(cuts)):
        rate = sum(
            s.pages_per_s * s.factor(0) * (end - first) / (s.end - s.first)
            for s in streams
            if s.first <= first < s.end
        )
        out.append(Segment(first, end, _zero_pages(memory, first, end), rate))
    return out


def _zero_pages(memory: GuestMemory, first: int, end: int) -> int:
    return sum(marked.between(block.zero, at, at + count) for block, at, count in memory.pieces(first, end))


def snapshot_of(scenario: Scenario, ram: SnapshotRam, costs: QemuCosts) -> Callable[[Precopy], str]:
    """What the migration thread does instead of pre-copy."""
    guest = scenario.guest
    mappings = guest.memory // BACKING_BYTES[guest.backing]
    over_all = SnapshotCosts(
        round(mappings * costs.ns("qemu_snapshot_populate")), round(mappings * costs.ns("qemu_snapshot_protect"))
    )
    return partial(background_snapshot.run, ram=ram, costs=over_all)


def verified(ram: SnapshotRam, converged: bool) -> dict[str, object]:
    """What a complete snapshot leaves over is lost; its pages are counted, not followed, so none is compared."""
    return {"lost-pages": ram.dirty_pages * converged, "pages-checked": 0, "bits-verified": 0}
