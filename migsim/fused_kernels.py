"""The fused kernels: guest, KVM and QEMU's bitmaps of one chunk in one visit. Driven by migsim.fused.

Each function strings the kernels of guest.catch_up, kvm.bulk and migration.ram_kernels together in the order the
ioctls would; those hold the rules. Lazy all-ones chunks are settled on the way in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from migsim.guest.catch_up import clear_zero, draw_hits, write_words
from migsim.kvm.bulk import REARMED, rearm, store_mapped, store_mapped_pml, store_writable_pml
from migsim.migration.ram_kernels import ELAPSED_PS, END_OF_SPAN, must_stop, next_dirty, save_span
from migsim.planes import Flags, Words
from migsim.units import CHUNK_PAGES, CHUNK_WORDS
from migsim.words import (
    LOW6,
    ONE,
    ONES,
    SUMMARY_WORDS,
    ZERO,
    lowest_bit,
    popcount,
    raise_summary,
    settle_chunk,
    settle_summed,
    settle_zero,
    zero_chunk,
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Why a kernel came back, beyond ram_kernels' reasons.
NEED_SPLIT, NEED_CLOCK, NEED_STORES = 10, 11, 12

# Indices into the int64 results of a kernel.
NEW, LOST, FIRST_LOST, BITS, REARMED_PAGES, CLEAR_CALLS, NOW_NS = range(7)
RESULTS_LEN = 7


class Streams(NamedTuple):
    """The workload's arrays (guest.workload.Workload)."""

    law: Ints
    first: Ints
    end: Ints
    clock: Floats
    rate: Floats
    seen: Floats
    visits: NDArray[np.uint32]
    seed_key: np.uint64


class SlotView(NamedTuple):
    """One memslot: KVM's planes and QEMU's copy of the last GET. `offset`: the slot's first chunk in its block."""

    pages: int
    offset: int
    log: Words
    log_summary: Words
    log_full: Flags
    writable: Words
    writable_full: Flags
    dirty: Words
    dirty_full: Flags
    present: Words
    present_full: Flags
    tabled: Flags  # the chunk has no huge leaf any more: its planes tell everything
    known: Words
    known_summary: Words
    known_full: Flags
    known_is_bmap: Flags  # the last GET of the chunk equals the block's bitmap, so `known` was not written
    pml: bool
    manual: bool  # GET only copies; without manual protection it takes the bits and protects at once


class BlockView(NamedTuple):
    """One RAM block: QEMU's bitmaps and the ground truth. Without the oracle `stale` is `bmap` itself."""

    pages: int
    first_page: int
    first_chunk: int
    bmap: Words
    bmap_summary: Words
    bmap_full: Flags
    clear_bmap: Flags
    stale: Words
    stale_summary: Words
    stale_full: Flags
    zero: Words
    zero_full: Flags
    zero_any: Flags
    verify: bool
    borrowed: Ints  # [chunk] whose bmap and stale words are in the three buffers below, or [-1]
    hot_bmap: Words
    hot_summary: Words
    hot_stale: Words


class Costs(NamedTuple):
    """migration.ram.SaveCosts for the kernels."""

    normal_ps: int
    zero_ps: int
    word_ps: int
    clear_ps: int
    clear_page_ps: int
    normal_bytes: int
    zero_bytes: int


@njit(cache=True, nogil=True)
def catch_up_chunk(
    chunk: int, streams: Streams, slot: SlotView, block: BlockView, hits: Words, summary: Words, scratch: Words,
    counts: Ints,
) -> bool:  # fmt: skip
    """Let the guest's writes to a chunk of the block happen. False: `hits` must be stored page by page."""
    unit = block.first_chunk + chunk
    base = chunk * CHUNK_PAGES
    pages = min(CHUNK_PAGES, block.pages - base)
    sc = chunk - slot.offset
    if slot.log_full[sc] and block.stale_full[chunk] and not block.zero_any[chunk]:
        streams.seen[unit, :] = streams.clock  # all marked, unprotected and stale: no write can change a thing
        return True
    if not draw_hits(
        hits, summary, scratch, block.first_page + base, pages, unit, streams.law, streams.first, streams.end,
        streams.clock, streams.seen[unit], streams.visits, streams.seed_key,
    ):  # fmt: skip
        return True
    w0, groups = chunk * CHUNK_WORDS, (pages + 4095) >> 12
    if block.zero_any[chunk]:
        settle_chunk(block.zero, block.zero_full, chunk, block.pages)
    if block.verify:
        settle_summed(block.stale, block.stale_full, block.stale_summary, chunk, block.pages)
        has_zero = block.zero_any[chunk] != 0
        write_words(hits, summary, block.stale, block.stale_summary, block.zero, has_zero, w0, groups)
    elif block.zero_any[chunk]:
        clear_zero(hits, summary, block.zero, w0, groups)
    if slot.log_full[sc]:
        return True
    return slot.tabled[sc] != 0 and _store_chunk(sc, groups, slot, hits, summary, counts)


