"""docs/series.md names functions and tests: all of them exist, and the tests fail when the behaviour is taken out."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
KVM_TESTS = ROOT / "tests/kvm"


@dataclass(frozen=True)
class Row:
    """One row: how a mutation refers to it, what models it, what fails without it."""

    key: str
    functions: tuple[str, ...]
    tests: tuple[str, ...]


def rows() -> Iterator[Row]:
    """Of the tables whose last column names tests; the key of an invariant begins with "invariant"."""
    inside = False
    for line in (ROOT / "docs/series.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r" \| ", line.strip("| "))]
        if cells[-1] in ("Fails without it", "Damage test"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|-"):
            yield _row(cells)


def _row(cells: list[str]) -> Row:
    names = re.findall(r"`([^`]+)`", " ".join(cells[-2:]))
    key = {5: cells[0], 4: f"{cells[0]} {cells[1]}", 3: cells[0]}[len(cells)].replace("`", "")
    if len(cells) == 3 and key[0].isdigit():
        key = f"invariant {key}"
    functions = tuple(name for name in names if "::" not in name)
    return Row(key, functions, tuple(name for name in names if "::" in name))


def mutations() -> ModuleType:
    """The package tests/kvm/mutations, which is on no path."""
    where = KVM_TESTS / "mutations"
    spec = importlib.util.spec_from_file_location(
        "mutations", where / "__init__.py", submodule_search_locations=[str(where)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules["mutations"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS = list(rows())
MUTATIONS = mutations().MUTATIONS


def row_of(name: str) -> Row:
    """The row a mutation refers to: one, and no more."""
    found = [row for row in ROWS if re.match(rf"{re.escape(name)}(?![\w.])", row.key)]
    assert len(found) == 1, f"a mutation of row {name!r} which begins {[row.key for row in found]}"
    return found[0]


def short(value: Row | str) -> str:
    """As a test's id."""
    return value if isinstance(value, str) else value.key


def test_every_patch_and_change_has_code_and_a_test() -> None:
    assert [row.key for row in ROWS[:20]] == [str(number) for number in range(1, 21)]
    assert [row.key.split()[1] for row in ROWS if row.key.startswith("invariant")][-1] == "10"
    for row in ROWS:
        assert row.functions and row.tests, row


def test_every_row_function_and_test_has_a_mutation() -> None:
    touched = {(row_of(mutation.row).key, mutation.of) for mutation in MUTATIONS}
    assert touched == {(row.key, function) for row in ROWS for function in row.functions}


@pytest.mark.parametrize("name", sorted({name for row in ROWS for name in row.functions}))
def test_the_function_exists(name: str) -> None:
    module, *path = name.split(".")
    found: object = importlib.import_module(f"migsim.kvm.{module}")
    for part in path:
        found = getattr(found, part)


@pytest.fixture(scope="module")
def fates(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, object]]:
    """(mutation, test) -> what became of it (tests/kvm/mutations/__main__.py), run in two processes."""
    out = tmp_path_factory.mktemp("mutants")
    runs = []
    for half in range(2):
        work = [
            f"{i}={','.join(row_of(mutation.row).tests)}" for i, mutation in enumerate(MUTATIONS) if i % 2 == half
        ]
        command = [sys.executable, str(KVM_TESTS / "mutations"), str(out / f"{half}.json"), *work]
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT))
    for run in runs:
        said, _ = run.communicate(timeout=300)
        assert run.returncode == 0, said
    found = [fate for half in range(2) for fate in json.loads((out / f"{half}.json").read_text())]
    return {(fate["index"], fate["test"]): fate for fate in found}


@pytest.mark.parametrize("index", range(len(MUTATIONS)), ids=[f"{m.of} {m.without}" for m in MUTATIONS])
def test_without_the_behaviour_a_test_of_its_row_fails(fates, index: int) -> None:
    mutation = MUTATIONS[index]
    mine = [fates[index, test] for test in row_of(mutation.row).tests]
    assert any(fate["case"] for fate in mine), f"{mutation.of} {mutation.without}, and every test of its row passes"
    for fate in mine:
        # a mutant that only trips over itself (TypeError ...) proves nothing
        assert set(fate["raised"]) <= {"AssertionError"}, f"{fate['case']}: {fate['raised']}"
        assert not fate["unmutated"], f"{fate['case']} fails without the mutation, too: {fate['unmutated']}"


@pytest.mark.parametrize(("row", "test"), [(row, test) for row in ROWS for test in row.tests], ids=short)
def test_a_test_that_a_row_names_fails_without_something_of_that_row(fates, row: Row, test: str) -> None:
    own = [i for i, mutation in enumerate(MUTATIONS) if row_of(mutation.row) == row]
    assert any(fates[i, test]["case"] for i in own), f"{test} passes whatever is taken out of row {row.key!r}"
