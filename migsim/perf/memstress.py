"""The memstress guest: how many faults, splits, exits and words each phase of a selftest costs, by the MMU's rules.

Nothing here is a time. A phase is counted from what the guest's leaves look like when it begins (`Leaves`), and the
counts are the operations `migsim.perf` prices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from migsim.perf.rules import Kernel, Rules, default_kernel, rules_for
from migsim.units import GIB, MIB, PAGE_SIZE

__all__ = ["ADDRESS_BITS", "BACKING_LEVELS", "Counts", "Leaves", "Memstress"]

Counts = dict[str, int]

#: -s backing source types of the kernel's tests, to the bytes the host maps at once.
BACKING_LEVELS: Final[Mapping[str, int]] = {
    "anonymous": PAGE_SIZE,
    "anonymous_thp": 2 * MIB,
    "anonymous_hugetlb": 2 * MIB,
    "anonymous_hugetlb_2mb": 2 * MIB,
    "anonymous_hugetlb_1gb": GIB,
    "shmem": PAGE_SIZE,
    "shared_hugetlb": 2 * MIB,
}
ADDRESS_BITS: Final = 52  # of a guest's physical addresses at most
_PML_ENTRIES: Final = 512


@dataclass(frozen=True)
class Leaves:
    """What the leaf SPTEs look like: bytes each maps, and whether a write to one shows (W or D is clear)."""

    size: int
    protected: bool = False
    writable: bool = True


@dataclass(frozen=True)
class Memstress:
    """One memstress VM. Sizes in bytes; write_percent 0..100; manual: 3 initially-set, 1 enable, 0 off."""

    vcpus: int = 1
    memory_per_vcpu: int = GIB
    mmu: str = "tdp"
    kernel: Kernel | None = None
    backing: str = "anonymous"
    overlap: bool = False
    slots: int = 1
    write_percent: int = 100
    random_access: bool = False
    manual: int = 3
    pml: bool = True
    ad_bits: bool = True
    eager_page_split: bool = True
    rules: Rules = field(init=False)

    def __post_init__(self) -> None:
        if self.vcpus < 1 or self.slots < 1 or self.memory_per_vcpu < PAGE_SIZE:
            raise ValueError("a memstress VM needs at least one vCPU, one slot and one page a vCPU")
        if self.memory_per_vcpu % PAGE_SIZE:
            raise ValueError(f"memory per vCPU must be whole pages of {PAGE_SIZE} bytes, not {self.memory_per_vcpu}")
        if (self.pages + 1) * PAGE_SIZE >= 1 << ADDRESS_BITS:
            sizes = f"{self.vcpus} vCPUs of {self.memory_per_vcpu} bytes"
            raise ValueError(f"memory per vCPU: {sizes} do not fit in physical addresses of {ADDRESS_BITS} bits")
        if not 0 <= self.write_percent <= 100 or self.backing not in BACKING_LEVELS or self.manual not in (0, 1, 3):
            raise ValueError("write percent is 0..100, backing one of the source types, manual 0, 1 or 3")
        rules = rules_for(self.mmu, self.kernel or default_kernel(self.mmu))
        object.__setattr__(self, "rules", rules)

    # --- sizes --------------------------------------------------------------------------------------------------------

    @property
    def pages(self) -> int:
        """4 KiB pages of guest memory, all vCPUs together."""
        return self.vcpus * self.memory_per_vcpu // PAGE_SIZE

    @property
    def words(self) -> int:
        """64-bit words of dirty bitmap."""
        return -(-self.pages // 64)

    @property
    def written(self) -> int:
        """Distinct pages written in one dirty phase, expected: with -o or -a a page is met more than once, or never."""
        chance = self.write_percent / 100
        if self.random_access:
            return round(-self.pages * math.expm1(-self.accesses * chance / self.pages))
        if self.overlap:
            return round(self.pages * (1.0 - (1.0 - chance) ** self.vcpus))
        return self.pages * self.write_percent // 100

    @property
    def accesses(self) -> int:
        """Page touches of all vCPUs in one pass: every page once, or once a vCPU with overlapping ranges."""
        return self.pages * (self.vcpus if self.overlap else 1)

    @property
    def uses_pml(self) -> bool:
        """Dirty bits are logged by hardware; it takes EPT A/D bits."""
        return self.pml and self.ad_bits

    def leaves_of(self, size: int) -> int:
        """Leaf SPTEs that map all of the guest at `size` bytes each."""
        return -(-self.pages * PAGE_SIZE // size)

    def tables_below(self, size: int) -> int:
        """Table pages a split from `size` down to 4K fills: one a 2M range, and one a 1G range above them."""
        tables = self.leaves_of(2 * MIB) if size >= 2 * MIB else 0
        return tables + (self.leaves_of(GIB) if size >= GIB else 0)

    @property
    def populated(self) -> Leaves:
        """The leaves after populate, before logging: mapped as large as the host backs them."""
        return Leaves(BACKING_LEVELS[self.backing])

    # --- phases -------------------------------------------------------------------------------------------------------

    def populate(self) -> Counts:
        """Every page touched for the first time: a fault a leaf, and the host's own fault under it."""
        leaves = self.leaves_of(self.populated.size)
        repeat = leaves * (self.vcpus - 1) if self.overlap else 0
        return _counts(
            {
                "guest-write": self.accesses,
                "slow-fault": leaves,
                "spurious-fault": repeat,
                "host-fault": leaves,
                "zeroed-bytes": leaves * self.populated.size,
            }
        )

    def enable(self) -> tuple[Counts, Leaves]:
        """KVM_MEM_LOG_DIRTY_PAGES on, every slot."""
        counts = {"slot-swap": self.slots, "bitmap-alloc-page": 2 * self.slots + 2 * self.words * 8 // PAGE_SIZE}
        leaves = self.populated
        if self.manual == 3:
            if self.rules.protects_huge_at_enable:  # it looks for huge pages, finds some or not, and flushes
                counts |= self._flush(self.slots)
            if self.rules.protects_huge_at_enable and leaves.size > PAGE_SIZE:
                huge = self.leaves_of(leaves.size)
                counts |= {"rmap-slot-change": huge} if self.rules.rmap else self._protect_only(huge)
                leaves = Leaves(leaves.size, protected=True, writable=False)
            return _counts(counts), leaves
        if self.rules.eager_split and self.eager_page_split and leaves.size > PAGE_SIZE:
            counts["split-table"] = self.tables_below(leaves.size)
            leaves = Leaves(PAGE_SIZE)
        counts |= self._protect_slot(leaves.size)
        counts |= self._flush(self.slots)
        return _counts(counts), replace(leaves, protected=True, writable=leaves.size == PAGE_SIZE and self.uses_pml)

    def dirty(self, leaves: Leaves) -> tuple[Counts, Leaves]:
        """One pass of writes and reads over `leaves`; what faults, what PML records."""
        writes = self.accesses * self.write_percent // 100
        # Overlapping vCPUs take the line from each other; apart, each misses to memory.
        counts = {"guest-write-shared" if self.overlap else "guest-write": writes, "guest-read": self.accesses - writes}
        if not leaves.protected or not self.written:
            return _counts(counts), leaves
        if leaves.size > PAGE_SIZE:
            return _counts(counts | self._first_writes(leaves.size)), Leaves(PAGE_SIZE)
        if leaves.writable:
            counts |= {"pml-entry": self.written, "pml-full-exit": self.written // _PML_ENTRIES}
        else:
            counts[self._reprotected_fault] = self.written
        return _counts(counts), Leaves(PAGE_SIZE)

    def get(self, leaves: Leaves) -> tuple[Counts, Leaves]:
        """KVM_GET_DIRTY_LOG of every slot; without the manual capability it re-arms what it reports."""
        counts = {"bitmap-word": self.words, "vcpu-kick": self.vcpus * self.slots if self.uses_pml else 0}
        if self.manual or not self.written:
            return _counts(counts), leaves
        counts |= self._rearm() | self._flush(self.slots)
        return _counts(counts), self._rearmed

    def clear(self, leaves: Leaves, *, first: bool) -> tuple[Counts, Leaves]:
        """KVM_CLEAR_DIRTY_LOG of every slot; `first` finds all bits set when INITIALLY_SET is on."""
        counts = {"bitmap-word": 2 * self.words, "vcpu-kick": self.vcpus * self.slots if self.uses_pml else 0}
        all_set = first and self.manual == 3
        if leaves.size > PAGE_SIZE and all_set and not (self.rules.eager_split and self.eager_page_split):
            huge = self.leaves_of(leaves.size)
            protect = {"rmap-mask-change": huge} if self.rules.rmap else self._protect_only(huge)
            counts |= {"mmu-walk-word": self.words} | protect | self._flush(self.slots)
            return _counts(counts), Leaves(leaves.size, protected=True, writable=False)
        if leaves.size > PAGE_SIZE and all_set:
            counts["split-table"] = self.tables_below(leaves.size)
        counts |= self._rearm(self.pages if all_set else self.written) | self._flush(self.slots)
        return _counts(counts), self._rearmed

    def disable(self, leaves: Leaves) -> Counts:
        """KVM_MEM_LOG_DIRTY_PAGES off: small mappings of huge host pages are made huge again."""
        counts = {"slot-swap": self.slots}
        kind, tables = self.rules.disable, self.tables_below(self.populated.size)
        if leaves.size > PAGE_SIZE:
            counts["spte-walk"] = self.leaves_of(leaves.size)
        elif not tables or kind == "walk":
            counts["rmap-visit" if self.rules.rmap else "spte-visit"] = self.pages
        elif kind == "rmap":
            counts |= {"rmap-visit": self.pages, "rmap-zap": self.pages} | self._flush(self.slots)
        elif kind == "leaf":
            counts |= {"spte-visit": self.pages, **self._zaps(self.pages)} | self._flush(self.pages)
        else:
            flushes = self.leaves_of(self.populated.size) if kind == "non-leaf" else self.slots
            counts |= {"table-free": tables, **self._zaps(self.pages)} | self._flush(flushes)
        return _counts(counts)

    # --- the rules behind the phases ----------------------------------------------------------------------------------

    @property
    def _rearmed(self) -> Leaves:
        return Leaves(PAGE_SIZE, protected=True, writable=self.uses_pml)

    @property
    def _reprotected_fault(self) -> str:
        return "fast-fault" if self.rules.fast_faults else "present-fault"

    def _first_writes(self, size: int) -> Counts:
        """Writes to write-protected huge leaves nobody split before."""
        ranges = min(self.leaves_of(2 * MIB), self.written)
        if self.rules.split_on_fault:
            # The slow fault splits down to its page; the other pages of the 2M range kept their (protected) leaf.
            fast = {"present-fault": ranges, "split-table": self.tables_below(size)}
            return fast | {self._reprotected_fault: self.written - ranges}
        # The huge leaf is zapped and every page of it faults again, on its own.
        return {
            "present-fault": self.written,
            "table-alloc": self.tables_below(size),
            **self._flush(self.leaves_of(size)),
        }

    def _protect_slot(self, size: int) -> Counts:
        """The slot walk at enable: D on 4K leaves with PML, W on everything else."""
        leaves = self.leaves_of(size)
        if self.rules.rmap:
            small = self.pages if size == PAGE_SIZE else 0
            return {"rmap-empty": self.pages - small, "rmap-slot-change": small or leaves}
        return {"spte-walk": leaves, **self._protect_only(leaves, dirty=size == PAGE_SIZE and self.uses_pml)}

    def _protect_only(self, leaves: int, *, dirty: bool = False) -> Counts:
        counts = {"spte-clear-dirty" if dirty else "spte-wrprot": leaves}
        if self.rules.sets_page_dirty:
            counts["pfn-set-dirty"] = leaves
        return counts

    def _rearm(self, pages: int | None = None) -> Counts:
        """Protection by mask, 64 pages a word, for the pages whose bit was taken."""
        pages = self.written if pages is None else pages
        if self.rules.rmap:
            return {"rmap-mask-change": pages}
        words = min(self.words, pages)
        return {"mmu-walk-word": words, **self._protect_only(pages, dirty=self.uses_pml)}

    def _zaps(self, leaves: int) -> Counts:
        # A zapped leaf gives up its accessed and its dirty bit: struct page is touched twice.
        return {"spte-zap": leaves, "pfn-set-dirty": 2 * leaves if self.rules.sets_page_dirty else 0}

    def _flush(self, times: int) -> Counts:
        return {"tlb-flush": times, "tlb-flush-vcpu": times * self.vcpus}


def _counts(counts: Mapping[str, int]) -> Counts:
    return {name: n for name, n in counts.items() if n}
