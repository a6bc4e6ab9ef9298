"""The packed 4K leaves of one memslot in one paging structure: a bit plane per SPTE bit that can differ.

Real SPTEs of a 12 TiB guest would take 25.8 GB; the planes take 0.4 GB each, and only where touched. An SPTE is put
together from them when somebody asks (`compose`), bit for bit the value make_spte gave, and taken apart when written
(`store`). Planes of rare states are None until the first such SPTE exists.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.host_mm import DATA_PFNS, linear_pfn
from migsim.kvm.spte import ACC_TRACK_SAVED_SHIFT, AD_TYPE_SHIFT, AdType, SpteFormat
from migsim.planes import Plane
from migsim.units import CHUNK_PAGES, PAGE_SHIFT, REGION_PAGES


class SlotShape(Protocol):
    """What of a memslot fixes its leaves: gfn range and host address."""

    @property
    def id(self) -> int: ...
    @property
    def base_gfn(self) -> int: ...
    @property
    def npages(self) -> int: ...
    @property
    def userspace_addr(self) -> int: ...


class LeafPlanes:
    """4K leaves of one slot; bit i of every plane is gfn `base_gfn` + i. All planes are zero where `present` is.

    `pfns`: frames of pages that are not where linear_pfn puts them.
    """

    __slots__ = (
        "acc_tracked", "accessed", "base_gfn", "constant", "dirty", "fmt", "hva", "not_exec", "not_host_writable",
        "not_mmu_writable", "npages", "pfns", "present", "writable",
    )  # fmt: skip

    def __init__(self, slot: SlotShape, fmt: SpteFormat, ad_type: AdType) -> None:
        self.base_gfn = slot.base_gfn
        self.npages = slot.npages
        self.hva = slot.userspace_addr
        self.fmt = fmt
        self.constant = fmt.mmu_present | ad_type << AD_TYPE_SHIFT | fmt.memtype | fmt.user | fmt.present & ~1
        self.present = Plane(slot.npages)
        self.writable = Plane(slot.npages)
        self.dirty = Plane(slot.npages)
        self.accessed = Plane(slot.npages)
        self.not_mmu_writable: Plane | None = None
        self.not_host_writable: Plane | None = None
        self.acc_tracked: Plane | None = None
        self.not_exec: Plane | None = None
        self.pfns: dict[int, int] = {}

    def reset(self) -> None:
        """Make every page non-present and give the memory back."""
        for plane in (self.present, self.writable, self.dirty, self.accessed):
            plane.clear_all()
        self.not_mmu_writable = self.not_host_writable = self.acc_tracked = self.not_exec = None
        self.pfns = {}

    def planes(self) -> list[Plane]:
        """Every plane that exists."""
        rare = (self.not_mmu_writable, self.not_host_writable, self.acc_tracked, self.not_exec)
        return [self.present, self.writable, self.dirty, self.accessed, *(plane for plane in rare if plane is not None)]

    def pfn(self, i: int) -> int:
        """The frame page `i` is mapped to."""
        return self.pfns.get(i, linear_pfn(self.hva + (i << PAGE_SHIFT)))

    def compose(self, i: int) -> int:
        """The SPTE of page `i`, or the format's non-present value."""
        if not self.present.get(i):
            return self.fmt.nonpresent
        fmt = self.fmt
        spte = self.constant | self.pfn(i) << PAGE_SHIFT
        spte |= fmt.writable if self.writable.get(i) else 0
        spte |= fmt.dirty if self.dirty.get(i) else 0
        spte |= fmt.accessed if self.accessed.get(i) else 0
        spte |= 0 if _get(self.not_host_writable, i) else fmt.host_writable
        spte |= 0 if _get(self.not_mmu_writable, i) else fmt.mmu_writable
        tracked, executable = _get(self.acc_tracked, i), not _get(self.not_exec, i)
        rights = 1 | (fmt.exec if executable else 0)
        spte |= 0 if executable else fmt.nx
        return spte | (rights << ACC_TRACK_SAVED_SHIFT if tracked else rights)

    def store(self, i: int, spte: int) -> None:
        """Make page `i`'s SPTE equal to `spte`, a present leaf or a non-present value that carries nothing."""
        fmt = self.fmt
        if not fmt.is_present(spte):
            self.erase(i, 1)
            return
        tracked = fmt.is_access_tracked(spte)
        executable = bool(spte >> ACC_TRACK_SAVED_SHIFT & fmt.exec) if tracked else fmt.is_executable(spte)
        self.present.set(i)
        _put(self.writable, i, bool(spte & fmt.writable))
        _put(self.dirty, i, bool(spte & fmt.dirty))
        _put(self.accessed, i, bool(spte & fmt.accessed))
        self.not_host_writable = self._put_rare(self.not_host_writable, i, not spte & fmt.host_writable)
        self.not_mmu_writable = self._put_rare(self.not_mmu_writable, i, not spte & fmt.mmu_writable)
        self.acc_tracked = self._put_rare(self.acc_tracked, i, tracked)
        self.not_exec = self._put_rare(self.not_exec, i, not executable)
        self.pfns.pop(i, None)
        if self.pfn(i) != fmt.pfn(spte):
            self.pfns[i] = fmt.pfn(spte)
        back = self.compose(i)
        assert back == spte, f"SPTE {spte:#018x} gfn {self.base_gfn + i:#x} level 1 is packed as {back:#018x}"

    def erase(self, first: int, count: int) -> None:
        """Make pages [first, first + count) non-present."""
        for plane in self.planes():
            plane.clear_range(first, count)
        self.forget_frames(first, count)

    def forget_frames(self, first: int, count: int) -> None:
        """Pages [first, first + count) are where linear_pfn puts them again."""
        if self.pfns:
            for i in [i for i in self.pfns if first <= i < first + count]:
                del self.pfns[i]

    def store_run(self, first: int, count: int, spte: int, frames: NDArray[np.uint64]) -> None:
        """Store `count` present leaves that differ in nothing but their frame; `spte` is the first.

        `frames`: uint64[count / 512], address field of the 2M block each 512 pages lie in.
        """
        fmt = self.fmt
        tracked = fmt.is_access_tracked(spte)
        executable = bool(spte >> ACC_TRACK_SAVED_SHIFT & fmt.exec) if tracked else fmt.is_executable(spte)
        for plane in self.planes():
            if self._untouched(plane, first, count):
                continue
            plane.clear_range(first, count)
        self.forget_frames(first, count)
        self.present.set_range(first, count)
        for plane, on in (
            (self.writable, spte & fmt.writable), (self.dirty, spte & fmt.dirty), (self.accessed, spte & fmt.accessed)
        ):  # fmt: skip
            if on:
                plane.set_range(first, count)
        for name, on in (
            ("not_host_writable", not spte & fmt.host_writable), ("not_mmu_writable", not spte & fmt.mmu_writable),
            ("acc_tracked", tracked), ("not_exec", not executable),
        ):  # fmt: skip
            if on:
                plane = getattr(self, name) or Plane(self.npages)
                plane.set_range(first, count)
                setattr(self, name, plane)
        at = first + np.arange(len(frames), dtype=np.int64) * REGION_PAGES
        linear = (self.hva >> PAGE_SHIFT) + at & DATA_PFNS - 1
        for block in np.flatnonzero(linear != frames.astype(np.int64) >> PAGE_SHIFT).tolist():
            start, frame = int(at[block]), int(frames[block]) >> PAGE_SHIFT
            self.pfns.update({start + i: frame + i for i in range(REGION_PAGES)})

    def _untouched(self, plane: Plane, first: int, count: int) -> bool:
        """Surely nothing is set there, so that clearing would only touch memory."""
        chunks = plane.full[first // CHUNK_PAGES : (first + count - 1) // CHUNK_PAGES + 1]
        return not chunks.any() and not plane.words[first >> 6 : (first + count + 63) >> 6].any()

    def _put_rare(self, plane: Plane | None, i: int, value: bool) -> Plane | None:
        if plane is None and not value:
            return None
        plane = plane or Plane(self.npages)
        _put(plane, i, value)
        return plane


def _get(plane: Plane | None, i: int) -> bool:
    return plane is not None and plane.get(i)


def _put(plane: Plane, i: int, value: bool) -> None:
    if value:
        plane.set(i)
    else:
        plane.clear(i)
