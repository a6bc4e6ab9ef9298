"""Post-copy's closed loop: a guest that runs while pages are missing, and stalls at each it touches first.

A write to a missing page stops its vCPU until the page has come: the request crosses the link, the source answers one
request after the other, the page comes back behind what the sockets hold already, and is placed. A vCPU that waits
writes nothing, so faults hold each other back: the vCPUs are customers, the source's answering the station. Expected
values; reads of missing pages are not in the workload and not counted, so the stall errs towards the short.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from migsim.perf.locks import solve
from migsim.perf.slowdown import RARE
from migsim.perf.stalls import StallHistogram

__all__ = ["PostcopyFaults"]

Floats = NDArray[np.float64]


class PostcopyFaults:
    """One switched guest. pages, missing: float64[S], each stream's range and how much of it was dirty at the switch.

    sweeps: bool[S]; latency_ns: from a fault to its page but for other requests; answer_ns: the source's time a page.
    """

    def __init__(
        self, vcpus: int, pages: Floats, missing: Floats, sweeps: NDArray[np.bool_], latency_ns: float, answer_ns: float
    ) -> None:
        self.vcpus, self.latency_ns, self.answer_ns = vcpus, latency_ns, answer_ns
        self.pages, self.missing, self.sweeps = np.maximum(pages, 1.0), missing, sweeps
        self.written: Floats = np.zeros(len(pages))
        self.faults = self.done = self.wanted = 0.0
        self.blocked_ns = self.all_blocked_ns = 0.0  # of all vCPUs together; while every one of them waited
        self.stalls = StallHistogram()

    @property
    def guest_throughput_share(self) -> float:
        """Writes made over writes wanted since the guest runs at the destination, 0..1."""
        return min(self.done / self.wanted, 1.0) if self.wanted else 1.0

    def chances(self, left: float) -> Floats:
        """Chance, by stream, that a write meets a missing page while `left` (0..1) of the missing are not pushed."""
        touched = self.written / self.pages
        untouched = np.where(self.sweeps, (touched < 1.0).astype(np.float64), np.exp(-touched))
        hit: Floats = self.missing / self.pages * left * untouched
        return hit

    def advance(self, duration_ns: float, rates: Floats, left: float) -> float:
        """The guest ran for `duration_ns` and wants `rates` writes a ns, float64[S]; faults taken meanwhile."""
        wanted = float(rates.sum())
        if wanted <= 0.0 or duration_ns <= 0.0:
            return 0.0
        chances, share = self.chances(left), rates / wanted
        done, _ = self._pace(float(share @ chances), wanted, duration_ns)
        # While it runs the chances fall, from exp(-a) to exp(-a - x) of a uniform stream: their mean over the stretch.
        x = np.maximum(share * done / self.pages, 1e-12)
        chance = float(share @ np.where(self.sweeps, chances, chances * -np.expm1(-x) / x))
        done, wait = self._pace(chance, wanted, duration_ns)
        faults = done * chance
        self.stalls.add_exponential(wait, faults, self.latency_ns + self.answer_ns)
        self._block(faults * (wait + self.latency_ns + self.answer_ns), duration_ns)
        self.written += share * done
        self.faults, self.done, self.wanted = self.faults + faults, self.done + done, self.wanted + wanted * duration_ns
        return faults

    def _pace(self, chance: float, wanted: float, duration_ns: float) -> tuple[float, float]:
        """Writes made in `duration_ns` when each faults with `chance`, and how long a request waits for others."""
        if chance <= RARE:
            return wanted * duration_ns, 0.0
        network = solve((self.answer_ns,), self.vcpus / wanted / chance + self.latency_ns, self.vcpus)
        return min(network.throughput / chance, wanted) * duration_ns, network.waiting_ns(0)

    def stand_still(self, duration_ns: float, rates: Floats) -> None:
        """Nothing could be fetched for `duration_ns` (a broken link): every vCPU stands at a missing page soon."""
        self.wanted += float(rates.sum()) * duration_ns
        self.stalls.add(duration_ns, self.vcpus)
        self._block(duration_ns * self.vcpus, duration_ns)

    def _block(self, waited_ns: float, duration_ns: float) -> None:
        """vCPUs wait independently of one another: all at once for the share of one to their number's power."""
        share = min(1.0, waited_ns / (duration_ns * self.vcpus))
        self.blocked_ns += share * duration_ns * self.vcpus
        self.all_blocked_ns += float(share**self.vcpus) * duration_ns
