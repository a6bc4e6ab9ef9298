"""The one choke point for SPTE changes of the TDP MMU (patch 5): accounting, legality, removal of tables.

Every setter below installs a value and then calls handle_changed_spte, which keeps pages_4k/2m/1g and the NX list
right and takes apart the tables that hung below. Source: Linux 6.13 and 5.10, arch/x86/kvm/mmu/tdp_mmu.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from migsim.kvm.mmu_state import MmuState
from migsim.kvm.page_state import lost_page_state
from migsim.kvm.paging import Sptep, huge_leafs, present_entries
from migsim.kvm.plane_ranges import erase_range
from migsim.kvm.roots import Root
from migsim.kvm.spte import ENTRIES, PG_LEVEL_4K
from migsim.kvm.tdp_iter import TdpIter
from migsim.units import pages_per_level


def handle_changed_spte(
    mmu: MmuState, root: Root, gfn: int, old: int, new: int, level: int, *, shared: bool, aging: bool = False
) -> None:
    """Bookkeeping for `old` -> `new` at gfn and level, after the store. Raises AssertionError where KVM would BUG."""
    fmt = mmu.fmt
    where = f"SPTE {old:#018x} -> {new:#018x} gfn {gfn:#x} level {level}"
    assert PG_LEVEL_4K <= level <= root.level, f"{where}: level out of range"
    assert gfn % pages_per_level(level) == 0, f"{where}: gfn not aligned to the level"
    was_present, is_present = fmt.is_present(old), fmt.is_present(new)
    was_leaf = was_present and fmt.is_leaf(old, level)
    is_leaf = is_present and fmt.is_leaf(new, level)
    if was_leaf and is_leaf:
        assert fmt.pfn(old) == fmt.pfn(new), f"{where}: a present leaf changes its frame without being zapped first"
    if old == new:
        return
    mmu.vm.trace("kvm_tdp_mmu_spte_changed", as_id=root.as_id, gfn=gfn, level=level, old_spte=old, new_spte=new)
    if is_leaf:
        fmt.validate_leaf(new, gfn, level)
    if was_leaf != is_leaf:
        mmu.stats.update_page_stats(level, 1 if is_leaf else -1)
    lost_page_state(mmu, old, new, level, aging=aging)
    if not was_present and not is_present:
        special = (fmt.is_mmio(old), fmt.is_mmio(new), fmt.is_frozen(new))
        assert any(special), f"{where}: non-present to non-present, neither MMIO nor to be frozen"
        return
    if was_present and not was_leaf and (is_leaf or not is_present or fmt.pfn(old) != fmt.pfn(new)):
        handle_removed_pt(mmu, root, fmt.pfn(old), shared=shared)
    if not mmu.vintage.marks_before_install:
        _changed_dirty_log(mmu, root, gfn, old, new, level)


def _changed_dirty_log(mmu: MmuState, root: Root, gfn: int, old: int, new: int, level: int) -> None:
    """5.10 marks pages here: a 4K SPTE became writable, or a writable one got another frame."""
    fmt = mmu.fmt
    if level > PG_LEVEL_4K or not fmt.is_present(new) or not fmt.is_writable(new):
        return
    if fmt.is_present(old) and fmt.is_writable(old) and fmt.pfn(old) == fmt.pfn(new):
        return
    slot = mmu.vm.gfn_to_slot(root.as_id, gfn)
    if slot is not None:
        mmu.vm.mark_page_dirty_in_slot(slot, gfn, None)


def handle_removed_pt(mmu: MmuState, root: Root, table_pfn: int, *, shared: bool) -> None:
    """Take an unlinked table apart: untrack, empty its entries (recursively), free the page once no reader is left.

    Entries become FROZEN before anything else happens to them, so that a walker still inside cannot install into a
    dead table; under the exclusive lock only those that are present. The caller flushes.
    """
    if mmu.at_once:
        remove_at_once(mmu, root, table_pfn)
        return
    level = root.level_of(table_pfn)
    mmu.vm.trace("kvm_mmu_prepare_zap_page", gfn=root.gfn_of(Sptep(table_pfn, 0)), level=level)
    unlist_table(mmu, root, table_pfn)
    held = [root.read(Sptep(table_pfn, entry)) for entry in range(ENTRIES)]
    if level == PG_LEVEL_4K:
        root.dying.add(table_pfn)  # a level-1 table freezes as a whole: from here on every entry of it reads FROZEN
    for entry, old in enumerate(held):
        at = Sptep(table_pfn, entry)
        present = mmu.fmt.is_present(old)
        if level == PG_LEVEL_4K and (present or mmu.fmt.is_mmio(old)):
            root.write(at, mmu.fmt.nonpresent)
        elif level > PG_LEVEL_4K and (present or shared):
            root.write(at, mmu.fmt.frozen)
        if (present or shared) and old != mmu.fmt.frozen:  # an MMIO SPTE just goes with its table
            handle_changed_spte(mmu, root, root.gfn_of(at), old, mmu.fmt.frozen, level, shared=shared)
    mmu.rcu.call(lambda: root.free_table(table_pfn))


def remove_at_once(mmu: MmuState, root: Root, table_pfn: int) -> None:
    """The same for a whole tree of tables: rows are counted, planes erased, all pages freed by one RCU callback."""
    first = root.gfn_of(Sptep(table_pfn, 0))
    end = first + ENTRIES * pages_per_level(root.level_of(table_pfn))
    tables = list(_empty_rows(mmu, root, table_pfn, mmu.fmt.frozen))
    root.dying.update(table for table in tables if root.level_of(table) == PG_LEVEL_4K)
    for planes, at, count in root.planes_in(first, end):
        mmu.stats.update_page_stats(PG_LEVEL_4K, -erase_range(planes, at, count))
    for gfn in [gfn for gfn in root.mmio if first <= gfn < end]:
        del root.mmio[gfn]
    if root.nx_disallowed:
        for table in tables:
            untrack_nx(mmu, root, table)

    def free() -> None:
        for table in tables:
            root.free_table(table)

    mmu.rcu.call(free)


def _empty_rows(mmu: MmuState, root: Root, table_pfn: int, value: int) -> Iterator[int]:
    """Set every entry of a table and of those below to `value`, counting huge leaves; yields the tables' frames."""
    yield table_pfn
    level = root.level_of(table_pfn)
    if level == PG_LEVEL_4K:
        return
    row = root.tables[root.table_row(table_pfn)]
    present, huge = present_entries(mmu.fmt, row), huge_leafs(mmu.fmt, row)
    if huge.any():
        mmu.stats.update_page_stats(level, -int(huge.sum()))
    children = [mmu.fmt.pfn(spte) for spte in row[present & ~huge].tolist()]
    row[:] = value
    for child in children:
        yield from _empty_rows(mmu, root, child, value)


