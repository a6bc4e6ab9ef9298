"""What a run found: frozen, and the same bytes for the same scenario and seed on any machine (no wall clock, no RSS).

JSON `format` history: 1 the first.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

import msgspec
from msgspec import Struct, field

from migsim.scenario import Scenario

__all__ = [
    "FORMAT", "DirtyRate", "DowntimePart", "Progress", "Result", "Round", "check_writable", "from_json", "to_json",
    "write_json", "write_whole",
]  # fmt: skip

FORMAT: Final = 1


class Round(Struct, frozen=True, kw_only=True, rename="kebab"):
    """From one bitmap sync to the next. Times are ns since the migrate command, sizes bytes."""

    sync: int  # QMP's dirty-sync-count
    start_ns: int
    duration_ns: int = 0
    dirty_pages: int  # marked in QEMU's bitmap right after the sync: leftover + newly dirty
    new_dirty_pages: int = 0  # of these, found by this sync
    sent_pages: int = 0  # pages that went with their data, with `compress` those that went packed as well
    zero_pages: int = 0  # pages that went as a zero record
    transferred_bytes: int = 0  # what `transferred` gained; setup's bytes come before the first sync, in no round
    bandwidth: float = 0.0  # bytes/s over the round
    threshold_bytes: int = 0  # QEMU's threshold_size when the round ended
    expected_downtime_ms: int = 0  # QEMU's estimate when the round ended
    cpu_throttle_percentage: int = 0
    stopped: bool = False  # the guest's vCPUs are stopped: the last round
    guest_throughput_share: float = 1.0  # of the writes the workload wanted to make, how many it made
    lock_waiting_share: float = 0.0  # of the running vCPUs' time, how much went into waiting for mmu_lock
    lock_write_held_ns: int = 0  # mmu_lock held for write by the migration thread
    longest_hold_ns: int = 0  # the longest of these holds
    soft_lockups: int = 0  # 1: a hold above 20 s, the watchdog would warn
    migration_thread_cpu_ns: int = 0
    vcpu_stalls: dict[str, int] = field(default_factory=dict)  # upper bound in us ("more": above 1 s) to stalls


class DowntimePart(Struct, frozen=True, kw_only=True, rename="kebab"):
    """One term of the blackout; the parts add up to it."""

    name: str
    duration_ns: int
    about: str = ""


class DirtyRate(Struct, frozen=True, kw_only=True, rename="kebab"):
    """One calc-dirty-rate: QEMU's answer, and what the guest really did meanwhile. Rates in MiB/s."""

    reply: dict[str, Any] = field(name="query-dirty-rate")
    at_ns: int  # of the workload's time
    elapsed_ns: int  # over which the rates are
    write_rate: float  # page writes, a page as often as it was written
    distinct_rate: float  # distinct pages
    cost: dict[str, Any] = field(default_factory=dict)  # what measuring did to host and guest


class Progress(Struct, frozen=True, kw_only=True):
    """How far a run is; what `simulation.run` hands to its `progress` callback between two windows."""

    now_ns: int
    phase: str  # MigrationStatus
    sync: int
    remaining_bytes: int
    total_bytes: int
    rounds: tuple[Round, ...] = ()  # the last one may still be going on
    time_limit_ns: int | None = None  # when the run is called off
    downtime_limit_ms: int = 0  # in force


class Result(Struct, frozen=True, kw_only=True, rename="kebab"):
    """Outcome of one run. `migration` is query-migrate's reply field for field, `verify` the ground truth's counts."""

    format: int = FORMAT
    verdict: str  # one sentence, the limiting term first
    converged: bool
    interrupted: bool = False
    scenario: Scenario
    seed: int
    migration: dict[str, Any] = field(default_factory=dict)
    rounds: tuple[Round, ...] = ()
    downtime: tuple[DowntimePart, ...] = ()
    events: tuple[dict[str, Any], ...] = ()  # QMP's, of source and destination, with the capability `events`
    kvm: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    verify: dict[str, Any] = field(default_factory=dict)
    destination: dict[str, Any] = field(default_factory=dict)  # its query-migrate, with postcopy-blocktime
    file: dict[str, Any] = field(default_factory=dict)  # of a migration to one: its size, and where blocks lie
    dirty_rate: tuple[DirtyRate, ...] = ()
    # as query-vcpu-dirty-limit answered at the end of dirty-limit's last period
    vcpu_dirty_limit: tuple[dict[str, int], ...] = field(default=(), name="query-vcpu-dirty-limit")

    @property
    def exit_code(self) -> int:
        """3 a page was lost, 130 interrupted, 0 converged, 1 not."""
        if self.verify.get("lost-pages", 0):
            return 3
        if self.interrupted:
            return 130
        return 0 if self.converged else 1


def to_json(result: Result) -> bytes:
    """The result as indented JSON with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def from_json(text: bytes) -> Result:
    """A result read back. Raises msgspec.ValidationError where the text is not one of this format."""
    return msgspec.json.decode(text, type=Result)


def check_writable(path: str) -> None:
    """Raises OSError if `write_whole` could not put a file at `path`; leaves nothing behind."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(21, "is a directory", path)
    if _written_in_place(target):
        if not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied", path)
        return
    target = Path(os.path.realpath(target))
    with NamedTemporaryFile(dir=target.parent, prefix=f".{target.name[:64]}."):
        pass


def write_json(result: Result, path: str) -> None:
    """`write_whole` of `to_json`. Raises OSError."""
    write_whole(to_json(result), path)


def write_whole(text: bytes, path: str) -> None:
    """Writes beside `path` and renames: a reader sees the old file or the whole new one. Raises OSError.

    A symbolic link stays one: what it points to is replaced.
    """
    target = Path(path)
    if _written_in_place(target):
        target.write_bytes(text)
        return
    target = Path(os.path.realpath(target))
    with NamedTemporaryFile(dir=target.parent, prefix=f".{target.name[:64]}.", delete=False) as stream:
        try:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            os.replace(stream.name, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(stream.name)
            raise


def _written_in_place(target: Path) -> bool:
    """A FIFO or a device cannot be renamed over, nor may a name of the system's (/dev/fd/3, /dev/stdout) be."""
    systems = Path(os.path.realpath(target.parent)).parts[1:2] in (("dev",), ("proc",))
    return target.exists() and (systems or not target.is_file())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
