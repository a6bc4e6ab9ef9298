"""access_tracking_perf_test: populate, write, read, then mark idle and touch again, by write and by read.

Every vCPU thread marks its own memory idle through page_idle, so the marking itself contends for mmu_lock.
"""

from __future__ import annotations

from typing import Final

from migsim.perf.memstress import Counts, Memstress
from migsim.perf.phases import parallel_phase
from migsim.perf.profile import HostProfile
from migsim.selftest.outcome import Outcome, Phase, seconds
from migsim.selftest.vm import RANDOM_SEED_LINE, guest_mode_lines, lock_mode, options_of

__all__ = ["access_tracking_perf_test"]

_MARK: Final = "Mark memory idle (page_idle)"


def access_tracking_perf_test(vm: Memstress, host: HostProfile) -> Outcome:
    """The seven phases in the test's order and under its names."""
    write, read = {"guest-write": vm.accesses}, {"guest-read": vm.accesses}
    steps = (
        ("Populating memory", vm.populate()),
        ("Writing to populated memory", write),
        ("Reading from populated memory", read),
        (_MARK, _mark_idle(vm)),
        ("Writing to idle memory", write | _young_again(vm)),
        (_MARK, _mark_idle(vm)),
        ("Reading from idle memory", read | _young_again(vm)),
    )
    mode = lock_mode(vm.rules)
    markers = 1 if vm.overlap else vm.vcpus  # of memory they share, vCPU 0 alone marks what is idle
    phases = tuple(
        Phase.of(name, counts, parallel_phase(counts, markers if name == _MARK else vm.vcpus, mode, host))
        for name, counts in steps
    )
    timed = (f"{p.name:<30}: {seconds(p.time_ns)}" for p in phases)
    lines = (RANDOM_SEED_LINE, "Using page_idle for aging", *guest_mode_lines(vm), "", *timed)
    return Outcome("access_tracking_perf_test", options_of(vm, host), phases, lines)


def _mark_idle(vm: Memstress) -> Counts:
    """Each page is marked and its leaf aged: under the lock, or without it (6.14 and later)."""
    counts = {"idle-mark-page": vm.pages}
    if vm.rules.lockless_aging:
        return counts | {"spte-age": vm.pages}
    return counts | {"locked-age": vm.pages}


def _young_again(vm: Memstress) -> Counts:
    """Hardware sets A; without A/D bits the leaf is not present and the first touch takes the fast path."""
    if vm.ad_bits:
        return {}
    leaves = vm.leaves_of(vm.populated.size)
    return {"fast-fault" if vm.rules.fast_faults else "present-fault": leaves}