def unlist_table(mmu: MmuState, root: Root, table_pfn: int) -> None:
    """The table leaves the VM's lists (tdp_mmu_unlink_sp): tdp_mmu_pages_lock is taken only if it is on one."""
    if mmu.vintage.pages_list or table_pfn in root.nx_disallowed:
        with mmu.tdp_mmu_pages_lock:
            untrack_nx(mmu, root, table_pfn)


def untrack_nx(mmu: MmuState, root: Root, table_pfn: int) -> None:
    """The table is no longer kept small for NX (untrack_possible_nx_huge_page)."""
    root.nx_disallowed.discard(table_pfn)
    if mmu.nx.discard(root, table_pfn):
        mmu.stats.add("nx_lpage_splits", -1)


# -- setters: atomic under the read lock, plain under the write lock -----------------------------------------------


def set_spte_atomic(
    mmu: MmuState, it: TdpIter, new: int, *, aging: bool = False, publish: Callable[[], None] | None = None
) -> bool:
    """Compare-exchange the iterator's entry; on failure nothing happened and old_spte holds the value now there.

    `publish` fills the table that `new` points to: in the same step, before the pointer is stored. `aging`: made old,
    in recent kernels under RCU alone.
    """
    assert not mmu.fmt.is_frozen(it.old_spte), f"frozen SPTE at gfn {it.gfn:#x} level {it.level} is not ours to change"
    assert not it.yielded, f"SPTE at gfn {it.gfn:#x} level {it.level} changed after a yield: its table may be gone"
    assert_protected(mmu, it.gfn, lockless=aging and mmu.vintage.lockless_aging)
    mmu.vm.meter.count("spte_cmpxchg")
    if not it.root.cmpxchg(it.at, it.old_spte, new, publish):
        mmu.vm.meter.count("spte_cmpxchg_failed")
        it.old_spte = it.root.read(it.at)
        return False
    handle_changed_spte(mmu, it.root, it.gfn, it.old_spte, new, it.level, shared=not mmu.lock.writer, aging=aging)
    it.old_spte = new
    return True


