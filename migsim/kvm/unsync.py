"""Unsync shadow pages: a guest's lowest-level page table may be written without KVM looking, until the guest flushes.

KVM write-protects every guest table it shadows. At level 1 a write fault gives the protection up instead of emulating
every store: the shadow page is marked unsync, and so is the way to it from the root. When the guest flushes (CR3 load,
INVLPG, INVEPT) the table is write-protected again and the shadow page brought up to date: until then the CPU may use
the old entries, as a real one may use its TLB. A gfn with an upper table is write-tracked and never gets this far.
Source: Linux 6.18, arch/x86/kvm/mmu/mmu.c (mmu_try_to_unsync_pages, mmu_sync_children), paging_tmpl.h (sync_spte).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from migsim.kvm.guest_tables import GuestTables
from migsim.kvm.make_spte import make_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmio import make_mmio_spte, mmio_gfn
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.page_state import lost_page_state
from migsim.kvm.shadow_page import ShadowPage
from migsim.kvm.shadow_pages import ShadowPages
from migsim.kvm.spte import ACC_WRITE, PG_LEVEL_4K, spte_index

PAGE_ARRAY_NR: Final = 16  # KVM_PAGE_ARRAY_NR: what one round of mmu_sync_children looks at
Found = tuple[ShadowPage, tuple[tuple[ShadowPage, int], ...]]  # an unsync page and the way down to it


class Unsync:
    """Going out of step and back, for all guests' tables of one VM."""

    def __init__(
        self, mmu: MmuState, pages: ShadowPages, tables: GuestTables, protect: Callable[[Memslot, int], bool]
    ) -> None:
        self._mmu, self._pages, self._tables, self._protect = mmu, pages, tables, protect
        pages.sync = self.sync_page
        mmu.refuses_write = self.refuses_write

    # -- out of step ---------------------------------------------------------------------------------------------------

    def refuses_write(self, slot: Memslot, gfn: int, *, synchronizing: bool = False, prefetch: bool = False) -> bool:
        """mmu_try_to_unsync_pages: must a new mapping of gfn be write-protected? If not, what it shadows goes unsync.

        While a page is being synced no other may go unsync; nor for a mapping that nobody asked for. Tracking is of one
        address space, shadow pages are found in all: KVM warns of an upper table of another and lets it be written.
        """
        if self._mmu.is_write_tracked(slot, gfn):
            return True
        pages = self._pages.of_gfn(gfn)
        if not pages:
            return False
        if synchronizing:
            return True
        for page in pages:
            if page.unsync:
                continue
            if prefetch:
                return True
            # a fault of the TDP MMU holds mmu_lock only for read, so a lock of its own guards the marks
            with self._mmu.unsync_pages_lock:
                if page.key.level != PG_LEVEL_4K:
                    self._mmu.vm.warnings.append(f"{page!r} is not write-tracked in address space {slot.as_id}")
                    continue
                self._mmu.vm.trace("kvm_mmu_unsync_page", gfn=gfn, level=page.key.level)
                self._mmu.stats.add("mmu_unsync")
                page.unsync = True
                self._pages.mark_parents_unsync(page)
        return False

    # -- and back ------------------------------------------------------------------------------------------------------

    def sync_root(self, root: ShadowPage) -> None:
        """kvm_mmu_sync_roots: nothing is locked unless something is out of step."""
        if root.unsync or root.unsync_children:
            with self._mmu.lock.write():
                self.sync_children(root, can_yield=True)

    def sync_children(self, parent: ShadowPage, *, can_yield: bool) -> bool:
        """Bring all that hangs below `parent` into step, in rounds; False: broken off (EINTR), some is still to do.

        1 write-protect the guest's tables of a round, 2 flush, 3 sync the pages: a store before 2 is seen by 3, one
        after it faults. What 3 makes stale goes with the next round's 2, or before the lock is let go.
        """
        vm, flush = self._mmu.vm, False
        while found := self._walk(parent):
            if sum(self._protect_table(page) for page, _ in found):
                vm.flush_remote_tlbs()
                flush = False
            for page, way in found:
                if page.unsync and not page.invalid:
                    self._pages.unlink_unsync(page)
                    flush = self.sync_page(page) or flush
                _clear_marks(way)
            if not self._mmu.sched.need_resched():
                continue
            if flush:
                vm.flush_remote_tlbs()
                flush = False
            if not can_yield:
                return False
            with self._mmu.lock.dropped():
                self._mmu.sched.resched()
        if flush:
            vm.flush_remote_tlbs()
        return True

    def _protect_table(self, page: ShadowPage) -> bool:
        slot = self._mmu.vm.gfn_to_slot(page.key.as_id, page.key.gfn)
        assert slot is not None, f"{page!r}: the guest's table lies in no memslot"
        return self._protect(slot, page.key.gfn)

    def _walk(self, parent: ShadowPage) -> list[Found]:
        """Up to 16 pages of the tree that are out of step, each with its way; marks that lead nowhere are cleared."""
        found: list[Found] = []
        self._walk_below(parent, (), found)
        return found

    def _walk_below(self, page: ShadowPage, way: tuple[tuple[ShadowPage, int], ...], found: list[Found]) -> int:
        below = 0
        for entry in sorted(page.unsync_children):
            if len(found) >= PAGE_ARRAY_NR:
                return below
            child, here = self._pages.child_at(page, entry), 0
            if child is not None and child.unsync_children:
                here = self._walk_below(child, (*way, (page, entry)), found)
            elif child is not None and child.unsync:
                here = 1
                found.append((child, (*way, (page, entry))))
            if not here:
                page.unsync_children.discard(entry)
            below += here
        return below

    def sync_page(self, page: ShadowPage) -> bool:
        """Bring every entry into step (__kvm_sync_page); True: a flush is due."""
        assert page.has_gptes and page.key.level == PG_LEVEL_4K, f"{page!r} cannot be unsync"
        flush = False
        for entry in tuple(page.sptes):
            flush = self.sync_spte(page, entry) or flush
        return flush

    def sync_spte(self, page: ShadowPage, entry: int) -> bool:
        """One entry (FNAME(sync_spte)): dropped where the guest's names another page or none, else given new rights."""
        fmt, old = self._mmu.fmt, page.read(page.at(entry))
        if old == fmt.nonpresent:
            return False
        gpte = self._tables.usable(page.key, entry)
        if gpte is None:
            self._pages.drop(page, entry)
            return True
        access = self._tables.rights(page.key, gpte)
        if fmt.is_mmio(old):
            generation = self._mmu.vm.memslots(page.key.as_id).generation
            same = mmio_gfn(fmt, old) == gpte.gfn
            new = make_mmio_spte(fmt, generation=generation, gfn=gpte.gfn, access=access) if same else fmt.nonpresent
            page.write(page.at(entry), new)
            return False
        if gpte.gfn != page.gfns[entry]:
            self._pages.drop(page, entry)
            return True
        return access != page.accesses[entry] and self._renew(page, entry, old, access)

    def invalidate_addr(self, root: ShadowPage, gfn: int) -> None:
        """INVLPG: the entry for one page, if its table is out of step (kvm_mmu_invalidate_addr)."""
        with self._mmu.lock.write():
            page: ShadowPage | None = root
            while page is not None:
                entry = spte_index(gfn, page.key.level)
                if page.unsync and self.sync_spte(page, entry):
                    self._mmu.vm.flush_remote_tlbs()
                page = self._pages.child_at(page, entry) if page.unsync_children else None

    def _renew(self, page: ShadowPage, entry: int, old: int, access: int) -> bool:
        """The same page with other rights; a flush is due if the MMU may no longer make it writable."""
        fmt, gfn = self._mmu.fmt, page.gfns[entry]
        slot = self._mmu.vm.gfn_to_slot(page.key.as_id, gfn)
        assert slot is not None, f"{page!r} entry {entry} maps gfn {gfn:#x}, which lies in no memslot"
        host_writable = fmt.is_host_writable(old)
        wants_write = bool(access & ACC_WRITE) and host_writable and not fmt.is_writable(old)
        made = make_spte(
            fmt, gfn=gfn, pfn=fmt.pfn(old), level=PG_LEVEL_4K, access=access, host_writable=host_writable,
            ad_type=page.key.ad_type, prefetch=True, synchronizing=True,
            write_tracked=wants_write and self.refuses_write(slot, gfn, synchronizing=True),
        )  # fmt: skip
        if fmt.is_writable(made.spte) and slot.logging:
            self._mmu.vm.mark_page_dirty_in_slot(slot, gfn, None)
        page.accesses[entry] = access
        page.write(page.at(entry), made.spte)
        lost_page_state(self._mmu, old, made.spte, PG_LEVEL_4K)
        return fmt.is_mmu_writable(old) and not fmt.is_mmu_writable(made.spte)


def _clear_marks(way: tuple[tuple[ShadowPage, int], ...]) -> None:
    """mmu_pages_clear_parents: from the page upwards, as far as nothing else below is marked."""
    for page, entry in reversed(way):
        page.unsync_children.discard(entry)
        if page.unsync_children:
            return
