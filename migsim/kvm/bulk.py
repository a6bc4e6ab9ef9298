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
from migsim.words import ZERO, popcount

Ints = NDArray[np.int64]

# Indices into the int64 vector of counts the kernels add to.
PF_FAST, PML_LOGGED, REARMED, PF_FIXED, SPLITS, TABLES = range(6)
COUNTS_LEN = 6


@njit(cache=True, nogil=True)
def store_mapped(
    hits: Words, log: Words, writable: Words, w0: int, n_words: int, counts: Ints
) -> None:
    """Guest stores to the pages of `hits` in a slot logged by write protection.

    A store to a page without W takes the fast page fault: W is set and the page is marked. One to a page with W goes
    through silently: it is marked already (kvm.md 3.5). D of these leaves is set since they were made.
    """
    fast = ZERO
    for i in range(n_words):
        hit = hits[i]
        w = writable[w0 + i]
        fault = hit & ~w
        fast += popcount(fault)
        writable[w0 + i] = w | hit
        log[w0 + i] |= fault
    counts[PF_FAST] += np.int64(fast)


@njit(cache=True, nogil=True)
def store_writable_pml(hits: Words, log: Words, dirty: Words, w0: int, n_words: int, counts: Ints) -> None:
    """store_mapped_pml where every leaf has W, as after an eager split."""
    logged = ZERO
    for i in range(n_words):
        d = dirty[w0 + i]
        new = hits[i] & ~d
        logged += popcount(new)
        dirty[w0 + i] = d | new
        log[w0 + i] |= new
    counts[PML_LOGGED] += np.int64(logged)


@njit(cache=True, nogil=True)
def store_mapped_pml(
    hits: Words, log: Words, writable: Words, dirty: Words, w0: int, n_words: int, counts: Ints
) -> None:
    """Guest stores in a slot logged by PML: the CPU sets D and logs the page where D was clear.

    The buffers are drained before anybody looks at the log, so the entries are ORed into it at once. A leaf without
    W (split from a write-protected huge page) takes the fast page fault first.
    """
    fast = logged = ZERO
    for i in range(n_words):
        hit = hits[i]
        w, d = writable[w0 + i], dirty[w0 + i]
        fault, new = hit & ~w, hit & ~d
        fast += popcount(fault)
        logged += popcount(new)
        writable[w0 + i] = w | hit
        dirty[w0 + i] = d | hit
        log[w0 + i] |= fault | new
    counts[PF_FAST] += np.int64(fast)
    counts[PML_LOGGED] += np.int64(logged)


@njit(cache=True, nogil=True)
def rearm(mask: Words, m0: int, log: Words, protection: Words, w0: int, n_words: int, counts: Ints) -> None:
    """Take the bits of `mask` that are set in the log, and re-arm just those pages (kvm.md 3.6, 3.7).

    `protection` is the W plane (write protection) or the D plane (PML).
    """
    taken = ZERO
    for i in range(n_words):
        t = mask[m0 + i] & log[w0 + i]
        log[w0 + i] &= ~t
        protection[w0 + i] &= ~t
        taken += popcount(t)
    counts[REARMED] += np.int64(taken)