def set_spte(mmu: MmuState, it: TdpIter, new: int) -> None:
    """Store to the iterator's entry under the write lock.

    A volatile SPTE is exchanged, so that bits the CPU or the fast path set since it was read are not lost; any other is
    what it was when it was read (kvm_tdp_mmu_write_spte).
    """
    where = f"SPTE at gfn {it.gfn:#x} level {it.level}"
    assert mmu.lock.writer, f"{where} written without the exclusive mmu_lock"
    assert not mmu.fmt.is_frozen(it.old_spte) and not mmu.fmt.is_frozen(new), f"{where} frozen under the exclusive lock"
    assert not it.yielded, f"{where} changed after a yield: its table may be gone"
    assert_protected(mmu, it.gfn)
    old = it.old_spte
    held = it.root.write(it.at, new)
    if mmu.fmt.is_volatile(old, it.level, by_accessed=mmu.vintage.pushes_page_state):
        old = held
    handle_changed_spte(mmu, it.root, it.gfn, old, new, it.level, shared=False)
    it.old_spte = new


def clear_spte_bits(mmu: MmuState, it: TdpIter, mask: int, *, lockless: bool = False) -> None:
    """Locked AND: take W, D or A away whatever else the CPU does meanwhile (Linux 6.4)."""
    assert_protected(mmu, it.gfn, lockless=lockless)
    old = it.root.clear_bits(it.at, mask)
    it.old_spte = old & ~mask
    lost_page_state(mmu, old, it.old_spte, it.level, aging=True)  # only D and W are of interest here
    mmu.vm.trace(
        "kvm_tdp_mmu_spte_changed",
        as_id=it.root.as_id, gfn=it.gfn, level=it.level, old_spte=old, new_spte=it.old_spte,
    )  # fmt: skip


def zap_spte_atomic(mmu: MmuState, it: TdpIter) -> bool:
    """Zap under the read lock: FROZEN first, then flush, and only then non-present, so nobody maps in between."""
    old = it.old_spte
    assert not mmu.fmt.is_frozen(old), f"frozen SPTE at gfn {it.gfn:#x} level {it.level} zapped twice"
    assert_protected(mmu, it.gfn)
    if not it.root.cmpxchg(it.at, old, mmu.fmt.frozen):
        it.old_spte = it.root.read(it.at)
        return False
    mmu.flush_gfn(it.root, it.gfn, pages_per_level(it.level))
    it.root.write(it.at, mmu.fmt.nonpresent)
    it.old_spte = mmu.fmt.nonpresent
    handle_changed_spte(mmu, it.root, it.gfn, old, mmu.fmt.nonpresent, it.level, shared=not mmu.lock.writer)
    return True


def assert_protected(mmu: MmuState, gfn: int, *, lockless: bool = False) -> None:
    """RCU keeps the table alive and mmu_lock keeps the change legal: both are needed.

    `lockless`: RCU alone, for the fast page fault and (Linux 6.14) aging, which only change bits of a live leaf.
    """
    assert mmu.rcu.depth, f"SPTE of gfn {gfn:#x} changed outside an RCU read section"
    assert lockless or mmu.lock.held, f"SPTE of gfn {gfn:#x} changed without mmu_lock"
