"""The command line: quick help, only what exists, exit codes, results that survive pipes and Ctrl-C."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from migsim import cli
from migsim.result import Progress, Result, Round, from_json, write_json
from migsim.scenario import load

TINY = "configs/tiny.toml"


def result(**values) -> Result:
    return Result(**{"verdict": "Converged.", "converged": True, "scenario": load(TINY), "seed": 0, **values})


@pytest.fixture
def simulation(monkeypatch):
    """A free hand in what a run returns. What a first run says of compiling is no part of it."""
    monkeypatch.setattr("migsim.commands.run.compile_notice", lambda: None)

    def returns(run):
        monkeypatch.setattr("migsim.simulation.run", run)

    return returns


def test_help_imports_nothing_heavy():
    program = "import sys; from migsim.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    program += "print([m for m in ('numpy', 'numba', 'msgspec', 'psutil', 'tqdm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_each_command_that_exists_and_no_other(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    for name, (module, _) in cli._COMMANDS.items():
        assert (f"\n  {name} " in listed) == cli._exists(module), name


@pytest.mark.parametrize("name", [n for n, (module, _) in cli._COMMANDS.items() if cli._exists(module)])
def test_every_listed_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"usage: migsim {name}")


def test_the_schema_is_json(capsys):
    assert cli.main(["run", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["$ref"] == "#/$defs/Scenario"


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({}, 0),
        ({"converged": False}, 1),
        ({"verify": {"lost-pages": 1}}, 3),
        ({"converged": False, "interrupted": True}, 130),
    ],
)
def test_the_exit_code_is_the_answer(simulation, capsys, values, code):
    simulation(lambda scenario, **_: result(**values))
    assert cli.main(["run", TINY]) == code
    assert capsys.readouterr().out.startswith("Converged.")


def test_quiet_prints_nothing(simulation, capsys):
    simulation(lambda scenario, **_: result())
    assert cli.main(["run", TINY, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_json_on_stdout_is_json_alone(simulation, capfdbinary):
    simulation(lambda scenario, **_: result())
    assert cli.main(["run", TINY, "--json", "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert from_json(out) == result() and err.startswith(b"Converged.")


def test_the_flags_reach_the_simulation(simulation):
    seen = {}

    def run(scenario, **flags):
        seen.update(flags, vcpus=scenario.guest.vcpus)
        return result()

    simulation(run)
    flags = ["--seed", "7", "--threads", "2", "--no-verify", "--set", "guest.vcpus=5", "--quiet"]
    assert cli.main(["run", TINY, *flags]) == 0
    seen.pop("progress")
    assert seen == {"seed": 7, "threads": 2, "verify": False, "trace": None, "vcpus": 5}


def test_an_interrupt_leaves_the_rounds_so_far_in_the_json(simulation, tmp_path, capsys):
    rounds = (Round(sync=1, start_ns=0, dirty_pages=9), Round(sync=2, start_ns=5, dirty_pages=3))

    def run(scenario, *, progress, **_):
        progress(Progress(now_ns=7, phase="active", sync=3, remaining_bytes=1, total_bytes=9, rounds=rounds))
        raise KeyboardInterrupt

    simulation(run)
    path = tmp_path / "r.json"
    assert cli.main(["run", TINY, "--json", str(path), "--seed", "3"]) == 130
    written = from_json(path.read_bytes())
    assert written.interrupted and written.rounds == rounds and written.seed == 3
    assert "Interrupted" in capsys.readouterr().out


CTRL_C = """
import os, signal, sys
from migsim import cli, simulation
real = simulation.run
def run(scenario, *, progress, **more):
    def tick(now):
        progress(now)
        if len(now.rounds) >= 3:
            os.kill(os.getpid(), signal.SIGINT)
    return real(scenario, progress=tick, **more)
simulation.run = run
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_real_ctrl_c_in_the_middle_of_a_migration(tmp_path):
    path = tmp_path / "r.json"
    endless = ["--set", "guest.memory=4 GiB", "--set", "migration.downtime-limit=300 ms"]
    argv = [sys.executable, "-c", CTRL_C, "run", "configs/larger-downtime.toml", "--json", str(path), *endless]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    written = from_json(path.read_bytes())
    assert written.interrupted and not written.converged and len(written.rounds) >= 3
    assert done.stdout.startswith("Interrupted")


def test_a_result_replaces_the_old_one_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("old")
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr("migsim.result.os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
        write_json(result(), str(path))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_json(result(), str(path))
    assert from_json(path.read_bytes()) == result() and list(tmp_path.iterdir()) == [path]


def test_a_reader_that_leaves_early_does_not_change_the_exit_code(tmp_path):
    shell = f"set -o pipefail; '{sys.executable}' -m migsim run {TINY} --json - 2>/dev/null | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_first_run_says_that_it_compiles(simulation, monkeypatch, capsys):
    simulation(lambda scenario, **_: result())
    for notice in ("compiling the kernels", None):
        monkeypatch.setattr("migsim.commands.run.compile_notice", lambda answer=notice: answer)
        assert cli.main(["run", TINY]) == 0
        assert ("compiling" in capsys.readouterr().err) == (notice is not None)
