"""From counted operations to time: a phase all vCPUs run in parallel, or one a single thread runs.

In parallel, every fault that takes `mmu_lock` is one cycle of the closed network of `migsim.perf.locks`: the lock is
one station (the whole hold where it is exclusive, the lock word's cache line where faults share it), the host's mm the
other, everything else is think time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from migsim.perf.locks import Solution, solve
from migsim.perf.profile import HostProfile

__all__ = ["LockMode", "PhaseTime", "parallel_phase", "thread_phase"]

#: How a fault takes mmu_lock: "read" (TDP MMU from 5.12), "exclusive" (TDP MMU of 5.10), "exclusive-rmap" (shadow MMU).
LockMode = Literal["read", "exclusive", "exclusive-rmap"]

#: Fault kinds to the operations a vCPU does outside any queue, once a fault.
_THINK: Final[Mapping[str, tuple[str, ...]]] = {
    "fast-fault": ("vm-exit", "fast-page-fault"),
    "present-fault": ("vm-exit", "fault-prepare"),
    "slow-fault": ("vm-exit", "fault-prepare"),
    "spurious-fault": ("vm-exit", "fault-prepare"),
    "ring-full-exit": ("vm-exit", "ring-full-exit"),
}
#: Fault kinds that take mmu_lock, to the operation held under it in each mode.
_UNDER_LOCK: Final[Mapping[str, Mapping[LockMode, str]]] = {
    "present-fault": {"read": "tdp-fault-lock", "exclusive": "tdp-map-exclusive", "exclusive-rmap": "shadow-map"},
    "slow-fault": {"read": "tdp-fault-lock", "exclusive": "tdp-map-exclusive", "exclusive-rmap": "shadow-map"},
    "spurious-fault": {
        "read": "tdp-fault-lock",
        "exclusive": "shadow-map-spurious",
        "exclusive-rmap": "shadow-map-spurious",
    },
    "locked-age": {"read": "tdp-fault-lock", "exclusive": "tdp-age-exclusive", "exclusive-rmap": "rmap-age"},
}
#: Operations queued for at the host's mm.
_AT_MM: Final[Mapping[str, tuple[str, ...]]] = {
    "slow-fault": ("mmap-lock",),
    "spurious-fault": ("mmap-lock", "same-page-fault"),
    "uffd-fault": ("uffd-extra-lock",),
}
#: Work a fault does while it holds mmu_lock: part of the hold where the lock is exclusive.
_INSIDE: Final = frozenset({"split-table"})
_NOT_AN_OPERATION: Final = frozenset({"zeroed-bytes", "sleep-ns"})


@dataclass(frozen=True)
class PhaseTime:
    """How long a phase took and where its vCPUs were. solution: the network, or None when nobody takes the lock."""

    time_ns: int
    lock_waiting_share: float = 0.0
    solution: Solution | None = None

    def no_faster_than(self, bound_ns: int) -> PhaseTime:
        """The same phase held up by something else that takes `bound_ns`; waiting for the lock is a smaller share."""
        if bound_ns <= self.time_ns:
            return self
        return PhaseTime(bound_ns, self.lock_waiting_share * self.time_ns / bound_ns, self.solution)


def parallel_phase(counts: Mapping[str, int], vcpus: int, mode: LockMode, host: HostProfile) -> PhaseTime:
    """Time of a phase in which `vcpus` vCPUs do `counts` operations between them, evenly.

    "zeroed-bytes" bounds the phase by memory bandwidth; "sleep-ns" is time off the CPU, all vCPUs together.
    """
    visits = sum(n for kind, n in counts.items() if kind in _UNDER_LOCK)
    think = _think_ns(counts, vcpus, mode, host)
    floor = counts.get("zeroed-bytes", 0) / host.machine.memory_bandwidth.value * 1e9
    if not visits:
        return PhaseTime(round(max(think / vcpus, floor)))
    lock = _lock_ns(counts, vcpus, mode, host)
    mm = sum(n * host.ns(op, vcpus) for kind, n in counts.items() for op in _AT_MM.get(kind, ()))
    solution = solve((lock / visits, mm / visits), think / visits, vcpus)
    time = max(visits / solution.throughput, floor)
    waiting = visits * solution.waiting_ns(0) / (vcpus * time)
    return PhaseTime(round(time), waiting, solution)


def thread_phase(counts: Mapping[str, int], host: HostProfile) -> PhaseTime:
    """Time one thread needs for `counts`, nobody contending: an ioctl while the vCPUs are stopped."""
    return PhaseTime(round(sum(n * host.ns(op) for op, n in counts.items() if op not in _NOT_AN_OPERATION)))


def _think_ns(counts: Mapping[str, int], vcpus: int, mode: LockMode, host: HostProfile) -> float:
    """Private work of all vCPUs together, slowed where hyperthreads share a core."""
    slowdown, line = host.machine.slowdown(vcpus), host.machine.line_transfer_ns(vcpus)
    think = float(counts.get("sleep-ns", 0))
    for kind, n in counts.items():
        if kind in _NOT_AN_OPERATION or (kind in _INSIDE and mode != "read"):
            continue
        operations = _THINK.get(kind, () if kind in _UNDER_LOCK else (kind,))
        if mode == "read" and kind in ("present-fault", "slow-fault"):
            operations = (*operations, "tdp-map")
        costs = [host.cost(op) for op in operations]
        think += n * sum(cost.ns * slowdown + cost.lines * line for cost in costs)
    return think


def _lock_ns(counts: Mapping[str, int], vcpus: int, mode: LockMode, host: HostProfile) -> float:
    """Time the lock station serves, all visits together."""
    held = sum(n * host.ns(_UNDER_LOCK[kind][mode], vcpus) for kind, n in counts.items() if kind in _UNDER_LOCK)
    if mode != "read":
        held += sum(n * host.ns(kind, vcpus) for kind, n in counts.items() if kind in _INSIDE)
    return held
