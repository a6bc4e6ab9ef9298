"""Rows about starting: how long `migsim --help` takes, and the compiling of the first run after an install."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

from migsim.bench.shape import m2_ultramem
from migsim.bench.table import Measured, Missing

__all__ = ["measure_compile", "measure_help"]

FRACTION: Final = Fraction(1, 64)
HELPS: Final = 9
_SAYS: Final = "compiling"


def measure_help(*, quick: bool) -> dict[str, Measured | str]:
    """Median wall ms of `migsim --help` in a fresh process."""
    times = [_run(["--help"])[0] * 1000 for _ in range(3 if quick else HELPS)]
    return {"help": Measured(median(times), {"ms": times})}


def measure_compile(*, quick: bool) -> dict[str, Measured | str]:
    """A run with an empty cache of compiled kernels, less the same run with a filled one, in s; and what it says."""
    shape = m2_ultramem(FRACTION)
    argv = ["run", "-", *(word for setting in shape.settings for word in ("--set", setting))]
    with TemporaryDirectory(prefix="migsim-bench-") as cache:
        first, said = _run(argv, shape.text, cache)
        files = sum(1 for _ in Path(cache).rglob("*.nbc"))
        again = [_run(argv, shape.text, cache)[0] for _ in range(1 if quick else 2)]
    if not files:
        raise Missing("nothing was compiled: NUMBA_DISABLE_JIT is set")
    detail = {"first-s": first, "again-s": again, "kernels": files}
    return {"compile": Measured(first - min(again), detail), "compile-said": Measured(_SAYS in said)}


def _run(argv: Sequence[str], text: str = "", cache: str = "") -> tuple[float, str]:
    """(wall s, stderr) of `migsim argv`. Raises Missing where it fails."""
    environment = os.environ | ({"NUMBA_CACHE_DIR": cache} if cache else {})
    began = perf_counter()
    command = [sys.executable, "-m", "migsim", *argv]
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    took = perf_counter() - began
    if done.returncode not in (0, 1):
        raise Missing(f"migsim {argv[0]} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return took, done.stderr
