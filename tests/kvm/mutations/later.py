"""What came after, Linux 5.12 to 6.18."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from migsim.kvm import changed_spte, tdp_log, tdp_mmu
from migsim.kvm.tdp_iter import for_each_tdp_pte
from migsim.kvm.tdp_mmu import RetPf

from .declare import column, gone, inside, told, unflushed, without

gone("5.12 PML on only", "memory_region.MemoryRegions.update_cpu_dirty_logging", "tells no vCPU")


without("5.12 PML on only", "vcpu.Vcpu.update_cpu_dirty_logging", "switches at once, though L2 runs",
        told("guest_mode", False, at=0))  # fmt: skip
gone("5.13 zap all by", "zap.invalidate_all_roots", "marks no root", answer=[])
gone("5.13 zap all by", "zap.zap_invalidated_roots", "leaves what was marked")
without("5.13 bit 11 says", "spte.SpteFormat.is_present", "takes all for present that is not zero and not MMIO",
        lambda honest: lambda fmt, spte: spte not in (fmt.nonpresent, fmt.frozen) and not fmt.is_mmio(spte))
column("5.13 a notifier takes", "mmu.Mmu.invalidate_range_start", "notifier_always_locks", True, "takes it always")
without("5.13 a notifier takes", "mmu.Mmu.invalidate_range_end", "leaves the slots waiting",
        lambda _: lambda mmu, *range: None)  # fmt: skip
gone("5.15 fast page fault", "page_fault.fast_page_fault", "leaves it to the slow path", answer=RetPf.INVALID)


without("5.15 fast page fault", "page_fault.fast_page_fault", "does not mark the page", told("slot", None, at=2))
gone("5.15 pages_4k", "stats.Stats.update_page_stats", "counts nothing")
without("5.15 a fault does not install", "page_fault.is_stale", "does not ask whether the root is still valid",
        lambda _: lambda mmu, root, fault: mmu.invalidate.retry(fault.invalidate_seq, fault.gfn))  # fmt: skip
gone("5.18 eager splitting at enable;", "tdp_log.split_range", "splits nothing")
without("5.18 eager splitting at enable;", "make_spte.make_split_spte", "makes children read-only",
        lambda honest: lambda fmt, *args, **more: honest(fmt, *args, **more) & ~fmt.writable)  # fmt: skip
without("5.18 eager splitting at enable;", "make_spte.make_split_spte", "makes children clean",
        lambda honest: lambda fmt, *args, **more: honest(fmt, *args, **more) & ~fmt.dirty)  # fmt: skip
inside("5.18 eager splitting at CLEAR", "mmu.Mmu.enable_log_dirty_pt_masked", "does not split before it re-arms",
       "tdp_ops.TdpMmu.split_slot", lambda _: lambda *_: None)  # fmt: skip


@without("5.18 writes to tracked gfns", "write_protect.write_protect_gfn", "passes over an SPTE that has lost W")
def _(honest: Any) -> Any:
    def protect(mmu: Any, root: Any, gfn: int, min_level: int = 1) -> bool:
        return mmu.fmt.is_writable(root.lookup(gfn)[0]) and honest(mmu, root, gfn, min_level)

    return protect


gone("5.19 disable zaps tables", "tdp_log.zap_collapsible_tables", "zaps nothing")
gone("5.19 disable zaps tables", "tdp_log.zap_collapsible_leafs", "zaps nothing")
without("5.19 disable zaps tables", "tdp_log.zap_collapsible_tables", "goes leaf by leaf",
        lambda honest: lambda mmu, root, slot: tdp_log.zap_collapsible_leafs(mmu, root, slot))  # fmt: skip


@without("5.19 volatile SPTEs are exchanged", "changed_spte.set_spte", "takes for replaced what it read before")
def _(honest: Any) -> Any:
    def store(mmu: Any, it: Any, new: int) -> None:
        it.root.write(it.at, it.old_spte)
        honest(mmu, it, new)

    return store


column("6.1 table pages", "tdp_mmu.list_table", "pages_list", True, "lists every table")
gone("6.1 table pages", "changed_spte.unlist_table", "leaves tables on the lists")
column("6.9 roots are allocated", "mmu_vcpu.VcpuMmu.load_root", "root_read_lock", False, "takes the exclusive lock")
inside("6.9 roots are allocated", "mmu_vcpu.VcpuMmu.unload", "takes no lock", "mmu_vcpu.VcpuMmu._root_lock",
       lambda _: lambda mmu: nullcontext(False))  # fmt: skip
gone("6.13 dirty and accessed", "page_state.mapped_page", "tells nobody")
gone("6.13 dirty and accessed", "page_state.lost_page_state", "tells nobody")
gone("L1TF:", "spte.l1tf_mask", "guards nothing", answer=0)
without("L1TF:", "mmio.mmio_gfn", "reads the gfn where it would be without the guard",
        lambda honest: lambda fmt, spte: honest(replace(fmt, rsvd_mask=0), spte))  # fmt: skip
without("a vCPU remembers", "mmio.MmioCache.match_gpa", "knows nothing", lambda _: lambda *_: False)
without("a vCPU remembers", "mmio.MmioCache.match_gpa", "does not ask for the generation",
        lambda honest: lambda cache, gpa, generation: honest(cache, gpa, cache.generation))  # fmt: skip


@without("a vCPU remembers", "mmio.MmioCache.cache", "learns while the slots change")
def _(honest: Any) -> Any:
    return lambda cache, gva, gfn, access, generation: honest(cache, gva, gfn, access, generation & ~(1 << 63))


gone("a vCPU remembers", "mmio.MmioCache.clear", "forgets nothing")


@without("KVM_CAP_VM_DISABLE_NX_HUGE_PAGES", "caps.Caps.disable_nx_huge_pages", "looks at the argument first")
def _(honest: Any) -> Any:
    def disable(caps: Any, arg: int) -> None:
        if arg:
            raise OSError(22, "argument")
        honest(caps, arg)

    return disable


@without("KVM_PRE_FAULT_MEMORY", "pre_fault.pre_fault_memory", "goes on behind the end of memory")
def _(honest: Any) -> Any:
    def pre_fault(vcpu: Any, gpa: int, size: int, flags: int = 0) -> Any:
        return honest(vcpu, gpa, size, flags)._replace(size=0)

    return pre_fault


@without("KVM_PRE_FAULT_MEMORY", "pre_fault.pre_fault_memory", "looks for signals first")
def _(honest: Any) -> Any:
    def pre_fault(vcpu: Any, gpa: int, size: int, flags: int = 0) -> Any:
        if not vcpu.vm.config.tdp or gpa % 4096:
            raise OSError(4, "interrupted")
        return honest(vcpu, gpa, size, flags)

    return pre_fault


without("KVM_PRE_FAULT_MEMORY", "page_fault.count_result", "counts prefetches like faults",
        lambda honest: lambda mmu, vcpu, result, prefetch=False: honest(mmu, vcpu, result))  # fmt: skip


@without("the fast path's tracepoint", "page_fault.fast_page_fault", "traces repairs alone")
def _(honest: Any) -> Any:
    def fast(mmu: Any, root: Any, fault: Any) -> RetPf:
        sink, mmu.vm.trace_sink = mmu.vm.trace_sink, None
        result = honest(mmu, root, fault)
        mmu.vm.trace_sink = sink
        return RetPf(result)

    return fast


@without("loops that meet", "tdp_log.wrprot_range", "installs whatever is there by now")
def _(honest: Any) -> Any:
    def protect(mmu: Any, root: Any, start: int, end: int, min_level: int) -> bool:
        with mmu.rcu.read():
            for it in for_each_tdp_pte(root, start, end, min_level):
                if it.is_leaf and mmu.fmt.is_writable(it.old_spte):
                    new = it.old_spte & ~mmu.fmt.writable
                    if not changed_spte.set_spte_atomic(mmu, it, new):
                        root.write(it.at, new)
        return True

    return protect


@without("loops that meet", "zap.zap_root", "tries until it is its own")
def _(honest: Any) -> Any:
    def zap(mmu: Any, root: Any) -> None:
        for level in (1, 2, 3, root.level):
            with mmu.rcu.read():
                for it in for_each_tdp_pte(root, 0, 1 << 9 * root.level, level):
                    if it.level <= level and mmu.fmt.is_present(it.old_spte):
                        while not changed_spte.set_spte_atomic(mmu, it, mmu.fmt.nonpresent):
                            pass

    return zap


without("5.19 volatile SPTEs are exchanged", "spte.SpteFormat.is_volatile", "knows of A and D alone",
        lambda honest: lambda fmt, spte, level, **more: honest(fmt, spte | fmt.writable, level, **more))  # fmt: skip
column("6.2 a huge page in the way", "tdp_mmu.split_huge_page", "splits_on_fault", False, "zaps it")


@without("6.2 a huge page in the way", "tdp_mmu.split_huge_page", "links the table and fills it afterwards")
def _(honest: Any) -> Any:
    def split(mmu: Any, it: Any) -> bool:
        late: list[Callable[[], None]] = []
        exchange = tdp_mmu.set_spte_atomic

        def link_first(*args: Any, publish: Callable[[], None], **more: Any) -> bool:
            late.append(publish)
            return exchange(*args, **more)

        tdp_mmu.set_spte_atomic = link_first
        try:
            done = honest(mmu, it)
        finally:
            tdp_mmu.set_spte_atomic = exchange
        late[0]()
        return done

    return split


column("6.2 NX recovery leaves", "nx_recovery.recover_nx_huge_pages", "nx_skips_logged", False, "zaps them too")


@without("6.4 W, D and A are taken", "changed_spte.clear_spte_bits", "stores what the walk had read, less the bits")
def _(honest: Any) -> Any:
    def clear(mmu: Any, it: Any, mask: int, *, lockless: bool = False) -> None:
        it.root.write(it.at, it.old_spte)
        honest(mmu, it, mask, lockless=lockless)

    return clear


without("6.4 W, D and A are taken", "paging.PagingStructure.clear_bits", "takes nothing",
        lambda honest: lambda root, at, mask: root.read(at))  # fmt: skip
without("6.8 roots of a nested guest", "tdp_log.log_bit", "trusts D in every root",
        lambda honest: lambda mmu, root, *, wrprot: mmu.fmt.writable if wrprot else mmu.fmt.dirty)  # fmt: skip
without("6.8 roots of a nested guest", "roots.Role.ad_type", "does not ask whether a nested guest runs",
        lambda honest: lambda role, pml: honest(replace(role, guest_mode=False), pml))  # fmt: skip


@without("6.8 only leaves are re-armed", "tdp_log.clear_dirty_range", "re-arms tables, too")
def _(honest: Any) -> Any:
    def clear(mmu: Any, root: Any, start: int, end: int) -> bool:
        bit = tdp_log.log_bit(mmu, root, wrprot=False)
        for it in for_each_tdp_pte(root, start, end):
            if mmu.fmt.is_present(it.old_spte):
                root.write(it.at, it.old_spte & ~bit & ~(0 if it.is_leaf else mmu.fmt.writable))
        return True

    return clear


inside("6.8 only leaves are re-armed", "mmu.Mmu.enable_log_dirty_pt_masked", "takes the end for the last page",
       "tdp_ops.TdpMmu.split_slot",
       lambda honest: lambda tdp, slot, start, end: honest(tdp, slot, start, max(end - 1, start)))  # fmt: skip


@without("6.9 roots are zapped", "zap.zap_root", "takes the tree from the top")
def _(honest: Any) -> Any:
    def zap(mmu: Any, root: Any) -> None:
        with mmu.rcu.read():
            for it in for_each_tdp_pte(root, 0, 1 << 9 * root.level, root.level):
                if mmu.fmt.is_present(it.old_spte):
                    assert changed_spte.set_spte_atomic(mmu, it, mmu.fmt.nonpresent)

    return zap


without("6.10 non-present is bit 63", "spte.spte_format", "is 0, as before",
        lambda honest: lambda *args, **more: replace(honest(*args, **more), nonpresent=0))  # fmt: skip
column("6.10 no changed_pte", "mmu.Mmu.change_pte", "changed_pte", True, "is called as ever")
column("6.2 what an instruction fetch", "levels.disallowed_hugepage_adjust", "nx_tags_all", False, "knows of none")
column("6.11 eager splitting lets", "tdp_log.split_range", "split_drops_lock", False, "holds on to it")
without("6.11 eager splitting lets", "tdp_iter.let_others_run", "holds on to it while it allocates",
        lambda _: lambda mmu, it: mmu.sched.resched() or setattr(it, "yielded", True))  # fmt: skip
column("6.12 RET_PF_WRITE_PROTECTED", "page_fault.direct_page_fault", "write_protected", False, "says EMULATE")
without("6.12 deleting a slot may", "mmu.Mmu.zap_slot", "zaps the whole VM",
        lambda honest: lambda mmu, slot: mmu.zap_all_fast())  # fmt: skip
column("6.13 huge pages are rebuilt", "tdp_log.recover_huge_pages", "disable", "zap-tables", "zaps, with many flushes")


@without("6.13 huge pages are rebuilt", "collapse.collapse_slot", "flushes when the tables have been freed")
def _(honest: Any) -> Any:
    def collapse(mmu: Any, root: Any, slot: Any) -> None:
        late, flush = [], mmu.vm.flush_remote_tlbs_memslot
        mmu.vm.flush_remote_tlbs_memslot = late.append
        honest(mmu, root, slot)
        mmu.vm.flush_remote_tlbs_memslot = flush
        for one in late:
            flush(one)

    return collapse


without("6.13 huge pages are rebuilt", "tdp_log.recover_huge_pages", "does not flush", lambda honest: unflushed(honest))
without("6.13 A and D exist", "spte.SpteFormat.is_accessed", "asks whether the SPTE is access-tracked",
        lambda honest: lambda fmt, spte: honest(replace(fmt, software_ad=False), spte))  # fmt: skip
without("6.13 A and D exist", "make_spte.restore_acc_track", "does not set A",
        lambda honest: lambda fmt, spte: honest(replace(fmt, software_ad=False), spte))  # fmt: skip
without("6.14 aging takes no", "mmu_state.MmuState.aging_lock", "is mmu_lock for read",
        lambda honest: lambda mmu: mmu.lock.read())  # fmt: skip
without("6.14 the PML buffer", "pml.PmlBuffer.pending", "is read newest first",
        lambda honest: lambda pml: sorted(honest(pml), reverse=True))  # fmt: skip


without("6.15 spurious is checked", "tdp_mmu.map_target_level", "makes the SPTE anew for a prefetch",
        told("prefetch", False, at=1))  # fmt: skip
column("6.18 NX recovery", "nx_recovery.recover_nx_huge_pages", "nx_read_lock", False, "holds the lock for write")
