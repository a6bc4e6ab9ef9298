"""The throttle's timer: when a vCPU sleeps and runs, and what the guest has written by then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim import simulation
from migsim.guest.workload import UNIFORM, Stream, Workload
from migsim.migration.policies.auto_converge import Cycle, ThrottleTimer, cycle_of
from migsim.scenario import Scenario, build
from migsim.units import NS_PER_MS, NS_PER_S

PERCENTAGES = st.integers(1, 99)
LATE_NS = st.integers(0, 3 * NS_PER_MS)


@st.composite
def timers(draw: st.DrawFn) -> ThrottleTimer:
    """One or two percentages, the second set while the first is in force."""
    timer, at_ns = ThrottleTimer(), draw(st.integers(0, NS_PER_S))
    for _ in range(draw(st.integers(1, 3))):
        timer.follow(cycle_of(draw(PERCENTAGES), at_ns, wake_ns=draw(LATE_NS), tick_delay_ns=draw(LATE_NS)))
        at_ns += draw(st.integers(0, 2 * NS_PER_S))
    return timer


def steps(timer: ThrottleTimer, begin_ns: int, end_ns: int, step_ns: int) -> int:
    """The rule, step by step: a vCPU runs where it does not sleep."""
    return sum(step_ns for at in range(begin_ns, end_ns, step_ns) if not timer.sleeps_for_ns(at))


@given(timers(), st.integers(0, NS_PER_S), st.integers(1, 40))
def test_running_time_is_what_is_left_of_the_sleeps(timer: ThrottleTimer, after_ns: int, parts: int) -> None:
    begin_ns = timer.cycles[0].start_ns + after_ns
    step_ns = 100_000
    end_ns = begin_ns + parts * 10 * step_ns
    ticks = 2 + (end_ns - begin_ns) // min(cycle.period_ns for cycle in timer.cycles)
    assert abs(timer.run_ns(begin_ns, end_ns) - steps(timer, begin_ns, end_ns, step_ns)) <= 2 * ticks * step_ns


@given(timers(), st.lists(st.integers(0, 3 * NS_PER_S), min_size=3, max_size=3))
def test_running_times_of_parts_add_up_and_fit_into_the_time(timer: ThrottleTimer, at: list[int]) -> None:
    a, b, c = sorted(at)
    base = timer.cycles[0].start_ns
    a, b, c = base + a, base + b, base + c
    assert timer.run_ns(a, b) + timer.run_ns(b, c) == timer.run_ns(a, c)
    assert 0 <= timer.run_ns(a, c) <= c - a


def test_the_first_percentage_sleeps_at_once_and_the_next_waits_for_its_tick() -> None:
    timer = ThrottleTimer()
    timer.follow(cycle_of(50, 7 * NS_PER_MS))
    assert timer.cycles == [Cycle(7 * NS_PER_MS, 10 * NS_PER_MS, 20 * NS_PER_MS)]
    assert timer.sleeps_for_ns(7 * NS_PER_MS) == 10 * NS_PER_MS
    timer.follow(cycle_of(99, 30 * NS_PER_MS))  # the tick at 27 ms is over: it runs from 37 to 47 ms, then sleeps long
    assert timer.cycles[-1].start_ns == 47 * NS_PER_MS
    assert timer.sleeps_for_ns(46 * NS_PER_MS) == 0
    assert timer.sleeps_for_ns(47 * NS_PER_MS) == 990 * NS_PER_MS


@given(PERCENTAGES, st.lists(st.integers(1, 120 * NS_PER_MS), min_size=1, max_size=20))
def test_write_clocks_follow_the_bursts_and_never_run_back(percentage: int, waits: list[int]) -> None:
    cycle = cycle_of(percentage, 0)
    timer, guest = ThrottleTimer([cycle]), Workload([Stream(UNIFORM, 0, 1 << 20, 1e6)], 1, 0)
    guest.set_bursts(timer.run_ns)
    guest.set_pace(1.0 - cycle.sleep_ns / cycle.period_ns, 1.0)
    now_ns, seen = 0, 0.0
    for wait_ns in waits:
        guest.advance(now_ns + wait_ns // 2)  # somebody looks in the middle of a call
        assert guest.clock[0] >= seen
        seen, now_ns = float(guest.clock[0]), now_ns + wait_ns
        guest.settle(now_ns)
        assert guest.clock[0] >= seen
        ahead_ns = cycle.sleep_ns  # of its bursts by no more than the mean's part of a sleep
        assert timer.run_ns(0, now_ns) <= guest.clock[0] * 1000 + 1 <= timer.run_ns(0, now_ns + ahead_ns) + ahead_ns
        seen = float(guest.clock[0])


@pytest.mark.parametrize(("percentage", "kept"), [(5, 1.0), (8, 1.0), (9, 0.91), (50, 0.5)])
def test_what_is_lost_in_short_sleeps_is_made_up_for_up_to_a_limit(percentage: int, kept: float) -> None:
    """A guest that drops what it is more than 1 ms behind: up to 8 % of throttle its sleeps are shorter than that."""
    cycle = cycle_of(percentage, 0, wake_ns=90_000)
    guest = Workload([Stream(UNIFORM, 0, 1 << 20, 1e5, headroom=5.0, made_up_ns=NS_PER_MS)], 1, 0)
    guest.set_bursts(ThrottleTimer([cycle]).run_ns, cycle.sleep_ns)
    guest.set_pace(1.0 - cycle.sleep_ns / cycle.period_ns, 1.0)
    guest.settle(20 * NS_PER_S)
    assert guest.clock[0] / 2e6 == pytest.approx(kept, abs=0.012)


def throttled(accel: str) -> Scenario:
    return build(
        {
            "guest": {
                "memory": "256 MiB", "machine": "pc",
                "workload": [{"pattern": "uniform", "rate": "300 MB/s", "working-set": "128 MiB"}],
            },
            "kvm": {"accel": accel},
            "migration": {
                "compat": "7.2", "capabilities": ["auto-converge"], "cpu-throttle-initial": 99,
                "max-bandwidth": "50 MB/s", "downtime-limit": 100, "cancel-after": "30 s",
            },
            "link": {"bandwidth": "10 Gbit/s"},
        }
    )  # fmt: skip


@pytest.mark.parametrize("accel", ["tcg", "kvm"])
def test_a_sync_waits_for_sleeping_vcpus_under_tcg_alone(accel: str) -> None:
    """tcg_log_global_after_sync: at 99 % of throttle a vCPU sleeps 990 ms at a stretch."""
    result = simulation.run(throttled(accel), seed=1, threads=1, verify=True)
    slow = [row for row in result.rounds if row.cpu_throttle_percentage == 99]
    sent = sum(row.transferred_bytes for row in slow[:-1]) / 50e6 * NS_PER_S
    spent = sum(row.duration_ns for row in slow[:-1])
    assert result.converged and result.verify["lost-pages"] == 0
    assert (spent > sent + 300 * NS_PER_MS) == (accel == "tcg")
