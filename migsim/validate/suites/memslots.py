"""``set_memory_region_test`` and ``memslot_*``: geometry of slots, MOVE, DELETE, two address spaces, INITIALLY_SET.

Bit for bit: slots of 1, 2, 63, 64, 65 ... pages, each page alone, every CLEAR range that ends where it may.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from random import Random
from typing import Any

from migsim.kvm import uapi
from migsim.units import PAGE_SIZE
from migsim.validate.backends import CLEAR_LOG, DIRTY_LOG, ERRNO, SECOND_SPACE, Backend
from migsim.validate.case import Case, Context
from migsim.validate.modes import MODES, LogMode
from migsim.validate.rig import GPA, LOG, SLOT, Rig
from migsim.validate.script import Region
from migsim.validate.verdicts import CheckFailed

SUITE = "memslot_test"
SIZES = (1, 2, 3, 63, 64, 65, 127, 128, 129, 200)
READONLY = uapi.KVM_MEM_READONLY


def cases(backend: Backend) -> Iterator[Case]:
    for mode in MODES:
        for variant, config in backend.variants[:2]:
            name = f"{mode.name},{variant}".rstrip(",")
            geometry = partial(every_page_alone, mode=mode, config=config)
            yield Case(SUITE, f"every page of small slots,{name}", geometry, (mode.needs,))
    yield Case(SUITE, "clear every range", clear_ranges, (CLEAR_LOG,))
    yield Case(SUITE, "initially set", initially_set, (CLEAR_LOG,))
    yield Case(SUITE, "move keeps the log", move_keeps, (DIRTY_LOG, ERRNO))
    yield Case(SUITE, "delete while others log", delete_one, (DIRTY_LOG, ERRNO))
    yield Case(SUITE, "readonly", read_only, (ERRNO,))
    yield Case(SUITE, "many slots", many_slots, (DIRTY_LOG,))
    yield Case(SUITE, "two address spaces", two_spaces, (SECOND_SPACE,))


def expect(context: Context, what: str, found: set[int], wanted: set[int], n_pages: int) -> None:
    """Compare two sets of pages of a slot of ``n_pages`` and count the bits."""
    context.verified(n_pages)
    lost, extra = sorted(wanted - found), sorted(found - wanted)
    if lost:
        raise CheckFailed(f"{what}: page {lost[0]} was stored to and is not reported: a lost page")
    if extra:
        raise CheckFailed(f"{what}: page {extra[0]} is reported and was not stored to")


def every_page_alone(context: Context, mode: LogMode, config: Mapping[str, Any]) -> None:
    """For each size: store to one page, collect, and find that page and no other."""
    for n_pages in SIZES:
        with context.rig(config) as rig:
            mode.prepare(rig)
            rig.slot(n_pages, 0)
            rig.vcpus(1)
            rig.store(list(range(n_pages)), 1)
            rig.slot(n_pages)
            first = set(range(n_pages)) if mode.enabled_all else set()
            expect(context, f"{n_pages} pages, just enabled", mode.collect(rig, n_pages, SLOT), first, n_pages)
            for page in range(n_pages):
                rig.store([page], page + 2)
                found = mode.collect(rig, n_pages, SLOT)
                expect(context, f"{n_pages} pages, page {page}", found, {page}, n_pages)


def clear_ranges(context: Context) -> None:
    """CLEAR of every legal range clears just what it covers and re-arms it."""
    for n_pages in (64, 100, 129, 200):
        for first in range(0, n_pages, 64):
            for count in {n_pages - first, *range(64, n_pages - first, 64)}:
                with context.rig() as rig:
                    rig.manual_protect(1)
                    rig.slot(n_pages)
                    rig.vcpus(1)
                    everything = set(range(n_pages))
                    rig.store(sorted(everything), 1)
                    rig.clear(n_pages, everything, SLOT, first, count)
                    left = everything - set(range(first, first + count))
                    what = f"{n_pages} pages, cleared {first}+{count}"
                    expect(context, what, rig.get(n_pages), left, n_pages)
                    again = [first, first + count - 1]
                    rig.store(again, 2)
                    expect(context, f"{what}, stored again", rig.get(n_pages), left | set(again), n_pages)


def initially_set(context: Context) -> None:
    """Enabling marks exactly npages pages; what was never cleared stays reported; what was cleared is caught."""
    random = Random(context.seed)
    for n_pages in (*SIZES, 1027):
        with context.rig() as rig:
            rig.manual_protect(3)
            rig.slot(n_pages, 0)
            rig.vcpus(1)
            rig.store(list(range(n_pages)), 1)
            rig.slot(n_pages)
            everything = set(range(n_pages))
            expect(context, f"{n_pages} pages, enabled", rig.get(n_pages), everything, n_pages)
            cleared = {page for page in everything if random.random() < 0.5}
            rig.clear(n_pages, cleared)
            left = everything - cleared
            expect(context, f"{n_pages} pages, half cleared", rig.get(n_pages), left, n_pages)
            stored = {page for page in everything if random.random() < 0.3}
            rig.store(sorted(stored), 2)
            expect(context, f"{n_pages} pages, stored", rig.get(n_pages), left | stored, n_pages)


def move_keeps(context: Context) -> None:
    """MOVE keeps the pending bits, by page of the slot, and the guest goes on at the new place."""
    with context.rig() as rig:
        rig.slot(100)
        rig.vcpus(1)
        rig.store([3, 99], 1)
        rig.must(Region(SLOT, LOG, GPA + (4 << 20), 100 * PAGE_SIZE, 0))
        rig.store([4], 2, gpa=GPA + (4 << 20))
        expect(context, "after MOVE", rig.get(100), {3, 4, 99}, 100)
        if rig.halts([("r", GPA + (4 << 20) + 3 * PAGE_SIZE, 0)]) != (1,):
            raise CheckFailed("after MOVE the guest does not find what it stored before")
        reason, done, _ = rig.run([("w", GPA, 1)])
        if (reason, done) != (uapi.KVM_EXIT_MMIO, 0):
            raise CheckFailed(f"a store to the old place exits with {reason} after {done} operations, not as MMIO")


def delete_one(context: Context) -> None:
    """Deleting a slot loses no bit of its neighbour and leaves nothing mapped."""
    with context.rig() as rig:
        rig.slot(64, slot=1)
        rig.slot(64, slot=2, gpa=GPA + 64 * PAGE_SIZE, hva=64 * PAGE_SIZE)
        rig.vcpus(2)
        rig.store([1, 65], 1, 0)
        rig.store([2, 66], 1, 1)
        rig.must(Region(2, 0, 0, 0, 0))
        expect(context, "the neighbour", rig.get(64), {1, 2}, 64)
        for vcpu in (0, 1):
            reason, _, _ = rig.run([("w", GPA + 66 * PAGE_SIZE, 9)], vcpu)
            if reason != uapi.KVM_EXIT_MMIO:
                raise CheckFailed(f"vCPU {vcpu} still stores to a deleted slot (exit reason {reason})")
        rig.slot(64, slot=2, gpa=GPA + 64 * PAGE_SIZE, hva=64 * PAGE_SIZE)
        rig.store([70], 3, 1)
        expect(context, "created again", rig.get(64, 2), {6}, 64)


def read_only(context: Context) -> None:
    """A READONLY slot takes loads; stores leave for user space and its log stays empty."""
    with context.rig() as rig:
        rig.slot(8, LOG | READONLY)
        rig.vcpus(1)
        rig.halts([("r", GPA + page * PAGE_SIZE, 0) for page in range(8)])
        for page in range(8):
            reason, done, _ = rig.run([("w", GPA + page * PAGE_SIZE, 1)])
            if (reason, done) != (uapi.KVM_EXIT_MMIO, 0):
                raise CheckFailed(f"a store to page {page} of a READONLY slot: exit {reason}, done {done}")
        expect(context, "READONLY slot", rig.get(8), set(), 8)


def many_slots(context: Context) -> None:
    """Sixty slots side by side: a store is reported by its own slot alone, also where the neighbours are clean."""
    random = Random(context.seed)
    n_slots, n_pages = 60, 33
    with context.rig() as rig:
        for index in range(n_slots):
            at = index * n_pages * PAGE_SIZE
            rig.slot(n_pages, slot=index + 1, gpa=GPA + at, hva=at)
        rig.vcpus(1)
        for _round in range(3):
            stored = {random.randrange(n_slots * n_pages) for _ in range(40)} | {n_pages - 1, n_pages}
            rig.store(sorted(stored), 1)
            for index in range(n_slots):
                mine = {page - index * n_pages for page in stored if page // n_pages == index}
                expect(context, f"slot {index + 1}", rig.get(n_pages, index + 1), mine, n_pages)


def two_spaces(context: Context) -> None:
    """The same guest addresses in address space 1 are other memory and another log; only SMM sees them."""
    from migsim.validate.inside import Inside

    space_1 = 1 << 16 | SLOT
    with context.rig() as rig:
        rig.slot(70)
        rig.slot(70, slot=space_1, hva=1 << 20)
        rig.vcpus(1)
        for round_number in range(1, 4):
            rig.store([1, 69], round_number)
            rig.must(Inside("smm", (0, 1)))
            rig.store([2, 69], round_number + 10)
            rig.must(Inside("smm", (0, 0)))
            expect(context, "address space 0", rig.get(70), {1, 69}, 70)
            expect(context, "address space 1", rig.get(70, space_1), {2, 69}, 70)
            _content(rig, 69, round_number, 0)
            _content(rig, 69, round_number + 10, 1 << 20)


def _content(rig: Rig, page: int, wanted: int, hva: int) -> None:
    found = rig.content(page, hva)
    if found != wanted:
        raise CheckFailed(f"page {page} holds {found}, {wanted} was stored")
