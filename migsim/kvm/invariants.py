"""What must hold of the MMU between two operations, checked by recounting; every violation is a sentence.

Numbers refer to the list in docs/series.md. Page-level checks walk every entry, so they are for small guests;
`cheap_violations` (6 and 8, without looking at a page) costs a pass over the tables and planes and runs while guests of
any size migrate. TLB, log and rings are in log_invariants.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.host_mm import LEAF_TABLE_PFN_BASE, TABLE_PFN_BASE
from migsim.kvm.leaf_planes import LeafPlanes
from migsim.kvm.levels import max_mapping_level
from migsim.kvm.mmio import is_current
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep, huge_leafs
from migsim.kvm.roots import Root
from migsim.kvm.spte import ENTRIES, MAX_HUGEPAGE_LEVEL, PAGE_SIZE_BIT, PG_LEVEL_2M, PG_LEVEL_4K
from migsim.planes import Plane
from migsim.units import CHUNK_PAGES, CHUNK_WORDS, pages_per_level

_ROWS = 256  # of tables at a time: 1 MiB, which the cache holds
_CHUNKS = 8  # of a plane at a time: 256 KiB


def mmu_violations(mmu: MmuState) -> list[str]:
    """Every check, page by page."""
    found = list(cheap_violations(mmu))
    for root in mmu.roots:
        found += table_violations(mmu, root)
        if not root.invalid:
            found += leaf_violations(mmu, root)
            found += mmio_violations(mmu, root)
    return found


# -- cheap: counts and words ---------------------------------------------------------------------------------------


def cheap_violations(mmu: MmuState) -> Iterator[str]:
    """6 and 8 by counting: page stats, table counts, NX list, locks, deferred frees; planes subsets of `present`."""
    yield from counter_violations(mmu)
    for root in mmu.roots:
        yield from _packed_violations(root)


def counter_violations(mmu: MmuState) -> Iterator[str]:
    """Of these all but the planes against each other: what may be asked at any moment."""
    yield from stat_violations(mmu)
    yield from lock_violations(mmu)
    yield from reference_violations(mmu)


def stat_violations(mmu: MmuState) -> Iterator[str]:
    """6: pages_4k, pages_2m, pages_1g and nx_lpage_splits equal a recount over all roots of this MMU."""
    recount = Counter(mmu.shadowed_leafs)
    for root in mmu.roots:
        for planes in root.leaf.values():
            recount[PG_LEVEL_4K] += _count_small(root, planes)
        for level, huge in _count_huge(mmu, root):
            recount[level] += huge
    for level, name in ((1, "pages_4k"), (2, "pages_2m"), (3, "pages_1g")):
        value = getattr(mmu.stats, name)
        if value != recount[level]:
            yield f"{name} is {value}, a recount finds {recount[level]}"
    listed = len(mmu.nx) + len(mmu.nx_shadow)
    if mmu.stats.nx_lpage_splits != listed:
        yield f"nx_lpage_splits is {mmu.stats.nx_lpage_splits}, the list holds {listed} tables"


def _count_small(root: Root, planes: LeafPlanes) -> int:
    """Present 4K leaves of a slot."""
    present, chunks = planes.present, _tabled_chunks(root, planes)
    full = present.full[chunks] != 0
    lazily = int(np.minimum(planes.npages - chunks[full] * CHUNK_PAGES, CHUNK_PAGES).sum())
    some = (present.words[where] for _, where in _runs(chunks[~full]))
    return lazily + sum(int(np.bitwise_count(words).sum(dtype=np.int64)) for words in some)


def _runs(chunks: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], slice]]:
    """(chunks, their words) of neighbours, a few at a time so that the cache holds them."""
    for first in range(0, len(chunks), _CHUNKS):
        part = chunks[first : first + _CHUNKS]
        for run in np.split(part, np.flatnonzero(np.diff(part) != 1) + 1):
            yield run, slice(int(run[0]) * CHUNK_WORDS, (int(run[-1]) + 1) * CHUNK_WORDS)


def _tabled_chunks(root: Root, planes: LeafPlanes) -> NDArray[np.int64]:
    """Chunks of a slot that a level-2 table covers: there can be no 4K leaf elsewhere (nor is that memory touched)."""
    tables = root.table_gfn[root.table_level == PG_LEVEL_2M] - planes.base_gfn
    touched = np.concatenate((tables, tables + CHUNK_PAGES - 1)) // CHUNK_PAGES
    inside = touched[(touched >= 0) & (touched * CHUNK_PAGES < planes.npages)]
    return np.flatnonzero(np.bincount(inside))  # counting beats sorting: there are thousands of tables, few chunks


def _count_huge(mmu: MmuState, root: Root) -> Iterator[tuple[int, int]]:
    """(level, huge leaves) of some rows of tables at a time; rows without a page-size bit are read once and left."""
    for start in range(0, len(root.tables), _ROWS):
        block, levels = root.tables[start : start + _ROWS], root.table_level[start : start + _ROWS]
        if int(np.bitwise_or.reduce(block, axis=None)) & PAGE_SIZE_BIT:
            counts = huge_leafs(mmu.fmt, block).sum(axis=1)
            for level in range(PG_LEVEL_2M, MAX_HUGEPAGE_LEVEL + 1):
                yield level, int(counts[levels == level].sum())


def reference_violations(mmu: MmuState) -> Iterator[str]:
    """8: a root has one reference for each vCPU that has loaded it, and the MMU's own until it has been zapped."""
    holders = Counter(map(id, mmu.loaded.values()))
    for root in mmu.roots:
        expected = holders[id(root)] + (not root.invalid or root.zap_scheduled)
        if root.root_count != expected or root.root_count <= 0:
            yield f"{root!r} has {root.root_count} references, {expected} holders are known"
    listed = {id(root) for root in mmu.roots}
    for vcpu_id, root in mmu.loaded.items():
        if id(root) not in listed:
            yield f"vCPU {vcpu_id} has loaded {root!r}, which was freed"


