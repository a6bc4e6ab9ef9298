"""The reverse map: from a guest frame to every SPTE that maps it. What the shadow MMU has and the TDP MMU does without.

Of direct roots nothing is stored: the one SPTE a root has for a gfn is where the root's own walk ends, so the map is
read from the tables. Entries of nested guests' shadow pages, whose gfns differ from the guest's, are kept explicitly.
What KVM would hold in memory is counted as it allocates it: a head of 8 bytes per gfn and level, and chains.
Source: Linux 6.13, arch/x86/kvm/mmu/mmu.c (pte_list_add and below), mmu_internal.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep
from migsim.kvm.spte import MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K
from migsim.units import pages_per_level

HEAD_BYTES: Final = 8
CHAIN_ENTRIES: Final = 14  # struct pte_list_desc: more, two counts, 14 SPTE pointers
CHAIN_BYTES: Final = 128
RECYCLE_THRESHOLD: Final = 1000


class Table(Protocol):
    """Whatever holds SPTEs: a direct root, or a shadow page of a nested guest."""

    def read(self, at: Sptep) -> int: ...
    def write(self, at: Sptep, spte: int) -> int: ...


class RmapEntry(NamedTuple):
    """One SPTE that maps a gfn."""

    table: Table
    at: Sptep


class Rmap:
    """(as_id, level, gfn of the mapping's first page) -> SPTEs."""

    def __init__(self, mmu: MmuState) -> None:
        self._mmu = mmu
        self._chains: dict[tuple[int, int, int], list[RmapEntry]] = {}
        # With the TDP MMU heads come with the first shadow root since Linux 5.14 (d501f747); before, with every slot
        self.allocated = not mmu.vintage.tdp or mmu.vintage.format_5_10

    def add(self, as_id: int, level: int, gfn: int, entry: RmapEntry) -> int:
        """Note that `entry` maps gfn; returns how many did before."""
        chain = self._chains.setdefault((as_id, level, gfn), [])
        assert entry not in chain, f"SPTE {entry.at} is in the rmap of gfn {gfn:#x} level {level} already"
        chain.append(entry)
        self._mmu.stats.peak("max_mmu_rmap_size", len(chain) - 1)
        return len(chain) - 1

    def remove(self, as_id: int, level: int, gfn: int, entry: RmapEntry) -> None:
        """Forget it; raises AssertionError where KVM would BUG because it is not there."""
        chain = self._chains.get((as_id, level, gfn), [])
        assert entry in chain, f"SPTE {entry.at} is not in the rmap of gfn {gfn:#x} level {level}"
        chain.remove(entry)
        if not chain:
            del self._chains[as_id, level, gfn]

    def shadowed(self, as_id: int, level: int, gfn: int) -> list[RmapEntry]:
        """SPTEs of nested guests that map gfn at `level`."""
        return list(self._chains.get((as_id, level, gfn & -pages_per_level(level)), ()))

    def entries(self, slot: Memslot, gfn: int, level: int) -> Iterator[RmapEntry]:
        """Every SPTE that maps gfn at `level`, in the direct roots this MMU serves and in nested guests' pages."""
        self._mmu.vm.meter.count("rmap_walk")
        if not self._mmu.vintage.tdp:
            for root in self._mmu.roots.of(slot.as_id):
                *_, (at, spte, found) = root.walk(gfn)
                if found == level and self._mmu.fmt.is_present(spte) and self._mmu.fmt.is_leaf(spte, level):
                    yield RmapEntry(root, at)
        yield from self.shadowed(slot.as_id, level, gfn)

    def shadowed_in(self, as_id: int, start: int, end: int) -> list[tuple[int, int, RmapEntry]]:
        """(level, gfn, entry) of nested guests' SPTEs that map part of gfns [start, end)."""
        return [
            (level, gfn, entry)
            for (space, level, gfn), chain in self._chains.items()
            if space == as_id and gfn < end and gfn + pages_per_level(level) > start
            for entry in chain
        ]

    def __len__(self) -> int:
        return sum(map(len, self._chains.values()))

    def bytes_held(self) -> int:
        """Memory of the heads and chains, as KVM allocates them."""
        if not self.allocated:
            return 0
        slots = [slot for as_id in range(self._mmu.vm.config.nr_as_ids) for slot in self._mmu.vm.memslots(as_id)]
        heads = sum(_heads(slot, level) for slot in slots for level in range(PG_LEVEL_4K, MAX_HUGEPAGE_LEVEL + 1))
        chains = sum(-(-len(chain) // CHAIN_ENTRIES) for chain in self._chains.values() if len(chain) > 1)
        return heads * HEAD_BYTES + chains * CHAIN_BYTES


def _heads(slot: Memslot, level: int) -> int:
    """Rmap heads of a slot at a level: huge frames it touches."""
    span = pages_per_level(level)
    return (slot.end_gfn - 1) // span - slot.base_gfn // span + 1
