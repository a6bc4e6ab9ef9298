"""A VMM's half of dirty logging, as QEMU keeps it: one RAM block over several memslots, and a copy made page by page.

Every step is a method.  The rules: KVM's log is ORed in, never assigned; CLEAR names only bits that GET has shown;
clear in KVM, then the own bit, then read the page; the VMM's own writes mark every page they touch; before the log
is switched off it is fetched once more.  Sources: QEMU 10.0 accel/kvm/kvm-all.c and migration/ram.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from migsim.units import PAGE_SIZE, words_of
from migsim.validate.rig import GPA, LOG, Rig
from migsim.validate.script import Clear, Get, HostWrite


@dataclass
class VmmSlot:
    """One memslot: pages [first, first + n_pages) of the block; ``seen``: the bits of the last GET not yet cleared."""

    id: int
    first: int
    n_pages: int
    seen: set[int] = field(default_factory=set)


class Vmm:
    """``sizes``: pages of each memslot.  ``dirty``: the block's bitmap.  ``copied``: content of each page as sent."""

    def __init__(self, rig: Rig, sizes: tuple[int, ...], *, manual: bool) -> None:
        self.rig, self.manual = rig, manual
        self.slots: list[VmmSlot] = []
        for id, n_pages in enumerate(sizes, 1):
            first = sum(sizes[: id - 1])
            self.slots.append(VmmSlot(id, first, n_pages))
        self.n_pages = sum(sizes)
        self.dirty: set[int] = set()
        self.copied: dict[int, bytes] = {}
        self.meanwhile: Callable[[], None] = lambda: None  # the guest goes on while a chunk is sent
        if manual:
            rig.manual_protect(1)
        self.set_flags(0)

    def set_flags(self, flags: int) -> None:
        for slot in self.slots:
            at = slot.first * PAGE_SIZE
            self.rig.slot(slot.n_pages, flags, slot=slot.id, gpa=GPA + at, hva=at)

    # -- log

    def log_start(self) -> None:
        """Everything is dirty once."""
        self.set_flags(LOG)
        self.dirty = set(range(self.n_pages))

    def log_sync(self) -> None:
        """Fetch every slot's log and OR it in."""
        for slot in self.slots:
            self.sync_slot(slot)

    def sync_slot(self, slot: VmmSlot) -> None:
        found = self.get(slot)
        slot.seen |= found
        self.merge({slot.first + page for page in found})

    def get(self, slot: VmmSlot) -> set[int]:
        words = self.rig.must(Get(slot.id, self.bitmap_pages(slot)))
        return {page for page in range(slot.n_pages) if words[page >> 6] >> (page & 63) & 1}

    def bitmap_pages(self, slot: VmmSlot) -> int:
        """KVM writes whole 64-bit words."""
        return words_of(slot.n_pages) * 64

    def merge(self, pages: set[int]) -> None:
        self.dirty |= pages

    def log_clear(self, first: int, count: int) -> None:
        """Before pages [first, first + count) are read: CLEAR in every slot they lie in."""
        if not self.manual:
            return
        for slot in self.overlapping(first, count):
            start, stop = max(first, slot.first), min(first + count, slot.first + slot.n_pages)
            self.clear_slot(slot, start - slot.first, stop - slot.first)

    def overlapping(self, first: int, count: int) -> list[VmmSlot]:
        return [slot for slot in self.slots if first < slot.first + slot.n_pages and slot.first < first + count]

    def clear_slot(self, slot: VmmSlot, start: int, stop: int) -> None:
        """CLEAR [start, stop) of a slot: widened to 64 pages, but only bits inside that were seen."""
        low = start // 64 * 64
        high = min(slot.n_pages, -(-stop // 64) * 64)
        mask = self.clear_mask(slot, start, stop)
        words = [0] * words_of(high - low)
        for page in mask:
            words[(page - low) >> 6] |= 1 << ((page - low) & 63)
        self.rig.must(Clear(slot.id, low, high - low, tuple(words)))
        slot.seen -= mask

    def clear_mask(self, slot: VmmSlot, start: int, stop: int) -> set[int]:
        return {page for page in slot.seen if start <= page < stop}

    def log_stop(self) -> None:
        """Switching the log off destroys what is in it: fetch it first."""
        self.log_sync()
        self.set_flags(0)

    # -- pages

    def save_chunk(self, first: int, count: int) -> None:
        """Send what is dirty of a chunk: 1 clear in KVM, 2 clear the own bit, 3 read."""
        todo = sorted(page for page in self.dirty if first <= page < first + count)
        if not todo:
            return
        self.log_clear(first, count)
        self.meanwhile()
        for page in todo:
            self.save_page(page)

    def save_page(self, page: int) -> None:
        self.dirty.discard(page)
        self.copied[page] = self.read(page)

    def read(self, page: int) -> bytes:
        return bytes(self.rig.vm.host_read(self.rig.player.arena + page * PAGE_SIZE, 32))

    def skip_free(self, first: int, count: int) -> None:
        """The guest says these pages are free: they need not be sent, and must not be dirty in KVM's log either."""
        self.log_clear(first, count)
        self.dirty -= set(range(first, first + count))

    def device_write(self, address: int, length: int, value: int) -> None:
        """A device stores ``length`` bytes at block offset ``address``: KVM does not log it, so the VMM marks it."""
        for at in range(address, address + length, 4):
            self.rig.must(HostWrite(at, value))
        self.merge(self.pages_touched(address, length))

    def pages_touched(self, address: int, length: int) -> set[int]:
        return set(range(address // PAGE_SIZE, (address + length - 1) // PAGE_SIZE + 1))

    # -- a differential snapshot: a sparse file, the pages of each slot at the slot's offset

    def snapshot(self, base: dict[int, bytes]) -> dict[int, bytes]:
        """The base image with the dirty pages of every slot written over it."""
        image = dict(base)
        for slot in self.slots:
            for page in sorted(self.get(slot)):
                image[self.file_page(slot, page)] = self.read(slot.first + page)
        return image

    def file_page(self, slot: VmmSlot, page: int) -> int:
        return slot.first + page

