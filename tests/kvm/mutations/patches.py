"""The 20 patches of "Introduce the TDP MMU"."""

from __future__ import annotations

from typing import Any

from migsim.kvm import tdp_log
from migsim.kvm.spte import ENTRIES, AdType
from migsim.kvm.tdp_mmu import RetPf

from .declare import column, gone, inside, unflushed, without

without("1", "make_spte.make_spte", "gives write access to a gfn whose stores are tracked",
        lambda honest: lambda *args, write_tracked=False, **more: honest(*args, **more))  # fmt: skip
inside("1", "make_spte.make_spte", "is not what a fault installs", "tdp_mmu.make_fault_spte",
       lambda honest: lambda mmu, *args: (honest(mmu, *args)[0] & ~mmu.fmt.accessed, False))  # fmt: skip


@without("2", "tdp_iter.TdpIter.next", "goes side before it goes down")
def _(honest: Any) -> Any:
    def next_(it: Any) -> None:
        if it.level == it.root.level and it._step_side():
            return
        honest(it)

    return next_


@without("2", "tdp_iter.TdpIter.next", "steps down by the entry as it was read before")
def _(honest: Any) -> Any:
    def next_(it: Any) -> None:
        now = it.root.read(it.at)
        at = it.at
        it.root.write(at, it.old_spte)
        honest(it)
        it.root.write(at, now)

    return next_


without("2", "tdp_iter.for_each_tdp_pte", "knows no level to stop at",
        lambda honest: lambda root, start, end, min_level=1: honest(root, start, end))  # fmt: skip


@without("3", "mmu.Mmu.pre_destroy", "zaps nothing when the VM goes")
def _(honest: Any) -> Any:
    def pre_destroy(mmu: Any) -> Any:
        mmu.parts = ()
        return honest(mmu)

    return pre_destroy


gone("4", "roots.RootList.find", "makes every vCPU a root of its own")
gone("4", "roots.RootList.put", "never gives a reference back")


@without("5", "changed_spte.handle_changed_spte", "lets a leaf change its frame in place")
def _(honest: Any) -> Any:
    def handle(mmu: Any, root: Any, gfn: int, old: int, new: int, level: int, **how: bool) -> None:
        fmt = mmu.fmt
        leaves = fmt.is_present(old) and fmt.is_present(new) and fmt.is_leaf(old, level) and fmt.is_leaf(new, level)
        if not leaves or fmt.pfn(old) == fmt.pfn(new):
            honest(mmu, root, gfn, old, new, level, **how)

    return handle


@without("5", "changed_spte.handle_changed_spte", "keeps no account of leaves")
def _(honest: Any) -> Any:
    def handle(mmu: Any, *args: Any, **more: Any) -> None:
        before = {name: getattr(mmu.stats, name) for name in ("pages_4k", "pages_2m", "pages_1g")}
        honest(mmu, *args, **more)
        for name, value in before.items():
            setattr(mmu.stats, name, value)

    return handle


without("5", "changed_spte.handle_removed_pt", "forgets the tables below the one that went",
        lambda honest: lambda mmu, root, table_pfn, *, shared: mmu.rcu.call(lambda: root.free_table(table_pfn)))
without("6", "memslot.Memslot.key", "does not know its address space", lambda honest: property(lambda slot: slot.id))
inside("6", "roots.Root.as_id", "does not say which roots are the slot's", "roots.RootList.valid",
       lambda honest: lambda roots, as_id=None: honest(roots))  # fmt: skip
without("6", "roots.Root.as_id", "is 0 for every root", lambda honest: property(lambda _: 0))
gone("7", "zap.zap_leafs", "zaps nothing", answer=True)
column("7", "zap.zap_leafs", "zaps_tables", True, "zaps tables that lie in the range, too")
without("7", "zap.zap_leafs", "zaps leaves beyond the end of the range",
        lambda honest: lambda mmu, root, start, end, **more: honest(mmu, root, start, end + ENTRIES, **more))
gone("7", "zap.zap_root", "zaps nothing")
without("8", "make_spte.make_nonleaf_spte", "allows no stores below",
        lambda honest: lambda fmt, *args: honest(fmt, *args) & ~fmt.writable)  # fmt: skip
without("8", "make_spte.make_nonleaf_spte", "is not tagged where the CPU has no A and D",
        lambda honest: lambda fmt, child, ad_type=AdType.ENABLED: honest(fmt, child))  # fmt: skip
gone("9", "levels.disallowed_hugepage_adjust", "maps huge over a table that is kept small")


@without("10", "tdp_mmu.tdp_mmu_map", "does not put a table where none is")
def _(honest: Any) -> Any:
    def map_(mmu: Any, root: Any, fault: Any) -> RetPf:
        _, level = root.lookup(fault.gfn)
        return honest(mmu, root, fault) if level == fault.goal_level else RetPf.RETRY

    return map_


@without("10", "tdp_mmu.map_target_level", "does not see that another vCPU was here first")
def _(honest: Any) -> Any:
    def target(*args: Any) -> RetPf:
        result = honest(*args)
        return RetPf.FIXED if result == RetPf.SPURIOUS else result

    return target


