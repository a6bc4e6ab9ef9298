"""What all the selftests share: the lock mode of a rule set, the options block of the JSON, the opening lines."""

from __future__ import annotations

from typing import Any

from migsim.perf.memstress import Memstress
from migsim.perf.phases import LockMode
from migsim.perf.profile import HostProfile
from migsim.perf.rules import Rules, default_kernel
from migsim.units import PAGE_SIZE

__all__ = ["guest_mode_lines", "lock_mode", "options_of"]

# Memstress memory ends at the top of the guest's physical space; the tests print its range. 48 bits is their x86 mode.
_TOP_GPA = 1 << 48


def lock_mode(rules: Rules) -> LockMode:
    """How a fault takes mmu_lock under `rules`."""
    if rules.shared_faults:
        return "read"
    return "exclusive-rmap" if rules.rmap else "exclusive"


def options_of(vm: Memstress, host: HostProfile) -> dict[str, Any]:
    """Every option of the guest under its command line name."""
    kernel = vm.kernel or default_kernel(vm.mmu)
    return {
        "mmu": vm.mmu,
        "kernel": f"{kernel[0]}.{kernel[1]}",
        "host": host.name,
        "vcpus": vm.vcpus,
        "memory-per-vcpu": vm.memory_per_vcpu,
        "backing": vm.backing,
        "overlap": vm.overlap,
        "slots": vm.slots,
        "write-percent": vm.write_percent,
        "manual-dirty-log-protect": vm.manual,
        "pml": vm.pml,
        "ad-bits": vm.ad_bits,
        "eager-page-split": vm.eager_page_split,
    }


def guest_mode_lines(vm: Memstress) -> tuple[str, ...]:
    """The lines every memstress test opens with."""
    size = vm.pages * PAGE_SIZE
    return (
        "Testing guest mode: PA-bits:ANY, VA-bits:48,  4K pages",
        f"guest physical test memory: [{_TOP_GPA - size:#x}, {_TOP_GPA:#x})",
    )
