"""What the meter counted, priced: the names behaviour counts under, and the operations of a host profile behind each.

Behaviour counts (`sim.meter`) and never reads a cost; this table is where the two meet. A test holds that every name
counted anywhere in migsim stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from migsim.perf.profile import HostProfile

__all__ = ["METERED", "priced"]

#: Name at the meter to the operations each one is, nobody contending.
METERED: Final[Mapping[str, tuple[str, ...]]] = {
    "fast_page_fault": ("vm-exit", "fast-page-fault"),
    "get_user_page": ("vm-exit", "fault-prepare"),
    "huge_page_split": ("split-table",),
    "mmu_lock_read": ("tdp-fault-lock",),
    "mmu_lock_write": ("tdp-fault-lock",),
    "mmu_unsync_pages_lock": ("tdp-fault-lock",),  # assumed: one uncontended atomic, as mmu_lock's
    "pml_logged": ("pml-entry",),
    "remote_tlb_flush": ("tlb-flush",),
    "rmap_add": ("rmap-slot-change",),
    "rmap_walk": ("rmap-mask-change",),
    "spte_cmpxchg": ("spte-clear-dirty",),
    "spte_cmpxchg_failed": ("spte-clear-dirty",),
    "table_alloc": ("table-alloc",),
    "tdp_mmu_pages_lock": ("tdp-fault-lock",),  # assumed likewise
    "zap_batches": ("tlb-flush",),
}


def priced(totals: Mapping[str, int], host: HostProfile, vcpus: int) -> dict[str, int]:
    """ns of what was counted, by name. A flush is asked of every vCPU. KeyError for a name nobody priced."""
    out = {}
    for name, n in totals.items():
        each = sum(host.ns(op) for op in METERED[name])
        if name == "remote_tlb_flush":
            each += vcpus * host.ns("tlb-flush-vcpu")
        out[name] = round(n * each)
    return out
