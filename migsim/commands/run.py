"""`migsim run`: look first (scenario, output path, memory), then migrate, then tell.

Order: everything that can be refused is refused before the run starts; --json is written before anything is printed, so
a closed pipe cannot cost the result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from migsim.commands.bounded import SEED_MAX, Bounded
from migsim.commands.look import compile_notice, refuse_unwritable, require_memory
from migsim.commands.output import destination, printing, say
from migsim.quantities import counted, in_words
from migsim.scenario import Scenario, ScenarioError, json_schema, load

if TYPE_CHECKING:
    from migsim.kvm.vm import TraceSink
    from migsim.result import Progress, Result

__all__ = ["FAULT_NAMES", "add_arguments", "run_run"]

FAULT_NAMES = ("clear-after-read", "no-final-sync", "no-flush", "no-protect")  # of validate.faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `migsim run`."""
    parser.add_argument("scenario", nargs="?", metavar="SCENARIO.toml", help="what to migrate; - is standard input")
    settings = "replace one value, e.g. guest.memory=2TiB or guest.workload.0.rate='40 GB/s'"
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="settings", help=settings)
    parser.add_argument("--seed", type=Bounded(0, SEED_MAX), default=0, metavar="N", help="of all randomness [0]")
    parser.add_argument("--threads", type=Bounded(1, 1024), metavar="N", help="of the emulator; changes no result")
    parser.add_argument("--json", type=destination, metavar="FILE", help="write the result there; - is standard output")
    trace = "KVM's tracepoints as JSON lines; for small guests"
    parser.add_argument("--trace", type=destination, metavar="FILE", help=trace)
    parser.add_argument("--no-verify", action="store_true", help="without the ground truth of every page")
    parser.add_argument("--fault", metavar="STEP", help=f"switch one safety step off: {', '.join(FAULT_NAMES)}")
    parser.add_argument("--quiet", action="store_true", help="print nothing; the exit code tells")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a scenario and stop")


def run_run(arguments: argparse.Namespace) -> int:
    """Runs the scenario. Exit code as in migsim.cli."""
    if arguments.schema:
        print(json.dumps(json_schema(), indent=1))
        return 0
    if arguments.scenario is None:
        raise ScenarioError("", "a scenario is needed: migsim run SCENARIO.toml")
    scenario = load(arguments.scenario, arguments.settings)
    if arguments.fault is not None and arguments.fault not in FAULT_NAMES:
        raise ScenarioError("--fault", f"must be one of {', '.join(FAULT_NAMES)}", value=arguments.fault)
    _refuse_outputs(arguments.json, arguments.trace)
    require_memory(scenario)
    if not arguments.quiet and (notice := compile_notice()) is not None:
        say(f"migsim: {notice}")
    result = _migrate(scenario, arguments)
    _deliver(result, arguments)
    if arguments.fault is not None and not arguments.quiet:
        _say_if_harmless(result, arguments.fault)
    return result.exit_code


def _refuse_outputs(result: str | None, trace: str | None) -> None:
    """Raises ScenarioError for an output that could not be written at the end of a long run."""
    if trace == "-":
        raise ScenarioError("--trace", "takes a file; standard output is the table's", value=trace)
    if result is not None and trace is not None and os.path.realpath(result) == os.path.realpath(trace):
        raise ScenarioError("", "--json and --trace cannot go to the same place", file=trace)
    for path in (result, trace):
        if path is not None and path != "-":
            refuse_unwritable(path)


def _migrate(scenario: Scenario, arguments: argparse.Namespace) -> Result:
    from migsim.result import Result
    from migsim.terminal import ProgressBar

    last: list[Progress] = []
    with ProgressBar(enabled=not arguments.quiet and sys.stderr.isatty()) as bar:

        def progress(now: Progress) -> None:
            last[:] = [now]
            bar.update(now)

        try:
            from migsim import simulation  # within the try: loading and compiling it takes a while

            faulty = _faulty(scenario, arguments.fault)
            if arguments.trace is not None:
                simulation.refuse_page_at_a_time(scenario, traced=True)  # before the file is opened
            with _tracepoints(arguments.trace) as trace:
                return simulation.run(
                    scenario,
                    seed=arguments.seed,
                    threads=arguments.threads,
                    verify=not arguments.no_verify,
                    progress=progress,
                    trace=trace,
                    **faulty,
                )
        except KeyboardInterrupt:
            rounds = last[0].rounds if last else ()
            return Result(
                verdict=f"Interrupted after {counted(len(rounds), 'round')}; nothing is known about the rest.",
                converged=False,
                interrupted=True,
                scenario=scenario,
                seed=arguments.seed,
                rounds=rounds,
            )


@contextmanager
def _tracepoints(path: str | None) -> Iterator[TraceSink | None]:
    """Where KVM's tracepoints go: one JSON object a line."""
    if path is None:
        yield None
        return
    from migsim.kvm.trace import JsonLines

    try:
        with open(path, "w", encoding="utf-8") as out:
            yield JsonLines(out)
    except OSError as error:
        raise ScenarioError("", f"cannot write the trace: {error.strerror}", file=path) from None


def _faulty(scenario: Scenario, name: str | None) -> dict[str, Any]:
    """A run with one step switched off goes page at a time, which is for small guests."""
    if name is None:
        return {}
    from migsim.validate.faults import FAULTS, MEMORY_MAX

    if scenario.guest.memory > MEMORY_MAX:
        problem = f"--fault runs page at a time, for guests of up to {in_words(MEMORY_MAX, 'size')}"
        raise ScenarioError("guest.memory", problem, value=in_words(scenario.guest.memory, "size"))
    return {"page_at_a_time": True, "fault": FAULTS[name]}


def _say_if_harmless(result: Result, name: str) -> None:
    """A fault in a run that lost nothing all the same is not told apart from no fault otherwise."""
    from migsim.validate.faults import CHANGED_NOTHING

    if result.converged and result.verify and not result.verify["lost-pages"]:
        say(f"migsim: the fault changed nothing: {CHANGED_NOTHING[name]}")


def _deliver(result: Result, arguments: argparse.Namespace) -> None:
    from migsim.result import to_json, write_json
    from migsim.terminal import summary

    in_file = arguments.json not in (None, "-")
    try:
        if in_file:
            write_json(result, arguments.json)
    except OSError as error:
        raise ScenarioError("", f"cannot write the result: {error.strerror}", file=arguments.json) from None
    finally:  # a file that could not be written does not cost what is printed
        with printing(delivered=in_file):
            if arguments.json == "-":
                sys.stdout.buffer.write(to_json(result))
                sys.stdout.buffer.flush()
            if not arguments.quiet:
                (say if arguments.json == "-" else print)(summary(result))  # stdout is the JSON's alone
