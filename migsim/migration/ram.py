"""RAM as QEMU's migration code keeps it: bitmaps a block, the lazy CLEAR a chunk, the scan that never starts over.

Stations 7 and 8 on the path of a dirty page. `Ram` drives KVM through the ioctls alone and reads one step after the
other; `migsim.fused` does the same to a 12 TiB guest in fewer visits, and a test holds the two equal. The order of
the three steps of sending is the law: clear the chunk in KVM, clear the page's own bit, then read the page. Clearing
late loses writes; clearing early costs a page sent twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from migsim.guest.memory import GuestMemory, RamBlock
from migsim.migration import marked
from migsim.migration.ram_kernels import (
    DUPLICATE,
    ELAPSED_PS,
    END_OF_SPAN,
    NORMAL,
    STATE_LEN,
    USED,
    Ints,
    merge_span,
    must_stop,
    next_dirty,
    save_span,
)
from migsim.planes import Plane, Words, summary_of_ones
from migsim.units import CHUNK_PAGES, PAGE_SIZE, words_of

PS_PER_NS = 1000


class DirtyLog(Protocol):
    """The ioctls QEMU's migration code uses (a subset of kvm.ioctl's Vm)."""

    def get_dirty_log(self, slot: int, dirty_bitmap: Words | None) -> None:
        """KVM_GET_DIRTY_LOG."""

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty_bitmap: Words | None) -> None:
        """KVM_CLEAR_DIRTY_LOG."""


@dataclass(frozen=True)
class SaveCosts:
    """What QEMU's migration thread pays, in picoseconds, and what it puts on the wire, in bytes, for a page."""

    normal_ps: int
    zero_ps: int
    word_ps: int  # looking at 64 bits of the bitmap
    clear_ps: int  # one CLEAR ioctl
    clear_page_ps: int  # and each page it re-arms
    normal_bytes: int
    zero_bytes: int
    clear_stopped_ps: int | None = None  # one CLEAR with every vCPU out of the guest; None: as ever
    clear_leaf_ps: int = 0  # and each of these that a 4K leaf maps
    clear_table_ps: int = 0  # each table a CLEAR splits a huge page into
    get_ps: int = 0  # one GET that re-arms, without manual protection, beyond copying the bitmap
    get_page_ps: int = 0  # and each page it re-arms


@dataclass
class KvmSlot:
    """QEMU's KVMSlot: one memslot of a block and the bitmap of its last GET, of which CLEAR may clear no more."""

    id: int
    first: int  # page of the block
    pages: int
    dirty_bmap: Words


@dataclass
class BlockState:
    """RAMBlock.bmap and clear_bmap, and the memslots behind the block."""

    block: RamBlock
    bmap: Plane
    bmap_summary: Words  # of its words, see migsim.words
    clear_bmap: np.ndarray[tuple[int], np.dtype[np.uint8]]
    slots: list[KvmSlot] = field(default_factory=list)


class Saved(NamedTuple):
    """What one call of ram_save_iterate did."""

    normal: int
    duplicate: int
    page_bytes: int
    elapsed_ps: int
    why: int  # END_OF_SPAN: nothing dirty is left
    channel_bytes: int = 0  # of page_bytes, on multifd's channels
    packed: int = 0  # pages of data that count as neither: deflated by a thread
    missed_zero_copy: int = 0  # flushes of channels that found the kernel had copied


class SaveLimits(NamedTuple):
    """When to stop sending: before the next page once `bytes` are exceeded, or after `ps` (looked at each 64 pages)."""

    bytes: int
    ps: int


NO_LIMITS = SaveLimits(1 << 62, 1 << 62)


