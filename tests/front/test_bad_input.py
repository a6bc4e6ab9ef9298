"""Whatever a user gives: one sentence on stderr, exit 2, no traceback, and nothing allocated or written before."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migsim.cli import main

TINY = "configs/tiny.toml"


@pytest.fixture
def refused(capsys):
    """Runs a command; returns its one sentence."""

    def run(*argv: object) -> str:
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), (code, out, err)
        assert err.startswith("migsim") and err.count("\n") == 1, err
        assert "Traceback" not in err
        return err

    return run


def test_a_missing_file(refused, tmp_path):
    assert "No such file" in refused("run", tmp_path / "absent.toml")


def test_a_directory(refused, tmp_path):
    assert "is a directory" in refused("run", tmp_path)


def test_a_name_no_file_can_have(refused):
    assert "cannot be opened" in refused("run", "a\0b")
    assert "too long" in refused("run", "x" * 5000)


def test_binary_junk(refused, tmp_path):
    junk = tmp_path / "junk.toml"
    junk.write_bytes(random.Random(1).randbytes(4096))
    assert "not UTF-8" in refused("run", junk)
    junk.write_bytes(b"\0" * 4096)
    assert "not valid TOML" in refused("run", junk)


def test_a_file_of_100_mb_is_refused_by_its_size(refused, tmp_path, monkeypatch):
    big = tmp_path / "big.toml"
    with big.open("wb") as stream:
        stream.truncate(100 << 20)
    monkeypatch.setattr(Path, "open", lambda *a, **k: pytest.fail("it was opened"))
    assert "104857600 bytes" in refused("run", big)
    assert "104857600 bytes" in refused("shape", "--xml", big)


def test_an_endless_file_is_read_up_to_the_limit(refused):
    assert "longer than" in refused("run", "/dev/zero")


def test_nesting_that_would_exhaust_the_stack(refused, tmp_path):
    deep = tmp_path / "deep.toml"
    deep.write_text("a = " + "[" * 100_000)
    assert "nested too deeply" in refused("run", deep)


def test_an_absurdly_long_number(refused, tmp_path):
    long = tmp_path / "long.toml"
    long.write_text("[guest]\nmemory = " + "9" * 10_000)
    refused("run", long)


def test_control_characters_do_not_reach_the_terminal(refused, tmp_path):
    evil = tmp_path / "evil.toml"
    evil.write_text('[guest]\nmemory = "1 GiB"\nbacking = "\\u001b[2J"\n"\\u001b[31mkey" = 1\n')
    assert "\x1b" not in refused("run", evil)
    assert "\x1b" not in refused("run", evil, "--set", "guest.\x1b[2J=1")


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("guest.memry=1 GiB", "guest.memry"),
        ("guest.memory=12 Tib/s", "guest.memory"),
        ("guest.memory=-1 GiB", "guest.memory"),
        ("guest.memory=268435457 B", "guest.memory"),
        ("guest.workload.1={pattern='uniform', rate='1 MB/s', working-set='200 MiB'}", "guest.workload"),
        ("guest.workload=7", "guest.workload"),
        ("link.bandwidth=2 Gbit", "link.bandwidth"),
        ("migration.downtime-limit=-1", "migration.downtime-limit"),
        ("host.profile=3", "host.profile"),
    ],
)
def test_a_wrong_value_names_its_field(refused, setting, field):
    assert field in refused("run", TINY, "--set", setting)


@pytest.mark.parametrize("flag", [["--seed", "-1"], ["--seed", "x"], ["--seed", str(1 << 64)], ["--threads", "0"]])
def test_a_wrong_flag(refused, flag):
    assert "must be a whole number" in refused("run", TINY, *flag)


def test_no_scenario_an_unknown_flag_and_an_unknown_command(refused):
    assert "a scenario is needed" in refused("run")
    assert "unrecognized arguments" in refused("run", TINY, "--frobnicate")
    assert 'did you mean "run"' in refused("rnu", TINY)


def test_an_unwritable_result_is_refused_before_the_run(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("migsim.simulation.run", lambda *a, **k: pytest.fail("it ran"))
    assert "No such file" in refused("run", TINY, "--json", tmp_path / "absent" / "r.json")
    assert "directory" in refused("run", TINY, "--json", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_guest_that_does_not_fit_is_refused_with_both_figures(refused, monkeypatch):
    monkeypatch.setattr("migsim.simulation.run", lambda *a, **k: pytest.fail("it ran"))
    text = refused("run", TINY, "--set", "guest.memory=4096 TiB")
    assert "this guest needs" in text and "are free" in text


def test_a_guest_beyond_the_address_space_limit_is_refused_too():
    limited = "ulimit -v 6000000; exec \"$0\" -m migsim run configs/m2-ultramem-416.toml --set guest.memory=256TiB"
    done = subprocess.run(["bash", "-c", limited, sys.executable], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "are free" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


# --- XML

DOMAIN = "<domain type='kvm'><name>a</name><memory unit='GiB'>1</memory><vcpu>2</vcpu></domain>"
LAUGHS = '<!DOCTYPE d [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>' + DOMAIN.replace("<name>a", "<name>&b;")
OUTSIDE = '<!DOCTYPE d [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + DOMAIN.replace("<name>a", "<name>&a;")
REMOTE = '<!DOCTYPE domain SYSTEM "http://127.0.0.1:9/x.dtd">' + DOMAIN


@pytest.mark.parametrize("xml", [LAUGHS, OUTSIDE, REMOTE], ids=["billion laughs", "external entity", "remote DTD"])
def test_a_document_type_is_refused_unread(refused, tmp_path, xml):
    path = tmp_path / "d.xml"
    path.write_text(xml)
    assert "DOCTYPE" in refused("shape", "--xml", path)


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        ("", "not well-formed"),
        ("<domain>", "not well-formed"),
        ("<domain>&nbsp;</domain>", "not well-formed"),
        ("<network/>", "not <domain>"),
        ("<domain/>", "domain/memory: is missing"),
        ("<domain><memory>x</memory></domain>", "expected a whole number"),
        ("<domain><memory>-4</memory></domain>", "expected a whole number"),
        ("<domain><memory>0</memory></domain>", "must be from 4096"),
        ("<domain><memory unit='parsec'>4</memory></domain>", "must be one of b,"),
        ("<domain><memory>99999999999999999999</memory></domain>", "must be from 4096"),
        (DOMAIN.replace("<vcpu>2", "<vcpu>0"), "domain/vcpu = 0"),
        (DOMAIN.replace("<vcpu>2", "<vcpu>99999"), "domain/vcpu = 99999"),
        (DOMAIN.replace("</domain>", "<os><type arch='aarch64'>hvm</type></os></domain>"), "x86 only"),
        ("<domain>" * 100 + "</domain>" * 100, "levels deep"),
        ("<domain>" + "<a/>" * 100_001 + "</domain>", "100000 elements"),
    ],
)
def test_xml_that_is_no_domain(refused, tmp_path, xml, why):
    path = tmp_path / "d.xml"
    path.write_text(xml)
    assert why in refused("shape", "--xml", path)


def test_shape_needs_one_source(refused):
    for argv in ([], ["test:///default"], ["test:///default", "test", "--xml", "x"]):
        assert "either URI DOMAIN or --xml FILE" in refused("shape", *argv)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.binary(max_size=300))
def test_any_bytes_at_all_as_scenario_and_as_xml(refused, tmp_path, raw):
    path = tmp_path / "raw"
    path.write_bytes(raw)
    refused("run", path)
    refused("shape", "--xml", path)


def test_a_closed_pipe_is_no_error():
    # The reader leaves before a byte is written; what is printed then must not end in a traceback.
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "migsim", "run", "--schema"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
