"""The fused kernels of a sync: guest, KVM and QEMU's bitmaps of one chunk in one visit. Driven by migsim.fused.

Each function strings the kernels of guest.catch_up, kvm.bulk and migration.ram_kernels together in the order the
ioctls would; those hold the rules. Lazy all-ones chunks are settled on the way in. Sending is in fused_send.
"""

from __future__ import annotations

import numpy as np

from migsim.fused_views import BITS, FIRST_LOST, LOST, NEW, TAKEN, BlockView, Ints, SlotView, Streams
from migsim.guest.catch_up import clear_zero, draw_hits, write_words
from migsim.jit import inner, kernel
from migsim.kvm.bulk import has_tables, store_faulting, store_mapped, store_mapped_pml, store_writable_pml
from migsim.planes import SUMMARY_WORDS, Words
from migsim.units import CHUNK_PAGES, CHUNK_WORDS
from migsim.words import (
    DENSE_WORDS,
    ONE,
    ZERO,
    drop_summary,
    lowest_bit,
    popcount,
    prefetch_words,
    settle_chunk,
    settle_summed,
    top_of,
    zero_chunk,
)


@inner
def _silent(chunk: int, slot: SlotView) -> bool:
    """Does no store to the chunk fault, because all of it is marked and unprotected?"""
    return bool(slot.log_full[chunk - slot.offset] != 0 and slot.silent)


@inner
def draw_chunk(
    chunk: int, streams: Streams, slot: SlotView, block: BlockView, hits: Words, summary: Words, scratch: Words
) -> bool:
    """Draw the guest's writes to a chunk of the block into `hits`; False if none of them changes a thing."""
    unit = block.first_chunk + chunk
    base = chunk * CHUNK_PAGES
    if _silent(chunk, slot) and block.stale_full[chunk] and not block.zero_any[chunk]:
        for s in range(len(streams.clock)):  # all marked, unprotected and stale
            streams.seen[unit, s] = streams.clock[s]
        return False
    if not draw_hits(
        hits, summary, scratch, block.first_page + base, min(CHUNK_PAGES, block.pages - base), unit, streams.law,
        streams.first, streams.end, streams.clock, streams.seen[unit], streams.visits, streams.seed_key,
    ):  # fmt: skip
        return False
    groups, w0, in_slot = summary[SUMMARY_WORDS], chunk * CHUNK_WORDS, (chunk - slot.offset) * CHUNK_WORDS
    prefetch_words(summary, 0, groups, block.stale, w0, block.bmap, w0)
    protection = slot.leaves.dirty if slot.pml else slot.leaves.writable
    prefetch_words(summary, 0, groups, slot.log, in_slot, protection, in_slot)
    return bool(groups != ZERO)


@inner
def write_chunk(chunk: int, slot: SlotView, block: BlockView, hits: Words, summary: Words, counts: Ints) -> bool:
    """Let the writes drawn into `hits` happen. False: they must be stored page by page."""
    w0 = chunk * CHUNK_WORDS
    if block.zero_any[chunk]:
        settle_chunk(block.zero, block.zero_full, chunk, block.pages)
    if block.verify:
        settle_summed(block.stale, block.stale_full, block.stale_summary, chunk, block.pages)
        has_zero = block.zero_any[chunk] != 0
        write_words(hits, summary, block.stale, block.stale_summary, block.zero, has_zero, w0)
    elif block.zero_any[chunk]:
        clear_zero(hits, summary, block.zero, w0)
    return _silent(chunk, slot) or store_chunk(chunk - slot.offset, slot, hits, summary, counts)


@inner
def catch_up_chunk(
    chunk: int, streams: Streams, slot: SlotView, block: BlockView, hits: Words, summary: Words, scratch: Words,
    counts: Ints,
) -> bool:  # fmt: skip
    """Let the guest's writes to a chunk of the block happen. False: `hits` must be stored page by page."""
    if not draw_chunk(chunk, streams, slot, block, hits, summary, scratch):
        return True
    return write_chunk(chunk, slot, block, hits, summary, counts)


@inner
def _all_present(hits: Words, summary: Words, present: Words, w0: int) -> bool:
    """Is every page of `hits` mapped?"""
    groups = summary[SUMMARY_WORDS]
    while groups != ZERO:
        g = lowest_bit(groups)
        groups &= groups - ONE
        left = summary[g]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            if hits[i] & ~present[w0 + i]:
                return False
            left &= left - ONE
    return True


