"""``access_tracking_perf_test``'s assertions: what was marked idle and is touched again must show as touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from migsim.units import PAGE_SIZE
from migsim.validate.backends import CONFIG, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.inside import Inside
from migsim.validate.rig import GPA, LOG, Rig
from migsim.validate.verdicts import CheckFailed

SUITE = "access_tracking_perf_test"
N_PAGES = 200
STILL_IDLE_MAX = N_PAGES // 10


def cases(backend: Backend) -> Iterator[Case]:
    variants: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("tdp", {}),
        ("tdp without A/D", {"ad_bits": False}),
        ("tdp-5.10", {"mmu": "tdp-5.10"}),
        ("tdp-5.10 without A/D", {"mmu": "tdp-5.10", "ad_bits": False}),
        ("shadow", {"mmu": "shadow"}),
        ("shadow without A/D", {"mmu": "shadow", "ad_bits": False}),
    )
    for name, config in variants:
        yield Case(SUITE, name, partial(idle_and_touched, config=config), (MMU, CONFIG))


def _idle(rig: Rig) -> int:
    """Mark everything idle, then count pages that do not show as young."""
    rig.must(Inside("age", (0, N_PAGES)))
    return _not_young(rig)


def _not_young(rig: Rig) -> int:
    return sum(not rig.must(Inside("young", (page * PAGE_SIZE,))) for page in range(N_PAGES))


def idle_and_touched(context: Context, config: Mapping[str, Any]) -> None:
    """Populate; mark idle and write; mark idle and read.  A hardware TLB may hide a touch, so it is flushed."""
    with context.rig(config) as rig:
        rig.slot(N_PAGES, 0)
        rig.vcpus(1)
        everything = list(range(N_PAGES))
        rig.store(everything, 1)
        for kind in ("w", "r"):
            idle = _idle(rig)
            if idle != N_PAGES:
                raise CheckFailed(f"{N_PAGES - idle} of {N_PAGES} pages are young just after they were marked idle")
            rig.vm.flush_remote_tlbs()
            rig.halts([(kind, GPA + page * PAGE_SIZE, 2) for page in everything])
            still = _not_young(rig)
            if still > STILL_IDLE_MAX:
                raise CheckFailed(f"{still} of {N_PAGES} pages were touched ('{kind}') and still count as idle")
            rig.check_inside()
            context.verified(2 * N_PAGES)
        _aging_hides_no_store(context, rig)


def _aging_hides_no_store(context: Context, rig: Rig) -> None:
    """Aging in the middle of logging: no store is lost by it."""
    rig.slot(N_PAGES, LOG)
    for value in range(3, 7):
        pages = list(range(value, N_PAGES, value))
        rig.store(pages[::2], value)
        rig.must(Inside("age", (0, N_PAGES)))
        rig.store(pages[1::2], value)
        if rig.get(N_PAGES) != set(pages):
            raise CheckFailed("with aging in between, the log is not what was stored to")
        context.verified(N_PAGES)
