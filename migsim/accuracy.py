"""Recordings of real QEMU migrations replayed through migsim's own loop, and the error of each prediction.

`tools/accuracy FOLDER` is the command. A prediction sees `config`, `guest`, `migrate_parameters`,
`migrate_capabilities_on` and `pre` of a recording: `given` cuts everything else away before the model is asked, and
`predict` takes nothing but that. One host profile serves all recordings. The format is that of `tools/record_qemu`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from migsim.migration.parameters import PARAMETERS
from migsim.result import Result
from migsim.scenario import Scenario, build
from migsim.units import MIB, NS_PER_MS, PAGE_SIZE

__all__ = [
    "GIVEN", "KEYS", "Given", "RecordingError", "errors_of", "given", "load", "measured", "predict", "replay",
    "scenario_of", "table",
]  # fmt: skip

SEEDS: Final = (1, 2, 3, 4, 5)

Given: TypeAlias = dict[str, Any]
Figures: TypeAlias = dict[str, Any]

GIVEN: Final = ("config", "guest", "migrate_parameters", "migrate_capabilities_on", "pre")
KEYS: Final = (
    "status", "rounds", "total_time_ms", "setup_time_ms", "downtime_events_ms", "transferred", "normal", "duplicate",
    "last_throttle_pct",
)  # fmt: skip

PROFILE: Final = "qemu-7.2-loopback"
DATA_OFFSET: Final = 16 * MIB  # the guest fills memory, and writes, from here on
STATUS_PAGE: Final = 1  # holds the guest's counter: every write dirties it
STACK_PAGE: Final = 3
POLL_MS: Final = 101.1  # the recorder sleeps 100 ms between two looks and cancels, or starts post-copy, at one of them
# QEMU 7.2's `pc` with an own 64 KiB firmware and no devices: (block, pages, pages that are not zero). The firmware
# has code in its first and last page; of the ACPI blocks the tables, the loader and the RSDP hold one page of data.
ROM_BLOCKS: Final = (
    ("pc.bios", 16, (0, 15)), ("pc.rom", 32, ()), ("/rom@etc/acpi/tables", 32, (0,)),
    ("/rom@etc/table-loader", 1, (0,)), ("/rom@etc/acpi/rsdp", 1, (0,)),
)  # fmt: skip
#: Field: types, least, most. The largest guest is what a replay of a few seconds can be made for.
TYPES: Final[dict[str, tuple[tuple[type, ...], float, float]]] = {
    "config.mem_mib": ((int,), 32, 1 << 20), "config.vcpus": ((int,), 1, 4096), "config.rate": ((int, float), 0, 1e9),
    "config.write_bytes": ((int,), 1, PAGE_SIZE), "config.limit_s": ((int, float), 0, 1e6),
    "config.dirty_rate_time": ((int,), 0, 60), "config.postcopy_after": ((int, float), 0, 1e6),
    "guest.fill_pages": ((int,), 0, 1 << 28), "guest.ws_pages": ((int,), 0, 1 << 28),
    "pre.writes_per_s": ((int, float), 0, 1e9),
}  # fmt: skip
REPLAYED: Final = "7.2."  # the release that recordings are compared with
_PATTERNS: Final = {"sequential": "sequential", "uniform": "uniform", "hotcold": "hot-cold"}


class RecordingError(ValueError):
    """A recording that cannot be replayed; its text is one sentence."""


def load(folder: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(file name, recording) of every .json of a folder, or of one file, by name. Raises RecordingError."""
    path = Path(folder)
    if not path.exists():
        raise RecordingError(f"{path}: no such folder")
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not files:
        raise RecordingError(f"{path}: holds no recordings (*.json)")
    return [(file.name, _read(file)) for file in files]


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise RecordingError(f"{file.name}: cannot be read: {error}") from None
    except ValueError as error:
        raise RecordingError(f"{file.name}: is not JSON, cut off perhaps: {error}") from None
    if not isinstance(data, dict):
        raise RecordingError(f"{file.name}: is not a recording (an object is expected)")
    for key in ("id", "result", *GIVEN):
        if key not in data:
            raise RecordingError(f"{file.name}: the field {key} is missing")
    _check_types(file.name, data)
    return data


