"""QMP events of a migration, as a client sees them: the loop's log turned into QMP's objects.

Source: qapi/migration.json and qapi/run-state.json of QEMU 10.0; the order was compared with live 7.2 and 10.0-like
runs. MIGRATION and MIGRATION_PASS are emitted only with the capability `events`; STOP and RESUME always.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Final

from migsim.units import NS_PER_S, NS_PER_US

__all__ = ["EVENTS_MAX", "MIGRATION_EVENTS", "LoggedEvent", "both_sides", "expected_order", "qmp_events"]

LoggedEvent = tuple[int, str, dict[str, object]]
EVENTS_MAX: Final = 1000  # in a result; MIGRATION_PASS counts on, so a gap shows
MIGRATION_EVENTS: Final = ("MIGRATION", "MIGRATION_PASS")


def qmp_events(
    logged: Iterable[LoggedEvent], capabilities: Collection[str], *, side: str = "source"
) -> Iterator[dict[str, Any]]:
    """The events one side's monitor shows: all the source's but RESUME, which comes from where the guest goes on."""
    called_off = False
    for now_ns, name, data in logged:
        called_off = called_off or data.get("status") in ("cancelling", "failed")
        if (name == "RESUME" and not called_off) != (side == "destination"):
            continue
        if name in MIGRATION_EVENTS and "events" not in capabilities:
            continue
        event: dict[str, Any] = {"event": name}
        if data:
            event["data"] = dict(data)
        event["timestamp"] = _timestamp(now_ns)
        yield event


def both_sides(logged: Sequence[LoggedEvent], capabilities: Collection[str]) -> tuple[dict[str, Any], ...]:
    """Both monitors' events in the order of time, for a result; of very many the first and the last ones."""
    if "events" not in capabilities:
        return ()
    told = [e for side in ("source", "destination") for e in qmp_events(logged, capabilities, side=side)]
    told.sort(key=lambda e: (e["timestamp"]["seconds"], e["timestamp"]["microseconds"]))
    return tuple(told if len(told) <= EVENTS_MAX else told[: EVENTS_MAX // 2] + told[-EVENTS_MAX // 2 :])


def _timestamp(at_ns: int) -> dict[str, int]:
    return {"seconds": at_ns // NS_PER_S, "microseconds": at_ns % NS_PER_S // NS_PER_US}


def expected_order(syncs: int, *, compat: str, pause: bool = False) -> list[str]:
    """Names (with status or pass) of a completed pre-copy with `syncs` bitmap syncs, as QEMU emits them.

    7.2: setup, PASS 1, active, PASS 2 .. N-1, STOP, PASS N, completed; later versions pass through `device` after the
    stop, and pause-before-switchover puts pre-switchover before it in any version.
    """
    order = ["MIGRATION setup", "MIGRATION_PASS 1", "MIGRATION active"]
    order += [f"MIGRATION_PASS {n}" for n in range(2, syncs)]
    order.append("STOP")
    if pause:
        order.append("MIGRATION pre-switchover")
    if pause or compat != "7.2":
        order.append("MIGRATION device")
    return [*order, f"MIGRATION_PASS {syncs}", "MIGRATION completed"]
