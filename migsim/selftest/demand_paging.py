"""demand_paging_test: every vCPU touches its memory once, with or without userfaultfd."""

from __future__ import annotations

from typing import Any

from migsim.perf.memstress import Memstress
from migsim.perf.phases import parallel_phase
from migsim.perf.profile import HostProfile
from migsim.selftest.outcome import Outcome, Phase, seconds
from migsim.selftest.vm import RANDOM_SEED_LINE, guest_mode_lines, lock_mode, options_of

__all__ = ["demand_paging_test"]


def demand_paging_test(
    vm: Memstress, host: HostProfile, *, uffd: str = "none", uffd_delay_us: int = 0, single_uffd: bool = False,
    readers: int = 1,
) -> Outcome:  # fmt: skip
    """Time to populate the guest. uffd: none, MISSING or MINOR; uffd_delay_us: the handler's own delay a fault.

    A userfaultfd a vCPU, or one for all (single_uffd, and where vCPUs overlap), each with `readers` threads.
    ValueError for another uffd mode, or MINOR on memory that is not shared.
    """
    if uffd not in ("none", "MISSING", "MINOR") or uffd_delay_us < 0:
        raise ValueError(f"userfaultfd mode {uffd!r}: allowed are MISSING and MINOR, with a delay >= 0")
    if uffd == "MINOR" and not vm.backing.startswith("sh"):
        raise ValueError(f"userfaultfd mode MINOR needs shared memory, not {vm.backing}")
    counts, threads = vm.populate(), readers * (1 if single_uffd or vm.overlap else vm.vcpus)
    handled_ns = 0.0
    if uffd != "none":
        counts["uffd-fault"] = counts["host-fault"]
        counts["sleep-ns"] = counts["host-fault"] * uffd_delay_us * 1000
        handled_ns = counts["host-fault"] * (host.ns("uffd-handler") + uffd_delay_us * 1000)
    time = parallel_phase(counts, vm.vcpus, lock_mode(vm.rules), host)
    phase = Phase.of("demand paging", counts, time.no_faster_than(round(handled_ns / threads)))
    rate = vm.accesses / vm.vcpus / (phase.time_ns / 1e9)
    lines = (
        RANDOM_SEED_LINE,
        *guest_mode_lines(vm),
        "Finished creating vCPUs and starting uffd threads",
        "Started all vCPUs",
        "All vCPU threads joined",
        f"Total guest execution time:\t{seconds(phase.time_ns)}",
        f"Per-vcpu demand paging rate:\t{rate:f} pgs/sec/vcpu",
        f"Overall demand paging rate:\t{rate * vm.vcpus:f} pgs/sec",
    )
    options: dict[str, Any] = {
        **options_of(vm, host), "uffd": uffd, "uffd-delay-us": uffd_delay_us,
        "single-uffd": single_uffd or vm.overlap, "readers": readers,
    }  # fmt: skip
    return Outcome("demand_paging_test", options, (phase,), lines)
