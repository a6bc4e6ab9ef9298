"""The shadow MMU: serves direct roots where the TDP MMU does not, and nested guests always. One exclusive lock.

The same operations as tdp_ops.TdpMmu, reached through the reverse map: cost is per gfn of the slot, even where nothing
is mapped. Source: Linux 6.13 with tdp_mmu=N, arch/x86/kvm/mmu/mmu.c.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

from migsim.kvm import whole_slot
from migsim.kvm.changed_spte import handle_changed_spte
from migsim.kvm.collapse import zap_small_leafs
from migsim.kvm.direct_prefetch import prefetch
from migsim.kvm.guest_tables import GuestTables
from migsim.kvm.guest_writes import GuestWrites
from migsim.kvm.levels import PageFault, max_mapping_level
from migsim.kvm.make_spte import change_pfn, mark_for_access_track
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.page_limit import PageLimit
from migsim.kvm.page_state import lost_page_state
from migsim.kvm.rmap import Rmap, RmapEntry
from migsim.kvm.roots import Root
from migsim.kvm.shadow_fault import ShadowFaults
from migsim.kvm.shadow_page import ShadowPage
from migsim.kvm.shadow_pages import ShadowPages
from migsim.kvm.shadow_split import ShadowSplit
from migsim.kvm.spte import MAX_HUGEPAGE_LEVEL, PG_LEVEL_2M, PG_LEVEL_4K
from migsim.kvm.tdp_mmu import RetPf, tdp_mmu_map
from migsim.kvm.unsync import Unsync
from migsim.kvm.zap import zap_root
from migsim.units import REGION_PAGES, WORD_BITS, pages_per_level

BATCH_ZAP_PAGES: Final = 10

Change = Callable[[int], int]  # what becomes of an SPTE


class HoldsRoots(Protocol):
    """A guest whose tables are shadowed, as far as the end of the VM is concerned."""

    def unload(self, vcpu: Any) -> None: ...


class ShadowMmu:
    """The shadow MMU of one VM. `direct`: it serves direct roots too, because the TDP MMU is off."""

    def __init__(self, mmu: MmuState, protect: Callable[[Memslot, int], bool]) -> None:
        self.mmu = mmu
        self.direct = not mmu.vintage.tdp
        self.rmap = Rmap(mmu)
        self.pages = ShadowPages(mmu, self.rmap, protect)
        self.limit = PageLimit(mmu, self.pages)
        self.tables = GuestTables(mmu)
        self.unsync = Unsync(mmu, self.pages, self.tables, protect)
        self.faults = ShadowFaults(mmu, self.pages, self.tables, self.unsync, self.limit)
        self.writes = GuestWrites(mmu, self.pages, self.tables)
        self.split = ShadowSplit(mmu, self.rmap, self.pages, self.limit)
        self.held_roots: list[tuple[HoldsRoots, Any]] = []  # (guest, vCPU) for each root of a shadowed guest in use

    def _write(self) -> AbstractContextManager[bool]:
        return nullcontext(False) if self.mmu.lock.writer else self.mmu.lock.write()

    def _idle(self) -> bool:
        """No rmap exists, so there is nothing to do (kvm_memslots_have_rmaps)."""
        return not self.direct and not len(self.rmap)

    def split_slot(self, slot: Memslot, start: int, end: int) -> None:
        """Eager splitting of nested guests' huge pages over gfns [start, end)."""
        if self._idle() or not self.mmu.vintage.nested_eager_split:
            return
        with self._write():
            self.split.split_range(slot, start, end, PG_LEVEL_4K)

    # -- faults --------------------------------------------------------------------------------------------------------

    def map(self, root: Root, fault: PageFault) -> RetPf:
        """direct_map: the TDP MMU's walk under the exclusive lock, then up to seven neighbours in advance."""
        self.limit.make_available()
        result = tdp_mmu_map(self.mmu, root, fault)
        self.mmu.vm.meter.count("rmap_add")
        if result not in (RetPf.SPURIOUS, RetPf.RETRY) and fault.goal_level == PG_LEVEL_4K and not fault.prefetch:
            prefetch(self.mmu, root, fault, self._set)
        return result

    # -- one SPTE ------------------------------------------------------------------------------------------------------

    def _set(self, entry: RmapEntry, gfn: int, level: int, new: int, *, aging: bool = False) -> None:
        """Write an SPTE that an rmap led to, with the bookkeeping of its kind of table."""
        table = entry.table
        if isinstance(table, ShadowPage):
            if self.mmu.fmt.is_present(new):
                lost_page_state(self.mmu, table.write(entry.at, new), new, level, aging=aging)
            else:
                self.pages.drop_entry(entry)
            return
        assert isinstance(table, Root)
        old = table.write(entry.at, new)
        first = gfn & -pages_per_level(level)
        handle_changed_spte(self.mmu, table, first, old, new, level, shared=False, aging=aging)

    def _change(self, slot: Memslot, gfn: int, level: int, change: Change) -> bool:
        """Apply `change` to every SPTE that maps gfn at `level`; True if one changed."""
        changed = False
        for entry in list(self.rmap.entries(slot, gfn, level)):
            old = entry.table.read(entry.at)
            new = change(old)
            if new != old:
                self._set(entry, gfn, level, new, aging=change == self._old)
                changed = True
        return changed

    def _change_range(self, slot: Memslot, start: int, end: int, change: Change, min_level: int = PG_LEVEL_4K) -> bool:
        """The same over all rmap heads of gfns [start, end), largest pages last."""
        changed = False
        for level in range(min_level, MAX_HUGEPAGE_LEVEL + 1):
            span = pages_per_level(level)
            for gfn in range(start & -span, end, span):
                changed = self._change(slot, max(gfn, slot.base_gfn), level, change) or changed
        return changed

    def _whole(self, slot: Memslot, start: int, end: int) -> list[Root] | None:
        """The direct roots, where a range is large enough to be done on their planes at once."""
        if not self.direct or not whole_slot.suits(self.mmu, end - start):
            return None
        self.mmu.vm.meter.count("rmap_walk", end - start)
        return list(self.mmu.roots.of(slot.as_id))

    # -- logging -------------------------------------------------------------------------------------------------------

    def _unwrite(self, spte: int) -> int:
        return spte & ~self.mmu.fmt.writable

    def _rearm(self, spte: int, *, wrprot: bool) -> int:
        """Without D, or where D may not be trusted, W is what gets cleared."""
        fmt = self.mmu.fmt
        return spte & ~(fmt.writable if wrprot or fmt.ad_need_write_protect(spte) else fmt.dirty)

    def wrprot_slot(self, slot: Memslot, min_level: int) -> bool:
        """Take W through the rmaps of `min_level` and above."""
        if self._idle():
            return False
        with self._write():
            roots = self._whole(slot, slot.base_gfn, slot.end_gfn)
            if roots is None:
                return self._change_range(slot, slot.base_gfn, slot.end_gfn, self._unwrite, min_level)
            args = slot.base_gfn, slot.end_gfn, min_level
            changed = sum(whole_slot.wrprot_range(self.mmu, root, *args) for root in roots) > 0
            return self._shadowed(slot, slot.base_gfn, slot.end_gfn, self._unwrite, min_level) or changed

    def clear_dirty_slot(self, slot: Memslot) -> bool:
        """Clear D through the 4K rmaps; huge ones are write-protected by the caller."""
        if self._idle():
            return False

        def clear(spte: int) -> int:
            return self._rearm(spte, wrprot=False)

        with self._write():
            roots = self._whole(slot, slot.base_gfn, slot.end_gfn)
            if roots is None:
                gfns = range(slot.base_gfn, slot.end_gfn)
                return sum(self._change(slot, gfn, PG_LEVEL_4K, clear) for gfn in gfns) > 0
            changed = sum(whole_slot.clear_dirty_leafs_4k(self.mmu, root, slot) for root in roots) > 0
            return self._shadowed(slot, slot.base_gfn, slot.end_gfn, clear, PG_LEVEL_4K, PG_LEVEL_4K) or changed

    def _shadowed(
        self, slot: Memslot, start: int, end: int, change: Change, low: int, high: int = MAX_HUGEPAGE_LEVEL
    ) -> bool:
        """Apply `change` to nested guests' SPTEs of a range."""
        changed = False
        for level, gfn, entry in self.rmap.shadowed_in(slot.as_id, start, end):
            old = entry.table.read(entry.at)
            if low <= level <= high and change(old) != old:
                self._set(entry, gfn, level, change(old), aging=change == self._old)
                changed = True
        return changed

    def clear_dirty_pt_masked(self, slot: Memslot, gfn: int, mask: int, *, wrprot: bool) -> None:
        """Re-arm the pages of `mask`: one rmap walk for each set bit."""
        if self._idle():
            return
        with self._write():
            for bit in range(WORD_BITS):
                if mask >> bit & 1:
                    self._change(slot, gfn + bit, PG_LEVEL_4K, lambda spte: self._rearm(spte, wrprot=wrprot))

    def collapse_slot(self, slot: Memslot) -> None:
        """Drop every leaf of a direct table that could be mapped larger; the table stays, empty. Then flush.

        A nested guest's huge page is split into a direct table too. What follows a table of the guest's own stays.
        """
        if self._idle():
            return
        with self._write():
            changed = self._drop_shadowed_small_leafs(slot)
            if self.direct:
                changed = self._drop_small_leafs(slot) or changed
            if changed:
                self.mmu.vm.flush_remote_tlbs_memslot(slot)

    def _drop_shadowed_small_leafs(self, slot: Memslot) -> bool:
        changed = False
        for level, _, entry in self.rmap.shadowed_in(slot.as_id, slot.base_gfn, slot.end_gfn):
            key = self.pages.by_pfn(entry.at.table_pfn).key
            if key.direct and level < max_mapping_level(self.mmu, slot, max(key.gfn, slot.base_gfn)):
                self.pages.drop_entry(entry)
                changed = True
        return changed

    def _drop_small_leafs(self, slot: Memslot) -> bool:
        changed = False
        with self.mmu.rcu.read():
            if whole_slot.suits(self.mmu, slot.npages) and not len(self.rmap) and slot.base_gfn % REGION_PAGES == 0:
                zapped = sum(zap_small_leafs(self.mmu, root, slot) for root in self.mmu.roots.valid(slot.as_id))
                self.mmu.vm.meter.count("rmap_walk", zapped)
                return zapped > 0
            for level in (PG_LEVEL_4K, PG_LEVEL_2M):
                span = pages_per_level(level)
                for root in self.mmu.roots.valid(slot.as_id):
                    for gfn in whole_slot.leafs_of(self.mmu, root, slot, level):
                        if level < max_mapping_level(self.mmu, slot, gfn):
                            changed = self._drop_direct(slot, gfn & -span, level) or changed
        return changed

    def _drop_direct(self, slot: Memslot, gfn: int, level: int) -> bool:
        """The SPTEs of direct roots alone: what follows a guest's table is as small as the guest made it."""
        direct = [entry for entry in self.rmap.entries(slot, gfn, level) if isinstance(entry.table, Root)]
        for entry in direct:
            self._set(entry, gfn, level, self.mmu.fmt.nonpresent)
        return bool(direct)

    def _gone(self, spte: int) -> int:
        return self.mmu.fmt.nonpresent

    # -- zapping -------------------------------------------------------------------------------------------------------

    def zap_range(self, as_id: int, start: int, end: int) -> bool:
        """Drop every SPTE that maps part of gfns [start, end); tables stay."""
        if self._idle():
            return False
        flush = False
        with self._write():
            for slot in self.mmu.vm.memslots(as_id):
                low, high = max(start, slot.base_gfn), min(end, slot.end_gfn)
                if low < high:
                    flush = self._zap_in_slot(slot, low, high) or flush
        return flush

    def _zap_in_slot(self, slot: Memslot, start: int, end: int) -> bool:
        roots = self._whole(slot, start, end)
        if roots is None:
            return self._change_range(slot, start, end, self._gone)
        flush = False
        for root in roots:
            flush = whole_slot.zap_leafs(self.mmu, root, start, end, flush=flush)
        return self._shadowed(slot, start, end, self._gone, PG_LEVEL_4K) or flush

    def zap_all(self) -> None:
        """Flip the generation, so that vCPUs load new roots, then zap the obsolete pages in batches of 10."""
        with self.mmu.lock.write():
            obsolete = self.mmu.roots.invalidate(self.mmu.roots.valid()) if self.direct else []
            self.pages.zap_all()
            self._zap_obsolete(obsolete)
            self.mmu.vm.flush_remote_tlbs()

    def _zap_obsolete(self, obsolete: list[Root]) -> None:
        for root in obsolete:
            tables = sum(root.n_tables)
            self.mmu.stats.add("mmu_shadow_zapped", tables)
            self.mmu.vm.meter.count("zap_batches", -(-tables // BATCH_ZAP_PAGES))
            root.zap_scheduled = False
            zap_root(self.mmu, root)
            self.mmu.roots.put(root)

    def destroy(self) -> None:
        """Let every root go and zap everything that is left."""
        for guest, vcpu in list(self.held_roots):
            guest.unload(vcpu)
        with self.mmu.lock.write():
            self.pages.zap_all()
            if self.direct:
                self._zap_obsolete([root for root in self.mmu.roots if root.zap_scheduled])

    # -- single pages --------------------------------------------------------------------------------------------------

    def write_protect_gfn(self, slot: Memslot, gfn: int, min_level: int = PG_LEVEL_4K) -> bool:
        """Sticky write protection at every level from `min_level` on; mmu_lock is held for write."""
        both = self.mmu.fmt.writable | self.mmu.fmt.mmu_writable
        levels = range(min_level, MAX_HUGEPAGE_LEVEL + 1)
        return not self._idle() and sum(self._change(slot, gfn, level, lambda s: s & ~both) for level in levels) > 0

    def age(self, slot: Memslot, start: int, end: int) -> bool:
        """Make old; True if one was young."""
        if self._idle():
            return False
        with self.mmu.aging_lock():
            roots = self._whole(slot, start, end) if self.mmu.ad_enabled else None
            if roots is None:
                young = self._young(slot, start, end)
                self._change_range(slot, start, end, self._old)
                return young
            young = sum(whole_slot.age_range(self.mmu, root, start, end) for root in roots) > 0
            return self._shadowed(slot, start, end, self._old, PG_LEVEL_4K) or young

    def _old(self, spte: int) -> int:
        return mark_for_access_track(self.mmu.fmt, spte)

    def test_age(self, slot: Memslot, start: int, end: int) -> bool:
        """Is any young?"""
        if self._idle():
            return False
        with self.mmu.aging_lock():
            return self._young(slot, start, end)

    def _young(self, slot: Memslot, start: int, end: int) -> bool:
        return any(
            self.mmu.fmt.is_accessed(entry.table.read(entry.at))
            for gfn in range(start, end)
            for level in range(PG_LEVEL_4K, MAX_HUGEPAGE_LEVEL + 1)
            for entry in self.rmap.entries(slot, gfn, level)
        )

    def set_spte_gfn(self, slot: Memslot, gfn: int, pfn: int, *, writable: bool) -> bool:
        """changed_pte: drop the SPTEs, or (read-only page) point them to the new frame after zapping and flushing."""
        if self._idle():
            return False
        hit = False
        with self._write():
            for entry in list(self.rmap.entries(slot, gfn, PG_LEVEL_4K)):
                old, hit = entry.table.read(entry.at), True
                self._set(entry, gfn, PG_LEVEL_4K, self.mmu.fmt.nonpresent)
                if not writable and isinstance(entry.table, Root):
                    self.mmu.flush_gfn(entry.table, gfn, 1)
                    self._set(entry, gfn, PG_LEVEL_4K, change_pfn(self.mmu.fmt, old, pfn))
        return hit
