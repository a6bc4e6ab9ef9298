"""Shadow pages: tables that follow a nested guest's own page tables (EPT12, NPT12), entry for entry.

A page is found by what it shadows: the gfn of the guest's table, its level and the access granted above. The guest's
table becomes write-protected; a store to it is emulated and zaps the SPTE made from the entry.
Source: Linux 6.13, arch/x86/kvm/mmu/mmu.c (kvm_mmu_get_shadow_page, kvm_mmu_prepare_zap_page, kvm_mmu_track_write).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from migsim.kvm.make_spte import make_nonleaf_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep
from migsim.kvm.rmap import RECYCLE_THRESHOLD, Rmap, RmapEntry
from migsim.kvm.spte import PG_LEVEL_4K, AdType

SHADOW_PFN_BASE: Final = 1 << 36  # frames of shadow pages
FLOODING_STORES: Final = 3
PERMILLE_PAGES: Final = 20  # shadow pages allowed per 1000 guest pages (KVM_PERMILLE_MMU_PAGES)
MIN_ALLOC_PAGES: Final = 64
MIN_FREE_PAGES: Final = 5
REFILL_PAGES: Final = 25


class PageKey(NamedTuple):
    """What a shadow page shadows. `direct`: no guest table, but a part of one guest huge page at `gfn`."""

    as_id: int
    gfn: int
    level: int
    access: int
    direct: bool = False


class ShadowPage:
    """One table page: 512 entries (only those in use are kept), and the entries that point to it."""

    def __init__(self, key: PageKey, pfn: int, nonpresent: int) -> None:
        self.key = key
        self.pfn = pfn
        self._nonpresent = nonpresent
        self.sptes: dict[int, int] = {}
        self.gfns: dict[int, int] = {}  # entry -> L1 gfn a leaf maps
        self.parents: set[tuple[int, int]] = set()  # (table frame, entry)
        self.write_flooding = 0  # stores to the guest's table since L2 last used this page

    def read(self, at: Sptep) -> int:
        """The SPTE at an entry."""
        return self.sptes.get(at.entry, self._nonpresent)

    def write(self, at: Sptep, spte: int) -> int:
        """Exchange an entry; returns the old value."""
        old = self.read(at)
        if spte == self._nonpresent:
            self.sptes.pop(at.entry, None)
        else:
            self.sptes[at.entry] = spte
        return old

    def at(self, entry: int) -> Sptep:
        """Pointer to an entry."""
        return Sptep(self.pfn, entry)


class ShadowPages:
    """mmu_page_hash and active_mmu_pages of one VM. `track(slot, gfn)` and `untrack` write-protect guest tables."""

    def __init__(
        self,
        mmu: MmuState,
        rmap: Rmap,
        track: Callable[[Memslot, int], None],
        untrack: Callable[[Memslot, int], None],
    ) -> None:
        self._mmu = mmu
        self.rmap = rmap
        self._track, self._untrack = track, untrack
        self._by_key: dict[PageKey, ShadowPage] = {}
        self._by_pfn: dict[int, ShadowPage] = {}
        self._next_pfn = SHADOW_PFN_BASE

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[ShadowPage]:
        return iter(list(self._by_key.values()))

    def by_pfn(self, pfn: int) -> ShadowPage:
        """The page in a frame."""
        return self._by_pfn[pfn]

    def get(self, key: PageKey) -> ShadowPage:
        """The page that shadows `key`, made if missing; its guest table is write-protected from then on."""
        page = self._by_key.get(key)
        self._mmu.vm.trace("kvm_mmu_get_page", gfn=key.gfn, level=key.level, created=page is None)
        if page is not None:
            return page
        page = ShadowPage(key, self._next_pfn, self._mmu.fmt.nonpresent)
        self._next_pfn += 1
        self._by_key[key] = self._by_pfn[page.pfn] = page
        self.rmap.allocated = True
        slot = self._mmu.vm.gfn_to_slot(key.as_id, key.gfn)
        if not key.direct and slot is not None:
            self._track(slot, key.gfn)
        self._mmu.stats.peak("max_mmu_page_hash_collisions", 0)
        return page

    # -- entries -------------------------------------------------------------------------------------------------------

    def link(self, parent: ShadowPage, entry: int, child: ShadowPage, ad_type: AdType) -> None:
        """Point an entry to a child page; what was there goes first."""
        spte = make_nonleaf_spte(self._mmu.fmt, child.pfn, ad_type)
        if parent.read(parent.at(entry)) == spte:
            return
        self.drop(parent, entry)
        parent.write(parent.at(entry), spte)
        child.parents.add((parent.pfn, entry))

    def set_leaf(self, page: ShadowPage, entry: int, gfn: int, spte: int) -> None:
        """Install a leaf and its rmap entry; a frame is never changed in place."""
        fmt, level = self._mmu.fmt, page.key.level
        fmt.validate_leaf(spte, gfn, level)
        old = page.read(page.at(entry))
        same = fmt.is_present(old) and fmt.is_leaf(old, level) and fmt.pfn(old) == fmt.pfn(spte)
        if not same:
            self.drop(page, entry)
        page.write(page.at(entry), spte)
        if same:
            return
        page.gfns[entry] = gfn
        self._count(level, 1)
        before = self.rmap.add(page.key.as_id, level, gfn, RmapEntry(page, page.at(entry)))
        if before >= RECYCLE_THRESHOLD:  # rmap_recycle: too long a chain is dropped as a whole and refaulted
            for other in self.rmap.shadowed(page.key.as_id, level, gfn):
                self.drop_entry(other)

    def drop_entry(self, entry: RmapEntry) -> bool:
        """Zap the leaf an rmap entry names."""
        page = self._by_pfn[entry.at.table_pfn]
        return self.drop(page, entry.at.entry)

    def drop(self, page: ShadowPage, entry: int) -> bool:
        """Zap one entry, leaf or link; True if something present was there."""
        fmt, spte = self._mmu.fmt, page.read(page.at(entry))
        if not fmt.is_present(spte):
            return False
        page.write(page.at(entry), fmt.nonpresent)
        if fmt.is_leaf(spte, page.key.level):
            gfn = page.gfns.pop(entry)
            self.rmap.remove(page.key.as_id, page.key.level, gfn, RmapEntry(page, page.at(entry)))
            self._count(page.key.level, -1)
        else:
            self._by_pfn[fmt.pfn(spte)].parents.discard((page.pfn, entry))
        return True

    def _count(self, level: int, n: int) -> None:
        self._mmu.shadowed_leafs[level] += n
        self._mmu.stats.update_page_stats(level, n)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def zap(self, page: ShadowPage) -> None:
        """Unlink a page from its parents, zap its entries, unprotect the guest table, free it."""
        self._mmu.vm.trace("kvm_mmu_prepare_zap_page", gfn=page.key.gfn, level=page.key.level)
        self._mmu.stats.add("mmu_shadow_zapped")
        for pfn, entry in tuple(page.parents):
            self.drop(self._by_pfn[pfn], entry)
        for entry in tuple(page.sptes):
            self.drop(page, entry)
        del self._by_key[page.key], self._by_pfn[page.pfn]
        slot = self._mmu.vm.gfn_to_slot(page.key.as_id, page.key.gfn)
        if not page.key.direct and slot is not None and self._mmu.is_write_tracked(slot, page.key.gfn):
            self._untrack(slot, page.key.gfn)

    def zap_all(self) -> int:
        """Zap every page; returns how many there were."""
        pages = list(self._by_key.values())
        for page in pages:
            self.zap(page)
        return len(pages)

    def zap_in(self, slot: Memslot) -> bool:
        """Zap the pages that shadow tables lying in a slot; True if there was one."""
        keys = [key for key in self._by_key if key.as_id == slot.as_id and key.gfn in slot]
        for key in keys:
            self.zap(self._by_key[key])
        return bool(keys)

    def _is_flooded(self, page: ShadowPage) -> bool:
        """Three stores without a use: the guest has other plans for that memory (detect_write_flooding).

        Not for the lowest level, and direct roots keep no such count: it is about guest tables.
        """
        if page.key.level == PG_LEVEL_4K:
            return False
        page.write_flooding += 1
        return page.write_flooding >= FLOODING_STORES

    def make_available(self, keep: ShadowPage) -> None:
        """Zap the oldest pages if fewer than 5 may still be made, until 25 may (make_mmu_pages_available)."""
        vm = self._mmu.vm
        total = sum(slot.npages for as_id in range(vm.config.nr_as_ids) for slot in vm.memslots(as_id))
        limit = max(MIN_ALLOC_PAGES, total * PERMILLE_PAGES // 1000)
        if limit - len(self) >= MIN_FREE_PAGES:
            return
        for page in self:
            if limit - len(self) >= REFILL_PAGES:
                break
            if page is not keep:
                self.zap(page)
                self._mmu.stats.add("mmu_recycled")

    def track_write(self, as_id: int, gfn: int, entry: int) -> bool:
        """The guest stored to entry `entry` of a shadowed table: zap what was made from it. True: a flush is due."""
        hit = False
        for page in list(self._by_key.values()):
            if page.key.direct or (page.key.as_id, page.key.gfn) != (as_id, gfn):
                continue
            self._mmu.stats.add("mmu_pte_write")
            if self._is_flooded(page):
                self._mmu.stats.add("mmu_flooded")
                self.zap(page)
                hit = True
            elif self.drop(page, entry):
                self._mmu.stats.add("mmu_pde_zapped", int(page.key.level > 1))
                hit = True
        return hit
