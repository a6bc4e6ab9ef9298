"""`migsim bench`: measure what was asked for, print each figure beside its target, write the JSON.

With --host it measures this machine's costs instead and writes a host profile (migsim.host_bench).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from migsim.commands.output import destination
from migsim.scenario import ScenarioError

if TYPE_CHECKING:
    from migsim.bench.table import Measured, Report, Row, Spec

__all__ = ["add_arguments", "measure", "run_bench"]

Measure = Callable[[], Mapping[str, "Measured | str"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `migsim bench`."""
    parser.add_argument("--json", type=destination, metavar="FILE", help="write the rows there; - is standard output")
    only = "measure this row or group alone (again for more); --list names them"
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help=only)
    parser.add_argument("--quick", action="store_true", help="small guests and few repetitions: seconds, not minutes")
    parser.add_argument("--corpus", metavar="DIR", help="recordings of real QEMU migrations to hold against")
    parser.add_argument("--list", action="store_true", help="name the rows and their targets, and stop")
    host = "instead: measure this machine's costs and write them as a host profile (default: standard output)"
    parser.add_argument("--host", nargs="?", const="-", metavar="FILE", help=host)


def run_bench(arguments: argparse.Namespace) -> int:
    """Prints the table. 0 all that was measured is met, 1 something is missed."""
    from migsim.bench import table

    if arguments.host is not None:
        return _host_profile(arguments.host)
    try:
        specs = table.selected(arguments.only)
    except KeyError as error:
        known = ", ".join(dict.fromkeys(spec.name for spec in table.ROWS))
        raise ScenarioError("--only", f"must be one of {known}", value=error.args[0][:64]) from None
    if arguments.list:
        for spec in specs:
            print(f"{spec.name:20} {spec.group:14} {spec.what}")
        return 0
    if arguments.json not in (None, "-"):
        _refuse_unwritable(arguments.json)
    report = measure(specs, quick=arguments.quick, corpus=arguments.corpus, told=_tell)
    shown = [row for row, spec in zip(report.rows, table.ROWS, strict=True) if spec in specs]
    _deliver(report, shown, arguments.json)
    return 1 if any(row.met is False for row in shown) else 0


def measure(
    specs: Sequence[Spec], *, quick: bool = False, corpus: str | None = None, told: Callable[[str], None] | None = None
) -> Report:
    """Every row of the table; those not among `specs`, and those that cannot be measured here, say why."""
    from migsim.bench.table import ROWS, Missing, Report, judged

    found: dict[str, Measured | str] = {}
    seconds: dict[str, float] = {}
    for group, step in _measures(quick, corpus).items():
        names = [spec.name for spec in specs if spec.group == group]
        if not names:
            continue
        if told is not None:
            told(group)
        began = perf_counter()
        try:
            found |= step()
        except Missing as reason:
            found |= dict.fromkeys(names, str(reason))
        seconds[group] = round(perf_counter() - began, 3)
    chosen = {spec.name for spec in specs}
    rows = (
        judged(spec, found[spec.name] if spec.name in chosen else "not asked for (--only)", quick=quick)
        for spec in ROWS
    )
    return Report(quick=quick, machine=_machine(), seconds=seconds, rows=tuple(rows))


def _measures(quick: bool, corpus: str | None) -> dict[str, Measure]:
    """The measure of each group, in the order they are run: short ones last, when caches and clocks are warm."""
    from migsim.bench.corpus import measure_corpus
    from migsim.bench.passes import measure_dense_clear, measure_kvm_clear
    from migsim.bench.roaring import measure_pyroaring
    from migsim.bench.rounds import measure_sparse_round
    from migsim.bench.runs import measure_runs
    from migsim.bench.startup import measure_compile, measure_help

    return {
        "runs": lambda: measure_runs(quick=quick),
        "dense-clear": lambda: measure_dense_clear(quick=quick),
        "kvm-clear": lambda: measure_kvm_clear(quick=quick),
        "sparse-round": lambda: measure_sparse_round(quick=quick),
        "pyroaring": lambda: measure_pyroaring(quick=quick),
        "help": lambda: measure_help(quick=quick),
        "compile": lambda: measure_compile(quick=quick),
        "corpus": lambda: measure_corpus(corpus),
    }


def _tell(group: str) -> None:
    if sys.stderr.isatty():
        print(f"\rmigsim bench: {group} ...".ljust(48), end="", file=sys.stderr, flush=True)


def _deliver(report: Report, shown: Sequence[Row], path: str | None) -> None:
    from migsim.bench import table
    from migsim.commands.output import printing, say

    if path not in (None, "-"):
        assert path is not None
        _write(table.to_json(report), path)
    if sys.stderr.isatty():
        print("\r".ljust(49), end="\r", file=sys.stderr, flush=True)
    text = "\n".join((*table.lines(shown), "", *_closing(report, shown)))
    with printing(delivered=path not in (None, "-")):
        if path == "-":
            sys.stdout.buffer.write(table.to_json(report))
        (say if path == "-" else print)(text)


def _closing(report: Report, shown: Sequence[Row]) -> Iterator[str]:
    met, missed = (sum(row.met is verdict for row in shown) for verdict in (True, False))
    machine = report.machine
    took = sum(report.seconds.values())
    yield f"{met} met, {missed} missed, {len(shown) - met - missed} not judged; measured in {took:.0f} s."
    yield f"{machine['cpus']} CPUs ({machine['cpu']}), load {machine['load']:.1f}, Python {machine['python']}."


def _machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count() or 1,
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _refuse_unwritable(path: str) -> None:
    from migsim.commands.look import refuse_unwritable

    refuse_unwritable(path)


def _write(text: bytes, path: str) -> None:
    """Raises ScenarioError."""
    from migsim.result import write_whole

    try:
        write_whole(text, path)
    except OSError as error:
        raise ScenarioError("", f"cannot be written: {error.strerror}", file=path) from None


def _host_profile(path: str) -> int:
    from migsim import host_bench

    if path != "-":
        _refuse_unwritable(path)
    text = host_bench.profile_text(host_bench.profile_name(path), host_bench.measure())
    if path == "-":
        print(text, end="")
    else:
        _write(text.encode(), path)
    return 0
