"""Ctrl-C from outside, in the middle of the work: exit 130, no traceback, and a run's JSON holds the rounds so far."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time

import pytest

from migsim.result import from_json

PATIENCE_S = 90  # kernels may have to be compiled first
NEVER = "configs/larger-downtime.toml --set migration.time-limit='200 h' --set migration.downtime-limit='1 ms'"


def start(line: str, **streams) -> subprocess.Popen[bytes]:
    # A shell's background job ignores SIGINT; a person's does not.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from migsim.cli import main; print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program]
    return subprocess.Popen([*words, *shlex.split(line)], stdout=subprocess.PIPE, **streams)


def read_until(descriptor: int, pattern: bytes) -> bytes:
    """What a terminal has shown when `pattern` first appears."""
    seen = b""
    end = time.monotonic() + PATIENCE_S
    while not re.search(pattern, seen) and time.monotonic() < end:
        seen += os.read(descriptor, 4096)
    assert re.search(pattern, seen), seen[-500:]
    return seen


def test_an_interrupted_run_delivers_the_rounds_that_a_terminal_has_shown(tmp_path):
    path = tmp_path / "r.json"
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))  # the bar's words give way on a terminal of no columns
    run = start(f"run {NEVER} --json {path}", stderr=terminal)
    os.close(terminal)
    try:
        read_until(master, rb"sync [4-9]|sync \d\d")
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=PATIENCE_S)
    finally:
        run.kill()
        os.close(master)
    assert run.returncode == 130 and b"Traceback" not in out
    written = from_json(path.read_bytes())
    assert written.interrupted and not written.converged and len(written.rounds) >= 3
    assert written.verify.get("lost-pages", 0) == 0


@pytest.mark.parametrize("line", ["check --suite random --ops 1000000000", f"compare {NEVER.split()[0]} {NEVER}"])
def test_an_interrupt_ends_the_command_with_130_and_one_sentence(line):
    work = start(line, stderr=subprocess.PIPE)
    assert work.stdout is not None and work.stdout.readline() == b"ready\n"
    try:
        time.sleep(3)  # it is at work: imports are done in one
        work.send_signal(signal.SIGINT)
        _, err = work.communicate(timeout=PATIENCE_S)
    finally:
        work.kill()
    lines = [line for line in err.decode().splitlines() if "compiling" not in line]
    assert (work.returncode, lines) == (130, ["migsim: interrupted"])


@pytest.mark.parametrize(
    ("command", "target"),
    [
        ("selftest demand_paging_test", "migsim.selftest.demand_paging.demand_paging_test"),
        ("bench --only corpus", "migsim.bench.command.measure"),
        ("shape --xml x.xml", "migsim.commands.shape.read_text"),
    ],
)
def test_so_does_one_during_the_short_ones(command, target, monkeypatch, capsys):
    from migsim.cli import main

    monkeypatch.setattr(target, lambda *a, **k: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(command.split()) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "migsim: interrupted\n")


def test_a_comparison_stops_at_the_run_that_was_interrupted(monkeypatch, capsys):
    from migsim.cli import main
    from migsim.result import Result
    from migsim.scenario import load

    runs, tiny = [], load("configs/tiny.toml")

    def run(scenario, **_):
        runs.append(scenario)
        return Result(verdict="Interrupted.", converged=False, interrupted=True, scenario=tiny, seed=0)

    monkeypatch.setattr("migsim.simulation.run", run)
    assert main(["compare", "configs/tiny.toml", "configs/tiny.toml"]) == 130
    assert main(["compare", "--mmu", "configs/tiny.toml"]) == 130
    assert len(runs) == 2 and capsys.readouterr() == ("", "migsim: interrupted\n" * 2)
