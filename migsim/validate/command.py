"""``migsim check``: its arguments and the way to the work.  Light at import: the suites load when it runs."""

from __future__ import annotations

import argparse

from migsim.commands.bounded import SEED_MAX, Bounded
from migsim.commands.output import destination
from migsim.scenario import ScenarioError

OPS_DEFAULT = 20_000
OPS_MAX = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``migsim check``."""
    parser.add_argument(
        "--backend",
        default="emulated",
        metavar="B",
        help="emulated (default), host (the real /dev/kvm), all (both, and each step compared), or module:Class",
    )
    parser.add_argument("--suite", metavar="S", help="one suite, or one case as suite/case (--list names them)")
    seed, ops = Bounded(0, SEED_MAX), Bounded(1, OPS_MAX)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="random cases repeat with their seed")
    parser.add_argument("--ops", type=ops, default=OPS_DEFAULT, metavar="N", help="operations of a random case")
    parser.add_argument("--ktap", type=destination, metavar="FILE", help="write KTAP version 1 (- for standard output)")
    parser.add_argument("--junit", type=destination, metavar="FILE", help="write JUnit XML (- for standard output)")
    parser.add_argument("--scripts", metavar="DIR", help="write a failure's script there as .py and .c")
    parser.add_argument("--seeded-bugs", action="store_true", help="put known bugs in, one at a time: is each caught?")
    parser.add_argument("--bug", metavar="NAME", help="with --seeded-bugs: only this one")
    parser.add_argument("--list", action="store_true", help="name suites and cases, run nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="every case on a line; bugs with their scripts")


def run_check(arguments: argparse.Namespace) -> int:
    """0: everything asked for ran and passed.  1: something failed, or could not run.  2: bad input."""
    if arguments.bug is not None and not arguments.seeded_bugs:
        raise ScenarioError("--bug", "goes with --seeded-bugs", value=arguments.bug)
    if arguments.seeded_bugs:
        from migsim.validate.seeded.hunt import run_hunt

        return run_hunt(arguments)
    from migsim.validate.check import run_suites

    return run_suites(arguments)
