"""calc-dirty-rate and set-vcpu-dirty-limit as QMP takes them: arguments, and what QEMU refuses in its words.

Source: QEMU 10.0 migration/dirtyrate.c and system/dirtylimit.c, and conversations with a live 7.2.22 under KVM with
and without dirty rings. All errors are GenericError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from migsim.migration.parameters import Compat, QmpError

__all__ = ["SAMPLE_PAGES", "SAMPLE_PAGES_DEFAULT", "CalcDirtyRate", "Mode", "check_request", "check_vcpu_limit"]

Mode = Literal["page-sampling", "dirty-bitmap", "dirty-ring"]
SAMPLE_PAGES_DEFAULT: Final = 512  # a GiB
SAMPLE_PAGES: Final = (128, 16384)
_CALC_TIME_MS: Final[Mapping[str, tuple[int, int]]] = {"7.2": (1000, 60_000), "10.0": (50, 60_000)}


@dataclass(frozen=True, slots=True)
class CalcDirtyRate:
    """Arguments of calc-dirty-rate. calc_time_ms: whole seconds in 7.2."""

    calc_time_ms: int
    mode: Mode = "page-sampling"
    sample_pages: int | None = None


def check_request(request: CalcDirtyRate, compat: Compat, *, dirty_ring: bool, measuring: bool = False) -> None:
    """What QEMU refuses, in its order. Raises QmpError."""
    old, pages = compat == "7.2", request.sample_pages
    if measuring:
        raise QmpError("the dirty rate is already being measured.")
    low, high = _CALC_TIME_MS[compat]
    if not low <= request.calc_time_ms <= high:
        raise QmpError(f"calc-time is out of range{'[1, 60]' if old else f'[{low}, {high}]'}.")
    if pages is not None and request.mode == "dirty-ring" and old:
        raise QmpError("either sample-pages or dirty-ring can be specified.")
    if pages is not None and request.mode != "page-sampling" and not old:
        raise QmpError("sample-pages is used only in page-sampling mode")
    if pages is not None and not SAMPLE_PAGES[0] <= pages <= SAMPLE_PAGES[1]:
        raise QmpError(f"sample-pages is out of range[{SAMPLE_PAGES[0]}, {SAMPLE_PAGES[1]}].")
    if request.mode == "dirty-ring" and not dirty_ring or request.mode == "dirty-bitmap" and dirty_ring:
        raise QmpError(f"mode {request.mode} is not enabled, use other method instead.")


def check_vcpu_limit(cpu_index: int | None, vcpus: int, *, dirty_ring: bool) -> None:
    """What set-vcpu-dirty-limit refuses, in both versions. Raises QmpError."""
    if not dirty_ring:
        raise QmpError("dirty page limit feature requires KVM with accelerator property 'dirty-ring-size' set'")
    if cpu_index is not None and not 0 <= cpu_index < vcpus:
        raise QmpError("incorrect cpu index specified")
