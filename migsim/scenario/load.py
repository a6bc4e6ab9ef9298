"""TOML text to a `Scenario`: read with a bound, apply --set, check names, parse units, convert.

Every way this can fail ends in a `ScenarioError`; the input is not trusted.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

from migsim.scenario.convert import convert
from migsim.scenario.errors import ScenarioError
from migsim.scenario.overrides import apply
from migsim.scenario.root import Scenario

__all__ = ["SCENARIO_BYTES_MAX", "build", "load", "parse", "read_text"]

SCENARIO_BYTES_MAX: Final = 1 << 20


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Scenario:
    """The scenario in the file `path`, with `overrides` ("a.b=c") applied. Raises ScenarioError."""
    file = os.fspath(path)
    return parse(read_text(file, SCENARIO_BYTES_MAX, "a scenario"), overrides, file=file)


def parse(text: str, overrides: Iterable[str] = (), *, file: str = "") -> Scenario:
    """The scenario in the TOML `text`. Raises ScenarioError."""
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise ScenarioError("", "is nested too deeply to be a scenario", file=file) from None
    except ValueError as error:  # TOMLDecodeError, and int() on absurdly long digits
        raise ScenarioError("", f"is not valid TOML: {_line(error)}", file=file) from None
    return build(data, overrides, file=file)


def build(data: Mapping[str, Any], overrides: Iterable[str] = (), *, file: str = "") -> Scenario:
    """The scenario a mapping of TOML's shape describes (unit strings allowed). Raises ScenarioError."""
    merged = deepcopy(dict(data))
    touched: list[str] = []
    try:
        for setting in overrides:
            touched.append(apply(merged, setting, Scenario))
        return convert(merged, Scenario)
    except ScenarioError as error:
        raise error.within("", error.file or _blamed(error.field, touched, file)) from None


def _blamed(field: str, touched: list[str], file: str) -> str:
    """Where a value came from: --set if it lies below a path that was set, both if a path set lies below it."""
    if any(f"{field}.".startswith(f"{path}.") for path in touched):
        return "--set"
    if field and any(path.startswith(f"{field}.") for path in touched):
        return f"{file} with --set" if file else "--set"
    return file


def read_text(file: str, limit_bytes: int, what: str) -> str:
    """The UTF-8 text of `file`, at most `limit_bytes`: a larger regular file is refused before it is read."""
    file = "/dev/stdin" if file == "-" else file
    try:
        status = os.stat(file)
        if stat.S_ISDIR(status.st_mode):
            raise ScenarioError("", f"is a directory; {what} is a file", file=file)
        if stat.S_ISREG(status.st_mode) and status.st_size > limit_bytes:
            raise ScenarioError("", f"is {status.st_size} bytes; {what} has at most {limit_bytes}", file=file)
        with Path(file).open("rb") as stream:
            raw = stream.read(limit_bytes + 1)
    except ValueError as error:
        if isinstance(error, ScenarioError):
            raise
        raise ScenarioError("", f"cannot be opened: {_line(error)}", file=ascii(file)) from None  # a NUL in the name
    except OSError as error:
        raise ScenarioError("", f"cannot be read: {error.strerror}", file=file) from None
    if len(raw) > limit_bytes:
        raise ScenarioError("", f"is longer than {limit_bytes} bytes; {what} is not", file=file)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ScenarioError("", f"is not UTF-8 text (byte {error.start}); {what} is", file=file) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


