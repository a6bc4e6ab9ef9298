"""VmConfig: what the host's module parameters, CPU and machine type fix before the first ioctl of a VM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class VmConfig:
    """Fixed at creation, as module parameters and CPUID are.

    vendor: "intel" (EPT, may have PML) or "amd" (NPT, never PML in the kernels read).
    mmu: "tdp" (today's), "tdp-5.10" (as first merged, one exclusive lock) or "shadow" (the legacy MMU).
    tdp: two-dimensional paging in hardware (parameters ept, npt). ad_bits: EPT accessed and dirty bits (eptad).
    pml: page-modification logging (pml). eager_page_split, nx_huge_pages, mmio_caching: the parameters of that name.
    smm: two address spaces (id 1 is SMM's). maxphyaddr: physical address bits of the host; 46 is a Cascade Lake's.
    l1tf: the CPU has the L1TF bug (Skylake and before, never AMD; a Cascade Lake has not): what is not present must
    name no page that could be cached.
    quirk_slot_zap_all: KVM_X86_QUIRK_SLOT_ZAP_ALL, on by default (Linux 6.12): deleting a slot zaps the whole VM.
    dirty_ring: the dirty ring capabilities are offered.
    cap_sys_boot: the VMM's process has CAP_SYS_BOOT (in the host's own namespace), as root has.
    instruction_emulation: guest stores are carried out by KVM's instruction emulator instead of the CPU (real mode
    without unrestricted guest; what a kvm without vmx/svm does): every store is marked, nothing is mapped.
    """

    vendor: Literal["intel", "amd"] = "intel"
    mmu: Literal["shadow", "tdp-5.10", "tdp"] = "tdp"
    tdp: bool = True
    ad_bits: bool = True
    pml: bool = True
    eager_page_split: bool = True
    nx_huge_pages: bool = False
    smm: bool = True
    maxphyaddr: int = 46
    l1tf: bool = False
    quirk_slot_zap_all: bool = True
    mmio_caching: bool = True
    dirty_ring: bool = True
    cap_sys_boot: bool = True
    instruction_emulation: bool = False

    def __post_init__(self) -> None:
        if not 36 <= self.maxphyaddr <= 52:
            raise ValueError(f"maxphyaddr {self.maxphyaddr}: allowed are 36 to 52 bits")
        if self.l1tf and (self.vendor == "amd" or self.maxphyaddr > 46):
            raise ValueError(f"l1tf: no {self.vendor} CPU with {self.maxphyaddr} address bits has it")
        if self.mmu != "shadow" and not self.tdp:
            raise ValueError(f"mmu {self.mmu!r} needs tdp=True")

    @property
    def pml_enabled(self) -> bool:
        """Is PML used at all (KVM: cpu_dirty_log_size != 0)? It needs Intel, TDP and A/D bits."""
        return self.vendor == "intel" and self.tdp and self.ad_bits and self.pml

    @property
    def nr_as_ids(self) -> int:
        """Address spaces: 2 with SMM, else 1."""
        return 2 if self.smm else 1

    @property
    def max_gfn(self) -> int:
        """kvm_mmu_max_gfn: by the host's MAXPHYADDR with TDP, by 52 bits without."""
        return (1 << (self.maxphyaddr if self.tdp else 52) - 12) - 1
