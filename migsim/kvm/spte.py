"""SPTE bits: every mask and shift of a shadow page-table entry, in both hardware formats and both vintages.

Nobody else in migsim writes a mask or a shift of an SPTE. The rules of a present leaf (Linux arch/x86/kvm/mmu/spte.h):
  1. W needs MMU-writable, MMU-writable needs Host-writable.
  2. Host-writable is fixed for the life of a present SPTE.
  3. Clearing MMU-writable needs a TLB flush before mmu_lock is dropped; clearing only W may flush later.
Bit positions: Linux 6.13 and 5.10, arch/x86/kvm/mmu/spte.{h,c}. Making SPTEs is in make_spte.py.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final

from migsim.units import LEVEL_BITS, PAGE_SHIFT, pages_per_level

ENTRIES: Final = 512
PG_LEVEL_4K: Final = 1
PG_LEVEL_2M: Final = 2
PG_LEVEL_1G: Final = 3
MAX_HUGEPAGE_LEVEL: Final = PG_LEVEL_1G
MAX_LEVEL: Final = 5

ACC_EXEC: Final = 1
ACC_WRITE: Final = 2
ACC_USER: Final = 4
ACC_ALL: Final = ACC_EXEC | ACC_WRITE | ACC_USER

U64: Final = (1 << 64) - 1
PFN_MASK: Final = ((1 << 52) - 1) & ~((1 << PAGE_SHIFT) - 1)
PAGE_SIZE_BIT: Final = 1 << 7
AD_TYPE_SHIFT: Final = 52
AD_TYPE_MASK: Final = 3 << AD_TYPE_SHIFT
ACC_TRACK_SAVED_SHIFT: Final = 54
ACC_TRACK_SAVED_MASK: Final = 0x5 << ACC_TRACK_SAVED_SHIFT  # R and X; W is re-derived from MMU-writable
SUPPRESS_VE: Final = 1 << 63
EPT_WB_IPAT: Final = 6 << 3 | 1 << 6  # write-back, ignore guest PAT: no device assigned without snooping
FROZEN_PATTERN: Final = 0x5A0
MMIO_RESERVED_BIT: Final = 1 << 51
RSVD_MASK_LEN: Final = 5  # SHADOW_NONPRESENT_OR_RSVD_MASK_LEN


class AdType(enum.IntEnum):
    """The A/D type field, bits 52-53: how writes and accesses through this SPTE are found out."""

    ENABLED = 0
    DISABLED = 1
    WRPROT_ONLY = 2  # hardware D exists but must not be used for logging (nested guest while PML is on)


@dataclass(frozen=True, slots=True)
class SpteFormat:
    """Where the bits are, and the rules that differ between EPT and legacy/NPT, 5.10 and today.

    All masks are 64-bit ints. `nonpresent` is the value of an empty entry (bit 63 alone since Linux 6.10).
    `software_ad`: A and D are kept in software even when the CPU ignores them (Linux 6.13).
    """

    name: str
    present: int
    writable: int
    user: int
    exec: int  # set to allow execution (EPT), 0 if the format has NX instead
    nx: int
    accessed: int
    dirty: int
    memtype: int
    host_writable: int
    mmu_writable: int
    mmu_present: int  # bit 11 since Linux 5.13; 0: presence is "not zero and not MMIO"
    acc_track: int  # bits taken from an access-tracked SPTE; 0 where A/D bits always exist (NPT)
    nonpresent: int
    mmio_value: int
    mmio_mask: int
    mmio_access: int
    software_ad: bool
    rsvd_mask: int = 0  # high address bits set in every MMIO SPTE against L1TF (shadow_nonpresent_or_rsvd_mask)

    @property
    def frozen(self) -> int:
        """The value of an entry whose table is being torn down (REMOVED until Linux 6.11)."""
        return FROZEN_PATTERN | self.nonpresent

    # -- predicates --------------------------------------------------------------------------------------------------

    def is_mmio(self, spte: int) -> bool:
        """An MMIO SPTE: faults on purpose, its access is emulated."""
        return self.mmio_value != 0 and spte & self.mmio_mask == self.mmio_value

    def is_present(self, spte: int) -> bool:
        """Shadow-present: installed by the MMU as a translation or a table, even if access-tracked."""
        if self.mmu_present:
            return bool(spte & self.mmu_present)
        return spte not in (0, self.frozen) and not self.is_mmio(spte)

    def is_leaf(self, spte: int, level: int) -> bool:
        """Does a present SPTE at `level` map a page (KVM: is_last_spte)?"""
        return level == PG_LEVEL_4K or bool(spte & PAGE_SIZE_BIT)

    def is_frozen(self, spte: int) -> bool:
        """Is the entry's table being removed?"""
        return spte == self.frozen

    def is_writable(self, spte: int) -> bool:
        """The W bit."""
        return bool(spte & self.writable)

    def is_mmu_writable(self, spte: int) -> bool:
        """May W be set without mmu_lock?"""
        return bool(spte & self.mmu_writable)

    def is_host_writable(self, spte: int) -> bool:
        """Was the host's page writable when this was mapped?"""
        return bool(spte & self.host_writable)

    def is_executable(self, spte: int) -> bool:
        """May instructions be fetched through a present leaf?"""
        return bool(spte & self.exec) if self.exec else not spte & self.nx

    def ad_type(self, spte: int) -> AdType:
        """The A/D type of a present SPTE."""
        return AdType((spte & AD_TYPE_MASK) >> AD_TYPE_SHIFT)

    def ad_enabled(self, spte: int) -> bool:
        """Do A/D bits of this SPTE exist in hardware (WRPROT_ONLY counts as yes, as in KVM)?"""
        return self.ad_type(spte) != AdType.DISABLED

    def ad_need_write_protect(self, spte: int) -> bool:
        """Must writes through this SPTE be logged by taking W away?"""
        return self.ad_type(spte) != AdType.ENABLED

    def is_access_tracked(self, spte: int) -> bool:
        """R and X are taken away and saved: the next access faults, quickly."""
        return self.acc_track != 0 and not self.ad_enabled(spte) and not spte & self.acc_track

    def is_accessed(self, spte: int) -> bool:
        """Young? By the A bit, or (before 6.13, A/D off) by not being access-tracked."""
        if self.software_ad or self.ad_enabled(spte):
            return bool(spte & self.accessed)
        return not self.is_access_tracked(spte)

    def is_dirty(self, spte: int) -> bool:
        """D, or W where there is no D."""
        if self.software_ad or self.ad_enabled(spte):
            return bool(spte & self.dirty)
        return bool(spte & self.writable)

    def is_volatile(self, spte: int, level: int, *, by_accessed: bool = False) -> bool:
        """Can the CPU or the fast path change this SPTE at any time, so that it must be exchanged atomically?

        `by_accessed`: an A bit that the CPU may set counts, too (until Linux 6.12: since then losing it is tolerated).
        """
        if not self.is_present(spte) or not self.is_leaf(spte, level):
            return False
        if self.is_mmu_writable(spte) and not self.is_writable(spte):
            return True
        if not self.ad_enabled(spte):
            return True
        clean = self.is_writable(spte) and not spte & self.dirty
        return clean or (by_accessed and not spte & self.accessed)

    def allows(self, spte: int, *, write: bool, exec: bool) -> bool:
        """Would the hardware let this access through a present leaf?"""
        if self.is_access_tracked(spte) or not spte & self.present & 1:
            return False
        if write:
            return self.is_writable(spte)
        return self.is_executable(spte) if exec else True

    # -- fields ------------------------------------------------------------------------------------------------------

    def pfn(self, spte: int) -> int:
        """Page frame of a present SPTE: the data page of a leaf, the table page of a non-leaf."""
        return (spte & PFN_MASK) >> PAGE_SHIFT

    def validate_leaf(self, spte: int, gfn: int, level: int) -> None:
        """Raise AssertionError if a present leaf breaks the writability rules (check_spte_writable_invariants)."""
        where = f"SPTE {spte:#018x} gfn {gfn:#x} level {level}"
        assert level <= MAX_HUGEPAGE_LEVEL, f"{where}: a leaf above 1G"
        if self.is_mmu_writable(spte):
            assert self.is_host_writable(spte), f"{where}: MMU-writable without Host-writable"
        else:
            assert not self.is_writable(spte), f"{where}: writable but not MMU-writable"
        huge = pages_per_level(level)
        assert self.pfn(spte) % huge == 0 and gfn % huge == 0, f"{where}: not aligned to its level"


