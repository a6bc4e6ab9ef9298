"""Shadow pages: tables that follow a guest's own page tables (EPT12, NPT12, or CR3's without TDP), entry for entry.

A page is found by what it shadows: the gfn of the guest's table, its level and the access granted above. A guest table
of level 2 or more becomes write-tracked: a store to it is emulated (guest_writes.py). One of level 1 is only
write-protected and may go unsync (unsync.py).
Source: Linux 6.18, arch/x86/kvm/mmu/mmu.c (kvm_mmu_get_shadow_page, __link_shadow_page, __kvm_mmu_prepare_zap_page).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from migsim.kvm.make_spte import make_nonleaf_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.page_state import lost_page_state
from migsim.kvm.rmap import CHAIN_ENTRIES, RECYCLE_THRESHOLD, Rmap, RmapEntry
from migsim.kvm.shadow_page import PageKey, ShadowPage
from migsim.kvm.spte import PG_LEVEL_4K, U64
from migsim.kvm.write_protect import write_track_add, write_track_remove

SHADOW_PFN_BASE: Final = 1 << 36  # frames of shadow pages
MMU_HASH_SHIFT: Final = 12
_GOLDEN_RATIO_64: Final = 0x61C8864680B583EB  # include/linux/hash.h


def hash_bucket(gfn: int) -> int:
    """kvm_page_table_hashfn: which of the 4096 buckets of mmu_page_hash a gfn falls into."""
    return (gfn * _GOLDEN_RATIO_64 & U64) >> 64 - MMU_HASH_SHIFT


class ShadowPages:
    """mmu_page_hash and active_mmu_pages of one VM.

    `protect(slot, gfn)` takes W and MMU-writable of every 4K mapping of gfn, in both MMUs; True if a flush is due.
    `sync(page)`: bring a page whose guest table was written unseen up to date; True: a flush is due.
    """

    def __init__(self, mmu: MmuState, rmap: Rmap, protect: Callable[[Memslot, int], bool]) -> None:
        self._mmu = mmu
        self.rmap = rmap
        self._protect = protect
        self.sync: Callable[[ShadowPage], bool] = lambda page: False
        self._buckets: dict[int, list[ShadowPage]] = {}  # newest first, as hlist_add_head leaves them
        self._active: dict[int, ShadowPage] = {}  # by frame, oldest first
        self._held: dict[int, ShadowPage] = {}  # zapped, but still the root of some vCPU
        self._next_pfn = SHADOW_PFN_BASE
        self.descs_used = 0  # struct pte_list_desc ever taken from a cache

    def __len__(self) -> int:
        return len(self._active) + len(self._held)

    def __iter__(self) -> Iterator[ShadowPage]:
        """Pages in use, oldest first (active_mmu_pages from its tail)."""
        return iter(list(self._active.values()))

    @property
    def held_count(self) -> int:
        """References of vCPUs to roots that were zapped under them."""
        return sum(page.root_count for page in self._held.values())

    @property
    def indirect(self) -> int:
        """Pages with a guest table behind them (indirect_shadow_pages)."""
        return self._mmu.indirect_shadow_pages

    def by_pfn(self, pfn: int) -> ShadowPage:
        """The page in a frame."""
        return self._active[pfn] if pfn in self._active else self._held[pfn]

    def of_gfn(self, gfn: int) -> list[ShadowPage]:
        """Pages that shadow a guest table at gfn; KVM asks for no address space here."""
        return [page for page in self._buckets.get(hash_bucket(gfn), ()) if page.key.gfn == gfn and page.has_gptes]

    def existing(self, key: PageKey) -> ShadowPage | None:
        """The page of that role if there is one; nothing is counted or brought up to date."""
        return next((page for page in self._buckets.get(hash_bucket(key.gfn), ()) if page.key == key), None)

    # -- finding and making --------------------------------------------------------------------------------------------

    def find(self, key: PageKey) -> ShadowPage | None:
        """The page of that role, brought up to date if its guest table was written; counts misses and collisions."""
        found, collisions, zapped, stats = None, 0, 0, self._mmu.stats
        for page in list(self._buckets.get(hash_bucket(key.gfn), ())):
            if page.key.gfn != key.gfn:
                collisions += 1
            elif page.key == key:
                found = page
                break
            elif key.level > PG_LEVEL_4K and page.unsync:
                # The guest has made an upper table of what was one of level 1: that will be write-protected.
                zapped += self.zap(page)
        if found is not None and found.has_gptes:
            zapped += self._freshen(found)
        if found is None:
            stats.add("mmu_cache_miss")
        if zapped:
            self._mmu.vm.flush_remote_tlbs()
        stats.peak("max_mmu_page_hash_collisions", collisions)
        return found

    def _freshen(self, page: ShadowPage) -> bool:
        """An unsync page is synced but stays unsync and writable for the guest; True: a flush is due."""
        page.write_flooding = 0
        return page.unsync and self.sync(page)

    def get(self, key: PageKey) -> ShadowPage:
        """The page that shadows `key`, made if missing (__kvm_mmu_get_shadow_page); mmu_lock is held for write."""
        page = self.find(key)
        created = page is None
        page = page or self._alloc(key)
        self._mmu.vm.trace("kvm_mmu_get_page", gfn=key.gfn, level=key.level, created=created)
        return page

    def _alloc(self, key: PageKey) -> ShadowPage:
        page = ShadowPage(key, self._next_pfn, self._mmu.fmt.nonpresent)
        self._next_pfn += 1
        self._active[page.pfn] = page
        self._buckets.setdefault(hash_bucket(key.gfn), []).insert(0, page)
        self.rmap.allocated = True
        if page.has_gptes:
            self._account_shadowed(page)
        return page

    def _account_shadowed(self, page: ShadowPage) -> None:
        """No huge page may cover the guest's table any more; upper ones are tracked, all are write-protected."""
        self._mmu.indirect_shadow_pages += 1
        slot = self._mmu.vm.gfn_to_slot(page.key.as_id, page.key.gfn)
        assert slot is not None, f"{page!r}: the guest's table lies in no memslot"
        if page.key.level > PG_LEVEL_4K:
            write_track_add(self._mmu, slot, page.key.gfn)
        else:
            slot.arch.update_disallow_lpage(page.key.gfn, 1)
        if self._protect(slot, page.key.gfn):
            self._mmu.vm.flush_remote_tlbs()

    def _unaccount_shadowed(self, page: ShadowPage) -> None:
        self._mmu.indirect_shadow_pages -= 1
        slot = self._mmu.vm.gfn_to_slot(page.key.as_id, page.key.gfn)
        assert slot is not None, f"{page!r}: its memslot went before it did"
        if page.key.level > PG_LEVEL_4K:
            write_track_remove(self._mmu, slot, page.key.gfn)
        else:
            slot.arch.update_disallow_lpage(page.key.gfn, -1)

    # -- entries -------------------------------------------------------------------------------------------------------

    def child_at(self, page: ShadowPage, entry: int) -> ShadowPage | None:
        """The page an entry points to, if it points to one."""
        fmt, spte = self._mmu.fmt, page.read(page.at(entry))
        if not fmt.is_present(spte) or fmt.is_leaf(spte, page.key.level):
            return None
        return self.by_pfn(fmt.pfn(spte))

    def link(self, parent: ShadowPage, entry: int, child: ShadowPage, *, flush: bool = True) -> None:
        """Point an entry to a child page; what was there goes first, and its translations with it.

        `flush` is False only where the child maps all that the huge page before it did.
        """
        present = self._mmu.fmt.is_present(parent.read(parent.at(entry)))
        if present and (self.drop(parent, entry, whole_tree=True) or flush):
            self._mmu.vm.flush_remote_tlbs()
        parent.write(parent.at(entry), make_nonleaf_spte(self._mmu.fmt, child.pfn, parent.key.ad_type))
        self._count_desc(len(child.parents))
        child.parents[parent.pfn, entry] = None
        assert not child.unsync_children, f"{child!r} is linked before the tables below it are in step"
        if child.unsync:
            self.mark_unsync(parent, entry)

    def mark_unsync(self, page: ShadowPage, entry: int) -> None:
        """Below this entry hangs a page that is out of step: note it all the way up to the root."""
        first = not page.unsync_children
        if entry in page.unsync_children:
            return
        page.unsync_children.add(entry)
        if first:
            self.mark_parents_unsync(page)

    def mark_parents_unsync(self, page: ShadowPage) -> None:
        """kvm_mmu_mark_parents_unsync."""
        for pfn, entry in page.parents:
            self.mark_unsync(self.by_pfn(pfn), entry)

    def set_leaf(self, page: ShadowPage, entry: int, gfn: int, spte: int, access: int) -> None:
        """Install a leaf and its rmap entry. What pointed to a table, or mapped another frame, has been dropped."""
        fmt, level = self._mmu.fmt, page.key.level
        fmt.validate_leaf(spte, gfn, level)
        old = page.write(page.at(entry), spte)
        page.gfns[entry], page.accesses[entry] = gfn, access
        if fmt.is_present(old):
            lost_page_state(self._mmu, old, spte, level)
            return
        self._count(level, 1)
        before = self.rmap.add(page.key.as_id, level, gfn, RmapEntry(page, page.at(entry)))
        self._count_desc(before)
        if before > RECYCLE_THRESHOLD:  # too long a chain is dropped as a whole and refaulted
            for other in self.rmap.shadowed(page.key.as_id, level, gfn):
                self.drop_entry(other)
            self._mmu.vm.flush_remote_tlbs()

    def _count_desc(self, before: int) -> None:
        """pte_list_add: the second pointer of a chain takes a descriptor, and then every fourteenth does."""
        self.descs_used += before == 1 or (before > 1 and before % CHAIN_ENTRIES == 0)

    def drop_entry(self, entry: RmapEntry) -> None:
        """Zap the leaf an rmap entry names."""
        self.drop(self.by_pfn(entry.at.table_pfn), entry.at.entry)

    def drop(self, page: ShadowPage, entry: int, *, whole_tree: bool = False) -> int:
        """Zap one entry, leaf, link or MMIO (mmu_page_zap_pte); returns how many pages went with it.

        `whole_tree`: pages of a nested guest's tree that nothing points to any more go too.
        """
        fmt, spte = self._mmu.fmt, page.read(page.at(entry))
        page.write(page.at(entry), fmt.nonpresent)
        if not fmt.is_present(spte):
            return 0
        if fmt.is_leaf(spte, page.key.level):
            lost_page_state(self._mmu, spte, fmt.nonpresent, page.key.level)
            gfn = page.gfns.pop(entry)
            del page.accesses[entry]
            self.rmap.remove(page.key.as_id, page.key.level, gfn, RmapEntry(page, page.at(entry)))
            self._count(page.key.level, -1)
            return 0
        child = self.by_pfn(fmt.pfn(spte))
        del child.parents[page.pfn, entry]
        orphan = self._mmu.vm.config.tdp and child.key.guest_mode and not child.parents
        return self.zap(child) if whole_tree and orphan else 0

    def _count(self, level: int, n: int) -> None:
        self._mmu.shadowed_leafs[level] += n
        self._mmu.stats.update_page_stats(level, n)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def zap(self, page: ShadowPage) -> int:
        """Zap a page, and what hangs on it alone; returns how many pages went. The caller flushes.

        A root that a vCPU holds stays, invalid, until it lets go.
        """
        self._mmu.vm.trace("kvm_mmu_prepare_zap_page", gfn=page.key.gfn, level=page.key.level)
        self._mmu.stats.add("mmu_shadow_zapped")
        zapped = sum(self.zap(child) for child in self.unsync_below(page) if not child.invalid)
        for entry in tuple(page.sptes):
            zapped += self.drop(page, entry, whole_tree=True)
        for pfn, entry in tuple(page.parents):
            self.drop(self.by_pfn(pfn), entry)
        if not page.invalid and page.has_gptes:
            self._unaccount_shadowed(page)
        if page.unsync:
            self.unlink_unsync(page)
        if self._mmu.nx_shadow.discard(page, page.pfn):
            self._mmu.stats.add("nx_lpage_splits", -1)
        page.nx_disallowed = False
        self._retire(page)
        return zapped + (not page.root_count)

    def _retire(self, page: ShadowPage) -> None:
        """Out of the hash and the list; freed, or held for the vCPUs that still have it as their root."""
        if not page.invalid:
            self._buckets[hash_bucket(page.key.gfn)].remove(page)
        self._active.pop(page.pfn, None)
        self._held.pop(page.pfn, None)
        page.invalid = True
        if page.root_count:
            self._held[page.pfn] = page

    def put_root(self, page: ShadowPage) -> None:
        """A vCPU lets its root go (mmu_free_root_page); the last one frees it if it was zapped meanwhile."""
        assert page.root_count > 0, f"{page!r}: reference dropped below zero"
        page.root_count -= 1
        if not page.root_count and page.invalid:
            self.zap(page)
            self._mmu.vm.flush_remote_tlbs()

    def unsync_below(self, page: ShadowPage) -> list[ShadowPage]:
        """Unsync pages in the tree below, by the marks kept on the way (mmu_unsync_walk, without its limit of 16)."""
        found: list[ShadowPage] = []
        for entry in sorted(page.unsync_children):
            child = self.child_at(page, entry)
            if child is not None and child.unsync and child not in found:
                found.append(child)
            elif child is not None:
                found += [below for below in self.unsync_below(child) if below not in found]
        return found

    def unlink_unsync(self, page: ShadowPage) -> None:
        """The page is in step with the guest's table again, or gone."""
        assert page.unsync, f"{page!r} is not unsync"
        self._mmu.vm.trace("kvm_mmu_sync_page", gfn=page.key.gfn, level=page.key.level)
        page.unsync = False
        self._mmu.stats.add("mmu_unsync", -1)

    def zap_all(self) -> int:
        """Zap every page; returns how many went."""
        return sum(self.zap(page) for page in self if not page.invalid)

    def zap_in(self, slot: Memslot) -> bool:
        """Zap the pages that shadow tables lying in a slot; True if there was one."""
        pages = [page for page in self if page.has_gptes and page.key.as_id == slot.as_id and page.key.gfn in slot]
        return sum(self.zap(page) for page in pages if not page.invalid) > 0
