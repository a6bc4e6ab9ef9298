"""Sizes of QEMU's migration stream, to the byte.

Source: docs/devel/migration and migration/{savevm,ram,multifd}.c of QEMU 7.2 and 10.0; each number was checked
against real 7.2 streams (docs/qemu.md, "exact checks"). Nothing is encoded here: pages have no contents at 12 TiB,
only sizes count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migsim.units import PAGE_SIZE

__all__ = [
    "BE64", "EOS", "FILE_HEADER", "IDSTR_MAX", "MULTIFD_PACKET_PAGES",
    "NORMAL_PAGE", "PAGE_HEADER", "RAM_SECTION", "SECTION_FOOTER", "SECTION_HEADER", "section_start",
    "XBZRLE_HEADER", "ZERO_PAGE", "RamBlockName", "block_header", "configuration", "first_block_entry",
    "multifd_packet", "multifd_packet_header", "ram_setup", "stream_setup",
]  # fmt: skip

BE64: Final = 8
FILE_HEADER: Final = 8  # magic 0x5145564d, version 3
PAGE_HEADER: Final = BE64  # page offset | flags
NORMAL_PAGE: Final = PAGE_HEADER + PAGE_SIZE
ZERO_PAGE: Final = PAGE_HEADER + 1
XBZRLE_HEADER: Final = 1 + 2  # encoding 0x1, be16 length; follows the page header
EOS: Final = BE64  # RAM_SAVE_FLAG_EOS, ends each RAM section
SECTION_HEADER: Final = 1 + 4  # type, be32 section id
SECTION_FOOTER: Final = 1 + 4  # 0x7e, be32 section id
RAM_SECTION: Final = SECTION_HEADER + EOS + SECTION_FOOTER  # around the pages of one iterate call
MULTIFD_PACKET_PAGES: Final = (512 << 10) // PAGE_SIZE
IDSTR_MAX: Final = 256

_MULTIFD_FIXED = 4 * 6 + 8 + 4 * 8 + IDSTR_MAX  # six u32, packet_num, reserved, block name
assert NORMAL_PAGE == 4104 and ZERO_PAGE == 9 and RAM_SECTION == 18 and MULTIFD_PACKET_PAGES == 128
assert _MULTIFD_FIXED == 320


@dataclass(frozen=True, slots=True)
class RamBlockName:
    """A RAMBlock as the stream names it, with its size in pages."""

    idstr: str
    pages: int

    def __post_init__(self) -> None:
        assert 0 < len(self.idstr) < IDSTR_MAX and self.pages > 0


def block_header(idstr: str) -> int:
    """Extra bytes of the first page of a block after a page of another one (no CONTINUE flag)."""
    return 1 + len(idstr)


def configuration(machine: str) -> int:
    """Configuration section: type, be32 length, machine type name (no capability subsection)."""
    return 1 + 4 + len(machine)


def section_start(idstr: str) -> int:
    """START or FULL section: type, be32 id, the device's name, be32 instance, be32 version."""
    return SECTION_HEADER + 1 + len(idstr) + 4 + 4


def first_block_entry(machine: str) -> int:
    """Offset of the first RAMBlock's entry in the setup section, from the stream's beginning."""
    return FILE_HEADER + configuration(machine) + section_start("ram") + BE64


def ram_setup(blocks: Sequence[RamBlockName]) -> int:
    """RAM's setup section: total size, one entry a block, EOS, framing."""
    entries = sum(1 + len(block.idstr) + BE64 for block in blocks)
    return section_start("ram") + BE64 + entries + EOS + SECTION_FOOTER


def stream_setup(machine: str, blocks: Sequence[RamBlockName]) -> int:
    """Everything before the first page of a guest without other iterable devices; 196 for QEMU 7.2's bare `pc`."""
    return FILE_HEADER + configuration(machine) + ram_setup(blocks)


def multifd_packet_header() -> int:
    """A packet's header always has room for a full packet's offsets: 1344 bytes, also for SYNC packets."""
    return _MULTIFD_FIXED + BE64 * MULTIFD_PACKET_PAGES


def multifd_packet(normal_pages: int) -> int:
    """A packet with `normal_pages` pages of data; zero pages (9.0 and later) only use offsets, paid anyway."""
    assert 0 <= normal_pages <= MULTIFD_PACKET_PAGES
    return multifd_packet_header() + normal_pages * PAGE_SIZE
