"""The guest's own page tables, as they lie in its memory: L1's for L2 (EPT12, NPT12), or CR3's where there is no TDP.

Entries are kept beside the page contents, by the gfn of the table and the index in it. Walking them is KVM's
software walk: rights add up, A and D are set where the format has them, which is a store to the table's page.
Source: Linux 6.18, arch/x86/kvm/mmu/paging_tmpl.h (FNAME(walk_addr_generic), FNAME(update_accessed_dirty_bits)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from migsim.kvm.mmu_state import MmuState
from migsim.kvm.shadow_page import PageKey
from migsim.kvm.spte import ACC_ALL, ACC_EXEC, ACC_WRITE, MAX_HUGEPAGE_LEVEL, PG_LEVEL_4K, AdType, spte_index
from migsim.units import PAGE_SHIFT

ROOT_LEVEL = 4


@dataclass(frozen=True, slots=True)
class GuestPte:
    """An entry of a table of the guest's: `gfn` of the page or of the next table, ACC_* rights, leaf or not, A, D."""

    gfn: int
    access: int = ACC_ALL
    leaf: bool = False
    dirty: bool = False
    accessed: bool = False


@dataclass(frozen=True, slots=True)
class GuestWalk:
    """Where the guest's tables lead an address: (table gfn, level) from the root down, and the leaf found.

    `accesses[i]`: rights granted above and by the entry in `tables[i]`; `access`: those of the page. `ptes`: as read.
    """

    tables: tuple[tuple[int, int], ...]
    ptes: tuple[GuestPte, ...]
    accesses: tuple[int, ...]
    level: int
    access: int

    @property
    def pte(self) -> GuestPte:
        """The leaf."""
        return self.ptes[-1]


class GuestTables:
    """Every table of every guest of one VM. `ad` in the methods: the tables have A and D bits, set by KVM's walk."""

    def __init__(self, mmu: MmuState) -> None:
        self._mmu = mmu
        self.entries: dict[int, dict[tuple[int, int], GuestPte]] = {0: {}, 1: {}}
        self._always_ad = mmu.vm.config.vendor == "amd" or not mmu.vm.config.tdp

    def has_ad(self, key: PageKey) -> bool:
        """Have the tables of that role A and D bits? x86's own format always has; EPT's are L1's choice."""
        return self._always_ad or key.ad_type != AdType.DISABLED

    def usable(self, key: PageKey, index: int) -> GuestPte | None:
        """The entry if KVM may make an SPTE of it unasked: present, and accessed where there is an A bit."""
        pte = self.entries[key.as_id].get((key.gfn, index))
        return None if pte is None or (self.has_ad(key) and not pte.accessed) else pte

    def rights(self, key: PageKey, pte: GuestPte) -> int:
        """What an SPTE may allow: no store until the guest's D is set, so that the first one is seen."""
        clean = self.has_ad(key) and not pte.dirty
        return key.access & pte.access & (~ACC_WRITE if clean else ACC_ALL)

    def read(self, as_id: int, root_gfn: int, gfn: int) -> GuestWalk | None:
        """The hardware's walk for the page `gfn` of the guest's address space; None: the guest maps nothing there."""
        table, access = root_gfn, ACC_ALL
        tables: list[tuple[int, int]] = []
        ptes: list[GuestPte] = []
        accesses: list[int] = []
        for level in range(ROOT_LEVEL, 0, -1):
            tables.append((table, level))
            pte = self.entries[as_id].get((table, spte_index(gfn, level)))
            if pte is None or self._mmu.vm.gfn_to_slot(as_id, table) is None:
                return None
            access &= pte.access
            ptes.append(pte)
            accesses.append(access)
            if pte.leaf or level == PG_LEVEL_4K:
                assert level <= MAX_HUGEPAGE_LEVEL, f"the guest maps gfn {gfn:#x} by a leaf at level {level}"
                return GuestWalk(tuple(tables), tuple(ptes), tuple(accesses), level, access)
            table = pte.gfn
        return None

    def walk(self, root: PageKey, gfn: int, *, write: bool, exec: bool) -> GuestWalk | None:
        """KVM's walk for a fault: A of every entry is set, D of the leaf for a store. None: a fault for the guest.

        A load through a leaf without D gets no right to store.
        """
        found = self.read(root.as_id, root.gfn, gfn)
        wanted = (ACC_WRITE if write else 0) | (ACC_EXEC if exec else 0)
        if found is None or wanted & ~found.access:
            return None
        if not self.has_ad(root):
            return found
        found = self._update_accessed_dirty_bits(root.as_id, found, gfn, write=write)
        return found if found.pte.dirty else replace(found, access=found.access & ~ACC_WRITE)

    def _update_accessed_dirty_bits(self, as_id: int, found: GuestWalk, gfn: int, *, write: bool) -> GuestWalk:
        """Each bit that was clear is a store by KVM to the page of its table, which is dirty from then on."""
        ptes = []
        for (table, level), pte in zip(found.tables, found.ptes, strict=True):
            index, new = spte_index(gfn, level), pte
            if not pte.accessed:
                self._mmu.vm.trace("kvm_mmu_set_accessed_bit", gpa=(table << PAGE_SHIFT) + index * 8)
                new = replace(new, accessed=True)
            if level == found.level and write and not pte.dirty:
                self._mmu.vm.trace("kvm_mmu_set_dirty_bit", gpa=(table << PAGE_SHIFT) + index * 8)
                new = replace(new, dirty=True)
            ptes.append(new)
            if new == pte:
                continue
            self.entries[as_id][table, index] = new
            slot = self._mmu.vm.gfn_to_slot(as_id, table)
            if slot is not None:
                self._mmu.vm.mark_page_dirty_in_slot(slot, table, None)
        return replace(found, ptes=tuple(ptes))
