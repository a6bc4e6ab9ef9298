"""calc-dirty-rate in its three modes, and query-vcpu-dirty-limit: QEMU's estimators, with their bias.

Source: QEMU 10.0 migration/dirtyrate.c and system/dirtylimit.c. All of them count distinct pages over the time asked
for, so a longer calc-time gives a smaller rate once pages are written twice; page-sampling sees a page only if the
sample holds it, and skips blocks below 128 MiB; dirty-ring counts ring entries of each vCPU. Rates are whole MiB/s,
each division rounds down where QEMU's does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from migsim.migration.parameters import Compat, QmpError
from migsim.migration.policies.dirty_limit import DirtyLimit
from migsim.sim.prng import stream_key, word
from migsim.units import GIB, MIB, PAGE_SIZE

__all__ = [
    "BLOCK_MIN_BYTES", "CalcDirtyRate", "Mode", "check_request", "dirty_bitmap_rate", "dirty_ring_rates",
    "page_sampling_rate", "query_vcpu_dirty_limit", "reply", "sampled_pages", "unmeasured",
]  # fmt: skip

Mode = Literal["page-sampling", "dirty-bitmap", "dirty-ring"]
BLOCK_MIN_BYTES: Final = 128 * MIB
SAMPLE_PAGES_DEFAULT: Final = 512  # a GiB
SAMPLE_PAGES: Final = (128, 16384)
SAMPLE_STREAM: Final = 11
_CALC_TIME_MS: Final[Mapping[str, tuple[int, int]]] = {"7.2": (1000, 60_000), "10.0": (50, 60_000)}


@dataclass(frozen=True, slots=True)
class CalcDirtyRate:
    """Arguments of calc-dirty-rate. calc_time_ms: whole seconds in 7.2."""

    calc_time_ms: int
    mode: Mode = "page-sampling"
    sample_pages: int | None = None


def check_request(request: CalcDirtyRate, compat: Compat, *, dirty_ring: bool, measuring: bool = False) -> None:
    """What QEMU refuses, in its order. Raises QmpError."""
    if measuring:
        raise QmpError("dirty rate is already measuring")
    low, high = _CALC_TIME_MS[compat]
    if not low <= request.calc_time_ms <= high:
        shown = "[1, 60]" if compat == "7.2" else f"[{low}, {high}]"
        raise QmpError(f"calc-time is out of range{shown}.")
    if request.sample_pages is not None:
        if request.mode != "page-sampling" and compat != "7.2":
            raise QmpError("sample-pages is used only in page-sampling mode")
        if not SAMPLE_PAGES[0] <= request.sample_pages <= SAMPLE_PAGES[1]:
            raise QmpError(f"sample-pages is out of range[{SAMPLE_PAGES[0]}, {SAMPLE_PAGES[1]}].")
    if request.mode == "dirty-ring" and not dirty_ring or request.mode == "dirty-bitmap" and dirty_ring:
        raise QmpError(f"mode {request.mode} is not enabled, use other method instead.")


def sampled_pages(block_pages: int, per_gib: int, seed: int, block: int) -> Sequence[int]:
    """The pages of one block that page-sampling hashes; drawn with replacement, and with a 32-bit index.

    From 8 TiB on a single block's page number no longer fits, so pages past 2^31 are never looked at.
    """
    if block_pages * PAGE_SIZE < BLOCK_MIN_BYTES:
        return ()
    count = block_pages * PAGE_SIZE * per_gib // GIB
    key = stream_key(seed, SAMPLE_STREAM, block)
    reach = min(block_pages, 1 << 31)
    return [word(key, i) % reach for i in range(count)]


def page_sampling_rate(
    blocks: Sequence[int], written: Callable[[int, Sequence[int]], int], elapsed_ms: int, *, per_gib: int = 512,
    seed: int = 0,
) -> int:  # fmt: skip
    """MiB/s. `blocks`: pages of each RAMBlock; `written(block, pages)`: how many of those hold other contents now."""
    dirty = samples = total_mib = 0
    for block, pages in enumerate(blocks):
        chosen = sampled_pages(pages, per_gib, seed, block)
        if not chosen:
            continue
        dirty += written(block, chosen)
        samples += len(chosen)
        total_mib += pages * PAGE_SIZE // MIB
    if not samples or not elapsed_ms:
        return 0
    return dirty * total_mib * 1000 // (samples * elapsed_ms)


def dirty_bitmap_rate(dirty_pages: int, elapsed_ms: int) -> int:
    """MiB/s from the pages one sync found dirty after the time asked for."""
    return (dirty_pages * PAGE_SIZE >> 20) * 1000 // elapsed_ms if elapsed_ms else 0


def dirty_ring_rates(entries: Sequence[int], elapsed_ms: int) -> list[int]:
    """MiB/s of each vCPU from its ring entries; the total QEMU reports is their sum, each rounded down first."""
    return [(count * PAGE_SIZE >> 20) * 1000 // elapsed_ms if elapsed_ms else 0 for count in entries]


def unmeasured() -> dict[str, Any]:
    """query-dirty-rate of a fresh QEMU."""
    return {"status": "unstarted", "sample-pages": 0, "mode": "page-sampling", "start-time": 0, "calc-time": 0}


def reply(request: CalcDirtyRate, compat: Compat, start_s: int, rates: Sequence[int] | int | None) -> dict[str, Any]:
    """query-dirty-rate while measuring (rates None) or after."""
    pages = (request.sample_pages or SAMPLE_PAGES_DEFAULT) if request.mode == "page-sampling" else 0
    whole_s = compat == "7.2" or request.calc_time_ms % 1000 == 0
    out: dict[str, Any] = {
        "status": "measuring" if rates is None else "measured",
        "sample-pages": pages,
        "mode": request.mode,
        "start-time": start_s,
        "calc-time": request.calc_time_ms // 1000 if whole_s else request.calc_time_ms,
    }
    if compat != "7.2":
        out["calc-time-unit"] = "second" if whole_s else "millisecond"
    if isinstance(rates, int):
        out["dirty-rate"] = rates
    elif rates is not None:
        out["dirty-rate"] = sum(rates)
        out["vcpu-dirty-rate"] = [{"id": i, "dirty-rate": rate} for i, rate in enumerate(rates)]
    return out


def query_vcpu_dirty_limit(limit: DirtyLimit | None, current: Sequence[int]) -> list[dict[str, int]]:
    """query-vcpu-dirty-limit: the vCPUs under a quota, their quota and their rate; [] where none is."""
    if limit is None:
        return []
    return [
        {"cpu-index": vcpu, "limit-rate": row.quota_mib_per_s, "current-rate": current[vcpu]}
        for vcpu, row in sorted(limit.limits.items())
    ]