class Ram:
    """RAMState over the blocks of one guest.

    `slot_ids[b][k]` is the KVM slot id of block b's k-th range. `lazy_clear`: KVM has manual dirty-log protection, so
    GET only copies and CLEAR re-arms. `tick(elapsed_ps)` tells the world how far into the present call time has come,
    so that what the guest wrote until then is in KVM's log before the ioctl that follows.
    """

    def __init__(
        self,
        memory: GuestMemory,
        kvm: DirtyLog,
        slot_ids: list[list[int]],
        costs: SaveCosts,
        lazy_clear: bool,
        tick: Callable[[int], None],
        with_bitmaps: bool = True,
    ) -> None:
        self.vcpus_stopped = False
        self.memory, self.kvm, self.costs, self.lazy_clear, self.tick = memory, kvm, costs, lazy_clear, tick
        self.blocks = [
            BlockState(
                block, Plane(block.pages, ones=True), summary_of_ones(block.pages),
                np.zeros(block.chunks, dtype=np.uint8),
                [
                    KvmSlot(slot_id, where.first, where.pages, _words(where.pages * with_bitmaps))
                    for slot_id, where in zip(ids, block.slots, strict=True)
                ],
            )  # fmt: skip
            for block, ids in zip(memory.blocks, slot_ids, strict=True)
        ]
        self.dirty_pages = memory.pages  # migration_dirty_pages
        self.block_index = self.page = 0  # where the scan stands: last_seen_block, last_page
        self.spent_ps = 0  # of the present call, before the part this object is asked for (multifd, xbzrle)
        self.last_sent_block = -1  # the stream names a block only when it changes
        self.names_blocks = True  # not where pages go to places of their own (mapped-ram)
        self.first_pages = 0  # pages of data sent with their block's name
        self.rearmed_pages = self.rearmed_leaves = self.clear_calls = self.split_in_clear = 0
        # What KVM did, for the price: 4K leaves of (slot, first page, pages); tables split off huge pages so far
        self.leaves_in: Callable[[int, int, int], int] = lambda slot_id, first, pages: pages
        self.harvests = self.harvested_pages = 0  # GETs without manual protection that took a bit, and their bits
        self.split_tables: Callable[[], int] = lambda: 0

    @property
    def total_bytes(self) -> int:
        """query-migrate's ram.total: used length of all blocks."""
        return self.memory.pages * PAGE_SIZE

    @property
    def costs(self) -> SaveCosts:
        """What a page and a CLEAR cost now."""
        return self._costs

    @costs.setter
    def costs(self, costs: SaveCosts) -> None:
        stopped_ps = costs.clear_stopped_ps
        cheaper = self.vcpus_stopped and stopped_ps is not None
        self._costs = replace(costs, clear_ps=stopped_ps) if cheaper and stopped_ps is not None else costs

    def stop_vcpus(self) -> None:
        """The vCPUs are out of the guest: from here on a CLEAR needs no kick."""
        self.vcpus_stopped = True
        self.costs = self._costs

    def enter_last_stage(self) -> None:
        """RAMState.last_stage: nothing here depends on it."""

    def update_rates(self) -> None:
        """A period of statistics ends: nothing here is a rate."""

    def reply(self) -> dict[str, Any]:
        """What it adds to query-migrate: nothing."""
        return {}

    def clear_ps(self) -> int:
        """Time of all CLEARs so far, at the present price."""
        c = self.costs
        pages_ps = self.rearmed_pages * c.clear_page_ps + self.rearmed_leaves * c.clear_leaf_ps
        pages_ps += self.split_in_clear * c.clear_table_ps
        return self.clear_calls * c.clear_ps + pages_ps

    def get_ps(self) -> int:
        """Time of all GETs that re-armed, so far and at the present price; nothing with manual protection."""
        return self.harvests * self.costs.get_ps + self.harvested_pages * self.costs.get_page_ps

    def dirty_runs(self) -> int:
        """Ranges of consecutive dirty pages, counted block by block."""
        return sum(marked.runs(state.bmap) for state in self.blocks)

    def round_out(self, host_page: int) -> None:
        """Post-copy places whole host pages: one with a dirty page is dirty altogether (postcopy_chunk_hostpages)."""
        for state in self.blocks:
            if state.slots and host_page > 1:
                self.dirty_pages += marked.round_out(state.bmap, state.bmap_summary, host_page)

    def enter_postcopy(self) -> None:
        """Every page goes out here by itself anyway."""

    def dirty_between(self, first: int, end: int) -> int:
        """How many of the guest pages [first, end) are marked now."""
        total = 0
        for state in self.blocks:
            base = state.block.first_page
            total += marked.between(state.bmap, max(first - base, 0), min(end - base, state.block.pages))
        return total

    # -- sync (migration_bitmap_sync) --------------------------------------------------------------------------------

    def sync(self) -> int:
        """Fetch KVM's log of every slot and merge it; how many pages became dirty that were not."""
        new = 0
        for state in self.blocks:
            for slot in state.slots:
                self._log_sync(slot)
                new += self._merge(state, slot)
            if self.lazy_clear:
                state.clear_bmap[:] = 1
        self.dirty_pages += new
        return new

    def _log_sync(self, slot: KvmSlot) -> None:
        self.kvm.get_dirty_log(slot.id, slot.dirty_bmap)
        if not self.lazy_clear:
            self.count_harvest(int(np.bitwise_count(slot.dirty_bmap).sum()))

    def count_harvest(self, taken: int) -> None:
        """A GET without manual protection took `taken` bits and re-armed their pages."""
        self.harvests, self.harvested_pages = self.harvests + (taken > 0), self.harvested_pages + taken

    def _merge(self, state: BlockState, slot: KvmSlot) -> int:
        state.bmap.settle_range(slot.first, slot.pages)
        known = slot.dirty_bmap
        return merge_span(state.bmap.words, state.bmap_summary, slot.first >> 6, known, 0, len(known))

    # -- save (ram_save_iterate, ram_save_complete) ------------------------------------------------------------------

    def save(self, limits: SaveLimits) -> Saved:
        """Send dirty pages from where the scan stands, wrapping round, until a limit or until none is left.

        The search behind the last one runs to the block's end, and the next call starts there (last_page). Only once
        it has been round all of RAM does it give up (PAGE_ALL_CLEAN): at 12 TiB that takes tens of ms.
        """
        vector = np.zeros(STATE_LEN, dtype=np.int64)
        why = END_OF_SPAN
        while (self.dirty_pages or self.page) and why == END_OF_SPAN:
            why = self._save_next(vector, limits)
        if why == END_OF_SPAN:
            vector[ELAPSED_PS] += self.round_ps
        return Saved(
            int(vector[NORMAL]), int(vector[DUPLICATE]), int(vector[USED]), int(vector[ELAPSED_PS]), why
        )

    @property
    def round_ps(self) -> int:
        """What the search takes to go once round all blocks' bitmaps."""
        return sum(words_of(state.block.pages) for state in self.blocks) * self.costs.word_ps

    def _save_next(self, vector: Ints, limits: SaveLimits) -> int:
        """Find the next dirty page and send what its chunk holds from there on; why it stopped."""
        state = self.blocks[self.block_index]
        found = self._next_dirty(state, vector)
        if found < 0:
            self.block_index, self.page = (self.block_index + 1) % len(self.blocks), 0
            return END_OF_SPAN
        self.page = found
        why = int(must_stop(vector, limits.bytes, limits.ps))  # QEMU looks before it clears the chunk
        if why != END_OF_SPAN:
            return why
        self.name_block(vector, found)
        why = int(must_stop(vector, limits.bytes, limits.ps))
        return why if why != END_OF_SPAN else self._save_chunk(state, found, limits, vector)

    def name_block(self, vector: Ints, page: int) -> None:
        """The first page after one of another block carries the block's name."""
        if self.last_sent_block != self.block_index:
            self.last_sent_block = self.block_index
            self.first_pages += not self.blocks[self.block_index].block.zero.get(page)
            vector[USED] += self.names_blocks and 1 + len(self.blocks[self.block_index].block.idstr)

    def _next_dirty(self, state: BlockState, vector: Ints) -> int:
        """The first dirty page of the block from `self.page` on, or -1."""
        bmap, end, word_ps = state.bmap, state.block.pages, self.costs.word_ps
        return int(next_dirty(bmap.words, state.bmap_summary, bmap.full, self.page, end, word_ps, vector))

    def _save_chunk(self, state: BlockState, page: int, limits: SaveLimits, vector: Ints) -> int:
        chunk = page // CHUNK_PAGES
        # 1. clear the chunk in KVM: from here on a write to it is logged again
        if self.lazy_clear and state.clear_bmap[chunk]:
            state.clear_bmap[chunk] = 0
            self.tick(int(vector[ELAPSED_PS]))
            vector[ELAPSED_PS] += self.clear_chunk(state, chunk)
        # 2. clear each page's own bit, 3. read and send it
        return self.send_chunk(state, page, limits, vector)

    def clear_chunk(self, state: BlockState, chunk: int) -> int:
        """kvm_log_clear for one chunk: CLEAR in every memslot it overlaps, of the bits the last GET showed.

        Returns what it cost in ps.
        """
        first, end = chunk * CHUNK_PAGES, chunk * CHUNK_PAGES + state.block.chunk_pages(chunk)
        cost = 0
        for slot in state.slots:
            start, stop = max(first, slot.first) - slot.first, min(end, slot.first + slot.pages) - slot.first
            if start >= stop:
                continue
            known = slot.dirty_bmap[start >> 6 : words_of(stop)]
            count, before = int(np.bitwise_count(known).sum()), self.split_tables()
            self.kvm.clear_dirty_log(slot.id, start, stop - start, known)
            known[:] = 0
            self.clear_calls, self.rearmed_pages = self.clear_calls + 1, self.rearmed_pages + count
            split = self.split_tables() - before
            # Where not every page was marked, those that were have been written, and 4K leaves map them.
            leaves = self.leaves_in(slot.id, start, count) if count == stop - start else count
            self.split_in_clear, self.rearmed_leaves = self.split_in_clear + split, self.rearmed_leaves + leaves
            c = self.costs
            cost += c.clear_ps + count * c.clear_page_ps + leaves * c.clear_leaf_ps + split * c.clear_table_ps
        return cost

    def send_chunk(self, state: BlockState, page: int, limits: SaveLimits, vector: Ints) -> int:
        """Send the dirty pages of one chunk from `page` on; why it stopped."""
        block, costs = state.block, self.costs
        chunk = page // CHUNK_PAGES
        has_zero = bool(block.zero.full[chunk]) or bool(block.zero.words[block.zero.chunk_words(chunk)].any())
        for plane in (state.bmap, block.stale, block.zero) if has_zero else (state.bmap, block.stale):
            plane.settle(chunk)
        before = vector[NORMAL] + vector[DUPLICATE]
        end = chunk * CHUNK_PAGES + block.chunk_pages(chunk)
        self.page, why = save_span(
            state.bmap.words, state.bmap_summary, block.stale.words, block.zero.words, has_zero, page, end,
            costs.normal_bytes, costs.zero_bytes, limits.bytes, costs.normal_ps, costs.zero_ps, costs.word_ps,
            limits.ps, vector,
        )  # fmt: skip
        self.dirty_pages -= int(vector[NORMAL] + vector[DUPLICATE] - before)
        if self.page >= block.pages:
            self.block_index, self.page = (self.block_index + 1) % len(self.blocks), 0
        return int(why)


def _words(pages: int) -> Words:
    return np.zeros(words_of(pages), dtype=np.uint64)
