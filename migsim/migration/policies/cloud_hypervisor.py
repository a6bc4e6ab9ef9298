"""Cloud Hypervisor's pre-copy: send what is dirty, look again, until the next pass fits the downtime budget.

Source: cloud-hypervisor ae44c29, vmm/src/lib.rs (is_precopy_converged: nothing left, or downtime budget met, or
timeout). It has no bandwidth window and no threshold of QEMU's kind, so this is a platform that raises or stops
QEMU's loop by the same three criteria: it lets one compare the two controllers on one guest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from migsim.migration.policies.protocol import Cancel, Command, Sample, StopGuest
from migsim.units import NS_PER_MS, NS_PER_S

__all__ = ["CloudHypervisor"]


@dataclass(slots=True)
class CloudHypervisor:
    """Judged at the start of each pass; defaults 300 ms and 3600 s. On timeout it cancels or stops the guest anyway."""

    downtime_ms: int = 300
    timeout_s: int = 3600
    timeout_strategy: Literal["cancel", "ignore"] = "cancel"
    poll_interval_ns: int = 100 * NS_PER_MS
    seen_passes: int = 1
    acted: bool = False

    def before_migrate(self) -> tuple[Command, ...]:
        return ()

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        if self.acted or sample.status != "active" or sample.dirty_sync_count <= self.seen_passes:
            return ()
        self.seen_passes = sample.dirty_sync_count
        estimate_ms = sample.remaining_bytes * 8 / (sample.mbps * 1e6) * 1e3 if sample.mbps else float("inf")
        if sample.remaining_bytes == 0 or estimate_ms <= self.downtime_ms:
            return self._act(StopGuest("the downtime budget"))
        if sample.now_ns >= self.timeout_s * NS_PER_S:
            cancel = Cancel(f"pre-copy ran for {self.timeout_s} s")
            return self._act(cancel if self.timeout_strategy == "cancel" else StopGuest("the timeout"))
        return ()

    def _act(self, command: Command) -> tuple[Command, ...]:
        self.acted = True
        return (command,)
