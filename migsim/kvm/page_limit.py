"""How many shadow pages a VM may have, and which go when there are too many.

The limit is 2 % of the guest's pages, at least 64, unless user space sets another (KVM_SET_NR_MMU_PAGES). A fault of
the shadow MMU that finds fewer than 5 left zaps the oldest, until 25 are. Tables of the TDP MMU do not count.
Source: Linux 6.18, arch/x86/kvm/mmu/mmu.c (make_mmu_pages_available, kvm_mmu_zap_oldest_mmu_pages), x86.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import EINVAL, ENOSPC
from typing import Final

from migsim.kvm.host_mm import TABLE_PFN_BASE
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep
from migsim.kvm.roots import Root
from migsim.kvm.shadow_pages import ShadowPages
from migsim.kvm.spte import ENTRIES, PG_LEVEL_2M
from migsim.kvm.uapi import kvm_error
from migsim.kvm.zap import zap_table

MEMSLOT_PAGES_TO_MMU_PAGES_RATIO: Final = 50
MIN_ALLOC_PAGES: Final = 64  # KVM_MIN_ALLOC_MMU_PAGES
MIN_FREE_PAGES: Final = 5  # KVM_MIN_FREE_MMU_PAGES
REFILL_PAGES: Final = 25  # KVM_REFILL_PAGES


class PageLimit:
    """`limit`: n_max_mmu_pages; `requested`: user space set it, so that it no longer follows the guest's size."""

    def __init__(self, mmu: MmuState, pages: ShadowPages) -> None:
        self._mmu, self._pages = mmu, pages
        self.limit = MIN_ALLOC_PAGES
        self.requested = False

    @property
    def used(self) -> int:
        """n_used_mmu_pages: shadow pages, and the direct tables where the shadow MMU keeps those too."""
        direct = 0 if self._mmu.vintage.tdp else sum(sum(root.n_tables) for root in self._mmu.roots)
        return len(self._pages) + direct

    @property
    def available(self) -> int:
        """kvm_mmu_available_pages."""
        return max(self.limit - self.used, 0)

    def slot_pages_changed(self, nr_memslot_pages: int) -> None:
        """A slot was created or deleted: the limit follows (kvm_arch_commit_memory_region)."""
        if not self.requested:
            self.change(max(nr_memslot_pages // MEMSLOT_PAGES_TO_MMU_PAGES_RATIO, MIN_ALLOC_PAGES))

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES. Raises OSError EINVAL below 64."""
        if pages < MIN_ALLOC_PAGES:
            raise kvm_error(EINVAL, f"{pages} MMU pages: at least {MIN_ALLOC_PAGES}")
        self.change(pages)
        self.requested = True

    def change(self, goal: int) -> None:
        """kvm_mmu_change_mmu_pages: what is above goes at once, and then what is left is the limit.

        Of a nested guest that may be its root alone, as pages below one that is zapped go with it: faults then fail
        with ENOSPC until the limit is set again, in KVM too.
        """
        with self._mmu.lock.write():
            if self.used > goal:
                self.zap_oldest(self.used - goal)
                goal = self.used
            self.limit = goal

    def make_available(self) -> None:
        """Before a fault of the shadow MMU makes pages. Raises OSError ENOSPC if not one is to be had."""
        if self.available >= MIN_FREE_PAGES:
            return
        self.zap_oldest(REFILL_PAGES - self.available)
        if not self.available:
            raise kvm_error(ENOSPC, f"all {self.limit} MMU pages are in use by roots")

    def zap_oldest(self, wanted: int) -> int:
        """Zap pages, oldest first and never a root in use, until `wanted` have gone; returns how many did."""
        zapped = 0
        for page in self._pages:
            if zapped >= wanted:
                break
            if not page.root_count and not page.invalid:
                zapped += self._pages.zap(page)
        if zapped < wanted and not self._mmu.vintage.tdp:
            zapped += self._zap_direct(wanted - zapped)
        if zapped:
            self._mmu.vm.flush_remote_tlbs()
        self._mmu.stats.add("mmu_recycled", zapped)
        return zapped

    def _zap_direct(self, wanted: int) -> int:
        """Direct tables go after the shadowed ones, in the order of their addresses, each with what hangs below it.

        KVM goes by age and leaves the tables below for the next fault to find again; age is not kept here.
        """
        zapped = 0
        for root in self._mmu.roots:
            for table in list(_lowest_tables(root)):
                if zapped >= wanted:
                    return zapped
                zapped += zap_table(self._mmu, root, table)
                self._mmu.stats.add("mmu_shadow_zapped")
        return zapped


def _lowest_tables(root: Root) -> Iterator[int]:
    """Frames of the tables that have none below, ascending."""
    fmt = root.fmt
    for row, _ in list(root.tables_at(PG_LEVEL_2M, 0, 1 << 9 * root.level)):
        below = 0
        for entry in range(ENTRIES):
            spte = root.read(Sptep(TABLE_PFN_BASE + row, entry))
            if fmt.is_present(spte) and not fmt.is_leaf(spte, PG_LEVEL_2M):
                below += 1
                yield fmt.pfn(spte)
        if not below and TABLE_PFN_BASE + row != root.root_pfn:
            yield TABLE_PFN_BASE + row
