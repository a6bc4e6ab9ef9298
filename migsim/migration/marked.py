"""What a bitmap has marked, counted a chunk at a time; a chunk of all ones is looked at no closer."""

from __future__ import annotations

import numpy as np

from migsim.planes import ALL_ONES, Plane, Words, raise_words, tail_mask
from migsim.units import CHUNK_PAGES, WORD_BITS, words_of

__all__ = ["between", "round_out", "runs"]


def runs(bmap: Plane) -> int:
    """Runs of ones in a plane."""
    runs, carry, top = 0, 0, np.uint64(63)
    for chunk in range(len(bmap.full)):
        if bmap.full[chunk]:
            runs, carry = runs + (not carry), 1
            continue
        words = bmap.words[bmap.chunk_words(chunk)]
        before = np.empty_like(words)  # each page's predecessor, in its place
        before[1:], before[0] = words[:-1] >> top, carry
        before |= words << np.uint64(1)
        runs += int(np.bitwise_count(words & ~before).sum())
        carry = int(words[-1] >> top)
    return runs


def between(bmap: Plane, first: int, end: int) -> int:
    """Ones among pages [first, end) of a plane."""
    total = 0
    while first < end:
        chunk = first // CHUNK_PAGES
        stop = min(end, (chunk + 1) * CHUNK_PAGES)
        if bmap.full[chunk]:
            total += stop - first
        else:
            words = bmap.words[first >> 6 : words_of(stop)].copy()
            words[0] &= np.uint64((2**64 - 1) << (first & 63) & (2**64 - 1))
            if stop & 63:
                words[-1] &= np.uint64((1 << (stop & 63)) - 1)
            total += int(np.bitwise_count(words).sum())
        first = stop
    return total


def round_out(bmap: Plane, summary: Words, host_page: int) -> int:
    """Mark every page of each host page (of `host_page` pages, a multiple of 64) that has one marked; pages added.

    Host pages are counted from the plane's beginning; the last one may be cut short.
    """
    assert host_page % WORD_BITS == 0 and CHUNK_PAGES % host_page == 0, host_page
    per, added = host_page // WORD_BITS, 0
    for chunk in range(len(bmap.full)):
        if bmap.full[chunk]:
            continue
        where = bmap.chunk_words(chunk)
        words = bmap.words[where]
        before = int(np.bitwise_count(words).sum())
        if not before:
            continue
        some = np.logical_or.reduceat(words != 0, np.arange(0, len(words), per))
        marked = np.flatnonzero(np.repeat(some, per)[: len(words)])
        words[marked] = ALL_ONES
        if where.stop == len(bmap.words) and words[-1]:
            words[-1] = np.uint64(tail_mask(bmap.n))
        raise_words(summary, marked + where.start)
        added += int(np.bitwise_count(words).sum()) - before
    return added
