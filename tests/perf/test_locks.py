"""The analyses against theory's identities and against the same network played event by event."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Sequence
from fractions import Fraction
from typing import Any

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.perf.locks import Writer, solve, with_writer


def throughput_of(
    services: Sequence[float],
    think: float,
    customers: int,
    *,
    cycles: int,
    seed: int,
    writer: tuple[float, float] | None = None,
    warm_up: int = 0,
) -> tuple[float, float]:
    """Cycles a nanosecond and the mean time of one visit to the first station, after `warm_up` cycles.

    writer: (hold, away) of one more customer that only visits the first station, constant times. What is measured
    begins and ends with the end of a hold then, so that no part of a period is counted twice.
    """
    env = simpy.Environment()
    rng = random.Random(seed)
    servers = [simpy.Resource(env) for _ in services]
    state = {"done": 0, "from": 0, "start": -1.0, "first_visit": 0.0}
    finished = env.event()

    def look() -> None:
        if state["start"] < 0.0 and state["done"] >= warm_up:
            state["start"], state["from"] = env.now, state["done"]
        if state["done"] >= warm_up + cycles and not finished.triggered:
            finished.succeed()

    def vcpu() -> Generator[Any, Any, None]:
        while True:
            yield env.timeout(rng.expovariate(1 / think) if think else 0.0)
            for index, (server, service) in enumerate(zip(servers, services, strict=True)):
                arrived = env.now
                with server.request() as grant:
                    yield grant
                    yield env.timeout(rng.expovariate(1 / service))
                if index == 0 and state["done"] >= warm_up:
                    state["first_visit"] += env.now - arrived
            state["done"] += 1
            if writer is None:
                look()

    def migration_thread(hold: float, away: float) -> Generator[Any, Any, None]:
        while True:
            yield env.timeout(away)
            with servers[0].request() as grant:
                yield grant
                yield env.timeout(hold)
            look()

    for _ in range(customers):
        env.process(vcpu())
    if writer is not None:
        env.process(migration_thread(*writer))
    env.run(until=finished)
    done = state["done"] - state["from"]
    return done / (env.now - state["start"]), state["first_visit"] / done


_NS = st.floats(min_value=1, max_value=1e5)


@given(services=st.lists(_NS, min_size=1, max_size=3), think=_NS, customers=st.integers(1, 416))
@settings(max_examples=60, deadline=None)
def test_throughput_stays_within_the_asymptotic_bounds(services: list[float], think: float, customers: int) -> None:
    solution = solve(services, think, customers)
    assert solution.throughput <= min(1 / max(services), customers / (think + sum(services))) * (1 + 1e-9)
    assert solution.cycle_ns * solution.throughput == pytest.approx(customers)


@given(services=st.lists(_NS, min_size=1, max_size=2), think=_NS, customers=st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_one_more_customer_never_lowers_throughput(services: list[float], think: float, customers: int) -> None:
    few, more = solve(services, think, customers), solve(services, think, customers + 1)
    assert more.throughput >= few.throughput * (1 - 1e-12)
    assert more.waiting_ns(0) >= few.waiting_ns(0) - 1e-6


@pytest.mark.parametrize("services", [(1448.0, 161.0), (130.0, 163.0), (163.0, 163.0)], ids=str)
@pytest.mark.parametrize(("think", "customers"), [(1100.0, 2), (5000.0, 16), (20000.0, 96), (60000.0, 416)])
def test_event_by_event_agrees_within_3_percent(services: tuple[float, ...], think: float, customers: int) -> None:
    solution = solve(services, think, customers)
    cycles, warm_up = 25_000, 30 * customers
    played, _ = throughput_of(services, think, customers, cycles=cycles, seed=7, warm_up=warm_up)
    assert played == pytest.approx(solution.throughput, rel=0.03)


@pytest.mark.parametrize(
    ("services", "think", "customers", "hold", "away"),
    [
        ((163.0,), 20_000.0, 96, 1e6, 1e6),
        ((163.0, 161.0), 20_000.0, 96, 1e5, 3e5),
        ((163.0,), 100_000.0, 416, 1e4, 2e4),
        ((1448.0,), 1e6, 416, 1e5, 5e5),
        ((163.0,), 20_000.0, 96, 1e3, 1e4),
        ((163.0,), 830.0, 32, 1e5, 3e5),
    ],
)
def test_a_writer_among_readers_agrees_within_3_percent(
    services: tuple[float, ...], think: float, customers: int, hold: float, away: float
) -> None:
    with_holds = with_writer(services, think, customers, Writer(hold, away))
    # At least 50 holds, so that where the run ends inside one does not matter.
    cycles = max(20_000, int(50 * (hold + away) * with_holds.throughput))
    cycles = min(cycles, 150_000)
    played, _ = throughput_of(services, think, customers, cycles=cycles, seed=3, writer=(hold, away), warm_up=5_000)
    assert played == pytest.approx(with_holds.throughput, rel=0.03)


def _normalising(services: Sequence[float], think: float, customers: int) -> list[float]:
    """G(0..N) of the product-form network by Buzen's convolution (Comm. ACM 16, 1973), in exact fractions."""
    g = [Fraction(think) ** n / math.factorial(n) for n in range(customers + 1)]
    for service in map(Fraction, services):
        for n in range(1, customers + 1):
            g[n] += service * g[n - 1]
    return [float(g[n - 1] / g[n]) if n else 0.0 for n in range(customers + 1)]


