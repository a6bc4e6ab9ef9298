"""``random``: seeded random scripts under the auditor, over every MMU, logging by W and by PML, bitmap and ring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from migsim.validate.backends import CONFIG, ERRNO, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.differential.choice import SeededChooser
from migsim.validate.random_scripts import HUGE_PAGES, play_random
from migsim.validate.verdicts import CheckFailed

SUITE = "random"
STEPS = 150  # of one script

EXTRA_VARIANTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("tdp,NX", {"nx_huge_pages": True}),
    ("tdp,slot zap", {"quirk_slot_zap_all": False}),
    ("tdp,no eager split", {"eager_page_split": False}),
)


def cases(backend: Backend) -> Iterator[Case]:
    variants = (*backend.variants, *EXTRA_VARIANTS) if CONFIG in backend.shows else backend.variants
    for name, config in variants:
        yield Case(SUITE, name or "ioctls", partial(scripts, config=config, share=len(variants)), (ERRNO,))


def scripts(context: Context, config: Mapping[str, Any], share: int) -> None:
    """Scripts until this case's share of ``--ops`` is done; every other one with a ring."""
    number = 0
    while context.done * share < context.ops:
        level = HUGE_PAGES if MMU in context.backend.shows else 1
        with context.rig({**config, "bulk": False}, level=level) as rig:
            try:
                choose = SeededChooser(context.seed + number)
                auditor = play_random(rig, choose, config, steps=STEPS, ring=number % 2 == 1)
            except AssertionError as defect:
                raise CheckFailed(f"assertion: {defect}", rig.script()) from defect
            context.verified(auditor.bits)
        number += 1
