"""Did a run end as its scenario's `[expect]` said? None is a pass; each surprise is a phrase."""

from __future__ import annotations

from migsim.result import Result
from migsim.units import NS_PER_MS

__all__ = ["surprises"]


def surprises(result: Result) -> list[str]:
    """What differs from `[expect]`; empty where all came true, or where nothing was foreseen."""
    expect = result.scenario.expect
    if expect is None:
        return []
    found = []
    if result.converged != expect.converged:
        return ["it converged" if result.converged else "it did not converge"]  # the rest follows from that
    ram = result.migration.get("ram", {})
    for name, bounds, value, unit in (
        ("total time", expect.total_time, result.migration.get("total-time"), " ms"),
        ("downtime", expect.downtime, _blackout_ms(result), " ms"),
        ("syncs", expect.syncs, ram.get("dirty-sync-count", len(result.rounds)), ""),  # a cancelled one tells no ram
    ):
        if bounds is None:
            continue
        if value is None:
            found.append(f"{name} is not known")
        elif not bounds[0] <= value <= bounds[1]:
            found.append(f"{name} {value}{unit} lies outside {bounds[0]} to {bounds[1]}{unit}")
    return found


def _blackout_ms(result: Result) -> int | None:
    """From the first STOP to RESUME: what the guest's users notice, whatever part of it QEMU counts as downtime."""
    if not result.downtime:
        return None
    return sum(part.duration_ns for part in result.downtime) // NS_PER_MS
