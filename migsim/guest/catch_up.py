"""Bring one unit of memory up to date: which of its pages were written since somebody last looked.

The kernel and its rule. A unit is a run of guest pages [base, base + pages) that lies in one chunk of one RAM block
and one memslot; its hits come out as bits of a scratch buffer, to be pushed through the MMU by who asked.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from migsim.guest import draw
from migsim.guest.draw import chunk_key, draw_sweep, draw_uniform
from migsim.guest.workload import SEQUENTIAL
from migsim.jit import kernel
from migsim.planes import SUMMARY_WORDS, Words
from migsim.sim.prng import derived
from migsim.words import ONE, ZERO, bits_from, dense_run, lowest_bit, top_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@kernel
def draw_hits(
    hits: Words,
    summary: Words,
    scratch: Words,
    base: int,
    pages: int,
    unit: int,
    law: Ints,
    first: Ints,
    end: Ints,
    clock: Floats,
    seen: Floats,
    visits: NDArray[np.uint32],
    seed_key: np.uint64,
) -> bool:
    """Draw the writes that fell into a unit since its `seen` clocks; advance `seen`; True if there may be any.

    `hits`, `scratch`: uint64[>= ceil(pages / 64)], `summary` of `hits`: uint64[65]; `hits` is cleared first, where
    its summary says there is something. `clock`: float64[S] of this moment;
    `seen`: float64[S], this unit's row. Deterministic in (seed key, stream, unit, visit).
    """
    any_hit = False
    visit = visits[unit]
    for s in range(len(law)):
        a, b = max(first[s], base), min(end[s], base + pages)
        if a >= b:
            continue
        writes = clock[s] - seen[s]
        if writes <= 0.0:
            continue
        if not any_hit:
            any_hit = True
            _wipe(hits, summary)
        if law[s] == SEQUENTIAL:
            draw_sweep(hits, summary, base, pages, first[s], end[s], seen[s], clock[s])
        else:
            p = -math.expm1(-writes / (end[s] - first[s]))
            draw_uniform(hits, summary, scratch, a - base, b - base, p, chunk_key(seed_key, s, unit, visit))
        seen[s] = clock[s]
    if any_hit:
        visits[unit] = visit + np.uint32(1)
    return any_hit


@kernel
def _wipe(hits: Words, summary: Words) -> None:
    """Clear the words the summary knows of, and the summary."""
    groups = summary[SUMMARY_WORDS]
    summary[SUMMARY_WORDS] = ZERO
    while groups != ZERO:
        g = lowest_bit(groups)
        groups &= groups - ONE
        left = summary[g]
        summary[g] = ZERO
        while left != ZERO:
            hits[(g << 6) + lowest_bit(left)] = ZERO
            left &= left - ONE


@kernel
def _or_words(into: Words, words: Words) -> None:
    for i in range(min(len(into), len(words))):
        into[i] |= words[i]


@kernel
def write_words(
    hits: Words, summary: Words, stale: Words, stale_summary: Words, zero: Words, has_zero: bool, w0: int
) -> None:
    """The ground truth of stores to the pages of `hits` (GuestMemory.write, 64 pages at a time; words settled).

    `w0`: the chunk's first word in the planes.
    """
    groups, s0 = summary[SUMMARY_WORDS], w0 >> 6
    stale_summary[top_of(stale_summary, w0 >> 12)] |= groups
    while groups != ZERO:
        g = lowest_bit(groups)
        run = dense_run(summary, g, SUMMARY_WORDS)
        if run > g:
            _or_words(stale[w0 + (g << 6) : w0 + (run << 6)], hits[g << 6 : run << 6])
            for full in range(g, run):
                stale_summary[s0 + full] |= summary[full]
            groups &= bits_from(run)
            continue
        groups &= groups - ONE
        left = summary[g]
        stale_summary[s0 + g] |= left
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            stale[w0 + i] |= hits[i]
            left &= left - ONE
    if has_zero:
        clear_zero(hits, summary, zero, w0)


@kernel
def clear_zero(hits: Words, summary: Words, zero: Words, w0: int) -> None:
    """A page written is no longer known to be zero."""
    groups = summary[SUMMARY_WORDS]
    while groups != ZERO:
        g = lowest_bit(groups)
        groups &= groups - ONE
        left = summary[g]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            zero[w0 + i] &= ~hits[i]
            left &= left - ONE


def pages_hit(
    base: int,
    pages: int,
    unit: int,
    law: Ints,
    first: Ints,
    end: Ints,
    clock: Floats,
    seen: Floats,
    visit: int,
    seed_key: int,
) -> set[int]:
    """The rule, page at a time: guest pages (relative to `base`) that `draw_hits` must report."""
    out: set[int] = set()
    for s in range(len(law)):
        lo, hi = int(first[s]), int(end[s])
        a, b = max(lo, base), min(hi, base + pages)
        if a >= b or clock[s] <= seen[s]:
            continue
        if law[s] == SEQUENTIAL:
            writes = range(math.floor(seen[s]), math.floor(clock[s]))
            swept = range(lo, hi) if len(writes) >= hi - lo else {lo + k % (hi - lo) for k in writes}
            out |= {page - base for page in swept if a <= page < b}
        else:
            p = -math.expm1(-float(clock[s] - seen[s]) / (hi - lo))
            key = derived(seed_key, s, unit, visit)
            out |= draw.bits_hit(a - base, b - base, p, key)
    return out
