"""Tracepoints under KVM's names, as JSON lines: one object an event, for guests small enough to follow.

`EVENTS` is the list of what exists and of each event's fields (Linux 6.13, arch/x86/kvm/mmu/mmutrace.h and
arch/x86/kvm/trace.h). Addresses and SPTEs are written as hex strings.
"""

from __future__ import annotations

import json
from typing import Final, TextIO

EVENTS: Final[dict[str, tuple[str, ...]]] = {
    "kvm_page_fault": ("vcpu_id", "fault_address", "error_code"),
    "kvm_entry": ("vcpu_id",),
    "kvm_exit": ("vcpu_id", "exit_reason"),
    "kvm_pml_full": ("vcpu_id",),
    "kvm_dirty_ring_push": ("index", "dirty_index", "reset_index", "slot", "offset"),
    "kvm_dirty_ring_reset": ("index", "dirty_index", "reset_index"),
    "kvm_dirty_ring_exit": ("vcpu_id",),
    "kvm_unmap_hva_range": ("start", "end"),
    "kvm_age_hva": ("start", "end"),
    "kvm_test_age_hva": ("hva",),
    "kvm_try_async_get_page": ("gva", "gfn"),
    "kvm_mmio": ("type", "len", "gpa", "val"),
    "kvm_mmu_pagetable_walk": ("addr", "pferr"),
    "kvm_mmu_paging_element": ("pte", "level"),
    "kvm_mmu_set_accessed_bit": ("gpa",),
    "kvm_mmu_set_dirty_bit": ("gpa",),
    "kvm_mmu_walker_error": ("pferr",),
    "kvm_mmu_get_page": ("gfn", "level", "created"),
    "kvm_mmu_sync_page": ("gfn", "level"),
    "kvm_mmu_unsync_page": ("gfn", "level"),
    "kvm_mmu_prepare_zap_page": ("gfn", "level"),
    "mark_mmio_spte": ("sptep", "gfn", "access", "gen"),
    "handle_mmio_page_fault": ("addr", "gfn", "access"),
    "fast_page_fault": ("vcpu_id", "cr2_or_gpa", "error_code", "sptep", "old_spte", "new_spte", "spurious", "fixed"),
    "kvm_mmu_zap_all_fast": ("mmu_valid_gen", "mmu_used_pages"),
    "check_mmio_spte": ("spte", "spte_gen", "kvm_gen", "valid"),
    "kvm_mmu_set_spte": ("gfn", "spte", "level", "r", "w", "x", "u"),
    "kvm_mmu_spte_requested": ("gfn", "pfn", "level"),
    "kvm_tdp_mmu_spte_changed": ("as_id", "gfn", "level", "old_spte", "new_spte"),
    "kvm_mmu_split_huge_page": ("gfn", "spte", "level", "errno"),
}
_HEX: Final = {"fault_address", "error_code", "start", "end", "hva", "gva", "gpa", "addr", "gfn", "pfn", "spte",
               "cr2_or_gpa", "old_spte", "new_spte"}  # fmt: skip

Value = int | bool | str


class JsonLines:
    """A trace sink: `sink(name, fields)` writes one line. `only`: names to keep, None for all."""

    def __init__(self, out: TextIO, only: frozenset[str] | None = None) -> None:
        self._out = out
        self._only = only
        self.written = 0

    def __call__(self, name: str, fields: dict[str, Value]) -> None:
        """Write event `name`; raises AssertionError if KVM has no such event or the fields are not its own."""
        assert tuple(fields) == EVENTS[name], f"tracepoint {name} has fields {EVENTS[name]}, got {tuple(fields)}"
        if self._only is not None and name not in self._only:
            return
        shown = {key: hex(value) if key in _HEX and isinstance(value, int) else value for key, value in fields.items()}
        self._out.write(json.dumps({"event": name, "seq": self.written, **shown}) + "\n")
        self.written += 1