def lock_violations(mmu: MmuState) -> Iterator[str]:
    """8: readers and writers exclude each other; nothing is held and nothing waits for readers between operations."""
    if mmu.lock.writer and mmu.lock.readers:
        yield f"mmu_lock is held by a writer and {mmu.lock.readers} readers at once"
    if not mmu.lock.held and not mmu.rcu.depth and mmu.rcu.pending:
        yield f"{mmu.rcu.pending} table pages wait to be freed though no reader is left"


def _packed_violations(root: Root) -> Iterator[str]:
    """Planes say nothing about pages that are not mapped."""
    for slot_id, planes in root.leaf.items():
        present = planes.present
        chunks = _tabled_chunks(root, planes)
        for run, where in _runs(chunks[present.full[chunks] == 0]):
            absent = ~present.words[where]
            for plane in planes.planes()[1:]:
                if not plane.full[run].any() and not (plane.words[where] & absent).any():
                    continue
                for chunk in _chunks_beyond(plane, present, run):
                    yield f"slot {slot_id}: bits of a rare state without a present SPTE in chunk {chunk} of {root!r}"


def _chunks_beyond(plane: Plane, present: Plane, chunks: NDArray[np.int64]) -> Iterator[int]:
    """Those of `chunks` where `plane` has bits that `present` has not."""
    for chunk in chunks.tolist():
        first = chunk * CHUNK_PAGES
        count = min(plane.n - first, CHUNK_PAGES)
        if (plane.slice_words(first, count) & ~present.slice_words(first, count)).any():
            yield chunk


# -- page by page ------------------------------------------------------------------------------------------------------


def table_violations(mmu: MmuState, root: Root) -> Iterator[str]:
    """6 and 7: every table linked once and counted, none frozen, no SPTE below a table that is not there."""
    linked: Counter[int] = Counter([root.root_pfn])
    leaf_tables: set[int] = set()
    for at, spte, level in entries(root):
        if mmu.fmt.is_frozen(spte):
            yield f"frozen SPTE reachable at gfn {root.gfn_of(at):#x} level {level}"
        if mmu.fmt.is_present(spte) and not mmu.fmt.is_leaf(spte, level):
            linked[mmu.fmt.pfn(spte)] += 1
            if level == PG_LEVEL_2M:
                leaf_tables.add(root.gfn_of(at))
    for table, times in linked.items():
        if times > 1:
            yield f"table {table:#x} is linked {times} times in {root!r}"
    by_level = Counter(root.level_of(table) for table in linked)
    for level in range(1, root.level + 1):
        if by_level[level] != root.n_tables[level]:
            yield f"level {level}: {root.n_tables[level]} tables counted, {by_level[level]} linked in {root!r}"
    for root_of_nx, table in mmu.nx:
        if root_of_nx is root and table not in linked:
            yield f"NX list holds table {table:#x}, which is not linked"
    yield from _orphans(root, leaf_tables)


