"""`virsh migrate --timeout S` with --timeout-suspend (the default) or --timeout-postcopy.

Source: libvirt 9.0 tools/virsh-domain.c. When the time is up virsh suspends the guest, so that what is left is sent
without being dirtied again, or starts post-copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from migsim.migration.policies.protocol import Command, Sample, StartPostcopy, StopGuest
from migsim.units import NS_PER_MS

__all__ = ["LibvirtTimeout"]


@dataclass(slots=True)
class LibvirtTimeout:
    """Acts once, at the first poll after `timeout_ns`. virsh looks each 500 ms."""

    timeout_ns: int
    action: Literal["suspend", "postcopy"] = "suspend"
    poll_interval_ns: int = 500 * NS_PER_MS
    acted: bool = False

    def before_migrate(self) -> tuple[Command, ...]:
        return ()

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        if self.acted or sample.status != "active" or sample.now_ns < self.timeout_ns:
            return ()
        self.acted = True
        return (StartPostcopy(),) if self.action == "postcopy" else (StopGuest("--timeout"),)
