"""The TDP MMU's fault side (patch 10): walk down, allocate or split, install the leaf.

Many vCPUs do this at once under the read lock, which is the point of it all: the compare-exchange decides, whoever
loses retries. Source: Linux 6.13 and 5.10, arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

import enum

from migsim.kvm.changed_spte import set_spte_atomic
from migsim.kvm.levels import PageFault, disallowed_hugepage_adjust
from migsim.kvm.make_spte import make_nonleaf_spte, make_split_spte, make_spte
from migsim.kvm.mmio import make_mmio_spte, mmio_generation
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep
from migsim.kvm.roots import Root
from migsim.kvm.spte import ACC_ALL, ENTRIES, PG_LEVEL_4K
from migsim.kvm.tdp_iter import TdpIter, for_each_tdp_pte
from migsim.units import pages_per_level


class RetPf(enum.IntEnum):
    """What a fault handler returns (Linux 6.12 numbering). CONTINUE and INVALID never leave the handler."""

    CONTINUE = 0
    RETRY = 1
    EMULATE = 2
    WRITE_PROTECTED = 3
    INVALID = 4
    FIXED = 5
    SPURIOUS = 6


def tdp_mmu_map(mmu: MmuState, root: Root, fault: PageFault) -> RetPf:
    """Install the mapping a fault asked for; RETRY if somebody else changed the path meanwhile."""
    trace_spte_requested(mmu, fault)
    with mmu.rcu.read():
        for it in for_each_tdp_pte(root, fault.gfn, fault.gfn + 1):
            if fault.nx_workaround:
                disallowed_hugepage_adjust(mmu, root, fault, it.old_spte, it.level)
            if mmu.fmt.is_frozen(it.old_spte):
                return RetPf.RETRY
            if it.level == fault.goal_level:
                return map_target_level(mmu, fault, it)
            if mmu.fmt.is_present(it.old_spte) and not it.is_leaf:
                continue
            if not _make_way(mmu, fault, it):
                return RetPf.RETRY
    return RetPf.RETRY


def _make_way(mmu: MmuState, fault: PageFault, it: TdpIter) -> bool:
    """Put a table below the iterator's entry: split the huge page that is there, or link an empty one."""
    if it.is_leaf and not mmu.vintage.splits_on_fault:
        # 5.10: zap the huge page and flush before its range is handed out again; its other 511 pages fault again.
        if not set_spte_atomic(mmu, it, mmu.fmt.nonpresent):
            return False
        mmu.flush_gfn(it.root, it.gfn, pages_per_level(it.level))
    if it.is_leaf:
        linked = split_huge_page(mmu, it)
    else:
        linked = link_table(mmu, it)
    if linked and fault.huge_page_disallowed:
        _keep_small(mmu, fault, it)
    return linked


def _keep_small(mmu: MmuState, fault: PageFault, it: TdpIter) -> None:
    """Tag a table made for an instruction fetch; list it for recovery if a huge page could be there instead."""
    possible, table = fault.req_level >= it.level, mmu.fmt.pfn(it.old_spte)
    if possible or mmu.vintage.nx_tags_all:
        it.root.nx_disallowed.add(table)
    if possible:
        with mmu.tdp_mmu_pages_lock:
            mmu.nx.add(it.root, table)
            mmu.stats.add("nx_lpage_splits")


def link_table(mmu: MmuState, it: TdpIter) -> bool:
    """Link an empty table below a non-present entry; on a lost race the table is freed again."""
    root = it.root
    table = root.alloc_table(it.level - 1, it.gfn)
    mmu.vm.meter.count("table_alloc")
    if set_spte_atomic(mmu, it, make_nonleaf_spte(mmu.fmt, table, root.ad_type)):
        list_table(mmu, root, table, it.gfn)
        return True
    root.free_table(table)
    return False


def list_table(mmu: MmuState, root: Root, table: int, gfn: int) -> None:
    """A table has been linked: it goes on the VM's list, as long as there was one (until Linux 6.1)."""
    mmu.vm.trace("kvm_mmu_get_page", gfn=gfn, level=root.level_of(table), created=True)
    if mmu.vintage.pages_list:
        with mmu.tdp_mmu_pages_lock:
            pass


def split_huge_page(mmu: MmuState, it: TdpIter) -> bool:
    """Replace a huge leaf by a table of 512 leaves with the same frames, permissions, W and D. Needs no TLB flush.

    The table is filled before it is linked, so no walker can see it without its children (`publish`: those of a 2M
    page lie in planes that the table owns only from the moment it is linked).
    """
    root, huge, level = it.root, it.old_spte, it.level
    table = root.alloc_table(level - 1, it.gfn)

    def fill() -> None:
        for entry in range(ENTRIES):
            child = make_split_spte(mmu.fmt, huge, level, entry, nx_huge_pages=mmu.nx_huge_pages)
            root.write(Sptep(table, entry), child)

    if not set_spte_atomic(mmu, it, make_nonleaf_spte(mmu.fmt, table, root.ad_type), publish=fill):
        root.free_table(table)
        return False
    list_table(mmu, root, table, it.gfn)
    mmu.vm.trace("kvm_mmu_split_huge_page", gfn=it.gfn, spte=huge, level=level, errno=0)
    mmu.vm.meter.count("huge_page_split")
    mmu.stats.update_page_stats(level - 1, ENTRIES)
    return True


