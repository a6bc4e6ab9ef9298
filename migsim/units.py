"""Page, chunk and time constants, and the conversions between addresses and page numbers.

Nothing here imports anything of migsim. gfn is a guest frame number, gpa a guest-physical byte address.
"""

from __future__ import annotations

from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
WORD_BITS: Final = 64
LEVEL_BITS: Final = 9

CHUNK_SHIFT: Final = 18  # QEMU's x-clear-bitmap-shift default: 1 GiB of 4 KiB pages
CHUNK_PAGES: Final = 1 << CHUNK_SHIFT
CHUNK_WORDS: Final = CHUNK_PAGES // WORD_BITS
REGION_PAGES: Final = 512  # 2 MiB: the pages one level-1 table maps
REGION_WORDS: Final = REGION_PAGES // WORD_BITS

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

NS_PER_US: Final = 1_000
NS_PER_MS: Final = 1_000_000
NS_PER_S: Final = 1_000_000_000


def pages_of(size_bytes: int) -> int:
    """Whole 4 KiB pages in `size_bytes`; raises ValueError if it is not a page multiple."""
    if size_bytes < 0 or size_bytes % PAGE_SIZE:
        raise ValueError(f"{size_bytes} bytes is not a multiple of {PAGE_SIZE}")
    return size_bytes >> PAGE_SHIFT


def words_of(pages: int) -> int:
    """64-bit words that hold one bit for each of `pages`."""
    return -(-pages // WORD_BITS)


def chunks_of(pages: int) -> int:
    """1 GiB chunks that cover `pages`, the last one possibly partial."""
    return -(-pages // CHUNK_PAGES)


def pages_per_level(level: int) -> int:
    """4 KiB pages one entry of a table at `level` spans (level 1 = 4K, 2 = 2M, 3 = 1G)."""
    return 1 << (LEVEL_BITS * (level - 1))


assert CHUNK_WORDS == 4096 and pages_per_level(3) == CHUNK_PAGES
assert pages_per_level(2) == REGION_PAGES and REGION_WORDS == 8
