"""A paging structure: real tables of 64-bit SPTEs down to 2M, the 4K leaves below packed into planes.

A table of level >= 2 is a row of `tables` and has the frame TABLE_PFN_BASE + row. A level-1 table exists (it is
pointed to, counted, frozen, freed) but its 512 leaves live in the slot's LeafPlanes; its frame is
LEAF_TABLE_PFN_BASE + (gfn >> 9), so the pointer alone says which leaves are meant. A pointer to an SPTE is an Sptep:
(frame of its table, entry), which stays meaningful for a walker that holds it while the table is unlinked.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.host_mm import LEAF_TABLE_PFN_BASE, TABLE_PFN_BASE
from migsim.kvm.leaf_planes import LeafPlanes, SlotShape
from migsim.kvm.make_spte import make_nonleaf_spte
from migsim.kvm.spte import (
    ENTRIES,
    MAX_LEVEL,
    PAGE_SIZE_BIT,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    AdType,
    SpteFormat,
    gfn_round,
    spte_index,
)
from migsim.units import LEVEL_BITS, pages_per_level

_ROWS_FIRST, _ROWS_MORE = 4, 256  # rows of tables to start with, and at most filled at a time: 1 MiB


class Sptep(NamedTuple):
    """Where an SPTE lives: frame of the table, entry 0..511 in it."""

    table_pfn: int
    entry: int


def present_entries(fmt: SpteFormat, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """SpteFormat.is_present for many entries of tables above level 1."""
    if fmt.mmu_present:
        return np.asarray(entries & np.uint64(fmt.mmu_present) != 0)
    return np.asarray((entries != 0) & (entries != np.uint64(fmt.frozen)))


def huge_leafs(fmt: SpteFormat, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which entries of tables above level 1 are present leaves."""
    return np.asarray(present_entries(fmt, entries) & (entries & np.uint64(PAGE_SIZE_BIT) != 0))


