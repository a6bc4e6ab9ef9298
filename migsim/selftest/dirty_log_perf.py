"""dirty_log_perf_test: populate, enable logging, rounds of {dirty, get, clear}, disable; each phase timed."""

from __future__ import annotations

from typing import Any

from migsim.perf.memstress import Counts, Leaves, Memstress
from migsim.perf.phases import parallel_phase, thread_phase
from migsim.perf.profile import HostProfile
from migsim.selftest.outcome import Outcome, Phase, seconds
from migsim.selftest.vm import RANDOM_SEED_LINE, guest_mode_lines, lock_mode, options_of

__all__ = ["dirty_log_perf_test"]


def dirty_log_perf_test(vm: Memstress, host: HostProfile, *, iterations: int = 2, seed: int = 1) -> Outcome:
    """The test's phases in its own order. ValueError for what it asserts: two iterations, slots that divide evenly."""
    if iterations < 2:
        raise ValueError(f"the test should have at least two iterations, not {iterations}")
    if vm.pages % vm.slots:
        raise ValueError(f"guest memory of {vm.pages} pages cannot be evenly divided into {vm.slots} slots")
    run = _Run(vm, host)
    run.vcpus("populate memory", vm.populate())
    counts, leaves = vm.enable()
    run.thread("enabling dirty logging", counts)
    for iteration in range(1, iterations + 1):
        leaves = _round(run, leaves, iteration)
    run.thread("disabling dirty logging", vm.disable(leaves))
    options: dict[str, Any] = {**options_of(vm, host), "iterations": iterations, "random-seed": seed}
    return Outcome("dirty_log_perf_test", options, tuple(run.phases), run.lines(iterations, seed))


def _round(run: _Run, leaves: Leaves, iteration: int) -> Leaves:
    counts, leaves = run.vm.dirty(leaves)
    run.vcpus(f"iteration {iteration} dirty memory", counts)
    counts, leaves = run.vm.get(leaves)
    run.thread(f"iteration {iteration} get dirty log", counts)
    if run.vm.manual:
        counts, leaves = run.vm.clear(leaves, first=iteration == 1)
        run.thread(f"iteration {iteration} clear dirty log", counts)
    return leaves


class _Run:
    """Collects the phases of one run."""

    def __init__(self, vm: Memstress, host: HostProfile) -> None:
        self.vm, self.host = vm, host
        self.phases: list[Phase] = []

    def vcpus(self, name: str, counts: Counts) -> None:
        time = parallel_phase(counts, self.vm.vcpus, lock_mode(self.vm.rules), self.host)
        self.phases.append(Phase.of(name, counts, time))

    def thread(self, name: str, counts: Counts) -> None:
        self.phases.append(Phase.of(name, counts, thread_phase(counts, self.host)))

    def lines(self, iterations: int, seed: int) -> tuple[str, ...]:
        lines = [RANDOM_SEED_LINE, f"Test iterations: {iterations}", *guest_mode_lines(self.vm, seed=seed)]
        for p in self.phases:
            lines.append(f"{p.name[0].upper()}{p.name[1:]} time: {seconds(p.time_ns)}")
            lines += [""] * p.name.startswith("enabling")
        for verb in ("get", "clear") if self.vm.manual else ("get",):
            total = sum(p.time_ns for p in self.phases if p.name.endswith(f"{verb} dirty log"))
            lines.append(
                f"{verb.capitalize()} dirty log over {iterations} iterations took {seconds(total)}. "
                f"(Avg {seconds(total // iterations)}/iteration)"
            )
        return tuple(lines)
