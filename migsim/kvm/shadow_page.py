"""One shadow page: a table KVM keeps for one of the guest's own tables, or for a part of one of its huge pages.

Source: Linux 6.18, arch/x86/kvm/mmu/mmu_internal.h (struct kvm_mmu_page).
"""

from __future__ import annotations

from typing import NamedTuple

from migsim.kvm.paging import Sptep
from migsim.kvm.spte import AdType


class PageKey(NamedTuple):
    """What a shadow page shadows, which is its role. `direct`: no guest table, a part of one guest huge page at `gfn`.

    `guest_mode`: the tables are L1's for an L2 guest. `ad_type`: how stores through its SPTEs are found.
    """

    as_id: int
    gfn: int
    level: int
    access: int
    direct: bool = False
    guest_mode: bool = True
    ad_type: AdType = AdType.ENABLED

    def child(self, gfn: int, access: int, *, direct: bool) -> PageKey:
        """The role of a page one level down (kvm_mmu_child_role)."""
        return self._replace(gfn=gfn, level=self.level - 1, access=access, direct=direct)


class ShadowPage:
    """512 entries, of which only those in use are kept, and the entries that point to the page.

    `gfns`, `accesses`: per leaf the L1 gfn and the rights the guest grants (shadowed_translation). `parents`: (table
    frame, entry). `write_flooding`: stores to the guest's table since the page was last used. `unsync`: the guest may
    write its table unseen, so that entries may be out of date. `unsync_children`: entries below which such a page may
    hang. `root_count`: vCPUs that hold it as their root. `nx_disallowed`: it is small only for the NX workaround.
    """

    def __init__(self, key: PageKey, pfn: int, nonpresent: int) -> None:
        self.key = key
        self.pfn = pfn
        self._nonpresent = nonpresent
        self.sptes: dict[int, int] = {}
        self.gfns: dict[int, int] = {}
        self.accesses: dict[int, int] = {}
        self.parents: dict[tuple[int, int], None] = {}
        self.write_flooding = 0
        self.unsync = False
        self.unsync_children: set[int] = set()
        self.root_count = 0
        self.invalid = False
        self.nx_disallowed = False

    @property
    def has_gptes(self) -> bool:
        """Does a table of the guest stand behind it (sp_has_gptes)?"""
        return not self.key.direct

    def read(self, at: Sptep) -> int:
        """The SPTE at an entry."""
        return self.sptes.get(at.entry, self._nonpresent)

    def write(self, at: Sptep, spte: int) -> int:
        """Exchange an entry; returns the old value."""
        old = self.read(at)
        if spte == self._nonpresent:
            self.sptes.pop(at.entry, None)
        else:
            self.sptes[at.entry] = spte
        return old

    def at(self, entry: int) -> Sptep:
        """Pointer to an entry."""
        return Sptep(self.pfn, entry)

    def __repr__(self) -> str:
        return f"ShadowPage({self.key}, unsync={self.unsync}, root_count={self.root_count}, invalid={self.invalid})"
