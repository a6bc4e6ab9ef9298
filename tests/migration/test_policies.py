"""Policies: what each does with what it sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.policies import (
    AutoConverge,
    Cancel,
    CloudHypervisor,
    DirtyLimit,
    DirtyTrigger,
    Kubevirt,
    LibvirtTimeout,
    Nova,
    Ovirt,
    Period,
    Platform,
    PostcopyAfter,
    Sample,
    SetParameters,
    StartPostcopy,
    StopGuest,
    VcpuDirtyRate,
    duty,
    throttled_rate,
)
from migsim.migration.policies.nova import downtime_steps
from migsim.migration.postcopy import FaultCosts, fault_latency_ns
from migsim.scenario import build
from migsim.units import GIB, NS_PER_S

BAD, GOOD = Period(100, 100), Period(10, 100)


def sample(seconds: float = 0, *, syncs: int = 1, remaining: int = GIB) -> Sample:
    return Sample(int(seconds * NS_PER_S), "active", remaining, 4 * GIB, 0, syncs, 300, mbps=800)


def test_every_second_bad_period_is_one_step_even_with_good_ones_between() -> None:
    policy = AutoConverge(initial=20, increment=10, maximum=45)
    steps = [policy.after_period(p) for p in (BAD, GOOD, BAD, BAD, GOOD, GOOD, BAD, BAD, BAD, BAD, BAD)]
    assert steps == [None, None, 20, None, None, None, 30, None, 40, None, 45]


def test_tailslow_takes_no_more_than_the_last_period_asks_for() -> None:
    policy = AutoConverge(initial=20, increment=50, tailslow=True, trigger=DirtyTrigger(50))
    assert [policy.after_period(Period(60, 100)) for _ in range(4)] == [None, 20, None, 34]  # 80 - 80*50//60


@given(st.integers(1, 99))
def test_duty_is_the_complement_on_an_ideal_host_and_falls_with_late_wakeups(percentage: int) -> None:
    assert duty(percentage) == pytest.approx(1 - percentage / 100)
    assert duty(percentage, wake_ns=90_000) < duty(percentage) < duty(percentage, tick_delay_ns=100_000)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6)), max_size=60), st.integers(1, 99))
def test_auto_converge_never_lowers_and_never_passes_its_maximum(periods: list[tuple[int, int]], top: int) -> None:
    policy = AutoConverge(initial=1, increment=7, maximum=top)
    seen = [p for p in (policy.after_period(Period(*pair)) for pair in periods) if p is not None]
    assert seen == sorted(seen) and all(1 <= p <= max(1, top) for p in seen)


def test_dirty_limit_brings_a_writer_down_to_its_quota_and_leaves_others_alone() -> None:
    limit = DirtyLimit(vcpus=2, ring_size=4096, quota=100)
    limit.set_limit(100)
    full_mib_s, rate = 800.0, 800.0
    for _ in range(60):
        limit.adjust([VcpuDirtyRate(0, int(rate)), VcpuDirtyRate(1, 30)])
        rate = throttled_rate(full_mib_s * 256, 4096, limit.sleep_us(0)) / 256
    assert abs(rate - 100) <= 35
    assert limit.sleep_us(1) <= limit.ring_full_us() * 99
    limit.set_limit(0, 1)
    assert sorted(limit.limits) == [0]


def test_nova_raises_the_downtime_linearly_and_gives_up_after_its_timeout() -> None:
    assert downtime_steps(3, downtime_ms=400, steps=10, delay_s=30)[:3] == [(0, 40), (90, 76), (180, 112)]
    assert downtime_steps(3, downtime_ms=400, steps=10, delay_s=30)[-1] == (900, 400)
    nova = Nova(4 * GIB)
    assert nova.poll(sample(0)) == (SetParameters({"downtime-limit": 50}),)
    assert nova.poll(sample(1)) == ()
    assert isinstance(nova.poll(sample(3300))[0], Cancel)


def test_nova_switches_to_postcopy_once_a_pass_gains_less_than_a_tenth() -> None:
    nova = Nova(4 * GIB, permit_post_copy=True, schedule=[])
    nova.schedule = []
    assert nova.poll(sample(1, syncs=2, remaining=1000)) == ()
    assert nova.poll(sample(2, syncs=3, remaining=500)) == ()
    assert nova.poll(sample(3, syncs=4, remaining=480)) == (StartPostcopy(),)


def test_kubevirt_aborts_a_stall_and_its_ramp_stops_at_the_ceiling() -> None:
    stuck = Kubevirt(4 * GIB)
    assert stuck.poll(sample(0)) == () and isinstance(stuck.poll(sample(151))[0], Cancel)
    ramp = Kubevirt(100 * GIB, ramp=True)
    set_to = [c.parameters["downtime-limit"] for c in ramp.before_migrate() if isinstance(c, SetParameters)]
    for second in range(100):
        commands = ramp.poll(sample(second, syncs=2 + second, remaining=GIB - second))
        set_to += [c.parameters["downtime-limit"] for c in commands if isinstance(c, SetParameters)]
    assert set_to == [150, 300, 450, 600, 750, 900, 1050]


def test_ovirt_walks_its_schedule_one_stalled_iteration_after_another() -> None:
    policy, did = Ovirt("minimal-downtime"), []
    for syncs in range(2, 12):
        did += policy.poll(sample(syncs, syncs=syncs, remaining=GIB))
    shown = [c.parameters["downtime-limit"] if isinstance(c, SetParameters) else "abort" for c in did]
    assert shown == [150, 200, 300, 400, 500, "abort"]


def test_cloud_hypervisor_stops_the_guest_once_the_next_pass_fits_the_budget() -> None:
    policy = CloudHypervisor(downtime_ms=300)
    assert policy.poll(sample(1, syncs=2, remaining=100_000_000)) == ()
    assert policy.poll(sample(2, syncs=3, remaining=20_000_000)) == (StopGuest(),)


@pytest.mark.parametrize(
    ("policy", "command"),
    [
        (LibvirtTimeout(5 * NS_PER_S), StopGuest()),
        (LibvirtTimeout(5 * NS_PER_S, "postcopy"), StartPostcopy()),
        (PostcopyAfter(after_ns=5 * NS_PER_S), StartPostcopy()),
        (PostcopyAfter(passes=3), StartPostcopy()),
    ],
)
def test_timeouts_act_once(policy: Platform, command: object) -> None:
    assert policy.poll(sample(1, syncs=2)) == ()
    assert policy.poll(sample(6, syncs=3)) == (command,)
    assert policy.poll(sample(7, syncs=4)) == ()


def busy_guest(**migration: object) -> object:
    return build(
        {
            "guest": {"memory": "256 MiB", "workload": [
                {"pattern": "uniform", "rate": "60000 pages/s", "working-set": "128 MiB"}]},
            "migration": {"max-bandwidth": "50 MB/s", "time-limit": "60 s", "downtime-limit": 50, **migration},
            "link": {"bandwidth": "10 Gbit/s"},
        }
    )  # fmt: skip


def test_a_guest_that_never_converges_does_with_auto_converge_and_with_postcopy() -> None:
    assert not simulation.run(busy_guest(), threads=1).converged  # type: ignore[arg-type]
    slowed = simulation.run(busy_guest(capabilities=["auto-converge"]), threads=1)  # type: ignore[arg-type]
    assert slowed.converged and max(r.cpu_throttle_percentage for r in slowed.rounds) > 20
    moved = simulation.run(  # type: ignore[arg-type]
        busy_guest(capabilities=["postcopy-ram"], **{"postcopy-after": "8 s"}), threads=1
    )
    assert moved.converged and moved.migration["ram"]["postcopy-bytes"] > 0
    assert moved.verify.get("lost-pages", 0) == 0


def test_a_suspended_guest_always_completes() -> None:
    scenario = busy_guest(platform="libvirt-timeout-suspend", **{"platform-timeout": "8 s"})
    result = simulation.run(scenario, threads=1)  # type: ignore[arg-type]
    assert result.converged and result.migration["total-time"] < 20_000


def test_auto_converge_of_9_2_forces_a_sync_in_long_rounds_and_7_2_does_not() -> None:
    slow = {"max-bandwidth": "10 MB/s", "capabilities": ["auto-converge"], "time-limit": "100 s"}
    new = simulation.run(busy_guest(**slow), threads=1)  # type: ignore[arg-type]
    old = simulation.run(busy_guest(compat="7.2", **slow), threads=1)  # type: ignore[arg-type]
    assert len(new.rounds) > len(old.rounds)


def test_a_queue_before_a_requested_page_and_the_link_s_latency_make_a_fault_longer() -> None:
    slow = fault_latency_ns(FaultCosts(20_000, 3_000, queued_pages=50), 50_000)
    assert slow > fault_latency_ns(FaultCosts(20_000, 3_000), 50_000) > 120_000
