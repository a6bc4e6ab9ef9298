"""The two seams through which anything but QEMU's loop itself influences a migration.

`GuestThrottle` sits inside QEMU: it is asked at the bitmap syncs that close a statistics period (at least 1 s, see
QEMU 7.2 and 10.0 migration/ram.c, migration_bitmap_sync) and slows the guest down. `Platform` sits above QEMU: it sees
what query-migrate shows, whenever it polls, and answers with QMP commands. Neither sees the guest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

__all__ = [
    "Cancel", "Command", "GuestThrottle", "MigrateContinue", "NoPlatform", "NoThrottle", "Period", "Platform",
    "Sample", "SetParameters", "SetVcpuDirtyLimit", "StartPostcopy", "StopGuest", "VcpuDirtyRate",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Period:
    """What QEMU counted between two throttle decisions. Bytes; `end_ns` since the migrate command."""

    dirty_bytes: int  # pages newly marked by the syncs of the period, times the page size
    transferred_bytes: int  # on all channels
    end_ns: int = 0


@dataclass(frozen=True, slots=True)
class VcpuDirtyRate:
    """What the dirty rings counted for one vCPU over a dirty-limit period, MiB/s, as QEMU rounds it."""

    vcpu: int
    mib_per_s: int


class GuestThrottle(Protocol):
    """How QEMU slows a guest that dirties memory faster than it can be sent."""

    @property
    def sync_interval_ns(self) -> int | None:
        """A sync is forced when none happened for so long (QEMU 9.2, auto-converge); None: never."""

    def after_period(self, period: Period) -> int | None:
        """The new cpu-throttle-percentage (1..99), or None to leave it as it is."""


class NoThrottle:
    """The guest runs at full speed whatever it dirties: QEMU's default."""

    sync_interval_ns: Final[int | None] = None

    def after_period(self, period: Period) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class Sample:
    """query-migrate at one moment, reduced to what platforms read. Times ns since the migrate command, sizes bytes."""

    now_ns: int
    status: str
    remaining_bytes: int
    total_bytes: int
    transferred_bytes: int
    dirty_sync_count: int
    expected_downtime_ms: int
    mbps: float = 0.0
    dirty_pages_rate: int = 0
    cpu_throttle_percentage: int = 0
    page_size: int = 4096


@dataclass(frozen=True, slots=True)
class SetParameters:
    """migrate-set-parameters."""

    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StartPostcopy:
    """migrate-start-postcopy."""


@dataclass(frozen=True, slots=True)
class StopGuest:
    """stop: the guest's vCPUs halt, so the next passes find nothing new (a suspended, non-live ending)."""

    reason: str = field(default="the platform", compare=False)  # whose doing it is, for the verdict


@dataclass(frozen=True, slots=True)
class Cancel:
    """migrate_cancel."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class MigrateContinue:
    """migrate-continue from pre-switchover."""


@dataclass(frozen=True, slots=True)
class SetVcpuDirtyLimit:
    """set-vcpu-dirty-limit: a quota for one vCPU, or for all; 0 takes it away."""

    mib_per_s: int
    vcpu: int | None = None


Command = SetParameters | SetVcpuDirtyLimit | StartPostcopy | StopGuest | Cancel | MigrateContinue


class Platform(Protocol):
    """A management layer above QEMU: polls, then sends commands."""

    @property
    def poll_interval_ns(self) -> int:
        """Between two looks at query-migrate."""

    def before_migrate(self) -> tuple[Command, ...]:
        """Sent just before the migrate command."""

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        """What it does about `sample`, in order."""


class NoPlatform:
    """Nobody watches: QEMU is left alone with its parameters."""

    poll_interval_ns: Final = 1_000_000_000

    def before_migrate(self) -> tuple[Command, ...]:
        return ()

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        return ()
