"""Bugs of the user-space half: QEMU, vhost, Firecracker, rust-vmm.  They change one step of ``Vmm``, not of KVM."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from migsim.validate.seeded.bug import bug, swap_shared
from migsim.validate.vmm import Vmm

CLEAR = "vmm/migration,clear-log,tdp,PML"
DIRTY = "vmm/migration,dirty-log,tdp,PML"
SNAPSHOT = "vmm/differential snapshot,tdp,PML"


@bug("vmm-clears-first-slot-only", "QEMU: clear all overlapping memslots, 2019", "O", CLEAR)
def clears_first_slot_only(vm: Any, undo: ExitStack) -> None:
    """log_clear stops after the first memslot that overlaps the range: the others stay dirty for ever."""

    def make(overlapping: Any) -> Any:
        return lambda vmm, first, count: overlapping(vmm, first, count)[:1]

    swap_shared(Vmm, "overlapping", make, undo)


@bug("vmm-clears-the-widened-range", "QEMU: kvm_log_clear_one_slot alignment, 2020", "L", CLEAR)
def clears_the_widened_range(vm: Any, undo: ExitStack) -> None:
    """The range is widened to 64 pages and the bits of the neighbours are cleared with it."""

    def clear_mask(vmm: Vmm, slot: Any, start: int, stop: int) -> set[int]:
        return set(range(start // 64 * 64, min(slot.n_pages, -(-stop // 64) * 64)))

    swap_shared(Vmm, "clear_mask", lambda original: clear_mask, undo)


@bug("vmm-clears-what-it-never-saw", "QEMU 9f4bf4ba", "L", CLEAR)
def clears_what_it_never_saw(vm: Any, undo: ExitStack) -> None:
    """CLEAR names every page of the range, also those whose bit came after the last GET."""

    def clear_mask(vmm: Vmm, slot: Any, start: int, stop: int) -> set[int]:
        return set(range(start, stop))

    swap_shared(Vmm, "clear_mask", lambda original: clear_mask, undo)


@bug("vmm-leaves-free-pages-dirty", "QEMU 3143577d", "O", CLEAR)
def leaves_free_pages_dirty(vm: Any, undo: ExitStack) -> None:
    """Free pages are skipped in the own bitmap but stay dirty in KVM's log."""

    def skip_free(vmm: Vmm, first: int, count: int) -> None:
        vmm.dirty -= set(range(first, first + count))

    swap_shared(Vmm, "skip_free", lambda original: skip_free, undo)


@bug("vmm-stops-the-log-without-a-sync", "QEMU 4cc856f", "L", DIRTY)
def stops_the_log_without_a_sync(vm: Any, undo: ExitStack) -> None:
    """The log is switched off with bits in it that nobody has fetched."""
    swap_shared(Vmm, "log_stop", lambda original: lambda vmm: vmm.set_flags(0), undo)


@bug("vmm-reads-before-it-clears", "QEMU 9458a9a1", "L", CLEAR)
def reads_before_it_clears(vm: Any, undo: ExitStack) -> None:
    """Pages are read first and cleared after: a store in between is taken for sent."""

    def save_chunk(vmm: Vmm, first: int, count: int) -> None:
        todo = sorted(page for page in vmm.dirty if first <= page < first + count)
        for page in todo:
            vmm.save_page(page)
        if todo:
            vmm.meanwhile()
            vmm.log_sync()
            vmm.dirty -= set(todo)
            vmm.log_clear(first, count)

    swap_shared(Vmm, "save_chunk", lambda original: save_chunk, undo)


@bug("vmm-marks-the-first-page-only", "vhost: set bits of all dirty pages", "L", DIRTY)
def marks_the_first_page_only(vm: Any, undo: ExitStack) -> None:
    """A device's store that crosses pages marks only the page it begins in."""

    def pages_touched(vmm: Vmm, address: int, length: int) -> set[int]:
        return {address // 4096}

    swap_shared(Vmm, "pages_touched", lambda original: pages_touched, undo)


@bug("vmm-snapshot-shifts-slots", "Firecracker PR 5705, 2026", "K", SNAPSHOT)
def snapshot_shifts_slots(vm: Any, undo: ExitStack) -> None:
    """A slot's place in the file is where the last dirty page of the one before ended."""

    def snapshot(vmm: Vmm, base: dict[int, bytes]) -> dict[int, bytes]:
        image, at = dict(base), 0
        for slot in vmm.slots:
            dirty = sorted(vmm.get(slot))
            for page in dirty:
                image[at + page] = vmm.read(slot.first + page)
            at += dirty[-1] + 1 if dirty else slot.n_pages
        return image

    swap_shared(Vmm, "snapshot", lambda original: snapshot, undo)


@bug("vmm-bitmap-too-short", "rust-vmm kvm-ioctls PR 86, 2020", "E", DIRTY)
def bitmap_too_short(vm: Any, undo: ExitStack) -> None:
    """The bitmap handed to GET is rounded down to whole words."""

    def bitmap_pages(vmm: Vmm, slot: Any) -> int:
        return int(slot.n_pages) // 64 * 64

    swap_shared(Vmm, "bitmap_pages", lambda original: bitmap_pages, undo)


@bug("vmm-reads-a-stale-log", "xqemu issue 180", "L", DIRTY)
def reads_a_stale_log(vm: Any, undo: ExitStack) -> None:
    """A slot's log is looked at without fetching it first: what came since the last time is missed."""

    def make(sync_slot: Any) -> Any:
        def stale(vmm: Vmm, slot: Any) -> None:
            before = set(slot.seen)
            slot.seen = vmm.get(slot)
            vmm.merge({slot.first + page for page in before})
            slot.seen = set() if not vmm.manual else slot.seen

        return stale

    swap_shared(Vmm, "sync_slot", make, undo)
