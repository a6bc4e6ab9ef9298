"""mapped-ram (9.0): every page at its own place in a file, so that a page sent again overwrites its older copy.

Source: QEMU 10.0 migration/ram.c (mapped_ram_setup_ramblock, save_normal_page, ram_save_file_bmap), multifd-nocomp.c,
docs/devel/migration/mapped-ram.rst. In RAM's setup section each block's entry is followed by a header (version, page
size, two offsets); behind it lies room for a bitmap of the block's pages, then, from the next MiB on, its pages. The
stream goes on behind them. A page costs its 4096 bytes and no header; a zero page is a bit that is not set, and
nothing is written. The bitmaps are written last, with the guest stopped. With multifd the channels write in parallel,
without packets and without SYNC; direct-io (9.1) takes their writes past the page cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from migsim.migration.loop_types import RamState
from migsim.migration.over_ram import OverRam
from migsim.migration.ram import PS_PER_NS, Saved, SaveLimits
from migsim.migration.ram_kernels import END_OF_SPAN
from migsim.migration.wire import BE64, RamBlockName
from migsim.units import MIB, NS_PER_S, PAGE_SIZE, words_of

__all__ = ["ALIGNMENT", "ASSUMED_NS", "HEADER", "MappedRam", "Place", "bitmap_bytes", "file_bytes", "places"]

HEADER: Final = 4 + 8 + 8 + 8  # be32 version, be64 page size, bitmap offset, pages offset; packed
ALIGNMENT: Final = MIB  # MAPPED_RAM_FILE_OFFSET_ALIGNMENT: pages begin there, as O_DIRECT needs it

#: ns, assumed: a pwrite of one page into the page cache beside the migration thread's own work; a channel's page under
#: O_DIRECT, in writes of a packet's pages.
ASSUMED_NS: Final[Mapping[str, float]] = {"qemu_pwrite_page": 1_200.0, "multifd_page_direct_io": 700.0}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one RAMBlock lies in the file, bytes."""

    idstr: str
    bitmap_offset: int
    pages_offset: int
    pages: int

    @property
    def end(self) -> int:
        """Where the stream goes on, or the next block's entry stands."""
        return self.pages_offset + self.pages * PAGE_SIZE


def bitmap_bytes(pages: int) -> int:
    """A bit a page, in whole longs."""
    return words_of(pages) * 8


def places(blocks: Sequence[RamBlockName], first_entry: int) -> list[Place]:
    """`first_entry`: offset of the first block's entry in the setup section."""
    out, at = [], first_entry
    for block in blocks:
        bitmap = at + 1 + len(block.idstr) + BE64 + HEADER
        pages = -(-(bitmap + bitmap_bytes(block.pages)) // ALIGNMENT) * ALIGNMENT
        out.append(Place(block.idstr, bitmap, pages, block.pages))
        at = out[-1].end
    return out


def file_bytes(laid_out: Sequence[Place], first_entry: int, stream_bytes: int) -> int:
    """Size of the file; `stream_bytes`: all of the stream but pages and bitmaps, the setup included."""
    entries = sum(1 + len(place.idstr) + BE64 + HEADER for place in laid_out)
    return laid_out[-1].end + stream_bytes - first_entry - entries


@dataclass
class MappedRam(OverRam[RamState]):
    """RAM into a file: the last section writes every block's bitmap. bitmaps: bytes; bytes_per_s: of the storage."""

    bitmaps: int
    bytes_per_s: float
    last_stage: bool = False

    def enter_last_stage(self) -> None:
        self.last_stage = True
        self.ram.enter_last_stage()

    def save(self, limits: SaveLimits) -> Saved:
        saved = self.ram.save(limits)
        if not self.last_stage or saved.why != END_OF_SPAN:
            return saved
        took_ps = saved.elapsed_ps + int(self.bitmaps * NS_PER_S * PS_PER_NS / self.bytes_per_s)
        return saved._replace(page_bytes=saved.page_bytes + self.bitmaps, elapsed_ps=took_ps)
