"""KVM's rules on 64 pages at once: stores, protection, harvest. numba kernels over the planes of one memslot.

The page-at-a-time form of the same rules is vcpu.py, page_fault.py, tdp_mmu.py and dirty_log.py; a property test
holds the two equal. All words must be settled, all pages mapped at 4K (a level-1 table is there and every leaf is
present), and the slot logged; whoever calls sees to that. Nothing here knows of time or cost: it counts.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from migsim.planes import Words
from migsim.words import ONE, ONES, ZERO, lowest_bit, popcount

Ints = NDArray[np.int64]

# Indices into the int64 vector of counts the kernels add to.
PF_FAST, PML_LOGGED, REARMED, PF_FIXED, SPLITS, TABLES = range(6)
COUNTS_LEN = 6


@njit(cache=True, nogil=True, inline="always")
def _store_word(hit: np.uint64, log: Words, writable: Words, i: int) -> np.uint64:
    """A store to the pages of `hit` under write protection; the pages that faulted."""
    w = writable[i]
    fault = hit & ~w
    writable[i] = w | hit
    log[i] |= fault
    return popcount(fault)


@njit(cache=True, nogil=True)
def store_mapped(
    hits: Words, summary: Words, log: Words, log_summary: Words, writable: Words, w0: int, groups: int, counts: Ints
) -> None:
    """Guest stores to the pages of `hits` in a slot logged by write protection.

    A store to a page without W takes the fast page fault: W is set and the page is marked. One to a page with W goes
    through silently: it is marked already (kvm.md 3.5). D of these leaves is set since they were made. `summary` of
    `hits`, `log_summary` of `log`; `w0`: the first word in the planes; `groups`: 64-word groups.
    """
    fast = ZERO
    for g in range(groups):
        left = summary[g]
        log_summary[(w0 >> 6) + g] |= left
        if left == ONES:
            for i in range(g << 6, (g + 1) << 6):
                fast += _store_word(hits[i], log, writable, w0 + i)
        else:
            while left != ZERO:
                i = (g << 6) + lowest_bit(left)
                fast += _store_word(hits[i], log, writable, w0 + i)
                left &= left - ONE
    counts[PF_FAST] += np.int64(fast)


@njit(cache=True, nogil=True)
def store_writable_pml(
    hits: Words, summary: Words, log: Words, log_summary: Words, dirty: Words, w0: int, groups: int, counts: Ints
) -> None:
    """Guest stores in a slot logged by PML whose leaves all have W, as after an eager split.

    The CPU sets D and logs the page where D was clear. The buffers are drained before anybody looks at the log, so
    the entries are ORed into it at once. It is store_mapped with D for W, and counts log entries instead of faults.
    """
    before = counts[PF_FAST]
    store_mapped(hits, summary, log, log_summary, dirty, w0, groups, counts)
    counts[PML_LOGGED] += counts[PF_FAST] - before
    counts[PF_FAST] = before


@njit(cache=True, nogil=True)
def store_mapped_pml(
    hits: Words, summary: Words, log: Words, log_summary: Words, writable: Words, dirty: Words, w0: int, groups: int,
    counts: Ints,
) -> None:  # fmt: skip
    """The same where some leaves lack W (split from a write-protected huge page): the fast page fault comes first."""
    store_mapped(hits, summary, log, log_summary, writable, w0, groups, counts)
    store_writable_pml(hits, summary, log, log_summary, dirty, w0, groups, counts)


@njit(cache=True, nogil=True, inline="always")
def _rearm_word(mask: np.uint64, log: Words, protection: Words, i: int) -> np.uint64:
    """Take `mask`'s bits that are set in the log and protect those pages."""
    taken = mask & log[i]
    log[i] &= ~taken
    protection[i] &= ~taken
    return popcount(taken)


@njit(cache=True, nogil=True)
def rearm(
    mask: Words, mask_summary: Words, m0: int, log: Words, protection: Words, w0: int, groups: int, counts: Ints
) -> int:
    """Take the bits of `mask` that are set in the log, and re-arm just those pages (kvm.md 3.6, 3.7).

    `protection` is the W plane (write protection) or the D plane (PML). `m0`, `w0`: the first words in the mask and
    in the planes. Returns the pages re-armed. The log's summary may keep bits of words that are now zero.
    """
    taken = ZERO
    for g in range(groups):
        left = mask_summary[(m0 >> 6) + g]
        if left == ONES:
            for i in range(g << 6, (g + 1) << 6):
                taken += _rearm_word(mask[m0 + i], log, protection, w0 + i)
        else:
            while left != ZERO:
                i = (g << 6) + lowest_bit(left)
                taken += _rearm_word(mask[m0 + i], log, protection, w0 + i)
                left &= left - ONE
    counts[REARMED] += np.int64(taken)
    return int(taken)
