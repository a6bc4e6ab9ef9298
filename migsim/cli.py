"""The command line: which commands there are, and what every one of them does with an error.

Nothing heavy is imported before a command is chosen, so `migsim --help` answers at once. A command's module has
`add_arguments(parser)` and `run_<command>(arguments) -> int`; a command exists when its module does.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from migsim import __version__
from migsim.commands.output import open_streams, say, silence_stdout, stdout_problem

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["main"]

EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130
_NOT_WRITTEN: Final = (errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)  # what a write to stdout gets

_PACKAGE: Final = Path(__file__).parent
_COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "run": ("commands.run", "migrate the guest of a scenario; does it converge, and how long is the blackout?"),
    "check": ("validate.command", "dirty logging, checked: ioctl suites against the emulator or the real /dev/kvm"),
    "selftest": ("selftest.command", "KVM's own selftests (demand_paging_test, dirty_log_perf_test, ...) on the model"),
    "shape": ("commands.shape", "a real VM's shape as a scenario, from libvirt or `virsh dumpxml`"),
    "measure": ("commands.measure", "a running process's or domain's dirty rate as a workload"),
    "sweep": ("commands.sweep", "a grid of scenarios"),
    "plan": ("commands.plan", "what must change for a guest to converge"),
    "compare": ("commands.compare", "two scenarios or results side by side"),
    "evacuate": ("commands.evacuate", "a host full of guests"),
    "explain": ("commands.explain", "why a run ended as it did"),
    "qmp": ("commands.qmp", "a scenario behind a QMP socket"),
    "report": ("commands.report", "a result as one HTML file"),
    "bench": ("bench.command", "how fast the emulator is here, against what it should reach"),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """argparse, but a usage error is one sentence."""

    def error(self, message: str) -> NoReturn:
        said = message if message.isprintable() else ascii(message)[1:-1]
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {said} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """argparse swallows it when help cannot be written."""
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 yes, 1 no, 2 bad input, 3 a page was lost, 130 interrupted."""
    open_streams()
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
    except SystemExit:  # argparse: --help, or a usage error
        if (problem := stdout_problem()) is None:
            raise
        return _unwritable(problem)
    except KeyboardInterrupt:
        say("migsim: interrupted")
        stdout_problem()
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return 0
    except OSError as error:
        return _refused(error)
    except RuntimeError as error:
        if "no locator available" not in str(error):  # numba's: there is not even a temporary folder
            raise
        say("migsim: no folder for the compiled kernels can be written; set NUMBA_CACHE_DIR to one that can")
        return EXIT_BAD_INPUT
    return code if (problem := stdout_problem()) is None else _unwritable(problem)


def _refused(error: OSError) -> int:
    """The system refused something that no command expected: stdout itself, or a file."""
    problem = stdout_problem()  # what could not be written may still be in the buffer
    if problem is None and error.filename is None and error.errno in _NOT_WRITTEN:
        problem = error.strerror
    if problem is not None:
        return _unwritable(problem)
    where = f"{ascii(error.filename)[1:-1]}: " if error.filename is not None else ""
    say(f"migsim: {where}{error.strerror or error}")
    return EXIT_BAD_INPUT


def _unwritable(problem: str) -> int:
    say(f"migsim: standard output cannot be written: {problem}")
    return EXIT_BAD_INPUT


def _dispatch(arguments: list[str]) -> int:
    commands = {name: entry for name, entry in _COMMANDS.items() if _exists(entry[0])}
    parser = _top_parser(commands)
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments or ["--help"])
        return 0
    name = arguments[0]
    if name not in commands:
        close = difflib.get_close_matches(name[:64], commands, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else f"; commands: {', '.join(commands)}"
        parser.error(f"no command {ascii(name[:64])}{hint}")
    module = import_module(f"migsim.{commands[name][0]}")
    parser = _Parser(prog=f"migsim {name}", description=commands[name][1])
    module.add_arguments(parser)
    command: Callable[[argparse.Namespace], int] = getattr(module, f"run_{name}")
    try:
        return command(parser.parse_args(arguments[1:]))
    except ValueError as error:
        if type(error).__name__ != "ScenarioError":  # by name: importing its class here would cost every --help
            raise
        say(f"migsim: {error}")
        return EXIT_BAD_INPUT


def _top_parser(commands: dict[str, tuple[str, str]]) -> _Parser:
    listed = "\n".join(f"  {name:<10}{about}" for name, (_, about) in commands.items())
    parser = _Parser(
        prog="migsim",
        usage="migsim COMMAND ...",
        description="KVM's dirty logging and QEMU's live migration, emulated exact to the page.",
        epilog=f"commands:\n{listed}\n\nmigsim COMMAND --help tells more of each.\n"
        "Exit codes: 0 yes, 1 no, 2 bad input, 3 a page was lost, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"migsim {__version__}")
    return parser


def _exists(module: str) -> bool:
    path = _PACKAGE / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