@njit(cache=True, nogil=True)
def _all_present(hits: Words, summary: Words, present: Words, w0: int, groups: int) -> bool:
    """Is every page of `hits` mapped?"""
    for g in range(groups):
        left = summary[g]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            if hits[i] & ~present[w0 + i]:
                return False
            left &= left - ONE
    return True


@njit(cache=True, nogil=True)
def _store_chunk(sc: int, groups: int, slot: SlotView, hits: Words, summary: Words, counts: Ints) -> bool:
    """Push `hits` through the MMU; False if one of them is not mapped (nothing is done then)."""
    w0 = sc * CHUNK_WORDS
    if slot.present_full[sc] == 0 and not _all_present(hits, summary, slot.present, w0, groups):
        return False
    settle_summed(slot.log, slot.log_full, slot.log_summary, sc, slot.pages)
    if slot.pml:
        settle_chunk(slot.dirty, slot.dirty_full, sc, slot.pages)
        if slot.writable_full[sc]:
            store_writable_pml(hits, summary, slot.log, slot.log_summary, slot.dirty, w0, groups, counts)
            return True
    settle_chunk(slot.writable, slot.writable_full, sc, slot.pages)
    if slot.pml:
        store_mapped_pml(
            hits, summary, slot.log, slot.log_summary, slot.writable, slot.dirty, w0, groups, counts
        )
    else:
        store_mapped(hits, summary, slot.log, slot.log_summary, slot.writable, w0, groups, counts)
    return True


@njit(cache=True, nogil=True)
def harvest_chunk(chunk: int, slot: SlotView, block: BlockView, results: Ints) -> None:
    """GET of one chunk into `known`, merged into the block's bitmap at once; with the oracle, law 1 checked."""
    sc = chunk - slot.offset
    pages = min(CHUNK_PAGES, block.pages - chunk * CHUNK_PAGES)
    block.clear_bmap[chunk] = slot.manual
    results[BITS] += pages
    if slot.log_full[sc] and slot.manual:
        slot.known_full[sc] = max(slot.known_full[sc], 1)
        if block.bmap_full[chunk] == 0:
            results[NEW] += pages - _count(block.bmap, chunk * CHUNK_WORDS, (pages + 63) >> 6)
            block.bmap_full[chunk] = 1
            if not block.verify:
                block.stale_full[chunk] = 1
        return
    if slot.known_full[sc]:
        zero_chunk(slot.known, slot.known_full, sc)
        for g in range(sc * SUMMARY_WORDS, (sc + 1) * SUMMARY_WORDS):
            slot.known_summary[g] = ZERO
    settle_summed(slot.log, slot.log_full, slot.log_summary, sc, slot.pages)
    settle_summed(block.bmap, block.bmap_full, block.bmap_summary, chunk, block.pages)
    results[NEW] += _merge(chunk, sc, (pages + 4095) >> 12, slot, block)
    if block.verify:
        settle_summed(block.stale, block.stale_full, block.stale_summary, chunk, block.pages)
        _check(chunk, (pages + 4095) >> 12, block, results)
    if not slot.manual:
        _take_all(sc, (pages + 4095) >> 12, slot, results)


@njit(cache=True, nogil=True)
def _count(words: Words, w0: int, n_words: int) -> int:
    total = ZERO
    for i in range(w0, w0 + n_words):
        total += popcount(words[i])
    return int(total)


@njit(cache=True, nogil=True)
def _merge(chunk: int, sc: int, groups: int, slot: SlotView, block: BlockView) -> int:
    """OR the log's words into the bitmap; how many bits were new there. What GET showed is kept in `known`, unless
    the bitmap now says the same."""
    new = ZERO
    rest = ZERO  # marked in the bitmap, but not by this GET
    for g in range(groups):
        s, b = sc * SUMMARY_WORDS + g, chunk * SUMMARY_WORDS + g
        left = slot.log_summary[s] | block.bmap_summary[b]
        block.bmap_summary[b] = left
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            log = slot.log[sc * CHUNK_WORDS + i]
            have = block.bmap[chunk * CHUNK_WORDS + i]
            rest |= have & ~log
            new += popcount(log & ~have)
            if log & ~have:
                block.bmap[chunk * CHUNK_WORDS + i] = have | log
            if log == ZERO:
                slot.log_summary[s] &= ~(ONE << (np.uint64(i) & LOW6))
    slot.known_is_bmap[sc] = rest == ZERO
    if rest == ZERO:
        return int(new)
    for g in range(sc * SUMMARY_WORDS, (sc + 1) * SUMMARY_WORDS):
        left = slot.log_summary[g] | slot.known_summary[g]
        slot.known_summary[g] = slot.log_summary[g]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            slot.known[i] = slot.log[i]
    return int(new)


