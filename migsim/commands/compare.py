"""`migsim compare`: results or scenarios side by side; with --mmu one scenario under the three MMUs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from migsim.commands.bounded import SEED_MAX, Bounded
from migsim.commands.look import require_memory
from migsim.commands.output import printing, say
from migsim.scenario import ScenarioError, load

if TYPE_CHECKING:
    from migsim.compare import Column
    from migsim.result import Result

__all__ = ["add_arguments", "run_compare"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `migsim compare`."""
    what = "scenarios (.toml, run here) or results (.json); with --mmu one scenario"
    parser.add_argument("files", nargs="+", metavar="FILE", help=what)
    parser.add_argument("--mmu", action="store_true", help="the scenario under shadow, tdp-5.10 and tdp")
    settings = "replace one value in every scenario, e.g. guest.memory=2TiB"
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="settings", help=settings)
    parser.add_argument("--seed", type=Bounded(0, SEED_MAX), default=0, metavar="N", help="of all randomness [0]")
    parser.add_argument("--no-verify", action="store_true", help="without the ground truth of every page")


def run_compare(arguments: argparse.Namespace) -> int:
    """Prints the table. 0; 3 when a page was lost in any column."""
    from migsim.compare import table

    columns = _by_mmu(arguments) if arguments.mmu else _files(arguments)
    with printing(delivered=False):
        print(table(columns))
    return 3 if any(column.result.exit_code == 3 for column in columns) else 0


def _by_mmu(arguments: argparse.Namespace) -> list[Column]:
    from migsim.compare import MMUS, by_mmu

    if len(arguments.files) != 1:
        raise ScenarioError("", f"--mmu takes one scenario, not {len(arguments.files)}")
    scenario = load(arguments.files[0], arguments.settings)
    require_memory(scenario)
    columns: list[Column] = []
    for column in by_mmu(scenario, seed=arguments.seed, verify=not arguments.no_verify):
        _stop_if_interrupted(column.result)
        columns.append(column)
        if sys.stderr.isatty():
            say(f"{column.name}: {column.result.verdict} ({len(columns)} of {len(MMUS)})")
    return columns


def _files(arguments: argparse.Namespace) -> list[Column]:
    if len(arguments.files) < 2:
        raise ScenarioError("", "two files at least, or one scenario with --mmu")
    return [_column(name, arguments) for name in arguments.files]


def _column(name: str, arguments: argparse.Namespace) -> Column:
    import msgspec

    from migsim import simulation
    from migsim.compare import Column
    from migsim.result import from_json

    if not name.endswith(".json"):
        scenario = load(name, arguments.settings)
        require_memory(scenario)
        result = simulation.run(scenario, seed=arguments.seed, verify=not arguments.no_verify)
        _stop_if_interrupted(result)
        return Column(Path(name).stem, result)
    try:
        return Column(Path(name).stem, from_json(Path(name).read_bytes()))
    except OSError as error:
        raise ScenarioError("", f"cannot read the result: {error.strerror}", file=name) from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ScenarioError("", f"not a result of migsim run: {error}", file=name) from None


def _stop_if_interrupted(result: Result) -> None:
    """A run ends early with what it has at a Ctrl-C; here that ends the command."""
    if result.interrupted:
        raise KeyboardInterrupt
