"""Which policies a set of capabilities and parameters selects, as QEMU chooses them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from migsim.migration.policies.auto_converge import SYNC_INTERVAL_NS, AutoConverge, DirtyTrigger
from migsim.migration.policies.cloud_hypervisor import CloudHypervisor
from migsim.migration.policies.dirty_limit import DirtyLimit
from migsim.migration.policies.kubevirt import Kubevirt
from migsim.migration.policies.libvirt_timeout import LibvirtTimeout
from migsim.migration.policies.nova import Nova
from migsim.migration.policies.ovirt import Ovirt
from migsim.migration.policies.postcopy_after import PostcopyAfter
from migsim.migration.policies.protocol import GuestThrottle, NoPlatform, NoThrottle, Platform

__all__ = ["MigrationOptions", "platform_of", "throttle_of"]


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
    @property
    def vcpu_dirty_limit(self) -> int: ...
    @property
    def x_vcpu_dirty_limit_period(self) -> int: ...
    @property
    def platform(self) -> str: ...
    @property
    def platform_timeout(self) -> int | None: ...
    @property
    def postcopy_after(self) -> int | None: ...
    @property
    def postcopy_after_passes(self) -> int | None: ...


def throttle_of(options: MigrationOptions, vcpus: int = 1, ring_size: int = 0) -> GuestThrottle:
    """How QEMU slows this guest: auto-converge (with 9.2's forced sync in compat 10.0), dirty-limit, or not at all."""
    if "dirty-limit" in options.capabilities:
        trigger = DirtyTrigger(options.throttle_trigger_threshold)
        period_ms = options.x_vcpu_dirty_limit_period
        return DirtyLimit(vcpus, ring_size, options.vcpu_dirty_limit, period_ms, trigger)
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


def platform_of(options: MigrationOptions, memory_bytes: int) -> Platform:
    """The management layer a scenario names, with its published defaults."""
    if options.postcopy_after is not None or options.postcopy_after_passes is not None:
        return PostcopyAfter(options.postcopy_after, options.postcopy_after_passes)
    postcopy = "postcopy-ram" in options.capabilities
    choices: dict[str, Callable[[], Platform]] = {
        "none": NoPlatform,
        "nova": lambda: Nova(memory_bytes, permit_post_copy=postcopy),
        "kubevirt": lambda: Kubevirt(memory_bytes, allow_post_copy=postcopy),
        "kubevirt-ramp": lambda: Kubevirt(memory_bytes, allow_post_copy=postcopy, ramp=True),
        "cloud-hypervisor": CloudHypervisor,
        "ovirt-minimal-downtime": lambda: Ovirt("minimal-downtime"),
        "ovirt-suspend-workload": lambda: Ovirt("suspend-workload"),
        "ovirt-post-copy": lambda: Ovirt("post-copy"),
        "libvirt-timeout-suspend": lambda: LibvirtTimeout(options.platform_timeout or 0, "suspend"),
        "libvirt-timeout-postcopy": lambda: LibvirtTimeout(options.platform_timeout or 0, "postcopy"),
    }
    return choices[options.platform]()
