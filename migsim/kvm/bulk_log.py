"""WordKernel's rules on a chunk (1 GiB) at a time: take bits, split what is huge, clear W or D, all as words.

The readable form is dirty_log.WordKernel with Mmu.enable_log_dirty_pt_masked; a stateful test holds the two equal. The
leaves of a slot lie in planes with the same index as its log, so re-arming is one AND-NOT for every root. Slots must
begin on a 2 MiB boundary, so that no word of the log straddles two huge pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from migsim.kvm.memslot import Memslot
from migsim.kvm.spte import PG_LEVEL_2M
from migsim.kvm.tdp_log import log_bit
from migsim.kvm.uapi import KVM_DIRTY_LOG_MANUAL_CAPS
from migsim.planes import ALL_ONES, Plane, Words
from migsim.units import CHUNK_PAGES, CHUNK_WORDS, REGION_PAGES, REGION_WORDS, WORD_BITS, words_of

if TYPE_CHECKING:
    from migsim.kvm.vm import Vm

BULK_MIN_PAGES = 32768  # 128 MiB; below it the words are looped over, which is as fast and can be watched


class BulkKernel:
    """A LogKernel (dirty_log.py) for large slots of the TDP MMU."""

    def __init__(self, vm: Vm, min_pages: int = BULK_MIN_PAGES) -> None:
        self._vm = vm
        self.min_pages = min_pages
        self._taken: Words = np.zeros(CHUNK_WORDS, dtype=np.uint64)
        self._kept: Words = np.zeros(CHUNK_WORDS, dtype=np.uint64)

    def suits(self, slot: Memslot) -> bool:
        """Can this slot be served, and does nobody want to see single steps (races, tracepoints)?"""
        vm = self._vm
        plain = vm.mmu.tdp_enabled and not len(vm.mmu.shadow.rmap)  # no nested guest's pages hang on the slot
        watched = vm.race_hook is not None or vm.trace_sink is not None
        return plain and not watched and slot.npages >= self.min_pages and slot.base_gfn % REGION_PAGES == 0

    def harvest(self, slot: Memslot, scratch: Words) -> bool:
        log = slot.dirty_bitmap
        assert log is not None, slot
        flush = False
        with self._vm.mmu_lock.write():
            for chunk in range(len(log.full)):
                log.settle(chunk)
                where = log.chunk_words(chunk)
                taken, live = scratch[where], log.words[where]
                taken[:] = live
                if taken.any():
                    live[:] = 0
                    self.protect(slot, where.start, taken)
                    flush = True
        return flush

    def clear(self, slot: Memslot, first_page: int, num_pages: int, mask: Words) -> bool:
        log = slot.dirty_bitmap
        assert log is not None, slot
        flush = False
        begin, end = first_page // WORD_BITS, first_page // WORD_BITS + words_of(num_pages)
        with self._vm.mmu_lock.write():
            for start in range(begin - begin % CHUNK_WORDS, end, CHUNK_WORDS):
                a, b = max(start, begin), min(start + CHUNK_WORDS, end)
                taken = self.take(log, a, mask[a - begin : b - begin])
                if taken is not None:
                    self.protect(slot, a, taken)
                    flush = True
        return flush

    def take(self, log: Plane, first_word: int, mask: Words) -> Words | None:
        """Take the live bits among `mask`, words of one chunk; None if there are none. Valid until the next call."""
        chunk, n = first_word // CHUNK_WORDS, len(mask)
        if log.full[chunk] and n == CHUNK_WORDS and (chunk + 1) * CHUNK_PAGES <= log.n and (mask == ALL_ONES).all():
            log.clear_range(chunk * CHUNK_PAGES, CHUNK_PAGES)  # all of a chunk that never had words
            return mask
        log.settle(chunk)
        live, taken = log.words[first_word : first_word + n], self._taken[:n]
        if not np.bitwise_and(mask, live, out=taken).any():
            return None
        live ^= taken
        return taken

    def protect(self, slot: Memslot, first_word: int, taken: Words) -> None:
        """Re-arm the pages of `taken`, words from `first_word` on, all of one chunk."""
        vm, state = self._vm, self._vm.mmu.state
        if vm.manual_dirty_log_protect == KVM_DIRTY_LOG_MANUAL_CAPS and self._any_huge():
            self.reach_4k(slot, first_word, taken)
        for root in state.roots.valid(slot.as_id):
            by_w = log_bit(state, root, wrprot=not vm.pml_enabled) == state.fmt.writable
            planes = root.leaf[slot.id]
            self.clear_words(planes.writable if by_w else planes.dirty, first_word, taken)

    def _any_huge(self) -> bool:
        """Is there a huge leaf anywhere? By the counters that each change of a leaf keeps (KVM's invariant 6)."""
        stats = self._vm.stats
        return stats.pages_2m > 0 or stats.pages_1g > 0

    def clear_words(self, plane: Plane, first_word: int, taken: Words) -> None:
        """plane &= ~taken, without writing memory where nothing is set."""
        plane.settle(first_word // CHUNK_WORDS)
        words, kept = plane.words[first_word : first_word + len(taken)], self._kept[: len(taken)]
        if words.any():
            np.bitwise_and(words, np.invert(taken, out=kept), out=words)

    def reach_4k(self, slot: Memslot, first_word: int, taken: Words) -> None:
        """INITIALLY_SET left huge pages alone: split those that hold a page of `taken`, or write-protect them."""
        mmu = self._vm.mmu
        eager = self._vm.config.eager_page_split and mmu.state.vintage.eager_split
        for first, end in region_runs(first_word, taken):
            start, stop = slot.base_gfn + first, min(slot.base_gfn + end, slot.end_gfn)
            if eager:
                mmu.tdp.split_slot(slot, start, stop)
            for gfn in () if eager else range(start, stop, REGION_PAGES):
                mmu.tdp.write_protect_gfn(slot, gfn, PG_LEVEL_2M)


def region_runs(first_word: int, taken: Words) -> Iterator[tuple[int, int]]:
    """(first page, end page) of each run of neighbouring 2 MiB regions that hold a bit of `taken`."""
    lead = first_word % REGION_WORDS
    padded = np.zeros(-(-(lead + len(taken)) // REGION_WORDS) * REGION_WORDS, dtype=np.uint64)
    padded[lead : lead + len(taken)] = taken
    hit = np.flatnonzero(padded.reshape(-1, REGION_WORDS).any(axis=1))
    base = (first_word - lead) * WORD_BITS
    for run in np.split(hit, np.flatnonzero(np.diff(hit) != 1) + 1):
        yield base + int(run[0]) * REGION_PAGES, base + (int(run[-1]) + 1) * REGION_PAGES
