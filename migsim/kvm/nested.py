"""A guest whose own page tables KVM shadows: L2 on L1's EPT12 or NPT12, or any guest with paging where there is no TDP.

The tables lie in guest memory (guest_tables.py); what KVM runs it on are shadow pages. Dirty pages are charged to the
L1 frame; L2's leaves are logged by W while PML is in use, because the hardware would log L2's addresses. The guest
says when its tables have changed: L1 by INVEPT, a guest with paging by CR3, INVLPG or a flush; until then old
entries may be used. Source: Linux 6.18, arch/x86/kvm/mmu/mmu.c (kvm_mmu_load, kvm_mmu_invalidate_addr), vmx/nested.c.
"""

from __future__ import annotations

from typing import Any

from migsim.kvm.guest_tables import ROOT_LEVEL, GuestPte, GuestWalk
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.shadow_mmu import ShadowMmu
from migsim.kvm.shadow_page import PageKey, ShadowPage
from migsim.kvm.spte import ACC_ALL, AdType, spte_index
from migsim.kvm.tdp_mmu import RetPf
from migsim.units import PAGE_SHIFT, pages_per_level

__all__ = ["ROOT_LEVEL", "GuestPte", "GuestWalk", "NestedGuest"]


class NestedGuest:
    """One root table, at `root_gfn` of address space `as_id`, and the shadow pages vCPUs run on while they use it.

    `ad_bits`: L1 uses A/D bits in its EPT (always, in x86's own format), so KVM sets A and D there and keeps W away
    until D is set. Without TDP the object stands for a guest with paging, and its addresses are virtual ones.
    """

    def __init__(self, vm: Any, root_gfn: int, *, as_id: int = 0, ad_bits: bool = False) -> None:
        self.vm = vm
        self.mmu: MmuState = vm.mmu.state
        self.shadow: ShadowMmu = vm.mmu.shadow
        self.root_gfn = root_gfn
        self.as_id = as_id
        self.nested: bool = vm.config.tdp
        self.entries = self.shadow.tables.entries[as_id]
        self._ept_without_ad = self.nested and vm.config.vendor == "intel" and not ad_bits
        self._loaded: dict[int, ShadowPage] = {}  # vCPU id -> the root it holds

    @property
    def ad_type(self) -> AdType:
        """How stores through its leaves are logged: without A/D bits of L1's, KVM uses none either."""
        if not self.mmu.ad_enabled or self._ept_without_ad:
            return AdType.DISABLED
        return AdType.WRPROT_ONLY if self.nested and self.vm.config.pml_enabled else AdType.ENABLED

    @property
    def key(self) -> PageKey:
        """The role of its root."""
        return PageKey(self.as_id, self.root_gfn, ROOT_LEVEL, ACC_ALL, guest_mode=self.nested, ad_type=self.ad_type)

    # -- roots ---------------------------------------------------------------------------------------------------------

    def load(self, vcpu: Any) -> ShadowPage | None:
        """The root the vCPU runs on, loaded and synced first if it has none that is valid; None: no memory is there.

        Loading flushes what the vCPU has cached (kvm_mmu_load).
        """
        root = self._loaded.get(vcpu.id)
        if root is not None and not root.invalid:
            return root
        self.unload(vcpu)
        if self.vm.gfn_to_slot(self.as_id, self.root_gfn) is None:
            return None
        with self.mmu.lock.write():
            self.shadow.limit.make_available()
            root = self.shadow.pages.get(self.key)
            root.root_count += 1
        self._loaded[vcpu.id] = root
        self.shadow.held_roots.append((self, vcpu))
        self.shadow.unsync.sync_root(root)
        vcpu.mmio.clear()
        vcpu.tlb.flush()
        return root

    def unload(self, vcpu: Any) -> None:
        """The vCPU lets its root go."""
        root = self._loaded.get(vcpu.id)
        if root is not None:
            with self.mmu.lock.write():
                del self._loaded[vcpu.id]
                self.shadow.held_roots.remove((self, vcpu))
                self.shadow.pages.put_root(root)

    # -- the guest says that its tables have changed -------------------------------------------------------------------

    def invept(self, vcpu: Any) -> None:
        """L1 executes INVEPT for these tables: the vCPU's root is dropped, and synced when it is loaded again."""
        assert self.nested, "INVEPT is for L1's tables"
        self.unload(vcpu)

    def flush(self, vcpu: Any) -> None:
        """A flush of the whole TLB by the guest (kvm_vcpu_flush_tlb_guest), as by MOV to CR3 without PCID.

        Shadow pages are the TLB it flushes.
        """
        assert not self.nested, "L2's flushes concern its own tables, which nobody shadows"
        root = self.load(vcpu)
        if root is not None:
            vcpu.mmio.clear()
            self.shadow.unsync.sync_root(root)
        vcpu.tlb.flush()

    def invlpg(self, vcpu: Any, gva: int) -> None:
        """INVLPG of one page: only its entry is brought up to date (kvm_mmu_invlpg)."""
        assert not self.nested, "INVLPG of L2 concerns its own tables, which nobody shadows"
        vcpu.tlb.invalidate(self, gva >> PAGE_SHIFT)
        vcpu.mmio.clear(gva)
        root = self.load(vcpu)
        if root is not None:
            self.shadow.unsync.invalidate_addr(root, gva >> PAGE_SHIFT)
        vcpu.count("invlpg")

    def write_entry(
        self, vcpu: Any, table_gfn: int, index: int, pte: GuestPte | None, *, at: int | None = None
    ) -> None:
        """A store to an entry, as any store to memory, by a vCPU that does not run on these tables (L1).

        `at`: the address to store through, of the space the vCPU runs in; the gpa if not given. Where KVM emulates the
        store it sees it and zaps what it made of the old entry; else the shadow page is unsync.
        """
        if pte is None:
            self.entries.pop((table_gfn, index), None)
        else:
            self.entries[table_gfn, index] = pte
        address = (table_gfn << PAGE_SHIFT if at is None else at) + index * 8
        done = vcpu.run([("w", address, 0 if pte is None else pte.gfn & 0xFFFFFFFF)]).done
        assert done == 1, f"the store to entry {index} of the table at gfn {table_gfn:#x} was not carried out"

    def walk_guest(self, gfn: int) -> GuestWalk | None:
        """The hardware's walk of the guest's tables; None: there is no mapping, the fault is the guest's."""
        return self.shadow.tables.read(self.as_id, self.root_gfn, gfn)

    # -- the CPU's side ------------------------------------------------------------------------------------------------

    def access(self, vcpu: Any, gpa: int, *, write: bool, exec: bool = False) -> int | None:
        """Load or store: the host frame, faulting as often as needed; None: the fault goes to the guest (L1)."""
        gfn, fmt = gpa >> PAGE_SHIFT, self.mmu.fmt
        for _ in range(8):
            self.load(vcpu)
            spte, level = self.walk(gfn)
            if fmt.is_present(spte) and fmt.is_leaf(spte, level) and fmt.allows(spte, write=write, exec=exec):
                return fmt.pfn(spte) + gfn % pages_per_level(level)
            if self.page_fault(vcpu, gfn, write=write, exec=exec) == RetPf.INVALID:
                return None
        raise AssertionError(f"gfn {gfn:#x} of a shadowed guest (write={write}) does not stop faulting")

    def walk(self, gfn: int) -> tuple[int, int]:
        """(SPTE, level) where the hardware's walk of the shadow pages ends."""
        root = self.shadow.pages.existing(self.key)
        return (self.mmu.fmt.nonpresent, ROOT_LEVEL) if root is None else self.shadow.faults.walk(root, gfn)

    def mapped_gfn(self, gfn: int) -> int | None:
        """The L1 gfn a present leaf leads to, which the guest's tables may no longer say."""
        root = self.shadow.pages.existing(self.key)
        if root is None:
            return None
        page, spte, level = self.shadow.faults.last(root, gfn)
        first = page.gfns.get(spte_index(gfn, level))
        return None if first is None or not self.mmu.fmt.is_present(spte) else first + gfn % pages_per_level(level)

    def page_fault(self, vcpu: Any, gfn: int, *, write: bool, exec: bool = False) -> RetPf:
        """A refused access; INVALID: the guest's tables do not allow it, so it gets the fault."""
        root = self.load(vcpu)
        if root is None:
            return RetPf.INVALID
        return self.shadow.faults.page_fault(vcpu, root, gfn, write=write, exec=exec)
