"""Every suite, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from migsim.validate.backends import Backend
from migsim.validate.case import Case
from migsim.validate.runner import Plan
from migsim.validate.suites import (
    access_tracking,
    differential,
    dirty_log,
    dirty_ring,
    errors,
    huge,
    memslots,
    mmu_stress,
    nested,
    nx_huge_pages,
    page_splitting,
    races,
    random,
    vmm,
)

Cases = Callable[[Backend], Iterator[Case]]

SUITES: tuple[Cases, ...] = (
    errors.cases,
    random.cases,
    memslots.cases,
    races.cases,
    vmm.cases,
    page_splitting.cases,
    nx_huge_pages.cases,
    access_tracking.cases,
    nested.cases,
    mmu_stress.cases,
    huge.cases,
    dirty_ring.cases,
    dirty_log.cases,
)


def all_plans(backends: Sequence[Backend]) -> Iterator[Plan]:
    """Every case of every suite on every backend; with emulator and host, the comparison of the two at the end."""
    for backend in backends:
        for cases in SUITES:
            yield from (Plan(backend, case) for case in cases(backend))
    by_name = {backend.name: backend for backend in backends}
    if {"emulated", "host"} <= by_name.keys():
        for case in differential.cases(by_name["emulated"], by_name["host"]):
            yield Plan(Backend("all", by_name["host"].make, frozenset()), case)


def suite_names() -> list[str]:
    """The names ``--suite`` takes."""
    from migsim.validate.backends import emulated

    backend = emulated()
    cases = [case for suite in SUITES for case in suite(backend)]
    return [*dict.fromkeys(case.suite for case in cases), "differential"]