@kernel
def store_chunk(sc: int, slot: SlotView, hits: Words, summary: Words, counts: Ints) -> bool:
    """Push `hits` through the MMU; False if there are tables to be made first (nothing is done then)."""
    w0 = sc * CHUNK_WORDS
    all_present = slot.leaves.present_full[sc] != 0
    plain = slot.plain and slot.tabled[sc] != 0
    if not plain or not (all_present or _all_present(hits, summary, slot.leaves.present, w0)):
        if slot.tabled[sc] == 0 and not has_tables(hits, summary, slot.leaves.region, w0):
            return False
        if len(slot.leaves.locked_full):
            settle_chunk(slot.leaves.locked, slot.leaves.locked_full, sc, slot.pages)
        store_faulting(
            hits, summary, slot.log, slot.log_summary, slot.leaves, sc, slot.pml, slot.fast_path,
            slot.log_full[sc] != 0, counts,
        )  # fmt: skip
        return True
    settle_summed(slot.log, slot.log_full, slot.log_summary, sc, slot.pages)
    if slot.pml:
        settle_chunk(slot.leaves.dirty, slot.leaves.dirty_full, sc, slot.pages)
        if slot.leaves.writable_full[sc]:
            store_writable_pml(hits, summary, slot.log, slot.log_summary, slot.leaves.dirty, w0, counts)
            return True
    settle_chunk(slot.leaves.writable, slot.leaves.writable_full, sc, slot.pages)
    if slot.pml:
        store_mapped_pml(
            hits, summary, slot.log, slot.log_summary, slot.leaves.writable, slot.leaves.dirty, w0, counts
        )
    else:
        store_mapped(hits, summary, slot.log, slot.log_summary, slot.leaves.writable, w0, counts)
    return True


@kernel
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
        drop_summary(slot.known_summary, sc)
    settle_summed(slot.log, slot.log_full, slot.log_summary, sc, slot.pages)
    settle_summed(block.bmap, block.bmap_full, block.bmap_summary, chunk, block.pages)
    w0, m0 = sc * CHUNK_WORDS, chunk * CHUNK_WORDS
    new, equal = merge(slot.log, slot.log_summary, w0, block.bmap, block.bmap_summary, m0)
    results[NEW] += np.int64(new)
    slot.known_is_bmap[sc] = equal  # then what GET showed need not be kept
    if not equal:
        keep_known(slot.log, slot.log_summary, slot.known, slot.known_summary, sc)
    if block.verify:
        settle_summed(block.stale, block.stale_full, block.stale_summary, chunk, block.pages)
        check(block.stale, block.stale_summary, block.bmap, chunk, block.first_page, results)
    if not slot.manual:
        _take_all(sc, slot, results)


@inner
def _count(words: Words, w0: int, n_words: int) -> int:
    total = ZERO
    for i in range(w0, w0 + n_words):
        total += popcount(words[i])
    return int(total)


@kernel
def _merge_run(log: Words, bmap: Words) -> tuple[np.uint64, np.uint64]:
    """OR whole arrays, as vector code: (bits that were new, bits only the bitmap had)."""
    new = rest = ZERO
    for i in range(min(len(log), len(bmap))):
        have = bmap[i]
        rest |= have & ~log[i]
        new += popcount(log[i] & ~have)
        bmap[i] = have | log[i]
    return new, rest


@kernel
def merge(log: Words, log_summary: Words, w0: int, bmap: Words, bmap_summary: Words, m0: int) -> tuple[np.uint64, bool]:
    """OR a chunk of the log (words from `w0` on) into the bitmap (from `m0` on): (bits new there, are they equal now?).

    A word that only the bitmap's summary names is not looked at: "not equal" is then said of equal ones, too.
    """
    new = rest = ZERO
    log_top, bmap_top, s0, b0 = top_of(log_summary, w0 >> 12), top_of(bmap_summary, m0 >> 12), w0 >> 6, m0 >> 6
    groups = log_summary[log_top]
    rest |= bmap_summary[bmap_top] & ~groups
    bmap_summary[bmap_top] |= groups
    while groups != ZERO:
        g = lowest_bit(groups)
        groups &= groups - ONE
        left = log_summary[s0 + g]
        rest |= bmap_summary[b0 + g] & ~left
        bmap_summary[b0 + g] |= left
        if popcount(left) >= DENSE_WORDS:
            first, stop = w0 + (g << 6), min(w0 + (g << 6) + 64, len(log))
            n, r = _merge_run(log[first:stop], bmap[m0 + (g << 6) : m0 + (g << 6) + 64])
            new, rest, left = new + n, rest | r, ZERO
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            fresh, have = log[w0 + i], bmap[m0 + i]
            bmap[m0 + i] = have | fresh
            new, rest = new + popcount(fresh & ~have), rest | (have & ~fresh)
    return new, rest == ZERO


@kernel
def keep_known(log: Words, log_summary: Words, known: Words, known_summary: Words, sc: int) -> None:
    """Copy a chunk of the log to `known`, where one of the two may be non-zero."""
    top = top_of(log_summary, sc)
    groups = log_summary[top] | known_summary[top]
    known_summary[top] = log_summary[top]
    while groups != ZERO:
        g = sc * SUMMARY_WORDS + lowest_bit(groups)
        groups &= groups - ONE
        left = log_summary[g] | known_summary[g]
        known_summary[g] = log_summary[g]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            known[i] = log[i]


