"""``dirty_log_page_splitting_test``: huge pages split when logging starts, or at CLEAR, and come back when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from migsim.validate.backends import CONFIG, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.rig import LOG, Rig
from migsim.validate.verdicts import CheckFailed

SUITE = "dirty_log_page_splitting_test"
N_PAGES = 3 * 512  # three huge pages
PAGES_OF = {"pages_4k": 1, "pages_2m": 512, "pages_1g": 512 * 512}


def cases(backend: Backend) -> Iterator[Case]:
    needs = (MMU, CONFIG)
    for name, config in (("PML", {}), ("W", {"pml": False}), ("AMD", {"vendor": "amd"})):
        for manual in (0, 1, 3):
            yield Case(SUITE, f"manual {manual},{name}", partial(splitting, config=config, manual=manual), needs)
        yield Case(SUITE, f"one page of each half,{name}", partial(one_page_of_each, config=config), needs)


def counts(rig: Rig) -> dict[str, int]:
    stats = rig.vm.stats_read()
    return {name: int(stats[name]) for name in PAGES_OF}


def _require(what: str, found: dict[str, int], wanted: dict[str, int]) -> None:
    if found != wanted:
        raise CheckFailed(f"{what}: {found}, wanted {wanted}")


HUGE = {"pages_4k": 0, "pages_2m": 3, "pages_1g": 0}
SMALL = {"pages_4k": N_PAGES, "pages_2m": 0, "pages_1g": 0}


def splitting(context: Context, config: Mapping[str, Any], manual: int) -> None:
    """Populate, enable, clear, dirty, disable, populate again; the statistics tell what is mapped how."""
    with context.rig({"nx_huge_pages": False, **config}, level=2) as rig:
        if manual:
            rig.manual_protect(manual)
        rig.slot(N_PAGES, 0)
        rig.vcpus(2)
        everything = list(range(N_PAGES))
        rig.store(everything, 1, 0)
        rig.store(everything, 1, 1)
        _require("populated", counts(rig), HUGE)
        rig.slot(N_PAGES, LOG)
        _require("enabled", counts(rig), HUGE if manual == 3 else SMALL)
        rig.get(N_PAGES)
        if manual:
            rig.clear(N_PAGES, set(everything))
        _require("cleared", counts(rig), SMALL)
        rig.store(everything, 2, 0)
        if rig.get(N_PAGES) != set(everything):
            raise CheckFailed("not every page is reported after all were stored to")
        rig.slot(N_PAGES, 0)
        rig.store(everything, 3, 1)
        _require("disabled and populated again", counts(rig), HUGE)
        context.verified(3 * N_PAGES)


def one_page_of_each(context: Context, config: Mapping[str, Any]) -> None:
    """CLEAR of the last page of a huge page alone splits that huge page, and no other."""
    with context.rig({"nx_huge_pages": False, **config}, level=2) as rig:
        rig.manual_protect(3)
        rig.slot(N_PAGES, 0)
        rig.vcpus(1)
        rig.store(list(range(N_PAGES)), 1)
        rig.slot(N_PAGES, LOG)
        rig.get(N_PAGES)
        for huge, page in enumerate((511, 512, 1023 + 512), 1):
            rig.clear(N_PAGES, {page})
            wanted = {"pages_4k": 512 * huge, "pages_2m": 3 - huge, "pages_1g": 0}
            _require(f"after CLEAR of page {page}", counts(rig), wanted)
            context.verified(512)
