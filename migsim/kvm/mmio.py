"""MMIO SPTEs: entries that fault on purpose and carry gfn, access and the memslots generation they were made under.

A generation that no longer matches makes the entry stale: the fault is handled in full again. When the generation's
low bits wrap, every MMIO SPTE must go. Source: Linux 6.13 and 5.10, arch/x86/kvm/mmu/spte.{c,h}.
"""

from __future__ import annotations

from typing import Any, Final

from migsim.kvm.memslot import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS, Memslots
from migsim.kvm.spte import ACC_ALL, RSVD_MASK_LEN, SpteFormat
from migsim.units import PAGE_SHIFT, PAGE_SIZE

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
    """The MMIO SPTE of `gfn` stamped with `generation`; raises AssertionError where MMIO caching is impossible.

    On a CPU with L1TF the top bits of the address are all ones, so that no cached page is named, and the bits of the
    gfn that lay there are kept 5 bits further up.
    """
    assert fmt.mmio_value, f"{fmt.name}: MMIO caching is off, gfn {gfn:#x}"
    gpa = gfn << PAGE_SHIFT
    spte = fmt.mmio_value | access & fmt.mmio_access | gpa | fmt.rsvd_mask
    spte |= (gpa & fmt.rsvd_mask) << RSVD_MASK_LEN
    for first, bits, at in _fields(fmt):
        spte |= (generation >> first & ((1 << bits) - 1)) << at
    assert fmt.is_mmio(spte), f"MMIO SPTE {spte:#018x} gfn {gfn:#x} does not read back as one"
    return spte


def mmio_generation(fmt: SpteFormat, spte: int) -> int:
    """The generation stamped into an MMIO SPTE."""
    return sum((spte >> at & ((1 << bits) - 1)) << first for first, bits, at in _fields(fmt))


def mmio_gfn(fmt: SpteFormat, spte: int) -> int:
    """The gfn an MMIO SPTE was made for."""
    high = spte >> RSVD_MASK_LEN & fmt.rsvd_mask
    low = spte & ((1 << 52) - PAGE_SIZE) & ~fmt.mmio_mask & ~fmt.rsvd_mask & ~(fmt.rsvd_mask << RSVD_MASK_LEN)
    return (low | high) >> PAGE_SHIFT


def is_current(fmt: SpteFormat, spte: int, generation: int) -> bool:
    """Was this MMIO SPTE made under the present memslots?"""
    return mmio_generation(fmt, spte) == generation & generation_mask(fmt)


def check_mmio_spte(vm: Any, fmt: SpteFormat, spte: int, memslots: Memslots) -> bool:
    """May this MMIO SPTE be trusted: made under the present slots, and those not just changing?"""
    if memslots.update_in_progress:
        return False  # the SPTE does not say on which side of the change it was made
    generation, stamped = memslots.generation & generation_mask(fmt), mmio_generation(fmt, spte)
    vm.trace("check_mmio_spte", spte=spte, spte_gen=stamped, kvm_gen=generation, valid=stamped == generation)
    return stamped == generation


class MmioCache:
    """What one vCPU last found to be MMIO: the emulator and the next fault there ask nobody.

    `gva`: the guest's address, 0 where none is known (TDP, or an L2 guest); `gfn`: of the vCPU's address space then.
    Good as long as the generation of address space 0 is the one it was made under, whichever space it came from, as in
    KVM. Frame 0 and address 0 are never in it. Source: Linux 6.18, arch/x86/kvm/x86.h (vcpu_cache_mmio_info).
    """

    __slots__ = ("access", "generation", "gfn", "gva")

    def __init__(self) -> None:
        self.gva = self.gfn = self.access = 0
        self.generation = -1

    def cache(self, gva: int, gfn: int, access: int, generation: int) -> None:
        """Remember an MMIO access, but not while the slots change (ddfd1730)."""
        if not generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
            self.gva, self.gfn, self.access, self.generation = gva & -PAGE_SIZE, gfn, access, generation

    def match_gpa(self, gpa: int, generation: int) -> bool:
        """Is gpa known to be MMIO?"""
        return self.generation == generation and self.gfn != 0 and self.gfn == gpa >> PAGE_SHIFT

    def match_gva(self, gva: int, generation: int) -> bool:
        """The same for an address of a guest whose tables are shadowed."""
        return self.generation == generation and self.gva != 0 and self.gva == gva & -PAGE_SIZE

    def clear(self, gva: int | None = None) -> None:
        """The guest has flushed `gva`, or everything (None): what it names may be another page now. The gfn stays."""
        if gva is None or self.gva == gva & -PAGE_SIZE:
            self.gva = 0
