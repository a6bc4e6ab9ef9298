"""oVirt's migration policies: a convergence schedule driven by stalled iterations.

Source: oVirt "Migration Enhancements" feature page and vdsm lib/vdsm/virt/migration.py (MonitorThread): an iteration
stalls when, at its end, `remaining` is not below the lowest mark so far; after so many stalled iterations the
schedule's next row is executed, and the last row (-1) once all others were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from migsim.migration.policies.protocol import Cancel, Command, Sample, SetParameters, StartPostcopy
from migsim.units import NS_PER_S

__all__ = ["SCHEDULES", "Ovirt", "PolicyName", "Step"]

PolicyName = Literal["minimal-downtime", "suspend-workload", "post-copy"]


@dataclass(frozen=True, slots=True)
class Step:
    """After `stalling` stalled iterations (-1: when every other row was executed)."""

    stalling: int
    action: Literal["set-downtime", "abort", "postcopy"]
    downtime_ms: int = 0


_RAMP: Final = tuple(Step(n, "set-downtime", ms) for n, ms in ((1, 150), (2, 200), (3, 300), (4, 400), (6, 500)))
SCHEDULES: Final[dict[PolicyName, tuple[Step, ...]]] = {
    "minimal-downtime": (*_RAMP, Step(-1, "abort")),
    "suspend-workload": (*_RAMP, Step(-1, "set-downtime", 5000), Step(-1, "abort")),
    "post-copy": (*_RAMP[:2], Step(-1, "postcopy"), Step(-1, "abort")),
}
INITIAL_DOWNTIME_MS: Final = 100


@dataclass(slots=True)
class Ovirt:
    """One of the three policies the engine ships; vdsm's monitor looks each second."""

    policy: PolicyName = "minimal-downtime"
    poll_interval_ns: int = NS_PER_S
    steps: list[Step] = field(default_factory=list)
    stalled: int = 0
    iteration: int = 0
    lowest_remaining: int | None = None

    def __post_init__(self) -> None:
        self.steps = list(SCHEDULES[self.policy])

    def before_migrate(self) -> tuple[Command, ...]:
        return (SetParameters({"downtime-limit": INITIAL_DOWNTIME_MS}),)

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        if sample.status != "active" or sample.dirty_sync_count <= max(self.iteration, 1):
            return ()
        self.iteration = sample.dirty_sync_count
        if self.lowest_remaining is None or sample.remaining_bytes < self.lowest_remaining:
            self.lowest_remaining = sample.remaining_bytes
            return ()
        self.stalled += 1
        return self._next()

    def _next(self) -> tuple[Command, ...]:
        if not self.steps or self.steps[0].stalling > self.stalled:
            return ()
        step = self.steps.pop(0)
        if step.action == "abort":
            return (Cancel("the convergence schedule is exhausted"),)
        if step.action == "postcopy":
            return (StartPostcopy(),)
        return (SetParameters({"downtime-limit": step.downtime_ms}),)
