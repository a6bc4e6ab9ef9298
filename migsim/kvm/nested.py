"""A nested guest: L1's own second-level page tables, and the shadow pages KVM runs L2 on.

L1's tables lie in L1's memory. KVM write-protects what it shadows; L1's store to an entry is emulated and zaps what
came of it. Dirty pages are charged to the L1 frame, and while PML is in use L2's leaves are logged by W, because the
hardware would log L2's addresses. Source: Linux 6.13, arch/x86/kvm/mmu/paging_tmpl.h (FNAME(page_fault), FNAME(fetch)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from migsim.kvm.levels import PageFault, max_mapping_level
from migsim.kvm.make_spte import make_spte
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.page_fault import faultin_pfn
from migsim.kvm.shadow_mmu import ShadowMmu
from migsim.kvm.shadow_pages import PageKey, ShadowPage
from migsim.kvm.spte import ACC_ALL, ACC_EXEC, ACC_WRITE, MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, AdType, gfn_round, spte_index
from migsim.kvm.tdp_mmu import RetPf
from migsim.units import PAGE_SHIFT, pages_per_level

ROOT_LEVEL = 4


@dataclass(frozen=True, slots=True)
class GuestPte:
    """An entry of one of L1's tables: `gfn` of the page or of the next table, ACC_* rights, leaf or not, A and D."""

    gfn: int
    access: int = ACC_ALL
    leaf: bool = False
    dirty: bool = False


@dataclass(frozen=True, slots=True)
class GuestWalk:
    """Where L1's tables lead an L2 address: (table gfn, level) from the root down, and the leaf found."""

    tables: tuple[tuple[int, int], ...]
    pte: GuestPte
    level: int
    access: int


