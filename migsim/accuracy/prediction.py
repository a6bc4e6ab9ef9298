"""What migsim predicts for a recording: a few draws of the guest's writes, and what is in the middle of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from migsim.accuracy.recordings import GIVEN, KEYS, Figures, Given, RecordingError, given, load, measured
from migsim.accuracy.replayed import scenario_of
from migsim.result import Result
from migsim.units import NS_PER_MS

__all__ = ["SEEDS", "Report", "figures", "predict", "replay"]

SEEDS: Final = (1, 2, 3, 4, 5, 6, 7)
FEW, ALIKE_SHARE = 3, 0.002  # draws that agree on the syncs, and on the bytes but for so much, are enough
LATE_MS: Final = 60.0  # the recorder's lead-in varies by so much either way: 3564 to 3788 ms in 31 recordings of TCG

Report: TypeAlias = list[dict[str, Any]]


def predict(facts: Given, *, seeds: Sequence[int] = SEEDS) -> tuple[Figures, float]:
    """(figures under KEYS, seconds it took) for what `given` left of a recording. Raises RecordingError.

    A real run is one draw of the guest's writes; the prediction is what is in the middle of several: the commoner
    verdict and, of the draws that end so, the median of each figure, the lower one of two. Three draws where they are
    alike, else all `seeds`. Where a sweep stands when migrate is sent is drawn too: it differs between recordings.
    """
    from migsim import simulation

    if set(facts) != set(GIVEN):
        raise RecordingError(f"a prediction is made from {', '.join(GIVEN)} and nothing else")
    began = time.perf_counter()
    found, scenario = [], scenario_of(facts)
    sweeps = any(stream.pattern == "sequential" for stream in scenario.guest.workload)
    for at, seed in enumerate(seeds):
        if sweeps:
            scenario = scenario_of(facts, late_ms=_late_ms(at, len(seeds)))
        found.append(figures(simulation.run(scenario, seed=seed, threads=1, verify=False)))
        if not scenario.guest.workload or (at + 1 >= FEW and _alike(found)):
            break  # nothing to draw, or nothing that the draws differ by
    statuses = [run["status"] for run in found]
    status = max(statuses, key=statuses.count)
    agreed = [run for run in found if run["status"] == status]
    return {key: _middle([run[key] for run in agreed]) for key in KEYS}, time.perf_counter() - began


def _late_ms(at: int, draws: int) -> float:
    """Of draw `at`: from the middle outwards, to both sides in turn, evenly up to LATE_MS."""
    side = 1 if at % 2 == 0 else -1
    return side * LATE_MS * ((at + 1) // 2) / max(1, draws // 2)


def _alike(found: Sequence[Figures]) -> bool:
    """Do the draws end so much alike that more of them would tell no more?"""
    sent = [run["transferred"] for run in found]
    ends = {(run["status"], run["rounds"], run["last_throttle_pct"]) for run in found}
    return len(ends) == 1 and max(sent) - min(sent) <= ALIKE_SHARE * min(sent)


def _middle(values: Sequence[Any]) -> Any:
    """The median, as one of the values; None counts as least."""
    return sorted(values, key=lambda value: (value is not None, value))[(len(values) - 1) // 2]


def figures(result: Result) -> Figures:
    """A result under the recording's keys."""
    done, rounds = result.converged, result.rounds
    blackout_ns = sum(part.duration_ns for part in result.downtime if part.name != "stop")  # counted from STOP
    return {
        "status": "completed" if done else "cancelled",
        "rounds": len(rounds),
        "total_time_ms": result.migration["total-time"] if done else None,
        "setup_time_ms": result.migration["setup-time"] if done else None,
        "downtime_events_ms": round(blackout_ns / NS_PER_MS, 3) if done else None,
        "transferred": sum(row.transferred_bytes for row in rounds),
        "normal": result.migration["ram"]["normal"] if done else sum(row.sent_pages for row in rounds),
        "duplicate": sum(row.zero_pages for row in rounds),
        "last_throttle_pct": max((row.cpu_throttle_percentage for row in rounds), default=0) or None,
    }


def replay(folder: str | Path, told: Callable[[str], None] | None = None) -> Report:
    """Every recording of a folder: {"id", "measured", "predicted"}. Raises RecordingError for the first bad one."""
    out: Report = []
    for name, recording in load(folder):
        try:
            predicted, seconds = predict(given(recording))
        except RecordingError as error:
            raise RecordingError(f"{name}: {error}") from None
        predicted["seconds"] = round(seconds, 3)
        out.append({"id": recording["id"], "measured": measured(recording), "predicted": predicted})
        if told is not None:
            told(recording["id"])
    return out
