"""How large a mapping may be: the host's page size, the slot's alignment, logging, and the NX huge-page workaround.

Source: Linux 6.13, arch/x86/kvm/mmu/mmu.c (kvm_mmu_max_mapping_level, kvm_mmu_hugepage_adjust,
disallowed_hugepage_adjust).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.roots import Root
from migsim.kvm.spte import MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, gfn_round
from migsim.units import pages_per_level


@dataclass(slots=True)
class PageFault:
    """One fault on its way (struct kvm_page_fault). Levels 1..3; `pfn` and `host_writable` are set by faultin_pfn.

    `present`: the hardware found a translation but it did not allow the access. `req_level`: what the mapping could
    be; `goal_level`: what it will be. `huge_page_disallowed`: an instruction fetch under the NX workaround.
    """

    vcpu: Any
    gpa: int
    gfn: int
    write: bool
    exec: bool
    prefetch: bool = False
    present: bool = False
    rsvd: bool = False
    nx_workaround: bool = False
    huge_page_disallowed: bool = False
    max_level: int = MAX_HUGEPAGE_LEVEL
    req_level: int = PG_LEVEL_4K
    goal_level: int = PG_LEVEL_4K
    slot: Memslot | None = None
    pfn: int = 0
    host_writable: bool = False
    invalidate_seq: int = 0


def max_mapping_level(mmu: MmuState, slot: Memslot, gfn: int, max_level: int = MAX_HUGEPAGE_LEVEL) -> int:
    """The largest level gfn may be mapped at, logging apart: slot limits first, then the host's page size."""
    for level in range(max_level, PG_LEVEL_4K, -1):
        if not slot.arch.disallow_lpage(gfn, level):
            return min(level, mmu.vm.host.level(slot.hva(gfn)))
    return PG_LEVEL_4K


def hugepage_adjust(mmu: MmuState, fault: PageFault) -> None:
    """Choose goal_level and align the frame to it. A logged slot is mapped at 4K, one bit a page."""
    fault.huge_page_disallowed = fault.exec and fault.nx_workaround
    slot = fault.slot
    if fault.max_level == PG_LEVEL_4K or slot is None or slot.logging:
        return
    fault.req_level = max_mapping_level(mmu, slot, fault.gfn, fault.max_level)
    if fault.req_level == PG_LEVEL_4K or fault.huge_page_disallowed:
        return
    fault.goal_level = fault.req_level
    fault.pfn = gfn_round(fault.pfn, fault.goal_level)


def disallowed_hugepage_adjust(mmu: MmuState, root: Root, fault: PageFault, spte: int, level: int) -> None:
    """Do not map huge over a table that is kept small for NX: go one level down instead (patch 9)."""
    fmt = mmu.fmt
    if level != fault.goal_level or level == PG_LEVEL_4K or not fmt.is_present(spte) or fmt.is_leaf(spte, level):
        return
    if fmt.pfn(spte) not in root.nx_disallowed:
        return
    fault.pfn |= fault.gfn & (pages_per_level(level) - pages_per_level(level - 1))
    fault.goal_level -= 1
