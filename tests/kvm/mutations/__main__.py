"""Runs the tests that docs/series.md names under the mutations of this package; tests/test_series.py starts it.

    python tests/kvm/mutations OUT.json INDEX=test_a,test_b ...

INDEX: of the mutation in mutations.MUTATIONS; behind it the tests of its row, as file::function. One process of its own
and one pytest session: the tests are collected once; under each mutation each of them runs case by case until one
fails, and that case again without the mutation. OUT.json: for every mutation and test the case that fell (null: none),
the exceptions it raised, and those it raised without the mutation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import HealthCheck, Phase, settings

KVM_TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(KVM_TESTS))

from mutations import MUTATIONS, Mutation, Patch  # noqa: E402 - found by the line above

settings.register_profile(
    "mutants", max_examples=25, phases=[Phase.explicit, Phase.generate], derandomize=True, database=None,
    deadline=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
)  # fmt: skip


class Runs:
    """The plugin that takes the place of pytest's own loop over the tests."""

    def __init__(self, tests_of: dict[int, list[str]]) -> None:
        self.tests_of = tests_of
        self.found: list[dict[str, Any]] = []
        self._raised: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
        if call.excinfo is not None:
            asserted = call.excinfo.errisinstance((AssertionError, pytest.fail.Exception))
            self._raised.append("AssertionError" if asserted else call.excinfo.typename)
        return (yield)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        cases: dict[str, list[pytest.Item]] = {}
        for item in session.items:
            cases.setdefault(f"{item.path.name}::{item.originalname}", []).append(item)  # type: ignore[attr-defined]
        for index, tests in self.tests_of.items():
            self.found += [{"index": index, "test": test, **self._run(MUTATIONS[index], cases[test])} for test in tests]
        return True

    def _run(self, mutation: Mutation, cases: list[pytest.Item]) -> dict[str, Any]:
        fallen, raised = None, []
        with pytest.MonkeyPatch.context() as monkeypatch:
            try:
                mutation.apply(Patch(monkeypatch))
            except (AttributeError, KeyError) as missing:  # of this mutation alone, not of all
                return {"case": "nothing", "raised": [f"{mutation.of}: {missing}"], "unmutated": []}
            for case in cases:
                raised = self._fails(case)
                if raised:
                    fallen = case
                    break
        if fallen is None:
            return {"case": None, "raised": [], "unmutated": []}
        return {"case": fallen.name, "raised": raised, "unmutated": self._fails(fallen)}

    def _fails(self, case: pytest.Item) -> list[str]:
        """The exceptions of one run of one case."""
        self._raised = []
        runtestprotocol(case, log=False, nextitem=None)
        return self._raised


def main(out: str, rows: list[str]) -> None:
    """Writes OUT.json."""
    tests_of = {int(index): tests.split(",") for index, _, tests in (row.partition("=") for row in rows)}
    settings.load_profile("mutants")
    runs = Runs(tests_of)
    ids = sorted({str(KVM_TESTS / test) for tests in tests_of.values() for test in tests})
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--hypothesis-profile=mutants"]
    ended = pytest.main([*ids, *quiet, f"--rootdir={KVM_TESTS.parent.parent}"], plugins=[runs])
    if ended:
        raise SystemExit(f"pytest ended with {ended!r}")
    Path(out).write_text(json.dumps(runs.found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
