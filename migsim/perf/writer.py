"""A writer among the customers of a lock: the number queued, followed through the writer's period, in three parts.

1. away: customers come and are served; a birth-death process over 0..N queued, for a constant time;
2. wait: those queued when the writer comes are served before it, later ones queue behind it;
3. hold: nobody is served; those who come queue, for a constant time.

The distribution at the end of one period starts the next, until what is served in a period stays the same. Exponential
service and arrivals, first come first served. Transients are exact, by uniformization (Jensen, Skand. Aktuarietidskr.
36, 1953).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

__all__ = ["served_in_period"]

_SAME = 1e-5  # of what a period serves, from one to the next
_SETTLED = 1e-6  # total variation from the steady state
_PERIODS = 200  # the wait serves the whole queue, so little is remembered: a few are enough
_STEEPEST = 200.0  # arrivals in one service; who thinks for less than a 200th of it may as well not think
_LIKELY = 1e-12  # less probable states are passed over


@njit(cache=True, nogil=True)
def served_in_period(arrivals: np.ndarray, service: float, hold: float, away: float) -> tuple[float, float]:
    """Customers served in one period of the writer, and its mean wait in ns.

    arrivals: float64[N + 1], a ns, by the number queued; service, hold, away: ns, the first two above 0.
    """
    states = arrivals.shape[0]
    rates = np.minimum(arrivals, _STEEPEST / service)
    steady, full = _steady_state(rates, service), np.zeros(states)
    full[states - 1] = 1.0
    queued, served, wait = steady, 0.0, 0.0
    for _ in range(_PERIODS):
        queued, busy = _after(queued, rates, 1.0 / service, away, steady)
        ahead = 0.0
        for n in range(states):
            ahead += n * queued[n]
        before, served, wait = served, busy / service + ahead, ahead * service
        if abs(served - before) <= _SAME * served:
            break
        queued, _ = _after(_behind(queued, rates, service), rates, 0.0, hold, full)
    return served, wait


@njit(cache=True, nogil=True)
def _steady_state(rates: np.ndarray, service: float) -> np.ndarray:
    """Probabilities of 0..N queued with no writer about, scaled as they grow lest they overflow."""
    p = np.zeros(rates.shape[0])
    p[0] = 1.0
    for n in range(1, rates.shape[0]):
        p[n] = p[n - 1] * rates[n - 1] * service
        if p[n] > 1e100:
            p[: n + 1] /= p[n]
    p /= p.sum()
    return p


@njit(cache=True, nogil=True)
def _after(
    start: np.ndarray, rates: np.ndarray, serving: float, time: float, steady: np.ndarray
) -> tuple[np.ndarray, float]:
    """Probabilities of 0..N queued after `time` ns that tend to `steady`, and the mean ns of it the server was busy."""
    p, step = start.copy(), np.empty_like(start)
    fastest = serving + rates.max()
    mean = fastest * time
    out, busy = np.zeros_like(start), 0.0
    left, time_left, k = 1.0, time, 0  # of the Poisson distribution of the number of steps, and of the time
    while left > _LIKELY and (k & 15 or np.abs(p - steady).sum() > _SETTLED):
        chance = math.exp(k * math.log(mean) - mean - math.lgamma(k + 1.0)) if mean > 0.0 else 1.0
        out += chance * p
        left -= chance
        stay = max(left, 0.0) / fastest
        busy += stay * (1.0 - p[0])
        time_left -= stay
        _one_step(p, rates, serving, fastest, step)
        p, step = step, p
        k += 1
    return out + max(left, 0.0) * p, busy + max(time_left, 0.0) * (1.0 - p[0])


@njit(cache=True, nogil=True)
def _one_step(p: np.ndarray, rates: np.ndarray, serving: float, fastest: float, out: np.ndarray) -> None:
    """One step of the uniformized chain from `p` into `out`: up at `rates`, down at `serving`, a ns."""
    last = p.shape[0] - 1
    down = serving / fastest
    for n in range(last + 1):
        stay = 1.0 - rates[n] / fastest - (down if n else 0.0)
        here = p[n] * stay
        if n:
            here += p[n - 1] * rates[n - 1] / fastest
        if n < last:
            here += p[n + 1] * down
        out[n] = here


@njit(cache=True, nogil=True)
def _behind(ahead: np.ndarray, rates: np.ndarray, service: float) -> np.ndarray:
    """Probabilities of 0..N queued behind the writer once those `ahead` of it, as probabilities of 0..N, are served."""
    states = ahead.shape[0]
    row = np.zeros(states)  # by the number behind, with `n` ahead
    for n in range(states - 1, 0, -1):
        row[0] += ahead[n]
        carried = 0.0
        for b in range(states - n):
            here = row[b] + carried
            carried = 0.0
            if here > _LIKELY:
                come = rates[n + b] * service
                carried = here * come / (1.0 + come)
            row[b] = here - carried
    row[0] += ahead[0]
    return row
