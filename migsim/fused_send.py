"""The fused kernels of sending: CLEAR of a chunk, then its pages. Driven by migsim.fused; see fused_kernels."""

from __future__ import annotations

import numpy as np

from migsim.fused_kernels import catch_up_chunk
from migsim.fused_views import (
    CLEAR_CALLS,
    LEAVES,
    NEED_4K,
    NEED_CLOCK,
    NEED_TABLES,
    NOW_NS,
    REARMED_PAGES,
    TABLES,
    BlockView,
    Costs,
    Ints,
    SlotView,
    Streams,
)
from migsim.jit import inner, kernel
from migsim.kvm.bulk import FLUSHES, HOLDS, REARMED, WALKS, rearm
from migsim.migration.ram_kernels import (
    ELAPSED_PS,
    END_OF_SPAN,
    NORMAL,
    TURNS,
    TURNS_PER_CLOCK_CHECK,
    USED,
    WAS_STALE,
    must_stop,
    next_dirty,
    save_span,
)
from migsim.planes import SUMMARY_WORDS, Words
from migsim.units import CHUNK_PAGES, CHUNK_WORDS
from migsim.words import (
    LOW6,
    ONE,
    ONES,
    ZERO,
    drop_summary,
    lowest_bit,
    popcount,
    prefetch_words,
    raise_summary,
    settle_chunk,
    settle_summed,
    settle_zero,
    tidy,
    top_of,
    zero_chunk,
)


@kernel
def taken_words(sc: int, chunk: int, slot: SlotView, block: BlockView, taken: Words) -> None:
    """The bits that a CLEAR of the chunk with what the last GET showed will take, into `taken`."""
    settle_summed(slot.log, slot.log_full, slot.log_summary, sc, slot.pages)
    if slot.known_is_bmap[sc]:
        mask, m0 = block.bmap, chunk * CHUNK_WORDS
    else:
        settle_summed(slot.known, slot.known_full, slot.known_summary, sc, slot.pages)
        mask, m0 = slot.known, sc * CHUNK_WORDS
    pages = min(CHUNK_PAGES, slot.pages - sc * CHUNK_PAGES)
    for i in range((pages + 63) >> 6):
        taken[i] = mask[m0 + i] & slot.log[sc * CHUNK_WORDS + i]


@inner
def _words_taken(mask: Words, mask_summary: Words, m0: int, log: Words, w0: int) -> int:
    """How many words of the log a CLEAR with `mask` takes bits from."""
    taken, groups = 0, mask_summary[top_of(mask_summary, m0 >> 12)]
    while groups != ZERO:
        g = lowest_bit(groups)
        groups &= groups - ONE
        left = mask_summary[(m0 >> 6) + g]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            taken += mask[m0 + i] & log[w0 + i] != ZERO
    return taken


@inner
def _expect(chunk: int, slot: SlotView, block: BlockView) -> None:
    """Ask for the words that the CLEAR and the sending of a chunk will touch."""
    top, s0, w0 = top_of(block.bmap_summary, chunk), chunk * SUMMARY_WORDS, chunk * CHUNK_WORDS
    groups, in_slot = block.bmap_summary[top], (chunk - slot.offset) * CHUNK_WORDS
    prefetch_words(block.bmap_summary, s0, groups, block.bmap, w0, block.stale, w0)
    protection = slot.leaves.dirty if slot.pml else slot.leaves.writable
    prefetch_words(block.bmap_summary, s0, groups, slot.log, in_slot, protection, in_slot)


@inner
def _forget_known(sc: int, slot: SlotView) -> None:
    """Zero the words of `known` that may not be."""
    groups = slot.known_summary[top_of(slot.known_summary, sc)]
    while groups != ZERO:
        g = sc * SUMMARY_WORDS + lowest_bit(groups)
        groups &= groups - ONE
        left = slot.known_summary[g]
        while left != ZERO:
            slot.known[(g << 6) + lowest_bit(left)] = ZERO
            left &= left - ONE
    drop_summary(slot.known_summary, sc)


