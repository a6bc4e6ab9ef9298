"""QEMU's bulk work on bitmaps, as numba kernels with their page-at-a-time rules.

`save_span` is ram_save_iterate over one run of pages: find the next dirty page, clear its bit, send it, until the
rate limit, the clock or the run ends it. `merge_span` is ramblock_sync_dirty_bitmap. Stations 7 and 8 on the path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migsim.jit import kernel
from migsim.planes import Flags, Words
from migsim.units import CHUNK_PAGES
from migsim.words import LOW6, ONE, ONES, ZERO, bits_from, lowest_bit, popcount, raise_word, top_of

Ints = NDArray[np.int64]

# What `save_span` reads and writes of its state vector, int64.
USED, ELAPSED_PS, TURNS, NORMAL, DUPLICATE, WAS_STALE = range(6)
STATE_LEN = 6

# Why `save_span` stopped.
END_OF_SPAN, RATE_LIMIT, TIME_LIMIT = range(3)

TURNS_PER_CLOCK_CHECK = 64  # QEMU looks at the clock before page 0 and each 64th (ram_save_iterate)


@kernel
def must_stop(state: Ints, byte_limit: int, time_limit_ps: int) -> int:
    """Why the next page may not be sent now: RATE_LIMIT, TIME_LIMIT, or END_OF_SPAN for "it may"."""
    if state[USED] > byte_limit:
        return RATE_LIMIT
    if state[TURNS] > 0 and state[TURNS] % TURNS_PER_CLOCK_CHECK == 0 and state[ELAPSED_PS] >= time_limit_ps:
        return TIME_LIMIT
    return END_OF_SPAN


@kernel
def next_word(summary: Words, i: int, end: int) -> int:
    """First word of [i, end), all of one chunk, that may be non-zero, or `end`."""
    if i >= end:
        return end
    g = i >> 6
    left = summary[g] >> (np.uint64(i) & LOW6)
    if left != ZERO:
        return min(i + lowest_bit(left), end)
    chunk = g >> 6
    groups = summary[top_of(summary, chunk)] & bits_from((g & 63) + 1)
    while groups != ZERO:
        g = (chunk << 6) + lowest_bit(groups)
        groups &= groups - ONE
        if summary[g] != ZERO:
            return min((g << 6) + lowest_bit(summary[g]), end)
    return end


@kernel
def lower_word(summary: Words, i: int) -> None:
    """Say that word `i` is zero."""
    g = i >> 6
    summary[g] &= ~(ONE << (np.uint64(i) & LOW6))
    if summary[g] == ZERO:
        summary[top_of(summary, g >> 6)] &= ~(ONE << (np.uint64(g) & LOW6))


@kernel
def next_dirty(words: Words, summary: Words, full: Flags, page: int, end: int, word_ps: int, state: Ints) -> int:
    """First dirty page of [page, end), or -1; each clean word passed costs `word_ps`. `words` need not be settled."""
    while page < end:
        if full[page // CHUNK_PAGES]:
            return page
        stop = min((page // CHUNK_PAGES + 1) * CHUNK_PAGES, end)
        first, last = page >> 6, (stop + 63) >> 6
        todo = words[first] & (ONES << (np.uint64(page) & LOW6))
        i = first
        while todo == ZERO:
            i = next_word(summary, i + 1, last)
            if i >= last:
                break
            todo = words[i]
        state[ELAPSED_PS] += (i - first) * word_ps
        if todo != ZERO:
            return (i << 6) + lowest_bit(todo)
        page = stop
    return -1


@kernel
def _may_go_whole(
    count: int, normal_bytes: int, byte_limit: int, normal_ps: int, time_limit_ps: int, state: Ints
) -> bool:
    """Do the `count` dirty pages of a word, none of them zero, go out before a limit could stop one? Counts them then.

    At most one clock check falls into a word: before a turn that is a multiple of 64.
    """
    if state[USED] + (count - 1) * normal_bytes > byte_limit:
        return False
    before = -state[TURNS] % TURNS_PER_CLOCK_CHECK
    in_time = state[ELAPSED_PS] + before * normal_ps < time_limit_ps
    if before < count and state[TURNS] + before != 0 and not in_time:
        return False
    state[TURNS] += count
    state[USED] += count * normal_bytes
    state[ELAPSED_PS] += count * normal_ps
    state[NORMAL] += count
    return True


@kernel
def save_span(
    bmap: Words,
    summary: Words,
    stale: Words,
    zero: Words,
    has_zero: bool,
    first: int,
    end: int,
    normal_bytes: int,
    zero_bytes: int,
    byte_limit: int,
    normal_ps: int,
    zero_ps: int,
    word_ps: int,
    time_limit_ps: int,
    state: Ints,
) -> tuple[int, int]:
    """Send the dirty pages of [first, end) in order; (next page to look at, why it stopped).

    `bmap`, `stale`, `zero`: settled words over the same pages, `summary` that of `bmap` (its bit falls with the last
    page of a word); `zero` is looked at only if `has_zero`. A page goes
    out if `state[USED] <= byte_limit` before it (so a window overshoots by one page) and if the clock, looked at
    every 64 turns, stands below `time_limit_ps`. A page sent: its bmap bit, then its stale bit are cleared.
    Every word looked at costs `word_ps`, a page `normal_ps` or `zero_ps`. Adds up in `state`.
    """
    page = first
    while page < end:
        found = next_word(summary, page >> 6, (end + 63) >> 6)
        if found != page >> 6:
            state[ELAPSED_PS] += (found - (page >> 6)) * word_ps
            page = found << 6
            continue
        i = page >> 6
        todo = bmap[i] & (ONES << (np.uint64(page) & LOW6))
        if end - (i << 6) < 64:
            todo &= (ONE << np.uint64(end - (i << 6))) - ONE
        state[ELAPSED_PS] += word_ps
        plain = not has_zero or zero[i] & todo == ZERO
        if plain and _may_go_whole(int(popcount(todo)), normal_bytes, byte_limit, normal_ps, time_limit_ps, state):
            state[WAS_STALE] += np.int64(popcount(stale[i] & todo))
            bmap[i] &= ~todo
            stale[i] &= ~todo
            todo = ZERO
        while todo != ZERO:
            mask = todo & (~todo + ONE)
            why = must_stop(state, byte_limit, time_limit_ps)
            if why != END_OF_SPAN:
                return (i << 6) + lowest_bit(todo), why
            todo ^= mask
            bmap[i] &= ~mask
            state[WAS_STALE] += stale[i] & mask != ZERO
            stale[i] &= ~mask
            is_zero = has_zero and zero[i] & mask != ZERO
            state[TURNS] += 1
            state[DUPLICATE if is_zero else NORMAL] += 1
            state[USED] += zero_bytes if is_zero else normal_bytes
            state[ELAPSED_PS] += zero_ps if is_zero else normal_ps
        if bmap[i] == ZERO:
            lower_word(summary, i)
        page = (i + 1) << 6
    return end, END_OF_SPAN


@dataclass
class SaveRule:
    """`save_span` page at a time, on sets of page numbers: the readable form."""

    dirty: set[int]
    stale: set[int]
    zero: set[int]
    state: list[int]

    def run(
        self, first: int, end: int, sizes: tuple[int, int], costs: tuple[int, int, int], limits: tuple[int, int]
    ) -> tuple[int, int]:
        """`sizes` (normal, zero) bytes; `costs` (normal, zero, word) ps; `limits` (bytes, ps)."""
        looked_at = -1
        for page in range(first, end):
            if page >> 6 != looked_at:
                looked_at = page >> 6
                self.state[ELAPSED_PS] += costs[2]
            if page not in self.dirty:
                continue
            if self.state[USED] > limits[0]:
                return page, RATE_LIMIT
            turns = self.state[TURNS]
            if turns and turns % TURNS_PER_CLOCK_CHECK == 0 and self.state[ELAPSED_PS] >= limits[1]:
                return page, TIME_LIMIT
            self.dirty.remove(page)
            self.state[WAS_STALE] += page in self.stale
            self.stale.discard(page)
            self.state[TURNS] += 1
            kind = page in self.zero
            self.state[DUPLICATE if kind else NORMAL] += 1
            self.state[USED] += sizes[kind]
            self.state[ELAPSED_PS] += costs[kind]
        return end, END_OF_SPAN


@kernel
def merge_span(bmap: Words, summary: Words, b0: int, log: Words, l0: int, n_words: int) -> int:
    """OR `log` words into `bmap` words; how many bits were new (ramblock_sync_dirty_bitmap)."""
    new = ZERO
    for i in range(n_words):
        have, add = bmap[b0 + i], log[l0 + i]
        new += popcount(add & ~have)
        bmap[b0 + i] = have | add
        if add != ZERO:
            raise_word(summary, b0 + i)
    return int(new)
