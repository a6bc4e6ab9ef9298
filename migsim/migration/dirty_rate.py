"""calc-dirty-rate in its three modes: QEMU's estimators, with their bias.

Source: QEMU 10.0 migration/dirtyrate.c. All of them count distinct pages over the time asked
for, so a longer calc-time gives a smaller rate once pages are written twice; page-sampling sees a page only if the
sample holds it, and skips blocks below 128 KiB; dirty-ring counts ring entries of each vCPU, again after each reap.
Rates are whole MiB/s, each division rounds down where QEMU's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from migsim.migration.dirty_rate_commands import SAMPLE_PAGES_DEFAULT, CalcDirtyRate
from migsim.migration.parameters import Compat
from migsim.sim.prng import GOLDEN, MIX_1, MIX_2, stream_key
from migsim.units import GIB, KIB, PAGE_SIZE

__all__ = [
    "ASSUMED_NS", "BLOCK_MIN_BYTES", "dirty_bitmap_rate", "dirty_ring_rates", "page_sampling_rate",
    "reply", "sampled_pages",
]  # fmt: skip

BLOCK_MIN_BYTES: Final = 128 * KIB  # QEMU's comment says MiB, its shift by 10 KiB: a live 7.2.22 samples 64 MiB
SAMPLE_STREAM: Final = 11

#: ns to hash one sampled page, assumed: 64 cache lines that are in no cache, then xxhash (8.1) or zlib's crc32.
ASSUMED_NS: Final[Mapping[str, float]] = {"qemu_sample_page": 1_500.0, "qemu_sample_page_crc32": 5_000.0}

Ints = NDArray[np.int64]


def sampled_pages(block_pages: int, per_gib: int, seed: int, block: int) -> Ints:
    """The pages of one block that page-sampling hashes, int64[n]; drawn with replacement, never the last page.

    The range is handed over as an int32 (g_rand_int_range): from 8 TiB on it is negative for one RAMBlock, GLib then
    answers 0, and every sample is page 0.
    """
    if block_pages * PAGE_SIZE < BLOCK_MIN_BYTES:
        return np.zeros(0, dtype=np.int64)
    count = block_pages * PAGE_SIZE * per_gib // GIB
    reach = (block_pages - 1 + (1 << 31)) % (1 << 32) - (1 << 31)
    if reach <= 0:
        return np.zeros(count, dtype=np.int64)
    words = _words(stream_key(seed, SAMPLE_STREAM, block), count)
    return np.asarray(words % np.uint64(reach), dtype=np.int64)


def _words(key: int, count: int) -> NDArray[np.uint64]:
    """sim.prng.word(key, 0 .. count - 1), all at once."""
    with np.errstate(over="ignore"):
        value = np.uint64(key) + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(MIX_1)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(MIX_2)
    return np.asarray(value ^ (value >> np.uint64(31)))


def page_sampling_rate(dirty_samples: int, samples: int, total_mib: int, elapsed_ms: int) -> int:
    """MiB/s from the samples whose hash differs; `total_mib`: of the blocks sampled."""
    return dirty_samples * total_mib * 1000 // (samples * elapsed_ms) if samples and elapsed_ms else 0


def dirty_bitmap_rate(dirty_pages: int, elapsed_ms: int) -> int:
    """MiB/s from the pages one sync found dirty after the time asked for."""
    return (dirty_pages * PAGE_SIZE >> 20) * 1000 // elapsed_ms if elapsed_ms else 0


def dirty_ring_rates(entries: Sequence[int], elapsed_ms: int) -> list[int]:
    """MiB/s of each vCPU from its ring entries; the total QEMU reports is their sum, each rounded down first."""
    return [dirty_bitmap_rate(count, elapsed_ms) for count in entries]


def reply(
    request: CalcDirtyRate, compat: Compat, start_s: int, rates: Sequence[int] | int | None,
    elapsed_ms: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """query-dirty-rate while measuring (rates None) or after, asked in the unit calc-dirty-rate was.

    calc-time is the time it took once it is over: page-sampling's first pass may take longer than was asked for. In
    7.2 the bitmap's and ring's sample-pages is 0 only once measured.
    """
    sampling, old = request.mode == "page-sampling", compat == "7.2"
    whole_s = old or request.calc_time_ms % 1000 == 0
    took_ms = request.calc_time_ms if elapsed_ms is None else elapsed_ms
    out: dict[str, Any] = {
        "status": "measuring" if rates is None else "measured",
        "sample-pages": (request.sample_pages or SAMPLE_PAGES_DEFAULT) if sampling or rates is None else 0,
        "mode": request.mode,
        "start-time": start_s,
        "calc-time": took_ms // 1000 if whole_s else took_ms,
    }
    if not old:
        out["calc-time-unit"] = "second" if whole_s else "millisecond"
    if isinstance(rates, int):
        out["dirty-rate"] = rates
    elif rates is not None:
        out["dirty-rate"] = sum(rates)
        out["vcpu-dirty-rate"] = [{"id": i, "dirty-rate": rate} for i, rate in enumerate(rates)]
    return out
