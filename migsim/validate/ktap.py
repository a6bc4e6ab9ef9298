"""Outcomes as KTAP version 1 (Documentation/dev-tools/ktap.rst): one subtest a backend and suite."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from migsim.validate.verdicts import Outcome


def ktap(outcomes: Sequence[Outcome]) -> str:
    """The whole report.  Diagnostics of a failure follow its line as ``#`` lines."""
    groups = [(key, list(group)) for key, group in groupby(outcomes, key=lambda o: f"{o.backend}/{o.suite}")]
    lines = ["KTAP version 1", f"1..{len(groups)}"]
    for number, (key, group) in enumerate(groups, 1):
        lines += ["  KTAP version 1", f"  # Subtest: {_plain(key)}", f"  1..{len(group)}"]
        for inner, outcome in enumerate(group, 1):
            lines += [f"  {line}" for line in _result(inner, outcome)]
        failed = any(outcome.status == "failed" for outcome in group)
        skipped = all(outcome.status == "skipped" for outcome in group)
        lines.append(f"{'not ok' if failed else 'ok'} {number} {_plain(key)}{' # SKIP' if skipped else ''}")
    return "\n".join(lines) + "\n"


def _result(number: int, outcome: Outcome) -> list[str]:
    if outcome.status == "skipped":
        return [f"ok {number} {_plain(outcome.case)} # SKIP {_plain(outcome.reason)}"]
    if outcome.status == "passed":
        return [f"ok {number} {_plain(outcome.case)}"]
    return [
        f"not ok {number} {_plain(outcome.case)}",
        f"# {_plain(outcome.reason)}",
        f"# repeat: {_plain(outcome.repro)}",
    ]


def _plain(text: str) -> str:
    """One line without ``#``, which would begin a directive."""
    return " ".join(text.replace("#", "no. ").split())
