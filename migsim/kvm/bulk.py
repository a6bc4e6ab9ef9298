"""KVM's rules on 64 pages at once: stores, protection, harvest. numba kernels over the planes of one memslot.

The page-at-a-time form of the same rules is vcpu.py, page_fault.py, tdp_mmu.py and dirty_log.py; a property test
holds the two equal. The slot is logged, and what a store needs above level 1 is there; whoever calls sees to that.
`store_faulting` is the whole rule of a store; the other kernels are its common cases, and ask for settled words and
pages that are all mapped at 4K. Nothing here knows of time or cost: it counts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from migsim.jit import kernel
from migsim.planes import SUMMARY_WORDS, Flags, Words
from migsim.units import CHUNK_WORDS
from migsim.words import ONE, ONES, ZERO, bits_from, dense_run, lowest_bit, popcount, raise_word, top_of

Ints = NDArray[np.int64]

# Indices into the int64 vector of counts the kernels add to.
# MAPPED: of the slow faults, those that mapped a page that was not. HOLDS: of mmu_lock, by CLEAR. WALKS: rmap heads
# that CLEAR looked up for huge pages.
PF_FAST, PML_LOGGED, REARMED, PF_FIXED, MAPPED, FLUSHES, HOLDS, WALKS = range(8)
COUNTS_LEN = 8

# What an entry of a level-2 table is to a store below it.
EMPTY, TABLE, HUGE, HUGE_WRITABLE = range(4)


class Leaves(NamedTuple):
    """4K leaves of a slot as planes, see leaf_planes.LeafPlanes; `region`: uint8 a 2 MiB of the slot, as above."""

    region: Flags
    present: Words
    present_full: Flags
    writable: Words
    writable_full: Flags
    dirty: Words
    dirty_full: Flags
    accessed: Words
    accessed_full: Flags
    locked: Words  # not MMU-writable
    locked_full: Flags


@kernel
def _store_word(hit: np.uint64, log: Words, writable: Words, i: int) -> np.uint64:
    """A store to the pages of `hit` under write protection; the pages that faulted."""
    w = writable[i]
    fault = hit & ~w
    writable[i] = w | hit
    log[i] |= fault
    return popcount(fault)


@kernel
def _store_run(hits: Words, log: Words, writable: Words) -> np.uint64:
    """_store_word over whole arrays, as vector code."""
    fast = ZERO
    for i in range(min(len(hits), len(log))):
        hit, w = hits[i], writable[i]
        fault = hit & ~w
        writable[i] = w | hit
        log[i] |= fault
        fast += popcount(fault)
    return fast


@kernel
def store_mapped(
    hits: Words, summary: Words, log: Words, log_summary: Words, writable: Words, w0: int, counts: Ints
) -> None:
    """Guest stores to the pages of `hits` in a slot logged by write protection.

    A store to a page without W takes the fast page fault: W is set and the page is marked. One to a page with W goes
    through silently: it is marked already. D of these leaves is set since they were made. `summary` of
    `hits`, `log_summary` of `log`; `w0`: the chunk's first word in the planes.
    """
    fast, groups, s0 = ZERO, summary[SUMMARY_WORDS], w0 >> 6
    log_summary[top_of(log_summary, w0 >> 12)] |= groups
    while groups != ZERO:
        g = lowest_bit(groups)
        run = dense_run(summary, g, SUMMARY_WORDS)
        if run > g:
            first, stop = w0 + (g << 6), w0 + (run << 6)
            fast += _store_run(hits[g << 6 : run << 6], log[first:stop], writable[first:stop])
            for full in range(g, run):
                log_summary[s0 + full] |= summary[full]
            groups &= bits_from(run)
            continue
        groups &= groups - ONE
        left = summary[g]
        log_summary[s0 + g] |= left
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            fast += _store_word(hits[i], log, writable, w0 + i)
            left &= left - ONE
    counts[PF_FAST] += np.int64(fast)


@kernel
def store_writable_pml(
    hits: Words, summary: Words, log: Words, log_summary: Words, dirty: Words, w0: int, counts: Ints
) -> None:
    """Guest stores in a slot logged by PML whose leaves all have W, as after an eager split.

    The CPU sets D and logs the page where D was clear. The buffers are drained before anybody looks at the log, so
    the entries are ORed into it at once. It is store_mapped with D for W, and counts log entries instead of faults.
    """
    before = counts[PF_FAST]
    store_mapped(hits, summary, log, log_summary, dirty, w0, counts)
    counts[PML_LOGGED] += counts[PF_FAST] - before
    counts[PF_FAST] = before


@kernel
def store_mapped_pml(
    hits: Words, summary: Words, log: Words, log_summary: Words, writable: Words, dirty: Words, w0: int, counts: Ints
) -> None:
    """The same where some leaves lack W but are MMU-writable (split by a fault from a huge page that enabling the log
    had write-protected): the fast page fault comes first. What CLEAR protected for INITIALLY_SET is not MMU-writable.
    """
    store_mapped(hits, summary, log, log_summary, writable, w0, counts)
    store_writable_pml(hits, summary, log, log_summary, dirty, w0, counts)


@kernel
def has_tables(hits: Words, summary: Words, region: Flags, w0: int) -> bool:
    """Can the stores to `hits` go on below level 2: a level-1 table, or a huge page with W, in every region hit?"""
    groups = summary[SUMMARY_WORDS]
    while groups != ZERO:
        g = lowest_bit(groups)
        groups &= groups - ONE
        left = summary[g]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            state = region[(w0 + i) >> 3]
            if hits[i] != ZERO and state != TABLE and state != HUGE_WRITABLE:
                return False
    return True


@kernel
def store_faulting(
    hits: Words, summary: Words, log: Words, log_summary: Words, leaves: Leaves, chunk: int, pml: bool,
    fast_path: bool, all_marked: bool, counts: Ints,
) -> None:  # fmt: skip
    """Guest stores to any pages of a chunk whose regions are as has_tables wants them; log and `locked` are settled.

    `all_marked`: the chunk of the log is lazily full instead, and stays so.
    A huge page with W takes a store silently: every page below it is marked. Else a store faults where W is clear.
    The fast path gives W back to leaves that are present and MMU-writable; the slow one makes a new leaf (present, W,
    D, A, MMU-writable). Both mark. Then the CPU sets D, and PML logs the page if D was clear.
    """
    w0, v = chunk * CHUNK_WORDS, leaves
    all_present, all_writable = v.present_full[chunk] != 0, v.writable_full[chunk] != 0
    all_dirty, all_accessed = v.dirty_full[chunk] != 0, v.accessed_full[chunk] != 0
    some_locked = len(v.locked_full) > 0
    groups = summary[SUMMARY_WORDS]
    while groups != ZERO:
        g = lowest_bit(groups)
        groups &= groups - ONE
        left = summary[g]
        while left != ZERO:
            i = (g << 6) + lowest_bit(left)
            left &= left - ONE
            at, hit = w0 + i, hits[i]
            if v.region[at >> 3] == HUGE_WRITABLE:
                continue
            missing = ZERO if all_writable else hit & ~v.writable[at]
            slow = ZERO
            if missing != ZERO:
                present = ONES if all_present else v.present[at]
                fixable = present & ~v.locked[at] if some_locked else present
                fast = missing & fixable if fast_path else ZERO
                slow = missing & ~fast
                v.writable[at] |= missing
                counts[PF_FAST] += np.int64(popcount(fast))
                counts[PF_FIXED] += np.int64(popcount(slow))
                counts[MAPPED] += np.int64(popcount(slow & ~present))
                if not all_present:
                    v.present[at] |= slow
                if not all_accessed:
                    v.accessed[at] |= slow
                if some_locked:
                    v.locked[at] &= ~slow
            clean = ZERO if all_dirty else hit & ~v.dirty[at] & ~slow
            if not all_dirty:
                v.dirty[at] |= hit
            if pml:
                counts[PML_LOGGED] += np.int64(popcount(clean))
                missing |= clean
            if missing != ZERO and not all_marked:
                log[at] |= missing
                raise_word(log_summary, at)


@kernel
def _rearm_word(mask: np.uint64, log: Words, protection: Words, i: int) -> np.uint64:
    """Take `mask`'s bits that are set in the log and protect those pages."""
    taken = mask & log[i]
    log[i] &= ~taken
    protection[i] &= ~taken
    return popcount(taken)


