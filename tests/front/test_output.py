"""Standard output that is full, closed or hung up: one sentence, never a traceback, and a delivered result counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migsim.result import check_writable, from_json, write_whole

TINY = "configs/tiny.toml"
COMMANDS = (
    f"run {TINY}",
    f"run {TINY} --json -",
    "run --schema",
    "check --suite errno",
    "check --list",
    "selftest demand_paging_test",
    "selftest demand_paging_test --json -",
    f"compare --mmu {TINY}",
    "bench --list",
    "shape --xml {xml}",
    "--help",
    "run --help",
)
DOMAIN = "<domain><name>a</name><memory>4194304</memory><vcpu>2</vcpu></domain>"


def shell(line: str, *, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    words = ["bash", "-c", f"set -o pipefail; '{sys.executable}' -m migsim {line}"]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("closed", [">/dev/full", ">&-"])
def test_a_full_or_closed_stdout_is_one_sentence_and_exit_2(command, closed, tmp_path):
    xml = tmp_path / "d.xml"
    xml.write_text(DOMAIN)
    done = shell(f"{command.format(xml=xml)} {closed}")
    lines = [line for line in done.stderr.splitlines() if "compiling" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("migsim: standard output cannot be written: ")


@pytest.mark.parametrize("command", ["run --help", "selftest demand_paging_test"])
def test_it_is_the_same_sentence_without_a_buffer(command):
    done = shell(f"{command} >/dev/full", unbuffered="1")
    assert done.returncode == 2
    assert done.stderr == "migsim: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("closed", [">/dev/full", ">&-"])
def test_a_result_in_its_file_is_delivered_whatever_stdout_does(closed, tmp_path):
    path = tmp_path / "r.json"
    done = shell(f"run {TINY} --json {path} {closed}")
    assert done.returncode == 0 and done.stderr.rstrip().endswith("the result goes to its file")
    assert from_json(path.read_bytes()).converged
    selftest = shell(f"selftest demand_paging_test --json {path} {closed}")
    assert selftest.returncode == 0 and "demand_paging_test" in path.read_text()
    check = shell(f"check --suite errno --ktap {path} {closed}")
    assert check.returncode == 0 and path.read_text().startswith("KTAP version 1")
    bench = shell(f"bench --quick --only corpus --json {path} {closed}")
    assert bench.returncode == 0 and path.read_text().startswith("{")


@pytest.mark.parametrize("closed", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize("command", [f"run {TINY} --json -", "check --suite errno"])
def test_a_stderr_that_cannot_be_written_changes_nothing(command, closed):
    done = shell(f"{command} {closed}")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_nobody_is_left_to_tell():
    done = shell(f"run {TINY} >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_file_opened_after_stdout_was_closed_holds_only_its_own_text(tmp_path):
    path = tmp_path / "r.json"
    shell(f"run {TINY} --json {path} >&-")
    assert from_json(path.read_bytes()).seed == 0


@pytest.mark.parametrize("command", ["--help", "check --list", "bench --list", "selftest demand_paging_test"])
def test_a_reader_that_left_is_no_error(command):
    done = shell(f"{command} | true")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_whole_file_replaces_the_old_one_and_a_device_is_written_in_place(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    write_whole(b"new", str(path))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    check_writable("/dev/null")
    write_whole(b"gone", "/dev/null")
    with pytest.raises(OSError, match="No space"):
        write_whole(b"lost", "/dev/full")


def test_checks_go_on_when_their_reader_leaves_and_the_answer_stays_true():
    done = shell("check --suite errno -v | true")
    assert (done.returncode, done.stderr) == (0, "")
    broken = shell("check --backend examples.atomic_bitmap:OffByOneBitmap -v | true")
    assert (broken.returncode, broken.stderr) == (1, "")


def test_a_result_that_cannot_be_written_is_still_printed(capsys):
    from migsim.cli import main

    assert main(["run", TINY, "--json", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("Converges in") and "cannot write the result: No space left" in err


def test_a_link_stays_a_link_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("target")
    write_whole(b"1", str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"1"
    (tmp_path / "loop").symlink_to("loop")
    check_writable(str(tmp_path / "loop"))


def test_stdout_by_its_other_names_is_stdout(tmp_path):
    done = shell(f"run {TINY} --json /dev/stdout 2>/dev/null")
    assert from_json(done.stdout.encode()).converged


def test_outputs_that_would_overwrite_each_other_are_refused(tmp_path, capsys):
    from migsim.cli import main

    assert main(["run", TINY, "--json", f"{tmp_path}/r", "--trace", f"{tmp_path}/./r"]) == 2
    assert "cannot go to the same place" in capsys.readouterr().err
    assert main(["run", TINY, "--trace", "-"]) == 2
    assert "takes a file" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C"}])
def test_text_that_a_locale_cannot_show_is_no_error(locale, tmp_path):
    xml = tmp_path / "d.xml"
    xml.write_text(DOMAIN.replace(">a<", ">gr\u00f6\u00dfe \u20ac<"), encoding="utf-8")
    words = [sys.executable, "-m", "migsim"]
    environment = {**os.environ, **locale}
    shape = subprocess.run([*words, "shape", "--xml", xml], capture_output=True, check=True, env=environment)
    assert 'name = "gr\u00f6\u00dfe \u20ac"' in shape.stdout.decode("utf-8")
    odd = tmp_path / "\u00f6.toml"
    odd.write_bytes(Path(TINY).read_bytes())
    done = subprocess.run([*words, "compare", odd, TINY], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
