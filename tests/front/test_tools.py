"""The shell tools: what they would install, where they say no, and that they hold together."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["tools/run", "tools/test", "tools/system-deps", "tools/venv", ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_parses_and_names_no_registry(script):
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "://" not in path.read_text()
    assert script == "tools/venv" or os.access(path, os.X_OK)


@pytest.fixture
def system(tmp_path):
    """A machine of fakes: `id` answers `user`, the packages in `there` are installed, apt-get writes down its calls."""
    calls = tmp_path / "calls"
    calls.touch()

    def run(user: int, there: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        fakes = {
            "id": f"echo {user}",
            "dpkg-query": f'for last; do :; done; case " {there} " in *" $last "*) echo installed;; *) exit 1;; esac',
            "apt-get": f'echo "$@" >>{calls}; case "$*" in *chromium*) exit 100;; esac',
        }
        for name, body in fakes.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        argv = [str(ROOT / "tools/system-deps")]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        return done, calls.read_text().splitlines()

    return run


EVERYTHING = "libvirt-dev pkg-config gcc libc6-dev qemu-system-x86 libvirt-daemon-system libvirt-clients chromium"


def test_nothing_is_installed_where_nothing_is_missing(system):
    done, calls = system(user=1000, there=EVERYTHING)
    assert done.returncode == 0 and calls == []


def test_without_root_it_says_what_is_missing(system):
    done, calls = system(user=1000, there=EVERYTHING.replace("qemu-system-x86 ", ""))
    assert done.returncode == 1 and "missing: qemu-system-x86;" in done.stderr and "root" in done.stderr
    assert calls == []


def test_root_gets_only_what_is_missing_and_one_absent_package_keeps_none_away(system):
    done, calls = system(user=0, there="gcc pkg-config libc6-dev qemu-system-x86 libvirt-daemon-system libvirt-clients")
    assert [call.split()[0] for call in calls] == ["update", "install", "install"]
    assert all("--no-install-recommends" in call for call in calls[1:])
    assert calls[1].endswith("libvirt-dev") and calls[2].endswith("chromium")
    assert done.returncode == 1 and "cannot install chromium" in done.stderr
