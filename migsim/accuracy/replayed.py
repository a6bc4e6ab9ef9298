"""A recording as a scenario: the guest of tools/record_qemu, QEMU 7.2's bare `pc`, and the recorder's own waits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from migsim.accuracy.recordings import Given, RecordingError
from migsim.migration.parameters import PARAMETERS
from migsim.scenario import Scenario, build
from migsim.units import MIB, PAGE_SIZE

__all__ = ["scenario_of"]

PROFILE: Final = "qemu-7.2-loopback"
DATA_OFFSET: Final = 16 * MIB  # the guest fills memory, and writes, from here on
STATUS_PAGE: Final = 1  # holds the guest's counter: every write dirties it
STACK_PAGE: Final = 3
# QEMU 7.2's `pc` with an own 64 KiB firmware and no devices: (block, pages, pages that are not zero). The firmware
# has code in its first and last page; of the ACPI blocks the tables, the loader and the RSDP hold one page of data.
ROM_BLOCKS: Final = (
    ("pc.bios", 16, (0, 15)), ("pc.rom", 32, ()), ("/rom@etc/acpi/tables", 32, (0,)),
    ("/rom@etc/table-loader", 1, (0,)), ("/rom@etc/acpi/rsdp", 1, (0,)),
)  # fmt: skip
PATTERNS: Final = {"sequential": "sequential", "uniform": "uniform", "hotcold": "hot-cold"}
# The recorder looks each 100 ms and the question takes 0.78 ms: the mean over ten recordings that were cancelled or
# went on in post-copy, 100.74 to 100.81. It cancels, or starts post-copy, at a look, the first being at once.
POLL_MS: Final = 100.78
FOUND_MS: Final = 80  # from the guest's first write until the recorder sees it; it looks each 200 ms
SAMPLING_MS: Final = 50  # calc-dirty-rate by page-sampling: over its time, until a poll of 100 ms sees the end
BITMAP_MS: Final = 400  # the same in dirty-bitmap mode, which logs and syncs besides
# A second without a hiccup of the host's shows the rate asked for. One of 10 ms takes 1 % of that second, and the
# guest paces itself by its clock: it is the recorder's second that is short of writes, not the migration's.
HICCUP_SHARE: Final = 0.01


def scenario_of(facts: Given, *, late_ms: float = 0.0) -> Scenario:
    """The scenario of a recording. Raises RecordingError naming the field that is missing or out of range.

    late_ms: how much longer than usual the guest had been writing when migrate was sent; only a sweep remembers it.
    """
    try:
        return build(
            {
                "guest": _guest(facts, late_ms),
                "kvm": {"accel": facts["config"]["accel"], "manual-dirty-log-protect": "initially-set"},
                "migration": _migration(facts),
                "link": {"bandwidth": "100 Gbit/s", "latency": "0 s"},  # a local socket: the threads are the limit
                "host": {"profile": PROFILE, "destination-prealloc": bool(facts["config"].get("prealloc", True))},
            }
        )
    except KeyError as error:
        raise RecordingError(f"the field {error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise RecordingError(f"cannot be replayed: {error}") from None


def _guest(facts: Given, late_ms: float) -> dict[str, Any]:
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
        "compressed": 1.0,  # pseudo-random words: zlib makes 4096 bytes of a page of them into 4107
        "rom": [
            {"name": name, "size": f"{pages * PAGE_SIZE} B", "data": [_extent(page, 1) for page in full]}
            for name, pages, full in ROM_BLOCKS
        ],
        "workload": _workload(facts, late_ms),
    }


def _extent(page: int, pages: int) -> dict[str, str]:
    return {"offset": f"{page * PAGE_SIZE} B", "size": f"{pages * PAGE_SIZE} B"}


def _workload(facts: Given, late_ms: float) -> list[dict[str, Any]]:
    """What the guest writes, and the status page, which every write dirties too."""
    config, pages = facts["config"], facts["guest"]["ws_pages"]
    if not config["rate"] or not pages:
        return []
    rate = f"{writes_per_s(facts) * PAGE_SIZE / 1e6:.6f} MB/s"
    stream = {
        "pattern": PATTERNS[config["pattern"]],
        "rate": rate,
        "offset": f"{DATA_OFFSET} B",
        "working-set": f"{pages * PAGE_SIZE} B",
        "write-bytes": f"{config['write_bytes']} B",
        "catch-up": True,
        "running": f"{_lead_in_ms(config) + late_ms:.3f} ms",
    }
    if not config["catch_up"]:  # held up longer than this, it drops what it is behind
        stream["catch-up-limit"] = f"{config.get('lag_cap_ms', 1.0)} ms"
    if config["pattern"] == "hotcold":
        hot = pages // 100 * config.get("hot_pages_pct", 10)
        stream |= {"hot-pages": hot / pages, "hot-writes": config.get("hot_writes_pct", 90) / 100}
    status = {"pattern": "uniform", "rate": rate, "offset": f"{STATUS_PAGE * PAGE_SIZE} B", "write-bytes": "16 B"}
    return [stream, status | {"working-set": f"{PAGE_SIZE} B"}]


def writes_per_s(facts: Given) -> float:
    """The guest's rate: what it was told, unless it fell short of that by more than a hiccup while it was watched."""
    asked, seen = float(facts["config"]["rate"]), float(facts["pre"]["writes_per_s"])
    return asked if seen >= (1.0 - HICCUP_SHARE) * asked else seen


def _lead_in_ms(config: Mapping[str, Any]) -> float:
    """How long the guest has been writing when migrate is sent: the recorder's own waits.

    It looks for the guest each 200 ms, waits 500 ms, measures the rate for 1 s, then runs calc-dirty-rate by
    page-sampling twice, and with KVM by dirty-bitmap too, and sees each end by a poll of 100 ms.
    """
    seconds: int = config.get("dirty_rate_time", 1)
    runs = 2 * (1000 * seconds + SAMPLING_MS) + (1000 * seconds + BITMAP_MS) * (config["accel"] == "kvm")
    return float(FOUND_MS + 500 + 1000 + runs * bool(seconds))


def _migration(facts: Given) -> dict[str, Any]:
    config = facts["config"]
    known = {name for name, spec in PARAMETERS.items() if spec.exists("7.2") and spec.kind != "list"}
    out: dict[str, Any] = {name: value for name, value in facts["migrate_parameters"].items() if name in known}
    out |= {"compat": "7.2", "capabilities": list(facts["migrate_capabilities_on"])}
    out["cancel-after"] = _first_look(config["limit_s"])
    if "pause-before-switchover" in out["capabilities"]:
        out["switchover-pause"] = f"{2 * config['limit_s'] + 1} s"  # the recorder never sends migrate-continue
    if config.get("postcopy_after") is not None:
        out["postcopy-after"] = _first_look(config["postcopy_after"])
    return out


def _first_look(after_s: float) -> str:
    """When the recorder sees that `after_s` have passed."""
    return f"{math.ceil(after_s * 1000 / POLL_MS) * POLL_MS:.3f} ms"
