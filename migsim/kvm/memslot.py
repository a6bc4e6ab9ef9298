"""Memslots: what guest frame lies at which host address, per address space, and which huge pages a slot forbids.

`Memslots` is one address space's set: lookup by gfn and by id, and the generation every change gives it. How a set
changes is memory_region.py. Facts: Linux 6.8, virt/kvm/kvm_main.c and arch/x86/kvm/x86.c.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.uapi import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from migsim.planes import Plane
from migsim.units import PAGE_SHIFT, pages_per_level

KVM_MEM_SLOTS_NUM: Final = 32767
KVM_INTERNAL_MEM_SLOTS: Final = 3
KVM_USER_MEM_SLOTS: Final = KVM_MEM_SLOTS_NUM - KVM_INTERNAL_MEM_SLOTS
KVM_MEM_MAX_NR_PAGES: Final = (1 << 31) - 1  # 8 TiB - 4 KiB: bitmap offsets must fit a signed int
KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS: Final = 1 << 63
HUGE_LEVELS: Final = (2, 3)

Counts = NDArray[np.int32]


class SlotArch:
    """`disallow_lpage`: per huge level, how many reasons forbid a huge page at each huge frame of the slot.

    Counted from the start for a head or tail that is not aligned, and for the whole slot when guest and host address
    are not congruent modulo the huge size (kvm_alloc_memslot_metadata).
    """

    __slots__ = ("_base_gfn", "counts")

    def __init__(self, base_gfn: int, npages: int, userspace_addr: int) -> None:
        self._base_gfn = base_gfn
        self.counts: dict[int, Counts] = {}
        for level in HUGE_LEVELS:
            huge = pages_per_level(level)
            n = self._index(base_gfn + npages - 1, level) + 1
            counts: Counts = np.zeros(n, dtype=np.int32)
            if base_gfn % huge:
                counts[0] = 1
            if (base_gfn + npages) % huge:
                counts[n - 1] = 1
            if (base_gfn ^ userspace_addr >> PAGE_SHIFT) % huge:
                counts[:] = 1
            self.counts[level] = counts

    def _index(self, gfn: int, level: int) -> int:
        shift = 9 * (level - 1)
        return (gfn >> shift) - (self._base_gfn >> shift)

    def disallow_lpage(self, gfn: int, level: int) -> int:
        """Reasons against a page of `level` (2 or 3) at `gfn`; 0 allows it."""
        return int(self.counts[level][self._index(gfn, level)])

    def update_disallow_lpage(self, gfn: int, delta: int) -> None:
        """Add `delta` (+1 or -1) at every huge level: a shadowed page table came to, or left, `gfn`."""
        for level, counts in self.counts.items():
            index = self._index(gfn, level)
            counts[index] += delta
            assert counts[index] >= 0, f"disallow_lpage of gfn {gfn:#x} level {level} fell below zero"


class Memslot:
    """One slot. `npages` 4K pages from guest frame `base_gfn` are the host's memory from `userspace_addr` on.

    `dirty_bitmap`: the live log, None while not logging or while the VM logs through rings. `invalid`: the slot is
    being deleted or moved and faults on it must be retried.
    """

    __slots__ = ("arch", "as_id", "base_gfn", "dirty_bitmap", "flags", "id", "invalid", "npages", "userspace_addr")

    def __init__(
        self, as_id: int, id: int, base_gfn: int, npages: int, userspace_addr: int, flags: int = 0
    ) -> None:
        self.as_id = as_id
        self.id = id
        self.base_gfn = base_gfn
        self.npages = npages
        self.userspace_addr = userspace_addr
        self.flags = flags
        self.arch = SlotArch(base_gfn, npages, userspace_addr)
        self.dirty_bitmap: Plane | None = None
        self.invalid = False

    @property
    def key(self) -> int:
        """The `slot` argument of ioctls and of ring entries: as_id << 16 | id."""
        return self.as_id << 16 | self.id

    @property
    def logging(self) -> bool:
        """kvm_slot_dirty_track_enabled: the LOG flag is what counts, not whether a bitmap exists."""
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    @property
    def readonly(self) -> bool:
        """Guest stores exit to user space as MMIO."""
        return bool(self.flags & KVM_MEM_READONLY)

    @property
    def end_gfn(self) -> int:
        """First frame past the slot."""
        return self.base_gfn + self.npages

    def __contains__(self, gfn: int) -> bool:
        return self.base_gfn <= gfn < self.base_gfn + self.npages

    def hva(self, gfn: int) -> int:
        """Host virtual address of the page at `gfn`."""
        assert gfn in self, f"gfn {gfn:#x} outside {self!r}"
        return self.userspace_addr + (gfn - self.base_gfn << PAGE_SHIFT)

    def __repr__(self) -> str:
        return (
            f"Memslot(as_id={self.as_id}, id={self.id}, base_gfn={self.base_gfn:#x}, npages={self.npages}, "
            f"userspace_addr={self.userspace_addr:#x}, flags={self.flags:#x})"
        )


class Memslots:
    """The slots of one address space.

    `generation` starts at the address space's id and grows by the number of spaces, so that two spaces never share
    one; its bit 63 says that a change is under way (cached MMIO translations must not be stamped then).
    """

    def __init__(self, as_id: int) -> None:
        self.as_id = as_id
        self.generation = as_id
        self._by_id: dict[int, Memslot] = {}
        self._bases: list[int] = []
        self._by_gfn: list[Memslot] = []

    def __iter__(self) -> Iterator[Memslot]:
        """In order of base_gfn."""
        return iter(tuple(self._by_gfn))

    def __len__(self) -> int:
        return len(self._by_gfn)

    @property
    def update_in_progress(self) -> bool:
        """Bit 63 of the generation."""
        return bool(self.generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS)

    def by_id(self, id: int) -> Memslot | None:
        """id_to_memslot."""
        return self._by_id.get(id)

    def gfn_to_slot(self, gfn: int) -> Memslot | None:
        """The slot that holds `gfn`, also while it is invalid."""
        at = bisect_right(self._bases, gfn) - 1
        if at < 0:
            return None
        slot = self._by_gfn[at]
        return slot if gfn < slot.end_gfn else None

    def overlaps(self, id: int, base_gfn: int, end_gfn: int) -> bool:
        """Does [base_gfn, end_gfn) meet a slot other than `id`?"""
        return any(s.base_gfn < end_gfn and base_gfn < s.end_gfn for s in self._by_gfn if s.id != id)

    def insert(self, slot: Memslot) -> None:
        """Put a slot in; the caller has checked that it overlaps none."""
        assert slot.id not in self._by_id and not self.overlaps(slot.id, slot.base_gfn, slot.end_gfn), slot
        at = bisect_right(self._bases, slot.base_gfn)
        self._bases.insert(at, slot.base_gfn)
        self._by_gfn.insert(at, slot)
        self._by_id[slot.id] = slot

    def remove(self, slot: Memslot) -> None:
        """Take a slot out."""
        at = self._by_gfn.index(slot)
        del self._by_id[slot.id], self._bases[at], self._by_gfn[at]