@given(
    services=st.lists(st.sampled_from([1e-3, 1.0, 163.0, 1448.0, 1e9]), min_size=1, max_size=3),
    think=st.sampled_from([0.0, 1e-3, 1000.0, 1e9]), customers=st.sampled_from([1, 2, 7, 40, 96]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_throughput_is_buzen_s_whatever_the_ratio_of_the_times(
    services: list[float], think: float, customers: int
) -> None:
    exact = _normalising(services, think, customers)
    solution = solve(services, think, customers)
    assert solution.throughput == pytest.approx(exact[customers], rel=1e-9)
    assert sum(solution.queue(k) for k in range(len(services))) <= customers * (1 + 1e-9)


@given(service=_NS, think=st.floats(0, 1e6), second=_NS)
@settings(max_examples=40, deadline=None)
def test_one_customer_never_waits(service: float, think: float, second: float) -> None:
    solution = solve([service, second], think, 1)
    assert solution.cycle_ns == pytest.approx(think + service + second)
    assert solution.waiting_ns(0) == solution.waiting_ns(1) == 0.0


@pytest.mark.parametrize("customers", [1, 2, 3, 4, 8, 32, 128, 416])
@pytest.mark.parametrize("load", [0.2, 1.0, 5.0])
@pytest.mark.parametrize(("hold", "away"), [(30.0, 60.0), (600.0, 0.3), (600.0, 600.0), (6.0, 600.0)])
def test_a_writer_among_few_or_many_agrees_within_3_percent(
    customers: int, load: float, hold: float, away: float
) -> None:
    """load: service over a customer's share of the think time; hold and away in services."""
    service = 163.0
    think = customers * service / load
    hold, away = hold * service, away * service
    found = with_writer((service,), think, customers, Writer(hold, away))
    # Times of 10,000 exponential services vary by 1 %, less where holds, which are constant, fill the time.
    how = {"cycles": 10_000, "seed": 5, "warm_up": 5 * customers}
    played, _ = throughput_of((service,), think, customers, writer=(hold, away), **how)  # type: ignore[arg-type]
    assert played == pytest.approx(found.throughput, rel=0.03)


@given(
    service=_NS, think=st.floats(0, 1e6), customers=st.integers(1, 416), hold=st.floats(0, 1e9), away=st.floats(0, 1e9)
)
@settings(max_examples=80, deadline=None)
def test_a_writer_never_speeds_anybody_up(
    service: float, think: float, customers: int, hold: float, away: float
) -> None:
    found = with_writer([service], think, customers, Writer(hold, away))
    assert 0.0 <= found.throughput <= found.free.throughput


def test_a_writer_that_never_comes_changes_nothing() -> None:
    free = solve([163.0], 5_000.0, 96)
    assert with_writer([163.0], 5_000.0, 96, Writer(0.0, 1e9)).throughput == free.throughput


def test_a_network_without_work_is_refused() -> None:
    with pytest.raises(ValueError, match="zero length"):
        solve([0.0], 0.0, 4)
    with pytest.raises(ValueError, match="customers >= 1"):
        solve([1.0], 1.0, 0)
