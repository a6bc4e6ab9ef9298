"""KVM's binary statistics under KVM's names (Linux 6.18): what the stats file descriptor of a VM shows.

VM-wide values are plain integer attributes. The vCPU ones are kept as the sum over vCPUs in the same way, because a
bulk kernel cannot tell which vCPU faulted; `count_vcpu` also keeps them by vCPU where that is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final

VCPU_STATS: Final = (
    "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_mmio_spte_created", "pf_guest", "tlb_flush",
    "invlpg", "exits", "io_exits", "mmio_exits", "signal_exits", "irq_window_exits", "nmi_window_exits",
    "l1d_flush", "halt_exits", "request_irq_exits", "irq_exits", "host_state_reload", "fpu_reload",
    "insn_emulation", "insn_emulation_fail", "hypercalls", "irq_injections", "nmi_injections", "req_event",
    "nested_run", "directed_yield_attempted", "directed_yield_successful", "preemption_reported",
    "preemption_other", "guest_mode", "notify_window_exits",
)  # fmt: skip


@dataclass(slots=True)
class Stats:
    """Every counter of a VM. Instant values: mmu_unsync, pages_*, nx_lpage_splits; peaks: max_*; the rest cumulate."""

    remote_tlb_flush: int = 0
    remote_tlb_flush_requests: int = 0
    mmu_shadow_zapped: int = 0
    mmu_pte_write: int = 0
    mmu_pde_zapped: int = 0
    mmu_flooded: int = 0
    mmu_recycled: int = 0
    mmu_cache_miss: int = 0
    mmu_unsync: int = 0
    pages_4k: int = 0
    pages_2m: int = 0
    pages_1g: int = 0
    nx_lpage_splits: int = 0
    max_mmu_rmap_size: int = 0
    max_mmu_page_hash_collisions: int = 0
    pf_taken: int = 0
    pf_fixed: int = 0
    pf_emulate: int = 0
    pf_spurious: int = 0
    pf_fast: int = 0
    pf_mmio_spte_created: int = 0
    pf_guest: int = 0
    tlb_flush: int = 0
    invlpg: int = 0
    exits: int = 0
    io_exits: int = 0
    mmio_exits: int = 0
    signal_exits: int = 0
    irq_window_exits: int = 0
    nmi_window_exits: int = 0
    l1d_flush: int = 0
    halt_exits: int = 0
    request_irq_exits: int = 0
    irq_exits: int = 0
    host_state_reload: int = 0
    fpu_reload: int = 0
    insn_emulation: int = 0
    insn_emulation_fail: int = 0
    hypercalls: int = 0
    irq_injections: int = 0
    nmi_injections: int = 0
    req_event: int = 0
    nested_run: int = 0
    directed_yield_attempted: int = 0
    directed_yield_successful: int = 0
    preemption_reported: int = 0
    preemption_other: int = 0
    guest_mode: int = 0
    notify_window_exits: int = 0
    per_vcpu: dict[int, dict[str, int]] = field(default_factory=dict)

    def add(self, name: str, n: int = 1) -> None:
        """Add `n` to the value called `name`; raises AttributeError for a name KVM does not have."""
        setattr(self, name, getattr(self, name) + n)

    def count_vcpu(self, vcpu_id: int, name: str, n: int = 1) -> None:
        """Add `n` to a vCPU's value and to the sum over vCPUs."""
        self.add(name, n)
        of_vcpu = self.per_vcpu.setdefault(vcpu_id, {})
        of_vcpu[name] = of_vcpu.get(name, 0) + n

    def update_page_stats(self, level: int, n: int) -> None:
        """`n` more (or fewer) leaf SPTEs at `level` exist (kvm_update_page_stats)."""
        self.add(("pages_4k", "pages_2m", "pages_1g")[level - 1], n)

    def peak(self, name: str, value: int) -> None:
        """Raise a max_* value to `value`."""
        setattr(self, name, max(getattr(self, name), value))

    def read(self) -> dict[str, int]:
        """Name to value, in a fixed order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "per_vcpu"}

    def read_vcpu(self, vcpu_id: int) -> dict[str, int]:
        """One vCPU's values, as "kvm-PID/vcpu-N" shows them."""
        return {name: self.per_vcpu.get(vcpu_id, {}).get(name, 0) for name in VCPU_STATS}


assert set(VCPU_STATS) <= {f.name for f in fields(Stats)}
