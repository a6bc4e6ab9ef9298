"""A fault of a guest whose own page tables KVM shadows: walk them, shadow each table on the way, install the leaf.

Never the fast path, always under the exclusive lock. Where the guest maps a huge page and the host allows less, direct
shadow pages take the levels between. Source: Linux 6.18, arch/x86/kvm/mmu/paging_tmpl.h (FNAME(page_fault),
FNAME(fetch), FNAME(pte_prefetch)) and mmu.c (mmu_set_spte).
"""

from __future__ import annotations

from typing import Any

from migsim.kvm.direct_prefetch import PTE_PREFETCH, runs
from migsim.kvm.guest_tables import GuestTables, GuestWalk
from migsim.kvm.host_mm import HostPage
from migsim.kvm.levels import PageFault, hugepage_adjust
from migsim.kvm.make_spte import make_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmio import check_mmio_spte, make_mmio_spte, mmio_gfn
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.page_fault import count_result, error_code, faultin_pfn, write_protected
from migsim.kvm.page_limit import PageLimit
from migsim.kvm.page_state import mapped_page
from migsim.kvm.shadow_page import ShadowPage
from migsim.kvm.shadow_pages import ShadowPages
from migsim.kvm.spte import ACC_WRITE, PG_LEVEL_4K, gfn_round, spte_index
from migsim.kvm.tdp_mmu import RetPf, mark_made_writable, trace_mmio_spte, trace_set_spte, trace_spte_requested
from migsim.kvm.unsync import Unsync
from migsim.units import PAGE_SHIFT, pages_per_level


