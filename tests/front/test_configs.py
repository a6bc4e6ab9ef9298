"""The shipped scenarios: each asks one question, states the expected answer, and (where small enough) gets it."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from migsim import load, run
from migsim.cli import main
from migsim.commands.run import FAULT_NAMES
from migsim.expectation import surprises

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
IDS = [path.stem for path in CONFIGS]
# What a test can afford; the rest is shrunk by --set below, or run by hand.
SMALL = ["tiny", "one-step-missing", "web-64g", "larger-downtime", "dirty-rate-misleads"]


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_the_first_line_asks_and_the_second_says_what_to_expect(path):
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ") and ("?" in first or "?" in second)
    assert second.startswith("# Expected: ")
    assert load(path).expect is not None, "and a machine can hold it to that"


@pytest.mark.parametrize("name", SMALL)
def test_a_small_scenario_ends_as_it_says(name):
    result = run(load(f"configs/{name}.toml"))
    assert surprises(result) == [] and result.verify["lost-pages"] == 0


@pytest.mark.parametrize("fault", FAULT_NAMES)
def test_with_any_one_step_missing_a_run_names_lost_pages(fault, capsys):
    assert main(["run", "configs/one-step-missing.toml", "--fault", fault]) == 3
    assert "PAGES LOST: pc.ram page" in capsys.readouterr().out


SHRUNK = [
    ("larger-downtime", ["migration.downtime-limit=300 ms", "migration.time-limit=2 min"], False),
    ("never-converges", ["guest.memory=16 GiB", "migration.time-limit=90 s"], False),
    ("mostly-zero", ["guest.memory=32 GiB", "guest.workload.0.working-set=2 GiB"], True),
    ("idle-1t", ["guest.memory=32 GiB"], True),
]


@pytest.mark.parametrize(("name", "settings", "converged"), SHRUNK, ids=[case[0] for case in SHRUNK])
def test_a_large_scenario_shrunk_still_answers(name, settings, converged):
    result = run(load(f"configs/{name}.toml", settings))
    assert result.converged == converged and result.verify["lost-pages"] == 0


def test_zero_pages_cost_nine_bytes():
    result = run(load("configs/mostly-zero.toml", ["guest.memory=8 GiB", "guest.workload.0.working-set=256 MiB"]))
    first = result.rounds[0]
    assert first.zero_pages >= 0.89 * (8 << 30) / 4096
    data = first.sent_pages * 4104
    assert first.transferred_bytes - data == pytest.approx(9 * first.zero_pages, rel=0.01)


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path):
    def bytes_of(*flags: str) -> bytes:
        argv = [sys.executable, "-m", "migsim", "run", "configs/tiny.toml", "--json", "-", "--quiet", *flags]
        return subprocess.run(argv, capture_output=True, check=True).stdout

    first = bytes_of("--seed", "5", "--threads", "1")
    assert first == bytes_of("--seed", "5", "--threads", "2") != bytes_of("--seed", "6")


def test_what_shape_prints_runs(tmp_path, capsys):
    from migsim.cli import main

    xml = "<domain type='kvm'><name>small</name><memory unit='GiB'>1</memory><vcpu>2</vcpu></domain>"
    (tmp_path / "d.xml").write_text(xml)
    assert main(["shape", "--xml", str(tmp_path / "d.xml")]) == 0
    (tmp_path / "s.toml").write_text(capsys.readouterr().out)
    assert main(["run", str(tmp_path / "s.toml")]) == 0
    assert capsys.readouterr().out.startswith("Converges")


# Everything of m2-ultramem-416 by 64, but the page: the same shape in time, sync by sync.
A_64TH = [
    "guest.memory=192 GiB",
    "guest.workload.0.rate=25600000 B/s",
    "guest.workload.0.working-set=32 GiB",
    "guest.workload.1.rate=6250000 B/s",
    "guest.workload.1.working-set=1 GiB",
    "guest.workload.2.rate=4687500 B/s",
    "guest.workload.2.working-set=16 GiB",
    "link.bandwidth=1562.5 Mbit/s",
    "migration.avail-switchover-bandwidth=1562.5 Mbit/s",
]


def test_the_12_tib_database_at_a_64th_converges_as_the_whole_is_expected_to():
    result = run(load("configs/m2-ultramem-416.toml", A_64TH))
    # Not the blackout: what costs a constant (a stopped vCPU, a device) does not shrink with the guest.
    assert [s for s in surprises(result) if not s.startswith("downtime")] == []
    assert result.verify["lost-pages"] == 0
    dirty = [r.dirty_pages for r in result.rounds[:4]]
    assert all(later < earlier / 2 for earlier, later in pairwise(dirty))
