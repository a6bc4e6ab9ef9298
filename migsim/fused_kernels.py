"""The fused kernels of a sync: guest, KVM and QEMU's bitmaps of one chunk in one visit. Driven by migsim.fused.

Each function strings the kernels of guest.catch_up, kvm.bulk and migration.ram_kernels together in the order the
ioctls would; those hold the rules. Lazy all-ones chunks are settled on the way in. Sending is in fused_send.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from migsim.fused_views import BITS, FIRST_LOST, LOST, NEW, TAKEN, BlockView, Ints, SlotView, Streams
from migsim.guest.catch_up import clear_zero, draw_hits, write_words
from migsim.kvm.bulk import has_tables, store_faulting, store_mapped, store_mapped_pml, store_writable_pml
from migsim.planes import Words
from migsim.units import CHUNK_PAGES, CHUNK_WORDS
from migsim.words import (
    LOW6,
    ONE,
    ONES,
    SUMMARY_WORDS,
    ZERO,
    lowest_bit,
    ones_run,
    popcount,
    settle_chunk,
    settle_summed,
    zero_chunk,
)


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
    silent = slot.log_full[sc] != 0 and slot.silent
    if silent and block.stale_full[chunk] and not block.zero_any[chunk]:
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
    if silent:
        return True
    return store_chunk(sc, groups, slot, hits, summary, counts)


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
def store_chunk(sc: int, groups: int, slot: SlotView, hits: Words, summary: Words, counts: Ints) -> bool:
    """Push `hits` through the MMU; False if there are tables to be made first (nothing is done then)."""
    w0 = sc * CHUNK_WORDS
    all_present = slot.leaves.present_full[sc] != 0
    plain = slot.plain and slot.tabled[sc] != 0
    if not plain or not (all_present or _all_present(hits, summary, slot.leaves.present, w0, groups)):
        if slot.tabled[sc] == 0 and not has_tables(hits, summary, slot.leaves.region, w0, groups):
            return False
        if len(slot.leaves.locked_full):
            settle_chunk(slot.leaves.locked, slot.leaves.locked_full, sc, slot.pages)
        store_faulting(
            hits, summary, slot.log, slot.log_summary, slot.leaves, sc, groups, slot.pml, slot.fast_path,
            slot.log_full[sc] != 0, counts,
        )  # fmt: skip
        return True
    settle_summed(slot.log, slot.log_full, slot.log_summary, sc, slot.pages)
    if slot.pml:
        settle_chunk(slot.leaves.dirty, slot.leaves.dirty_full, sc, slot.pages)
        if slot.leaves.writable_full[sc]:
            store_writable_pml(hits, summary, slot.log, slot.log_summary, slot.leaves.dirty, w0, groups, counts)
            return True
    settle_chunk(slot.leaves.writable, slot.leaves.writable_full, sc, slot.pages)
    if slot.pml:
        store_mapped_pml(
            hits, summary, slot.log, slot.log_summary, slot.leaves.writable, slot.leaves.dirty, w0, groups, counts
        )
    else:
        store_mapped(hits, summary, slot.log, slot.log_summary, slot.leaves.writable, w0, groups, counts)
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
    some = ZERO
    for g in range(SUMMARY_WORDS):
        some |= slot.log_summary[sc * SUMMARY_WORDS + g] | slot.known_summary[sc * SUMMARY_WORDS + g]
        some |= block.bmap_summary[chunk * SUMMARY_WORDS + g] | block.stale_summary[chunk * SUMMARY_WORDS + g]
    slot.quiet[sc] = some == ZERO


@njit(cache=True, nogil=True)
def _count(words: Words, w0: int, n_words: int) -> int:
    total = ZERO
    for i in range(w0, w0 + n_words):
        total += popcount(words[i])
    return int(total)


@njit(cache=True, nogil=True)
def _merge_run(log: Words, bmap: Words) -> tuple[np.uint64, np.uint64]:
    """OR whole arrays, as vector code: (bits that were new, bits only the bitmap had)."""
    new = rest = ZERO
    for i in range(len(log)):
        have = bmap[i]
        rest |= have & ~log[i]
        new += popcount(log[i] & ~have)
        bmap[i] = have | log[i]
    return new, rest


@njit(cache=True, nogil=True)
def _merge_group(
    g: int, s0: int, b0: int, w0: int, m0: int, slot: SlotView, block: BlockView
) -> tuple[np.uint64, np.uint64]:
    """The same for one group of 64 words, those that may be non-zero; its summaries say afterwards which are."""
    new = rest = marked = logged = ZERO
    left = slot.log_summary[s0 + g] | block.bmap_summary[b0 + g]
    while left != ZERO:
        low = left & (~left + ONE)
        i = (g << 6) + lowest_bit(left)
        left ^= low
        log, have = slot.log[w0 + i], block.bmap[m0 + i]
        rest |= have & ~log
        new += popcount(log & ~have)
        if log & ~have:
            block.bmap[m0 + i] = have | log
        if log != ZERO:
            logged |= low
        if have | log:
            marked |= low
    slot.log_summary[s0 + g], block.bmap_summary[b0 + g] = logged, marked
    return new, rest


@njit(cache=True, nogil=True)
def _merge(chunk: int, sc: int, groups: int, slot: SlotView, block: BlockView) -> int:
    """OR the log's words into the bitmap; how many bits were new there. What GET showed is kept in `known`, unless
    the bitmap now says the same."""
    new = ZERO
    rest = ZERO  # marked in the bitmap, but not by this GET
    s0, b0, w0, m0 = sc * SUMMARY_WORDS, chunk * SUMMARY_WORDS, sc * CHUNK_WORDS, chunk * CHUNK_WORDS
    g = 0
    while g < groups:
        run = ones_run(slot.log_summary, s0 + g, s0 + groups) - s0
        n, r = _merge_run(slot.log[w0 + (g << 6) : w0 + (run << 6)], block.bmap[m0 + (g << 6) : m0 + (run << 6)])
        new, rest = new + n, rest | r
        for full in range(g, run):
            block.bmap_summary[b0 + full] = ONES
        if run < groups:
            n, r = _merge_group(run, s0, b0, w0, m0, slot, block)
            new, rest = new + n, rest | r
        g = run + 1
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
        settle_chunk(slot.leaves.dirty, slot.leaves.dirty_full, sc, slot.pages)
    else:
        settle_chunk(slot.leaves.writable, slot.leaves.writable_full, sc, slot.pages)
    protection = slot.leaves.dirty if slot.pml else slot.leaves.writable
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
    results[TAKEN] += np.int64(taken)


@njit(cache=True, nogil=True)
def sync_chunks(
    begin: int, end: int, streams: Streams, slot: SlotView, block: BlockView, hits: Words, summary: Words,
    scratch: Words, counts: Ints, results: Ints,
) -> int:  # fmt: skip
    """Sync chunks [begin, end) of the block; the first one whose stores have to be made page by page, or `end`."""
    for chunk in range(begin, end):
        quiet = slot.quiet[chunk - slot.offset]
        if quiet and _unwritten(chunk, streams.first, streams.end, block.first_page, block.pages):
            block.clear_bmap[chunk] = slot.manual
            results[BITS] += min(CHUNK_PAGES, block.pages - chunk * CHUNK_PAGES)
            continue
        if not catch_up_chunk(chunk, streams, slot, block, hits, summary, scratch, counts):
            return chunk
        harvest_chunk(chunk, slot, block, results)
    return end


@njit(cache=True, nogil=True)
def _unwritten(chunk: int, first: Ints, end: Ints, first_page: int, pages: int) -> bool:
    """Does no stream ever write to the chunk?"""
    base = first_page + chunk * CHUNK_PAGES
    stop = min(base + CHUNK_PAGES, first_page + pages)
    writers = 0
    for s in range(len(first)):
        writers += first[s] < stop and end[s] > base
    return writers == 0


@njit(cache=True, nogil=True)
def catch_up_chunks(
    begin: int, end: int, streams: Streams, slot: SlotView, block: BlockView, hits: Words, summary: Words,
    scratch: Words, counts: Ints,
) -> int:  # fmt: skip
    """Let the guest's writes to chunks [begin, end) happen; the first one to be stored page by page, or `end`."""
    for chunk in range(begin, end):
        if not catch_up_chunk(chunk, streams, slot, block, hits, summary, scratch, counts):
            return chunk
    return end
