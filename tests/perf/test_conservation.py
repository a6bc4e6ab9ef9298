"""What must add up, whatever the MMU, the log and the policy: shares, held time, writes wanted, made and lost."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim import simulation
from migsim.perf.migration_thread import clear_cost
from migsim.perf.pools import Pools
from migsim.perf.postcopy_faults import PostcopyFaults
from migsim.perf.profile import load_profile
from migsim.perf.rules import MMUS, default_kernel, rules_for
from migsim.perf.slowdown import ClosedLoop, Window
from migsim.result import Result
from migsim.scenario.load import build

_S = 10**9
_KVM = {
    "bitmap": {},
    "wrprot": {"pml": False},
    "get-rearms": {"manual-dirty-log-protect": "off"},
    "armed-at-once": {"manual-dirty-log-protect": "enable"},
    "ring": {"dirty-ring-size": 1024},
}
_MIGRATION: dict[str, dict[str, Any]] = {
    "none": {},
    "auto-converge": {"capabilities": ["auto-converge"], "max-bandwidth": "30 MB/s", "time-limit": "8 s"},
    "postcopy": {"capabilities": ["postcopy-ram"], "postcopy-after": "1 s", "max-bandwidth": "30 MB/s"},
    "xbzrle": {"capabilities": ["xbzrle"], "max-bandwidth": "30 MB/s", "time-limit": "5 s"},
}


@cache
def _run(mmu: str, kvm: str, migration: str, backing: str, rate: str = "20000 pages/s") -> Result:
    return simulation.run(
        build(
            {
                "guest": {
                    "memory": "64 MiB", "vcpus": 4, "backing": backing,
                    "workload": [{"pattern": "uniform", "rate": rate, "working-set": "32 MiB"}],
                },
                "kvm": {"mmu": mmu, **_KVM[kvm]},
                "migration": {"max-bandwidth": 0, **_MIGRATION[migration]},
                "link": {"bandwidth": "1 Gbit/s"},
            }
        )
    )  # fmt: skip


@given(
    mmu=st.sampled_from(MMUS), kvm=st.sampled_from(sorted(_KVM)), migration=st.sampled_from(sorted(_MIGRATION)),
    backing=st.sampled_from(["4K", "2M"]),
)  # fmt: skip
@settings(max_examples=16, deadline=None)
def test_a_run_s_costs_add_up(mmu: str, kvm: str, migration: str, backing: str) -> None:
    result = _run(mmu, kvm, migration, backing)
    host, rows = result.host, result.rounds
    for share in ("guest-throughput-share", "lock-waiting-share"):
        assert 0.0 <= host[share] <= 1.0
    for row in rows:
        assert 0.0 <= row.guest_throughput_share <= 1.0 and 0.0 <= row.lock_waiting_share < 1.0
        assert row.longest_hold_ns <= row.lock_write_held_ns
        if kvm != "ring":  # there vCPUs and the reaper hold it too
            assert row.lock_write_held_ns <= row.duration_ns, "the thread that holds the lock waits for itself"
        assert all(n > 0 for n in row.vcpu_stalls.values())
    held = sum(row.lock_write_held_ns for row in rows)
    assert held == pytest.approx(host["lock-write-held-ns"], abs=len(rows) + 1)
    assert max(row.longest_hold_ns for row in rows) == pytest.approx(host["longest-hold-ns"], abs=1)
    assert sum(row.soft_lockups for row in rows) == host["soft-lockups"]
    assert sum(part.duration_ns for part in result.downtime) >= 0


def _loop(mmu: str, *, pml: bool, backing: int, vcpus: int, pages: float, ring: int = 0) -> ClosedLoop:
    host, rules = load_profile(), rules_for(mmu, default_kernel(mmu))
    pools = Pools(
        np.zeros(1), np.array([pages]), np.array([False]), pages, backing, rules, pml=pml, eager=True, protected=True
    )
    return ClosedLoop(host, vcpus, rules, pools, clear_cost(rules, host, vcpus, pml=pml), ring)


@given(
    mmu=st.sampled_from(MMUS), backing=st.sampled_from([1, 512]), vcpus=st.sampled_from([1, 16, 416]),
    rate_per_s=st.floats(1e4, 5e6), calls=st.integers(0, 20), rearmed=st.integers(0, 2_000_000),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_writes_lost_are_the_time_the_vcpus_stood_still(
    mmu: str, backing: int, vcpus: int, rate_per_s: float, calls: int, rearmed: int
) -> None:
    """Wanted is made plus lost, and lost is what the stalls add up to (write protection: no cost but stalls)."""
    loop = _loop(mmu, pml=False, backing=backing, vcpus=vcpus, pages=1e9)  # so many that the chances stay
    rates, step = np.array([rate_per_s / _S]), _S // 10
    rearmed = rearmed if calls else 0
    for _ in range(30):
        window = Window(step, rates / loop.pace.slowdown * step, rates, 1.0, calls, rearmed, rearmed)
        loop.window(window)
    loop.end_round()
    for _ in range(10):
        loop.window(Window(step, rates / loop.pace.slowdown * step, rates, 1.0, calls, rearmed, rearmed))
    cost = loop.end_round()
    lost = 1.0 - cost.guest_throughput_share
    stood_still = cost.stalls.total_ns / (vcpus * cost.running_ns)
    assert lost == pytest.approx(stood_still, rel=0.05, abs=2e-4)
    assert cost.lock_waiting_share <= lost + 1e-9


@given(duty=st.floats(0.01, 1.0), mmu=st.sampled_from(MMUS))
@settings(max_examples=30, deadline=None)
def test_a_throttle_s_sleep_is_charged_by_the_duty_alone(duty: float, mmu: str) -> None:
    free, slept = (_loop(mmu, pml=False, backing=512, vcpus=16, pages=1e8) for _ in range(2))
    rates = np.array([1e-3])
    pace = free.window(Window(_S, np.zeros(1), rates, 1.0, 0, 0, 0))
    assert slept.window(Window(_S, np.zeros(1), rates, duty, 0, 0, 0)) == pace


def test_a_ring_costs_what_a_bitmap_nobody_clears_does_not_and_a_smaller_one_more() -> None:
    rates = np.array([1e-3])
    lost = []
    for ring in (0, 65536, 4096):
        loop = _loop("tdp", pml=True, backing=1, vcpus=16, pages=1e7, ring=ring)
        for _ in range(20):
            loop.window(Window(_S, rates / loop.pace.slowdown * _S, rates, 1.0, 0, 0, 0))
        lost.append(1.0 - loop.end_round().guest_throughput_share)
    assert lost[0] < lost[1] < lost[2]


def test_the_last_pass_clears_for_a_guest_that_stands_still() -> None:
    """Its CLEARs are the last round's, meet no vCPU, and cost no kick."""
    result = _run("tdp", "wrprot", "none", "4K", "60000 pages/s")
    last = result.rounds[-1]
    assert last.stopped and last.lock_write_held_ns > 0
    assert (last.vcpu_stalls, last.guest_throughput_share, last.lock_waiting_share) == ({}, 0.0, 0.0)
    clear = next(part.duration_ns for part in result.downtime if part.name == "clear")
    assert last.lock_write_held_ns <= clear <= last.migration_thread_cpu_ns


