"""Recordings as files: read, checked field by field, and cut down to what a prediction may see."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from migsim.units import PAGE_SIZE

__all__ = ["GIVEN", "KEYS", "Figures", "Given", "RecordingError", "given", "load", "measured"]

Given: TypeAlias = dict[str, Any]
Figures: TypeAlias = dict[str, Any]

GIVEN: Final = ("config", "guest", "migrate_parameters", "migrate_capabilities_on", "pre")
KEYS: Final = (
    "status", "rounds", "total_time_ms", "setup_time_ms", "downtime_events_ms", "transferred", "normal", "duplicate",
    "last_throttle_pct",
)  # fmt: skip
REPLAYED: Final = "7.2."  # the release that recordings are compared with
STATUSES: Final = ("completed", "cancelled", "failed")
BYTES_MAX: Final = 256 << 20  # of a file: the largest recording seen has 0.2 MB

#: Field: types, least, most. The largest guest is what a replay of a few seconds can be made for.
NUMBERS: Final[dict[str, tuple[tuple[type, ...], float, float]]] = {
    "config.mem_mib": ((int,), 32, 1 << 20), "config.vcpus": ((int,), 1, 4096), "config.rate": ((int, float), 0, 1e9),
    "config.write_bytes": ((int,), 1, PAGE_SIZE), "config.limit_s": ((int, float), 0, 1e6),
    "config.dirty_rate_time": ((int,), 0, 60), "config.postcopy_after": ((int, float), 0, 1e6),
    "config.hot_pages_pct": ((int, float), 1, 99), "config.hot_writes_pct": ((int, float), 0, 100),
    "config.catch_up": ((int,), 0, 1), "config.lag_cap_ms": ((int, float), 0, 1e6),
    "guest.fill_pages": ((int,), 0, 1 << 28), "guest.ws_pages": ((int,), 0, 1 << 28),
    "pre.writes_per_s": ((int, float), 0, 1e9),
}  # fmt: skip
#: Field: the names it may have.
NAMES: Final[dict[str, tuple[str, ...]]] = {
    "config.accel": ("tcg", "kvm"), "config.pattern": ("uniform", "sequential", "hotcold"),
}  # fmt: skip
#: Members of `result` that must be numbers where they are there at all.
COUNTS: Final = tuple(key for key in KEYS if key != "status")


class RecordingError(ValueError):
    """A recording that cannot be replayed; its text is one sentence."""


def load(folder: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(file name, recording) of every .json of a folder, or of one file, by name. Raises RecordingError."""
    path = Path(folder)
    if not path.exists():
        raise RecordingError(f"{path}: no such folder")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise RecordingError(f"{path}: holds no recordings (*.json)")
    return [(file.name, _read(file)) for file in files]


def _read(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file():
            raise RecordingError(f"{file.name}: is no regular file")
        if file.stat().st_size > BYTES_MAX:
            raise RecordingError(f"{file.name}: is larger than {BYTES_MAX >> 20} MiB, so not a recording")
        data = json.loads(file.read_text(encoding="utf-8"))
    except RecordingError:
        raise
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise RecordingError(f"{file.name}: cannot be read: {error}") from None
    except ValueError as error:
        raise RecordingError(f"{file.name}: is not JSON, cut off perhaps: {error}") from None
    if not isinstance(data, dict):
        raise RecordingError(f"{file.name}: is not a recording (an object is expected)")
    _check(file.name, data)
    return data


def _check(name: str, data: Mapping[str, Any]) -> None:
    """Every field that is read: there, of its type, within bounds; and the release whose replay was compared."""
    for key in ("id", "result", *GIVEN):
        if key not in data:
            raise RecordingError(f"{name}: the field {key} is missing")
    if not isinstance(data["id"], str):
        raise RecordingError(f"{name}: the field id must be a name")
    for section in ("config", "guest", "pre", "migrate_parameters", "result"):
        if not isinstance(data[section], dict):
            raise RecordingError(f"{name}: the field {section} must be an object")
    for path, (kinds, low, high) in NUMBERS.items():
        section, _, key = path.partition(".")
        if (value := data[section].get(key)) is not None and not _is_number(value, kinds, low, high):
            raise RecordingError(f"{name}: the field {path} must be a number from {low:,} to {high:,}")
    for path, names in NAMES.items():
        section, _, key = path.partition(".")
        if key in data[section] and data[section][key] not in names:
            raise RecordingError(f"{name}: the field {path} must be one of {', '.join(names)}")
    capabilities = data["migrate_capabilities_on"]
    if not isinstance(capabilities, list) or not all(isinstance(one, str) for one in capabilities):
        raise RecordingError(f"{name}: the field migrate_capabilities_on must be a list of names")
    _check_result(name, data["result"])
    version = data.get("qemu")  # as QEMU says it: "7.2.22 Debian ..."
    if version is not None and not str(version).startswith(REPLAYED):
        raise RecordingError(f"{name}: recorded with QEMU {str(version)[:40]}, and only {REPLAYED}x is replayed")


def _check_result(name: str, result: Mapping[str, Any]) -> None:
    if result.get("status") not in STATUSES:
        raise RecordingError(f"{name}: the field result.status must be one of {', '.join(STATUSES)}")
    for key in COUNTS:
        value = result.get(key)
        if value is not None and not _is_number(value, (int, float), 0, 1e18):
            raise RecordingError(f"{name}: the field result.{key} must be a number, 0 or more")


def _is_number(value: object, kinds: tuple[type, ...], low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, kinds) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and low <= value <= high


def given(recording: Mapping[str, Any]) -> Given:
    """All a prediction may see of a recording: a deep copy of the five fields."""
    copy: Given = json.loads(json.dumps({key: recording[key] for key in GIVEN}))
    return copy


def measured(recording: Mapping[str, Any]) -> Figures:
    """What really happened, under the keys of a prediction."""
    result = recording["result"]
    return {key: result.get(key) for key in KEYS}
