"""What a person reads: the verdict first, a line a round, the blackout's parts, within the width there is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim.expectation import surprises
from migsim.quantities import counted
from migsim.result import DowntimePart, Progress, Result, Round
from migsim.scenario import Expect, load
from migsim.terminal import ProgressBar, summary

TINY = load(Path(__file__).parents[2] / "configs/tiny.toml")


def rounds(n: int) -> tuple[Round, ...]:
    return tuple(
        Round(
            sync=i + 1,
            start_ns=i * 77 * 10**9,
            dirty_pages=3_221_225_472 >> i,
            sent_pages=1 << 20,
            zero_pages=5,
            bandwidth=12.5e9,
            threshold_bytes=3_750_000_000,
            expected_downtime_ms=1234,
            stopped=i == n - 1,
        )
        for i in range(n)
    )


def result(**values) -> Result:
    spent = {"vm-stop": 2_000_000, "last-pass": 98_000_000}
    parts = tuple(DowntimePart(name=name, duration_ns=ns) for name, ns in spent.items())
    base = {"verdict": "Limited by the link: converged.", "converged": True, "scenario": TINY, "seed": 0}
    return Result(**{**base, "rounds": rounds(4), "downtime": parts, "kvm": {"pf_fast": 12_345}, **values})


def test_the_verdict_comes_first_then_rounds_then_the_parts_of_the_blackout():
    text = summary(result(), 120)
    assert text.startswith("Limited by the link: converged.\n")
    assert text.index("threshold") < text.index("Blackout 100 ms") < text.index("pf_fast")
    assert "12 TiB" in text and "100.00 Gbit/s" in text and "3:51.0 min" in text
    assert "last-pass      98 ms   98.0%" in text


@given(st.integers(0, 200), st.integers(60, 200))
def test_it_fits_the_terminal_and_stays_short(n, width):
    lines = summary(result(rounds=rounds(n)), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < 60
    if n > 24:
        assert any(f"... {counted(n - 24, 'more round')} (" in line for line in lines)


def test_a_throttle_gets_its_column_only_when_there_was_one():
    assert "throttle" not in summary(result(), 160)
    throttled = msgspec.structs.replace(rounds(1)[0], cpu_throttle_percentage=30)
    assert "30 %" in summary(result(rounds=(throttled,)), 160)


@pytest.mark.parametrize(
    ("expect", "phrase"),
    [
        (Expect(converged=True, downtime=(50, 150)), None),
        (Expect(converged=False), "it converged"),
        (Expect(converged=True, downtime=(150, 250)), "downtime 100 ms lies outside 150 to 250 ms"),
        (Expect(converged=True, total_time=(1, 2)), "total time is not known"),
        (Expect(converged=True, syncs=(1, 2)), "syncs 3 lies outside 1 to 2"),
    ],
)
def test_an_expectation_is_compared_and_said(expect, phrase):
    scenario = msgspec.structs.replace(TINY, expect=expect)
    told = result(scenario=scenario, migration={"downtime": 100, "ram": {"dirty-sync-count": 3}})
    assert surprises(told) == ([] if phrase is None else [phrase])
    text = summary(told, 120)
    assert ("As the scenario expected." in text) == (phrase is None)
    assert phrase is None or phrase in text


def test_the_bar_shows_simulated_time_and_is_silent_off_a_terminal(capsys):
    half = {"remaining_bytes": 10**9, "total_bytes": 2 * 10**9}
    now = Progress(now_ns=10**10, phase="active", sync=2, rounds=rounds(1), **half)
    with ProgressBar(enabled=False) as bar:
        bar.update(now)
    assert capsys.readouterr() == ("", "")
    with ProgressBar(enabled=True) as bar:
        bar.update(now)
        bar.update(now)
    out, err = capsys.readouterr()
    assert out == "" and "active, sync 2" in err and "10 s simulated" in err and "ETA" in err


def test_counters_show_their_unit_once():
    host = {"lock-write-held-ns": 105 * 10**9, "vcpu-stalls": {"4": 7, "more": 1}, "guest-throughput-share": 0.9996}
    text = summary(result(host={**host, "memory": {"page-tables-bytes": 24 << 30}}), 200)
    shown = ("lock-write-held", "1:45 min", "24 GiB", "vCPU stalls up to 4 us", "vCPU stalls above 1 s", "99.96%")
    assert [phrase for phrase in shown if phrase not in text] == []
    assert "-ns" not in text and "-bytes" not in text


def test_the_bar_of_a_run_that_gets_no_further_ends_at_the_time_limit(capsys):
    left = {"remaining_bytes": 10**9, "total_bytes": 2 * 10**9, "time_limit_ns": 3600 * 10**9}
    stuck = tuple(msgspec.structs.replace(rounds(1)[0], sync=i + 1, dirty_pages=10**6 + i % 3) for i in range(40))
    for told, phrase, there in ((stuck, "sync 40, downtime 1.234 s, limit 300 ms", True), (rounds(30), "limit", False)):
        now = Progress(
            now_ns=1800 * 10**9, phase="active", sync=len(told), rounds=told, downtime_limit_ms=300, **left
        )  # fmt: skip
        with ProgressBar(enabled=True) as bar:
            bar.update(now)
        err = capsys.readouterr().err
        assert (phrase in err) == there and (" 50%|" in err) == there, err


def test_a_long_table_keeps_its_first_and_last_rounds_and_counts_the_others():
    lines = summary(result(rounds=rounds(500)), 120).splitlines()
    at = next(i for i, line in enumerate(lines) if "more rounds" in line)
    syncs = [int(line.split()[0]) for line in (*lines[at - 12 : at], *lines[at + 1 : at + 13])]
    assert syncs == [*range(1, 13), *range(489, 501)] and "476 more rounds" in lines[at]
