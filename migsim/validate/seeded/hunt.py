"""``migsim check --seeded-bugs``: put each bug in, run the checks until one objects, say which and after how long."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from migsim.commands.output import printing
from migsim.scenario.errors import ScenarioError, nearest
from migsim.validate.backends import Backend, emulated
from migsim.validate.random_scripts import HUGE_PAGES, preempt, replay_audited
from migsim.validate.registry import all_plans
from migsim.validate.rig import Rig
from migsim.validate.runner import Plan, matching, run_case
from migsim.validate.script import Step
from migsim.validate.seeded import in_log, in_mmu, in_vmm
from migsim.validate.seeded.bug import BUGS, Bug
from migsim.validate.shrink import shrink
from migsim.validate.verdicts import Outcome

CATALOGUES = (in_log, in_mmu, in_vmm)
OPS_OF_A_HUNT = 60_000
TOO_LONG = ("huge",)  # suites that a hunt does not try of its own accord


@dataclass(frozen=True)
class Catch:
    """What became of one bug: the outcome that objected (None: missed), and the operations done until then."""

    bug: Bug
    outcome: Outcome | None
    ops: int
    config: Mapping[str, Any] = field(default_factory=dict)


def with_bug(bug: Bug) -> tuple[Backend, ExitStack]:
    """The emulator with ``bug`` in every VM; the stack takes out again what was put in beside the VMs."""
    undo = ExitStack()
    installed: list[Any] = []

    def decorate(vm: Any) -> None:
        undo.close()  # the VM before this one is closed: shared steps are put back before they are replaced again
        bug.install(vm, undo)
        installed.append(vm)

    return emulated(decorate), undo


def hunt(bug: Bug, *, seed: int, ops: int) -> Catch:
    """Run the bug's own suites first, then all others, until one fails."""
    backend, undo = with_bug(bug)
    done = 0
    with undo:
        for plan in _in_order(bug, list(all_plans([backend]))):
            outcome = run_case(backend, plan.case, seed=seed, ops=ops)
            done += outcome.ops
            if outcome.status == "failed":
                return Catch(bug, outcome, done, getattr(plan.case.body, "keywords", {}).get("config", {}))
    return Catch(bug, None, done)


def _in_order(bug: Bug, plans: Sequence[Plan]) -> Iterator[Plan]:
    seen: set[str] = set()
    preferred = [plan for name in bug.suites for plan in matching(plans, name)]
    others = [plan for plan in plans if plan.case.suite not in TOO_LONG]
    for plan in (*preferred, *others):
        key = f"{plan.case.suite}/{plan.case.name}"
        if key not in seen:
            seen.add(key)
            yield plan


def shortest(catch: Catch) -> tuple[Step, ...]:
    """The failing script made short, with the bug in; the whole one where it does not fail when played alone."""
    assert catch.outcome is not None
    script = catch.outcome.script
    backend, undo = with_bug(catch.bug)

    def fails(script: Sequence[Step]) -> bool:
        with undo:
            rig = Rig(backend.make({**catch.config, "bulk": False}), level=HUGE_PAGES)
            preempt(rig.vm)
            try:
                return replay_audited(rig, script) is not None
            except (IndexError, KeyError, RuntimeError, ValueError):
                return False  # a step without what it needs: no script at all
            finally:
                rig.close()

    return shrink(script, fails) if script and fails(script) else script


def run_hunt(arguments: argparse.Namespace) -> int:
    """One line a bug; 0 if all are caught, 1 if one is missed. Raises ScenarioError for a bug that does not exist."""
    chosen = list(BUGS.values())
    if arguments.bug is not None:
        chosen = [bug for bug in chosen if bug.name == arguments.bug]
        if not chosen:
            raise ScenarioError("--bug", f"no such bug{nearest(arguments.bug, BUGS)}", value=arguments.bug)
    catches = list(hunts(chosen, arguments))
    missed = sum(catch.outcome is None for catch in catches)
    print(f"{len(chosen) - missed} of {len(chosen)} bugs caught")
    alarms = list(false_alarms(catches, seed=arguments.seed))
    for outcome in alarms:
        print(f"alarm without any bug: {outcome.suite}/{outcome.case}: {outcome.reason}")
    return 1 if missed or alarms else 0


def false_alarms(catches: Sequence[Catch], *, seed: int) -> Iterator[Outcome]:
    """The cases that caught something, once more without a bug, same seed and length: those that object even so."""
    names = {f"{catch.outcome.suite}/{catch.outcome.case}" for catch in catches if catch.outcome is not None}
    for plan in all_plans([emulated()]):
        if f"{plan.case.suite}/{plan.case.name}" in names:
            outcome = run_case(plan.backend, plan.case, seed=seed, ops=OPS_OF_A_HUNT)
            if outcome.status == "failed":
                yield outcome


def hunts(chosen: Iterable[Bug], arguments: argparse.Namespace) -> Iterator[Catch]:
    """Hunt and print."""
    for bug in chosen:
        catch = hunt(bug, seed=arguments.seed, ops=OPS_OF_A_HUNT)
        with printing(delivered=False):
            print(line(catch))
            if arguments.verbose and catch.outcome is not None:
                print(f"    {bug.about}\n    {catch.outcome.reason}")
                for step in shortest(catch):
                    print(f"      {step!r}")
        yield catch


def line(catch: Catch) -> str:
    """``caught|missed  name  commit  by which check  after how many operations``."""
    bug = catch.bug
    if catch.outcome is None:
        return f"missed  {bug.effect}  {bug.name}  {bug.commit}  by no check in {catch.ops} operations"
    by = f"{catch.outcome.suite}/{catch.outcome.case}"
    return f"caught  {bug.effect}  {bug.name}  {bug.commit}  by {by}  after {catch.ops} operations"