@without("11", "paging.PagingStructure.alloc_table", "does not count the table")
def _(honest: Any) -> Any:
    def alloc(root: Any, level: int, gfn: int) -> int:
        counted = list(root.n_tables)
        pfn = honest(root, level, gfn)
        root.n_tables = counted
        return pfn

    return alloc


without("11", "paging.PagingStructure.alloc_table", "does not write down what the table maps",
        lambda honest: lambda root, level, gfn: honest(root, level, gfn if level == 1 else 0))  # fmt: skip
without("11", "paging.PagingStructure.count_tables", "counts nothing at 4K",
        lambda honest: lambda root: {level: n for level, n in honest(root).items() if level > 1})  # fmt: skip
gone("12", "notifier.gfn_ranges", "finds no slot behind the host's addresses", answer=())
without("12", "mmu.Mmu.invalidate_range_start", "does not flush", lambda honest: unflushed(honest))


@without("12", "mmu.Mmu.invalidate_range_start", "does not zap")
def _(honest: Any) -> Any:
    def start(mmu: Any, hva: int, hva_end: int) -> None:
        parts, mmu.parts = mmu.parts, ()
        honest(mmu, hva, hva_end)
        mmu.parts = parts

    return start


gone("13", "aging.age_range", "makes nothing old", answer=True)
without("13", "make_spte.mark_for_access_track", "takes nothing away where there is no A bit",
        lambda honest: lambda fmt, spte: honest(fmt, spte) if fmt.ad_enabled(spte) else spte)  # fmt: skip
without("14", "notifier.set_spte_gfn", "does not map the new frame",
        lambda honest: lambda mmu, root, gfn, pfn, *, writable: honest(mmu, root, gfn, pfn, writable=True))  # fmt: skip
without("14", "notifier.set_spte_gfn", "maps the new frame though the next store must ask the host",
        lambda honest: lambda mmu, root, gfn, pfn, *, writable: honest(mmu, root, gfn, pfn, writable=False))
without("14", "notifier.set_spte_gfn", "does not flush",
        lambda honest: lambda mmu, *args, **more: unflushed(lambda mmu: honest(mmu, *args, **more))(mmu))  # fmt: skip
gone("15", "tdp_log.wrprot_range", "protects nothing", answer=True)
gone("15", "tdp_log.clear_dirty_range", "leaves D as it was", answer=True)
gone("15", "tdp_log.clear_dirty_pt_masked", "re-arms nothing")
without("15", "tdp_log.clear_dirty_pt_masked", "re-arms the first page of the mask alone",
        lambda honest: lambda mmu, root, gfn, mask, *, wrprot: honest(mmu, root, gfn, mask & -mask, wrprot=wrprot))
gone("15", "tdp_mmu.mark_made_writable", "does not mark what a fault made writable")
gone("16", "tdp_log.recover_huge_pages", "leaves everything small")
without("16", "tdp_log.zap_collapsible_5_10", "recovers, as it was meant to",
        lambda honest: lambda mmu, root, slot: tdp_log.zap_collapsible_tables(mmu, root, slot))  # fmt: skip
without("17", "write_protect.write_protect_gfn", "takes W and leaves MMU-writable, so that it does not stick",
        lambda honest: lambda mmu, root, gfn, min_level=1: tdp_log.wrprot_range(mmu, root, gfn, gfn + 1, min_level))
without("18", "mmio.make_mmio_spte", "carries no generation",
        lambda honest: lambda fmt, *, generation, gfn, **more: honest(fmt, generation=0, gfn=gfn, **more))  # fmt: skip
gone("18", "page_fault.handle_mmio_page_fault", "handles each access in full", answer=RetPf.INVALID)


@without("19", "guest_writes.GuestWrites.track_write", "counts no stores")
def _(honest: Any) -> Any:
    def track(writes: Any, gpa: int, n_bytes: int) -> None:
        for page in writes._pages:
            page.write_flooding = 0
        honest(writes, gpa, n_bytes)

    return track


@without("19", "nested.NestedGuest.page_fault", "goes on counting though L2 uses the table")
def _(honest: Any) -> Any:
    def fault(l2: Any, *args: Any, **more: Any) -> RetPf:
        counts = {page.key: page.write_flooding for page in l2.shadow.pages}
        result = honest(l2, *args, **more)
        for page in l2.shadow.pages:
            page.write_flooding = counts.get(page.key, 0)
        return result

    return fault


gone("20", "nx_recovery.recover_nx_huge_pages", "recovers nothing", answer=0)
inside("20", "nx_recovery.recover_nx_huge_pages", "takes the newest first", "mmu_state.NxList.__iter__",
       lambda honest: lambda tables: iter(list(honest(tables))[::-1]))  # fmt: skip
inside("20", "nx_recovery.recover_nx_huge_pages", "yields unflushed", "nx_recovery._yield",
       lambda honest: lambda mmu, *, flush: honest(mmu, flush=False))  # fmt: skip
inside("20", "zap.zap_table", "does not say that a flush is due", "zap.zap_table",
       lambda honest: lambda *args: honest(*args) and False)  # fmt: skip
