"""Policies: arguments of the migration loop, one file each. `protocol` says what they see and what they may answer."""

from __future__ import annotations

from migsim.migration.policies.auto_converge import AutoConverge, DirtyTrigger, duty
from migsim.migration.policies.cloud_hypervisor import CloudHypervisor
from migsim.migration.policies.dirty_limit import DirtyLimit, throttled_rate
from migsim.migration.policies.kubevirt import Kubevirt
from migsim.migration.policies.libvirt_timeout import LibvirtTimeout
from migsim.migration.policies.nova import Nova
from migsim.migration.policies.ovirt import Ovirt
from migsim.migration.policies.postcopy_after import PostcopyAfter
from migsim.migration.policies.protocol import (
    Cancel,
    Command,
    GuestThrottle,
    MigrateContinue,
    NoPlatform,
    NoThrottle,
    Period,
    Platform,
    Sample,
    SetParameters,
    StartPostcopy,
    StopGuest,
    VcpuDirtyRate,
)  # fmt: skip

__all__ = [
    "AutoConverge", "Cancel", "CloudHypervisor", "Command", "DirtyLimit", "DirtyTrigger", "GuestThrottle", "Kubevirt",
    "LibvirtTimeout", "MigrateContinue", "NoPlatform", "NoThrottle", "Nova", "Ovirt", "Period", "Platform",
    "PostcopyAfter", "Sample", "SetParameters", "StartPostcopy", "StopGuest", "VcpuDirtyRate", "duty",
    "throttled_rate",
]  # fmt: skip