def _ept(name: str, *, vintage_5_10: bool, ad_bits: bool) -> SpteFormat:
    """EPT: R W X in bits 0-2, memory type in 3-6, A 8, D 9."""
    hardware_or_software_ad = ad_bits or not vintage_5_10
    suppress_ve = 0 if vintage_5_10 else SUPPRESS_VE
    return SpteFormat(
        name=name,
        present=1 | suppress_ve,
        writable=2,
        user=0,
        exec=4,
        nx=0,
        accessed=1 << 8 if hardware_or_software_ad else 0,
        dirty=1 << 9 if hardware_or_software_ad else 0,
        memtype=EPT_WB_IPAT,
        host_writable=1 << (10 if vintage_5_10 else 57),
        mmu_writable=1 << (11 if vintage_5_10 else 58),
        mmu_present=0 if vintage_5_10 else 1 << 11,
        acc_track=7,
        nonpresent=suppress_ve,
        mmio_value=0b110 | (AD_TYPE_MASK if vintage_5_10 else 0),
        mmio_mask=0b111 | (AD_TYPE_MASK if vintage_5_10 else SUPPRESS_VE),
        mmio_access=0,
        software_ad=not vintage_5_10,
    )


def _legacy(name: str, *, vintage_5_10: bool, mmio_caching: bool) -> SpteFormat:
    """The x86-64 page-table format, which AMD NPT and shadow paging use: P W U in bits 0-2, A 5, D 6, NX 63."""
    mmio = 1 | MMIO_RESERVED_BIT | (AD_TYPE_MASK if vintage_5_10 else 0)
    return SpteFormat(
        name=name,
        present=1,
        writable=2,
        user=4,
        exec=0,
        nx=1 << 63,
        accessed=1 << 5,
        dirty=1 << 6,
        memtype=0,
        host_writable=1 << (10 if vintage_5_10 else 9),
        mmu_writable=1 << (11 if vintage_5_10 else 10),
        mmu_present=0 if vintage_5_10 else 1 << 11,
        acc_track=0,
        nonpresent=0 if vintage_5_10 else SUPPRESS_VE,
        mmio_value=mmio if mmio_caching else 0,
        mmio_mask=mmio if mmio_caching else 0,
        mmio_access=ACC_WRITE | ACC_USER,
        software_ad=not vintage_5_10,
    )


