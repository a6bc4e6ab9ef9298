"""OpenStack Nova: downtime-limit raised in linear steps, then a completion timeout.

Source: nova/virt/libvirt/migration.py (downtime_steps, should_abort/force_complete, should_switch_to_postcopy) and
nova/conf/libvirt.py. Nova's default bandwidth is unlimited; it polls the job each 0.5 s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from migsim.migration.policies.protocol import Cancel, Command, Sample, SetParameters, StartPostcopy, StopGuest
from migsim.units import GIB, NS_PER_MS, NS_PER_S

__all__ = ["Nova", "downtime_steps"]

POSTCOPY_PROGRESS_PCT = 10  # a pass that shrinks `remaining` by less than this asks for post-copy


def downtime_steps(
    data_gib: int, *, downtime_ms: int = 500, steps: int = 10, delay_s: int = 75
) -> list[tuple[int, int]]:
    """(seconds since start, downtime-limit in ms): `steps` + 1 rows from downtime/steps up to downtime.

    The delay grows with the data: a 12 TiB guest takes a step each 10.7 days, which is why Nova's schedule never
    leaves its first step there.
    """
    base = downtime_ms / steps
    offset = (downtime_ms - base) / steps
    return [(delay_s * data_gib * i, int(base + offset * i)) for i in range(steps + 1)]


@dataclass(slots=True)
class Nova:
    """live_migration_downtime{,_steps,_delay}, _completion_timeout (s per GiB), _timeout_action, _permit_post_copy."""

    memory_bytes: int
    downtime_ms: int = 500
    steps: int = 10
    delay_s: int = 75
    completion_timeout_s_per_gib: int = 800
    timeout_action: Literal["abort", "force_complete"] = "abort"
    permit_post_copy: bool = False
    poll_interval_ns: int = 500 * NS_PER_MS
    schedule: list[tuple[int, int]] = field(default_factory=list)
    memory_iteration: int = 0
    remaining_before: int | None = None
    acted: bool = False

    def __post_init__(self) -> None:
        self.schedule = downtime_steps(
            self.data_gib, downtime_ms=self.downtime_ms, steps=self.steps, delay_s=self.delay_s
        )

    @property
    def data_gib(self) -> int:
        """Nova rounds up to 2 GiB at least."""
        return max(2, -(-self.memory_bytes // GIB))

    def before_migrate(self) -> tuple[Command, ...]:
        return ()

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        if sample.status != "active" or self.acted:
            return ()
        if self._postcopy_helps(sample):
            self.acted = True
            return (StartPostcopy(),)
        timeout_s = self.completion_timeout_s_per_gib * self.data_gib
        if timeout_s and sample.now_ns >= timeout_s * NS_PER_S:
            self.acted = True
            return (self._give_up(timeout_s),)
        return self._step(sample)

    def _step(self, sample: Sample) -> tuple[Command, ...]:
        if not self.schedule or sample.now_ns < self.schedule[0][0] * NS_PER_S:
            return ()
        _, downtime_ms = self.schedule.pop(0)
        return (SetParameters({"downtime-limit": downtime_ms}),)

    def _give_up(self, timeout_s: int) -> Command:
        if self.timeout_action == "abort":
            return Cancel(f"live_migration_completion_timeout of {timeout_s} s")
        return StartPostcopy() if self.permit_post_copy else StopGuest("live_migration_timeout_action")

    def _postcopy_helps(self, sample: Sample) -> bool:
        """After each pass but the first: did `remaining` shrink by a tenth?"""
        if not self.permit_post_copy or sample.dirty_sync_count <= self.memory_iteration:
            return False
        before, self.remaining_before = self.remaining_before, sample.remaining_bytes
        self.memory_iteration = sample.dirty_sync_count
        if before is None or sample.dirty_sync_count <= 2:
            return False
        progress_pct = (before - sample.remaining_bytes) * 100 / before if before else 100.0
        return progress_pct < POSTCOPY_PROGRESS_PCT
