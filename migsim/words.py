"""The smallest kernels on 64-bit words: popcount, settling a lazy chunk. Used by every fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from migsim.jit import kernel
from migsim.planes import SUMMARY_WORDS, Flags, Words
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

    def prefetch(words: Words, i: int) -> None:
        """Nothing: only compiled code waits for memory."""

else:
    from llvmlite import ir
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

    @intrinsic
    def prefetch(typingctx, words, i):  # type: ignore[no-untyped-def]
        """Ask for the cache line of words[i], to be written soon (LLVM's prefetch)."""

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            array = context.make_array(signature.args[0])(context, builder, args[0])
            number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            request = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
            line = builder.bitcast(builder.gep(array.data, [args[1]]), pointer)
            builder.call(request, [line, number(1), number(3), number(1)])
            return context.get_dummy_value()

        return types.void(words, types.int64), codegen



def entry_of(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled code of a kernel that was compiled for one set of argument types, else the kernel itself.

    Calling it skips numba's look-up of the types, which for a hundred arrays takes longer than most calls need. The
    caller must go on passing the same types.
    """
    compiled = list(getattr(kernel, "overloads", {}).values())
    return compiled[0].entry_point if len(compiled) == 1 else kernel


# Summaries (planes.new_summary): bit j of group g says "word 64 g + j of the plane may be non-zero", and bit g of the
# chunk's top says "one of its groups g may be", so that sparse work costs what is set, not what could be. Where a
# chunk is lazily full its summary means nothing, but a group that is not zero has its bit in the top all the same.


@kernel
def top_of(summary: Words, chunk: int) -> int:
    """Where in a summary the top of a chunk is."""
    return len(summary) // (SUMMARY_WORDS + 1) * SUMMARY_WORDS + chunk


DENSE_WORDS = 8  # of a group: as many as it has cache lines


@kernel
def dense_run(summary: Words, g: int, end: int) -> int:
    """End of the run of groups from `g` on with so many words set that a plain loop is faster than bit by bit."""
    while g < end and popcount(summary[g]) >= DENSE_WORDS:
        g += 1
    return g


@kernel
def bits_from(first: int) -> np.uint64:
    """Bits `first` (0 to 64) and above."""
    return (ONES << (np.uint64(first) & LOW6)) if first < 64 else ZERO


@kernel
def raise_word(summary: Words, i: int) -> None:
    """Say that word `i` may be non-zero."""
    summary[i >> 6] |= ONE << (np.uint64(i) & LOW6)
    summary[top_of(summary, i >> 12)] |= ONE << (np.uint64(i >> 6) & LOW6)


@kernel
def raise_summary(summary: Words, first: int, end: int) -> None:
    """Say that words [first, end), all of one chunk, may be non-zero."""
    if end <= first:
        return
    g0, g1 = first >> 6, (end - 1) >> 6
    low, high = bits_from(first & 63), ~bits_from(((end - 1) & 63) + 1)
    summary[g0] |= low if g1 > g0 else low & high
    for g in range(g0 + 1, g1):
        summary[g] = ONES
    if g1 > g0:
        summary[g1] |= high
    summary[top_of(summary, first >> 12)] |= bits_from(g0 & 63) & ~bits_from((g1 & 63) + 1)


@kernel
def drop_summary(summary: Words, chunk: int) -> None:
    """Say that every word of a chunk is zero."""
    top = top_of(summary, chunk)
    left = summary[top]
    summary[top] = ZERO
    while left != ZERO:
        summary[chunk * SUMMARY_WORDS + lowest_bit(left)] = ZERO
        left &= left - ONE


@kernel
def tidy(words: Words, summary: Words, chunk: int) -> None:
    """Take back what the summary of a chunk says too much: word by word in sparse groups, as a whole in dense ones."""
    top = top_of(summary, chunk)
    groups = summary[top]
    while groups != ZERO:
        low = groups & (~groups + ONE)
        g = chunk * SUMMARY_WORDS + lowest_bit(groups)
        groups ^= low
        left = summary[g]
        if popcount(left) >= DENSE_WORDS:
            some = ZERO
            for i in range(g << 6, min((g + 1) << 6, len(words))):
                some |= words[i]
            summary[g] = left if some != ZERO else ZERO
        else:
            kept = ZERO
            while left != ZERO:
                bit = left & (~left + ONE)
                kept |= bit if words[(g << 6) + lowest_bit(left)] != ZERO else ZERO
                left ^= bit
            summary[g] = kept
        summary[top] ^= low if summary[g] == ZERO else ZERO


@kernel
def prefetch_words(
    summary: Words, s0: int, groups: np.uint64, these: Words, w0: int, those: Words, w1: int
) -> None:
    """Ask for the words of a chunk that a summary (groups from `s0` on, its top `groups`) names, in two planes.

    `w0`, `w1`: the chunk's first words in the planes. Where few words of a group are touched each is in a cache line of
    its own, and waiting for one after the other would take longer than all the rest. Where many are, the processor
    foresees it.
    """
    while groups != ZERO:
        g = lowest_bit(groups)
        groups &= groups - ONE
        left = summary[s0 + g]
        if popcount(left) >= DENSE_WORDS:
            continue
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            prefetch(these, w0 + i)
            prefetch(those, w1 + i)


@kernel
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


@kernel
def settle_summed(words: Words, full: Flags, summary: Words, chunk: int, n_pages: int) -> None:
    """The same for a plane with a summary."""
    if settle_chunk(words, full, chunk, n_pages):
        w0 = chunk * CHUNK_WORDS
        raise_summary(summary, w0, min(w0 + CHUNK_WORDS, (n_pages + 63) >> 6))


@kernel
def zero_chunk(words: Words, full: Flags, chunk: int) -> None:
    """Clear a lazily full chunk. One whose words were never written (full = 2) is cleared by its flag alone."""
    untouched = full[chunk] == 2
    full[chunk] = 0
    if untouched:
        return
    w0 = chunk * CHUNK_WORDS
    for i in range(w0, min(w0 + CHUNK_WORDS, len(words))):
        words[i] = ZERO


@kernel
def settle_zero(words: Words, full: Flags, chunk: int) -> None:
    """Clear a whole chunk, lazily full or not."""
    if full[chunk] == 0:
        full[chunk] = 1
    zero_chunk(words, full, chunk)