@kernel
def check(stale: Words, stale_summary: Words, bmap: Words, chunk: int, first_page: int, results: Ints) -> None:
    """Law 1: a page whose content differs is marked. Called right after the merge, when the log is in the bitmap.

    `first_page`: the guest's page of the block's first.
    """
    groups = stale_summary[top_of(stale_summary, chunk)]
    while groups != ZERO:
        s = chunk * SUMMARY_WORDS + lowest_bit(groups)
        groups &= groups - ONE
        left = stale_summary[s]
        while left != ZERO:
            i = (s << 6) + lowest_bit(left)
            left &= left - ONE
            lost = stale[i] & ~bmap[i]
            if lost != ZERO:
                results[LOST] += np.int64(popcount(lost))
                if results[FIRST_LOST] < 0:
                    results[FIRST_LOST] = first_page + (i << 6) + lowest_bit(lost)


@inner
def _take_all(sc: int, slot: SlotView, results: Ints) -> None:
    """GET without manual protection: the bits just copied leave the log and their pages are protected."""
    if slot.pml:
        settle_chunk(slot.leaves.dirty, slot.leaves.dirty_full, sc, slot.pages)
    else:
        settle_chunk(slot.leaves.writable, slot.leaves.writable_full, sc, slot.pages)
    protection = slot.leaves.dirty if slot.pml else slot.leaves.writable
    top = top_of(slot.log_summary, sc)
    groups, taken = slot.log_summary[top], ZERO
    slot.log_summary[top] = ZERO
    while groups != ZERO:
        s = sc * SUMMARY_WORDS + lowest_bit(groups)
        groups &= groups - ONE
        left = slot.log_summary[s]
        slot.log_summary[s] = ZERO
        while left != ZERO:
            i = (s << 6) + lowest_bit(left)
            left &= left - ONE
            bits = slot.log[i]
            protection[i] &= ~bits
            slot.log[i] = ZERO
            taken += popcount(bits)
    results[TAKEN] += np.int64(taken)


@kernel
def sync_chunks(
    begin: int, end: int, streams: Streams, slot: SlotView, block: BlockView, hits: Words, summary: Words,
    scratch: Words, counts: Ints, results: Ints,
) -> int:  # fmt: skip
    """Sync chunks [begin, end) of the block; the first one whose stores have to be made page by page, or `end`.

    The next chunk is drawn before this one is harvested, so that its words are on their way meanwhile.
    """
    drawn = begin < end and draw_chunk(begin, streams, slot, block, hits, summary, scratch)
    for chunk in range(begin, end):
        if drawn and not write_chunk(chunk, slot, block, hits, summary, counts):
            return chunk
        drawn = False
        if chunk + 1 < end:
            drawn = draw_chunk(chunk + 1, streams, slot, block, hits, summary, scratch)
            _expect(chunk + 1, slot, block)
        if _nothing(chunk, slot, block):
            block.clear_bmap[chunk] = slot.manual
            results[BITS] += min(CHUNK_PAGES, block.pages - chunk * CHUNK_PAGES)
        else:
            harvest_chunk(chunk, slot, block, results)
    return end


@inner
def _expect(chunk: int, slot: SlotView, block: BlockView) -> None:
    """Ask for the words that merging a chunk will touch, as far as its summaries know them."""
    sc = chunk - slot.offset
    w0, m0, s0 = sc * CHUNK_WORDS, chunk * CHUNK_WORDS, sc * SUMMARY_WORDS
    logged, marked = top_of(slot.log_summary, sc), top_of(block.bmap_summary, chunk)
    prefetch_words(slot.log_summary, s0, slot.log_summary[logged], slot.log, w0, block.bmap, m0)
    if block.bmap_summary[marked] != ZERO:
        prefetch_words(slot.log_summary, s0, slot.log_summary[logged], slot.known, w0, slot.known, w0)


@inner
def _nothing(chunk: int, slot: SlotView, block: BlockView) -> bool:
    """Is nothing of the chunk marked anywhere, and does nothing differ?"""
    sc = chunk - slot.offset
    full = slot.log_full[sc] | slot.known_full[sc] | block.bmap_full[chunk] | block.stale_full[chunk]
    some = slot.log_summary[top_of(slot.log_summary, sc)] | slot.known_summary[top_of(slot.known_summary, sc)]
    some |= block.bmap_summary[top_of(block.bmap_summary, chunk)]
    some |= block.stale_summary[top_of(block.stale_summary, chunk)]
    return bool(full == 0 and some == ZERO)


@kernel
def catch_up_chunks(
    begin: int, end: int, streams: Streams, slot: SlotView, block: BlockView, hits: Words, summary: Words,
    scratch: Words, counts: Ints,
) -> int:  # fmt: skip
    """Let the guest's writes to chunks [begin, end) happen; the first one to be stored page by page, or `end`."""
    for chunk in range(begin, end):
        if not catch_up_chunk(chunk, streams, slot, block, hits, summary, scratch, counts):
            return chunk
    return end
