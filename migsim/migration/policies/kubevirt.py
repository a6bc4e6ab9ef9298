"""KubeVirt's migration monitor: stall and completion timeouts, and the downtime ramp.

Sources: kubevirt pkg/virt-launcher/virtwrap/live-migration-source.go (progress and completion timeouts; defaults
150 s and 150 s a GiB of the 1.x line), kubevirt pull request 17480 and enhancement 291 (ramp: from the third
iteration, 150 ms to 1050 ms in steps of 150 ms, 10 s apart). The monitor looks each 400 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

from migsim.migration.policies.protocol import Cancel, Command, Sample, SetParameters, StartPostcopy, StopGuest
from migsim.units import GIB, NS_PER_MS, NS_PER_S

__all__ = ["Kubevirt"]


@dataclass(slots=True)
class Kubevirt:
    """Stalled: `remaining` has not reached a new low for `progress_timeout_s`.

    allow_post_copy: both timeouts start post-copy instead of aborting; allow_workload_disruption without it: the
    completion timeout pauses the guest. ramp: downtime-limit grows while iterations go on.
    """

    memory_bytes: int
    progress_timeout_s: int = 150
    completion_timeout_s_per_gib: int = 150
    allow_post_copy: bool = False
    allow_workload_disruption: bool = False
    ramp: bool = False
    ramp_start_iteration: int = 3
    ramp_initial_ms: int = 150
    ramp_step_ms: int = 150
    ramp_max_ms: int = 1050
    ramp_cooldown_s: int = 10
    poll_interval_ns: int = 400 * NS_PER_MS
    lowest_remaining: int | None = None
    lowest_at_ns: int = 0
    downtime_ms: int = 0
    raised_at_ns: int | None = None
    acted: bool = False

    def before_migrate(self) -> tuple[Command, ...]:
        if not self.ramp:
            return ()
        self.downtime_ms = self.ramp_initial_ms
        return (SetParameters({"downtime-limit": self.downtime_ms}),)

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        if sample.status != "active" or self.acted:
            return ()
        self._watch_progress(sample)
        completion_ns = self.completion_timeout_s_per_gib * -(-self.memory_bytes // GIB) * NS_PER_S
        if completion_ns and sample.now_ns > completion_ns:
            return self._act(self._over(completion_ns))
        stalled_ns = sample.now_ns - self.lowest_at_ns
        if self.progress_timeout_s and stalled_ns > self.progress_timeout_s * NS_PER_S:
            stalled = Cancel(f"migration stuck for {self.progress_timeout_s} s")
            return self._act(StartPostcopy() if self.allow_post_copy else stalled)
        return self._raise_downtime(sample)

    def _act(self, command: Command) -> tuple[Command, ...]:
        self.acted = True
        return (command,)

    def _over(self, completion_ns: int) -> Command:
        if self.allow_post_copy:
            return StartPostcopy()
        if self.allow_workload_disruption:
            return StopGuest("allowWorkloadDisruption")
        return Cancel(f"not completed after {completion_ns // NS_PER_S} s")

    def _watch_progress(self, sample: Sample) -> None:
        if self.lowest_remaining is None or sample.remaining_bytes < self.lowest_remaining:
            self.lowest_remaining = sample.remaining_bytes
            self.lowest_at_ns = sample.now_ns

    def _raise_downtime(self, sample: Sample) -> tuple[Command, ...]:
        if not self.ramp or sample.dirty_sync_count < self.ramp_start_iteration or self.downtime_ms >= self.ramp_max_ms:
            return ()
        if self.raised_at_ns is not None and sample.now_ns - self.raised_at_ns < self.ramp_cooldown_s * NS_PER_S:
            return ()
        self.raised_at_ns = sample.now_ns
        self.downtime_ms = min(self.downtime_ms + self.ramp_step_ms, self.ramp_max_ms)
        return (SetParameters({"downtime-limit": self.downtime_ms}),)
