"""How long vCPUs stood still: a histogram by powers of two, 1 us to 1 s, and the laws the waits are drawn from."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["BOUNDS_US", "StallHistogram"]

#: Upper bounds of the buckets, us: 1, 2, 4 ... 2**20 (1.05 s). What is longer goes into one more bucket.
BOUNDS_US: Final = tuple(1 << k for k in range(21))
_BOUNDS_NS: Final[NDArray[np.float64]] = np.array(BOUNDS_US, dtype=np.float64) * 1000.0


class StallHistogram:
    """Expected numbers of stalls by length. `counts`: float64[22], the last one for stalls above the last bound."""

    def __init__(self) -> None:
        self.counts: NDArray[np.float64] = np.zeros(len(BOUNDS_US) + 1)
        self.total_ns = 0.0

    def add(self, duration_ns: float, times: float = 1.0) -> None:
        """`times` stalls of exactly `duration_ns`."""
        self.counts[int(np.searchsorted(_BOUNDS_NS, duration_ns))] += times
        self.total_ns += times * duration_ns

    def add_exponential(self, mean_ns: float, times: float, shift_ns: float = 0.0) -> None:
        """`times` stalls of `shift_ns` plus an exponential wait: a visit to a queue."""
        if mean_ns <= 0:
            self.add(shift_ns, times)
            return
        below = 1.0 - np.exp(-np.maximum(_BOUNDS_NS - shift_ns, 0.0) / mean_ns)
        self._spread(below, times)
        self.total_ns += times * (shift_ns + mean_ns)

    def add_uniform(self, longest_ns: float, times: float, shift_ns: float = 0.0) -> None:
        """`times` stalls of `shift_ns` plus 0..longest, evenly: caught at a random moment of somebody's hold."""
        if longest_ns <= 0:
            self.add(shift_ns, times)
            return
        self._spread(np.clip((_BOUNDS_NS - shift_ns) / longest_ns, 0.0, 1.0), times)
        self.total_ns += times * (shift_ns + longest_ns / 2)

    def _spread(self, below: NDArray[np.float64], times: float) -> None:
        self.counts += times * np.diff(np.concatenate(([0.0], below, [1.0])))

    def merge(self, other: StallHistogram) -> None:
        """Add another histogram's stalls."""
        self.counts += other.counts
        self.total_ns += other.total_ns

    def as_json(self) -> dict[str, int]:
        """Whole stalls by upper bound in us; "more" holds what is above the last bound. Empty buckets are left out."""
        names = [*map(str, BOUNDS_US), "more"]
        whole = [math.floor(count + 0.5) for count in self.counts]
        return {name: n for name, n in zip(names, whole, strict=True) if n}
