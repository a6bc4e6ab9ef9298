"""A dirty bitmap after rust-vmm's ``AtomicBitmap``, in Python: the worked example of ``migsim check --backend``.

    migsim check --backend examples.atomic_bitmap:AtomicBitmap

A backend needs ``__init__(n_bytes, page_size)`` and three methods: ``mark_dirty(offset, length)``,
``dirty_at(offset)`` and ``get_and_reset()``, which returns the words of the whole bitmap (page i is bit i & 63 of word
i >> 6) and leaves it clean.  ``OffByOneBitmap`` is the same with a mistake, to see what a failure looks like.
"""

from __future__ import annotations

import threading

WORD_BITS = 64


class AtomicBitmap:
    """One bit a page, set by any thread; a word is fetched and cleared in one step."""

    def __init__(self, n_bytes: int, page_size: int) -> None:
        self.page_size = page_size
        self.n_pages = -(-n_bytes // page_size)
        self._words = [0] * -(-self.n_pages // WORD_BITS)
        self._lock = threading.Lock()  # stands for the atomic instruction

    def mark_dirty(self, offset: int, length: int) -> None:
        """Every page that bytes [offset, offset + length) touch; what lies beyond the end is not the bitmap's."""
        if length <= 0:
            return
        last = min(self.last_page(offset, length), self.n_pages - 1)
        for page in range(offset // self.page_size, last + 1):
            with self._lock:
                self._words[page // WORD_BITS] |= 1 << page % WORD_BITS

    def last_page(self, offset: int, length: int) -> int:
        """The page of the last byte."""
        return (offset + length - 1) // self.page_size

    def dirty_at(self, offset: int) -> bool:
        """Is the page of byte ``offset`` dirty?"""
        page = offset // self.page_size
        return page < self.n_pages and bool(self._words[page // WORD_BITS] >> page % WORD_BITS & 1)

    def get_and_reset(self) -> list[int]:
        """All words, each fetched and cleared in one step, so that no mark in between is lost."""
        fetched = []
        for index in range(len(self._words)):
            with self._lock:
                word, self._words[index] = self._words[index], 0
            fetched.append(word)
        return fetched


class OffByOneBitmap(AtomicBitmap):
    """Forgets the last page of a store that ends a slot: `migsim check` says which page got lost."""

    def mark_dirty(self, offset: int, length: int) -> None:
        if offset // self.page_size + 1 < self.n_pages:
            super().mark_dirty(offset, length)
