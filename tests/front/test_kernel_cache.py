"""Compiled kernels have a place even where neither the package nor the user's cache can be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "migsim"


@pytest.fixture
def sealed(tmp_path):
    """migsim where no cache can be made beside any module: a file is in its way (modes do not stop root)."""
    shutil.copytree(PACKAGE, tmp_path / "migsim", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [tmp_path / "migsim", *(p for p in (tmp_path / "migsim").rglob("*") if p.is_dir())]:
        (folder / "__pycache__").touch()

    def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
        words = [sys.executable, "-c", program]
        env = {**plain, "PYTHONPATH": str(tmp_path), "HOME": "/dev/null", **environment}
        return subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


KERNEL = "import migsim.fused_kernels, os; print(os.environ.get('NUMBA_CACHE_DIR', ''))"


def test_a_folder_of_the_process_steps_in_and_is_gone_afterwards(sealed, tmp_path):
    done = sealed(KERNEL, TMPDIR=str(tmp_path))
    folder = Path(done.stdout.strip())
    assert done.returncode == 0 and folder.parent == tmp_path, done.stderr
    assert not folder.exists()


def test_the_users_cache_comes_first(sealed, tmp_path):
    assert sealed(KERNEL, XDG_CACHE_HOME=str(tmp_path)).stdout == "\n"
    assert sealed(KERNEL, NUMBA_CACHE_DIR=str(tmp_path)).stdout == f"{tmp_path}\n"


NOWHERE = f"""
import sys, tempfile
def refuse(**_): raise FileNotFoundError("no usable temporary directory")
tempfile.mkdtemp = refuse
from migsim.cli import main
sys.exit(main(["run", "{PACKAGE.parent}/configs/tiny.toml", "--quiet"]))
"""


def test_no_place_at_all_is_one_sentence(sealed):
    done = sealed(NOWHERE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "set NUMBA_CACHE_DIR" in done.stderr


NOTICE = "from migsim.commands.look import compile_notice; print(compile_notice())"


def test_what_is_said_before_compiling(sealed, tmp_path):
    assert "for this run alone" in sealed(NOTICE).stdout
    assert "once after an install" in sealed(NOTICE, XDG_CACHE_HOME=str(tmp_path)).stdout
    assert sealed(NOTICE, NUMBA_DISABLE_JIT="1").stdout == "None\n"
