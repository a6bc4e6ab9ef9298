"""Row of the sparse round: drawing, sync, CLEAR and sending of few dirty pages against those of all of them."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any, Final

from migsim.bench.source import Source
from migsim.bench.table import Measured
from migsim.bench.timing import interleaved, median_ratio, timed_ns
from migsim.units import GIB, PAGE_SIZE

__all__ = ["measure_sparse_round"]

SPARSE: Final = 1e-4
DENSE: Final = 0.5
TURNS: Final = 7


def measure_sparse_round(*, quick: bool) -> dict[str, Measured | str]:
    """A uniform stream's round at density 1e-4 over its round at 0.5, with the ground truth, on a 2 TiB guest.

    Beside it in the detail the cheapest dense round there is: a sweep wrote every page, so hits need no random numbers.
    """
    pages = (64 if quick else 2048) * GIB // PAGE_SIZE
    sources = {
        "sparse": (Source(pages, "uniform", verify=True), SPARSE),
        "dense": (Source(pages, "uniform", verify=True), DENSE),
        "swept": (Source(pages, "sequential", verify=True), 1.0),
    }
    sent: dict[str, list[int]] = {name: [] for name in sources}

    def step(name: str) -> float:
        source, density = sources[name]
        source.write(density)
        return timed_ns(lambda: sent[name].append(source.round()))

    for name in sources:
        step(name)
    times = interleaved({name: partial(step, name) for name in sources}, turns=3 if quick else TURNS)
    detail: dict[str, Any] = {"pages": pages, "sparse-over-swept": median_ratio(times["sparse"], times["swept"])}
    detail |= {name: {"ms": median(times[name]) / 1e6, "pages-sent": int(median(sent[name]))} for name in sources}
    return {"sparse-round": Measured(median_ratio(times["sparse"], times["dense"]), detail)}
