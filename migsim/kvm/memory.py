"""Page contents of a small guest, by host frame: what the CPU, KVM and the VMM read and write.

Kept by frame, not by guest address, so that a store through a stale translation lands in the old frame as it would on
hardware. Only words ever written are kept; a 12 TiB guest keeps no contents at all.
"""

from __future__ import annotations

from migsim.units import PAGE_SHIFT, PAGE_SIZE

_WORD = 4


class Memory:
    """Host-physical memory in 32-bit little-endian words, zero where nothing was written. Addresses in bytes."""

    def __init__(self) -> None:
        self._pages: dict[int, dict[int, int]] = {}  # frame -> word index -> value

    def load(self, pfn: int, offset: int) -> int:
        """The u32 at byte `offset` of a frame."""
        if offset % _WORD:
            return int.from_bytes(self.read(pfn, offset, _WORD), "little")
        return self._pages.get(pfn, {}).get(offset // _WORD, 0)

    def store(self, pfn: int, offset: int, value: int) -> None:
        """Put a u32 at byte `offset` of a frame."""
        if offset % _WORD:
            self.write(pfn, offset, (value & 0xFFFFFFFF).to_bytes(_WORD, "little"))
        else:
            self._pages.setdefault(pfn, {})[offset // _WORD] = value & 0xFFFFFFFF

    def read(self, pfn: int, offset: int, n_bytes: int) -> bytes:
        """Bytes inside one frame."""
        assert offset >= 0 and offset + n_bytes <= PAGE_SIZE, (offset, n_bytes)
        words = self._pages.get(pfn, {})
        first, last = offset // _WORD, -(-(offset + n_bytes) // _WORD)
        raw = b"".join(words.get(at, 0).to_bytes(_WORD, "little") for at in range(first, last))
        return raw[offset - first * _WORD :][:n_bytes]

    def write(self, pfn: int, offset: int, data: bytes) -> None:
        """Bytes inside one frame."""
        assert offset >= 0 and offset + len(data) <= PAGE_SIZE, (offset, len(data))
        first = offset // _WORD * _WORD
        end = -(-(offset + len(data)) // _WORD) * _WORD
        raw = bytearray(self.read(pfn, first, end - first))
        raw[offset - first : offset - first + len(data)] = data
        words = self._pages.setdefault(pfn, {})
        for at in range(0, len(raw), _WORD):
            words[(first + at) // _WORD] = int.from_bytes(raw[at : at + _WORD], "little")

    def copy_page(self, source_pfn: int, target_pfn: int) -> None:
        """What copy on write and page migration do."""
        self._pages[target_pfn] = dict(self._pages.get(source_pfn, {}))

def pages_spanned(address: int, n_bytes: int) -> list[tuple[int, int, int]]:
    """Pieces of [address, address + n_bytes) that do not cross a page: (page number, offset, length)."""
    pieces = []
    while n_bytes > 0:
        offset = address % PAGE_SIZE
        length = min(n_bytes, PAGE_SIZE - offset)
        pieces.append((address >> PAGE_SHIFT, offset, length))
        address, n_bytes = address + length, n_bytes - length
    return pieces