def _orphans(root: Root, leaf_tables: set[int]) -> Iterator[str]:
    for planes in root.leaf.values():
        for i in _set_bits(planes.present.slice_words(0, planes.npages)):
            gfn = planes.base_gfn + i
            if gfn & -ENTRIES not in leaf_tables:
                yield f"gfn {gfn:#x} has a 4K SPTE but no level-1 table is linked there"


def leaf_violations(mmu: MmuState, root: Root) -> Iterator[str]:
    """3 and 4: each present leaf is well formed, lies in a slot, maps the host's frame and is not too large."""
    for at, spte, level in entries(root):
        gfn = root.gfn_of(at)
        if not mmu.fmt.is_present(spte) or not mmu.fmt.is_leaf(spte, level):
            continue
        where = f"SPTE {spte:#018x} gfn {gfn:#x} level {level}"
        try:
            mmu.fmt.validate_leaf(spte, gfn, level)
        except AssertionError as broken:
            yield str(broken)
        slot = mmu.vm.gfn_to_slot(root.as_id, gfn)
        if slot is None or gfn + pages_per_level(level) > slot.end_gfn:
            yield f"{where}: lies in no memslot"
            continue
        if not mmu.invalidate.covers(gfn) and mmu.fmt.pfn(spte) != mmu.vm.host.pfn(slot.hva(gfn)):
            yield f"{where}: the host's frame is {mmu.vm.host.pfn(slot.hva(gfn)):#x}"
        # a huge page that only lost its right to writes when something below came to be shadowed may stay
        if mmu.fmt.is_mmu_writable(spte) and level > max_mapping_level(mmu, slot, gfn):
            yield f"{where}: larger than the {max_mapping_level(mmu, slot, gfn)} allowed"
        if level > PG_LEVEL_4K and slot.logging and mmu.fmt.is_writable(spte):
            log = slot.dirty_bitmap
            first, count = gfn - slot.base_gfn, pages_per_level(level)
            if log is None or not all(log.get(first + i) for i in range(count)):
                yield f"{where}: huge and writable over pages that are clean in the log"


def mmio_violations(mmu: MmuState, root: Root) -> Iterator[str]:
    """7: an MMIO SPTE of the present generation lies in no slot."""
    generation = mmu.vm.memslots(root.as_id).generation
    for gfn, spte in root.mmio.items():
        if not mmu.fmt.is_mmio(spte) or not is_current(mmu.fmt, spte, generation):
            continue
        slot = mmu.vm.gfn_to_slot(root.as_id, gfn)
        if slot is not None and not slot.invalid:
            yield f"MMIO SPTE {spte:#018x} gfn {gfn:#x} level 1 is current, yet slot {slot.id} is there"


def entries(root: Root) -> Iterator[tuple[Sptep, int, int]]:
    """Every entry of every reachable table that is not empty: (where, SPTE, level)."""
    yield from _entries_below(root, root.root_pfn, root.level)


def _entries_below(root: Root, table: int, level: int) -> Iterator[tuple[Sptep, int, int]]:
    if table >= LEAF_TABLE_PFN_BASE:
        candidates = list(range(ENTRIES))
        if not _any_leaf(root, table):
            return
    else:
        row = root.tables[table - TABLE_PFN_BASE]
        candidates = np.flatnonzero(row != np.uint64(root.fmt.nonpresent)).tolist()
    for entry in candidates:
        at = Sptep(table, entry)
        spte = root.read(at)
        if spte == root.fmt.nonpresent:
            continue
        yield at, spte, level
        if root.fmt.is_present(spte) and not root.fmt.is_leaf(spte, level):
            yield from _entries_below(root, root.fmt.pfn(spte), level - 1)


def _any_leaf(root: Root, table: int) -> bool:
    first = root.gfn_of(Sptep(table, 0))
    mapped = any(planes.present.any_in(i, n) for planes, i, n in root.planes_in(first, first + ENTRIES))
    return mapped or any(first <= gfn < first + ENTRIES for gfn in root.mmio) or table in root.dying


def _set_bits(words: NDArray[np.uint64]) -> list[int]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]

