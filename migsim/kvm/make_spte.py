"""Pure functions that compute SPTE values; installing one is somebody else's step (patches 1 and 8 of the series).

Both MMUs share them. Source: Linux 6.13 and 5.10, arch/x86/kvm/mmu/spte.c.
"""

from __future__ import annotations

from typing import NamedTuple

from migsim.kvm.spte import (
    ACC_EXEC,
    ACC_TRACK_SAVED_MASK,
    ACC_TRACK_SAVED_SHIFT,
    ACC_USER,
    ACC_WRITE,
    AD_TYPE_SHIFT,
    PAGE_SIZE_BIT,
    PFN_MASK,
    PG_LEVEL_4K,
    U64,
    AdType,
    SpteFormat,
)
from migsim.units import PAGE_SHIFT, pages_per_level


class MadeSpte(NamedTuple):
    """What make_spte computed; `wrprot`: write access was asked for and refused because the gfn is write-tracked."""

    spte: int
    wrprot: bool


def make_spte(
    fmt: SpteFormat,
    *,
    gfn: int,
    pfn: int,
    level: int,
    access: int,
    host_writable: bool,
    ad_type: AdType = AdType.ENABLED,
    prefetch: bool = False,
    synchronizing: bool = False,
    write_tracked: bool = False,
    nx_huge_pages: bool = False,
) -> MadeSpte:
    """The leaf SPTE that maps `gfn` to `pfn` at `level` with `access` (ACC_* bits).

    W comes with MMU-writable and with D, so that the CPU logs no PML entry for a page marked at this very moment;
    a read fault on a host-writable page therefore installs W and reports the page (over-reporting is legal).
    `write_tracked`: somebody shadows gfn and may not go out of step (unsync.py). `synchronizing`: a present SPTE gets
    other rights, so it stays young.
    """
    spte = fmt.mmu_present | ad_type << AD_TYPE_SHIFT | fmt.present | fmt.memtype | pfn << PAGE_SHIFT
    if (not prefetch or synchronizing) and (fmt.software_ad or ad_type != AdType.DISABLED):
        spte |= fmt.accessed
    if level > PG_LEVEL_4K:
        spte |= PAGE_SIZE_BIT
        if nx_huge_pages:
            access &= ~ACC_EXEC
    spte |= fmt.exec if access & ACC_EXEC else fmt.nx
    if access & ACC_USER:
        spte |= fmt.user
    if host_writable:
        spte |= fmt.host_writable
    else:
        access &= ~ACC_WRITE
    wrprot = bool(access & ACC_WRITE) and write_tracked
    if access & ACC_WRITE and not wrprot:
        spte |= fmt.writable | fmt.mmu_writable
        if fmt.software_ad or ad_type != AdType.DISABLED:
            spte |= fmt.dirty
    if prefetch and not synchronizing:  # nobody has touched it: the first access must show, by A or by a fault
        spte = mark_for_access_track(fmt, spte)
    fmt.validate_leaf(spte, gfn, level)
    return MadeSpte(spte, wrprot)


def make_nonleaf_spte(fmt: SpteFormat, child_pfn: int, ad_type: AdType = AdType.ENABLED) -> int:
    """The SPTE that points to the table page `child_pfn`: everything allowed, A set or tagged as having no A/D."""
    spte = fmt.mmu_present | child_pfn << PAGE_SHIFT | fmt.present | fmt.writable | fmt.user | fmt.exec
    if ad_type == AdType.DISABLED:
        return spte | AdType.DISABLED << AD_TYPE_SHIFT
    return spte | fmt.accessed


def make_split_spte(fmt: SpteFormat, huge: int, level: int, index: int, *, nx_huge_pages: bool) -> int:
    """Child `index` (0..511) of a huge SPTE at `level`: same translation and permissions, W and D copied.

    A 4K child becomes executable where only the NX huge-page workaround had taken that away.
    """
    child_level = level - 1
    child = huge + (index * pages_per_level(child_level) << PAGE_SHIFT)
    if child_level == PG_LEVEL_4K:
        child &= ~PAGE_SIZE_BIT
        if nx_huge_pages:
            child = make_executable(fmt, child)
    return child


def make_huge_spte(fmt: SpteFormat, small: int, level: int, *, nx_huge_pages: bool) -> int:
    """The huge leaf at `level` that takes over from a table one of whose present leaves is `small` (Linux 6.13)."""
    huge = small | PAGE_SIZE_BIT
    huge &= ~(((pages_per_level(level) - 1) << PAGE_SHIFT) & PFN_MASK)
    return make_nonexecutable(fmt, huge) if nx_huge_pages else huge


def make_executable(fmt: SpteFormat, spte: int) -> int:
    """`spte` with execution allowed (in the saved field while access-tracked)."""
    if fmt.is_access_tracked(spte):
        return spte | fmt.exec << ACC_TRACK_SAVED_SHIFT
    return (spte | fmt.exec) & ~fmt.nx


def make_nonexecutable(fmt: SpteFormat, spte: int) -> int:
    """`spte` with execution refused."""
    return (spte & ~fmt.exec & ~(fmt.exec << ACC_TRACK_SAVED_SHIFT)) | fmt.nx


def mark_for_access_track(fmt: SpteFormat, spte: int) -> int:
    """`spte` made old: A cleared, or without A/D bits R, W and X removed with R and X saved in bits 54 and 56."""
    if fmt.ad_enabled(spte):
        return spte & ~fmt.accessed
    if fmt.is_access_tracked(spte):
        return spte
    assert not spte & ACC_TRACK_SAVED_MASK, f"SPTE {spte:#018x}: saved access bits are not zero before tracking"
    spte |= (spte & ACC_TRACK_SAVED_MASK >> ACC_TRACK_SAVED_SHIFT) << ACC_TRACK_SAVED_SHIFT
    return spte & ~(fmt.acc_track | fmt.accessed)


def restore_acc_track(fmt: SpteFormat, spte: int) -> int:
    """Saved R and X moved back, the saved field cleared, A set where it is kept in software; W stays away."""
    if not fmt.is_access_tracked(spte):
        return spte
    saved = spte >> ACC_TRACK_SAVED_SHIFT & (ACC_TRACK_SAVED_MASK >> ACC_TRACK_SAVED_SHIFT)
    restored = spte & ~(fmt.acc_track | ACC_TRACK_SAVED_MASK) & U64 | saved
    return restored | fmt.accessed if fmt.software_ad else restored


def change_pfn(fmt: SpteFormat, spte: int, pfn: int) -> int:
    """`spte` pointing to another, read-only page (changed_pte notifier): W, Host- and MMU-writable gone, made old."""
    spte = spte & ~PFN_MASK | pfn << PAGE_SHIFT
    spte &= ~(fmt.writable | fmt.host_writable | fmt.mmu_writable)
    return mark_for_access_track(fmt, spte)
