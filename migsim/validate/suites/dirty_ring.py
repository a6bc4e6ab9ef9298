"""``dirty_ring``: order, soft limit, coalescing, corrupt entries, signals, and a reader beside the writer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from migsim.units import PAGE_SIZE
from migsim.validate.backends import DIRTY_RING, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.modes import RING_BYTES
from migsim.validate.rig import GPA, SLOT, Rig
from migsim.validate.verdicts import CheckFailed

SUITE = "dirty_ring"
N_PAGES = 300


def cases(backend: Backend) -> Iterator[Case]:
    for variant, config in backend.variants:
        name = f",{variant}" if variant else ""
        if variant != "tdp-5.10,PML":  # drained newest first until Linux 6.14 (37c3ddfe)
            yield Case(SUITE, f"order{name}", partial(order, config=config), (DIRTY_RING,))
        yield Case(SUITE, f"coalescing{name}", partial(coalescing, config=config), (DIRTY_RING,))
    yield Case(SUITE, "corrupt entries", corrupt_entries, (DIRTY_RING,))
    yield Case(SUITE, "a signal stops the reset", signal_stops, (DIRTY_RING, MMU))
    yield Case(SUITE, "a reader beside the writer", reader_beside, (DIRTY_RING, MMU))


def _ready(rig: Rig) -> None:
    rig.ring(RING_BYTES)
    rig.slot(N_PAGES)
    rig.vcpus(1)


def order(context: Context, config: Mapping[str, Any]) -> None:
    """Entries come in the order of the stores, so that the last entry is the page written last."""
    with context.rig(config) as rig:
        _ready(rig)
        for stride in (1, 7, 61):
            pages = [page * stride % N_PAGES for page in range(100)]
            pages = list(dict.fromkeys(pages))
            rig.store(pages, stride)
            found = [offset for _, offset in rig.harvest()]
            if found != pages:
                raise CheckFailed(f"pages were stored in the order {pages[:5]}..., the ring says {found[:5]}...")
            rig.reset()
            context.verified(len(pages))


def coalescing(context: Context, config: Mapping[str, Any]) -> None:
    """Any order of entries is re-armed completely: forward, backward, across words, twice the same page."""
    patterns = (
        [0, 1, 2, 63, 64, 65, 127],
        [70, 69, 68, 6, 5],
        [10, 73, 9, 72, 10],
        [63, 0, 127, 64, 200, 137],
        [299, 0, 298, 1],
    )
    with context.rig(config) as rig:
        _ready(rig)
        for value, pages in enumerate(patterns, 1):
            for _again in range(2):
                rig.store(pages, value)
                found = {offset for _, offset in rig.harvest()}
                if found != set(pages):
                    raise CheckFailed(f"stored to {pages}, the ring names {sorted(found)}")
                rig.reset()
                context.verified(len(pages))


def corrupt_entries(context: Context) -> None:
    """Entries that user space has spoiled are counted and otherwise ignored, whatever numbers they hold."""
    spoiled = (
        ((1 << 64) - 1, 2),  # coalesced, the highest page wraps round 2^64
        ((1 << 64) - 3, 0),
        (N_PAGES, N_PAGES + 1),
        ((1 << 63) - 1, 1 << 63),
        (N_PAGES - 1, N_PAGES + 20),
    )
    with context.rig() as rig:
        _ready(rig)
        if rig.emulated:
            _guard_slot_bounds(rig.vm)
        for offsets in spoiled:
            rig.store([0, 1], 1)
            view = rig.player.vcpus[0].ring
            at = view.fetch_index  # type: ignore[attr-defined]
            for entry, offset in enumerate(offsets):
                view.entries["offset"][(at + entry) % view.size] = offset
            rig.harvest()
            taken = rig.reset()
            if taken != 2:
                raise CheckFailed(f"entries with offsets {offsets}: {taken} of 2 were reset")
            context.verified(2)
            rig.vm.set_user_memory_region(SLOT, 0, GPA, N_PAGES * PAGE_SIZE, rig.player.arena)
            rig.slot(N_PAGES)


def _guard_slot_bounds(vm: Any) -> None:
    """What a kernel with KASAN would notice: the MMU is asked to protect pages that no slot has."""
    protect = vm.mmu.enable_log_dirty_pt_masked

    def guarded(slot: Any, gfn_offset: int, mask: int) -> None:
        if gfn_offset + mask.bit_length() > slot.npages:
            raise CheckFailed(f"RESET protects pages {gfn_offset:#x} + mask {mask:#x} of a slot of {slot.npages} pages")
        protect(slot, gfn_offset, mask)

    vm.mmu.enable_log_dirty_pt_masked = guarded


def signal_stops(context: Context) -> None:
    """RESET breaks off when a signal is pending and says how far it came; the rest is reset by the next call."""
    with context.rig() as rig:
        _ready(rig)
        rig.store(list(range(200)), 1)
        rig.harvest()
        looked = iter(range(10_000))
        rig.vm.signal_pending = lambda: next(looked) >= 50
        first = rig.reset()
        rig.vm.signal_pending = lambda: False
        rest = rig.reset()
        if not first < 200 or first + rest != 200:
            raise CheckFailed(f"with a signal pending after 50 looks RESET took {first} entries, then {rest} of 200")
        for page in range(200):  # page by page: the ring is shorter than that
            rig.store([page], 2)
            if (SLOT, page) not in rig.harvest():
                raise CheckFailed(f"lost page: RESET broken off by a signal left page {page} writable")
            rig.reset()
        context.verified(400)


def reader_beside(context: Context) -> None:
    """User space polls the ring between every two stores KVM makes to an entry: a flag must vouch for its fields."""
    with context.rig() as rig:
        _ready(rig)
        ring: Any = rig.vm.vcpus[0].dirty_ring
        view = rig.player.vcpus[0].ring
        found: list[int] = []

        def poll_after(act: Any) -> Any:
            def wrapped(*args: Any) -> None:
                act(*args)
                found.extend(offset for _, offset in view.harvest())

            return wrapped

        ring.write_fields = poll_after(ring.write_fields)
        ring.set_dirtied = poll_after(ring.set_dirtied)
        pages = [5, 250, 17, 99]
        rig.store(pages, 1)
        if found != pages:
            raise CheckFailed(f"a reader beside the writer found pages {found}, stored were {pages}")
        rig.reset()
        context.verified(len(pages))
        del ring.write_fields, ring.set_dirtied