def _check_types(name: str, data: Mapping[str, Any]) -> None:
    """Types and bounds of what is read, and that it is of the one release whose replay was compared with it."""
    for path, (kinds, low, high) in TYPES.items():
        section, _, key = path.partition(".")
        inside = data[section] if key else data
        if not isinstance(inside, dict):
            raise RecordingError(f"{name}: the field {section} must be an object")
        value: Any = inside.get(key or section)
        if value is None:
            continue  # optional, or named by what misses it
        if isinstance(value, bool) or type(value) not in kinds or not low <= value <= high:
            raise RecordingError(f"{name}: the field {path} must be a number from {low:,} to {high:,}")
    if not all(isinstance(one, str) for one in _list(name, data, "migrate_capabilities_on")):
        raise RecordingError(f"{name}: the field migrate_capabilities_on must be a list of names")
    for key in ("migrate_parameters", "result"):
        if not isinstance(data[key], dict):
            raise RecordingError(f"{name}: the field {key} must be an object")
    version = data.get("qemu")  # as QEMU says it: "7.2.22 Debian ..."
    if version is not None and not str(version).startswith(REPLAYED):
        raise RecordingError(f"{name}: recorded with QEMU {str(version)[:40]}, and only {REPLAYED}x is replayed")


def _list(name: str, data: Mapping[str, Any], key: str) -> list[object]:
    value = data[key]
    if not isinstance(value, list):
        raise RecordingError(f"{name}: the field {key} must be a list")
    return value


def given(recording: Mapping[str, Any]) -> Given:
    """All a prediction may see of a recording: a deep copy of the five fields."""
    copy: Given = json.loads(json.dumps({key: recording[key] for key in GIVEN}))
    return copy


def measured(recording: Mapping[str, Any]) -> Figures:
    """What really happened, under the keys of a prediction."""
    result = recording["result"]
    return {key: result.get(key) for key in KEYS}


# -- recording to scenario ---------------------------------------------------------------------------------------------