class NestedGuest:
    """L2 of one VM. `entries`: (gfn of the table in L1's memory, index) -> GuestPte, as L1 wrote them.

    `ad_bits`: L1 uses A/D bits in its tables, so KVM sets D there and keeps W away until it has.
    """

    def __init__(self, vm: Any, root_gfn: int, *, as_id: int = 0, ad_bits: bool = False) -> None:
        self.vm = vm
        self.mmu: MmuState = vm.mmu.state
        self.shadow: ShadowMmu = vm.mmu.shadow
        self.root_gfn = root_gfn
        self.as_id = as_id
        self.ad_bits = ad_bits
        self.entries: dict[tuple[int, int], GuestPte] = {}

    @property
    def ad_type(self) -> AdType:
        """How stores through L2's leaves are logged."""
        if not self.mmu.ad_enabled:
            return AdType.DISABLED
        return AdType.WRPROT_ONLY if self.vm.config.pml_enabled else AdType.ENABLED

    # -- L1's side -----------------------------------------------------------------------------------------------------

    def write_entry(self, vcpu: Any, table_gfn: int, index: int, pte: GuestPte | None) -> None:
        """L1 stores to its table, as any store to memory; if the table is shadowed, KVM sees it and zaps."""
        vcpu.run([("w", (table_gfn << PAGE_SHIFT) + index * 8, 0 if pte is None else pte.gfn & 0xFFFFFFFF)])
        if pte is None:
            self.entries.pop((table_gfn, index), None)
        else:
            self.entries[table_gfn, index] = pte
        slot = self.vm.gfn_to_slot(self.as_id, table_gfn)
        if slot is not None and self.mmu.is_write_tracked(slot, table_gfn):
            with self.mmu.lock.write():
                if self.shadow.pages.track_write(self.as_id, table_gfn, index):
                    self.vm.flush_remote_tlbs()

    def walk_guest(self, l2_gfn: int) -> GuestWalk | None:
        """The hardware's walk of L1's tables; None: L1 has no mapping, the fault is L1's."""
        table, access, visited = self.root_gfn, ACC_ALL, []
        for level in range(ROOT_LEVEL, 0, -1):
            visited.append((table, level))
            pte = self.entries.get((table, spte_index(l2_gfn, level)))
            if pte is None:
                return None
            access &= pte.access
            if pte.leaf or level == PG_LEVEL_4K:
                assert level <= MAX_HUGEPAGE_LEVEL, f"L1 maps L2 gfn {l2_gfn:#x} by a leaf at level {level}"
                return GuestWalk(tuple(visited), pte, level, access)
            table = pte.gfn
        return None

    # -- L2's side -----------------------------------------------------------------------------------------------------

    def access(self, vcpu: Any, l2_gpa: int, *, write: bool, exec: bool = False) -> int | None:
        """L2 loads or stores: the host frame, faulting as often as needed; None: the fault goes to L1."""
        gfn, fmt = l2_gpa >> PAGE_SHIFT, self.mmu.fmt
        for _ in range(8):
            spte, level = self.walk(gfn)
            if fmt.is_present(spte) and fmt.is_leaf(spte, level) and fmt.allows(spte, write=write, exec=exec):
                return fmt.pfn(spte) + gfn % pages_per_level(level)
            if self.page_fault(vcpu, gfn, write=write, exec=exec) == RetPf.INVALID:
                return None
        raise AssertionError(f"L2 gfn {gfn:#x} (write={write}) does not stop faulting")

    def walk(self, l2_gfn: int) -> tuple[int, int]:
        """(SPTE, level) where the hardware's walk of the shadow pages ends."""
        page = self._root_page()
        while True:
            level = page.key.level
            spte = page.read(page.at(spte_index(l2_gfn, level)))
            if not self.mmu.fmt.is_present(spte) or self.mmu.fmt.is_leaf(spte, level):
                return spte, level
            page = self.shadow.pages.by_pfn(self.mmu.fmt.pfn(spte))

    def _root_page(self) -> ShadowPage:
        key = PageKey(self.as_id, self.root_gfn, ROOT_LEVEL, ACC_ALL)
        if self.mmu.lock.writer:
            return self.shadow.pages.get(key)
        with self.mmu.lock.write():
            return self.shadow.pages.get(key)

    def page_fault(self, vcpu: Any, l2_gfn: int, *, write: bool, exec: bool = False) -> RetPf:
        """A fault of L2; INVALID: L1's tables do not allow the access, so L1 gets the fault. Never the fast path."""
        self.vm.stats.count_vcpu(vcpu.id, "pf_taken")
        walked = self.walk_guest(l2_gfn)
        wanted = (ACC_WRITE if write else 0) | (ACC_EXEC if exec else 0)
        if walked is None or wanted & ~walked.access:
            self.vm.stats.count_vcpu(vcpu.id, "pf_guest")
            return RetPf.INVALID
        if self.ad_bits and write and not walked.pte.dirty:
            walked = self._set_guest_dirty(walked, l2_gfn)
        gfn = walked.pte.gfn + l2_gfn % pages_per_level(walked.level)
        fault = PageFault(vcpu, gfn << PAGE_SHIFT, gfn, write, exec, slot=self.vm.gfn_to_slot(self.as_id, gfn))
        if fault.slot is None:
            return RetPf.EMULATE
        resolved = faultin_pfn(self.mmu, fault)
        if resolved != RetPf.CONTINUE:
            return resolved
        with self.mmu.lock.write():
            if self.mmu.invalidate.retry(fault.invalidate_seq, gfn):
                return RetPf.RETRY
            result = self._fetch(walked, fault, l2_gfn)
        if result == RetPf.FIXED:
            self.vm.stats.count_vcpu(vcpu.id, "pf_fixed")
        return result

    def _set_guest_dirty(self, walked: GuestWalk, l2_gfn: int) -> GuestWalk:
        """KVM sets D in L1's entry: a store to L1's table page, which is dirty for it."""
        table, level = walked.tables[-1]
        pte = replace(walked.pte, dirty=True)
        self.entries[table, spte_index(l2_gfn, level)] = pte
        slot = self.vm.gfn_to_slot(self.as_id, table)
        if slot is not None:
            self.vm.mark_page_dirty_in_slot(slot, table, None)
        return replace(walked, pte=pte)

    def _goal(self, walked: GuestWalk, fault: PageFault) -> int:
        """The smaller of what L1 maps and what the host allows; 4K while logging."""
        assert fault.slot is not None
        if fault.slot.logging:
            return PG_LEVEL_4K
        return min(walked.level, max_mapping_level(self.mmu, fault.slot, fault.gfn))

    def _fetch(self, walked: GuestWalk, fault: PageFault, l2_gfn: int) -> RetPf:
        """Shadow L1's tables one by one, a direct page for each level that L1 maps by a larger page, then the leaf."""
        pages, goal = self.shadow.pages, self._goal(walked, fault)
        page, level, access = self._root_page(), ROOT_LEVEL, ACC_ALL
        pages.make_available(keep=page)
        tables = {at_level: gfn for gfn, at_level in walked.tables}
        while level > goal:
            page.write_flooding = 0
            entry = spte_index(l2_gfn, level)
            level -= 1
            if level >= walked.level:
                access &= self.entries[tables[level + 1], entry].access
                child = pages.get(PageKey(self.as_id, tables[level], level, access))
            else:
                child = pages.get(
                    PageKey(self.as_id, gfn_round(fault.gfn, level + 1), level, walked.access, direct=True)
                )
            pages.link(page, entry, child, self.ad_type)
            page = child
        return self._set_leaf(page, walked, fault, l2_gfn)

    def _set_leaf(self, page: ShadowPage, walked: GuestWalk, fault: PageFault, l2_gfn: int) -> RetPf:
        level, slot = page.key.level, fault.slot
        assert slot is not None
        access = walked.access
        if self.ad_bits and not walked.pte.dirty:
            access &= ~ACC_WRITE  # the first store must fault, so that D gets into L1's entry
        made = make_spte(
            self.mmu.fmt, gfn=gfn_round(fault.gfn, level), pfn=gfn_round(fault.pfn, level), level=level,
            access=access, host_writable=fault.host_writable, ad_type=self.ad_type,
            write_tracked=self.mmu.is_write_tracked(slot, fault.gfn), nx_huge_pages=self.mmu.nx_huge_pages,
        )  # fmt: skip
        self.shadow.mark_writable(fault, made.spte, level)
        entry = spte_index(l2_gfn, level)
        if page.read(page.at(entry)) == made.spte:
            return RetPf.WRITE_PROTECTED if made.wrprot and fault.write else RetPf.SPURIOUS
        self.shadow.pages.set_leaf(page, entry, gfn_round(fault.gfn, level), made.spte)
        return RetPf.WRITE_PROTECTED if made.wrprot and fault.write else RetPf.FIXED