def test_the_tables_a_clear_splits_take_the_thread_s_time() -> None:
    huge, small = _run("tdp", "bitmap", "none", "2M", "0 B/s"), _run("tdp", "bitmap", "none", "4K", "0 B/s")
    tables = int(huge.kvm["operations"]["huge_page_split"])
    split_ns = tables * load_profile().ns("split-table")
    assert tables == 32
    took = [sum(row.duration_ns for row in result.rounds) for result in (huge, small)]
    assert took[0] - took[1] == pytest.approx(split_ns, rel=0.05)
    assert huge.rounds[0].lock_write_held_ns - small.rounds[0].lock_write_held_ns == pytest.approx(split_ns, abs=2)


def test_a_get_that_rearms_takes_the_thread_s_time() -> None:
    lazy, at_once = (_run("shadow", kvm, "none", "4K", "60000 pages/s") for kvm in ("bitmap", "get-rearms"))
    syncs = [next(p.duration_ns for p in result.downtime if p.name == "final-sync") for result in (lazy, at_once)]
    assert syncs[1] - syncs[0] > at_once.rounds[-1].lock_write_held_ns > 0
    assert all(part.name != "clear" for part in at_once.downtime)


def test_post_copy_s_guest_stalls_less_with_a_channel_for_what_it_asks() -> None:
    plain = _run("tdp", "bitmap", "postcopy", "4K")
    after = plain.host["postcopy"]
    assert 0.0 < after["guest-throughput-share"] < 1.0
    assert 0 < after["faults"] == plain.migration["ram"]["postcopy-requests"] <= plain.rounds[-1].sent_pages
    assert sum(after["vcpu-stalls"].values()) == pytest.approx(after["faults"], abs=2)
    assert plain.rounds[-1].vcpu_stalls == after["vcpu-stalls"]


