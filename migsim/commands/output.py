"""Standard output and standard error may be closed, full or hung up: a command then says one sentence, if it can.

A result that is already in a file is delivered, whatever became of what is printed after it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["destination", "open_streams", "printing", "say", "silence_stdout", "stdout_problem"]


def open_streams() -> None:
    """Both streams can be written to, or refuse it with an error that says so.

    Where the shell closed one (`>&-`), Python has None: in its place comes one that refuses a write.

    The descriptor is taken too, or the next file opened would get it and what others print would land in that file.
    """
    if sys.stdout is None:
        _take(1, os.O_RDONLY)  # EBADF at every write
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        _take(2, os.O_WRONLY)  # nobody is left to tell that nobody is left
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a locale cannot show is told in ASCII, as on stderr


def destination(text: str) -> str:
    """A FILE of the command line (argparse's type): stdout's other names are "-", where nothing overwrites the rest."""
    return "-" if text in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1") else text


def say(text: str) -> None:
    """A sentence for the person, on stderr if that can still be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def silence_stdout() -> None:
    """After a reader hung up: nothing more goes to stdout, not even the interpreter's last flush."""
    _silence(sys.stdout)


def stdout_problem() -> str | None:
    """Why what was printed cannot be written; None where it is, or its reader has left. Silences a stdout so broken."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    except OSError as error:
        silence_stdout()
        return error.strerror or str(error)
    return None


@contextmanager
def printing(*, delivered: bool) -> Iterator[None]:
    """Around what is printed, now or while the work goes on: a reader who leaves (`... | head -1`) changes no answer.

    Nor does a stdout that cannot be written, where the result is `delivered` in a file. Raises OSError otherwise.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    except OSError as error:
        if not delivered:
            raise
        silence_stdout()
        say(f"migsim: standard output cannot be written: {error.strerror}; the result goes to its file")


def _silence(stream: TextIO) -> None:
    """What is still in the stream's buffer, or is printed from now on, goes nowhere; its flush at exit succeeds."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _take(descriptor: int, mode: int) -> None:
    null = os.open(os.devnull, mode)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
