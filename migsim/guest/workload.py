"""What the guest writes: streams with a write clock each, and the lazy drawing of what they hit.

Station 1 on the path of a dirty page. A stream writes pages of one range by one law (uniform, or a sequential sweep);
hot/cold is two uniform streams, zipf one per weight class. The guest writes everywhere all the time, yet only what
somebody looks at is drawn: each stream has a clock of writes made so far, each unit of memory remembers the clock at
which it was last brought up to date, and whoever observes the unit draws the writes in between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migsim.units import NS_PER_S

UNIFORM, SEQUENTIAL = 0, 1
ZIPF_GROWTH = 1.25  # each weight class of a zipf stream holds this many times the ranks of the one before


@dataclass(frozen=True)
class Phase:
    """From `at_ns` on (migration time), the stream runs at `factor` times its rate."""

    at_ns: int
    factor: float


@dataclass(frozen=True)
class Stream:
    """Writes to guest pages [first, end) at `pages_per_s`, law UNIFORM or SEQUENTIAL."""

    law: int
    first: int
    end: int
    pages_per_s: float
    phases: tuple[Phase, ...] = ()
    headroom: float = 1.0  # how many times its rate it could write while it runs; above 1 it makes up for lost time
    made_up_ns: int = 1 << 62  # lost at a stretch; of a longer one it makes up for nothing

    def factor(self, now_ns: int) -> float:
        """Rate factor in force at `now_ns`."""
        factor = 1.0
        for phase in self.phases:
            if phase.at_ns <= now_ns:
                factor = phase.factor
        return factor


def hot_cold(first: int, end: int, pages_per_s: float, hot_pages: float, hot_writes: float) -> list[Stream]:
    """`hot_writes` of the writes go to the first `hot_pages` of the range, the rest to the rest, uniformly each."""
    split = first + max(1, min(end - first - 1, round((end - first) * hot_pages)))
    return [
        Stream(UNIFORM, first, split, pages_per_s * hot_writes),
        Stream(UNIFORM, split, end, pages_per_s * (1.0 - hot_writes)),
    ]


def zipf(first: int, end: int, pages_per_s: float, theta: float) -> list[Stream]:
    """Rank r of the range gets weight r**-theta; ranks are grouped in classes of nearly equal weight.

    Within a class (ranks r .. 1.25 r) writes are uniform, so a page's rate is off by at most a factor 1.12 for
    theta <= 1; the classes' totals are exact sums of the law.
    """
    n = end - first
    edges = [0]
    while edges[-1] < n:
        edges.append(min(n, max(edges[-1] + 1, math.ceil(edges[-1] * ZIPF_GROWTH))))
    weights = [_zipf_sum(a + 1, b, theta) for a, b in itertools.pairwise(edges)]
    total = sum(weights)
    return [
        Stream(UNIFORM, first + a, first + b, pages_per_s * w / total)
        for (a, b), w in zip(itertools.pairwise(edges), weights, strict=True)
    ]


def _zipf_sum(a: int, b: int, theta: float) -> float:
    """Sum of r**-theta for r in a..b: term by term when short, else the midpoint integral (error below 1e-6)."""
    if b - a < 4096:
        return math.fsum(r**-theta for r in range(a, b + 1))
    if abs(theta - 1.0) < 1e-12:
        return math.log((b + 0.5) / (a - 0.5))
    rising: float = (b + 0.5) ** (1 - theta) - (a - 0.5) ** (1 - theta)
    return rising / (1 - theta)


class Workload:
    """The write clocks of all streams, and each unit's last view of them.

    `units`: how many independently observed pieces of memory there are. Arrays: `law`, `first`, `end` int64[S];
    `clock` float64[S] writes made by `now_ns`; `rate` float64[S] writes a ns in force; `seen` float64[units, S];
    `visits` uint32[units]. `duty` (0..1) is the share of time the guest may run, `slowdown` (>= 1) what faults and
    stalls cost it; both scale every stream.
    """

    def __init__(self, streams: Sequence[Stream], units: int, seed_key: int) -> None:
        self.streams = tuple(streams)
        self.law: NDArray[np.int64] = np.array([s.law for s in streams], dtype=np.int64)
        self.first: NDArray[np.int64] = np.array([s.first for s in streams], dtype=np.int64)
        self.end: NDArray[np.int64] = np.array([s.end for s in streams], dtype=np.int64)
        self.clock: NDArray[np.float64] = np.zeros(len(streams))
        self.rate: NDArray[np.float64] = np.zeros(len(streams))
        self.seen: NDArray[np.float64] = np.zeros((units, len(streams)))
        self.visits: NDArray[np.uint32] = np.zeros(units, dtype=np.uint32)
        self.seed_key = np.uint64(seed_key)
        self.now_ns = 0
        self.duty = 1.0
        self.slowdown = 1.0
        self.share: NDArray[np.float64] = np.ones(len(streams))
        self._run_ns: Callable[[int, int], int] | None = None
        self._stretch_ns = 0  # that the guest is held up in one go
        self._settled, self._reached = self.clock.copy(), self.clock.copy()  # clocks at `_settled_ns`, and the bursts'
        self._settled_ns = 0
        self._changes = sorted({p.at_ns for s in streams for p in s.phases}, reverse=True)
        self._set_rates()

    def _set_rates(self) -> None:
        pace = self.duty / self.slowdown
        for i, stream in enumerate(self.streams):
            scale = min(1.0, pace * self._headroom(stream)) * self.share[i] / NS_PER_S
            self.rate[i] = stream.pages_per_s * stream.factor(self.now_ns) * scale

    def _headroom(self, stream: Stream) -> float:
        return stream.headroom if self._stretch_ns <= stream.made_up_ns else 1.0

    def set_pace(self, duty: float, slowdown: float) -> None:
        """From now on the guest runs for `duty` of the time and `slowdown` times slower while it runs."""
        assert 0.0 <= duty <= 1.0 <= slowdown, (duty, slowdown)
        self.duty, self.slowdown = duty, slowdown
        self._set_rates()

    def set_shares(self, share: NDArray[np.float64]) -> None:
        """From now on stream i writes share[i] (0..1) of what its rate and pace allow (dirty-limit's sleeps)."""
        assert share.shape == self.share.shape and (share >= 0).all() and (share <= 1).all(), share
        self.share = share
        self._set_rates()

    def next_change_ns(self) -> int | None:
        """When some stream's rate changes next by itself."""
        while self._changes and self._changes[-1] <= self.now_ns:
            self._changes.pop()
        return self._changes[-1] if self._changes else None

    def set_bursts(self, run_ns: Callable[[int, int], int] | None, stretch_ns: int = 0) -> None:
        """From now on the guest's `duty` of the time comes in bursts: run_ns(begin, end) of it between two moments.

        stretch_ns: how long it stands between two bursts. `set_pace` follows.
        """
        if self._run_ns is None:
            self._settled, self._reached, self._settled_ns = self.clock.copy(), self.clock.copy(), self.now_ns
        self._run_ns, self._stretch_ns = run_ns, stretch_ns

    def settle(self, now_ns: int) -> None:
        """`advance` between two calls of the loop: to where bursts have brought the guest.

        Inside a call clocks move at the mean rate, so one may be ahead by part of a burst; it then stands until the
        bursts have caught up, for what was observed has happened.
        """
        gone_ns = now_ns - self._settled_ns
        if self._run_ns is None or not self.duty or not gone_ns:
            self.advance(now_ns)
            return
        observed = self.clock.copy()
        self.advance(now_ns)
        burst = self._run_ns(self._settled_ns, now_ns) / (self.duty * gone_ns)
        even = np.array([self._headroom(stream) > 1.0 for stream in self.streams])  # lost time is made up for
        self._reached += (self.clock - self._settled) * np.where(even, 1.0, burst)
        np.maximum(observed, self._reached, out=self.clock)
        self._settled, self._settled_ns = self.clock.copy(), now_ns

    def advance(self, now_ns: int) -> None:
        """Move every write clock to `now_ns`, phase by phase."""
        assert now_ns >= self.now_ns, "time runs forward"
        while self.now_ns < now_ns:
            change = self.next_change_ns()
            until = now_ns if change is None else min(change, now_ns)
            self.clock += self.rate * (until - self.now_ns)
            self.now_ns = until
            if until == change:
                self._set_rates()

    def ranges(self) -> list[tuple[int, int]]:
        """[first, end) of the pages that are written to, in order; what several streams write counts once."""
        out: list[tuple[int, int]] = []
        for first, end in sorted(zip(self.first.tolist(), self.end.tolist(), strict=True)):
            if out and first < out[-1][1]:
                out[-1] = (out[-1][0], max(end, out[-1][1]))
            else:
                out.append((first, end))
        return out

    @property
    def writes(self) -> float:
        """Page writes made so far, all streams."""
        return float(self.clock.sum())
