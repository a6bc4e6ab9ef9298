"""Run cases one after the other and say of each what came of it."""

from __future__ import annotations

import shlex
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from migsim.validate.backends import Backend
from migsim.validate.case import Case, Context
from migsim.validate.verdicts import CheckFailed, Outcome, Skipped, Status

Report = Callable[[Outcome], None]


@dataclass(frozen=True)
class Plan:
    """A case on a backend."""

    backend: Backend
    case: Case


def run_plans(plans: Iterable[Plan], *, seed: int, ops: int, report: Report) -> list[Outcome]:
    """Run everything; ``report`` hears of each outcome as it comes."""
    outcomes = []
    for plan in plans:
        outcome = run_case(plan.backend, plan.case, seed=seed, ops=ops)
        report(outcome)
        outcomes.append(outcome)
    return outcomes


def run_case(backend: Backend, case: Case, *, seed: int, ops: int) -> Outcome:
    """One case.  Its own seed follows from ``seed`` and its name, so that it repeats alone as it ran among others."""
    reason = unmet(backend, case)
    if reason:
        return Outcome(backend.name, case.suite, case.name, "skipped", reason)
    own_seed = zlib.crc32(f"{seed}/{case.suite}/{case.name}".encode())
    context = Context(backend, own_seed, ops)
    started = time.perf_counter()
    status, reason, script = _attempt(case, context)
    return Outcome(
        backend.name,
        case.suite,
        case.name,
        status,
        reason or "; ".join(context.notes),
        context.bits,
        context.done,
        time.perf_counter() - started,
        repro_line(backend, case, seed, ops) if status == "failed" else "",
        script,
    )


def _attempt(case: Case, context: Context) -> tuple[Status, str, tuple[Any, ...]]:
    try:
        case.body(context)
    except Skipped as skipped:
        return "skipped", str(skipped), ()
    except CheckFailed as failure:
        return "failed", failure.sentence, failure.script
    except AssertionError as defect:  # the emulator's own assertions are checks too
        return "failed", f"assertion: {defect}", ()
    except OSError as refusal:
        return "failed", f"refused: {refusal}", ()
    if context.bits == 0:
        return "failed", "the case verified nothing", ()
    return "passed", "", ()


def unmet(backend: Backend, case: Case) -> str:
    """Why this backend cannot run the case, or nothing."""
    for feature in case.needs:
        if feature not in backend.shows:
            return backend.missing.get(feature) or backend.lacks.get(feature, f"no {feature}")
    return ""


def repro_line(backend: Backend, case: Case, seed: int, ops: int) -> str:
    """The command that repeats just this case."""
    words = ["migsim", "check", "--backend", backend.name, "--suite", f"{case.suite}/{case.name}", "--seed", str(seed)]
    return shlex.join([*words, "--ops", str(ops)])


def matching(plans: Sequence[Plan], pattern: str) -> list[Plan]:
    """Plans of a suite ``pattern``, or of the single case ``suite/case``."""
    return [plan for plan in plans if pattern in (plan.case.suite, f"{plan.case.suite}/{plan.case.name}")]
