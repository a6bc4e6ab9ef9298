"""What a wheel packs runs without the checkout: host profiles and scenarios are in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="pip install setuptools: a wheel is built by it")

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setuptools would put into a wheel, built from a copy of the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(_ROOT / name, copy)
    shutil.copytree(_ROOT / "configs", copy / "configs")
    shutil.copytree(_ROOT / "migsim", copy / "migsim", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", str(out)]
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    shutil.rmtree(copy)
    return out


def _python(packed: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(packed), "NUMBA_DISABLE_JIT": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_a_scenario_runs_from_a_wheel_outside_the_checkout(packed: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "mine.toml"
    guest = '[guest]\nmemory = "16 MiB"\nvcpus = 2\n\n[host]\nprofile = "skylake-2s-96"\n'
    scenario.write_text(guest, encoding="utf-8")
    where = _python(packed, "-c", "import migsim; print(migsim.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(packed), "not the checkout's"
    done = _python(packed, "-m", "migsim", "run", "mine.toml", "--quiet", "--json", "-", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["host"]["profile"] == "skylake-2s-96"


def test_a_wheel_carries_every_profile_and_every_scenario(packed: Path) -> None:
    def shipped(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.rglob("*.toml")}

    assert shipped(packed / "migsim" / "configs") == shipped(_ROOT / "configs") != set()
