"""The MMU of one VM as the rest of kvm sees it: one object, whichever MMUs work behind it.

The choice is made once, when the VM is created, as the module parameter tdp_mmu is. Where both live in one VM (nested
guests) every operation acts on both, rmaps first. Source: Linux 6.13, arch/x86/kvm/mmu/mmu.c.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from migsim.kvm.invariants import mmu_violations
from migsim.kvm.levels import PageFault
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_lock import MmuLock
from migsim.kvm.mmu_state import MmuState, VcpuSeam, VmSeam
from migsim.kvm.notifier import gfn_ranges
from migsim.kvm.nx_recovery import RECOVERY_RATIO, recover_nx_huge_pages
from migsim.kvm.page_fault import classify, direct_page_fault, error_code, handle_mmio_page_fault
from migsim.kvm.roots import Root
from migsim.kvm.shadow_mmu import ShadowMmu
from migsim.kvm.spte import PG_LEVEL_2M, PG_LEVEL_4K, SpteFormat
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.tdp_ops import TdpMmu
from migsim.kvm.vintage import Vintage
from migsim.kvm.write_protect import write_track_add, write_track_remove
from migsim.units import PAGE_SHIFT, PAGE_SIZE, REGION_PAGES, WORD_BITS

INITIALLY_SET = 3  # KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
_STAT_OF = {RetPf.FIXED: "pf_fixed", RetPf.EMULATE: "pf_emulate", RetPf.SPURIOUS: "pf_spurious"}


class Mmu:
    """Facade. `vm` is the VM it serves; `vintage` overrides the row the VM's configuration selects."""

    def __init__(self, vm: VmSeam, vintage: Vintage | None = None) -> None:
        self.vm = vm
        self.state = MmuState(vm, vintage)
        self.shadow = ShadowMmu(self.state, self.track_writes, self.untrack_writes)
        self.tdp = TdpMmu(self.state)
        self.parts: tuple[ShadowMmu | TdpMmu, ...] = (self.shadow, self.tdp) if self.tdp_enabled else (self.shadow,)
        self._loaded = self.state.loaded
        self._valid_gen = 0  # mmu_valid_gen, a bit that toggles

    @property
    def fmt(self) -> SpteFormat:
        """The SPTE format."""
        return self.state.fmt

    @property
    def tdp_enabled(self) -> bool:
        """Does the TDP MMU serve direct roots (parameter tdp_mmu, read once)?"""
        return self.state.vintage.tdp

    @property
    def lock(self) -> MmuLock:
        """mmu_lock."""
        return self.state.lock

    # -- roots and faults --------------------------------------------------------------------------------------------

    def valid_roots(self, as_id: int) -> list[Root]:
        """Roots that faults of one address space may use."""
        return list(self.state.roots.valid(as_id))

    def root_is_current(self, vcpu: VcpuSeam, root: Root) -> bool:
        """May the vCPU go on with `root`: not invalidated, and of the role it is in now?"""
        return not root.invalid and root.role == self.state.role(vcpu)

    def root_of(self, vcpu: VcpuSeam) -> Root:
        """The root a vCPU translates through, loaded first where it has none, an invalid one, or changed its role."""
        root = self._loaded.get(vcpu.id)
        return root if root is not None and self.root_is_current(vcpu, root) else self.load_root(vcpu)

    def load_root(self, vcpu: VcpuSeam, old: Root | None = None) -> Root:
        """Give the vCPU the root of its role and take its reference to the old one back (kvm_mmu_load)."""
        role = self.state.role(vcpu)
        assert old is None or self._loaded.get(vcpu.id) is old, f"vCPU {vcpu.id} gives back a root it does not hold"
        self.unload(vcpu)
        slots = self.vm.memslots(role.as_id)
        root = self.state.roots.get(self.fmt, role, slots, pml=self.vm.config.pml_enabled)
        self._loaded[vcpu.id] = root
        return root

    def unload(self, vcpu: VcpuSeam) -> None:
        """The vCPU lets its root go."""
        root = self._loaded.pop(vcpu.id, None)
        if root is not None:
            self.state.roots.put(root)

    def walk(self, root: Root, gfn: int) -> tuple[int, int]:
        """(SPTE, level) where the hardware's walk for gfn ends."""
        return root.lookup(gfn)

    def page_fault(
        self, vcpu: VcpuSeam, gpa: int, *, write: bool, exec: bool = False, prefetch: bool = False
    ) -> RetPf:
        """Handle a refused access (kvm_mmu_page_fault). RETRY, FIXED, SPURIOUS: run the guest again.

        EMULATE, WRITE_PROTECTED: the access is to be emulated. Raises OSError(EFAULT or EHWPOISON) where KVM_RUN fails.
        """
        root = self.root_of(vcpu)
        fault = PageFault(vcpu, gpa, gpa >> PAGE_SHIFT, write, exec, prefetch)
        classify(self.state, root, fault)
        if fault.rsvd:
            result = handle_mmio_page_fault(self.state, root, fault)
            if result != RetPf.INVALID:
                return result
            fault.rsvd = False
        self.vm.trace(
            "kvm_page_fault", vcpu_id=vcpu.id, fault_address=gpa, error_code=error_code(fault)
        )
        if not prefetch:
            self.vm.stats.count_vcpu(vcpu.id, "pf_taken")
        result = direct_page_fault(self.state, root, fault, self._map)
        # of faults nobody took only those that mapped something count (Linux 5.19)
        if result in _STAT_OF and (result == RetPf.FIXED or not prefetch):
            self.vm.stats.count_vcpu(vcpu.id, _STAT_OF[result])
        return result

    def _map(self, mmu: MmuState, root: Root, fault: PageFault) -> RetPf:
        return self.parts[-1].map(root, fault)

    def set_dirty_bit(self, vcpu: VcpuSeam, root: Root, gfn: int) -> bool:
        """The CPU stores through a leaf with W and sets D if it has D bits; True if D was clear (PML logs then)."""
        return self._set_hardware_bit(root, gfn, self.fmt.dirty)

    def set_accessed(self, vcpu: VcpuSeam, root: Root, gfn: int) -> bool:
        """The CPU reads through a leaf: A is set if the CPU has A bits; True if it was clear."""
        return self._set_hardware_bit(root, gfn, self.fmt.accessed)

    def _set_hardware_bit(self, root: Root, gfn: int, bit: int) -> bool:
        if not self.state.ad_enabled:
            return False
        *_, (at, spte, level) = root.walk(gfn)
        assert self.fmt.is_present(spte) and self.fmt.is_leaf(spte, level), f"gfn {gfn:#x}: SPTE {spte:#x} no leaf"
        if spte & bit:
            return False
        root.write(at, spte | bit)
        return True

    # -- slots -------------------------------------------------------------------------------------------------------

    def slot_created(self, slot: Memslot) -> None:
        """A slot is about to appear: its space's roots get room for its leaves."""
        for root in self.state.roots.valid(slot.as_id):
            root.add_slot(slot)

    def slot_deleted(self, slot: Memslot) -> None:
        """A slot has gone (or moved away): nothing may be mapped there any more."""
        for root in self.state.roots.valid(slot.as_id):
            if slot.id in root.leaf:
                root.drop_slot(slot.id)

    def zap_slot(self, slot: Memslot) -> None:
        """Zap what one slot maps and nothing else (quirk KVM_X86_QUIRK_SLOT_ZAP_ALL off, Linux 6.12)."""
        with self.state.lock.write():
            flush = self.shadow.pages.zap_in(slot)
            for part in self.parts:
                flush = part.zap_range(slot.as_id, slot.base_gfn, slot.end_gfn) or flush
            if flush:
                self.vm.flush_remote_tlbs()

    def zap_all_fast(self) -> None:
        """Zap everything; vCPUs build new roots meanwhile (kvm_mmu_zap_all_fast)."""
        self._valid_gen ^= 1
        self.vm.trace("kvm_mmu_zap_all_fast", mmu_valid_gen=self._valid_gen, mmu_used_pages=self.table_pages())
        for part in self.parts:
            part.zap_all()

    # -- dirty logging -----------------------------------------------------------------------------------------------

    def slot_enable_log(self, slot: Memslot, initially_set: bool) -> None:
        """The LOG flag was set on an existing slot. With INITIALLY_SET nothing is done: CLEAR will, piece by piece.

        Split first, protect after, so that the children inherit W and are protected with the rest. The caller flushes.
        """
        if initially_set:
            if self.state.vintage.protects_huge_at_enable:
                self._wrprot_slot(slot, PG_LEVEL_2M)
            return
        if self._eager_split and self.tdp_enabled:
            self.tdp.split_slot(slot, slot.base_gfn, slot.end_gfn)
        if self.vm.config.pml_enabled:
            for part in self.parts:
                part.clear_dirty_slot(slot)
            self._wrprot_slot(slot, PG_LEVEL_2M)
        else:
            self._wrprot_slot(slot, PG_LEVEL_4K)

    @property
    def _eager_split(self) -> bool:
        return self.vm.config.eager_page_split and self.state.vintage.eager_split

    def _wrprot_slot(self, slot: Memslot, min_level: int) -> None:
        for part in self.parts:
            part.wrprot_slot(slot, min_level)

    def slot_disable_log(self, slot: Memslot) -> None:
        """The LOG flag was cleared: make small mappings huge again. Write protection stays; faults will undo it."""
        for part in self.parts:
            part.collapse_slot(slot)

    def enable_log_dirty_pt_masked(self, slot: Memslot, gfn_offset: int, mask: int) -> None:
        """Re-arm the pages base_gfn + gfn_offset + (set bits of the 64-bit `mask`); the caller flushes the slot.

        a. With INITIALLY_SET huge pages may still be there: split them, and protect what was not split.
        b. Clear D where PML is in use, else W.
        """
        assert 0 < mask < 1 << WORD_BITS, f"mask {mask:#x} for gfn offset {gfn_offset:#x}"
        base = slot.base_gfn + gfn_offset
        with self._exclusive():
            if self.vm.manual_dirty_log_protect & INITIALLY_SET == INITIALLY_SET:
                first, last = base + (mask & -mask).bit_length() - 1, base + mask.bit_length() - 1
                if self._eager_split and self.tdp_enabled:
                    self.tdp.split_slot(slot, first, last + 1)
                self._write_protect(slot, first, PG_LEVEL_2M)
                if first // REGION_PAGES != last // REGION_PAGES:
                    self._write_protect(slot, last, PG_LEVEL_2M)
            for part in self.parts:
                part.clear_dirty_pt_masked(slot, base, mask, wrprot=not self.vm.config.pml_enabled)

    def _exclusive(self) -> AbstractContextManager[bool]:
        return nullcontext(False) if self.state.lock.writer else self.state.lock.write()

    # -- write protection of single gfns -------------------------------------------------------------------------------

    def _write_protect(self, slot: Memslot, gfn: int, min_level: int) -> bool:
        return sum(part.write_protect_gfn(slot, gfn, min_level) for part in self.parts) > 0

    def write_protect_gfn(self, slot: Memslot, gfn: int) -> bool:
        """Nobody writes gfn any more without a fault that the fast path cannot repair; True if TLBs were flushed."""
        with self._exclusive():
            protected = self._write_protect(slot, gfn, PG_LEVEL_4K)
            if protected:
                self.vm.flush_remote_tlbs()
        return protected

    def track_writes(self, slot: Memslot, gfn: int) -> None:
        """Start write-tracking gfn: every store to it is to be emulated."""
        write_track_add(self.state, slot, gfn)
        self.write_protect_gfn(slot, gfn)

    def untrack_writes(self, slot: Memslot, gfn: int) -> None:
        """Stop write-tracking gfn."""
        write_track_remove(self.state, slot, gfn)

    # -- notifiers ---------------------------------------------------------------------------------------------------

    def invalidate_range_start(self, hva: int, hva_end: int) -> None:
        """The host is about to change [hva, hva_end): from here on nothing maps it and no fault may."""
        self.vm.trace("kvm_unmap_hva_range", start=hva, end=hva_end)
        flush = False
        with self.state.lock.write():
            ranges = list(gfn_ranges(self.state, hva, hva_end))
            start = min((first for _, first, _ in ranges), default=0)
            self.state.invalidate.begin(start, max((end for _, _, end in ranges), default=0))
            for slot, first, end in ranges:
                for part in self.parts:
                    flush = part.zap_range(slot.as_id, first, end) or flush
            if flush:
                self.vm.flush_remote_tlbs()

    def invalidate_range_end(self, hva: int, hva_end: int) -> None:
        """The host has changed the range."""
        with self.state.lock.write():
            self.state.invalidate.finish()

    def unmap_hva_range(self, start: int, end: int) -> None:
        """A whole invalidation of host addresses [start, end)."""
        self.invalidate_range_start(start, end)
        self.invalidate_range_end(start, end)

    def change_pte(self, hva: int) -> bool:
        """The host replaced one page in place (KSM, copy on write); only until Linux 6.10, then an invalidation."""
        assert self.state.vintage.changed_pte, "the changed_pte notifier is gone since Linux 6.10"
        host = self.vm.host
        hit = False
        for slot, gfn, _ in list(gfn_ranges(self.state, hva, hva + 1)):
            for part in self.parts:
                hit = part.set_spte_gfn(slot, gfn, host.pfn(hva), writable=host.writable(hva)) or hit
        return hit

    def age_gfn_range(self, slot: Memslot, start: int, end: int) -> bool:
        """Make gfns [start, end) old; True if one was young. No TLB flush."""
        return sum(part.age(slot, start, end) for part in self.parts) > 0

    def test_age_gfn(self, slot: Memslot, gfn: int) -> bool:
        """Is gfn young? Changes nothing."""
        return any(part.test_age(slot, gfn, gfn + 1) for part in self.parts)

    def age_hva(self, hva: int, hva_end: int) -> bool:
        """clear_flush_young of host addresses."""
        self.vm.trace("kvm_age_hva", start=hva, end=hva_end)
        ranges = list(gfn_ranges(self.state, hva, hva_end))
        return sum(self.age_gfn_range(slot, first, end) for slot, first, end in ranges) > 0

    def test_age_hva(self, hva: int) -> bool:
        """test_young of a host address."""
        self.vm.trace("kvm_test_age_hva", hva=hva)
        return any(self.test_age_gfn(slot, gfn) for slot, gfn, _ in gfn_ranges(self.state, hva, hva + 1))

    # -- the rest ----------------------------------------------------------------------------------------------------

    def recover_nx(self, ratio: int = RECOVERY_RATIO) -> int:
        """One period of the NX recovery worker; returns how many tables left its list."""
        return recover_nx_huge_pages(self.state, ratio)

    def table_pages(self) -> int:
        """Page-table pages allocated now, shadow pages included."""
        return sum(sum(root.n_tables) for root in self.state.roots) + len(self.shadow.pages)

    def rmap_bytes(self) -> int:
        """Memory of the reverse map; 0 as long as only the TDP MMU has been used."""
        return self.shadow.rmap.bytes_held()

    def memory(self) -> dict[str, int]:
        """Bytes held by page tables and by the reverse map."""
        return {"table-bytes": self.table_pages() * PAGE_SIZE, "rmap-bytes": self.rmap_bytes()}

    def pre_destroy(self) -> list[str]:
        """The VM goes: unload every vCPU, zap everything. One sentence for each thing that is left over."""
        for root in self._loaded.values():
            self.state.roots.put(root)
        self._loaded.clear()
        self.state.roots.invalidate(self.state.roots.valid())
        for part in self.parts:
            part.destroy()
        stats = self.vm.stats
        left = {name: getattr(stats, name) for name in ("pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits")}
        leaks = [f"{name} is {value} at destruction" for name, value in left.items() if value]
        leaks += [f"{root!r} is left at destruction" for root in self.state.roots]
        return leaks + [f"NX list still holds table {table:#x}" for _, table in self.state.nx]

    def invariants(self) -> list[str]:
        """Everything that must hold between two operations; one sentence for each violation."""
        return mmu_violations(self.state)
