"""`ScenarioError`: the one error of a user's input, always one sentence."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

__all__ = ["ScenarioError", "nearest", "shown"]

_SHOWN_MAX = 60


class ScenarioError(ValueError):
    """A scenario that cannot be run. Its text is one sentence naming file, field, value and what is allowed.

    file: where it was read from, or "" (built in Python) · field: dotted path, or "" (the file as a whole) ·
    problem: what is wrong and what is allowed, with the nearest known name where there is one.
    """

    def __init__(self, field: str, problem: str, *, value: object = None, file: str = "") -> None:
        super().__init__(field, problem)
        self.file = file
        self.field = field
        self.value = value
        self.problem = problem

    def __str__(self) -> str:
        what = self.field
        if self.value is not None:
            what = f"{what} = {shown(self.value)}" if what else shown(self.value)
        return ": ".join(part for part in (_printable(self.file), what, self.problem) if part)

    def within(self, path: str, file: str) -> ScenarioError:
        """The same error seen from the outside: `path` goes before the field, `file` before everything."""
        field = ".".join(part for part in (path, self.field) if part)
        return ScenarioError(field, self.problem, value=self.value, file=file)


def _printable(name: str) -> str:
    """A file's name as it is, or escaped where a terminal would act on it or could not show it."""
    return name if name.isprintable() else ascii(name)[1:-1]


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the known name nearest to `name`, or the known names when none is near."""
    names = list(known)
    folded = {n.lower().replace("_", "-"): n for n in reversed(names)}
    close = difflib.get_close_matches(name[:64].lower().replace("_", "-"), folded, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{folded[close[0]]}"?'
    return f"; known: {', '.join(names)}"


def shown(value: object) -> str:
    """A value as one short line of printable ASCII: whatever the file held, the terminal sees no control bytes."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):  # cyclic or absurdly nested
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."