class ShadowFaults:
    """The fault handler of every shadowed guest of one VM."""

    def __init__(
        self, mmu: MmuState, pages: ShadowPages, tables: GuestTables, unsync: Unsync, limit: PageLimit
    ) -> None:
        self.mmu, self.pages, self.tables, self.unsync, self.limit = mmu, pages, tables, unsync, limit

    # -- the outer steps -----------------------------------------------------------------------------------------------

    def page_fault(self, vcpu: Any, root: ShadowPage, addr: int, *, write: bool, exec: bool) -> RetPf:
        """A refused access to page `addr` of the guest's address space; INVALID: its own tables do not allow it.

        Raises OSError: EFAULT, EHWPOISON (as a direct fault does), ENOSPC where no shadow page is to be had.
        """
        spte, level = self.walk(root, addr)
        fault = PageFault(vcpu, addr << PAGE_SHIFT, addr, write, exec)
        fault.rsvd = self.mmu.fmt.is_mmio(spte)
        fault.present = self.mmu.fmt.is_present(spte) and self.mmu.fmt.is_leaf(spte, level) and bool(spte & 7)
        if not fault.rsvd or self.mmu.vm.config.vendor == "amd":
            self.mmu.vm.trace(
                "kvm_page_fault", vcpu_id=vcpu.id, fault_address=addr << PAGE_SHIFT, error_code=error_code(fault)
            )
        if fault.rsvd and self._is_known_mmio(vcpu, root, addr, spte):
            return RetPf.EMULATE
        self.mmu.stats.count_vcpu(vcpu.id, "pf_taken")
        result = self._handle(fault, root, addr)
        count_result(self.mmu, vcpu, result)
        return result

    def _is_known_mmio(self, vcpu: Any, root: ShadowPage, addr: int, spte: int) -> bool:
        """handle_mmio_page_fault: by the vCPU's cache (not for L2, whose addresses it does not hold) or the SPTE."""
        fmt, space = self.mmu.fmt, self.mmu.vm.memslots(root.key.as_id)
        if not root.key.guest_mode and vcpu.mmio.match_gva(addr << PAGE_SHIFT, self.mmu.vm.memslots(0).generation):
            return True
        if not check_mmio_spte(self.mmu.vm, fmt, spte, space):
            return False
        access = spte & fmt.mmio_access
        self.mmu.vm.trace("handle_mmio_page_fault", addr=addr << PAGE_SHIFT, gfn=mmio_gfn(fmt, spte), access=access)
        gva = 0 if root.key.guest_mode else addr << PAGE_SHIFT
        vcpu.mmio.cache(gva, mmio_gfn(fmt, spte), access, self.mmu.vm.memslots(0).generation)
        return True

    def _handle(self, fault: PageFault, root: ShadowPage, addr: int) -> RetPf:
        walked = self.tables.walk(root.key, addr, write=fault.write, exec=fault.exec)
        if walked is None:
            if not root.key.guest_mode:  # #PF; an EPT violation given to L1 is counted nowhere
                self.mmu.stats.count_vcpu(fault.vcpu.id, "pf_guest")
            return RetPf.INVALID
        fault.gfn = walked.pte.gfn + addr % pages_per_level(walked.level)
        fault.slot = self.mmu.vm.gfn_to_slot(root.key.as_id, fault.gfn)
        fault.nx_workaround, fault.max_level = self.mmu.nx_huge_pages, walked.level
        slot = fault.slot
        if fault.present and fault.write and slot is not None and self.mmu.is_write_tracked(slot, fault.gfn):
            self._clear_flood(root, addr)
            return write_protected(self.mmu)
        gva = 0 if root.key.guest_mode else fault.gpa
        resolved = faultin_pfn(self.mmu, fault, gva=gva, access=walked.access)
        if resolved != RetPf.CONTINUE:
            return resolved
        with self.mmu.lock.write():
            stale = slot is not None and self.mmu.invalidate.retry(fault.invalidate_seq, fault.gfn)
            if root.invalid or stale:
                return RetPf.RETRY
            self.limit.make_available()
            page, result = fault.pfn, self._fetch(walked, fault, root, addr)
            if slot is not None:
                mapped_page(self.mmu, page, writable=fault.host_writable, unused=result == RetPf.RETRY)
            return result

    def _clear_flood(self, root: ShadowPage, addr: int) -> None:
        """The tables on the way are in use: stores to them are no flood (shadow_page_table_clear_flood)."""
        page: ShadowPage | None = root
        while page is not None:
            page.write_flooding = 0
            page = self.pages.child_at(page, spte_index(addr, page.key.level))

    def walk(self, root: ShadowPage, addr: int) -> tuple[int, int]:
        """(SPTE, level) where the hardware's walk of the shadow pages ends."""
        _, spte, level = self.last(root, addr)
        return spte, level

    def last(self, root: ShadowPage, addr: int) -> tuple[ShadowPage, int, int]:
        """(page, SPTE, level) of that walk's last entry."""
        page = root
        while (child := self.pages.child_at(page, spte_index(addr, page.key.level))) is not None:
            page = child
        return page, page.read(page.at(spte_index(addr, page.key.level))), page.key.level

    # -- fetch ---------------------------------------------------------------------------------------------------------

    def _fetch(self, walked: GuestWalk, fault: PageFault, root: ShadowPage, addr: int) -> RetPf:
        """Shadow the guest's tables from the root down, then direct pages, then the leaf."""
        page = root
        for (table, _), access in zip(walked.tables[1:], walked.accesses, strict=False):
            page.write_flooding = 0
            below = self._indirect(page, spte_index(addr, page.key.level), table, access)
            if below is None:
                return RetPf.RETRY
            page = below
        page.write_flooding = 0
        hugepage_adjust(self.mmu, fault)  # after the shadow pages are there, whose tables may forbid a huge page
        trace_spte_requested(self.mmu, fault)
        while True:
            entry = spte_index(addr, page.key.level)
            if fault.nx_workaround:
                self._disallowed_hugepage_adjust(fault, page, entry)
            if page.key.level == fault.goal_level:
                break
            page = self._direct(page, entry, walked.access, fault)
        result = self._set_leaf(page, entry, walked.access, fault)
        if result != RetPf.SPURIOUS:
            self._prefetch(page, entry)
        return result

    def _indirect(self, page: ShadowPage, entry: int, table: int, access: int) -> ShadowPage | None:
        """The page that shadows the guest's `table`, linked below `entry`; None: others must run first."""
        child = self.pages.child_at(page, entry)
        if child is not None and child.key.gfn == table:
            return child
        child = self.pages.get(page.key.child(table, access, direct=False))
        # Before it is linked it must be in step: the guest need not flush when an entry becomes present.
        if child.unsync_children and not self.unsync.sync_children(child, can_yield=False):
            return None
        self.pages.link(page, entry, child)
        return child

    def _direct(self, page: ShadowPage, entry: int, access: int, fault: PageFault) -> ShadowPage:
        """The direct page for a part of a guest huge page, linked below `entry`."""
        gfn, child = gfn_round(fault.gfn, page.key.level), self.pages.child_at(page, entry)
        if child is not None and child.key.access != access:  # the guest's rights changed (validate_direct_spte)
            self.pages.drop(page, entry)
            self.mmu.vm.flush_remote_tlbs()
            child = None
        if child is not None and child.key.gfn == gfn:
            return child
        child = self.pages.get(page.key.child(gfn, access, direct=True))
        self.pages.link(page, entry, child)
        if fault.huge_page_disallowed:
            possible = fault.req_level >= page.key.level
            child.nx_disallowed = child.nx_disallowed or possible or self.mmu.vintage.nx_tags_all
            if possible and (child, child.pfn) not in self.mmu.nx_shadow:
                self.mmu.nx_shadow.add(child, child.pfn)
                self.mmu.stats.add("nx_lpage_splits")
        return child

    def _disallowed_hugepage_adjust(self, fault: PageFault, page: ShadowPage, entry: int) -> None:
        """levels.disallowed_hugepage_adjust, for shadow pages."""
        level, child = page.key.level, self.pages.child_at(page, entry)
        if level == fault.goal_level and level > PG_LEVEL_4K and child is not None and child.nx_disallowed:
            fault.pfn |= fault.gfn & (pages_per_level(level) - pages_per_level(level - 1))
            fault.goal_level -= 1

    # -- the leaf ------------------------------------------------------------------------------------------------------

    def _set_leaf(self, page: ShadowPage, entry: int, access: int, fault: PageFault) -> RetPf:
        gfn = gfn_round(fault.gfn, page.key.level)
        if fault.slot is None:
            return self._set_mmio(page, entry, gfn, access, fault.vcpu)
        result, spte = self._set_spte(
            page, entry, gfn, gfn_round(fault.pfn, page.key.level), access, fault.slot,
            host_writable=fault.host_writable, prefetch=False, write=fault.write,
        )  # fmt: skip
        self.mark_writable(fault, spte, page.key.level)
        return result

    def mark_writable(self, fault: PageFault, spte: int, level: int) -> None:
        """A leaf with W was made: the page it maps is dirty, by its L1 gfn."""
        mark_made_writable(self.mmu, fault, spte, level)

    def _set_mmio(self, page: ShadowPage, entry: int, gfn: int, access: int, vcpu: Any) -> RetPf:
        fmt, dropped = self.mmu.fmt, self.mmu.fmt.is_present(page.read(page.at(entry)))
        generation = self.mmu.vm.memslots(page.key.as_id).generation
        spte = make_mmio_spte(fmt, generation=generation, gfn=gfn, access=access)
        self.pages.drop(page, entry)
        page.write(page.at(entry), spte)
        self.mmu.stats.count_vcpu(vcpu.id, "pf_mmio_spte_created")
        trace_mmio_spte(self.mmu, page.pfn, gfn, spte)
        if dropped:
            self.mmu.vm.flush_remote_tlbs()
        return RetPf.EMULATE

    def _set_spte(
        self, page: ShadowPage, entry: int, gfn: int, pfn: int, access: int, slot: Memslot,
        *, host_writable: bool, prefetch: bool, write: bool,
    ) -> tuple[RetPf, int]:  # fmt: skip
        """mmu_set_spte: (result, the SPTE now there). Another frame or a table in the way is dropped and flushed."""
        fmt, level, flush = self.mmu.fmt, page.key.level, False
        old = page.read(page.at(entry))
        if fmt.is_present(old):
            # by gfn too: of two slots with the same memory each has a log of its own, and an rmap that finds the SPTE
            same = fmt.is_leaf(old, level) and fmt.pfn(old) == pfn and page.gfns[entry] == gfn
            if prefetch and same:
                return RetPf.SPURIOUS, old
            if not same:
                self.pages.drop(page, entry)
                old, flush = fmt.nonpresent, True
        wants_write = bool(access & ACC_WRITE) and host_writable and not (fmt.is_present(old) and fmt.is_writable(old))
        made = make_spte(
            fmt, gfn=gfn, pfn=pfn, level=level, access=access, host_writable=host_writable,
            ad_type=page.key.ad_type, prefetch=prefetch, nx_huge_pages=self.mmu.nx_huge_pages,
            write_tracked=wants_write and self.mmu.refuses_write(slot, gfn, prefetch=prefetch),
        )  # fmt: skip
        result = RetPf.SPURIOUS
        if old != made.spte:
            result = RetPf.FIXED
            flush = flush or (fmt.is_present(old) and fmt.is_mmu_writable(old) and not fmt.is_mmu_writable(made.spte))
            trace_set_spte(self.mmu, gfn, made.spte, level)
        self.pages.set_leaf(page, entry, gfn, made.spte, access)
        if flush:
            self.mmu.vm.flush_remote_tlbs()
        return write_protected(self.mmu) if made.wrprot and write else result, made.spte

    # -- prefetch ------------------------------------------------------------------------------------------------------

    def _prefetch(self, page: ShadowPage, entry: int) -> None:
        """Map the aligned 8 entries around a 4K fault, old and unasked, until one cannot be (FNAME(pte_prefetch)).

        A direct page's go run by run of entries that are not there (__direct_pte_prefetch).
        """
        if page.key.level > PG_LEVEL_4K or self.mmu.invalidate.in_progress:
            return
        first = entry & -PTE_PREFETCH
        around = (other for other in range(first, first + PTE_PREFETCH) if other != entry)
        missing = [other for other in around if not self.mmu.fmt.is_present(page.read(page.at(other)))]
        for start, count in ((other, 1) for other in missing) if page.has_gptes else runs(missing):
            if not self._prefetch_run(page, start, count):
                return

    def _prefetch_run(self, page: ShadowPage, entry: int, count: int) -> bool:
        """`count` entries (one, where the guest says what each maps); False: nothing there can be mapped."""
        if page.has_gptes:
            gpte = self.tables.usable(page.key, entry)
            if gpte is None:
                self.pages.drop(page, entry)
                return False
            return self._prefetch_sptes(page, entry, count, gpte.gfn, self.tables.rights(page.key, gpte))
        return self._prefetch_sptes(page, entry, count, page.key.gfn + entry, page.key.access)

    def _prefetch_sptes(self, page: ShadowPage, entry: int, count: int, gfn: int, access: int) -> bool:
        """As many of `count` entries, from gfn on, as the host has writable; none of a run that leaves the slot.

        False: not one (kvm_mmu_prefetch_sptes).
        """
        slot = self.mmu.vm.gfn_to_slot(page.key.as_id, gfn)
        if slot is None or slot.invalid or slot.readonly or (access & ACC_WRITE and slot.logging):
            return False
        if gfn + count > slot.end_gfn:
            return False
        for i in range(count):
            found = self.mmu.vm.host.get_user_page(slot.hva(gfn + i))
            if not isinstance(found, HostPage) or not found.writable:
                return i > 0
            at, here = entry + i, gfn + i
            self._set_spte(page, at, here, found.pfn, access, slot, host_writable=True, prefetch=True, write=False)
            mapped_page(self.mmu, found.pfn, writable=True)
        return True
