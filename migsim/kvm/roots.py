"""Roots: one paging structure per role, shared by every vCPU in that role, refcounted, invalidated as a whole.

A role says what makes two structures different: depth, address space (SMM), nested guest or not, A/D use. 416 vCPUs
share one root; SMM has its own. Source: Linux 6.13, arch/x86/kvm/mmu/tdp_mmu.c (kvm_tdp_mmu_alloc_root and below).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from migsim.kvm.leaf_planes import SlotShape
from migsim.kvm.paging import PagingStructure
from migsim.kvm.spte import AdType, SpteFormat


@dataclass(frozen=True, slots=True)
class Role:
    """kvm_mmu_page_role of a root, as far as direct roots differ. `level`: 4 or 5."""

    level: int
    smm: bool = False
    guest_mode: bool = False
    ad_disabled: bool = False

    @property
    def as_id(self) -> int:
        """The address space this role translates."""
        return int(self.smm)

    def ad_type(self, pml: bool) -> AdType:
        """Bits 52-53 of its SPTEs. PML would log L2 addresses for a nested guest, which therefore gets WRPROT_ONLY."""
        if self.ad_disabled:
            return AdType.DISABLED
        return AdType.WRPROT_ONLY if self.guest_mode and pml else AdType.ENABLED


class Root(PagingStructure):
    """A paging structure that vCPUs can load. `root_count` starts at 2: the vCPU that asked, and the MMU itself."""

    def __init__(self, fmt: SpteFormat, role: Role, *, pml: bool) -> None:
        super().__init__(fmt, role.level, role.ad_type(pml))
        self.role = role
        self.root_count = 2
        self.invalid = False
        self.zap_scheduled = False

    @property
    def as_id(self) -> int:
        """Address space."""
        return self.role.as_id

    def __repr__(self) -> str:
        return f"Root({self.role}, refs={self.root_count}, invalid={self.invalid})"


class RootList:
    """The VM's roots (tdp_mmu_roots). The MMU's own reference keeps a root cached while no vCPU uses it."""

    def __init__(self) -> None:
        self._roots: list[Root] = []

    def __iter__(self) -> Iterator[Root]:
        return iter(tuple(self._roots))

    def __len__(self) -> int:
        return len(self._roots)

    def valid(self, as_id: int | None = None) -> Iterator[Root]:
        """Roots in use for faults, of one address space or of all."""
        return (root for root in self if not root.invalid and as_id in (None, root.as_id))

    def of(self, as_id: int) -> Iterator[Root]:
        """Every root of an address space, also the invalid ones (a TLB may still hold their translations)."""
        return (root for root in self if root.as_id == as_id)

    def find(self, role: Role) -> Root | None:
        """The valid root of `role` if there is one, with one more reference (kvm_tdp_mmu_get_root)."""
        for root in self.valid(role.as_id):
            if root.role == role:
                root.root_count += 1
                return root
        return None

    def get(self, fmt: SpteFormat, role: Role, slots: Iterable[SlotShape], *, pml: bool) -> Root:
        """The root of `role`, with one more reference; made if there is none (kvm_tdp_mmu_alloc_root)."""
        found = self.find(role)
        if found is not None:
            return found
        root = Root(fmt, role, pml=pml)
        for slot in slots:
            root.add_slot(slot)
        self._roots.append(root)
        return root

    def put(self, root: Root) -> None:
        """Drop one reference; the last frees the root page, which must be empty and invalid by then."""
        assert root.root_count > 0, f"{root!r}: reference dropped below zero"
        root.root_count -= 1
        if root.root_count:
            return
        assert root.invalid, f"{root!r}: the MMU's own reference went before the root was invalidated"
        assert sum(root.n_tables) == 1, f"{root!r}: freed with tables {root.count_tables()} still linked"
        root.free_table(root.root_pfn)
        self._roots.remove(root)

    def invalidate(self, roots: Iterable[Root]) -> list[Root]:
        """Mark roots invalid: no fault may install into them any more. They keep the MMU's reference until zapped."""
        hit = [root for root in roots if not root.invalid]
        for root in hit:
            root.invalid = True
            root.zap_scheduled = True
        return hit

    def next_scheduled(self) -> Root | None:
        """An invalid root that nobody has zapped yet."""
        return next((root for root in self if root.zap_scheduled), None)
