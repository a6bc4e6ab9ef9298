"""What all the selftests share: the lock mode of a rule set, the options block of the JSON, the opening lines."""

from __future__ import annotations

from typing import Any, Final

from migsim.perf.memstress import ADDRESS_BITS, BACKING_LEVELS, Memstress
from migsim.perf.phases import LockMode
from migsim.perf.profile import HostProfile
from migsim.perf.rules import Rules, default_kernel
from migsim.units import PAGE_SIZE

__all__ = ["RANDOM_SEED_LINE", "guest_mode_lines", "lock_mode", "options_of"]

#: The first thing today's tests print: random() of the C library, which nobody has seeded.
RANDOM_SEED_LINE: Final = "Random seed: 0x6b8b4567"


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
        "random-access": vm.random_access,
        "write-percent": vm.write_percent,
        "manual-dirty-log-protect": vm.manual,
        "pml": vm.pml,
        "ad-bits": vm.ad_bits,
        "eager-page-split": vm.eager_page_split,
    }


def guest_mode_lines(vm: Memstress, *, seed: int | None = None) -> tuple[str, ...]:
    """The lines every memstress test opens with; its memory lies at the top of the guest's physical space."""
    backing = BACKING_LEVELS[vm.backing]
    gpa = ((1 << ADDRESS_BITS) - (vm.pages + 1) * PAGE_SIZE) // backing * backing
    seeded = () if seed is None else (f"Random seed: {seed:#x}",)
    return (
        "Testing guest mode: PA-bits:ANY, VA-bits:48,  4K pages",
        *seeded,
        f"guest physical test memory: [{gpa:#x}, {gpa + vm.pages * PAGE_SIZE:#x})",
    )
