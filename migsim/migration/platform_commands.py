"""What a platform asks of the running migration: query-migrate's answer and the QMP commands it sends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from migsim.migration import periodic, switchover
from migsim.migration.policies.protocol import (
    Cancel,
    Command,
    MigrateContinue,
    Sample,
    SetParameters,
    SetVcpuDirtyLimit,
    StartPostcopy,
)
from migsim.units import PAGE_SIZE

if TYPE_CHECKING:
    from migsim.migration.precopy import Precopy

__all__ = ["obey", "sample"]

_KNOBS = {
    "max-bandwidth": "max_bandwidth",
    "downtime-limit": "downtime_limit_ms",
    "avail-switchover-bandwidth": "avail_switchover_bandwidth",
    "max-postcopy-bandwidth": "max_postcopy_bandwidth",
}


def sample(loop: Precopy) -> Sample:
    """query-migrate as a platform reads it."""
    stats = loop.stats
    return Sample(
        now_ns=loop.now_ns, status=loop.status, remaining_bytes=loop.ram.dirty_pages * PAGE_SIZE,
        total_bytes=stats.total_bytes, transferred_bytes=stats.transferred, dirty_sync_count=stats.dirty_sync_count,
        expected_downtime_ms=stats.expected_downtime_ms, mbps=stats.mbps, dirty_pages_rate=stats.dirty_pages_rate,
        cpu_throttle_percentage=stats.cpu_throttle_percentage,
    )  # fmt: skip


def obey(loop: Precopy, command: Command) -> None:
    """A QMP command of the platform."""
    if isinstance(command, SetParameters):
        known = {_KNOBS[name]: value for name, value in command.parameters.items() if name in _KNOBS}
        loop.knobs = replace(loop.knobs, **known)  # type: ignore[arg-type]
        loop.set_quantum()
    elif isinstance(command, StartPostcopy):
        loop.postcopy_asked = True
    elif isinstance(command, Cancel):
        loop.why = command.reason or "migrate_cancel"
    elif isinstance(command, SetVcpuDirtyLimit):
        assert loop.vcpu_limit is not None, "refused without dirty rings"
        loop.vcpu_limit.set_limit(command.mib_per_s, command.vcpu)
        if not loop.vcpu_limit.in_service:
            periodic.dirty_limit_cancelled(loop)
    elif not isinstance(command, MigrateContinue) and not loop.guest_stopped:
        switchover.suspend(loop, command.reason)
