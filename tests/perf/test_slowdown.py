"""The expected state against a guest played page by page, and the closed loop's limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.perf.migration_thread import clear_cost
from migsim.perf.pools import Pools
from migsim.perf.profile import load_profile
from migsim.perf.rules import MMUS, default_kernel, rules_for
from migsim.perf.slowdown import ClosedLoop, Window
from migsim.perf.stalls import BOUNDS_US, StallHistogram

_S = 10**9


def _pools(pages: float, mmu: str = "tdp", *, backing: int = 1, **more: Any) -> Pools:
    options = {"pml": True, "eager": True, "protected": True, **more}
    rules = rules_for(mmu, options.pop("kernel", default_kernel(mmu)))
    return Pools(np.zeros(1), np.array([pages]), np.array([False]), pages, backing, rules, **options)


def _loop(mmu: str, *, vcpus: int = 416, pages: float = 1e6, **more: Any) -> ClosedLoop:
    host, pools = load_profile(), _pools(pages, mmu, **more)
    return ClosedLoop(host, vcpus, pools.rules, pools, clear_cost(pools.rules, host, vcpus, pml=pools.pml))


def _window(
    rate_per_s: float, seconds: float = 1.0, *, writes: float = 0.0, calls: int = 0, rearmed: int = 0
) -> Window:
    return Window(int(seconds * _S), np.array([writes]), np.array([rate_per_s / _S]), 1.0, calls, rearmed, rearmed)


@pytest.mark.parametrize("pml", [True, False])
@pytest.mark.parametrize("writes", [200, 3_000, 40_000])
def test_expected_first_writes_match_a_guest_played_page_by_page(pml: bool, writes: int) -> None:
    pages = 8192
    rng = np.random.default_rng(5)
    played = [len(np.unique(rng.integers(0, pages, writes))) for _ in range(20)]
    first = _pools(pages, pml=pml).write(np.array([float(writes)]))
    assert first.logged + first.fast == pytest.approx(float(np.mean(played)), rel=0.03)
    assert (first.logged if pml else first.fast) > 0


@pytest.mark.parametrize(("kernel", "zapped"), [((6, 1), True), ((6, 2), False)])
def test_first_writes_to_huge_leaves_match_a_guest_played_page_by_page(kernel: tuple[int, int], zapped: bool) -> None:
    regions, writes = 64, 500
    rng = np.random.default_rng(9)
    slow, fast = [], []
    for _ in range(40):
        hit = rng.integers(0, regions * 512, writes)
        slow.append(len(np.unique(hit if zapped else hit // 512)))
        fast.append(0 if zapped else len(np.unique(hit)) - len(np.unique(hit // 512)))
    first = _pools(regions * 512, backing=512, eager=False, kernel=kernel).write(np.array([float(writes)]))
    assert first.locked == pytest.approx(float(np.mean(slow)), rel=0.03)
    # The same stretch holds both: pages of a region split within it count from the next stretch on.
    assert first.fast <= float(np.mean(fast)) * 1.03 + 1


@given(
    mmu=st.sampled_from(MMUS), pml=st.booleans(), backing=st.sampled_from([1, 512]),
    steps=st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 2e6)), max_size=12),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_pages_are_conserved(mmu: str, pml: bool, backing: int, steps: list[tuple[float, float]]) -> None:
    pools = _pools(1e6, mmu, backing=backing, pml=pml)
    for writes, rearmed in steps:
        first = pools.write(np.array([writes]))
        pools.rearm(rearmed)
        assert min(first.logged, first.fast, first.locked) >= 0
        for pool in (pools.logged, pools.protected, pools.huge, pools.small):
            assert (pool >= -1e-6).all()
        assert (pools.armed <= pools.pages * (1 + 1e-9)).all()
        assert (pools.logged + pools.protected <= pools.small * (1 + 1e-9) + 1e-6).all()


def test_what_is_armed_lies_where_the_scan_went() -> None:
    rules = rules_for("tdp", default_kernel("tdp"))
    first, end, sweeps = np.array([0.0, 1000.0]), np.array([1000.0, 3000.0]), np.array([False, False])
    pools = Pools(first, end, sweeps, 5000.0, 1, rules, pml=True, eager=True, protected=False)
    pools.rearm(1500.0, ((500.0, 2000.0),))
    assert pools.logged.tolist() == pytest.approx([500.0, 1000.0, 0.0])
    pools.rearm(2500.0, ((2000.0, 5000.0), (0.0, 500.0)))
    assert pools.logged.sum() <= 4000.0
    assert pools.logged[2] > 1000.0, "pages no stream writes are armed too, and stay so"


def test_nothing_armed_costs_the_guest_nothing() -> None:
    loop = _loop("tdp", protected=False)
    assert loop.window(_window(1e6, writes=1e6)).slowdown == 1.0
    assert loop.end_round().guest_throughput_share == 1.0


def test_pml_costs_less_than_a_fault_and_a_fault_less_than_the_lock() -> None:
    pml = _loop("tdp").window(_window(1e8)).slowdown
    fault = _loop("tdp", pml=False).window(_window(1e8)).slowdown
    locked = _loop("tdp-5.10", pml=False).window(_window(1e8)).slowdown
    assert 1.0 < pml < fault < locked


def test_the_shadow_mmu_starves_a_guest_whose_huge_pages_are_zapped_one_by_one() -> None:
    share = {}
    for mmu in MMUS:
        loop = _loop(mmu, pages=3e9, backing=512)
        pace = loop.window(_window(2e6))
        share[mmu] = 1 / pace.slowdown
        if mmu == "shadow":
            assert pace.lock_waiting_share > 0.6
    assert share["shadow"] < share["tdp-5.10"] < share["tdp"]
    assert share["tdp"] > 0.99
    # The lock's capacity is the guest's: one fault a hold.
    assert share["shadow"] == pytest.approx(1 / (2e6 * load_profile().ns("shadow-map", 416) / 1e9), rel=0.02)


def test_a_small_ring_costs_more_exits_than_a_large_one() -> None:
    def slowdown(entries: int) -> float:
        host, pools = load_profile(), _pools(1e9)
        clear = clear_cost(pools.rules, host, 8, pml=True)
        return ClosedLoop(host, 8, pools.rules, pools, clear, entries).window(_window(1e7)).slowdown

    assert slowdown(0) < slowdown(65536) < slowdown(1024)


@given(rates=st.tuples(st.floats(1e3, 1e8), st.floats(1e3, 1e8)), mmu=st.sampled_from(MMUS))
@settings(max_examples=40, deadline=None)
def test_a_busier_guest_is_never_slowed_less(rates: tuple[float, float], mmu: str) -> None:
    less, more = sorted(rates)
    assert _loop(mmu, pml=False).window(_window(less)).slowdown <= _loop(mmu, pml=False).window(_window(more)).slowdown


def test_a_hold_above_20_s_is_a_soft_lockup() -> None:
    loop = _loop("tdp")
    page_ns = loop.clear.written_page_ns
    loop.window(_window(1e5, calls=1, rearmed=int(19e9 / page_ns)))
    assert loop.round.soft_lockups == 0
    loop.window(_window(1e5, calls=1, rearmed=int(21e9 / page_ns)))
    cost = loop.end_round()
    assert cost.soft_lockups == 1
    assert cost.lock_write_held_ns == pytest.approx(40e9, rel=1e-3)
    assert loop.end_round().lock_write_held_ns == 0.0


def test_stalls_fall_into_powers_of_two_and_keep_their_total() -> None:
    stalls = StallHistogram()
    stalls.add(1_000, 2)
    stalls.add(1_001, 3)
    stalls.add(5e9)
    assert stalls.as_json() == {"1": 2, "2": 3, "more": 1}
    stalls.add_exponential(50_000, 1000, 2_000)
    stalls.add_uniform(8e6, 100)
    assert sum(stalls.counts) == pytest.approx(1106)
    assert BOUNDS_US[0] == 1 and BOUNDS_US[-1] == 1 << 20


@given(mean=st.floats(1, 1e9), shift=st.floats(0, 1e6))
@settings(max_examples=40, deadline=None)
def test_an_exponential_stall_is_spread_as_drawn_samples_are(mean: float, shift: float) -> None:
    stalls, drawn = StallHistogram(), StallHistogram()
    stalls.add_exponential(mean, 20_000, shift)
    for value in np.random.default_rng(1).exponential(mean, 20_000) + shift:
        drawn.add(float(value))
    assert np.abs(stalls.counts - drawn.counts).max() < 500


def test_a_chance_of_locking_that_has_died_out_is_no_wait_and_no_nan() -> None:
    """Long runs under the shadow MMU: the last huge page is nearly surely written, its chance is a subnormal."""
    import msgspec

    from migsim import simulation
    from migsim.scenario.load import build

    scenario = build({
        "guest": {
            "memory": "64 MiB", "backing": "2M", "vcpus": 2,
            "workload": [{"pattern": "uniform", "rate": "200000 pages/s", "working-set": "32 MiB"}],
        },
        "kvm": {"mmu": "shadow"},
        "migration": {"max-bandwidth": 0, "downtime-limit": "1 ms", "time-limit": "60 s"},
        "link": {"bandwidth": "100 Mbit/s"},
    })  # fmt: skip
    result = simulation.run(scenario)
    assert b"NaN" not in msgspec.json.encode(result.rounds) and result.exit_code == 1


@pytest.mark.parametrize(("kernel", "holds"), [((6, 10), 1), ((6, 11), 514)])
def test_a_clear_that_splits_lets_the_lock_go_for_each_table(kernel: tuple[int, int], holds: int) -> None:
    """cf3ff0ee (6.11): the same time under the lock, in many short holds instead of one."""
    loop = _loop("tdp", backing=262144, protected=False, kernel=kernel)
    loop.window(Window(_S, np.array([0.0]), np.array([1e-3]), 1.0, 1, 262144, 262144, split_tables=513))
    cost = loop.end_round()
    assert cost.longest_hold_ns == pytest.approx(cost.lock_write_held_ns / holds)
