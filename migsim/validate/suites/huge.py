"""``huge``: slots of up to 2^31 - 1 pages, every bit of every round compared, up to 12 TiB.

The guest's stores are drawn for a chunk (1 GiB) at a time and pushed through the emulator's word-parallel kernels, a
few hundred also through a vCPU, fault and all; the log is fetched and cleared through the ioctls, as QEMU does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migsim.kvm import uapi
from migsim.planes import new_summary, summarise, tail_mask
from migsim.units import CHUNK_PAGES, CHUNK_WORDS, GIB, PAGE_SHIFT, PAGE_SIZE, TIB, chunks_of, words_of
from migsim.validate.backends import CONFIG, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.verdicts import CheckFailed

Words = NDArray[np.uint64]

SUITE = "huge"
SLOT_PAGES_MAX = (1 << 31) - 1
GFN_BASE = 1 << 20  # 4 GiB, on a 1 GiB boundary as huge pages want it
ROUNDS = 2
SINGLE_STORES = 100  # of a round and slot, through a vCPU
CHUNK_KINDS = (0.0, 0.0, 2e-4, 0.02, 0.5)  # share of a chunk's pages stored to, drawn anew each round


def cases(backend: Backend) -> Iterator[Case]:
    needs = (MMU, CONFIG)
    for name, config in (("PML", {}), ("W", {"pml": False}), ("AMD", {"vendor": "amd"})):
        small = partial(rounds, sizes=(33 * GIB + 5 * PAGE_SIZE, 7 * GIB), config=config, manual=3, level=2)
        yield Case(SUITE, f"40 GiB,clear-log,{name}", small, needs)
        legacy = partial(rounds, sizes=(20 * GIB + 63 * PAGE_SIZE,), config=config, manual=0, level=1)
        yield Case(SUITE, f"20 GiB,dirty-log,{name}", legacy, needs)
    rest = 12 * TIB - SLOT_PAGES_MAX * PAGE_SIZE
    full = partial(rounds, sizes=(SLOT_PAGES_MAX * PAGE_SIZE, rest), config={}, manual=3, level=3)
    yield Case(SUITE, "12 TiB,clear-log,PML", full, needs)


class HugeSlot:
    """A populated, logged slot and the truth about it: ``truth`` has a bit for each page stored to since its CLEAR."""

    def __init__(self, vm: Any, id: int, gfn: int, n_pages: int, level: int) -> None:
        from migsim.kvm.populate import populate

        self.vm, self.id, self.gfn, self.n_pages = vm, id, gfn, n_pages
        self.hva: int = vm.alloc_memory(-(-n_pages * PAGE_SIZE // GIB) * GIB, level)
        self.set_flags(0)
        self.slot = vm.memslots(0).by_id(id)
        populate(vm.mmu.state, vm.vcpus[0].load_root(), self.slot, 0, n_pages)
        self.truth: Words = np.zeros(words_of(n_pages), dtype=np.uint64)
        self.got: Words = np.zeros(words_of(n_pages), dtype=np.uint64)

    def set_flags(self, flags: int) -> None:
        size = self.n_pages * PAGE_SIZE
        self.vm.set_user_memory_region(self.id, flags, self.gfn << PAGE_SHIFT, size, self.hva)

    def chunk(self, number: int) -> slice:
        """The words of a chunk."""
        return slice(number * CHUNK_WORDS, min((number + 1) * CHUNK_WORDS, len(self.truth)))

    def mark_all(self) -> None:
        """INITIALLY_SET: every page counts as stored to."""
        self.truth[:] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
        self.truth[-1] = np.uint64(tail_mask(self.n_pages))

    def fetch(self) -> None:
        """GET into ``got``."""
        self.vm.get_dirty_log(self.id, self.got)

    def clear(self) -> None:
        """CLEAR what was fetched, a chunk at a time."""
        for number in range(chunks_of(self.n_pages)):
            first = number * CHUNK_PAGES
            count = min(CHUNK_PAGES, self.n_pages - first)
            self.vm.clear_dirty_log(self.id, first, count, self.got[self.chunk(number)])

    def compare(self, what: str) -> int:
        """Every bit of ``got`` against the truth; the number of bits.  CheckFailed names the first that differs."""
        for number in range(chunks_of(self.n_pages)):
            where = self.chunk(number)
            if np.array_equal(self.got[where], self.truth[where]):
                continue
            word = where.start + int(np.flatnonzero(self.got[where] != self.truth[where])[0])
            got, true = int(self.got[word]), int(self.truth[word])
            page = word * 64 + ((got ^ true) & -(got ^ true)).bit_length() - 1
            wrong = "is reported and was not stored to" if got >> page % 64 & 1 else "was stored to and is not reported"
            raise CheckFailed(f"{what}: slot {self.id} page {page} of {self.n_pages} {wrong}")
        return self.n_pages


def rounds(context: Context, sizes: tuple[int, ...], config: Mapping[str, Any], manual: int, level: int) -> None:
    """Populate, enable, then ``ROUNDS`` times: store everywhere, GET, compare every bit, clear."""
    options = {"smm": False, "maxphyaddr": 52, "bulk": True, **config}
    vm: Any = context.backend.make(options)
    random = np.random.Generator(np.random.Philox(context.seed))
    try:
        vm.create_vcpu(0)
        if manual:
            vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (manual,))
        slots, gfn = [], GFN_BASE
        for id, size in enumerate(sizes, 1):
            slots.append(HugeSlot(vm, id, gfn, size // PAGE_SIZE, level))
            gfn += -(-size // GIB) * CHUNK_PAGES
        for slot in slots:
            slot.set_flags(uapi.KVM_MEM_LOG_DIRTY_PAGES)
            if manual == 3:
                slot.mark_all()
        _collect(context, slots, "just enabled", manual)
        for number in range(1, ROUNDS + 1):
            for slot in slots:
                _store(context, vm, slot, random)
            _collect(context, slots, f"round {number}", manual)
        vm.close()
    finally:
        vm.dead = True


def _collect(context: Context, slots: list[HugeSlot], what: str, manual: int) -> None:
    for slot in slots:
        slot.fetch()
        context.verified(slot.compare(what))
        if manual:
            slot.clear()
        slot.truth[:] = 0
        context.done += 1


def _store(context: Context, vm: Any, slot: HugeSlot, random: np.random.Generator) -> None:
    """A round of stores: by chunk through the kernels, then single ones at edges and at random through the vCPU."""
    from migsim.kvm.bulk import COUNTS_LEN

    leaves = vm.vcpus[0].load_root().leaf[slot.id]
    counts = np.zeros(COUNTS_LEN, dtype=np.int64)
    log_summary = new_summary(slot.n_pages)
    kinds = random.integers(0, len(CHUNK_KINDS), chunks_of(slot.n_pages))
    for number, kind in enumerate(kinds):
        if CHUNK_KINDS[kind]:
            hits = _draw(random, CHUNK_KINDS[kind])
            _store_chunk(leaves, slot, number, hits, log_summary, counts)
    last = slot.n_pages - 1
    single = {0, last, CHUNK_PAGES - 1, CHUNK_PAGES, *random.integers(0, slot.n_pages, SINGLE_STORES).tolist()}
    pages = sorted(page for page in single if page <= last)
    exit = vm.vcpus[0].run([("w", slot.gfn + page << PAGE_SHIFT, 1) for page in pages])
    if exit.done != len(pages):
        raise CheckFailed(f"the guest stopped after {exit.done} of {len(pages)} stores, exit reason {exit.reason}")
    for page in pages:
        slot.truth[page >> 6] |= np.uint64(1 << (page & 63))
    context.done += len(pages)


def _draw(random: np.random.Generator, share: float) -> Words:
    """A chunk's words with each page set with probability ``share`` (exact number for sparse ones)."""
    if share >= 0.25:
        return random.integers(0, 1 << 64, CHUNK_WORDS, dtype=np.uint64)
    hits = np.zeros(CHUNK_WORDS, dtype=np.uint64)
    pages = random.integers(0, CHUNK_PAGES, int(CHUNK_PAGES * share)).astype(np.uint64)
    np.bitwise_or.at(hits, pages >> np.uint64(6), np.uint64(1) << (pages & np.uint64(63)))
    return hits


def _store_chunk(leaves: Any, slot: HugeSlot, number: int, hits: Words, log_summary: Words, counts: Any) -> None:
    from migsim.kvm.bulk import store_mapped, store_mapped_pml

    where = slot.chunk(number)
    length = where.stop - where.start
    hits[length:] = 0
    if where.stop == len(slot.truth):
        hits[length - 1] &= np.uint64(tail_mask(slot.n_pages))
    log = slot.slot.dirty_bitmap
    for plane in (log, leaves.writable, leaves.dirty):
        plane.settle(number)
    summary = new_summary(CHUNK_PAGES)
    summarise(hits, summary)
    planes = (log.words, log_summary, leaves.writable.words)
    if slot.vm.pml_enabled:
        store_mapped_pml(hits, summary, *planes, leaves.dirty.words, where.start, counts)
    else:
        store_mapped(hits, summary, *planes, where.start, counts)
    slot.truth[where] |= hits[:length]
