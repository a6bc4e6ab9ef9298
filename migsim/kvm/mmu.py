"""The MMU of one VM as the rest of kvm sees it: one object, whichever MMUs work behind it.

The choice is made once, when the VM is created, as the module parameter tdp_mmu is. Where both live in one VM (nested
guests) every operation acts on both, rmaps first. Source: Linux 6.13, arch/x86/kvm/mmu/mmu.c.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from migsim.kvm.invariants import mmu_violations
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_lock import MmuLock
from migsim.kvm.mmu_state import MmuState, VmSeam
from migsim.kvm.mmu_vcpu import VcpuMmu
from migsim.kvm.notifier import gfn_ranges
from migsim.kvm.nx_recovery import RECOVERY_RATIO, recover_nx_huge_pages, recover_nx_shadow_pages
from migsim.kvm.shadow_invariants import shadow_violations
from migsim.kvm.shadow_mmu import ShadowMmu
from migsim.kvm.spte import PG_LEVEL_2M, PG_LEVEL_4K
from migsim.kvm.tdp_ops import TdpMmu
from migsim.kvm.vintage import Vintage
from migsim.kvm.write_protect import write_track_add, write_track_remove
from migsim.units import PAGE_SIZE, REGION_PAGES, WORD_BITS

INITIALLY_SET = 3  # KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET


class Mmu(VcpuMmu):
    """Facade. `vm` is the VM it serves; `vintage` overrides the row the VM's configuration selects."""

    def __init__(self, vm: VmSeam, vintage: Vintage | None = None) -> None:
        self.vm = vm
        self.state = MmuState(vm, vintage)
        self.shadow = ShadowMmu(self.state, lambda slot, gfn: self._write_protect(slot, gfn, PG_LEVEL_4K))
        self.tdp = TdpMmu(self.state)
        self.parts: tuple[ShadowMmu | TdpMmu, ...] = (self.shadow, self.tdp) if self.tdp_enabled else (self.shadow,)
        self._loaded = self.state.loaded
        self._valid_gen = 0  # mmu_valid_gen, a bit that toggles

    @property
    def tdp_enabled(self) -> bool:
        """Does the TDP MMU serve direct roots (parameter tdp_mmu, read once)?"""
        return self.state.vintage.tdp

    @property
    def lock(self) -> MmuLock:
        """mmu_lock."""
        return self.state.lock

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

    def slot_pages_changed(self, nr_memslot_pages: int) -> None:
        """The guest has grown or shrunk: so does what shadow pages may be had."""
        self.shadow.limit.slot_pages_changed(nr_memslot_pages)

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
        self._try_split_huge_pages(slot, slot.base_gfn, slot.end_gfn)
        if self.vm.config.pml_enabled:
            for part in self.parts:
                part.clear_dirty_slot(slot)
            self._wrprot_slot(slot, PG_LEVEL_2M)
        else:
            self._wrprot_slot(slot, PG_LEVEL_4K)

    def _try_split_huge_pages(self, slot: Memslot, start: int, end: int) -> None:
        """Eager splitting of gfns [start, end) to 4K: nested guests' pages through the rmap, then the roots'."""
        if self.vm.config.eager_page_split and self.state.vintage.eager_split and self.tdp_enabled:
            self.shadow.split_slot(slot, start, end)
            self.tdp.split_slot(slot, start, end)

    def _wrprot_slot(self, slot: Memslot, min_level: int) -> None:
        for part in self.parts:
            part.wrprot_slot(slot, min_level)

    def slot_disable_log(self, slot: Memslot) -> None:
        """The LOG flag was cleared: make small mappings huge again. Write protection stays; faults will undo it."""
        for part in self.parts:
            part.collapse_slot(slot)

    def enable_log_dirty_pt_masked(self, slot: Memslot, gfn_offset: int, mask: int) -> None:
        """Re-arm the pages base_gfn + gfn_offset + (set bits of the 64-bit `mask`); the caller flushes the slot.

        a. With INITIALLY_SET huge pages may still be there: split them, and protect what was not split. KVM up to 6.18
           tells two huge pages apart by rounding both gfns up: without eager splitting, in a slot whose base is no
           multiple of 64 pages, a last gfn that begins a huge page then passes for its neighbour's and stays writable
           and clean. Here the huge pages themselves are compared.
        b. Clear D where PML is in use, else W.
        """
        assert 0 < mask < 1 << WORD_BITS, f"mask {mask:#x} for gfn offset {gfn_offset:#x}"
        base = slot.base_gfn + gfn_offset
        with self._exclusive():
            if self.vm.manual_dirty_log_protect & INITIALLY_SET == INITIALLY_SET:
                first, last = base + (mask & -mask).bit_length() - 1, base + mask.bit_length() - 1
                self._try_split_huge_pages(slot, first, last + 1)
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
        self.state.invalidate.active += 1  # from here to the end the slots stay as they are
        ranges = list(gfn_ranges(self.state, hva, hva_end))
        if not ranges and not self.state.vintage.notifier_always_locks:
            return
        with self.state.lock.write():
            start = min((first for _, first, _ in ranges), default=0)
            self.state.invalidate.begin(start, max((end for _, _, end in ranges), default=0))
            for slot, first, end in ranges:
                for part in self.parts:
                    flush = part.zap_range(slot.as_id, first, end) or flush
            if flush:
                self.vm.flush_remote_tlbs()

    def invalidate_range_end(self, hva: int, hva_end: int) -> None:
        """The host has changed the range."""
        if self.state.vintage.notifier_always_locks or any(gfn_ranges(self.state, hva, hva_end)):
            with self.state.lock.write():
                self.state.invalidate.finish()
        self.state.invalidate.active -= 1
        assert self.state.invalidate.active >= 0, "an MMU notifier ended that never began"

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
        """One period of the NX recovery worker; returns how many tables left its lists, shadowed guests' first."""
        return recover_nx_shadow_pages(self.state, self.shadow.pages, ratio) + recover_nx_huge_pages(self.state, ratio)

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
        leaks += [f"{len(self.shadow.pages)} shadow pages are left at destruction"] * (len(self.shadow.pages) > 0)
        tables = [table for _, table in self.state.nx] + [table for _, table in self.state.nx_shadow]
        return leaks + [f"NX list still holds table {table:#x}" for table in tables]

    def invariants(self) -> list[str]:
        """Everything that must hold between two operations; one sentence for each violation."""
        return [*mmu_violations(self.state), *shadow_violations(self.shadow)]
