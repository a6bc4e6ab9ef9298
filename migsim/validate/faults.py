"""One step of the path of a dirty page switched off, wrapped from outside: what a run must then find out.

Each fault takes one of the four steps that keep a page from being lost and leaves the rest alone. Production code never
asks whether a fault is on: a fault replaces one method on one object before the migration starts, and the ground truth
names the pages that were lost (exit code 3). They run page at a time, so on small guests only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from migsim.migration.ram import BlockState, Ram, SaveLimits
from migsim.migration.ram_kernels import ELAPSED_PS, Ints
from migsim.units import CHUNK_PAGES
from migsim.world import World

MEMORY_MAX: Final = 4 << 30


def clear_after_read(world: World, ram: Ram) -> None:
    """QEMU reads and sends a chunk's pages first and clears KVM's log after: writes in between are forgotten."""

    def save_chunk(state: BlockState, page: int, limits: SaveLimits, vector: Ints) -> int:
        chunk = page // CHUNK_PAGES
        why = ram.send_chunk(state, page, limits, vector)
        if ram.lazy_clear and state.clear_bmap[chunk]:
            state.clear_bmap[chunk] = 0
            ram.tick(int(vector[ELAPSED_PS]))
            vector[ELAPSED_PS] += ram.clear_chunk(state, chunk)
        return why

    _replace(ram, "_save_chunk", save_chunk)


def no_flush(world: World, ram: Ram) -> None:
    """GET and CLEAR leave the TLBs alone: a vCPU goes on writing through a translation that should be gone."""
    _replace(world.vm.dirty_log, "flush", lambda slot: None)


def no_protect(world: World, ram: Ram) -> None:
    """GET and CLEAR take the bits and do not protect the pages: nobody notices the next write."""
    _replace(world.vm.word_kernel, "protect", lambda slot, offset, mask: None)


def no_final_sync(world: World, ram: Ram) -> None:
    """The bitmap is not synced once the guest stands still: what it wrote last stays behind."""
    sync = ram.sync

    def while_running() -> int:
        return sync() if world.workload.duty else 0

    _replace(ram, "sync", while_running)


def _replace(thing: object, name: str, step: Callable[..., Any]) -> None:
    assert callable(getattr(thing, name)), f"{thing!r} has no step {name}"
    setattr(thing, name, step)


FAULTS: Final[dict[str, Callable[[World, Ram], None]]] = {
    "clear-after-read": clear_after_read,
    "no-flush": no_flush,
    "no-protect": no_protect,
    "no-final-sync": no_final_sync,
}

CHANGED_NOTHING: Final[dict[str, str]] = {  # why a run that took the fault may have lost no page
    "clear-after-read": "no page was written between its reading and the CLEAR of its chunk, or CLEAR never waits",
    "no-flush": "no page was written through a stale translation after it was sent",
    "no-protect": "no page was written after it was sent, or its writes are not found by protecting it",
    "no-final-sync": "nothing was written between the last two syncs, or only to pages that were still to be sent",
}
