"""Rows against real QEMU: recorded migrations replayed through the model (migsim.accuracy), nothing fitted per run."""

from __future__ import annotations

from typing import Final

from migsim.bench.table import Measured, Missing

__all__ = ["measure_corpus"]

DOWNTIME_SHARE: Final = 0.20  # a downtime is off where it errs by more than this share and by more than
DOWNTIME_MS: Final = 5.0  # this many ms


def measure_corpus(folder: str | None) -> dict[str, Measured | str]:
    """Errors over every recording of `folder`. Raises Missing without one, or where it cannot be read."""
    if folder is None:
        raise Missing("no recordings given: --corpus DIR")
    from migsim import accuracy

    try:
        report = accuracy.replay(folder)
    except accuracy.RecordingError as error:
        raise Missing(str(error)) from None
    errors = accuracy.errors_of(report)
    if not errors["total_time_ms"]:
        raise Missing(f"{folder}: none of its recordings completed")
    total, sent = sorted(errors["total_time_ms"]), sorted(errors["transferred"])
    wrong = [entry["id"] for entry in report if entry["measured"]["status"] != entry["predicted"]["status"]]
    off = [entry["id"] for entry in report if _downtime_off(entry["measured"], entry["predicted"])]
    return {
        "total-time-median": Measured(100 * accuracy.percentile(total, 0.5), {"recordings": len(report)}),
        "total-time-p95": Measured(100 * accuracy.percentile(total, 0.95)),
        "syncs": Measured(max(errors["rounds"]), {"beyond-1": sum(error > 1 for error in errors["rounds"])}),
        "bytes-median": Measured(100 * accuracy.percentile(sent, 0.5)),
        "bytes-p95": Measured(100 * accuracy.percentile(sent, 0.95)),
        "downtime": Measured(len(off), {"ids": off}),
        "verdict": Measured(len(wrong), {"ids": wrong}),
    }


def _downtime_off(real: dict[str, float | None], guess: dict[str, float | None]) -> bool:
    there, here = real["downtime_events_ms"], guess["downtime_events_ms"]
    if there is None or here is None:
        return False  # a wrong verdict has a row of its own
    return abs(here - there) > max(DOWNTIME_MS, DOWNTIME_SHARE * there)