def l1tf_mask(cache_bits: int) -> int:
    """The top 5 of the address bits the L1 cache uses; a CPU that uses 47 or more is taken to be safe."""
    if cache_bits >= 52 - RSVD_MASK_LEN:
        return 0
    return (1 << cache_bits) - (1 << cache_bits - RSVD_MASK_LEN)


def spte_format(
    vendor: str, *, vintage_5_10: bool, ad_bits: bool = True, mmio_caching: bool = True, rsvd_mask: int = 0
) -> SpteFormat:
    """The format a VM uses, chosen once at its creation.

    vendor: "intel" (EPT) or "amd" (NPT). `ad_bits`: EPT A/D bits exist (NPT always has them). `mmio_caching`: for NPT
    only possible while bit 51 is reserved, that is MAXPHYADDR < 52; the caller decides. `rsvd_mask`: of l1tf_mask.
    """
    era = "5.10" if vintage_5_10 else "6.13"
    if vendor == "intel":
        found = _ept(f"ept-{era}", vintage_5_10=vintage_5_10, ad_bits=ad_bits)
    elif vendor == "amd":
        found = _legacy(f"legacy-{era}", vintage_5_10=vintage_5_10, mmio_caching=mmio_caching)
    else:
        raise ValueError(f"vendor {vendor!r} is neither intel nor amd")
    return replace(found, rsvd_mask=rsvd_mask)


EPT: Final = spte_format("intel", vintage_5_10=False)
NPT: Final = spte_format("amd", vintage_5_10=False)
EPT_5_10: Final = spte_format("intel", vintage_5_10=True)
NPT_5_10: Final = spte_format("amd", vintage_5_10=True)
FORMATS: Final = (EPT, NPT, EPT_5_10, NPT_5_10)


def spte_index(gfn: int, level: int) -> int:
    """Index 0..511 of `gfn` in its table at `level`."""
    return gfn >> LEVEL_BITS * (level - 1) & (ENTRIES - 1)


def gfn_round(gfn: int, level: int) -> int:
    """`gfn` rounded down to what one entry at `level` spans."""
    return gfn & -pages_per_level(level)


def _assert_apart(fmt: SpteFormat) -> None:
    """The static_asserts of spte.h: software bits collide with nothing the hardware or KVM reads."""
    software = (fmt.host_writable, fmt.mmu_writable, fmt.mmu_present, AD_TYPE_MASK, ACC_TRACK_SAVED_MASK)
    hardware = fmt.present | fmt.writable | fmt.user | fmt.exec | fmt.nx | fmt.accessed | fmt.dirty | fmt.memtype
    used = PFN_MASK | PAGE_SIZE_BIT | hardware
    for mask in software:
        assert not used & mask, f"{fmt.name}: software bits {mask:#x} overlap {used & mask:#x}"
        used |= mask
    assert not fmt.is_present(fmt.frozen) and not fmt.is_present(fmt.nonpresent), fmt.name
    assert not fmt.is_mmio(fmt.frozen) and not fmt.is_mmio(fmt.nonpresent), fmt.name
    assert fmt.frozen != fmt.nonpresent and not fmt.frozen & fmt.writable, fmt.name
    assert not fmt.mmio_value or not fmt.is_present(fmt.mmio_value), fmt.name


for _fmt in FORMATS:
    _assert_apart(_fmt)
assert int(AdType.ENABLED) == 0, "the common case must be zero"
