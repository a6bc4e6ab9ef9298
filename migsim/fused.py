"""A 12 TiB guest's RAM in a couple of visits a chunk: `Ram` with its loops fused over KVM, guest and QEMU.

The readable form is migration.ram over kvm.vm: observe, GET, merge; CLEAR, clear the bit, read the page. Here the same
steps, in the same order, run chunk by chunk inside numba, so that a chunk's planes are in the cache for all of them.
It sits above both sides because it has to see both; nothing it does could not be done through the ioctls, and a test
holds its results equal to theirs, byte for byte. What lies above the 4K leaves the kernels hand back: huge pages that
a CLEAR or a store meets, tables that are missing; and a phase of the workload that begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import numpy as np

from migsim.fused_kernels import catch_up_chunks, harvest_chunk, store_chunk, sync_chunks
from migsim.fused_send import close_chunk, send_pages, taken_words
from migsim.fused_slots import Extent, LoggedSlot, any_zero
from migsim.fused_views import (
    BITS,
    CLEAR_CALLS,
    FIRST_LOST,
    LEAVES,
    LOST,
    NEED_4K,
    NEED_CLOCK,
    NEED_TABLES,
    NEW,
    NOW_NS,
    REARMED_PAGES,
    RESULTS_LEN,
    TABLES,
    TAKEN,
    BlockView,
    Costs,
    Ints,
    SlotView,
    Streams,
)
from migsim.guest.workload import Workload
from migsim.kvm.bulk import COUNTS_LEN
from migsim.migration.ram import BlockState, KvmSlot, Ram, SaveCosts, Saved, SaveLimits
from migsim.migration.ram_kernels import (
    DUPLICATE,
    ELAPSED_PS,
    END_OF_SPAN,
    NORMAL,
    STATE_LEN,
    USED,
    must_stop,
    next_dirty,
)
from migsim.planes import SUMMARY_WORDS, Flags, Plane, Words, new_summary, summarise, summary_of_ones
from migsim.units import CHUNK_PAGES, CHUNK_WORDS, chunks_of
from migsim.words import entry_of, top_of

NEVER_NS = 1 << 62


class FusedRam(Ram):
    """`Ram` of a big guest. Same arguments, and KVM's planes (`kvm_slots[b][k]`), the workload and threads besides."""

    def __init__(
        self,
        base: Ram,
        kvm_slots: Callable[[], Sequence[Sequence[LoggedSlot]]],
        workload: Workload,
        now_ns: Callable[[], int],
        threads: int,
        verify: bool,
    ) -> None:
        super().__init__(
            base.memory, base.kvm, [[s.id for s in state.slots] for state in base.blocks], base.costs,
            base.lazy_clear, base.tick, with_bitmaps=False,
        )  # fmt: skip
        self.workload, self.call_ns, self.threads = workload, now_ns, threads
        self.results = np.zeros(RESULTS_LEN, dtype=np.int64)
        self.results[FIRST_LOST] = -1
        w = workload
        self.streams = Streams(w.law, w.first, w.end, w.clock, w.rate, w.seen, w.visits, w.seed_key)
        self._kvm_slots, self._verify = kvm_slots, verify
        self._extents: list[list[Extent]] = []
        self._send_pages: Callable[..., tuple[int, int]] = send_pages
        self._sync_chunks: Callable[..., int] = sync_chunks
        self._state = np.zeros(STATE_LEN, dtype=np.int64)  # of one call of save
        self._counts = np.zeros(COUNTS_LEN, dtype=np.int64)  # of one call of the kernel that sends
        self._costs_now: tuple[SaveCosts, Costs] | None = None
        self._open_chunks = {state.block.idstr: np.array([-1, 0]) for state in self.blocks}
        self.scratch = [(_buffer(), new_summary(CHUNK_PAGES), _buffer()) for _ in range(threads)]
        self.lock = Lock()
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    @property
    def extents(self) -> list[list[Extent]]:
        """By block; the log's planes exist once logging has started, so they are looked up at the first sync."""
        if not self._extents:
            sides = zip(self.blocks, self._kvm_slots(), strict=True)
            self._extents = [
                [self._extent(state, at, kvm) for at, kvm in zip(state.slots, side, strict=True)]
                for state, side in sides
            ]
        return self._extents

    def _extent(self, state: BlockState, at: KvmSlot, kvm: LoggedSlot) -> Extent:
        first, pages, verify = at.first, at.pages, self._verify
        assert first % CHUNK_PAGES == 0, "a memslot that starts inside a chunk needs the readable Ram"
        block, bmap = state.block, state.bmap
        truth = block.stale if verify else bmap
        known = Plane(pages, ones=True)  # nothing is known before the first GET; lazily full costs nothing to drop
        sums = [new_summary(pages) for _ in range(2)]
        summarise(kvm.log.words, sums[0])
        truth_sum = summary_of_ones(block.pages) if verify else state.bmap_summary
        slot = SlotView(
            pages, first // CHUNK_PAGES, kvm.log.words, sums[0], kvm.log.full, kvm.leaves, kvm.tabled, kvm.reach,
            known.words, sums[1], known.full, _flags(pages), kvm.pml, kvm.fast_path, kvm.plain,
            kvm.silent, kvm.walks, self.lazy_clear,
        )  # fmt: skip
        view = BlockView(
            block.pages, block.first_page, block.first_chunk, bmap.words, state.bmap_summary, bmap.full,
            state.clear_bmap, truth.words, truth_sum, truth.full, block.zero.words, block.zero.full, any_zero(block),
            verify, self._open_chunks[state.block.idstr],
        )  # fmt: skip
        return Extent(kvm, slot, view, first, first + pages)

    def _close_chunks(self) -> None:
        for side in self.extents:
            for extent in side[:1]:
                close_chunk(extent.block)

    def round_out(self, host_page: int) -> None:
        """As Ram.round_out. What the last GET showed is written down first where the bitmap stood in for it."""
        self._close_chunks()
        for extent in (extent for side in self.extents for extent in side if host_page > 1):
            slot, block = extent.slot, extent.block
            for sc in np.flatnonzero(slot.known_is_bmap).tolist():
                chunk, words = sc + slot.offset, min(CHUNK_WORDS, len(slot.known) - sc * CHUNK_WORDS)
                if not block.bmap_full[chunk]:
                    here, there = chunk * CHUNK_WORDS, sc * CHUNK_WORDS
                    slot.known[there : there + words] = block.bmap[here : here + words]
                    here, there = chunk * SUMMARY_WORDS, sc * SUMMARY_WORDS
                    slot.known_summary[there : there + SUMMARY_WORDS] = block.bmap_summary[here : here + SUMMARY_WORDS]
                    top = block.bmap_summary[top_of(block.bmap_summary, chunk)]
                    slot.known_summary[top_of(slot.known_summary, sc)] = top
                    slot.known_is_bmap[sc] = 0
        super().round_out(host_page)

    def costs_now(self) -> Costs:
        """The kernels' form of the costs in force, made anew only when they have changed."""
        c = self.costs
        if self._costs_now is None or self._costs_now[0] is not c:
            self._costs_now = c, Costs(
                c.normal_ps, c.zero_ps, c.word_ps, c.clear_ps, c.clear_page_ps, c.normal_bytes, c.zero_bytes,
                c.clear_leaf_ps, c.clear_table_ps,
            )  # fmt: skip
        return self._costs_now[1]

    # -- sync --------------------------------------------------------------------------------------------------------

    def sync(self) -> int:
        """Every slot's GET and merge, chunk by chunk, over the threads; results do not depend on how many."""
        self._close_chunks()
        before = int(self.results[NEW])
        for side in self.extents:
            for extent in side:
                first, end = extent.first // CHUNK_PAGES, chunks_of(extent.end)
                edges = [first + (end - first) * i // self.threads for i in range(self.threads + 1)]
                jobs: list[Future[tuple[Ints, Ints]]] = []
                if self.pool is not None:
                    jobs = [
                        self.pool.submit(self._sync_part, extent, edges[i], edges[i + 1], i)
                        for i in range(self.threads)
                    ]
                parts = [job.result() for job in jobs] or [self._sync_part(extent, first, end, 0)]
                for counts, results in parts:
                    self._add(extent, counts, results)
                if not self.lazy_clear:
                    taken = sum(int(results[TAKEN]) for _, results in parts)
                    extent.kvm.harvested(taken)
                    self.count_harvest(taken)
        new = int(self.results[NEW]) - before
        self.dirty_pages += new
        return new

    def _sync_part(self, extent: Extent, begin: int, end: int, thread: int) -> tuple[Ints, Ints]:
        counts, results = np.zeros(COUNTS_LEN, dtype=np.int64), _results()
        hits, summary, scratch = self.scratch[thread]
        while begin < end:
            begin = int(
                self._sync_chunks(
                    begin, end, self.streams, extent.slot, extent.block, hits, summary, scratch, counts, results
                )
            )
            if begin < end:
                self._store_hits(extent, begin, hits, summary, counts)
                harvest_chunk(begin, extent.slot, extent.block, results)
                begin += 1
        if self._sync_chunks is sync_chunks:
            self._sync_chunks = entry_of(sync_chunks)
        return counts, results

    def _add(self, extent: Extent, counts: Ints, results: Ints) -> None:
        extent.kvm.count(counts)
        first_lost = self.results[FIRST_LOST]
        self.results += results
        found = results[FIRST_LOST]
        self.results[FIRST_LOST] = first_lost if first_lost >= 0 else found
        self._counted(self.results)

    def _counted(self, results: Ints) -> None:
        self.rearmed_pages, self.clear_calls = int(results[REARMED_PAGES]), int(results[CLEAR_CALLS])
        self.rearmed_leaves = int(results[LEAVES])

    def _store_hits(self, extent: Extent, chunk: int, hits: Words, summary: Words, counts: Ints) -> None:
        """The stores a kernel handed back, once there are tables for them."""
        in_slot = chunk - extent.slot.offset
        with self.lock:  # the tables are everybody's
            extent.kvm.make_tables(in_slot, hits, counts)
        assert store_chunk(in_slot, extent.slot, hits, summary, counts), f"no tables in {chunk}"

    def _reach_4k(self, extent: Extent, chunk: int) -> int:
        """What the CLEAR of a chunk is to do about huge pages before it re-arms; tables it made of them."""
        slot, block = extent.slot, extent.block
        in_slot = chunk - slot.offset
        taken = None
        if not (slot.known_full[in_slot] and slot.log_full[in_slot]):
            taken = np.zeros(CHUNK_WORDS, dtype=np.uint64)
            taken_words(in_slot, chunk, slot, block, taken)
        before = self.split_tables()
        extent.kvm.reach_4k(in_slot, taken)
        slot.reach[in_slot] *= 2  # done for this CLEAR, whatever is left
        split = self.split_tables() - before
        self.split_in_clear += split
        return split

    # -- save --------------------------------------------------------------------------------------------------------

    def save(self, limits: SaveLimits) -> Saved:
        """As Ram.save."""
        state, start = self._state, self.call_ns()
        state.fill(0)
        sums, why = state.tolist(), END_OF_SPAN
        while (self.dirty_pages or self.page) and why == END_OF_SPAN:
            extent, before = self._extent_here(), sums
            if extent is None:
                why = self._send_plain(state, limits)
                sums = state.tolist()
            else:
                if self.last_sent_block != self.block_index:
                    self._name_block(extent, limits, state)
                why = self._send(extent, limits, start, state)
                sums = state.tolist()
                self.dirty_pages -= sums[NORMAL] + sums[DUPLICATE] - before[NORMAL] - before[DUPLICATE]
            if self.page >= self.blocks[self.block_index].block.pages:
                self.block_index, self.page = (self.block_index + 1) % len(self.blocks), 0
        elapsed_ps = sums[ELAPSED_PS] + (self.round_ps if why == END_OF_SPAN else 0)
        return Saved(sums[NORMAL], sums[DUPLICATE], sums[USED], elapsed_ps, why)

    def _extent_here(self) -> Extent | None:
        """Where the scan stands; None in a block that KVM does not log."""
        for extent in self.extents[self.block_index]:
            if extent.first <= self.page < extent.end:
                return extent
        return None

    def _name_block(self, extent: Extent, limits: SaveLimits, state: Ints) -> None:
        """The block changes: the page this extent sends first, if it sends one, carries its name."""
        here, nothing = self.blocks[self.block_index], np.zeros(STATE_LEN, dtype=np.int64)
        first = next_dirty(here.bmap.words, here.bmap_summary, here.bmap.full, self.page, extent.end, 0, nothing)
        if first >= 0 and not must_stop(state, limits.bytes, limits.ps):
            self.name_block(state, first)

    def _send(self, extent: Extent, limits: SaveLimits, start_ns: int, state: Ints) -> int:
        counts, results, workload = self._counts, self.results, self.workload
        hits, summary, scratch = self.scratch[0]
        costs = self.costs_now()
        while True:
            results[NOW_NS] = workload.now_ns
            change = workload.next_change_ns()
            page, why = self._send_pages(
                self.page, extent.end, start_ns, NEVER_NS if change is None else change, limits.bytes, limits.ps,
                self.streams, extent.slot, extent.block, costs, hits, summary, scratch, state, counts,
                results,
            )  # fmt: skip
            self.page = int(page)
            workload.now_ns = int(results[NOW_NS])
            if why == NEED_4K:
                results[TABLES] = self._reach_4k(extent, self.page // CHUNK_PAGES)
            elif why == NEED_CLOCK:
                self.tick(int(state[ELAPSED_PS]))
            elif why == NEED_TABLES:
                self._store_hits(extent, self.page // CHUNK_PAGES, hits, summary, counts)
            else:
                break
        if self._send_pages is send_pages:
            self._send_pages = entry_of(send_pages)
        extent.kvm.count(counts)
        counts.fill(0)
        self._counted(results)
        return int(why)

    def _send_plain(self, state: Ints, limits: SaveLimits) -> int:
        """Pages of a block KVM does not log (firmware): as Ram does."""
        return self._save_next(state, limits)

    # -- the oracle --------------------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Let every write the guest has made happen: the oracle is an observer too."""
        self._close_chunks()
        hits, summary, scratch = self.scratch[0]
        for extent in (extent for side in self.extents for extent in side):
            counts = np.zeros(COUNTS_LEN, dtype=np.int64)
            at, end = extent.first // CHUNK_PAGES, chunks_of(extent.end)
            while at < end:
                at = int(
                    catch_up_chunks(
                        at, end, self.streams, extent.slot, extent.block, hits, summary, scratch, counts
                    )
                )
                if at < end:
                    self._store_hits(extent, at, hits, summary, counts)
                    at += 1
            extent.kvm.count(counts)

    def lost(self) -> tuple[int, int]:
        """(pages found lost at a sync so far, one of them or -1)."""
        self._close_chunks()
        return int(self.results[LOST]), int(self.results[FIRST_LOST])

    @property
    def bits_verified(self) -> int:
        """Bits of the log held against the ground truth so far."""
        return int(self.results[BITS])


def _flags(pages: int) -> Flags:
    return np.zeros(chunks_of(pages), dtype=np.uint8)


def _buffer() -> Words:
    return np.zeros(CHUNK_WORDS, dtype=np.uint64)


def _results() -> Ints:
    results = np.zeros(RESULTS_LEN, dtype=np.int64)
    results[FIRST_LOST] = -1
    return results