def map_target_level(mmu: MmuState, fault: PageFault, it: TdpIter) -> RetPf:
    """Install the leaf (or the MMIO SPTE) at the level chosen (tdp_mmu_map_handle_target_level)."""
    fmt, slot, old = mmu.fmt, fault.slot, it.old_spte
    allowed = it.is_leaf and fmt.allows(old, write=fault.write, exec=fault.exec)
    if it.is_leaf and (fault.prefetch or allowed):
        return RetPf.SPURIOUS
    wrprot = False
    if slot is None:
        generation = mmu.vm.memslots(it.root.as_id).generation
        new = make_mmio_spte(fmt, generation=generation, gfn=fault.gfn)
    else:
        new, wrprot = make_fault_spte(mmu, it.root, fault, it.level, old)
        if mmu.vintage.marks_before_install:  # a lost race then leaves one page too many in the log, never one too few
            mark_made_writable(mmu, fault, new, it.level)
    result = RetPf.FIXED
    if new == old:
        result = RetPf.SPURIOUS
    elif not set_spte_atomic(mmu, it, new):
        return RetPf.RETRY
    elif fmt.is_present(old) and _needs_flush(mmu, old, new, it.level):
        mmu.flush_gfn(it.root, it.gfn, pages_per_level(it.level))
    # What is to be emulated is so whether or not anything changed: else the vCPU would fault for ever.
    if wrprot and fault.write:
        result = RetPf.WRITE_PROTECTED if mmu.vintage.write_protected else RetPf.EMULATE
    if slot is None:
        mmu.stats.count_vcpu(fault.vcpu.id, "pf_mmio_spte_created")
        trace_mmio_spte(mmu, it.at.table_pfn, fault.gfn, new)
        return RetPf.EMULATE
    trace_set_spte(mmu, it.gfn, new, it.level)
    return result


def _needs_flush(mmu: MmuState, old: int, new: int, level: int) -> bool:
    """Replacing a table, or taking MMU-writable from a leaf, leaves translations behind that must go now."""
    if not mmu.fmt.is_leaf(old, level):
        return True
    return mmu.fmt.is_mmu_writable(old) and not mmu.fmt.is_mmu_writable(new)


def make_fault_spte(mmu: MmuState, root: Root, fault: PageFault, level: int, old: int) -> tuple[int, bool]:
    """make_spte with a fault's inputs: (SPTE, wrprot). What has W already has asked the shadow pages before."""
    assert fault.slot is not None
    fmt = mmu.fmt
    had_w = fmt.is_present(old) and fmt.is_leaf(old, level) and fmt.is_writable(old)
    asks = fault.host_writable and not had_w
    made = make_spte(
        mmu.fmt,
        gfn=fault.gfn & -pages_per_level(level),
        pfn=fault.pfn,
        level=level,
        access=ACC_ALL,
        host_writable=fault.host_writable,
        ad_type=root.ad_type,
        prefetch=fault.prefetch,
        write_tracked=asks and mmu.refuses_write(fault.slot, fault.gfn, prefetch=fault.prefetch),
        nx_huge_pages=mmu.nx_huge_pages,
    )
    return made.spte, made.wrprot


def mark_made_writable(mmu: MmuState, fault: PageFault, spte: int, level: int) -> None:
    """A leaf with W is about to be installed in a logged slot: the page counts as dirty from now on."""
    slot = fault.slot
    if slot is None or not slot.logging or not mmu.fmt.is_writable(spte):
        return
    assert level == PG_LEVEL_4K, f"SPTE {spte:#018x} gfn {fault.gfn:#x} level {level}: huge and writable while logging"
    mmu.vm.mark_page_dirty_in_slot(slot, fault.gfn, fault.vcpu)


def trace_spte_requested(mmu: MmuState, fault: PageFault) -> None:
    """Tracepoint kvm_mmu_spte_requested: the frame of the very page, whatever the level."""
    pfn = fault.pfn | fault.gfn & pages_per_level(fault.goal_level) - 1
    mmu.vm.trace("kvm_mmu_spte_requested", gfn=fault.gfn, pfn=pfn, level=fault.goal_level)


def trace_mmio_spte(mmu: MmuState, table_pfn: int, gfn: int, spte: int) -> None:
    """Tracepoint mark_mmio_spte: `access` is the SPTE's lowest three bits, which EPT uses to misconfigure it."""
    generation = mmio_generation(mmu.fmt, spte)
    mmu.vm.trace("mark_mmio_spte", sptep=table_pfn, gfn=gfn, access=spte & ACC_ALL, gen=generation)


def trace_set_spte(mmu: MmuState, gfn: int, spte: int, level: int) -> None:
    """Tracepoint kvm_mmu_set_spte."""
    fmt = mmu.fmt
    mmu.vm.trace(
        "kvm_mmu_set_spte",
        gfn=gfn, spte=spte, level=level, r=bool(spte & 1), w=fmt.is_writable(spte), x=fmt.is_executable(spte),
        u=not fmt.user or bool(spte & fmt.user),
    )  # fmt: skip
