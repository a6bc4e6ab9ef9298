"""Known bugs are caught, the catalogue is in order, and nothing is left of a bug after its hunt."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest

from migsim.kvm import page_fault, tdp_iter
from migsim.validate.auditor import Auditor
from migsim.validate.backends import emulated
from migsim.validate.rig import Rig
from migsim.validate.script import Answer, Cap, CreateVcpu, Get, Harvest, Region, Reset, Run, Step, pages
from migsim.validate.seeded.bug import BUGS, swap_shared
from migsim.validate.seeded.hunt import hunt, line, shortest
from migsim.validate.verdicts import CheckFailed

QUICK = (
    "clear-unbounded", "clear-refuses-the-tail", "clear-takes-whole-words", "atomic-not-marked", "log-flush-forgotten",
    "pml-newest-first", "pml-runs-for-l2", "pml-toggled-in-l2s-vmcs", "ring-flag-before-fields", "ring-offset-wraps",
    "ring-reset-ignores-signals", "ring-soft-limit-ignored", "yield-without-progress", "yield-advances",
    "fault-zaps-huge-without-flush", "fault-ignores-invalid-root", "mmio-wrap-in-one-space", "mmio-stamped-in-flux",
    "read-only-huge-page-stays", "write-protect-skips-protected", "nx-recovery-ignores-flush", "wrprot-only-root-by-d",
    "vmm-clears-what-it-never-saw", "vmm-reads-before-it-clears", "vmm-snapshot-shifts-slots",
)  # fmt: skip
GPA = 1 << 24


@pytest.mark.parametrize("name", QUICK)
def test_a_seeded_bug_is_caught_by_the_check_that_is_meant_for_it(name: str) -> None:
    bug = BUGS[name]
    catch = hunt(bug, seed=0, ops=20_000)
    assert catch.outcome is not None, f"{name} is missed"
    meant = catch.outcome.suite, f"{catch.outcome.suite}/{catch.outcome.case}"
    assert any(suite in meant for suite in bug.suites), f"{name} was first caught by {meant[1]}"
    assert line(catch).startswith("caught  ") and bug.commit in line(catch)


def test_the_catalogue_has_thirty_bugs_of_every_dangerous_kind_with_sources() -> None:
    dangerous = [bug for bug in BUGS.values() if bug.effect in "LSEOKH"]
    assert len(dangerous) >= 30
    assert {bug.effect for bug in dangerous} == set("LSEOKH")
    with_source = [bug for bug in dangerous if not bug.commit.startswith("rule of ")]
    assert len(with_source) >= 30
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in BUGS)


def test_a_caught_random_script_is_shrunk() -> None:
    catch = hunt(BUGS["log-flush-forgotten"], seed=0, ops=20_000)
    assert catch.outcome is not None
    assert len(shortest(catch)) <= 12 < len(catch.outcome.script)


def test_after_a_hunt_shared_code_is_what_it_was() -> None:
    before = tdp_iter.TdpIter.next, tdp_iter.TdpIter.restart, page_fault.is_stale
    for name in ("yield-advances", "yield-without-progress", "fault-ignores-invalid-root"):
        hunt(BUGS[name], seed=0, ops=2000)
    assert (tdp_iter.TdpIter.next, tdp_iter.TdpIter.restart, page_fault.is_stale) == before


def test_a_shared_step_is_put_back_even_if_the_hunt_fails() -> None:
    class Owner:
        def act(self) -> int:
            return 1

    with pytest.raises(ZeroDivisionError), ExitStack() as undo:
        swap_shared(Owner, "act", lambda act: lambda self: act(self) / 0, undo)
        Owner().act()
    assert Owner().act() == 1


# -- the auditor itself: it objects to each kind of broken promise --------------------------------------------------

START: tuple[Step, ...] = (CreateVcpu(0), Region(1, 1, GPA, pages(100)))
RAN = Answer(None, (5, 1, ()))


def audited(*pairs: tuple[Step, Answer], ring: bool = False) -> None:
    rig = Rig(emulated().make({}))
    try:
        auditor = Auditor(rig.player)
        opening = (Cap(192, 0, (16384,)), *START) if ring else START
        for step in opening:
            auditor.watch(step, Answer(None, 0))
        for step, answer in pairs:
            auditor.watch(step, answer)
    finally:
        rig.close()


STORE = (Run(0, (("w", GPA + pages(70), 1),)), RAN)


def test_the_auditor_accepts_the_truth() -> None:
    audited(STORE, (Get(1, 100), Answer(None, (0, 1 << 6))), (Get(1, 100), Answer(None, (0, 0))))


@pytest.mark.parametrize(
    ("sentence", "pairs", "ring"),
    [
        ("lost page: slot 0x1 page 70", (STORE, (Get(1, 100), Answer(None, (0, 0)))), False),
        ("over-report: slot 0x1 page 0", (STORE, (Get(1, 100), Answer(None, (1, 1 << 6)))), False),
        ("bit 100 is set", ((Get(1, 100), Answer(None, (0, 1 << 36))),), False),
        ("loads 2", (STORE, (Run(0, (("r", GPA + pages(70), 0),)), Answer(None, (5, 1, (2,))))), False),
        ("left KVM as MMIO", ((Run(0, (("w", GPA, 1),)), Answer(None, (6, 0, ()))),), False),
        ("although no slot is there", ((Run(0, (("w", 0, 1),)), RAN),), False),
        ("was refused with EFAULT", ((Run(0, (("w", GPA, 1),)), Answer("EFAULT")),), False),
        ("no entry names it", (STORE, (Harvest(0), Answer(None, ())), (Reset(), Answer(None, 0))), True),
        ("names page 100", (STORE, (Harvest(0), Answer(None, ((1, 100),)))), True),
    ],
)
def test_the_auditor_objects(sentence: str, pairs: tuple[tuple[Step, Answer], ...], ring: bool) -> None:
    with pytest.raises(CheckFailed, match=re.escape(sentence)):
        audited(*pairs, ring=ring)
