"""What a selftest run hands back: its phases in order, as an object, as JSON and as the kernel test's own lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from migsim.perf.phases import PhaseTime

__all__ = ["Outcome", "Phase", "seconds"]


@dataclass(frozen=True)
class Phase:
    """One timed phase: its counts, its time, and the share of the vCPUs' time spent waiting for mmu_lock, 0..1."""

    name: str
    time_ns: int
    lock_waiting_share: float
    counts: Mapping[str, int]

    @classmethod
    def of(cls, name: str, counts: Mapping[str, int], time: PhaseTime) -> Phase:
        """A phase from its counts and what they cost."""
        return cls(name, time.time_ns, time.lock_waiting_share, dict(counts))


@dataclass(frozen=True)
class Outcome:
    """One selftest run. options: the whole input · lines: what the kernel's test prints · figures: more."""

    test: str
    options: Mapping[str, Any]
    phases: tuple[Phase, ...]
    lines: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_time_ns(self) -> int:
        """All phases together."""
        return sum(phase.time_ns for phase in self.phases)

    @property
    def lock_waiting_share(self) -> float:
        """Share of all vCPU time spent waiting for mmu_lock, 0..1."""
        total = self.total_time_ns
        return sum(p.lock_waiting_share * p.time_ns for p in self.phases) / total if total else 0.0

    def phase(self, name: str) -> Phase:
        """The first phase called `name`. KeyError when there is none."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def as_json(self) -> dict[str, Any]:
        """The JSON document of `--json`: names hyphenated, times in ns, shares 0..1."""
        phases = [
            {
                "name": p.name,
                "time-ns": p.time_ns,
                "lock-waiting-share": round(p.lock_waiting_share, 6),
                "counts": dict(p.counts),
            }
            for p in self.phases
        ]
        return {
            "test": self.test,
            "options": dict(self.options),
            "phases": phases,
            **self.figures,
            "total-time-ns": self.total_time_ns,
            "lock-waiting-share": round(self.lock_waiting_share, 6),
        }


def seconds(time_ns: int) -> str:
    """A duration as the kernel's tests print a timespec: 1.123456789s."""
    return f"{time_ns // 10**9}.{time_ns % 10**9:09d}s"
