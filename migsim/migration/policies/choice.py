"""Which policies a set of capabilities and parameters selects, as QEMU chooses them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from migsim.migration.policies.auto_converge import SYNC_INTERVAL_NS, AutoConverge, DirtyTrigger
from migsim.migration.policies.protocol import GuestThrottle, NoThrottle

__all__ = ["MigrationOptions", "throttle_of"]


class MigrationOptions(Protocol):
    """The members of `[migration]` that decide it, under QMP's names with underscores."""

    @property
    def compat(self) -> str: ...
    @property
    def capabilities(self) -> Collection[str]: ...
    @property
    def throttle_trigger_threshold(self) -> int: ...
    @property
    def cpu_throttle_initial(self) -> int: ...
    @property
    def cpu_throttle_increment(self) -> int: ...
    @property
    def cpu_throttle_tailslow(self) -> bool: ...
    @property
    def max_cpu_throttle(self) -> int: ...


def throttle_of(options: MigrationOptions) -> GuestThrottle:
    """How QEMU slows this guest: auto-converge if asked for (with 9.2's forced sync in compat 10.0), else not."""
    if "auto-converge" not in options.capabilities:
        return NoThrottle()
    return AutoConverge(
        initial=options.cpu_throttle_initial,
        increment=options.cpu_throttle_increment,
        maximum=options.max_cpu_throttle,
        tailslow=options.cpu_throttle_tailslow,
        trigger=DirtyTrigger(options.throttle_trigger_threshold),
        sync_interval_ns=None if options.compat == "7.2" else SYNC_INTERVAL_NS,
    )
