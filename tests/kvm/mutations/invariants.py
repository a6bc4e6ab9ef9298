"""What is checked while it runs: a check that finds nothing."""

from __future__ import annotations

from .declare import gone

for _number, _check in (
    ("1", "log_invariants.stale_translations"),
    ("2", "log_invariants.untraced_pages"),
    ("3, 4", "invariants.leaf_violations"),
    ("5", "log_invariants.stray_tail_bits"),
    ("6", "invariants.stat_violations"),
    ("6", "invariants.table_violations"),
    ("7", "invariants.mmio_violations"),
    ("8", "invariants.reference_violations"),
    ("8", "invariants.lock_violations"),
    ("9", "log_invariants.ring_indices"),
    ("10", "changed_spte.assert_protected"),
):
    gone(f"invariant {_number}", _check, "finds nothing", answer=())
