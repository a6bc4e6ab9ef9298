"""What KVM's side of a migration costs the thread that asks for it: enable, GET, CLEAR, each under its lock."""

from __future__ import annotations

from dataclasses import dataclass

from migsim.perf.memstress import Counts
from migsim.perf.profile import HostProfile
from migsim.perf.rules import Rules

__all__ = ["ClearCost", "clear_cost", "enable_ns", "price"]


@dataclass(frozen=True)
class ClearCost:
    """KVM_CLEAR_DIRTY_LOG: ns a call (kick, flush), a page whose bit it takes, a 4K leaf it changes, a table it splits.

    stopped_call_ns: a call while no vCPU is in the guest, so that requests are set and no interrupt is sent.
    """

    call_ns: float
    page_ns: float
    leaf_ns: float
    table_ns: float
    stopped_call_ns: float

    def held_ns(self, pages: float, leaves: float, tables: float = 0.0) -> float:
        """How long mmu_lock is held for write: all but the flush, which comes after the unlock."""
        return pages * self.page_ns + leaves * self.leaf_ns + tables * self.table_ns

    @property
    def written_page_ns(self) -> float:
        """A page that was written: a 4K leaf maps it."""
        return self.page_ns + self.leaf_ns


def price(counts: Counts, host: HostProfile) -> float:
    """ns of counted operations on one thread."""
    return sum(n * host.ns(op) for op, n in counts.items())


def clear_cost(rules: Rules, host: HostProfile, vcpus: int, *, pml: bool) -> ClearCost:
    """The cost of CLEAR under `rules`: through rmaps, or 64 pages a walk from the root."""
    # tlb-flush-vcpu is fitted to flushes of vCPUs that wait in user space: the requests, without the interrupts
    stopped = host.ns("tlb-flush") + vcpus * host.ns("tlb-flush-vcpu")
    call = stopped + (vcpus * host.ns("vcpu-kick") if pml else 0.0)
    if "kvm-clear" in host.costs:  # measured whole on that host
        call = stopped = host.ns("kvm-clear")
    table = host.ns("split-table")
    if "kvm-clear-page" in host.costs:
        return ClearCost(call, host.ns("kvm-clear-page"), 0.0, table, stopped)
    word = host.ns("bitmap-word") / 64
    if rules.rmap:  # every gfn's head is looked at, whether a leaf maps it or a huge one does
        empty = host.ns("rmap-empty")
        return ClearCost(call, word + empty, max(host.ns("rmap-mask-change") - empty, 0.0), table, stopped)
    leaf = host.ns("spte-clear-dirty" if pml else "spte-wrprot")
    leaf += host.ns("pfn-set-dirty") if rules.sets_page_dirty else 0.0
    return ClearCost(call, word + host.ns("mmu-walk-word") / 64, leaf, table, stopped)


def enable_ns(counts: Counts, host: HostProfile) -> int:
    """Time of KVM_MEM_LOG_DIRTY_PAGES on every slot, from the counts of `Memstress.enable`."""
    return round(price(counts, host))
