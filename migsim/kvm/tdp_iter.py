"""Pre-order walk of a paging structure over a gfn range (patch 2): down first, then side, then up.

Every step reads its entry anew, so the caller may change or zap the one it is at. Source: Linux 6.13,
arch/x86/kvm/mmu/tdp_iter.c.
"""

from __future__ import annotations

from collections.abc import Iterator

from migsim.kvm.mmu_state import MmuState
from migsim.kvm.paging import Sptep
from migsim.kvm.roots import Root
from migsim.kvm.spte import ENTRIES, PG_LEVEL_4K, gfn_round, spte_index
from migsim.units import pages_per_level


class TdpIter:
    """Where a walk stands: `at`, `level`, `gfn` (first gfn of the entry), `old_spte` as last read.

    `next_last_level_gfn` is where the walk resumes after a yield; `yielded` tells the next step to restart there
    and not to advance.
    """

    def __init__(self, root: Root, gfn: int, min_level: int = PG_LEVEL_4K) -> None:
        assert PG_LEVEL_4K <= min_level <= root.level, f"min_level {min_level} of a {root.level}-level root"
        self.root = root
        self.min_level = min_level
        self.next_last_level_gfn = gfn
        self.restart()

    def restart(self) -> None:
        """Back to the root entry that covers next_last_level_gfn."""
        self.yielded = False
        self.yielded_gfn = self.next_last_level_gfn
        self.level = self.root.level
        self.gfn = gfn_round(self.next_last_level_gfn, self.level)
        self._path = {self.level: self.root.root_pfn}
        self.valid = self.gfn < 1 << 9 * self.root.level
        self._read()

    def _read(self) -> None:
        self.at = Sptep(self._path[self.level], spte_index(self.gfn, self.level))
        self.old_spte = self.root.read(self.at)

    def next(self) -> None:
        """One step, or a restart after a yield; `valid` is False at the end of the structure."""
        if self.yielded:
            self.restart()
            return
        if self._step_down():
            return
        while not self._step_side():
            if not self._step_up():
                self.valid = False
                return

    def _step_down(self) -> bool:
        if self.level == self.min_level:
            return False
        self.old_spte = self.root.read(self.at)
        fmt = self.root.fmt
        if not fmt.is_present(self.old_spte) or fmt.is_leaf(self.old_spte, self.level):
            return False
        self.level -= 1
        self._path[self.level] = fmt.pfn(self.old_spte)
        self.gfn = gfn_round(self.next_last_level_gfn, self.level)
        self._read()
        return True

    def _step_side(self) -> bool:
        if self.at.entry == ENTRIES - 1:
            return False
        self.gfn += pages_per_level(self.level)
        self.next_last_level_gfn = self.gfn
        self._read()
        return True

    def _step_up(self) -> bool:
        if self.level == self.root.level:
            return False
        self.level += 1
        self.gfn = gfn_round(self.gfn, self.level)
        self._read()
        return True

    @property
    def is_leaf(self) -> bool:
        """Is the entry, as last read, a present leaf?"""
        fmt = self.root.fmt
        return fmt.is_present(self.old_spte) and fmt.is_leaf(self.old_spte, self.level)


def for_each_tdp_pte(root: Root, start: int, end: int, min_level: int = PG_LEVEL_4K) -> Iterator[TdpIter]:
    """The iterator at every entry that covers part of gfns [start, end), down to `min_level`."""
    it = TdpIter(root, start, min_level)
    while it.valid and it.gfn < end:
        yield it
        it.next()


def cond_resched(mmu: MmuState, it: TdpIter, *, flush: bool) -> bool:
    """Yield if somebody waits and at least one step was made since the last yield; True means `flush` has been done.

    The caller must `continue`: the entry it stands at may be gone.
    """
    if it.next_last_level_gfn == it.yielded_gfn or not mmu.sched.need_resched():
        return False
    if flush:
        mmu.vm.flush_remote_tlbs()
    let_others_run(mmu, it)
    return True


def let_others_run(mmu: MmuState, it: TdpIter) -> None:
    """Leave RCU and mmu_lock for a while; the walk restarts where it is and does not advance."""
    with mmu.rcu.dropped(), mmu.lock.dropped():
        mmu.sched.resched()
    it.yielded = True
