"""XBZRLE: a page sent before goes out as its difference from the cached copy, if the cache still has it.

Source: QEMU 7.2 and 10.0 migration/{ram,page_cache,xbzrle}.c. The cache is direct-mapped on page addresses, real here
down to slot, owner and age; what a page's copy differs by is the expectation of the workload's law, because at this
scale pages have no contents. Off during the first pass over RAM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from migsim.migration.over_ram import OverRam
from migsim.migration.ram import PS_PER_NS, Ram, Saved, SaveLimits
from migsim.migration.ram_kernels import END_OF_SPAN, RATE_LIMIT, TIME_LIMIT
from migsim.migration.wire import NORMAL_PAGE, PAGE_HEADER, XBZRLE_HEADER, ZERO_PAGE
from migsim.units import NS_PER_US, PAGE_SIZE, chunks_of

__all__ = ["CACHED_PASSES", "Writers", "XbzrleCache", "XbzrleRam", "encoded_bytes"]

CACHED_PASSES: Final = 2  # an entry younger than this many syncs is not evicted
EMPTY: Final = -1
COUNTED: Final = ("bytes", "pages", "miss", "overflow", "handled")
BATCH: Final = 1 << 16

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Writers(Protocol):
    """What the encoder may know of the guest: how often each page was written since a moment of its own clock."""

    def clock(self) -> float:
        """Seconds of full-speed running so far."""

    def writes_a_second(self, pages: Ints) -> Floats:
        """Mean writes a second of running, each page."""

    def write_bytes(self, pages: Ints) -> Ints:
        """Bytes one write changes, each page."""


def encoded_bytes(writes: Floats, write_bytes: Ints) -> Ints:
    """Expected length of the delta after `writes` stores of `write_bytes` at random aligned places of a page.

    A run costs its bytes, a ULEB128 length (1 byte below 128) and the ULEB128 length of the gap before it; one byte
    in 256 happens to stay equal and splits its run for one byte more. PAGE_SIZE or more means it does not pay.
    """
    places = np.maximum(1, PAGE_SIZE // np.maximum(write_bytes, 1)).astype(np.float64)
    touched = places * -np.expm1(writes * np.log1p(-1.0 / np.maximum(places, 1.0000001)))
    touched = np.clip(touched, 1.0, places)
    runs = touched * (1.0 - (touched - 1.0) / places)
    changed = touched * write_bytes
    run_bytes = changed / np.maximum(runs, 1.0)
    length = changed + runs * (np.where(run_bytes < 128, 1.0, 2.0) + 1.9) + changed / 256
    return np.where(touched >= places, PAGE_SIZE, np.ceil(length)).astype(np.int64)


@dataclass
class XbzrleCache:
    """Slots of one page: who is in, since which sync, and the guest's clock when its copy was made."""

    pages: int
    owner: Ints = field(init=False)
    age: Ints = field(init=False)
    copied_s: Floats = field(init=False)

    def __post_init__(self) -> None:
        assert self.pages and self.pages & (self.pages - 1) == 0, "a power of two"
        self.owner = np.full(self.pages, EMPTY, dtype=np.int64)
        self.age = np.zeros(self.pages, dtype=np.int64)
        self.copied_s = np.zeros(self.pages)

    def hits(self, pages: Ints) -> NDArray[np.bool_]:
        return np.asarray(self.owner[pages & (self.pages - 1)] == pages)

    def insert(self, pages: Ints, now_age: int, clock_s: float) -> None:
        """Insert or refresh; a slot that holds another page of the last syncs keeps it, so the first of two wins."""
        pages = pages[::-1]  # the last assignment stays, and that is to be the first page's
        slots = pages & (self.pages - 1)
        held = (self.owner[slots] != pages) & (self.owner[slots] != EMPTY)
        free = ~(held & (self.age[slots] + CACHED_PASSES > now_age))
        at = slots[free]
        self.owner[at], self.age[at], self.copied_s[at] = pages[free], now_age, clock_s


