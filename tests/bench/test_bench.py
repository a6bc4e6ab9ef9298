"""`migsim bench`: every row of the table is there, judged or with the reason why not. Nothing here asserts a time."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from migsim.bench import command, startup, table
from migsim.bench.corpus import measure_corpus
from migsim.bench.passes import measure_kvm_clear
from migsim.bench.roaring import measure_pyroaring
from migsim.bench.runs import measure_runs
from migsim.bench.shape import BUILT_IN, CONFIG, m2_ultramem
from migsim.cli import main
from migsim.perf.profile import load_profile
from migsim.scenario import parse

NAMES = {
    "pace", "memory", "lost-pages", "dense-clear", "kvm-clear", "kvm-clear-fused", "sparse-round", "double-time",
    "double-memory", "oracle", "pyroaring", "help", "compile", "compile-said", "total-time-median", "total-time-p95",
    "syncs", "bytes-median", "bytes-p95", "downtime", "verdict",
}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A quick bench of everything that compiles nothing and needs no recordings, as the command writes it."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    groups = ["runs", "dense-clear", "kvm-clear", "sparse-round", "pyroaring", "help"]
    code = main(["bench", "--quick", "--json", str(path), *(word for group in groups for word in ("--only", group))])
    assert code in (0, 1)
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"], "written beside, renamed, nothing left"
    return json.loads(path.read_text())


def test_every_row_of_the_table_is_in_the_json(report):
    assert {row["name"] for row in report["rows"]} == NAMES == {spec.name for spec in table.ROWS}
    assert report["quick"] is True and report["machine"]["cpus"] >= 1


def test_each_row_has_a_number_a_target_and_a_verdict_or_says_why_not(report):
    for row in report["rows"]:
        assert isinstance(row["target"], int | float) and row["sense"] in ("at-most", "at-least"), row
        if row["met"] is None:
            assert row["why"], row
        else:
            reached = row["number"] <= row["target"] if row["sense"] == "at-most" else row["number"] >= row["target"]
            assert row["met"] is reached and row["why"] == "", row


def test_the_runs_lost_nothing_and_compared_the_same_rounds(report):
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["lost-pages"]["number"] == 0 and rows["lost-pages"]["met"] is True
    one, two = rows["double-time"]["detail"]["rounds"]
    assert one == two
    assert rows["pace"]["met"] is None and "--quick" in rows["pace"]["why"], "the target is for the full guest"


def test_what_was_not_asked_for_says_so(report):
    rows = {row["name"]: row for row in report["rows"]}
    assert "not asked for" in rows["compile"]["why"] and rows["compile"]["number"] is None


def test_the_table_a_person_reads_names_number_target_and_verdict():
    met, missed, none = (
        table.judged(spec, found, quick=False)
        for spec, found in zip(
            table.ROWS[3:6], (table.Measured(1.2), table.Measured(3.0), "no /dev/kvm here"), strict=True
        )
    )
    text = "\n".join(table.lines([met, missed, none]))
    assert "1.2" in text and "<= 1.5" in text and " met" in text
    assert "MISSED" in text and "not measured" in text and "no /dev/kvm here" in text


def test_without_kvm_the_row_says_so(monkeypatch):
    monkeypatch.setattr("migsim.bench.passes.unavailable_reason", lambda: "no /dev/kvm here")
    with pytest.raises(table.Missing, match="no /dev/kvm"):
        measure_kvm_clear(quick=True)


def test_without_pyroaring_the_row_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyroaring", None)
    with pytest.raises(table.Missing, match=r"migsim\[test\]"):
        measure_pyroaring(quick=True)


def test_a_guest_that_does_not_fit_is_not_run_and_the_row_says_what_is_free(monkeypatch):
    monkeypatch.setattr("migsim.commands.look.free_memory", lambda: 1 << 20)
    with pytest.raises(table.Missing, match="1 MiB are free"):
        measure_runs(quick=True)


@pytest.mark.parametrize(("folder", "reason"), [(None, "--corpus"), ("/nowhere/at/all", "no such folder")])
def test_without_recordings_the_rows_say_so(folder, reason):
    with pytest.raises(table.Missing, match=reason):
        measure_corpus(folder)


def test_one_measure_that_cannot_run_leaves_the_others(monkeypatch):
    monkeypatch.setattr("migsim.bench.passes.unavailable_reason", lambda: "no /dev/kvm here")
    found = command.measure(table.selected(["kvm-clear", "help"]), quick=True)
    rows = {row.name: row for row in found.rows}
    assert rows["kvm-clear"].why == "no /dev/kvm here" and rows["kvm-clear"].met is None
    assert rows["help"].number is not None


def test_compiling_is_the_first_run_less_a_later_one_and_what_it_said(monkeypatch):
    runs = iter([(12.0, "migsim: compiling the kernels, once after an install ...\n"), (2.0, "")])

    def run(argv, text="", cache=""):
        assert argv[0] == "run" and text
        (Path(cache) / "kernel.nbc").touch()
        return next(runs)

    monkeypatch.setattr(startup, "_run", run)
    rows = startup.measure_compile(quick=True)
    assert rows["compile"].number == 10.0 and rows["compile-said"].number


def test_the_guest_that_is_built_in_is_the_one_in_configs():
    from_file = parse(CONFIG.read_text())
    built_in = parse(BUILT_IN)
    assert (built_in.guest, built_in.kvm, built_in.migration, built_in.link) == (
        from_file.guest, from_file.kvm, from_file.migration, from_file.link,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [Fraction(2), Fraction(1, 64)])
def test_a_scaled_guest_keeps_its_proportions(factor):
    whole, scaled = m2_ultramem().scenario(), m2_ultramem(factor).scenario()
    assert scaled.guest.memory == whole.guest.memory * factor
    assert scaled.link.bandwidth == whole.link.bandwidth * factor
    for before, after in zip(whole.guest.workload, scaled.guest.workload, strict=True):
        assert after.working_set == before.working_set * factor
        assert after.pages_per_s == before.pages_per_s * factor


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--only", "speed"], "--only"), (["--json", "/nowhere/at/all.json", "--only", "help"], "/nowhere/at/all.json")],
)
def test_bad_arguments_are_one_sentence(argv, said, capsys):
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_host_profile_still_comes_from_here(tmp_path, monkeypatch):
    monkeypatch.setattr("migsim.host_bench.unavailable_reason", lambda: "no /dev/kvm here")
    path = tmp_path / "here.toml"
    assert main(["bench", "--host", str(path)]) == 0
    assert load_profile(str(path)).machine.memory_bandwidth.source.startswith("measured:")
