"""Bit planes: one bit a page, 64 pages a word, a whole 1 GiB chunk at a time as "all ones" for nothing.

Everything kept per page at 12 TiB is a Plane: KVM's log, the W and D bits of 4K leaves, QEMU's bitmaps, the ground
truth. A chunk (262 144 pages, 4096 words, 32 KiB) whose `full` flag is set is all ones and its words are not looked
at; an untouched chunk is zeros that the operating system has not even backed with memory. Page-at-a-time methods are
the readable rule; whoever does bulk work calls `settle` first and then uses `words`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from migsim.units import CHUNK_PAGES, CHUNK_WORDS, WORD_BITS, chunks_of, words_of

Words = NDArray[np.uint64]
Flags = NDArray[np.uint8]

ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_STAGGER_WORDS = 72  # planes start on different cache sets: equal offsets modulo 4 KiB would alias
_staggered = 0


def _virtual_zeros(n_words: int) -> Words:
    """Zeroed words whose memory appears on first write, based 576 bytes further into a page than the last plane's."""
    global _staggered
    offset = (_staggered % 7) * _STAGGER_WORDS if n_words >= CHUNK_WORDS else 0
    _staggered += 1
    return np.zeros(n_words + offset, dtype=np.uint64)[offset:]


def tail_mask(n_pages: int) -> int:
    """The valid bits of the last word of a plane of `n_pages`."""
    rest = n_pages % WORD_BITS
    return (1 << (rest or WORD_BITS)) - 1