def scenario_of(facts: Given) -> Scenario:
    """The scenario of a recording. Raises RecordingError naming the field that is missing or out of range."""
    try:
        return build(
            {
                "guest": _guest(facts),
                "kvm": {"accel": facts["config"]["accel"], "manual-dirty-log-protect": "initially-set"},
                "migration": _migration(facts),
                "link": {"bandwidth": "100 Gbit/s", "latency": "0 s"},  # a local socket: the threads are the limit
                "host": {"profile": PROFILE},
            }
        )
    except KeyError as error:
        raise RecordingError(f"the field {error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise RecordingError(f"cannot be replayed: {error}") from None


def _guest(facts: Given) -> dict[str, Any]:
    config, guest = facts["config"], facts["guest"]
    fill = guest["fill_pages"]
    data = [_extent(STATUS_PAGE, 1), _extent(STACK_PAGE, 1)]
    if fill:
        data.append(_extent(DATA_OFFSET // PAGE_SIZE, fill))
    memory = config["mem_mib"] * MIB
    return {
        "memory": f"{memory} B",
        "vcpus": config["vcpus"],
        "machine": "pc",
        "populated": min(1.0, (DATA_OFFSET + fill * PAGE_SIZE) / memory),
        "device-state": "16 KiB",
        "data": data,
        "rom": [
            {"name": name, "size": f"{pages * PAGE_SIZE} B", "data": [_extent(page, 1) for page in full]}
            for name, pages, full in ROM_BLOCKS
        ],
        "workload": _workload(facts),
    }


def _extent(page: int, pages: int) -> dict[str, str]:
    return {"offset": f"{page * PAGE_SIZE} B", "size": f"{pages * PAGE_SIZE} B"}


def _workload(facts: Given) -> list[dict[str, Any]]:
    """What the guest writes, and the status page, which every write dirties too."""
    config, pages = facts["config"], facts["guest"]["ws_pages"]
    if not config["rate"] or not pages:
        return []
    rate = f"{facts['pre']['writes_per_s'] * PAGE_SIZE / 1e6:.6f} MB/s"
    stream = {
        "pattern": _PATTERNS[config["pattern"]],
        "rate": rate,
        "offset": f"{DATA_OFFSET} B",
        "working-set": f"{pages * PAGE_SIZE} B",
        "write-bytes": f"{config['write_bytes']} B",
        "catch-up": bool(config["catch_up"]),
        "running": f"{_lead_in_ms(config)} ms",
    }
    if config["pattern"] == "hotcold":
        hot = pages // 100 * config.get("hot_pages_pct", 10)
        stream |= {"hot-pages": hot / pages, "hot-writes": config.get("hot_writes_pct", 90) / 100}
    status = {"pattern": "uniform", "rate": rate, "offset": f"{STATUS_PAGE * PAGE_SIZE} B", "write-bytes": "16 B"}
    return [stream, status | {"working-set": f"{PAGE_SIZE} B"}]


def _lead_in_ms(config: Mapping[str, Any]) -> int:
    """How long the guest has been writing when migrate is sent: the recorder's own waits.

    It looks for the guest each 200 ms, waits 500 ms, measures the rate for 1 s, then runs calc-dirty-rate two times
    (three with KVM) and sees each end by a poll of 100 ms.
    """
    seconds: int = config.get("dirty_rate_time", 1)
    runs = (3 if config["accel"] == "kvm" else 2) if seconds else 0
    return 100 + 500 + 1000 + runs * (1000 * seconds + 100)


def _migration(facts: Given) -> dict[str, Any]:
    config = facts["config"]
    known = {name for name, spec in PARAMETERS.items() if spec.exists("7.2") and spec.kind != "list"}
    out: dict[str, Any] = {name: value for name, value in facts["migrate_parameters"].items() if name in known}
    out |= {"compat": "7.2", "capabilities": list(facts["migrate_capabilities_on"])}
    out["cancel-after"] = _first_look(config["limit_s"])
    if config.get("postcopy_after") is not None:
        out["postcopy-after"] = _first_look(config["postcopy_after"])
    return out


def _first_look(after_s: float) -> str:
    """When the recorder sees that `after_s` have passed."""
    return f"{math.ceil(after_s * 1000 / POLL_MS) * POLL_MS:.3f} ms"


# -- prediction --------------------------------------------------------------------------------------------------------


def predict(facts: Given, *, seeds: Sequence[int] = SEEDS) -> tuple[Figures, float]:
    """(figures under KEYS, seconds it took) for what `given` left of a recording. Raises RecordingError.

    A real run is one draw of the guest's writes; the prediction is the run in the middle of a few draws: of those with
    the commoner verdict, the one with the median of total time, else of bytes.
    """
    from migsim import simulation

    if set(facts) != set(GIVEN):
        raise RecordingError(f"a prediction is made from {', '.join(GIVEN)} and nothing else")
    began = time.perf_counter()
    scenario = scenario_of(facts)
    draws = 1 if not scenario.guest.workload else len(seeds)
    found = [figures(simulation.run(scenario, seed=seed, threads=1, verify=False)) for seed in seeds[:draws]]
    statuses = [run["status"] for run in found]
    status = max(statuses, key=statuses.count)
    agreed = sorted((run for run in found if run["status"] == status), key=lambda run: _extent_of(run))
    return agreed[(len(agreed) - 1) // 2], time.perf_counter() - began


def _extent_of(run: Figures) -> tuple[float, int]:
    return (run["total_time_ms"] or 0, run["transferred"])


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
        "normal": sum(row.sent_pages for row in rounds),
        "duplicate": sum(row.zero_pages for row in rounds),
        "last_throttle_pct": max((row.cpu_throttle_percentage for row in rounds), default=0) or None,
    }


Report: TypeAlias = list[dict[str, Any]]
#: Metrics whose relative error is reported, and those compared by their difference.
SHARES: Final = ("total_time_ms", "transferred", "normal", "duplicate", "downtime_events_ms", "setup_time_ms")
DIFFERENCES: Final = ("rounds", "last_throttle_pct")


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


def table(report: Report) -> str:
    """Per run the figures and errors, then median and 95th percentile of each metric."""
    lines = [_line(entry) for entry in report]
    lines += ["", f"{'error of':20}{'median':>10}{'95th pct':>10}{'largest':>10}"]
    for metric, errors in errors_of(report).items():
        if errors:
            unit, scale = (" %", 100.0) if metric in SHARES else ("", 1.0)
            cells = (percentile(errors, 0.5), percentile(errors, 0.95), max(errors))
            lines.append(f"{metric:20}" + "".join(f"{scale * cell:8.2f}{unit:2}" for cell in cells))
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



def main(argv: Sequence[str] | None = None) -> int:
    """tools/accuracy FOLDER [--json F]: 0, or 2 with one sentence for bad input."""
    parser = argparse.ArgumentParser(prog="accuracy", description="Replay recordings of real QEMU migrations.")
    parser.add_argument("folder", help="recordings (*.json), or one of them")
    parser.add_argument("--json", metavar="F", help="write id, measured and predicted there; - is stdout")
    options = parser.parse_args(argv)
    try:
        report = replay(options.folder)
        text = json.dumps(report, indent=1) + "\n"
        if options.json and options.json != "-":
            Path(options.json).write_text(text, encoding="utf-8")
    except (RecordingError, OSError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 2
    try:
        print(text if options.json == "-" else table(report), flush=True)
    except BrokenPipeError:  # `| head`: nothing more goes to stdout, not even the interpreter's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
