"""Rows made of whole runs: pace, memory, lost pages, the ground truth's price, and a guest twice the size.

Child processes take turns: 12 TiB with the ground truth, without it, and 12 and 24 TiB over the same rounds. Each warms
up on a small guest of the same shape first, so that loading the compiled kernels is in nobody's time. Pace is of wall
time; runs are compared with each other in CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from statistics import median
from typing import Any, Final

from migsim.bench.shape import Shape, m2_ultramem
from migsim.bench.table import Measured, Missing
from migsim.bench.timing import interleaved, median_ratio
from migsim.bench.worker import Worker
from migsim.quantities import in_words

__all__ = ["measure_runs"]

BUDGET_S: Final = 22.0  # of each pair of rivals; one turn of both is taken in any case
TURNS: Final = 3
WARM_UP: Final = Fraction(1, 64)
QUICK: Final = Fraction(1, 64)
SAME_ROUNDS: Final = 6  # of the runs compared by size: the bulk pass and what it left, before the tail

Answers = dict[str, list[dict[str, Any]]]


def measure_runs(*, quick: bool) -> dict[str, Measured | str]:
    """Rows of the group "runs". Raises Missing where not even the single guest fits."""
    size = QUICK if quick else Fraction(1)
    whole, one, two = (m2_ultramem(size), *(m2_ultramem(size * n, rounds=SAME_ROUNDS) for n in (1, 2)))
    short = _too_big(whole)
    if short:
        raise Missing(short)
    shapes = {"on": whole, "off": whole}
    short = _too_big(two)
    answers = _take_turns(shapes if short else shapes | {"one": one, "two": two})
    return _single(whole, answers) | (_without_double(short) if short else _double(answers))


def _too_big(shape: Shape) -> str:
    from migsim.commands.look import free_memory
    from migsim.simulation import memory_needed

    needed, free = memory_needed(shape.scenario()), free_memory()
    if needed <= free:
        return ""
    return f"needs {in_words(needed, 'size')} of memory, and {in_words(free, 'size')} are free"


def _take_turns(shapes: dict[str, Shape]) -> Answers:
    answers: Answers = {name: [] for name in shapes}

    def step(worker: Worker, name: str) -> float:
        answers[name].append(worker.run(shapes[name], verify=name != "off"))
        return float(answers[name][-1]["wall-s"])

    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker()) for name in shapes}
        for name, worker in workers.items():
            worker.run(m2_ultramem(WARM_UP), verify=name != "off")
        steps = {name: partial(step, worker, name) for name, worker in workers.items()}
        for pair in (("on", "off"), ("one", "two")):
            interleaved({name: steps[name] for name in pair if name in steps}, turns=TURNS, budget_s=BUDGET_S)
    return answers


def _single(shape: Shape, answers: Answers) -> dict[str, Measured | str]:
    on, off, pages = answers["on"], answers["off"], shape.scenario().guest.pages
    peak = on[0]["peak-rss-bytes"]
    return {
        "pace": Measured(
            median(run["simulated-s"] / run["wall-s"] for run in on),
            {
                "pages": pages,
                "simulated-s": on[0]["simulated-s"],
                "rounds": on[0]["rounds"],
                "wall-s": _all(on, "wall-s"),
                "cpu-s": _all(on, "cpu-s"),
            },
        ),
        "memory": Measured(
            peak / pages, {"peak-rss-bytes": peak, "idle-rss-bytes": on[0]["idle-rss-bytes"], "pages": pages}
        ),
        "lost-pages": Measured(sum(run["lost-pages"] for runs in answers.values() for run in runs)),
        "oracle": _compared("on", on, "off", off),
    }


def _double(answers: Answers) -> dict[str, Measured | str]:
    one, two = answers["one"], answers["two"]
    return {
        "double-time": _compared("24-tib", two, "12-tib", one),
        "double-memory": Measured(
            two[0]["peak-rss-bytes"] / one[0]["peak-rss-bytes"],
            {"peak-rss-bytes": [one[0]["peak-rss-bytes"], two[0]["peak-rss-bytes"]]},
        ),
    }


def _without_double(reason: str) -> dict[str, Measured | str]:
    return {"double-time": reason, "double-memory": reason}


def _compared(above: str, these: list[dict[str, Any]], below: str, those: list[dict[str, Any]]) -> Measured:
    detail: dict[str, Any] = {"rounds": [these[0]["rounds"], those[0]["rounds"]]}
    for name, runs in ((above, these), (below, those)):
        detail |= {f"{name}-{time}": _all(runs, time) for time in ("wall-s", "cpu-s")}
    return Measured(median_ratio(_all(these, "cpu-s"), _all(those, "cpu-s")), detail)


def _all(runs: list[dict[str, Any]], name: str) -> list[float]:
    return [run[name] for run in runs]
