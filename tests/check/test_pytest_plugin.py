"""The fixture migsim_vm in somebody else's project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from migsim.host_kvm.device import unavailable_reason

ROOT = Path(__file__).parents[2]


def run_pytest(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "migsim.pytest_plugin", "-p", "no:cacheprovider", *words]
    return subprocess.run([*command, str(path)], capture_output=True, text=True, cwd=ROOT)


def test_the_example_passes_on_the_emulator() -> None:
    done = run_pytest(ROOT / "examples" / "test_my_cases.py")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
def test_with_all_every_case_runs_on_both_backends() -> None:
    done = run_pytest(ROOT / "examples" / "test_my_cases.py", "--migsim-backend", "all")
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


def test_a_leak_or_a_broken_invariant_fails_the_test_that_caused_it(tmp_path: Path) -> None:
    (tmp_path / "test_stale.py").write_text(
        "def test_stale(migsim_vm):\n"
        "    vm = migsim_vm(pml=False)\n"
        "    vm.slot(64); vm.vcpus(1); vm.store([3], 1)\n"
        "    vm.vm.dirty_log.flush = lambda slot: None\n"
        "    vm.get(64)\n"
    )
    done = run_pytest(tmp_path / "test_stale.py")
    assert done.returncode == 1 and "stale translation" in done.stdout, done.stdout
