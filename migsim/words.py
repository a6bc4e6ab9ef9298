"""The smallest kernels on 64-bit words: popcount, settling a lazy chunk. Used by every fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import njit

from migsim.planes import Flags, Words
from migsim.units import CHUNK_PAGES, CHUNK_WORDS

ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
ZERO = np.uint64(0)
ONE = np.uint64(1)
LOW6 = np.uint64(63)

if getattr(numba.config, "DISABLE_JIT", 0):

    def popcount(word: np.uint64) -> np.uint64:
        """Set bits of one word."""
        return np.uint64(int(word).bit_count())

    def lowest_bit(word: np.uint64) -> int:
        """Number of the lowest set bit of a non-zero word."""
        return (int(word) & -int(word)).bit_length() - 1

else:
    from numba.core import types
    from numba.extending import intrinsic

    @intrinsic
    def popcount(typingctx, word):  # type: ignore[no-untyped-def]
        """Set bits of one word (LLVM's ctpop: vectorised where the processor can)."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.ctpop(args[0])

        return types.uint64(types.uint64), codegen

    @intrinsic
    def lowest_bit(typingctx, word):  # type: ignore[no-untyped-def]
        """Number of the lowest set bit of a non-zero word (LLVM's cttz)."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.cttz(args[0], context.get_constant(types.boolean, True))

        return types.int64(types.uint64), codegen




def entry_of(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled code of a kernel that was compiled for one set of argument types, else the kernel itself.

    Calling it skips numba's look-up of the types, which for a hundred arrays takes longer than most calls need. The
    caller must go on passing the same types.
    """
    compiled = list(getattr(kernel, "overloads", {}).values())
    return compiled[0].entry_point if len(compiled) == 1 else kernel


# Summaries: bit j of word g of a plane's summary says "word 64 g + j of the plane may be non-zero", so that sparse
# work costs what is set, not what could be. Where a chunk is lazily full its summary means nothing.

SUMMARY_WORDS = CHUNK_WORDS // 64  # of one chunk


@njit(cache=True, nogil=True)
def ones_run(summary: Words, g: int, end: int) -> int:
    """End of the run of summary words from `g` on that are all ones: there a plain loop is faster than bit by bit."""
    while g < end and summary[g] == ONES:
        g += 1
    return g


@njit(cache=True, nogil=True)
def raise_summary(summary: Words, first: int, end: int) -> None:
    """Say that words [first, end) may be non-zero."""
    for i in range(first, end):
        summary[i >> 6] |= ONE << (np.uint64(i) & LOW6)


@njit(cache=True, nogil=True)
def settle_chunk(words: Words, full: Flags, chunk: int, n_pages: int) -> bool:
    """Turn a lazy all-ones chunk of a plane of `n_pages` into words (see Plane.settle); was there anything to do?"""
    if full[chunk] == 0:
        return False
    full[chunk] = 0
    w0 = chunk * CHUNK_WORDS
    pages = min(CHUNK_PAGES, n_pages - chunk * CHUNK_PAGES)
    whole = pages >> 6
    for i in range(w0, w0 + whole):
        words[i] = ONES
    if pages & 63:
        words[w0 + whole] = ONES >> (np.uint64(64 - (pages & 63)))
    return True


@njit(cache=True, nogil=True)
def settle_summed(words: Words, full: Flags, summary: Words, chunk: int, n_pages: int) -> None:
    """The same for a plane with a summary."""
    if settle_chunk(words, full, chunk, n_pages):
        w0 = chunk * CHUNK_WORDS
        raise_summary(summary, w0, min(w0 + CHUNK_WORDS, (n_pages + 63) >> 6))


@njit(cache=True, nogil=True)
def zero_chunk(words: Words, full: Flags, chunk: int) -> None:
    """Clear a lazily full chunk. One whose words were never written (full = 2) is cleared by its flag alone."""
    untouched = full[chunk] == 2
    full[chunk] = 0
    if untouched:
        return
    w0 = chunk * CHUNK_WORDS
    for i in range(w0, min(w0 + CHUNK_WORDS, len(words))):
        words[i] = ZERO


@njit(cache=True, nogil=True)
def settle_zero(words: Words, full: Flags, chunk: int) -> None:
    """Clear a whole chunk, lazily full or not."""
    if full[chunk] == 0:
        full[chunk] = 1
    zero_chunk(words, full, chunk)
