"""What a kernel does at a fault, enable, CLEAR and disable, chosen by MMU and kernel version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["MMUS", "Disable", "Kernel", "Rules", "default_kernel", "rules_for"]

Kernel = tuple[int, int]
Disable = Literal["walk", "leaf", "non-leaf", "in-place", "rmap"]

MMUS: Final = ("shadow", "tdp-5.10", "tdp")
_TODAY: Final[Kernel] = (6, 18)


@dataclass(frozen=True)
class Rules:
    """shared_faults: mmu_lock is taken for read (5.12) · fast_faults: W is added without the lock (TDP MMU from 5.15) ·
    split_on_fault: a huge SPTE keeps its translations (6.2), else it is zapped · eager_split: at enable or CLEAR (5.18)
    · split_drops_lock: the lock is let go for each table that eager splitting allocates (cf3ff0ee, 6.11)
    · sets_page_dirty: a cleared or zapped SPTE touches struct page (until 6.12) · protects_huge_at_enable: also with
    INITIALLY_SET (5.7 to 5.10) · lockless_aging: (6.14) · slot_array_copied: a slot change copies all (until 5.16) ·
    disable: how huge mappings come back (5ba7c4c6 in 5.19, rebuilt in place in 6.13).
    """

    rmap: bool
    shared_faults: bool
    fast_faults: bool
    split_on_fault: bool
    eager_split: bool
    split_drops_lock: bool
    sets_page_dirty: bool
    protects_huge_at_enable: bool
    lockless_aging: bool
    slot_array_copied: bool
    disable: Disable


def default_kernel(mmu: str) -> Kernel:
    """The release whose MMU the name means: 5.10 for the TDP MMU as first merged, else the newest rules known here."""
    return (5, 10) if mmu == "tdp-5.10" else _TODAY


def rules_for(mmu: str, kernel: Kernel) -> Rules:
    """The rules of `mmu` in `kernel`. ValueError for an unknown MMU or a TDP MMU older than its first release."""
    if mmu not in MMUS:
        raise ValueError(f'mmu "{mmu}": allowed are {", ".join(MMUS)}')
    if mmu != "shadow" and kernel < (5, 10):
        raise ValueError(f"the TDP MMU came in 5.10, not in {kernel[0]}.{kernel[1]}")
    tdp = mmu == "tdp"
    return Rules(
        rmap=mmu == "shadow",
        shared_faults=tdp and kernel >= (5, 12),
        fast_faults=mmu == "shadow" or kernel >= (5, 15),
        split_on_fault=tdp and kernel >= (6, 2),
        eager_split=tdp and kernel >= (5, 18),
        split_drops_lock=tdp and kernel >= (6, 11),
        sets_page_dirty=kernel < (6, 13),
        protects_huge_at_enable=(5, 7) <= kernel <= (5, 10),
        lockless_aging=kernel >= (6, 14),
        slot_array_copied=kernel < (5, 17),
        disable=_disable(mmu, kernel),
    )


def _disable(mmu: str, kernel: Kernel) -> Disable:
    if mmu == "shadow":
        return "rmap"
    if kernel < (5, 12):
        return "walk"  # 5.10 tested the table page instead of the data page and recovered nothing (3eda3381)
    if kernel < (5, 19):
        return "leaf"
    return "non-leaf" if kernel < (6, 13) else "in-place"
