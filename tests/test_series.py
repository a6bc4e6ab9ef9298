"""docs/series.md names functions and tests; all of them exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/series.md").read_text()
TABLE_ROWS = [line for line in TEXT.splitlines() if re.match(r"\| (?!#|-|Change|Ver)", line)]
NAMES = [(row.split("|")[2].strip()[:40], name) for row in TABLE_ROWS for name in re.findall(r"`([^`]+)`", row)]


def test_every_patch_and_change_has_code_and_a_test() -> None:
    numbers = [int(found.group(1)) for row in TABLE_ROWS if (found := re.match(r"\| (\d+) \|", row))]
    assert numbers == list(range(1, 21))
    for row in TABLE_ROWS:
        names = re.findall(r"`([^`]+)`", row)
        assert any("::" in name for name in names) and any("::" not in name for name in names), row


@pytest.mark.parametrize("name", sorted({name for _, name in NAMES if "::" in name}))
def test_the_test_exists(name: str) -> None:
    file, function = name.split("::")
    tree = ast.parse((ROOT / "tests/kvm" / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", sorted({name for _, name in NAMES if "::" not in name}))
def test_the_function_exists(name: str) -> None:
    module, *path = name.split(".")
    found: object = importlib.import_module(f"migsim.kvm.{module}")
    for part in path:
        found = getattr(found, part)
