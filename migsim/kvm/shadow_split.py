"""Eager splitting of a nested guest's huge pages, found through the rmap (Linux 6.0, ada51a9d).

A huge SPTE of a shadow page is replaced by a direct page of 512 with the same frames, W and D, so that nothing has to
be flushed. Memory comes from caches of the VM that are topped up with mmu_lock dropped, after which the rmap is looked
at anew. What cannot be split now the fault will split. Source: Linux 6.18, arch/x86/kvm/mmu/mmu.c
(kvm_shadow_mmu_try_split_huge_pages and above).
"""

from __future__ import annotations

from errno import EAGAIN, ENOSPC
from typing import Final

from migsim.kvm.make_spte import make_split_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.page_limit import MIN_FREE_PAGES, PageLimit
from migsim.kvm.paging import Sptep
from migsim.kvm.rmap import Rmap
from migsim.kvm.shadow_page import ShadowPage
from migsim.kvm.shadow_pages import ShadowPages
from migsim.kvm.spte import ACC_EXEC, ENTRIES, MAX_HUGEPAGE_LEVEL, gfn_round
from migsim.units import pages_per_level

CACHE_OBJECTS: Final = 40  # KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE
DESC_MIN: Final = ENTRIES + 1  # SPLIT_DESC_CACHE_MIN_NR_OBJECTS: a rmap entry for each page, and one for the parent


class SplitCaches:
    """kvm->arch.split_*_cache: objects left of each kind. They are empty until first topped up."""

    def __init__(self) -> None:
        self.descs = self.pages = 0  # a page comes with its header

    @property
    def need_topup(self) -> bool:
        """Too few for the worst case of one split?"""
        return self.descs < DESC_MIN or self.pages < 1

    def topup(self) -> None:
        """Fill up what ran low; may sleep."""
        if self.descs < DESC_MIN:
            self.descs = DESC_MIN + CACHE_OBJECTS
        if self.pages < 1:
            self.pages = CACHE_OBJECTS

    def spend(self, descs: int, pages: int) -> None:
        """One split took these."""
        self.descs, self.pages = self.descs - descs, self.pages - pages
        assert self.descs >= 0 and self.pages >= 0, f"split caches overdrawn: {self.descs} descs, {self.pages} pages"


class ShadowSplit:
    """Splits shadowed guests' huge pages over a range of gfns."""

    def __init__(self, mmu: MmuState, rmap: Rmap, pages: ShadowPages, limit: PageLimit) -> None:
        self._mmu, self._rmap, self._pages, self._limit = mmu, rmap, pages, limit
        self.caches = SplitCaches()

    def split_range(self, slot: Memslot, start: int, end: int, target_level: int) -> None:
        """From the largest pages down, so that what a split leaves is split again; mmu_lock is held for write."""
        assert self._mmu.lock.writer, f"gfns {start:#x}..{end:#x} of a shadowed guest split without the exclusive lock"
        for level in range(MAX_HUGEPAGE_LEVEL, target_level, -1):
            span = pages_per_level(level)
            for gfn in range(gfn_round(start, level), end, span):
                self._mmu.vm.meter.count("rmap_walk")
                self._split_chain(slot, max(gfn, slot.base_gfn), level)
                if self._mmu.sched.need_resched():
                    self._yield()

    def _split_chain(self, slot: Memslot, gfn: int, level: int) -> None:
        """Every SPTE that maps gfn at `level`. After a split, and after the lock was dropped, from the beginning."""
        while True:
            for entry in self._rmap.shadowed(slot.as_id, level, gfn):
                page = self._pages.by_pfn(entry.at.table_pfn)
                assert page.key.guest_mode and not page.unsync, f"{page!r} has a huge SPTE of gfn {gfn:#x}"
                if page.invalid:
                    continue
                if self.try_split(page, entry.at) in (0, -EAGAIN):
                    break
                return
            else:
                return

    def try_split(self, page: ShadowPage, at: Sptep) -> int:
        """0, or -EAGAIN: the lock was dropped, look again; -ENOSPC: too many shadow pages (shadow_mmu_try_split)."""
        gfn, level, spte = page.gfns[at.entry], page.key.level, page.read(at)
        result = 0
        if self._limit.available <= MIN_FREE_PAGES:
            result = -ENOSPC
        elif self._mmu.sched.need_resched() or self.caches.need_topup:
            self._yield(topup=True)
            result = -EAGAIN
        else:
            self._split(page, at.entry)
        self._mmu.vm.trace("kvm_mmu_split_huge_page", gfn=gfn, spte=spte, level=level, errno=result)
        return result

    def _yield(self, *, topup: bool = False) -> None:
        with self._mmu.lock.dropped():
            self._mmu.sched.resched()
            if topup:
                self.caches.topup()

    def _split(self, page: ShadowPage, entry: int) -> None:
        """Fill a direct page and link it. It may be there already, for an alias: then its entries stay as they are.

        An entry that points to a table may map less than the huge page did: only then is a flush due.
        """
        fmt, huge, level = self._mmu.fmt, page.read(page.at(entry)), page.key.level
        before, flush = self._pages.descs_used, False
        gfn, access = page.gfns[entry], page.accesses[entry]
        made = len(self._pages)
        child = self._pages.get(page.key.child(gfn, access, direct=True))
        nx = self._mmu.nx_huge_pages and bool(access & ACC_EXEC)
        for index in range(ENTRIES):
            old = child.read(child.at(index))
            if fmt.is_present(old):
                flush = flush or not fmt.is_leaf(old, level - 1)
                continue
            small = make_split_spte(fmt, huge, level, index, nx_huge_pages=nx)
            self._pages.set_leaf(child, index, gfn + index * pages_per_level(level - 1), small, access)
        new_page = len(self._pages) > made
        self._pages.link(page, entry, child, flush=flush)
        self._mmu.vm.meter.count("huge_page_split")
        self.caches.spend(self._pages.descs_used - before, int(new_page))
