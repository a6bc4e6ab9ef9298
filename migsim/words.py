"""The smallest kernels on 64-bit words: popcount, settling a lazy chunk. Used by every fused kernel."""

from __future__ import annotations

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


@njit(cache=True, nogil=True)
def settle_chunk(words: Words, full: Flags, chunk: int, n_pages: int) -> None:
    """Turn a lazy all-ones chunk of a plane of `n_pages` into words (see Plane.settle)."""
    if full[chunk] == 0:
        return
    full[chunk] = 0
    w0 = chunk * CHUNK_WORDS
    pages = min(CHUNK_PAGES, n_pages - chunk * CHUNK_PAGES)
    whole = pages >> 6
    for i in range(w0, w0 + whole):
        words[i] = ONES
    if pages & 63:
        words[w0 + whole] = ONES >> (np.uint64(64 - (pages & 63)))


@njit(cache=True, nogil=True)
def zero_chunk(words: Words, full: Flags, chunk: int) -> None:
    """Clear a whole chunk, whatever its flag said."""
    full[chunk] = 0
    w0 = chunk * CHUNK_WORDS
    for i in range(w0, min(w0 + CHUNK_WORDS, len(words))):
        words[i] = ZERO


@njit(cache=True, nogil=True)
def all_full(full: Flags, first_page: int, pages: int) -> bool:
    """Are all chunks that pages [first_page, first_page + pages) touch lazy all-ones?"""
    for chunk in range(first_page // CHUNK_PAGES, (first_page + pages - 1) // CHUNK_PAGES + 1):
        if full[chunk] == 0:
            return False
    return True


@njit(cache=True, nogil=True)
def settle_span(words: Words, full: Flags, first_page: int, pages: int, n_pages: int) -> None:
    """Settle every chunk that pages [first_page, first_page + pages) touch."""
    for chunk in range(first_page // CHUNK_PAGES, (first_page + pages - 1) // CHUNK_PAGES + 1):
        settle_chunk(words, full, chunk, n_pages)
