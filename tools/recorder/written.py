"""What was seen, in the recording's format: series, rounds, events, result."""

from __future__ import annotations

import json
import re

from recorder.qemu import Side


def flat(value: dict, prefix: str = "") -> dict:
    out: dict = {}
    for name, inner in value.items():
        out |= flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
    return out


def series(samples: list) -> dict:
    rows = [(at, flat(answer)) for at, answer in samples]
    names = sorted({name for _, row in rows for name in row})
    fixed = {n: rows[0][1].get(n) for n in names if len({json.dumps(row.get(n)) for _, row in rows}) == 1}
    moving = [name for name in names if name not in fixed]
    return {
        "columns": ["t_ms", *moving],
        "constant": fixed,
        "rows": [[at, *(row.get(name) for name in moving)] for at, row in rows],
    }


def rounds_of(trace: list) -> list[dict]:
    out: list[dict] = []
    for at, name, text in trace:
        if name == "migration_bitmap_sync_start":
            out.append({"sync_ms": at})
        elif name == "migration_bitmap_sync_end" and out:
            out[-1] |= {"took_ms": round(at - out[-1]["sync_ms"], 3), "period_dirty": int(re.findall(r"\d+", text)[0])}
        elif name == "migration_throttle" and out:
            out[-1]["throttle_step"] = True
    return out


def events_of(side: Side, wall: float) -> list:
    kept = ("MIGRATION", "MIGRATION_PASS", "STOP", "RESUME")
    return [
        [
            round((e["timestamp"]["seconds"] + e["timestamp"]["microseconds"] / 1e6 - wall) * 1000, 3),
            e["event"], e.get("data", {}),
        ]
        for e in side.monitor.events if e["event"] in kept
    ]  # fmt: skip


def result_of(samples: list, events: dict) -> dict:
    final = samples[-1][1]
    last = next((answer for _, answer in reversed(samples) if "ram" in answer), {})
    ram = last.get("ram", {})
    stop = [at for at, name, _ in events["src"] if name == "STOP"]
    resume = [at for at, name, _ in events["dst"] if name == "RESUME"]
    throttle = [a["cpu-throttle-percentage"] for _, a in samples if "cpu-throttle-percentage" in a]
    return {
        "status": final.get("status"), "rounds": ram.get("dirty-sync-count"), "total_time_ms": final.get("total-time"),
        "setup_time_ms": final.get("setup-time"), "downtime_ms": final.get("downtime"),
        "downtime_events_ms": round(resume[0] - stop[0], 3) if stop and resume else None,
        **{name.replace("-", "_"): ram.get(name) for name in (
            "transferred", "precopy-bytes", "downtime-bytes", "postcopy-bytes", "multifd-bytes", "normal", "duplicate",
            "total", "remaining", "mbps", "dirty-pages-rate", "postcopy-requests",
        )},
        "max_throttle_pct": max(throttle, default=None), "last_throttle_pct": throttle[-1] if throttle else None,
        "xbzrle": last.get("xbzrle-cache"), "error_desc": final.get("error-desc"),
    }  # fmt: skip