@njit(cache=True, nogil=True)
def _check(chunk: int, groups: int, block: BlockView, results: Ints) -> None:
    """Law 1: a page whose content differs is marked. Called right after the merge, when the log is in the bitmap."""
    for g in range(groups):
        s = chunk * SUMMARY_WORDS + g
        left = block.stale_summary[s]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            stale = block.stale[chunk * CHUNK_WORDS + i]
            lost = stale & ~block.bmap[chunk * CHUNK_WORDS + i]
            if stale == ZERO:
                block.stale_summary[s] &= ~(ONE << (np.uint64(i) & LOW6))
            if lost != ZERO:
                results[LOST] += np.int64(popcount(lost))
                if results[FIRST_LOST] < 0:
                    results[FIRST_LOST] = block.first_page + chunk * CHUNK_PAGES + (i << 6) + lowest_bit(lost)


@njit(cache=True, nogil=True)
def _take_all(sc: int, groups: int, slot: SlotView, results: Ints) -> None:
    """GET without manual protection: the bits just copied leave the log and their pages are protected."""
    if slot.pml:
        settle_chunk(slot.dirty, slot.dirty_full, sc, slot.pages)
    else:
        settle_chunk(slot.writable, slot.writable_full, sc, slot.pages)
    protection = slot.dirty if slot.pml else slot.writable
    taken = ZERO
    for g in range(groups):
        s = sc * SUMMARY_WORDS + g
        left = slot.log_summary[s]
        slot.log_summary[s] = ZERO
        while left != ZERO:
            i = sc * CHUNK_WORDS + (g << 6) + lowest_bit(left)
            left &= left - ONE
            bits = slot.log[i]
            protection[i] &= ~bits
            slot.log[i] = ZERO
            taken += popcount(bits)
    results[REARMED_PAGES] += np.int64(taken)


@njit(cache=True, nogil=True)
def sync_chunks(
    begin: int, end: int, streams: Streams, slot: SlotView, block: BlockView, hits: Words, summary: Words,
    scratch: Words, counts: Ints, results: Ints,
) -> int:  # fmt: skip
    """Sync chunks [begin, end) of the block; the first one whose stores have to be made page by page, or `end`."""
    for chunk in range(begin, end):
        if not catch_up_chunk(chunk, streams, slot, block, hits, summary, scratch, counts):
            return chunk
        harvest_chunk(chunk, slot, block, results)
    return end


@njit(cache=True, nogil=True)
def _clear_chunk(chunk: int, slot: SlotView, block: BlockView, costs: Costs, counts: Ints, results: Ints) -> int:
    """CLEAR of one chunk with what the last GET showed; what it cost in ps."""
    sc = chunk - slot.offset
    pages = min(CHUNK_PAGES, slot.pages - sc * CHUNK_PAGES)
    w0, groups = sc * CHUNK_WORDS, (pages + 4095) >> 12
    if slot.known_full[sc] and slot.log_full[sc]:
        zero_chunk(slot.log, slot.log_full, sc)
        for g in range(sc * SUMMARY_WORDS, (sc + 1) * SUMMARY_WORDS):
            slot.log_summary[g] = slot.known_summary[g] = ZERO
        if slot.pml:
            settle_zero(slot.dirty, slot.dirty_full, sc)
        else:
            settle_zero(slot.writable, slot.writable_full, sc)
        zero_chunk(slot.known, slot.known_full, sc)
        counts[REARMED] += pages
        count = pages
    else:
        settle_summed(slot.log, slot.log_full, slot.log_summary, sc, slot.pages)
        if slot.pml:
            settle_chunk(slot.dirty, slot.dirty_full, sc, slot.pages)
        else:
            settle_chunk(slot.writable, slot.writable_full, sc, slot.pages)
        protection = slot.dirty if slot.pml else slot.writable
        if slot.known_is_bmap[sc]:
            count = rearm(
                block.bmap, block.bmap_summary, chunk * CHUNK_WORDS, slot.log, protection, w0, groups, counts
            )
        else:
            settle_summed(slot.known, slot.known_full, slot.known_summary, sc, slot.pages)
            count = rearm(slot.known, slot.known_summary, w0, slot.log, protection, w0, groups, counts)
            for g in range(sc * SUMMARY_WORDS, (sc + 1) * SUMMARY_WORDS):
                left = slot.known_summary[g]
                slot.known_summary[g] = ZERO
                while left != ZERO:
                    slot.known[(g << 6) + lowest_bit(left)] = ZERO
                    left &= left - ONE
    slot.known_is_bmap[sc] = 0
    results[REARMED_PAGES] += count
    results[CLEAR_CALLS] += 1
    return costs.clear_ps + count * costs.clear_page_ps


