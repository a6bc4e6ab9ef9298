"""Bugs of the MMU and of slot changes.  Commits: Linux."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

from migsim.validate.seeded.bug import bug, each_vcpu, swap, swap_shared
from migsim.validate.seeded.in_log import RANDOM_PML, RANDOM_W


@bug("yield-without-progress", "0b6620a0", "H", "random")
def yield_without_progress(vm: Any, undo: ExitStack) -> None:
    """The iterator yields before it has made a step, so under contention it stays at one place for ever."""
    from migsim.kvm.tdp_iter import TdpIter

    def make(restart: Any) -> Any:
        def restart_anywhere(it: Any) -> None:
            restart(it)
            it.yielded_gfn = -1

        return restart_anywhere

    swap_shared(TdpIter, "restart", make, undo)
    vm.mmu.state.sched.need_resched = lambda: True


@bug("walk-outside-rcu", "rule of 7cca2d0b", "K", *RANDOM_W)
def walk_outside_rcu(vm: Any, undo: ExitStack) -> None:
    """Write-protecting a slot walks its tables without an RCU read section: they may be freed under the walk."""

    def make(wrprot_slot: Any) -> Any:
        def unprotected(slot: Any, min_level: int) -> bool:
            rcu = vm.mmu.state.rcu
            rcu.read = nullcontext
            try:
                return bool(wrprot_slot(slot, min_level))
            finally:
                del rcu.read

        return unprotected

    swap(vm.mmu.tdp, "wrprot_slot", make)


@bug("yield-advances", "3a0f64de", "L", "random")
def yield_advances(vm: Any, undo: ExitStack) -> None:
    """After a yield the iterator restarts and then takes a step: one SPTE is skipped."""
    from migsim.kvm.tdp_iter import TdpIter

    def make(step: Any) -> Any:
        def advance(it: Any) -> None:
            if it.yielded:
                it.restart()
                while it._step_down():
                    pass
            step(it)

        return advance

    swap_shared(TdpIter, "next", make, undo)


@bug("zap-yield-drops-flush", "a835429c", "S", "random")
def zap_yield_drops_flush(vm: Any, undo: ExitStack) -> None:
    """Zapping a range yields without flushing what it has zapped so far."""
    from migsim.kvm import zap

    def make(cond_resched: Any) -> Any:
        return lambda mmu, it, *, flush: cond_resched(mmu, it, flush=False)

    swap_shared(zap, "cond_resched", make, undo)


@bug("nx-recovery-ignores-flush", "048f4980", "S", "nx_huge_pages_test/recovery flushes", "random")
def nx_recovery_ignores_flush(vm: Any, undo: ExitStack) -> None:
    """NX recovery zaps tables and ignores that a flush is due."""
    from migsim.kvm import nx_recovery

    def make(zap_table: Any) -> Any:
        def unheard(*args: Any) -> bool:
            zap_table(*args)
            return False

        return unheard

    swap_shared(nx_recovery, "zap_table", make, undo)


@bug("nx-recovery-yields-unflushed", "33a31641", "S",
     "nx_huge_pages_test/recovery flushes before it yields", "random")  # fmt: skip
def nx_recovery_yields_unflushed(vm: Any, undo: ExitStack) -> None:
    """NX recovery lets others run between two tables and forgets that a flush is due."""
    from migsim.kvm import nx_recovery

    def make(let_others_run: Any) -> Any:
        return lambda mmu, *, flush: let_others_run(mmu, flush=False)

    swap_shared(nx_recovery, "_yield", make, undo)


@bug("zap-flush-lost-between-parts", "rule of kvm_unmap_gfn_range", "S", "random/tdp,slot zap", "random")
def zap_flush_lost_between_parts(vm: Any, undo: ExitStack) -> None:
    """The flush that one address space's zap needs is overwritten by the next one's answer."""

    def make(zap_range: Any) -> Any:
        def overwritten(as_id: int, start: int, end: int) -> bool:
            zap_range(as_id, start, end)
            return False

        return overwritten

    for part in vm.mmu.parts:
        swap(part, "zap_range", make)


@bug("fault-zaps-huge-without-flush", "f83524d7", "S", "races/huge page split under others,tdp-5.10", "random")
def fault_zaps_huge_without_flush(vm: Any, undo: ExitStack) -> None:
    """The fault handler replaces a huge SPTE by a table and does not flush before the range is used again."""
    vm.mmu.state.flush_gfn = lambda root, gfn, pages: None


@bug("write-protect-skips-protected", "7c8a4742", "S", "races/a tracked page stays protected,tdp", "random")
def write_protect_skips_protected(vm: Any, undo: ExitStack) -> None:
    """Write-protecting a shadowed page skips an SPTE without W that is MMU-writable: the fast path undoes it."""

    def make(protect: Any) -> Any:
        def only_writable(slot: Any, gfn: int, min_level: int = 1) -> bool:
            fmt = vm.mmu.fmt
            sptes = [vm.mmu.walk(root, gfn)[0] for root in vm.mmu.state.roots.valid(slot.as_id)]
            if not any(fmt.is_present(spte) and fmt.is_writable(spte) for spte in sptes):
                return False
            return bool(protect(slot, gfn, min_level))

        return only_writable

    swap(vm.mmu.tdp, "write_protect_gfn", make)


@bug("fault-ignores-invalid-root", "a955cad8", "K", "races/root invalidated during a fault")
def fault_ignores_invalid_root(vm: Any, undo: ExitStack) -> None:
    """A fault that looked up its page before a slot went away installs it into the root that was zapped."""
    from migsim.kvm import page_fault

    def make(is_stale: Any) -> Any:
        def no_root_check(mmu: Any, root: Any, fault: Any) -> bool:
            return fault.slot is not None and mmu.invalidate.retry(fault.invalidate_seq, fault.gfn)

        return no_root_check

    swap_shared(page_fault, "is_stale", make, undo)


@bug("fault-ignores-invalidation", "82d811ff", "S", "races/page taken away during a fault")
def fault_ignores_invalidation(vm: Any, undo: ExitStack) -> None:
    """The notifier's sequence is compared wrongly, so a fault maps a page that the host has taken back."""
    vm.mmu.state.invalidate.retry = lambda seq, gfn: False