def _faults(latency_ns: float, rate: float, *, missing: float = 4096.0, pushed_s: float = 10.0) -> PostcopyFaults:
    faults = PostcopyFaults(8, np.array([8192.0]), np.array([missing]), np.array([False]), latency_ns, latency_ns / 100)
    steps = 2000
    for k in range(steps):
        faults.advance(pushed_s * _S / steps, np.array([rate / _S]), 1.0 - (k + 0.5) / steps)
    return faults


@pytest.mark.parametrize("rate", [100.0, 2000.0, 30_000.0])
def test_without_latency_faults_are_the_closed_form_s(rate: float) -> None:
    """A page whose turn comes at t, uniform in T, was asked for before with 1 - exp(-rate t)."""
    visits = rate * 10.0 / 8192
    expected = 4096 * (1.0 - (1.0 - math.exp(-visits)) / visits)
    free = _faults(1e-3, rate)
    assert free.faults == pytest.approx(expected, rel=0.01)
    assert free.guest_throughput_share == pytest.approx(1.0, abs=1e-6)


@given(rate=st.floats(100, 1e6), latency=st.floats(1e4, 1e8))
@settings(max_examples=12, deadline=None)
def test_a_longer_fault_slows_the_guest_more_and_never_brings_a_page_twice(rate: float, latency: float) -> None:
    short, long = _faults(latency, rate), _faults(3 * latency, rate)
    assert 0.0 < long.guest_throughput_share <= short.guest_throughput_share <= 1.0
    assert long.faults <= 4096 * 1.01
    lost = 1.0 - long.guest_throughput_share
    stood_still = long.stalls.total_ns / (8 * 10.0 * _S)
    assert lost == pytest.approx(stood_still, rel=0.02, abs=1e-6)


def test_a_clear_of_what_is_mapped_huge_changes_no_leaf() -> None:
    """Without eager splitting the first pass only walks; a 4 KiB guest pays for each of its SPTEs."""
    first = {
        backing: _run("tdp-5.10", "bitmap", "none", backing, "0 B/s").rounds[0].lock_write_held_ns
        for backing in ("4K", "2M")
    }
    host = load_profile()
    pages, leaf_ns = 64 * 256, host.ns("spte-clear-dirty") + host.ns("pfn-set-dirty")
    assert first["4K"] - first["2M"] == pytest.approx(pages * leaf_ns, rel=0.01)
    assert first["2M"] < first["4K"] / 10


def test_while_the_link_is_gone_post_copy_s_vcpus_stand_still() -> None:
    """From the failure until it is recovered nothing can be fetched: every vCPU stalls for seconds."""
    guest = {
        "guest": {
            "memory": "64 MiB", "vcpus": 4,
            "workload": [{"pattern": "uniform", "rate": "20000 pages/s", "working-set": "32 MiB"}],
        },
        "migration": {
            "max-bandwidth": "30 MB/s", "max-postcopy-bandwidth": "5 MB/s", "capabilities": ["postcopy-ram"],
            "postcopy-after": "1 s",
        },
        "link": {"bandwidth": "1 Gbit/s"},
    }  # fmt: skip
    dies = ["link.fail-at=3 s", "migration.postcopy-recover-after=20 s"]
    whole, broken = (simulation.run(build(guest, settings)) for settings in ([], dies))
    assert whole.converged and broken.converged
    assert "more" not in whole.host["postcopy"]["vcpu-stalls"]
    assert broken.host["postcopy"]["vcpu-stalls"]["more"] == 4
    assert broken.host["postcopy"]["guest-throughput-share"] < whole.host["postcopy"]["guest-throughput-share"] - 0.3
