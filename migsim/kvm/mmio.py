"""MMIO SPTEs: entries that fault on purpose and carry gfn, access and the memslots generation they were made under.

A generation that no longer matches makes the entry stale: the fault is handled in full again. When the generation's
low bits wrap, every MMIO SPTE must go. Source: Linux 6.13 and 5.10, arch/x86/kvm/mmu/spte.{c,h}.
"""

from __future__ import annotations

from typing import Final

from migsim.kvm.spte import ACC_ALL, SpteFormat
from migsim.units import PAGE_SHIFT

_MODERN: Final = ((0, 8, 3), (8, 11, 52))  # (first generation bit, bits, SPTE bit): 19 bits
_V5_10: Final = ((0, 9, 3), (9, 9, 54))  # 18 bits


def _fields(fmt: SpteFormat) -> tuple[tuple[int, int, int], ...]:
    return _MODERN if fmt.mmu_present else _V5_10


def generation_bits(fmt: SpteFormat) -> int:
    """How many bits of the memslots generation an MMIO SPTE stores."""
    return sum(bits for _, bits, _ in _fields(fmt))


def generation_mask(fmt: SpteFormat) -> int:
    """Mask of the low generation bits an MMIO SPTE stores; the in-progress bit 63 never is."""
    return (1 << generation_bits(fmt)) - 1


def make_mmio_spte(fmt: SpteFormat, *, generation: int, gfn: int, access: int = ACC_ALL) -> int:
    """The MMIO SPTE of `gfn` stamped with `generation`; raises AssertionError where MMIO caching is impossible."""
    assert fmt.mmio_value, f"{fmt.name}: MMIO caching is off, gfn {gfn:#x}"
    spte = fmt.mmio_value | access & fmt.mmio_access | gfn << PAGE_SHIFT
    for first, bits, at in _fields(fmt):
        spte |= (generation >> first & ((1 << bits) - 1)) << at
    assert fmt.is_mmio(spte), f"MMIO SPTE {spte:#018x} gfn {gfn:#x} does not read back as one"
    return spte


def mmio_generation(fmt: SpteFormat, spte: int) -> int:
    """The generation stamped into an MMIO SPTE."""
    return sum((spte >> at & ((1 << bits) - 1)) << first for first, bits, at in _fields(fmt))


def mmio_gfn(fmt: SpteFormat, spte: int) -> int:
    """The gfn an MMIO SPTE was made for."""
    return (spte & ((1 << 52) - 1) & ~fmt.mmio_mask) >> PAGE_SHIFT


def mmio_access(fmt: SpteFormat, spte: int) -> int:
    """The ACC_* bits an MMIO SPTE keeps (none for EPT)."""
    return spte & fmt.mmio_access


def is_current(fmt: SpteFormat, spte: int, generation: int) -> bool:
    """Was this MMIO SPTE made under the present memslots?"""
    return mmio_generation(fmt, spte) == generation & generation_mask(fmt)