@inner
def _clear_chunk(chunk: int, slot: SlotView, block: BlockView, costs: Costs, counts: Ints, results: Ints) -> int:
    """CLEAR of one chunk with what the last GET showed; what it cost in ps."""
    sc = chunk - slot.offset
    pages = min(CHUNK_PAGES, slot.pages - sc * CHUNK_PAGES)
    w0 = sc * CHUNK_WORDS
    counts[HOLDS] += 1
    if slot.known_full[sc] and slot.log_full[sc]:
        counts[WALKS] += 2 * ((pages + 63) >> 6) if slot.walks else 0
        counts[FLUSHES] += 1
        zero_chunk(slot.log, slot.log_full, sc)
        drop_summary(slot.log_summary, sc)
        drop_summary(slot.known_summary, sc)
        if slot.pml:
            settle_zero(slot.leaves.dirty, slot.leaves.dirty_full, sc)
        else:
            settle_zero(slot.leaves.writable, slot.leaves.writable_full, sc)
        zero_chunk(slot.known, slot.known_full, sc)
        counts[REARMED] += pages
        count = pages
    else:
        settle_summed(slot.log, slot.log_full, slot.log_summary, sc, slot.pages)
        if slot.pml:
            settle_chunk(slot.leaves.dirty, slot.leaves.dirty_full, sc, slot.pages)
        else:
            settle_chunk(slot.leaves.writable, slot.leaves.writable_full, sc, slot.pages)
        protection = slot.leaves.dirty if slot.pml else slot.leaves.writable
        if slot.walks and slot.known_is_bmap[sc]:
            counts[WALKS] += 2 * _words_taken(block.bmap, block.bmap_summary, chunk * CHUNK_WORDS, slot.log, w0)
        elif slot.walks:
            settle_summed(slot.known, slot.known_full, slot.known_summary, sc, slot.pages)
            counts[WALKS] += 2 * _words_taken(slot.known, slot.known_summary, w0, slot.log, w0)
        if slot.known_is_bmap[sc]:
            count = rearm(
                block.bmap, block.bmap_summary, chunk * CHUNK_WORDS, slot.log, protection, w0, 1, counts
            )
        else:
            settle_summed(slot.known, slot.known_full, slot.known_summary, sc, slot.pages)
            count = rearm(slot.known, slot.known_summary, w0, slot.log, protection, w0, 1, counts)
            _forget_known(sc, slot)
        tidy(slot.log, slot.log_summary, sc)
    slot.known_is_bmap[sc] = 0
    slot.reach[sc] = slot.reach[sc] != 0
    results[REARMED_PAGES] += count
    results[CLEAR_CALLS] += 1
    # Where not every page was marked, those that were have been written, and 4K leaves map them.
    small = count if count < pages else _leaves(slot, sc, pages)
    results[LEAVES] += small
    cost_ps = costs.clear_ps + count * costs.clear_page_ps + small * costs.clear_leaf_ps
    cost_ps += int(results[TABLES]) * costs.clear_table_ps
    results[TABLES] = 0
    return cost_ps


@inner
def _leaves(slot: SlotView, sc: int, pages: int) -> int:
    """4K leaves of a chunk."""
    if slot.leaves.present_full[sc]:
        return pages
    found = ZERO
    for word in slot.leaves.present[sc * CHUNK_WORDS : sc * CHUNK_WORDS + ((pages + 63) >> 6)]:
        found += popcount(word)
    return int(found)


# A chunk that is lazily all ones and is sent from its first page on needs no words at all while that goes on: what is
# left of it is known by one number. `block.open` holds (chunk, first page of it not sent yet), or -1.


@kernel
def close_chunk(block: BlockView) -> None:
    """Write what is left of the open chunk into the planes: somebody else will look."""
    chunk, at = block.open[0], block.open[1]
    if chunk < 0:
        return
    block.open[0] = -1
    w0, first = chunk * CHUNK_WORDS, at >> 6
    block.bmap_full[chunk] = block.stale_full[chunk] = 0
    drop_summary(block.bmap_summary, chunk)
    drop_summary(block.stale_summary, chunk)
    raise_summary(block.bmap_summary, w0 + first, w0 + CHUNK_WORDS)
    raise_summary(block.stale_summary, w0 + first, w0 + CHUNK_WORDS)
    for i in range(w0, w0 + first):
        block.bmap[i] = block.stale[i] = ZERO
    block.bmap[w0 + first] = block.stale[w0 + first] = ONES << (np.uint64(at) & LOW6)
    for i in range(w0 + first + 1, w0 + CHUNK_WORDS):
        block.bmap[i] = block.stale[i] = ONES