@kernel
def _rearm_run(mask: Words, log: Words, protection: Words) -> np.uint64:
    """_rearm_word over whole arrays: views that begin at 0 are what the compiler turns into vector code."""
    taken = ZERO
    for i in range(min(len(mask), len(log))):
        bits = mask[i] & log[i]
        log[i] &= ~bits
        protection[i] &= ~bits
        taken += popcount(bits)
    return taken


@kernel
def rearm(
    mask: Words, mask_summary: Words, m0: int, log: Words, protection: Words, w0: int, chunks: int, counts: Ints
) -> int:
    """Take the bits of `mask` that are set in the log, and re-arm just those pages.

    `protection` is the W plane (write protection) or the D plane (PML). `m0`, `w0`: the first words in the mask and
    in the planes, each the first of a chunk; `chunks`: how many. Returns the pages re-armed. The log's summary may
    keep bits of words that are now zero.
    """
    taken, shift = ZERO, w0 - m0
    for chunk in range(m0 >> 12, (m0 >> 12) + chunks):
        s0 = chunk * SUMMARY_WORDS
        groups = mask_summary[top_of(mask_summary, chunk)]
        while groups != ZERO:
            g = lowest_bit(groups)
            run = dense_run(mask_summary, s0 + g, s0 + SUMMARY_WORDS) - s0
            if run > g:
                first, stop = (s0 + g) << 6, (s0 + run) << 6
                at = slice(shift + first, shift + stop)
                taken += _rearm_run(mask[first:stop], log[at], protection[at])
                groups &= bits_from(run)
                continue
            groups &= groups - ONE
            left = mask_summary[s0 + g]
            while left != ZERO:
                i = ((s0 + g) << 6) + lowest_bit(left)
                taken += _rearm_word(mask[i], log, protection, shift + i)
                left &= left - ONE
    counts[REARMED] += np.int64(taken)
    counts[FLUSHES] += np.int64(taken != ZERO)
    return int(taken)
