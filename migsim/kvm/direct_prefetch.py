"""What the shadow MMU maps unasked around a 4K fault of a direct root: the aligned group of 8 pages, old.

Source: Linux 6.18, arch/x86/kvm/mmu/mmu.c (direct_pte_prefetch, kvm_mmu_prefetch_sptes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from migsim.kvm.host_mm import HostPage
from migsim.kvm.levels import PageFault
from migsim.kvm.make_spte import make_spte
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.page_state import mapped_page
from migsim.kvm.rmap import RmapEntry
from migsim.kvm.roots import Root
from migsim.kvm.spte import ACC_ALL, ENTRIES, PG_LEVEL_4K

PTE_PREFETCH: Final = 8

Install = Callable[[RmapEntry, int, int, int], None]  # (where, gfn, level, SPTE)


def prefetch(mmu: MmuState, root: Root, fault: PageFault, install: Install) -> None:
    """Run by run of pages that are not mapped, until a run cannot be.

    One cannot that leaves the slot, or whose first page the host has not there for writing. Not without A bits (a
    prefetched page could not be told from a used one), not in a logged slot, not while a notifier runs.
    """
    if not mmu.ad_enabled or mmu.invalidate.in_progress:
        return
    first = fault.gfn & -PTE_PREFETCH
    missing = [gfn for gfn in range(first, first + PTE_PREFETCH) if gfn != fault.gfn and _missing(mmu, root, gfn)]
    for start, count in runs(missing):
        if not _prefetch_run(mmu, root, start, count, install):
            return


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers, which are in order."""
    while numbers:
        count = next((i for i in range(1, len(numbers)) if numbers[i] != numbers[0] + i), len(numbers))
        yield numbers[0], count
        numbers = numbers[count:]


def _missing(mmu: MmuState, root: Root, gfn: int) -> bool:
    spte, level = root.lookup(gfn)
    return level == PG_LEVEL_4K and not mmu.fmt.is_present(spte)


def _prefetch_run(mmu: MmuState, root: Root, first: int, count: int, install: Install) -> bool:
    """As many of a run's pages as the host has writable; False if there is none."""
    slot = mmu.vm.gfn_to_slot(root.as_id, first)
    if slot is None or slot.invalid or slot.logging or slot.readonly or first + count > slot.end_gfn:
        return False
    for gfn in range(first, first + count):
        page = mmu.vm.host.get_user_page(slot.hva(gfn))
        if not isinstance(page, HostPage) or not page.writable:
            return gfn > first
        _prefetch_one(mmu, root, slot, gfn, page.pfn, install)
    return True


def _prefetch_one(mmu: MmuState, root: Root, slot: Memslot, gfn: int, pfn: int, install: Install) -> None:
    *_, (at, _, _) = root.walk(gfn)
    made = make_spte(
        mmu.fmt, gfn=gfn, pfn=pfn, level=PG_LEVEL_4K, access=ACC_ALL, host_writable=True, ad_type=root.ad_type,
        prefetch=True, write_tracked=mmu.refuses_write(slot, gfn, prefetch=True),
    )  # fmt: skip
    install(RmapEntry(root, at), gfn, PG_LEVEL_4K, made.spte)
    mapped_page(mmu, pfn, writable=True)  # prefetching asks for pages to write to


assert ENTRIES % PTE_PREFETCH == 0
