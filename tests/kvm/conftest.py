"""A small guest for the MMU's tests: one slot, one vCPU or more, any MMU row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from migsim.kvm.config import VmConfig
from migsim.kvm.memslot import Memslot
from migsim.kvm.mmu import Mmu
from migsim.kvm.roots import Root
from migsim.kvm.vintage import Vintage
from migsim.kvm.vm import Vm

PAGE = 4096


class MmuGuest:
    """A VM with slot 1 of `pages` pages at gfn `base`, backed by host pages of `level` from their `offset` on."""

    def __init__(
        self,
        config: VmConfig | None = None,
        *,
        pages: int = 2048,
        base: int = 0,
        level: int = 2,
        vcpus: int = 1,
        vintage: Vintage | None = None,
        offset: int = 0,
    ) -> None:
        self.vm = Vm(config or VmConfig(smm=False), bulk=False)
        if vintage is not None:
            self.vm.mmu = Mmu(self.vm, vintage)
        self.base, self.pages = base, pages
        self.hva = self.vm.alloc_memory(-(-(pages + offset) // 512) * 512 * PAGE, level) + offset * PAGE
        self.flags = 0
        self.set_slot(0)
        self.vcpus = [self.vm.create_vcpu(i) for i in range(vcpus)]
        self.vcpu = self.vcpus[0]

    def set_slot(self, flags: int) -> None:
        self.flags = flags
        self.vm.set_user_memory_region(1, flags, self.base * PAGE, self.pages * PAGE, self.hva)

    def delete_slot(self) -> None:
        self.vm.set_user_memory_region(1, 0, self.base * PAGE, 0, self.hva)

    @property
    def mmu(self) -> Mmu:
        return self.vm.mmu

    @property
    def slot(self) -> Memslot:
        slot = self.vm.gfn_to_slot(0, self.base)
        assert slot is not None
        return slot

    @property
    def root(self) -> Root:
        return self.mmu.root_of(self.vcpu)

    def spte(self, gfn: int) -> tuple[int, int]:
        """(SPTE, level) in the first vCPU's root."""
        return self.root.lookup(gfn)

    def write(self, *gfns: int) -> None:
        self.vcpu.run([("w", gfn * PAGE, 1) for gfn in gfns])

    def read(self, *gfns: int) -> None:
        self.vcpu.run([("r", gfn * PAGE, 0) for gfn in gfns])

    def log(self, on: bool = True) -> None:
        self.set_slot(1 if on else 0)

    def get(self) -> set[int]:
        """KVM_GET_DIRTY_LOG as a set of gfns."""
        words = np.zeros(-(-self.pages // 64), dtype=np.uint64)
        self.vm.get_dirty_log(1, words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return {self.base + int(i) for i in np.flatnonzero(bits)}

    def clear(self, *gfns: int) -> None:
        """KVM_CLEAR_DIRTY_LOG of whole 64-page windows, with just these gfns set."""
        words = np.zeros(-(-self.pages // 64), dtype=np.uint64)
        for gfn in gfns:
            words[(gfn - self.base) >> 6] |= np.uint64(1 << ((gfn - self.base) & 63))
        self.vm.clear_dirty_log(1, 0, self.pages, words)

    def counts(self) -> tuple[int, int, int]:
        stats = self.vm.stats
        return stats.pages_4k, stats.pages_2m, stats.pages_1g

    def check(self) -> None:
        assert self.vm.invariants() == []

    def close(self) -> None:
        self.check()
        self.vm.close()


@pytest.fixture(scope="session")
def mmu_guest() -> Callable[..., MmuGuest]:
    """Makes guests; the caller closes them (which checks for leaks)."""
    return MmuGuest
