"""Errors of a replayed folder: a line a run, a line a metric, and the bands that the model is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from migsim.accuracy.prediction import Report

__all__ = ["DIFFERENCES", "SHARES", "Band", "bands_of", "errors_of", "percentile", "share_error", "table"]

#: Metrics whose relative error is reported, and those compared by their difference.
SHARES: Final = ("total_time_ms", "transferred", "normal", "duplicate", "downtime_events_ms", "setup_time_ms")
DIFFERENCES: Final = ("rounds", "last_throttle_pct")

TOTAL_MEDIAN, TOTAL_P95 = 0.005, 0.03
BYTES_MEDIAN, BYTES_P95 = 0.003, 0.03
SYNCS, SYNCS_SHARE, SYNCS_MANY = 1, 0.08, 12  # by one, or by a share where there are many
DOWNTIME_SHARE, DOWNTIME_MS = 0.20, 5.0  # whichever is more, at the median


@dataclass(frozen=True, slots=True)
class Band:
    """One thing the model is held to: what, whether it holds, and the runs outside where each run is judged."""

    name: str
    holds: bool
    outside: tuple[str, ...] = ()


def table(report: Report) -> str:
    """Per run the figures and errors, then median and 95th percentile of each metric, then the bands."""
    lines = [_line(entry) for entry in report]
    lines += ["", f"{'error of':20}{'median':>10}{'95th pct':>10}{'largest':>10}"]
    for metric, errors in errors_of(report).items():
        if errors:
            unit, scale = (" %", 100.0) if metric in SHARES else ("", 1.0)
            cells = (percentile(errors, 0.5), percentile(errors, 0.95), max(errors))
            lines.append(f"{metric:20}" + "".join(f"{scale * cell:8.2f}{unit:2}" for cell in cells))
    lines.append("")
    for band in bands_of(report):
        outside = f": {', '.join(band.outside)}" if band.outside else ""
        lines.append(f"{'within' if band.holds else 'OUTSIDE':8}{band.name}{outside}")
    wrong = [e["id"] for e in report if e["measured"]["status"] != e["predicted"]["status"]]
    seconds = sum(entry["predicted"]["seconds"] for entry in report)
    lines.append(f"verdict wrong in {len(wrong)} of {len(report)}{': ' + ', '.join(wrong) if wrong else ''}")
    lines.append(f"{seconds:.1f} s for {len(report)} predictions")
    return "\n".join(lines)


def errors_of(report: Report) -> dict[str, list[float]]:
    """Every metric's errors: shares of the measured value, or absolute differences."""
    out: dict[str, list[float]] = {metric: [] for metric in (*SHARES, *DIFFERENCES)}
    for entry in report:
        real, guess = entry["measured"], entry["predicted"]
        for metric in SHARES:
            error = share_error(guess[metric], real[metric])
            if error is not None:
                out[metric].append(error)
        for metric in DIFFERENCES:
            out[metric].append(abs((guess[metric] or 0) - (real[metric] or 0)))
    return out


def bands_of(report: Report) -> list[Band]:
    """What the model is held to, over a folder: medians, 95th percentiles, and each run's syncs."""
    errors = errors_of(report)
    late = [excess for entry in report if (excess := _downtime_excess(entry)) is not None]
    out = [
        _quantiles("total time", errors["total_time_ms"], TOTAL_MEDIAN, TOTAL_P95),
        _quantiles("bytes", errors["transferred"], BYTES_MEDIAN, BYTES_P95),
        _each("syncs by 1, or 8 % of more than 12", report, _syncs_off),
    ]
    if late:
        out.append(Band("downtime by 20 % or 5 ms at the median", percentile(late, 0.5) <= 0))
    return [band for band in out if band is not None]


def _quantiles(name: str, errors: Sequence[float], median: float, p95: float) -> Band | None:
    if not errors:
        return None
    told = f"{name} by {100 * median:g} % at the median, {100 * p95:g} % at the 95th percentile"
    return Band(told, percentile(errors, 0.5) <= median and percentile(errors, 0.95) <= p95)


def _each(name: str, report: Report, off: Callable[[Mapping[str, Any]], bool]) -> Band:
    outside = tuple(entry["id"] for entry in report if off(entry))
    return Band(name, not outside, outside)


def _syncs_off(entry: Mapping[str, Any]) -> bool:
    real, guess = entry["measured"]["rounds"] or 0, entry["predicted"]["rounds"]
    allowed = max(SYNCS, SYNCS_SHARE * real) if real > SYNCS_MANY else SYNCS
    return bool(abs(guess - real) > allowed)


def _downtime_excess(entry: Mapping[str, Any]) -> float | None:
    """ms by which a downtime is outside its band; 0 or less inside; None where there is none."""
    real, guess = entry["measured"]["downtime_events_ms"], entry["predicted"]["downtime_events_ms"]
    if real is None or guess is None:
        return None
    return float(abs(guess - real) - max(DOWNTIME_MS, DOWNTIME_SHARE * real))


def _line(entry: Mapping[str, Any]) -> str:
    real, guess = entry["measured"], entry["predicted"]
    shown = [f"{entry['id']:34}", f"{guess['status'] or '':9}", f"syncs {guess['rounds']}/{real['rounds']}"]
    for metric, label in (("total_time_ms", "total"), ("transferred", "bytes"), ("downtime_events_ms", "downtime")):
        if guess[metric] is not None and real[metric]:
            shown.append(f"{label} {guess[metric]}/{real[metric]} ({100 * (guess[metric] / real[metric] - 1):+.2f} %)")
    if real["last_throttle_pct"] or guess["last_throttle_pct"]:
        shown.append(f"throttle {guess['last_throttle_pct']}/{real['last_throttle_pct']}")
    if guess["status"] != real["status"]:
        shown.append(f"VERDICT: really {real['status']}")
    return "  ".join(shown)


def share_error(predicted: float | None, real: float | None) -> float | None:
    """|predicted / real - 1|, or None where one of them does not exist."""
    if predicted is None or not real:
        return None
    return abs(predicted / real - 1.0)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest ranks, as numpy's default."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * share
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
