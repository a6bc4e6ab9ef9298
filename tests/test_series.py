"""docs/series.md names functions and tests; all of them exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from migsim.kvm.mmu_lock import MmuLock

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/series.md").read_text()
TABLE_ROWS = [line for line in TEXT.splitlines() if re.match(r"\| (?!#|-|Change|Ver|Inv)", line)]
NAMES = [(row.split("|")[2].strip()[:40], name) for row in TABLE_ROWS for name in re.findall(r"`([^`]+)`", row)]


def test_every_patch_and_change_has_code_and_a_test() -> None:
    patches = TABLE_ROWS[: next(i for i, row in enumerate(TABLE_ROWS) if row.startswith("| mmu_lock"))]
    numbers = [int(found.group(1)) for row in patches if (found := re.match(r"\| (\d+) \|", row))]
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


# -- taken out, it is missed ---------------------------------------------------------------------------------------


MUTATIONS = [
    ("mmu_lock.MmuLock.read", MmuLock.write,
     "test_a_fault_takes_mmu_lock_for_read_since_5_12_on_the_tdp_mmu", ("tdp",)),
    ("tdp_mmu._needs_flush", lambda *_: False, "test_a_table_replaced_by_a_huge_page_is_flushed", ()),
    ("paging.PagingStructure.clear_bits", lambda self, at, mask: self.read(at),
     "test_a_locked_and_keeps_what_the_cpu_sets_meanwhile", ()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "instead", "test", "args"), MUTATIONS, ids=[row[0] for row in MUTATIONS])
def test_without_the_function_its_test_fails(monkeypatch: pytest.MonkeyPatch, name, instead, test, args) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/kvm"))
    run = getattr(importlib.import_module("test_mmu_locking"), test)
    guest = _mmu_guest()
    run(guest, *args)
    monkeypatch.setattr(f"migsim.kvm.{name}", instead)
    with pytest.raises(AssertionError):
        run(guest, *args)


def _mmu_guest():
    spec = importlib.util.spec_from_file_location("kvm_conftest", ROOT / "tests/kvm/conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MmuGuest
