"""Fair timing on a noisy machine: rivals take turns, and what is reported is the median of the ratios turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter, perf_counter_ns

__all__ = ["interleaved", "median_ratio", "timed_ns"]


def timed_ns(step: Callable[[], object]) -> int:
    """Wall ns of one call, at least 1."""
    start = perf_counter_ns()
    step()
    return max(perf_counter_ns() - start, 1)


def interleaved(
    rivals: Mapping[str, Callable[[], float]], *, turns: int, budget_s: float = float("inf")
) -> dict[str, list[float]]:
    """What each rival returned, turn by turn. A turn is not begun when one like the last would exceed the budget."""
    out: dict[str, list[float]] = {name: [] for name in rivals}
    began = turn_began = perf_counter()
    for turn in range(turns):
        now = perf_counter()
        if turn and now - began + (now - turn_began) > budget_s:
            break
        turn_began = now
        for name, step in rivals.items():
            out[name].append(step())
    return out


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of above[i] / below[i]."""
    return median(a / b for a, b in zip(above, below, strict=True))
