"""The seam through which behaviour tells cost what happened: `count(operation, n)` and nothing else.

Behaviour never reads a cost. `NullMeter` is the empty form; `CountingMeter` keeps totals by name.
"""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """Counts named operations."""

    def count(self, op: str, n: int = 1) -> None:
        """`n` operations called `op` happened."""


class NullMeter:
    """Counts nothing."""

    def count(self, op: str, n: int = 1) -> None:
        """Forget it."""


class CountingMeter:
    """Totals by operation name, in order of first appearance."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}

    def count(self, op: str, n: int = 1) -> None:
        """Add `n` to the total of `op`."""
        if n:
            self.totals[op] = self.totals.get(op, 0) + n