@njit(cache=True, nogil=True)
def _borrow(chunk: int, block: BlockView) -> None:
    """Send a chunk that is lazily all ones from buffers: its words in the planes need never be touched."""
    pages = min(CHUNK_PAGES, block.pages - chunk * CHUNK_PAGES)
    whole = pages >> 6
    for i in range(whole):
        block.hot_bmap[i] = block.hot_stale[i] = ONES
    for i in range(whole, CHUNK_WORDS):
        block.hot_bmap[i] = block.hot_stale[i] = ZERO
    if pages & 63:
        block.hot_bmap[whole] = block.hot_stale[whole] = ONES >> np.uint64(64 - (pages & 63))
    for g in range(SUMMARY_WORDS):
        block.hot_summary[g] = ZERO
    raise_summary(block.hot_summary, 0, (pages + 63) >> 6)
    block.borrowed[0] = chunk


@njit(cache=True, nogil=True)
def give_back(block: BlockView) -> None:
    """Write a borrowed chunk's words to where they belong: somebody else will look."""
    chunk = block.borrowed[0]
    if chunk < 0:
        return
    block.borrowed[0] = -1
    block.bmap_full[chunk] = block.stale_full[chunk] = 0
    w0 = chunk * CHUNK_WORDS
    for i in range(min(CHUNK_WORDS, len(block.bmap) - w0)):
        block.bmap[w0 + i] = block.hot_bmap[i]
        block.stale[w0 + i] = block.hot_stale[i]
    for g in range(SUMMARY_WORDS):
        block.bmap_summary[chunk * SUMMARY_WORDS + g] = block.hot_summary[g]
        block.stale_summary[chunk * SUMMARY_WORDS + g] = block.hot_summary[g]


@njit(cache=True, nogil=True)
def _send_borrowed(
    page: int, byte_limit: int, time_limit_ps: int, block: BlockView, costs: Costs, state: Ints
) -> tuple[int, int]:
    """save_span over the rest of the borrowed chunk, which ends the loan when it is done."""
    chunk = block.borrowed[0]
    base = chunk * CHUNK_PAGES
    pages = min(CHUNK_PAGES, block.pages - base)
    at, why = save_span(
        block.hot_bmap, block.hot_summary, block.hot_stale, block.zero, False, page - base, pages,
        costs.normal_bytes, costs.zero_bytes, byte_limit, costs.normal_ps, costs.zero_ps, costs.word_ps, time_limit_ps,
        state,
    )  # fmt: skip
    if why == END_OF_SPAN:
        block.borrowed[0] = -1
        block.bmap_full[chunk] = block.stale_full[chunk] = 0
        for g in range(chunk * SUMMARY_WORDS, (chunk + 1) * SUMMARY_WORDS):
            block.bmap_summary[g] = block.stale_summary[g] = ZERO
    return base + at, why


@njit(cache=True, nogil=True)
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
        if block.borrowed[0] >= 0:
            page, why = _send_borrowed(page, byte_limit, time_limit_ps, block, costs, state)
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
            if slot.tabled[chunk - slot.offset] == 0:
                return page, NEED_SPLIT
            now = start_ns + state[ELAPSED_PS] // 1000
            if now >= change_ns:
                return page, NEED_CLOCK
            for s in range(len(streams.clock)):
                streams.clock[s] += streams.rate[s] * (now - results[NOW_NS])
            results[NOW_NS] = now
            if not catch_up_chunk(chunk, streams, slot, block, hits, summary, scratch, counts):
                return page, NEED_STORES
            block.clear_bmap[chunk] = 0
            state[ELAPSED_PS] += _clear_chunk(chunk, slot, block, costs, counts, results)
        has_zero = block.zero_any[chunk] != 0
        virgin = block.bmap_full[chunk] == 2 and block.stale_full[chunk] == 2
        if virgin and not has_zero and page == chunk * CHUNK_PAGES and page + CHUNK_PAGES <= end:
            _borrow(chunk, block)
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
    return end, END_OF_SPAN
