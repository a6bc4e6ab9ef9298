"""KVM's invariants, looked at while a migration of any size runs (kvm.invariants).

At every round that is a second of the guest's time after the last look, the counters: pages_4k, pages_2m, pages_1g and
nx_lpage_splits against a recount, locks, deferred frees, references. After ten seconds, and at the end, the planes
against each other besides: W, D, A and the rare states only where a page is mapped. docs/series.md has the cost.
"""

from __future__ import annotations

from typing import Final

from migsim.kvm.invariants import cheap_violations, counter_violations
from migsim.kvm.mmu_state import MmuState
from migsim.units import NS_PER_S

COUNTERS_NS: Final = NS_PER_S
PLANES_NS: Final = 10 * NS_PER_S


class Watch:
    """Raises AssertionError, naming what is broken, as soon as an invariant does not hold. `checks`: how often."""

    def __init__(self, mmu: MmuState) -> None:
        self.checks = 0
        self._mmu = mmu
        self._sync = 0
        self._next_ns = self._planes_ns = 0

    def between_windows(self, sync: int, now_ns: int) -> None:
        """Look, if a round has begun since the last call and the last look was long enough ago."""
        if sync == self._sync or now_ns < self._next_ns:
            return
        self._sync, self._next_ns = sync, now_ns + COUNTERS_NS
        if now_ns < self._planes_ns:
            self._hold(list(counter_violations(self._mmu)))
        else:
            self._planes_ns = now_ns + PLANES_NS
            self._hold(list(cheap_violations(self._mmu)))

    def at_the_end(self) -> None:
        """Look at everything that is cheap."""
        self._hold(list(cheap_violations(self._mmu)))

    def _hold(self, violations: list[str]) -> None:
        self.checks += 1
        assert not violations, f"after sync {self._sync}: " + "; ".join(violations)
