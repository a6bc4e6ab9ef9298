"""The guest's memory: RAM blocks, where KVM sees them, which pages are zero, and the ground truth.

Station 5 on the path of a dirty page. `stale` says of each page: its content differs from the destination's copy. The
write itself sets it, saving the page clears it, and no dirty log has a hand in it. `zero` says the page is all zero.
Pages are numbered through all blocks in order ("guest pages"); a chunk is 262 144 pages of one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from migsim.planes import Plane
from migsim.units import CHUNK_PAGES, GIB, MIB, PAGE_SHIFT, chunks_of, pages_of

MEM_SLOT_PAGES_MAX = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES: 8 TiB - 4 KiB a slot
NODE_ALIGN_BYTES = 2 * MIB

# QEMU's PC machines leave a hole for PCI below 4 GiB: (RAM that still fits below, low RAM once it does not).
_LOW_RAM = {"pc": (0xE000_0000, 0xC000_0000), "q35": (0xB000_0000, 0x8000_0000)}
_ABOVE_4G = 4 * GIB


@dataclass(frozen=True)
class SlotRange:
    """One KVM memslot's worth of a block: pages [first, first + pages) of the block at guest frame `gfn`."""

    first: int
    pages: int
    gfn: int


@dataclass
class RamBlock:
    """One QEMU RAMBlock. `first_page` and `first_chunk` are its places among all blocks' pages and chunks."""

    idstr: str
    pages: int
    first_page: int
    first_chunk: int
    slots: tuple[SlotRange, ...]
    stale: Plane = field(repr=False)
    zero: Plane = field(repr=False)

    @property
    def chunks(self) -> int:
        """1 GiB chunks, the last one possibly partial."""
        return chunks_of(self.pages)

    def chunk_pages(self, chunk: int) -> int:
        """Pages in one of its chunks."""
        return min(CHUNK_PAGES, self.pages - chunk * CHUNK_PAGES)


class GuestMemory:
    """All RAM blocks of one guest and the truth about each page.

    `sizes`: (idstr, pages, slot ranges) a block. `nonzero`: ranges [first, end) of guest pages that hold data; the
    rest are zero pages until written. Every page starts stale: the destination has nothing yet.
    """

    def __init__(
        self, sizes: Iterable[tuple[str, int, tuple[SlotRange, ...]]], nonzero: Iterable[tuple[int, int]]
    ) -> None:
        self.blocks: list[RamBlock] = []
        page = chunk = 0
        for idstr, pages, slots in sizes:
            block = RamBlock(idstr, pages, page, chunk, slots, Plane(pages, ones=True), Plane(pages, ones=True))
            self.blocks.append(block)
            page, chunk = page + pages, chunk + block.chunks
        self.pages, self.chunks = page, chunk
        for first, end in nonzero:
            for block, at, count in self.pieces(first, end):
                block.zero.clear_range(at, count)

    def pieces(self, first: int, end: int) -> Iterator[tuple[RamBlock, int, int]]:
        """Guest pages [first, end) as (block, first page in the block, pages)."""
        for block in self.blocks:
            start, stop = max(first, block.first_page), min(end, block.first_page + block.pages)
            if start < stop:
                yield block, start - block.first_page, stop - start

    # -- page at a time: the rule the kernels follow -----------------------------------------------------------------

    def write(self, block: RamBlock, page: int) -> None:
        """A store to one page: it now differs from the destination's copy and is no longer zero."""
        block.stale.set(page)
        if block.zero.get(page):
            block.zero.clear(page)

    def saved(self, block: RamBlock, page: int) -> None:
        """The page as it is now is on its way to the destination."""
        block.stale.clear(page)

    def stale_pages(self) -> int:
        """Pages whose content differs from the destination's."""
        return sum(block.stale.count() for block in self.blocks)


def low_ram(machine: str, memory_pages: int) -> int:
    """Pages of RAM below the PCI hole (QEMU 10.0 hw/i386/pc_piix.c, pc_q35.c: max-ram-below-4g unset)."""
    fits, low = _LOW_RAM[machine]
    return memory_pages if memory_pages < fits >> PAGE_SHIFT else low >> PAGE_SHIFT


def layout(memory_bytes: int, nodes: int, machine: str) -> list[tuple[str, int, tuple[SlotRange, ...]]]:
    """Blocks and memslots of a PC with `memory_bytes` over `nodes` memory backends (at least as many as KVM needs).

    Node sizes differ by at most 2 MiB. The hole below 4 GiB splits the block it falls into over two slots.
    Raises ValueError if memory is no page multiple.
    """
    pages = pages_of(memory_bytes)
    nodes = max(nodes, -(-pages // MEM_SLOT_PAGES_MAX))
    unit = NODE_ALIGN_BYTES >> PAGE_SHIFT
    low = low_ram(machine, pages)
    out: list[tuple[str, int, tuple[SlotRange, ...]]] = []
    at = 0
    for node in range(nodes):
        end = pages if node == nodes - 1 else pages * (node + 1) // nodes // unit * unit
        slots = []
        if at < min(end, low):
            slots.append(SlotRange(0, min(end, low) - at, at))
        if end > low:
            start = max(at, low)
            slots.append(SlotRange(start - at, end - start, (_ABOVE_4G >> PAGE_SHIFT) + start - low))
        if end > at:
            name = "pc.ram" if nodes == 1 else f"/objects/ram-node{node}"
            out.append((name, end - at, tuple(slots)))
        at = end
    return out