@bug("wrprot-only-root-by-d", "2673dfb5", "L", *RANDOM_PML)
def wrprot_only_root_by_d(vm: Any, undo: ExitStack) -> None:
    """On roots for L2, whose D bits PML does not watch, re-arming clears D instead of W (CVE-2024-26990)."""
    from migsim.kvm import tdp_log

    swap_shared(tdp_log, "needs_write_protect", lambda original: lambda root: False, undo)


@bug("mmio-wrap-in-one-space", "kvm: detect MMIO generation wrap, 2019", "S", "races/MMIO generation wraps,space 1")
def mmio_wrap_in_one_space(vm: Any, undo: ExitStack) -> None:
    """The wrap of the MMIO generation is noticed in address space 0 only."""
    from migsim.kvm.mmio import generation_mask

    def wrapped(generation: int) -> bool:
        return not generation & generation_mask(vm.mmu.fmt)

    vm.regions.mmio_generation_wrapped = wrapped


@bug("mmio-stamped-in-flux", "ddfd1730", "S", "races/MMIO while slots change")
def mmio_stamped_in_flux(vm: Any, undo: ExitStack) -> None:
    """The new generation is out before the new slots are: MMIO cached in between looks current for ever."""

    def swap_active(memslots: Any, change: Any) -> None:
        memslots.generation = vm.regions.next_generation(memslots)
        vm.race("memslot: in progress")
        change()

    vm.regions.swap_active = swap_active


@bug("slot-delete-without-zap", "4e103134", "S", "memslot_test/delete while others log", "random")
def slot_delete_without_zap(vm: Any, undo: ExitStack) -> None:
    """DELETE and MOVE drop the slot but not what is mapped through it."""
    vm.regions.flush_shadow = lambda slot: None
    vm.mmu.slot_deleted = lambda slot: None


@bug("read-only-huge-page-stays", "404381c5", "H", "races/huge page split under others,tdp", "random")
def read_only_huge_page_stays(vm: Any, undo: ExitStack) -> None:
    """A fault that needs a small page below a read-only huge one does not drop the huge one and loops."""
    from migsim.kvm import tdp_mmu

    def make(make_way: Any) -> Any:
        def only_writable(mmu: Any, fault: Any, it: Any) -> bool:
            if it.is_leaf and not mmu.fmt.is_writable(it.old_spte):
                return False
            return bool(make_way(mmu, fault, it))

        return only_writable

    swap_shared(tdp_mmu, "_make_way", make, undo)


