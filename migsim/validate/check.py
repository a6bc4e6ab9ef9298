"""What ``migsim check`` does: choose backends and cases, run them, print the summary, write the reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from migsim.commands.look import refuse_unwritable
from migsim.commands.output import printing, say
from migsim.result import write_whole
from migsim.scenario import ScenarioError
from migsim.validate.backends import Backend, BadBackend, emulated, host, plugin
from migsim.validate.junit import junit
from migsim.validate.ktap import ktap
from migsim.validate.registry import all_plans, suite_names
from migsim.validate.runner import matching, run_plans
from migsim.validate.suites.differential import NOT_SHOWN
from migsim.validate.verdicts import Outcome

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
SCRIPT_SHOWN_MAX = 40  # steps


def run_suites(arguments: argparse.Namespace) -> int:
    """The whole command but for the seeded bugs; the exit code."""
    refuse_unwritable_reports(arguments)
    try:
        backends, sentences = choose_backends(arguments.backend)
    except BadBackend as error:
        say(f"migsim check: {error}")
        return EXIT_BAD_INPUT
    for sentence in sentences:
        say(f"migsim check: {sentence}")
    plans = list(all_plans(backends))
    if arguments.suite:
        plans = matching(plans, arguments.suite)
        if not plans and not sentences:
            say(f"migsim check: {no_such_suite(arguments.suite)}")
            return EXIT_BAD_INPUT
    if arguments.list:
        print("\n".join(f"{plan.backend.name}  {plan.case.suite}/{plan.case.name}" for plan in plans))
        return 0
    # A stdout that is full costs what is printed, not the answer, where that is in a report.
    delivered = any(path not in (None, "-") for path in (arguments.ktap, arguments.junit))
    printer = Printer(arguments.verbose, delivered=delivered)
    outcomes = run_plans(plans, seed=arguments.seed, ops=arguments.ops, report=printer.report)
    try:
        write_reports(arguments, outcomes)
    finally:  # a report that could not be written does not cost what is printed
        with printing(delivered=delivered):
            print_reports(arguments, outcomes)
            summary(outcomes)
    return exit_code(outcomes, sentences)


def refuse_unwritable_reports(arguments: argparse.Namespace) -> None:
    """Raises ScenarioError, before anything has run, for a report that could not be written after it."""
    for path in (arguments.ktap, arguments.junit):
        if path not in (None, "-"):
            refuse_unwritable(path)
    if arguments.ktap is not None and arguments.ktap == arguments.junit:
        raise ScenarioError("", "--ktap and --junit cannot go to the same place", file=arguments.ktap)
    if arguments.scripts is None:
        return
    try:
        Path(arguments.scripts).mkdir(parents=True, exist_ok=True)
        refuse_unwritable(str(Path(arguments.scripts) / "script"))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ScenarioError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ScenarioError("", f"scripts cannot be written there: {reason}", file=arguments.scripts) from None


def no_such_suite(name: str) -> str:
    """Why ``--suite`` found nothing."""
    if name.split("/")[0] == "differential":
        return "--suite differential compares two backends: it needs --backend all"
    return f"--suite {name}: no such suite; allowed: {', '.join(suite_names())}"


def choose_backends(name: str) -> tuple[list[Backend], list[str]]:
    """Backends by ``--backend``, and a sentence for each that was asked for and is not there."""
    from migsim.host_kvm.device import unavailable_reason

    if name == "emulated":
        return [emulated()], []
    if name not in ("host", "all"):
        return [plugin(name)], []
    backends = [emulated()] if name == "all" else []
    reason = unavailable_reason()
    if reason is not None:
        ran = "the emulator's suites still run" if name == "all" else "nothing ran"
        return backends, [f"the host cannot be checked: {reason}; {ran}"]
    real = host()
    still = "the other modes still run"
    return [*backends, real], [f"{text}; {still}" for text in real.missing.values()]


class Printer:
    """A failure as it happens; with ``verbose`` a line a case. Whoever stops reading does not stop the checks."""

    def __init__(self, verbose: bool, *, delivered: bool) -> None:
        self._verbose = verbose
        self._delivered = delivered

    def report(self, outcome: Outcome) -> None:
        with printing(delivered=self._delivered):
            if outcome.status == "failed":
                self._failure(outcome)
            elif self._verbose:
                detail = f": {outcome.reason}" if outcome.reason else ""
                print(f"{outcome.status:<8}{outcome.name} ({outcome.seconds:.2f} s){detail}")

    def _failure(self, outcome: Outcome) -> None:
        print(f"FAILED  {outcome.name}\n        {outcome.reason}\n        repeat: {outcome.repro}")
        if outcome.script:
            print(f"        {len(outcome.script)} steps; --scripts DIR writes them as Python and as C")
        if self._verbose and len(outcome.script) <= SCRIPT_SHOWN_MAX:
            print("\n".join(f"          {step!r}" for step in outcome.script))


def write_reports(arguments: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """KTAP, JUnit and the scripts of failures to their files, where asked for."""
    for path, text in ((arguments.ktap, ktap), (arguments.junit, junit)):
        if path not in (None, "-"):
            _write_report(text(outcomes), path)
    failures = [outcome for outcome in outcomes if outcome.script]
    if arguments.scripts and failures:
        from migsim.validate.print_script import write_scripts

        for outcome in failures:
            for written in write_scripts(Path(arguments.scripts), outcome.name, outcome.script):
                say(f"wrote {written}")


def print_reports(arguments: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """KTAP or JUnit to standard output, where asked for."""
    for path, text in ((arguments.ktap, ktap), (arguments.junit, junit)):
        if path == "-":
            sys.stdout.write(text(outcomes))


def _write_report(text: str, path: str) -> None:
    try:
        write_whole(text.encode(), path)
    except OSError as error:
        raise ScenarioError("", f"cannot write the report: {error.strerror}", file=path) from None


def summary(outcomes: Sequence[Outcome]) -> None:
    """Print totals a backend and every reason for a skip once."""
    for name in dict.fromkeys(outcome.backend for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.backend == name]
        count = {status: sum(o.status == status for o in mine) for status in ("passed", "failed", "skipped")}
        bits, ops = sum(o.bits for o in mine), sum(o.ops for o in mine)
        print(
            f"{name}: {count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped; "
            f"{bits} bits verified in {ops} operations, {sum(o.seconds for o in mine):.1f} s"
        )
        for reason in dict.fromkeys(o.reason for o in mine if o.status == "skipped"):
            print(f"  skipped {sum(o.reason == reason for o in mine if o.status == 'skipped')}: {reason}")
    if any(outcome.suite == "differential" for outcome in outcomes):
        print("not compared with the host, because it cannot be:")
        print("\n".join(f"  {line}" for line in NOT_SHOWN))
    if all(outcome.status == "skipped" for outcome in outcomes):
        print("nothing ran, so nothing was shown")


def exit_code(outcomes: Sequence[Outcome], sentences: Sequence[str]) -> int:
    """1 if anything failed, nothing passed, or a backend that was asked for is not there."""
    failed = any(outcome.status == "failed" for outcome in outcomes)
    ran = any(outcome.status == "passed" for outcome in outcomes)
    return EXIT_FAILED if failed or sentences or not ran else 0
