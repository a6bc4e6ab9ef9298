"""`mmu_lock` as a closed queueing network: vCPUs are the customers, locks and contended cache lines the stations.

A vCPU's cycle is think time (guest work, the exit, everything nobody else has to wait for) and one visit to each
station. One customer class is solved by exact mean-value analysis (Reiser and Lavenberg, J. ACM 27, 1980): single
servers, first come first served, exponential times. The migration thread is a second class with one customer, whose
hold is a constant and may be thousands of times a fault's: `with_writer` follows the queue through the writer's period.

Times are floats in nanoseconds, throughput is cycles a nanosecond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from migsim.perf.writer import served_in_period

__all__ = ["Solution", "Writer", "WriterSolution", "solve", "with_writer"]


@dataclass(frozen=True)
class Solution:
    """The steady state of a closed network: per-station tuples are in the order the stations were given in."""

    customers: int
    throughput: float
    think_ns: float
    service_ns: tuple[float, ...]
    residence_ns: tuple[float, ...]

    @property
    def cycle_ns(self) -> float:
        """Think time and all residences: one customer's mean time round the network."""
        return self.think_ns + sum(self.residence_ns)

    def waiting_ns(self, station: int) -> float:
        """Mean time a visit queues at `station` before it is served."""
        return max(self.residence_ns[station] - self.service_ns[station], 0.0)

    def queue(self, station: int) -> float:
        """Mean number of customers at `station`, the one in service included (Little's law)."""
        return self.throughput * self.residence_ns[station]


@dataclass(frozen=True)
class Writer:
    """The migration thread: holds the first station for `hold_ns`, then stays away for `away_ns`."""

    hold_ns: float
    away_ns: float


@dataclass(frozen=True)
class WriterSolution:
    """`free` is the network without the writer; the other fields are with it. wait_ns: the writer's, for one hold."""

    free: Solution
    throughput: float
    wait_ns: float

    @property
    def cycle_ns(self) -> float:
        """Mean time of one customer round the network, the holds it was caught in included."""
        return self.free.customers / self.throughput if self.throughput > 0 else math.inf


@njit(cache=True, nogil=True)
def _mva(services: np.ndarray, think: float, customers: int, residence: np.ndarray) -> float:
    """Exact recursion over 1..customers; fills `residence`, returns the throughput."""
    stations = services.shape[0]
    queue = np.zeros(stations)
    throughput = 0.0
    for n in range(1, customers + 1):
        cycle = think
        for k in range(stations):
            residence[k] = services[k] * (1.0 + queue[k])
            cycle += residence[k]
        throughput = n / cycle
        for k in range(stations):
            queue[k] = throughput * residence[k]
    return throughput


@njit(cache=True, nogil=True)
def _arrivals(others: np.ndarray, think: float, customers: int) -> np.ndarray:
    """float64[customers + 1]: rate at which the first station is come to, by the number at it (Norton's theorem)."""
    rates, queue = np.zeros(customers + 1), np.zeros(others.shape[0])
    for outside in range(1, customers + 1):
        cycle = think + np.sum(others * (1.0 + queue))
        rates[customers - outside] = outside / cycle if cycle > 0.0 else np.inf
        if cycle > 0.0:
            queue = outside / cycle * others * (1.0 + queue)
    return rates


def solve(services: Sequence[float], think_ns: float, customers: int) -> Solution:
    """Exact MVA of `customers` in a network of queueing stations and one delay.

    Raises ValueError for a negative time, no customer, or a cycle that takes no time at all.
    """
    if customers < 1 or think_ns < 0 or any(s < 0 for s in services):
        raise ValueError(f"need customers >= 1 and times >= 0, got {customers}, {think_ns}, {list(services)}")
    if think_ns + sum(services) <= 0:
        raise ValueError("a cycle of zero length has no throughput")
    residence = np.zeros(len(services))
    throughput = _mva(np.asarray(services, dtype=np.float64), float(think_ns), customers, residence)
    times = tuple(float(r) for r in residence)
    return Solution(customers, float(throughput), float(think_ns), tuple(float(s) for s in services), times)


def with_writer(services: Sequence[float], think_ns: float, customers: int, writer: Writer) -> WriterSolution:
    """The network when one writer keeps taking the first station, first come first served.

    Raises ValueError as `solve` does. What the writer meets and leaves behind is a chain over 0..customers queued, see
    `migsim.perf.writer`.
    """
    free = solve(services, think_ns, customers)
    if writer.hold_ns <= 0 or services[0] <= 0:
        return WriterSolution(free, free.throughput, 0.0)
    arrivals = _arrivals(np.asarray(services[1:], dtype=np.float64), float(think_ns), customers)
    served, wait = served_in_period(arrivals, float(services[0]), float(writer.hold_ns), float(writer.away_ns))
    period = writer.away_ns + wait + writer.hold_ns
    throughput = min(served / period, free.throughput)  # a writer in the way speeds nobody up
    return WriterSolution(free, throughput, wait)