@bug("fast-fault-not-marked", "rule of c7ba5b48", "L", *RANDOM_W)
def fast_fault_not_marked(vm: Any, undo: ExitStack) -> None:
    """The lockless repair gives W back and does not mark the page."""
    from migsim.kvm import page_fault

    def make(fast: Any) -> Any:
        def unmarked(mmu: Any, root: Any, fault: Any) -> Any:
            slot, fault.slot = fault.slot, None
            try:
                return fast(mmu, root, fault)
            finally:
                fault.slot = slot

        return unmarked

    swap_shared(page_fault, "fast_page_fault", make, undo)


@bug("fast-fault-makes-huge-writable", "rule of c7ba5b48", "L",
     "races/huge page split under others,tdp", "random")  # fmt: skip
def fast_fault_makes_huge_writable(vm: Any, undo: ExitStack) -> None:
    """The lockless repair gives W to a whole huge page of a logged slot for one store."""
    from migsim.kvm import page_fault

    def make(fast: Any) -> Any:
        def any_size(mmu: Any, root: Any, fault: Any) -> Any:
            spte, level = root.lookup(fault.gfn)
            fmt, slot = mmu.fmt, fault.slot
            huge = fault.write and level > 1 and fmt.is_present(spte) and fmt.is_leaf(spte, level)
            if not huge or not fmt.is_mmu_writable(spte) or slot is None or not slot.logging:
                return fast(mmu, root, fault)
            fault.slot = None
            try:
                result = fast(mmu, root, fault)
            finally:
                fault.slot = slot
            mmu.vm.mark_page_dirty_in_slot(slot, fault.gfn, fault.vcpu)
            return result

        return any_size

    swap_shared(page_fault, "fast_page_fault", make, undo)


@bug("mapping-writable-not-marked", "9ed5520d", "L", "random")
def mapping_writable_not_marked(vm: Any, undo: ExitStack) -> None:
    """A leaf becomes writable for another reason than a store and its page is not marked."""
    from migsim.kvm import shadow_fault, tdp_mmu

    def make(mark: Any) -> Any:
        def only_writes(mmu: Any, fault: Any, spte: int, level: int) -> None:
            if fault.write:
                mark(mmu, fault, spte, level)

        return only_writes

    swap_shared(tdp_mmu, "mark_made_writable", make, undo)
    swap_shared(shadow_fault, "mark_made_writable", make, undo)


@bug("vcpu-keeps-a-dead-root", "18c841e1", "S", "random")
def vcpu_keeps_dead_root(vm: Any, undo: ExitStack) -> None:
    """A vCPU goes on with a root that has been invalidated: the request to load a new one is ignored."""

    def change(vcpu: Any) -> None:
        def make(load_root: Any) -> Any:
            def keep() -> Any:
                if vcpu.root is not None and vcpu._root_mode == (vcpu.smm, vcpu.guest_mode):
                    return vcpu.root
                return load_root()

            return keep

        swap(vcpu, "load_root", make)

    each_vcpu(vm, change)


@bug("clear-splits-one-short", "1aa4bb91", "P", "dirty_log_page_splitting_test")
def clear_splits_one_short(vm: Any, undo: ExitStack) -> None:
    """CLEAR splits up to the last page, exclusively: the last page's huge page is protected, not split."""

    def make(split_slot: Any) -> Any:
        def short(slot: Any, start: int, end: int) -> None:
            if (start, end) != (slot.base_gfn, slot.end_gfn):
                end -= 1
            split_slot(slot, start, end)

        return short

    swap(vm.mmu.tdp, "split_slot", make)


@bug("disable-recovers-nothing", "3eda3381", "P", "dirty_log_page_splitting_test")
def disable_recovers_nothing(vm: Any, undo: ExitStack) -> None:
    """Disabling the log asks whether the page table's own frame is huge, which it never is."""
    vm.mmu.tdp.collapse_slot = lambda slot: None


@bug("nx-recovery-zaps-logged", "eb298605", "P", "nx_huge_pages_test")
def nx_recovery_zaps_logged(vm: Any, undo: ExitStack) -> None:
    """NX recovery zaps tables of logged slots, which fault back at 4K for ever."""
    from dataclasses import replace

    vm.mmu.state.vintage = replace(vm.mmu.state.vintage, nx_skips_logged=False)
