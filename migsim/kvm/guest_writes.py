"""Emulated stores to guest memory, seen by the shadow MMU: what was made from the entry that is stored to goes.

Whether a gfn is a page table is only known by its being shadowed, so every emulated store asks. Three stores without a
use, or one that is no store of an entry, and the table is taken for something else: its shadow page goes.
Source: Linux 6.18, arch/x86/kvm/mmu/mmu.c (kvm_mmu_track_write, detect_write_flooding, detect_write_misaligned).
"""

from __future__ import annotations

from typing import Final

from migsim.kvm.guest_tables import GuestTables
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.shadow_page import ShadowPage
from migsim.kvm.shadow_pages import ShadowPages
from migsim.kvm.spte import PG_LEVEL_4K
from migsim.units import PAGE_SHIFT, PAGE_SIZE

FLOODING_STORES: Final = 3
PTE_BYTES: Final = 8


class GuestWrites:
    """The shadow MMU's half of an emulated store."""

    def __init__(self, mmu: MmuState, pages: ShadowPages, tables: GuestTables) -> None:
        self._mmu, self._pages, self._tables = mmu, pages, tables

    @property
    def would_block(self) -> bool:
        """Would an emulated store have to wait for mmu_lock (only where a test interleaves one)?"""
        return self._pages.indirect > 0 and self._mmu.lock.held

    def track_write(self, gpa: int, n_bytes: int) -> None:
        """KVM has stored `n_bytes` at gpa for the guest (kvm_mmu_track_write). Nothing where no table is shadowed."""
        if not self._pages.indirect:
            return
        gfn, offset, stats = gpa >> PAGE_SHIFT, gpa % PAGE_SIZE, self._mmu.stats
        entry, zapped, flush = offset // PTE_BYTES, 0, False
        with self._mmu.lock.write():
            stats.add("mmu_pte_write")
            for page in self._pages.of_gfn(gfn):
                if page.invalid:  # went with the one before
                    continue
                if is_misaligned(offset, n_bytes) or is_flooded(page):
                    zapped += self._pages.zap(page)
                    stats.add("mmu_flooded")
                    continue
                flush = self._mmu.fmt.is_present(page.read(page.at(entry))) or flush
                self._pages.drop(page, entry)
                if page.key.level != PG_LEVEL_4K and (gfn, entry) in self._tables.entries[page.key.as_id]:
                    stats.add("mmu_pde_zapped")  # counted by the new entry being one, not by what went
            if zapped or flush:
                self._mmu.vm.flush_remote_tlbs()


def is_flooded(page: ShadowPage) -> bool:
    """The third store since the table was last used. Not at the lowest level, which goes unsync instead."""
    if page.key.level == PG_LEVEL_4K:
        return False
    page.write_flooding += 1
    return page.write_flooding >= FLOODING_STORES


def is_misaligned(offset: int, n_bytes: int) -> bool:
    """Not what stores to an entry: smaller than 4 bytes, or across two entries. One byte at its start is (`andb`)."""
    if not offset % PTE_BYTES and n_bytes == 1:
        return False
    return n_bytes < 4 or offset // PTE_BYTES != (offset + n_bytes - 1) // PTE_BYTES
