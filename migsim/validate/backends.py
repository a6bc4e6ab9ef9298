"""What the suites can be run against, and what each backend is able to show."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from migsim.kvm import uapi
from migsim.validate.door import VmDoor

# What a case may need of a backend.
DIRTY_LOG, CLEAR_LOG, DIRTY_RING = "dirty-log", "clear-log", "dirty-ring"
ERRNO = "errno"  # refuses what KVM refuses
CONFIG = "config"  # MMU, vendor, PML, SMM can be chosen
MMU = "mmu"  # SPTEs, TLBs and page statistics can be looked into
PARALLEL = "parallel"  # vCPUs run beside the ioctls
SECOND_SPACE = "second-address-space"

MakeVm = Callable[[Mapping[str, Any]], VmDoor]


class BadBackend(ValueError):
    """A --backend that does not exist; the text is one sentence."""


@dataclass(frozen=True)
class Backend:
    """``make(config)`` opens a VM; ``shows``: the features above; ``lacks``: for the others, why.

    ``missing``: features that this kind of backend has but this one does not (an old kernel), a reason to say no.
    """

    name: str
    make: MakeVm
    shows: frozenset[str]
    lacks: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[tuple[str, Mapping[str, Any]], ...] = (("", {}),)
    """Rows over which mode suites run: (name, config)."""


EMULATED_VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("tdp,PML", {}),
    ("tdp,W", {"pml": False}),
    ("tdp,AMD", {"vendor": "amd"}),
    ("tdp-5.10,PML", {"mmu": "tdp-5.10"}),
    ("tdp-5.10,W", {"mmu": "tdp-5.10", "pml": False}),
    ("shadow,PML", {"mmu": "shadow"}),
    ("shadow,W", {"mmu": "shadow", "pml": False}),
    ("instruction-emulation", {"instruction_emulation": True, "vendor": "amd"}),
)
_EVERYTHING = frozenset({DIRTY_LOG, CLEAR_LOG, DIRTY_RING, ERRNO, CONFIG, MMU, SECOND_SPACE})


def emulated(decorate: Callable[[Any], None] | None = None) -> Backend:
    """The emulator.  ``decorate`` gets every VM before anybody uses it (a seeded bug)."""
    from migsim.kvm.config import VmConfig
    from migsim.kvm.vm import Vm

    def make(config: Mapping[str, Any]) -> VmDoor:
        options = dict(config)
        bulk = bool(options.pop("bulk", True))
        vm = Vm(VmConfig(**options), bulk=bulk)
        if decorate is not None:
            decorate(vm)
        return vm

    lacks = {PARALLEL: "the emulator has one thread; interleavings are played at its race points instead"}
    return Backend("emulated", make, _EVERYTHING, lacks, variants=EMULATED_VARIANTS)


def host() -> Backend:
    """The real KVM, probed for what it offers.  Raises HostUnavailable."""
    from migsim.host_kvm import HostVm

    with HostVm() as vm:
        offers = {
            CLEAR_LOG: vm.check_extension(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) > 0,
            DIRTY_RING: vm.check_extension(uapi.KVM_CAP_DIRTY_LOG_RING) > 0,
        }
        spaces = vm.check_extension(uapi.KVM_CAP_MULTI_ADDRESS_SPACE)
    shows = {DIRTY_LOG, ERRNO, PARALLEL} | {name for name, offered in offers.items() if offered}
    missing = {
        CLEAR_LOG: "this kernel has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.1)",
        DIRTY_RING: "this kernel has no KVM_CAP_DIRTY_LOG_RING (Linux 5.11)",
    }
    lacks = {
        CONFIG: "a host has the MMU, vendor and PML it has",
        MMU: "KVM shows no SPTE or TLB entry to user space",
        SECOND_SPACE: "this KVM has one address space" if spaces < 2 else "the guest here never enters SMM",
    }
    return Backend(
        "host",
        lambda config: HostVm(),
        frozenset(shows),
        lacks,
        {name: text for name, text in missing.items() if name not in shows},
    )


def plugin(name: str) -> Backend:
    """``module:Class``: somebody's dirty bitmap, or a whole VM with the door's methods.  Raises BadBackend."""
    from migsim.validate.bitmap_vm import BitmapVm, is_dirty_bitmap

    made = _load_class(name)
    if is_dirty_bitmap(made):
        return Backend(
            name,
            lambda config: BitmapVm(made),
            frozenset({DIRTY_LOG}),
            dict.fromkeys(_EVERYTHING | {PARALLEL}, "a dirty bitmap is no KVM"),
        )
    required = ("set_user_memory_region", "get_dirty_log", "create_vcpu", "alloc_memory", "host_read")
    absent = [method for method in required if not hasattr(made, method)]
    if absent:
        raise BadBackend(
            f"--backend {name}: it has neither a bitmap's mark_dirty, dirty_at and get_and_reset nor a VM's {absent[0]}"
        )
    declared = frozenset(getattr(made, "SHOWS", (DIRTY_LOG,)))
    return Backend(
        name,
        lambda config: made(),
        declared,
        dict.fromkeys((_EVERYTHING | {PARALLEL}) - declared, f"{made.__name__}.SHOWS does not name it"),
    )


def _load_class(name: str) -> Any:
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise BadBackend(f"--backend {name}: 'emulated', 'host', 'all' or module:Class is allowed")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the class is usually a file of the project one stands in
    try:
        return getattr(import_module(module_name), class_name)
    except ImportError as error:
        raise BadBackend(f"--backend {name}: {error}") from None
    except AttributeError:
        raise BadBackend(f"--backend {name}: module {module_name} has no {class_name}") from None