class Plane:
    """One bit for each of `n` pages.

    `words`: uint64[ceil(n / 64)], page i is bit i & 63 of word i >> 6. `full`: uint8[chunks]; where it is not 0 every
    page of the chunk is set and the chunk's words mean nothing; where it is 2 they are known to be all zero besides,
    so that clearing the chunk costs nothing. Bits beyond n are never set.
    """

    __slots__ = ("full", "n", "words")

    def __init__(self, n_pages: int, ones: bool = False) -> None:
        if n_pages <= 0:
            raise ValueError(f"a plane of {n_pages} pages")
        self.n = n_pages
        self.words: Words = _virtual_zeros(words_of(n_pages))
        self.full: Flags = np.zeros(chunks_of(n_pages), dtype=np.uint8)
        if ones:
            self.full[:] = 2

    # -- page at a time: the readable rule ---------------------------------------------------------------------------

    def _check(self, page: int) -> None:
        assert 0 <= page < self.n, f"page {page} outside a plane of {self.n}"

    def get(self, page: int) -> bool:
        """Is `page` set?"""
        self._check(page)
        if self.full[page // CHUNK_PAGES]:
            return True
        return bool(int(self.words[page >> 6]) >> (page & 63) & 1)

    def set(self, page: int) -> None:
        """Set one page."""
        self._check(page)
        if not self.full[page // CHUNK_PAGES]:
            self.words[page >> 6] |= np.uint64(1 << (page & 63))

    def clear(self, page: int) -> None:
        """Clear one page."""
        self._check(page)
        self.settle(page // CHUNK_PAGES)
        self.words[page >> 6] &= np.uint64(~(1 << (page & 63)) & (2**64 - 1))

    # -- chunks ------------------------------------------------------------------------------------------------------

    def chunk_words(self, chunk: int) -> slice:
        """The words of one chunk, as a slice into `words` (shorter for the last one)."""
        return slice(chunk * CHUNK_WORDS, min((chunk + 1) * CHUNK_WORDS, len(self.words)))

    def settle(self, chunk: int) -> None:
        """Turn a lazy all-ones chunk into words."""
        if not self.full[chunk]:
            return
        where = self.chunk_words(chunk)
        self.words[where] = ALL_ONES
        if where.stop == len(self.words):
            self.words[-1] = np.uint64(tail_mask(self.n))
        self.full[chunk] = 0

    def settle_range(self, first: int, count: int) -> None:
        """Settle every chunk that pages [first, first + count) touch."""
        if count <= 0:
            return
        for chunk in range(first // CHUNK_PAGES, (first + count - 1) // CHUNK_PAGES + 1):
            self.settle(chunk)

    def clear_all(self) -> None:
        """Clear every page and give the memory back."""
        self.words = _virtual_zeros(len(self.words))
        self.full[:] = 0

    # -- whole ranges ------------------------------------------------------------------------------------------------

    def slice_words(self, first: int, count: int) -> Words:
        """A copy, uint64[ceil(count / 64)], of pages [first, first + count); `first` must be a multiple of 64.

        Bits beyond `count` are zero.
        """
        assert first % WORD_BITS == 0 and first >= 0 and first + count <= self.n, (first, count, self.n)
        start, stop = first >> 6, (first >> 6) + words_of(count)
        out = np.array(self.words[start:stop])
        for chunk in range(first // CHUNK_PAGES, chunks_of(first + count)):
            if self.full[chunk]:
                begin, end = max(chunk * CHUNK_WORDS, start), min((chunk + 1) * CHUNK_WORDS, stop)
                out[begin - start : end - start] = ALL_ONES
        if count:
            out[-1] &= np.uint64(tail_mask(count))
        return out

    def set_range(self, first: int, count: int) -> None:
        """Set pages [first, first + count); whole chunks become lazy."""
        assert first >= 0 and first + count <= self.n, (first, count, self.n)
        page, end = first, first + count
        while page < end:
            chunk = page // CHUNK_PAGES
            chunk_end = min((chunk + 1) * CHUNK_PAGES, self.n)
            stop = min(end, chunk_end)
            if page == chunk * CHUNK_PAGES and stop == chunk_end:
                if not self.full[chunk]:
                    self.full[chunk] = 1 if self.words[self.chunk_words(chunk)].any() else 2
            elif not self.full[chunk]:
                _fill_words(self.words, page, stop, True)
            page = stop

    def clear_range(self, first: int, count: int) -> None:
        """Clear pages [first, first + count); a whole chunk whose words were never written costs nothing."""
        assert first >= 0 and first + count <= self.n, (first, count, self.n)
        page, end = first, first + count
        while page < end:
            chunk = page // CHUNK_PAGES
            chunk_end = min((chunk + 1) * CHUNK_PAGES, self.n)
            stop = min(end, chunk_end)
            if page == chunk * CHUNK_PAGES and stop == chunk_end and self.full[chunk] == 2:
                self.full[chunk] = 0
            else:
                self.settle(chunk)
                _fill_words(self.words, page, stop, False)
            page = stop

    def count(self) -> int:
        """How many pages are set."""
        total = 0
        for chunk in range(len(self.full)):
            if self.full[chunk]:
                total += min((chunk + 1) * CHUNK_PAGES, self.n) - chunk * CHUNK_PAGES
                continue
            words = self.words[self.chunk_words(chunk)]
            if np.count_nonzero(words):  # most chunks of most planes are empty, and this is three times as fast
                total += int(np.bitwise_count(words).sum())
        return total

    def any_in(self, first: int, count: int) -> bool:
        """Is any of pages [first, first + count) set?"""
        return any(self.get(page) for page in range(first, first + count))

    @property
    def nbytes(self) -> int:
        """Address space the plane takes (memory actually touched may be less)."""
        return int(self.words.nbytes + self.full.nbytes)


def _fill_words(words: Words, first: int, end: int, value: bool) -> None:
    """Set or clear pages [first, end) in settled words."""
    first_word, last_word = first >> 6, (end - 1) >> 6
    low = (2**64 - 1) << (first & 63) & (2**64 - 1)
    high = tail_mask(end)
    if first_word == last_word:
        low &= high
    edges = [(first_word, low)] if first_word == last_word else [(first_word, low), (last_word, high)]
    for word, mask in edges:
        if value:
            words[word] |= np.uint64(mask)
        else:
            words[word] &= np.uint64(~mask & (2**64 - 1))
    words[first_word + 1 : last_word] = ALL_ONES if value else np.uint64(0)


SUMMARY_WORDS = CHUNK_WORDS // WORD_BITS  # groups of a chunk: words of its summary, and bits of its top


def new_summary(n_pages: int) -> Words:
    """The summary (see migsim.words) of a plane of `n_pages` that is all zero.

    uint64[chunks * 65]: a bit for each word of the plane, in groups of 64; then a word a chunk, its top: a bit a group.
    """
    return np.zeros(chunks_of(n_pages) * (SUMMARY_WORDS + 1), dtype=np.uint64)


def summarise(words: Words, summary: Words) -> None:
    """Make `summary` that of the plane `words`, exactly."""
    groups = len(summary) // (SUMMARY_WORDS + 1) * SUMMARY_WORDS
    summary[:] = 0
    for lower, first, count in ((words, 0, groups), (summary[:groups], groups, len(summary) - groups)):
        marks = np.packbits(lower != 0, bitorder="little")
        summary[first : first + count].view(np.uint8)[: len(marks)] = marks


def raise_words(summary: Words, numbers: NDArray[np.intp]) -> None:
    """Say of these words that they may be non-zero, in groups and tops."""
    tops = len(summary) // (SUMMARY_WORDS + 1) * SUMMARY_WORDS
    for at, first in ((numbers, 0), (np.unique(numbers >> 6), tops)):
        np.bitwise_or.at(summary, first + (at >> 6), np.uint64(1) << (at & 63).astype(np.uint64))


def summary_of_ones(n_pages: int) -> Words:
    """The summary of a plane of `n_pages` whose every word may be non-zero; no bit beyond them."""
    summary = new_summary(n_pages)
    groups = chunks_of(n_pages) * SUMMARY_WORDS
    for bits, first in ((words_of(n_pages), 0), (-(-words_of(n_pages) // WORD_BITS), groups)):
        summary[first : first + bits // WORD_BITS] = ALL_ONES
        if bits % WORD_BITS:
            summary[first + bits // WORD_BITS] = tail_mask(bits)
    return summary