class PagingStructure:
    """One tree of page tables.

    `tables`: uint64[rows, 512]; `table_level`: uint8[rows], 0 = free row; `table_gfn`: int64[rows], first gfn mapped.
    `n_tables[level]` counts linked and not yet freed tables. `leaf`: memslot id -> LeafPlanes. `mmio`: gfn -> level-1
    SPTE that is not present but carries a value (MMIO, FROZEN). `dying`: frames of level-1 tables being torn down
    under the read lock: a walker that still points into one reads FROZEN. `nx_disallowed`: frames of tables that no
    huge page may replace, as they were made for an instruction fetch under the NX workaround.
    """

    def __init__(self, fmt: SpteFormat, level: int, ad_type: AdType = AdType.ENABLED) -> None:
        assert 2 <= level <= MAX_LEVEL, f"a root of level {level}"
        self.fmt = fmt
        self.level = level
        self.ad_type = ad_type
        self._room: NDArray[np.uint64] = np.empty((_ROWS_FIRST, ENTRIES), dtype=np.uint64)
        self.tables: NDArray[np.uint64] = self._room[:0]
        self.table_level: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        self.table_gfn: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.free_rows: list[int] = []
        self.n_tables = [0] * (MAX_LEVEL + 1)
        self.leaf: dict[int, LeafPlanes] = {}
        self.mmio: dict[int, int] = {}
        self.dying: set[int] = set()
        self.nx_disallowed: set[int] = set()
        self._bases: list[int] = []
        self._by_base: list[LeafPlanes] = []
        self.root_pfn = self.alloc_table(level, 0)

    # -- tables ------------------------------------------------------------------------------------------------------

    def alloc_table(self, level: int, gfn: int) -> int:
        """A fresh, empty table at `level` for the range at `gfn`, not linked yet; returns its frame."""
        self.n_tables[level] += 1
        if level == PG_LEVEL_4K:
            pfn = LEAF_TABLE_PFN_BASE + (gfn >> LEVEL_BITS)
            self.dying.discard(pfn)
            return pfn
        if not self.free_rows:
            self._grow()
        row = self.free_rows.pop()
        self.table_level[row] = level
        self.table_gfn[row] = gfn_round(gfn, level + 1)
        return TABLE_PFN_BASE + row

    def free_table(self, pfn: int) -> None:
        """Give a table page back; its entries must be gone already."""
        self.nx_disallowed.discard(pfn)
        if pfn >= LEAF_TABLE_PFN_BASE:
            self.n_tables[PG_LEVEL_4K] -= 1
            self.dying.discard(pfn)
            return
        row = pfn - TABLE_PFN_BASE
        assert self.table_level[row], f"table {pfn:#x} freed twice"
        self.n_tables[self.table_level[row]] -= 1
        self.table_level[row] = 0
        self.tables[row] = self.fmt.nonpresent
        self.free_rows.append(row)

    def reset(self) -> None:
        """Forget every table but the root, which becomes empty; the caller has emptied the planes and counted."""
        self.tables[:] = self.fmt.nonpresent
        keep = self.table_row(self.root_pfn)
        self.table_level[np.arange(len(self.tables)) != keep] = 0
        self.free_rows = [row for row in range(len(self.tables) - 1, -1, -1) if row != keep]
        self.n_tables = [0] * (MAX_LEVEL + 1)
        self.n_tables[self.level] = 1
        self.mmio.clear()
        self.dying.clear()
        self.nx_disallowed.clear()

    def table_row(self, table_pfn: int) -> int:
        """Row of a table of level 2 or more."""
        assert table_pfn < LEAF_TABLE_PFN_BASE, f"table {table_pfn:#x} is packed"
        return table_pfn - TABLE_PFN_BASE

    def _grow(self) -> None:
        """More empty rows. Those beyond `tables` in `_room` are address space that nobody has touched."""
        rows = len(self.tables)
        more = max(_ROWS_FIRST, min(rows, _ROWS_MORE))
        if rows + more > len(self._room):
            room = np.empty((max(2 * (rows + more), self._rows_at_most() + more), ENTRIES), dtype=np.uint64)
            room[:rows] = self.tables
            self._room = room
        self.tables = self._room[: rows + more]
        self.tables[rows:] = self.fmt.nonpresent
        self.table_level = np.concatenate((self.table_level, np.zeros(more, dtype=np.uint8)))
        self.table_gfn = np.concatenate((self.table_gfn, np.zeros(more, dtype=np.int64)))
        self.free_rows = list(range(rows + more - 1, rows - 1, -1))

    def _rows_at_most(self) -> int:
        """Tables of level 2 and more if all of every slot were mapped at 4K: one a span at each level, and edges."""
        spans = [pages_per_level(level + 1) for level in range(PG_LEVEL_2M, self.level + 1)]
        return sum(p.npages // span + 2 for p in self._by_base for span in spans)

    def level_of(self, table_pfn: int) -> int:
        """Level of a table page."""
        if table_pfn >= LEAF_TABLE_PFN_BASE:
            return PG_LEVEL_4K
        return int(self.table_level[table_pfn - TABLE_PFN_BASE])

    def gfn_of(self, at: Sptep) -> int:
        """First gfn the entry at `at` maps."""
        if at.table_pfn >= LEAF_TABLE_PFN_BASE:
            return (at.table_pfn - LEAF_TABLE_PFN_BASE << LEVEL_BITS) + at.entry
        row = at.table_pfn - TABLE_PFN_BASE
        return int(self.table_gfn[row]) + at.entry * pages_per_level(int(self.table_level[row]))

    def count_tables(self) -> dict[int, int]:
        """Level -> table pages allocated."""
        return {level: self.n_tables[level] for level in range(1, self.level + 1)}

    # -- slots -------------------------------------------------------------------------------------------------------

    def add_slot(self, slot: SlotShape) -> None:
        """Make room for the 4K leaves of a slot."""
        assert slot.id not in self.leaf, f"slot {slot.id} has leaves already"
        planes = LeafPlanes(slot, self.fmt, self.ad_type)
        self.leaf[slot.id] = planes
        at = bisect.bisect_left(self._bases, slot.base_gfn)
        self._bases.insert(at, slot.base_gfn)
        self._by_base.insert(at, planes)

    def drop_slot(self, slot_id: int) -> None:
        """Forget the leaves of a slot; raises AssertionError if one is still mapped (a leaked SPTE)."""
        planes = self.leaf.pop(slot_id)
        assert not planes.present.count(), f"slot {slot_id} dropped with {planes.present.count()} SPTEs present"
        at = self._by_base.index(planes)
        del self._bases[at], self._by_base[at]

    def planes_at(self, gfn: int) -> tuple[LeafPlanes, int] | None:
        """The planes that hold gfn's 4K leaf and its index in them."""
        at = bisect.bisect_right(self._bases, gfn) - 1
        if at < 0 or gfn >= self._bases[at] + self._by_base[at].npages:
            return None
        return self._by_base[at], gfn - self._bases[at]

    def planes_in(self, first: int, end: int) -> Iterator[tuple[LeafPlanes, int, int]]:
        """(planes, first index, count) of every piece of gfns [first, end) that lies in a slot."""
        at = max(bisect.bisect_right(self._bases, first) - 1, 0)
        while at < len(self._bases) and self._bases[at] < end:
            planes = self._by_base[at]
            begin, stop = max(first, planes.base_gfn), min(end, planes.base_gfn + planes.npages)
            if begin < stop:
                yield planes, begin - planes.base_gfn, stop - begin
            at += 1

    # -- entries -----------------------------------------------------------------------------------------------------

    def read(self, at: Sptep) -> int:
        """The SPTE at `at`."""
        if at.table_pfn < LEAF_TABLE_PFN_BASE:
            return int(self.tables[at.table_pfn - TABLE_PFN_BASE, at.entry])
        return self.fmt.frozen if at.table_pfn in self.dying else self.leaf_spte(self.gfn_of(at))

    def write(self, at: Sptep, spte: int) -> int:
        """Exchange the SPTE at `at`; returns the old value."""
        old = self.read(at)
        if at.table_pfn < LEAF_TABLE_PFN_BASE:
            self.tables[at.table_pfn - TABLE_PFN_BASE, at.entry] = spte
        else:
            self._write_leaf(self.gfn_of(at), spte)
        return old

    def cmpxchg(self, at: Sptep, old: int, new: int, publish: Callable[[], None] | None = None) -> bool:
        """Store `new` if the SPTE still is `old`. `publish` runs in the same step, just before the store.

        It is for the leaves of a table that is being linked: they lie in planes, which belong to whichever table is
        linked, so they cannot be filled in while the table is still private.
        """
        if self.read(at) != old:
            return False
        if publish is not None:
            publish()
        self.write(at, new)
        return True

    def clear_bits(self, at: Sptep, mask: int) -> int:
        """Locked AND with ~mask; returns the old value. In a table that is being torn down it changes nothing."""
        old = self.read(at)
        if at.table_pfn not in self.dying:
            self.write(at, old & ~mask)
        return old

    def leaf_spte(self, gfn: int) -> int:
        """The level-1 SPTE of gfn, put together from the planes."""
        special = self.mmio.get(gfn)
        if special is not None:
            return special
        found = self.planes_at(gfn)
        return self.fmt.nonpresent if found is None else found[0].compose(found[1])

    def _write_leaf(self, gfn: int, spte: int) -> None:
        present = self.fmt.is_present(spte)
        found = self.planes_at(gfn)
        if not present and spte != self.fmt.nonpresent:
            self.mmio[gfn] = spte
        else:
            self.mmio.pop(gfn, None)
        assert found is not None or not present, f"SPTE {spte:#018x} gfn {gfn:#x} level 1 is in no memslot"
        if found is not None:
            found[0].store(found[1], spte)

    # -- walking -----------------------------------------------------------------------------------------------------

    def walk(self, gfn: int) -> Iterator[tuple[Sptep, int, int]]:
        """(where, SPTE, level) from the root down to the last entry reached for `gfn`, as the hardware walks."""
        table, level = self.root_pfn, self.level
        while True:
            at = Sptep(table, spte_index(gfn, level))
            spte = self.read(at)
            yield at, spte, level
            if not self.fmt.is_present(spte) or self.fmt.is_leaf(spte, level):
                return
            table, level = self.fmt.pfn(spte), level - 1

    def lookup(self, gfn: int) -> tuple[int, int]:
        """(SPTE, level) where the walk for `gfn` ends."""
        for _, spte, level in self.walk(gfn):
            last = spte, level
        return last

    def l2_row(self, gfn: int) -> int:
        """Row of the level-2 table (512 entries of 2M: one aligned GiB) that covers gfn, or -1."""
        for at, _, level in self.walk(gfn):
            if level == PG_LEVEL_2M:
                return at.table_pfn - TABLE_PFN_BASE
        return -1

    def ensure_table(self, gfn: int, level: int) -> int:
        """Frame of the table of `level` (2 or more) that covers gfn, linked with those above where missing."""
        table, at_level = self.root_pfn, self.level
        while at_level > level:
            at = Sptep(table, spte_index(gfn, at_level))
            spte = self.read(at)
            if not self.fmt.is_present(spte):
                spte = make_nonleaf_spte(self.fmt, self.alloc_table(at_level - 1, gfn), self.ad_type)
                self.write(at, spte)
            assert not self.fmt.is_leaf(spte, at_level), f"SPTE {spte:#018x} gfn {gfn:#x} level {at_level} is a leaf"
            table, at_level = self.fmt.pfn(spte), at_level - 1
        return table

    def tables_at(self, level: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(row, first gfn) of every table at `level` (2 or more) that covers part of gfns [first, end), ascending."""
        yield from self._tables_below(self.root_pfn, self.level, level, first, end)

    def _tables_below(self, table: int, level: int, wanted: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        row = table - TABLE_PFN_BASE
        base, span = int(self.table_gfn[row]), pages_per_level(level)
        if level == wanted:
            yield row, base
            return
        low = max(first - base, 0) // span
        high = min(-(-(end - base) // span), ENTRIES)
        for entry in range(low, high):
            spte = int(self.tables[row, entry])
            if self.fmt.is_present(spte) and not self.fmt.is_leaf(spte, level):
                yield from self._tables_below(self.fmt.pfn(spte), level - 1, wanted, first, end)