@dataclass
class XbzrleRam(OverRam[Ram]):
    """`Ram` with XBZRLE in front of the stream. Same protocol. `encode_ns`: comparing a page with its copy."""

    cache: XbzrleCache
    writers: Writers
    encode_ns: float
    syncs: int = 0
    started: bool = False
    last_stage: bool = False
    in_postcopy: bool = False  # pages are placed whole: no differences any more
    marked_s: tuple[float, float] = (0.0, 0.0)  # guest's clock at the last two syncs: between them pages were marked
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    before: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))  # at the last rates
    miss_rate: float = 0.0
    encoding_rate: float = 0.0

    def sync(self) -> int:
        self.syncs += 1
        self.marked_s = (self.marked_s[1], self.writers.clock())
        return self.ram.sync()

    def enter_last_stage(self) -> None:
        self.last_stage = True
        self.ram.enter_last_stage()

    def enter_postcopy(self) -> None:
        self.in_postcopy = True
        self.ram.enter_postcopy()

    def reply(self) -> dict[str, Any]:
        """query-migrate's xbzrle-cache; `bytes` and `overflow` are expectations, rounded."""
        bytes_, pages, miss, overflow = (round(self.counts[name]) for name in COUNTED[:4])
        cache = {
            "cache-size": self.cache.pages * PAGE_SIZE, "bytes": bytes_, "pages": pages, "cache-miss": miss,
            "cache-miss-rate": self.miss_rate, "encoding-rate": self.encoding_rate, "overflow": overflow,
        }  # fmt: skip
        return {"xbzrle-cache": cache}

    def update_rates(self) -> None:
        """Misses a page handled, and pages a page's worth of encoded bytes, both of the period that ends."""
        period = {name: self.counts[name] - self.before[name] for name in COUNTED}
        if not period["handled"]:
            return
        self.miss_rate = period["miss"] / period["handled"]
        self.encoding_rate = period["pages"] * PAGE_SIZE / period["bytes"] if period["bytes"] else 0.0
        self.before = dict(self.counts)

    def save(self, limits: SaveLimits) -> Saved:
        """Batches of dirty pages in scan order: size each, see how many the limits admit, let RAM send just those."""
        if self.in_postcopy:
            saved = self.ram.save(limits)
            self.counts["handled"] += saved.normal + saved.duplicate
            return saved
        normal = zero = sent_bytes = spent = 0
        why, costs = END_OF_SPAN, self.ram.costs
        self.ram.spent_ps = 0
        while self.ram.dirty_pages and why == END_OF_SPAN:
            pages, is_zero = self._next()
            sizes, plain, changed, encoded = self._sizes(pages, is_zero)
            ps = np.where(is_zero, costs.zero_ps, costs.normal_ps) + np.where(plain, 0, self.encode_ns * PS_PER_NS)
            before, clock = sent_bytes + np.cumsum(sizes) - sizes, spent + np.cumsum(ps)
            allowed = _first(before > limits.bytes)
            in_time = (_first(clock >= limits.ps) + 64) & ~63
            count = min(allowed, in_time, len(pages))
            if count:
                self._count(pages[:count], is_zero[:count], plain[:count], changed[:count], encoded[:count])
                named = self._send(pages[:count])
                sent_bytes += int(sizes[:count].sum()) + named
                spent = int(clock[count - 1])
                self.ram.spent_ps = spent
                zero += int(is_zero[:count].sum())
                normal += int((plain[:count] & ~is_zero[:count]).sum())
            if count < len(pages):
                why = RATE_LIMIT if allowed <= in_time else TIME_LIMIT
        self.ram.spent_ps = 0
        return Saved(normal, zero, sent_bytes, spent, why)

    def _next(self) -> tuple[Ints, NDArray[np.bool_]]:
        """Guest pages of the next batch in scan order, inside one block, and which are zero.

        A cache smaller than the batch sees it as one step: hits are judged before the batch's own inserts.
        """
        ram = self.ram
        while True:
            state = ram.blocks[ram.block_index]
            for chunk in range(chunks_of(state.block.pages)):
                state.bmap.settle(chunk)
            found = np.flatnonzero(_bits(state.bmap.words, ram.page, min(ram.page + BATCH, state.block.pages)))
            if len(found):
                pages = found + ram.page
                for chunk in range(chunks_of(state.block.pages)):
                    state.block.zero.settle(chunk)
                words = state.block.zero.words
                is_zero = (words[pages >> 6] >> (pages & 63).astype(np.uint64)) & np.uint64(1) != 0
                return pages + state.block.first_page, np.asarray(is_zero)
            ram.page += BATCH
            if ram.page >= state.block.pages:
                ram.block_index, ram.page = (ram.block_index + 1) % len(ram.blocks), 0
                self.started = self.started or ram.block_index == 0

    def _sizes(self, pages: Ints, is_zero: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.bool_], Floats, Floats]:
        """For each page of the batch: bytes on the stream, sent whole or as zero, chance that its copy differs, and
        the bytes QEMU counts as encoded (a page that does not pay counts whole).
        """
        sizes = np.where(is_zero, ZERO_PAGE, NORMAL_PAGE).astype(np.int64)
        if not self.started:
            nothing = np.zeros(len(pages))
            return sizes, np.ones(len(pages), dtype=bool), nothing, nothing
        hit = self.cache.hits(pages) & ~is_zero
        rate = np.maximum(self.writers.writes_a_second(pages), 1e-9)
        copied, now = self.cache.copied_s[pages & (self.cache.pages - 1)], self.writers.clock()
        changed = _changed(rate, copied, now, *self.marked_s)
        mean = np.maximum(rate * (now - copied), 1e-9)
        length = encoded_bytes(mean / -np.expm1(-mean), self.writers.write_bytes(pages))
        delta = hit & (length < PAGE_SIZE)
        expected = np.rint(changed * (PAGE_HEADER + XBZRLE_HEADER + length))
        overflow = np.rint(changed * NORMAL_PAGE)
        sizes = np.where(delta, expected, np.where(hit, overflow, sizes))
        encoded = changed * np.where(delta, XBZRLE_HEADER + length, np.where(hit, PAGE_SIZE, 0))
        return sizes.astype(np.int64), ~delta, changed, encoded

    def _send(self, pages: Ints) -> int:
        """RAM clears and sends exactly these; the cache learns of them. Bytes of block names on top."""
        costs, block = self.ram.costs, self.ram.block_index
        self.ram.costs = replace(costs, normal_bytes=1, zero_bytes=1)
        left, named = len(pages), 0
        while left:  # a block's name counts too, and may cut the call short
            sent = self.ram.save(SaveLimits(left - 1, 1 << 62))
            left -= sent.normal + sent.duplicate
            named += sent.page_bytes - sent.normal - sent.duplicate
        self.ram.costs = costs
        if self.started and not self.last_stage:
            self.cache.insert(pages, self.syncs, self.writers.clock())
        first = int(pages[0]) - self.ram.blocks[block].block.first_page
        self.started |= self.ram.block_index < block or (self.ram.block_index == block and self.ram.page <= first)
        return named

    def _count(
        self, pages: Ints, is_zero: NDArray[np.bool_], plain: NDArray[np.bool_], changed: Floats, encoded: Floats
    ) -> None:
        """xbzrle_counters: a hit is a page whatever comes of it, and an overflow only if its copy differs."""
        counts = self.counts
        counts["handled"] += len(pages)
        if not self.started:
            return
        hit = self.cache.hits(pages) & ~is_zero
        counts["miss"] += int((~hit & ~is_zero).sum())
        counts["pages"] += int(hit.sum())
        counts["overflow"] += float(changed[hit & plain].sum())
        counts["bytes"] += float(encoded.sum())


def _changed(rate: Floats, copied: Floats, now: float, since: float, until: float) -> Floats:
    """Chance that a page differs from its copy, given that a write between two syncs marked it.

    The write may lie before the copy, which then holds it already: nothing is sent for such a page. Poisson writes.
    """
    before_copy = -np.expm1(-rate * np.clip(np.minimum(copied, until) - since, 0.0, None))
    marked = np.maximum(-np.expm1(-rate * max(until - since, 0.0)), 1e-12)
    return np.clip(1.0 - np.exp(-rate * np.maximum(now - copied, 0.0)) * before_copy / marked, 0.0, 1.0)


def _first(flags: NDArray[np.bool_]) -> int:
    """Index of the first true one, or the length."""
    return int(np.argmax(flags)) if flags.any() else len(flags)


def _bits(words: NDArray[np.uint64], first: int, end: int) -> NDArray[np.uint8]:
    """Bits [first, end) of a plane as 0 and 1."""
    part = words[first >> 6 : (end + 63) >> 6].view(np.uint8)
    return np.unpackbits(part, bitorder="little")[first & 63 : (first & 63) + end - first]


assert math.isclose(NS_PER_US, 1000)
