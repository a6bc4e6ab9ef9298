"""What a result says beside the migration itself: of the destination, of a file, of KVM, of the host's memory."""

from __future__ import annotations

from migsim.meters import Meters
from migsim.migration import mapped_ram, wire
from migsim.migration.precopy import Precopy
from migsim.qemu_costs import QemuCosts
from migsim.scenario import Scenario
from migsim.units import PAGE_SIZE
from migsim.world import World

__all__ = ["destination_told", "file_told", "host_memory", "kvm_told"]


def destination_told(scenario: Scenario, meters: Meters) -> dict[str, object]:
    """query-migrate at the destination, where it says more than that it is there."""
    if "postcopy-blocktime" not in scenario.migration.capabilities:
        return {}
    writing = max((w.vcpus or 1 for w in scenario.guest.workload if w.pages_per_s), default=0)
    return {"status": "completed"} | meters.blocktime(writing)


def file_told(loop: Precopy, costs: QemuCosts) -> dict[str, object]:
    """What a migration left in its file; `written-bytes` is more where pages were written again."""
    written = loop.stats.transferred
    if not costs.mapped_ram:
        return {"size-bytes": written, "written-bytes": written}
    entry = wire.first_block_entry(costs.machine)
    laid_out = mapped_ram.places(costs.blocks, entry)
    bitmaps = sum(mapped_ram.bitmap_bytes(place.pages) for place in laid_out)
    stream = written - loop.stats.normal_pages * PAGE_SIZE - bitmaps
    return {
        "size-bytes": mapped_ram.file_bytes(laid_out, entry, stream),
        "written-bytes": written,
        "blocks": [
            {"idstr": at.idstr, "bitmap-offset": at.bitmap_offset, "pages-offset": at.pages_offset} for at in laid_out
        ],
    }


def kvm_told(world: World) -> dict[str, object]:
    """KVM's statistics, its tables by level, and the operations counted."""
    root = world.vm.mmu.root_of(world.vcpus[0])
    tables = {f"tables-level-{level}": n for level, n in root.count_tables().items()}
    return {**world.vm.stats_read(), **tables, "operations": dict(world.meter.totals)}


def host_memory(world: World) -> dict[str, int]:
    """Bytes the real host would hold for this: page tables, rmaps, KVM's bitmaps (two halves), QEMU's copies."""
    mmu = world.vm.mmu.memory()
    bitmap = world.memory.pages // 8
    return {
        "page-tables-bytes": mmu["table-bytes"],
        "rmap-bytes": mmu["rmap-bytes"],
        "kvm-dirty-bitmap-bytes": 0 if world.scenario.kvm.dirty_ring_size else 2 * bitmap,
        "kvm-dirty-ring-bytes": world.scenario.kvm.dirty_ring_size * 16 * len(world.vcpus),
        "qemu-bitmap-bytes": 3 * bitmap,  # KVMSlot.dirty_bmap, the RAM list's, RAMBlock.bmap
    }
