"""KVM's invariants, looked at while a migration of any size runs (kvm.invariants, kvm.log_invariants).

At every round, whatever the size: locks, deferred frees, references, tail bits of the logs. At each of the first
rounds, and then every few seconds of the guest's time: pages_4k, pages_2m, pages_1g and nx_lpage_splits against a
recount. Every minute, and at the end, the planes against each other: W, D, A and the rare states only where a page
is mapped. docs/series.md has the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from migsim.kvm.invariants import cheap_violations, counter_violations, lock_violations, reference_violations
from migsim.kvm.log_invariants import stray_tail_bits
from migsim.kvm.mmu_state import MmuState
from migsim.kvm.vm import Vm
from migsim.units import NS_PER_S

Check = Callable[[MmuState], Iterator[str]]

RECOUNTED_ROUNDS: Final = 16  # a migration that converges has a dozen; one that hovers has hundreds, fractions apart
RECOUNT_NS: Final = 5 * NS_PER_S
PLANES_NS: Final = 60 * NS_PER_S


class Watch:
    """Raises AssertionError, naming what is broken, as soon as an invariant does not hold.

    rounds, recounts: how often it looked, and how often it counted SPTEs.
    """

    def __init__(self, vm: Vm) -> None:
        self.rounds = self.recounts = 0
        self._vm = vm
        self._sync = 0
        self._recount_ns = self._planes_ns = 0

    def between_windows(self, sync: int, now_ns: int) -> None:
        """Look, if a round has begun since the last call."""
        if sync != self._sync:
            self._sync = sync
            self.rounds += 1
            self._look(*self._due(now_ns))

    def at_the_end(self) -> None:
        """Look at everything that is cheap."""
        self._look(cheap_violations)

    def _due(self, now_ns: int) -> tuple[Check, ...]:
        if now_ns < self._planes_ns and now_ns < self._recount_ns and self.recounts >= RECOUNTED_ROUNDS:
            return lock_violations, reference_violations
        self.recounts += 1
        self._recount_ns = now_ns + RECOUNT_NS
        if now_ns < self._planes_ns:
            return (counter_violations,)
        self._planes_ns = now_ns + PLANES_NS
        return (cheap_violations,)

    def _look(self, *checks: Check) -> None:
        found = [sentence for check in checks for sentence in check(self._vm.mmu.state)]
        found += stray_tail_bits(self._vm)
        assert not found, f"after sync {self._sync}: " + "; ".join(found)
