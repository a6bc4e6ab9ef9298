"""A published number beside the model's, and how a run of a kernel test becomes one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

from migsim.perf.memstress import Memstress
from migsim.perf.profile import load_profile
from migsim.selftest.dirty_log_perf import dirty_log_perf_test
from migsim.selftest.outcome import Outcome

__all__ = ["FACTOR", "PHASES", "Figure", "Kind", "Published", "Table", "dirty_log", "figure", "figures_of"]

#: A predicted figure must come out within this factor of the published one.
FACTOR: Final = 2.0

Kind = Literal["fitted", "predicted", "explained"]
#: Published number and what it is here; a text explains a figure that is not expected to agree.
Published = tuple[float, str]

#: The phases of dirty_log_perf_test as cover letters call them; {} is the iteration.
PHASES: Final[Mapping[str, str]] = {
    "populate": "populate memory",
    "enable": "enabling dirty logging",
    "dirty": "iteration {} dirty memory",
    "get": "iteration {} get dirty log",
    "CLEAR": "iteration {} clear dirty log",
    "disable": "disabling dirty logging",
}


@dataclass(frozen=True)
class Figure:
    """One published number beside the model's. note: why, for a figure that is not expected to agree."""

    what: str
    published: float
    migsim: float
    kind: Kind
    note: str = ""

    @property
    def ratio(self) -> float:
        """migsim over published."""
        return self.migsim / self.published

    @property
    def agrees(self) -> bool:
        """Within FACTOR, either way."""
        return 1 / FACTOR <= self.ratio <= FACTOR


@dataclass(frozen=True)
class Table:
    """The figures of one source. setup: what was run · command: how to run it here."""

    title: str
    setup: str
    command: str
    unit: str
    figures: tuple[Figure, ...]


@lru_cache(maxsize=64)
def dirty_log(iterations: int = 2, **guest: Any) -> Outcome:
    """dirty_log_perf_test on the two-socket Skylake of the published runs."""
    return dirty_log_perf_test(Memstress(**guest), load_profile("skylake-2s-96"), iterations=iterations)


def figures_of(run: Outcome, published: Mapping[str, Published], suffix: str = "") -> Iterator[Figure]:
    """Phases of a run in seconds: "dirty 2" to (published, "fitted", "predicted", or the note that explains it)."""
    for what, (number, kind) in published.items():
        name, _, iteration = what.partition(" ")
        yield figure(what + suffix, number, run.phase(PHASES[name].format(iteration or 1)).time_ns / 1e9, kind)


def figure(what: str, published: float, migsim: float, kind: str) -> Figure:
    """A row; `kind` is "fitted", "predicted", or the note of one that is explained."""
    if kind == "fitted":
        return Figure(what, published, migsim, "fitted")
    if kind == "predicted":
        return Figure(what, published, migsim, "predicted")
    return Figure(what, published, migsim, "explained", kind)
