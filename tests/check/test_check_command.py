"""`migsim check` as a CI server sees it: exit codes, reports that parse, one sentence for what is missing."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from migsim.cli import main
from migsim.host_kvm import device
from migsim.host_kvm.device import unavailable_reason
from migsim.validate.backends import Backend, BadBackend, emulated, plugin
from migsim.validate.case import Case, Context
from migsim.validate.command import add_arguments, run_check
from migsim.validate.junit import junit
from migsim.validate.ktap import ktap
from migsim.validate.registry import all_plans, suite_names
from migsim.validate.runner import run_case
from migsim.validate.seeded.hunt import BUGS
from migsim.validate.verdicts import CheckFailed, Outcome

needs_kvm = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

OUTCOMES = (
    Outcome("emulated", "errno", "get", "passed", bits=10, ops=3, seconds=0.5),
    Outcome("emulated", "errno", "clear # odd", "failed", "page 3 is lost", 0, 7, 0.1, "migsim check --suite errno"),
    Outcome("host", "random", "any", "skipped", "no /dev/kvm"),
)


def check(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_check(parser.parse_args(words))


def refused(*words: str) -> int:
    """As above, but through the command line, which turns refusals into sentences."""
    return main(["check", *words])


def test_a_suite_that_passes_exits_0_and_counts_its_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--suite", "errno") == 0
    out = capsys.readouterr().out
    assert re.search(r"emulated: 5 passed, 0 failed, 0 skipped; \d{3} bits verified in \d+ operations", out)


def test_the_same_seed_gives_the_same_counts(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for seed in ("7", "7", "8"):
        assert check("--suite", "random/tdp,W", "--ops", "3000", "--seed", seed) == 0
        counts.append(re.findall(r"(\d+) bits verified in (\d+)", capsys.readouterr().out))
    assert counts[0] == counts[1] != counts[2]


def test_a_failing_case_exits_1_with_a_line_that_repeats_just_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--backend", "examples.atomic_bitmap:OffByOneBitmap", "--suite", "memslot_test/many slots") == 1
    out = capsys.readouterr().out
    repeat = re.search(r"repeat: migsim check (.*)", out)
    assert repeat is not None
    assert check(*shlex.split(repeat[1])) == 1


def test_the_worked_example_of_a_bitmap_passes_and_says_what_does_not_apply(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--backend", "examples.atomic_bitmap:AtomicBitmap") == 0
    assert "a dirty bitmap is no KVM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--suite", "nope"), "no such suite; allowed: errno, "),
        (("--suite", "differential"), "it needs --backend all"),
        (("--backend", "nope"), "'emulated', 'host', 'all' or module:Class is allowed"),
        (("--backend", "no_such_module:X"), "No module named 'no_such_module'"),
        (("--backend", "examples.atomic_bitmap:Nope"), "has no Nope"),
        (("--backend", "argparse:Action"), "neither a bitmap's mark_dirty"),
        (("--seeded-bugs", "--bug", "nope"), '--bug = "nope": no such bug; known: '),
        (("--bug", "no-final-bitmap"), "goes with --seeded-bugs"),
        (("--suite", "errno", "--ktap", "/nonexistent/x"), "/nonexistent/x: the result cannot be written there"),
        (("--suite", "errno", "--junit", "/tmp"), "/tmp: the result cannot be written there"),
        (("--suite", "errno", "--ktap", "-", "--junit", "-"), "cannot go to the same place"),
        (("--suite", "errno", "--scripts", "/dev/null/x"), "scripts cannot be written there: Not a directory"),
    ],
)
def test_bad_input_exits_2_with_one_sentence(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(*words) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_a_device_all_runs_the_emulator_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device.unavailable_reason, "__defaults__", ("/nowhere/kvm",))
    assert check("--backend", "all", "--suite", "errno") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("migsim check: the host cannot be checked: no /nowhere/kvm")
    assert captured.err.rstrip().endswith("the emulator's suites still run")
    assert "emulated: 5 passed" in captured.out


def test_without_a_device_host_alone_says_that_nothing_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device.unavailable_reason, "__defaults__", ("/nowhere/kvm",))
    assert check("--backend", "host") == 1
    captured = capsys.readouterr()
    assert "nothing ran" in captured.err and "nothing ran" in captured.out


@needs_kvm
def test_an_old_kernel_without_rings_is_named_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from migsim.host_kvm import HostVm

    whole = HostVm.check_extension
    monkeypatch.setattr(HostVm, "check_extension", lambda vm, cap: 0 if cap in (192, 223) else whole(vm, cap))
    assert check("--backend", "host", "--suite", "memslot_test") == 1
    captured = capsys.readouterr()
    assert "this kernel has no KVM_CAP_DIRTY_LOG_RING (Linux 5.11)" in captured.err
    assert "0 failed" in captured.out


@needs_kvm
def test_the_host_passes_what_it_can_show_and_names_what_it_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--backend", "host") == 0
    assert "KVM shows no SPTE or TLB entry" in capsys.readouterr().out


@needs_kvm
def test_with_all_the_differential_runs_and_says_what_it_cannot_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--backend", "all", "--suite", "differential", "--ops", "1000") == 0
    out = capsys.readouterr().out
    assert "all: 1 passed" in out and "cannot be:\n  SPTEs" in out


def test_a_case_that_verifies_nothing_does_not_pass() -> None:
    outcome = run_case(emulated(), Case("s", "empty", lambda context: None), seed=0, ops=1)
    assert outcome.status == "failed" and "verified nothing" in outcome.reason


def test_a_case_without_its_feature_is_skipped_with_the_backends_reason() -> None:
    backend = Backend("b", emulated().make, frozenset(), {"x": "because"})
    assert run_case(backend, Case("s", "c", lambda context: None, ("x",)), seed=0, ops=1).reason == "because"


def test_an_assertion_of_the_emulator_is_a_failure_of_the_case() -> None:
    def body(context: Context) -> None:
        raise AssertionError("roots left")

    assert run_case(emulated(), Case("s", "c", body), seed=0, ops=1).reason == "assertion: roots left"


def test_ktap_follows_version_1() -> None:
    lines = ktap(OUTCOMES).splitlines()
    assert lines[:5] == ["KTAP version 1", "1..2", "  KTAP version 1", "  # Subtest: emulated/errno", "  1..2"]
    assert "  ok 1 get" in lines
    assert "  not ok 2 clear no. odd" in lines
    assert "  # repeat: migsim check --suite errno" in lines
    assert "not ok 1 emulated/errno" in lines
    assert "  ok 1 any # SKIP no /dev/kvm" in lines
    assert "ok 2 host/random # SKIP" in lines


def test_junit_parses_and_carries_counts_messages_and_bits() -> None:
    root = ElementTree.fromstring(junit(OUTCOMES).split("\n", 1)[1])
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("3", "1", "1")
    failed = root.find(".//failure")
    assert failed is not None and failed.get("message") == "page 3 is lost"
    bits = root.find(".//property[@name='bits-verified']")
    assert bits is not None and bits.get("value") == "10"


def test_reports_and_scripts_are_written_where_asked(tmp_path: Path) -> None:
    ktap_file, junit_file = tmp_path / "a.ktap", tmp_path / "a.xml"
    words = ("--suite", "memslot_test/many slots", "--ktap", str(ktap_file), "--junit", str(junit_file))
    assert check("--backend", "examples.atomic_bitmap:OffByOneBitmap", *words, "--scripts", str(tmp_path / "s")) == 1
    assert ktap_file.read_text().startswith("KTAP version 1\n")
    assert ElementTree.parse(junit_file).getroot().get("failures") == "1"
    assert sorted(path.suffix for path in (tmp_path / "s").iterdir()) == [".c", ".py"]


def test_an_unknown_bug_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    name = next(iter(BUGS))
    assert refused("--seeded-bugs", "--bug", f"{name}x") == 2
    assert f'did you mean "{name}"?' in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("migsim.validate.check.run_plans", lambda *a, **k: pytest.fail("it ran"))
    for flag in ("--ktap", "--junit"):
        assert refused("--suite", "errno", flag, "/nonexistent/x") == 2
    capsys.readouterr()


def test_an_old_report_stays_when_the_new_one_cannot_be_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "a.ktap"
    report.write_text("old")
    with monkeypatch.context() as full:
        full.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert refused("--suite", "errno", "--ktap", str(report)) == 2
    assert capsys.readouterr().err == f"migsim: {report}: cannot write the report: No space left\n"
    assert report.read_text() == "old" and list(tmp_path.iterdir()) == [report]


def test_every_suite_is_listed_once_and_its_cases_have_names_of_their_own() -> None:
    plans = list(all_plans([emulated()]))
    names = [f"{plan.case.suite}/{plan.case.name}" for plan in plans]
    assert len(names) == len(set(names))
    assert len(suite_names()) == len(set(suite_names())) >= 13


def test_a_vm_class_of_somebody_elses_may_be_the_backend() -> None:
    with pytest.raises(BadBackend):
        plugin("argparse:Namespace")
    assert plugin("migsim.host_kvm:HostVm").shows == {"dirty-log"}


def test_a_failed_check_keeps_its_sentence_and_script() -> None:
    failure = CheckFailed("page 1 is lost", ())
    assert str(failure) == failure.sentence == "page 1 is lost"