@inner
def _whole_words(at: int, byte_limit: int, time_limit_ps: int, costs: Costs, state: Ints) -> int:
    """How many words from `at` on go out whole, one after the other, before a limit could stop one: by division.

    Asked only where words and clock checks coincide, so that each word is checked before its first page.
    """
    if at & 63 or state[TURNS] == 0 or state[TURNS] % TURNS_PER_CLOCK_CHECK:
        return 0
    by_bytes = byte_limit - state[USED] - 63 * costs.normal_bytes
    by_time = time_limit_ps - 1 - state[ELAPSED_PS] - costs.word_ps
    if by_bytes < 0 or by_time < 0:
        return 0
    words = min((CHUNK_PAGES - at) >> 6, by_bytes // (64 * costs.normal_bytes) + 1)
    return int(min(words, by_time // max(costs.word_ps + 64 * costs.normal_ps, 1) + 1))


@kernel
def send_open(
    byte_limit: int, time_limit_ps: int, block: BlockView, costs: Costs, state: Ints
) -> tuple[int, int]:
    """save_span over the rest of the open chunk, all of whose pages are dirty, differ and hold data."""
    chunk, at = block.open[0], block.open[1]
    base = chunk * CHUNK_PAGES
    while at < CHUNK_PAGES:
        words = _whole_words(at, byte_limit, time_limit_ps, costs, state)
        if words > 0:
            state[ELAPSED_PS] += words * costs.word_ps
            _count_page(state, costs, words << 6)
            at += words << 6
            continue
        state[ELAPSED_PS] += costs.word_ps
        count = 64 - (at & 63)
        before = -state[TURNS] % TURNS_PER_CLOCK_CHECK
        if state[USED] + (count - 1) * costs.normal_bytes <= byte_limit and (
            before >= count
            or state[TURNS] + before == 0
            or state[ELAPSED_PS] + before * costs.normal_ps < time_limit_ps
        ):
            _count_page(state, costs, count)
        else:
            sent = 0
            while sent < count and must_stop(state, byte_limit, time_limit_ps) == END_OF_SPAN:
                _count_page(state, costs, 1)
                sent += 1
            if sent < count:
                block.open[1] = at + sent
                return base + at + sent, must_stop(state, byte_limit, time_limit_ps)
        at += count
    block.open[0] = -1
    block.bmap_full[chunk] = block.stale_full[chunk] = 0
    drop_summary(block.bmap_summary, chunk)
    drop_summary(block.stale_summary, chunk)
    return base + CHUNK_PAGES, END_OF_SPAN


@inner
def _count_page(state: Ints, costs: Costs, pages: int) -> None:
    state[TURNS] += pages
    state[USED] += pages * costs.normal_bytes
    state[ELAPSED_PS] += pages * costs.normal_ps
    state[NORMAL] += pages
    state[WAS_STALE] += pages


@kernel
def send_pages(
    page: int, end: int, start_ns: int, change_ns: int, byte_limit: int, time_limit_ps: int, streams: Streams,
    slot: SlotView, block: BlockView, costs: Costs, hits: Words, summary: Words, scratch: Words, state: Ints,
    counts: Ints, results: Ints,
) -> tuple[int, int]:  # fmt: skip
    """Ram.save over the pages [page, end) of one memslot's part of a block; (page to go on from, why it stopped).

    `start_ns` is when this call of save began, `change_ns` when the workload's rates change next; `results[NOW_NS]`
    is the moment the streams' clocks stand at.
    """
    while page < end:
        if block.open[0] >= 0:
            page, why = send_open(byte_limit, time_limit_ps, block, costs, state)
            if why != END_OF_SPAN:
                return page, why
            continue
        page = next_dirty(block.bmap, block.bmap_summary, block.bmap_full, page, end, costs.word_ps, state)
        if page < 0:
            return end, END_OF_SPAN
        why = must_stop(state, byte_limit, time_limit_ps)
        if why != END_OF_SPAN:
            return page, why
        chunk = page // CHUNK_PAGES
        if block.clear_bmap[chunk]:
            now = start_ns + state[ELAPSED_PS] // 1000
            if now >= change_ns:
                return page, NEED_CLOCK
            for s in range(len(streams.clock)):
                streams.clock[s] += streams.rate[s] * (now - results[NOW_NS])
            results[NOW_NS] = now
            if not catch_up_chunk(chunk, streams, slot, block, hits, summary, scratch, counts):
                return page, NEED_TABLES
            if slot.reach[chunk - slot.offset] == 1:
                return page, NEED_4K
            block.clear_bmap[chunk] = 0
            if chunk + 1 < (end + CHUNK_PAGES - 1) // CHUNK_PAGES:
                _expect(chunk + 1, slot, block)
            state[ELAPSED_PS] += _clear_chunk(chunk, slot, block, costs, counts, results)
        has_zero = block.zero_any[chunk] != 0
        virgin = block.bmap_full[chunk] == 2 and block.stale_full[chunk] == 2
        if virgin and not has_zero and page == chunk * CHUNK_PAGES and page + CHUNK_PAGES <= end:
            block.open[0], block.open[1] = chunk, 0
            continue
        settle_summed(block.bmap, block.bmap_full, block.bmap_summary, chunk, block.pages)
        settle_summed(block.stale, block.stale_full, block.stale_summary, chunk, block.pages)
        if has_zero:
            settle_chunk(block.zero, block.zero_full, chunk, block.pages)
        stop = min(end, (chunk + 1) * CHUNK_PAGES)
        page, why = save_span(
            block.bmap, block.bmap_summary, block.stale, block.zero, has_zero, page, stop, costs.normal_bytes,
            costs.zero_bytes, byte_limit, costs.normal_ps, costs.zero_ps, costs.word_ps, time_limit_ps, state,
        )  # fmt: skip
        if why != END_OF_SPAN:
            return page, why
        tidy(block.stale, block.stale_summary, chunk)
    return end, END_OF_SPAN
