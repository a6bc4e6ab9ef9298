"""Row against pyroaring: what a sync does with dirty sets (copy the log, OR it in, count what is new), by density."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from migsim.bench.source import Source
from migsim.bench.table import Measured, Missing
from migsim.bench.timing import interleaved, median_ratio, timed_ns
from migsim.planes import Words, summarise
from migsim.units import GIB, PAGE_SIZE

__all__ = ["measure_pyroaring"]

#: Density and GiB of guest; dense sets of a smaller one, as they are past the caches all the same and slow to make.
SETS: Final = ((1e-5, 1024), (1e-4, 1024), (1e-3, 1024), (1e-2, 1024), (0.1, 256), (0.5, 256))
QUICK_GIB: Final = 8
TURNS: Final = 7
SEED: Final = 416


def measure_pyroaring(*, quick: bool) -> dict[str, Measured | str]:
    """migsim's ns over pyroaring's at the worst density. Raises Missing where pyroaring is not installed.

    Both start from the same two sets (KVM's log, QEMU's bitmap), independent and of that density, over one
    guest; one thread; the ground truth is off. They must agree on how many pages are new.
    """
    try:
        import pyroaring
    except ImportError:
        raise Missing("pyroaring is not installed (it is in the extra test: pip install 'migsim[test]')") from None
    rng = np.random.default_rng(SEED)
    source: Source | None = None
    ratios: dict[str, float] = {}
    for density, gib in SETS:
        pages = (QUICK_GIB if quick else gib) * GIB // PAGE_SIZE
        if source is None or source.pages != pages:
            source = Source(pages, "idle", verify=False)
        times = _race(source, pyroaring.BitMap, rng, density, turns=3 if quick else TURNS)
        ratios[f"{density:g}"] = median_ratio(times["migsim"], times["pyroaring"])
    worst = max(ratios, key=ratios.__getitem__)
    return {"pyroaring": Measured(ratios[worst], {"worst-density": worst, "ratios": ratios})}


def _race(
    source: Source, bitmap: Any, rng: np.random.Generator, density: float, *, turns: int
) -> dict[str, list[float]]:
    """Both on the same pair of sets, in turns; ns."""
    log, bmap = (_random(rng, source.pages, density) for _ in range(2))
    sets = [bitmap(np.flatnonzero(pages_set).astype(np.uint32)) for pages_set in (log, bmap)]
    here = Sets(source, _packed(log), _packed(bmap))
    del log, bmap
    rivals = {"migsim": partial(_sync_ns, here), "pyroaring": partial(_roaring_ns, *sets)}
    agreed = {name: step()[1] for name, step in rivals.items()}
    assert len(set(agreed.values())) == 1, f"new pages at density {density}: {agreed}"
    return interleaved({name: partial(_first, step) for name, step in rivals.items()}, turns=turns)


def _first(step: Any) -> float:
    return float(step()[0])


def _random(rng: np.random.Generator, pages: int, density: float) -> NDArray[np.bool_]:
    """bool[pages], each set with probability `density` (to the law of that many throws)."""
    out = np.zeros(pages, dtype=np.bool_)
    out[rng.integers(0, pages, size=round(-math.log1p(-density) * pages))] = True
    return out


def _packed(pages_set: NDArray[np.bool_]) -> Words:
    return np.packbits(pages_set, bitorder="little").view(np.uint64)


class Sets:
    """The two sets as the guest's planes hold them. `renew` writes those words that a sync may have left otherwise.

    Only those: pyroaring's sets are copied just before they are timed, too, and no larger than what is set in them.
    """

    def __init__(self, source: Source, log: Words, bmap: Words) -> None:
        self.source = source
        self.parts: list[tuple[Words, NDArray[np.intp], Words]] = []  # a plane or summary, where in it, what
        base = 0
        for side in source.ram.extents:
            block = side[0].block
            marked = np.zeros_like(block.bmap)
            for at in side:
                n = (at.slot.pages + 63) >> 6
                self._put(at.slot.log, at.slot.log_summary, log[base : base + n], np.zeros(0, dtype=np.uint64))
                marked[at.first >> 6 : (at.first >> 6) + n] = bmap[base : base + n]
                at.slot.log_full[:] = 0
                base += n
            logged = np.concatenate([at.slot.log for at in side])
            self._put(block.bmap, block.bmap_summary, marked, logged)
            block.bmap_full[:] = 0

    def _put(self, plane: Words, summary: Words, words: Words, also: Words) -> None:
        plane[:] = words
        summarise(words, summary)
        touched = np.flatnonzero(words | also) if len(also) else np.flatnonzero(words)
        self.parts += [(plane, touched, words[touched]), (summary, np.arange(len(summary)), summary.copy())]

    def renew(self) -> None:
        """Back to the two sets."""
        for plane, where, what in self.parts:
            plane[where] = what


def _sync_ns(sets: Sets) -> tuple[int, int]:
    """One sync of the guest with these sets in KVM's log and QEMU's bitmap; (ns, new pages)."""
    found: list[int] = []
    sets.renew()
    return timed_ns(lambda: found.append(sets.source.ram.sync())), found[0]


def _roaring_ns(log: Any, bmap: Any) -> tuple[int, int]:
    """The same with pyroaring's BitMap."""
    merged, found, known = bmap.copy(), [], []

    def sync() -> None:
        nonlocal merged
        known.append(log.copy())
        found.append(log.difference_cardinality(merged))
        merged |= log

    return timed_ns(sync), found[0]
