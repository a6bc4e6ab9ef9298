"""What every part of the MMU shares: the VM it serves, format, vintage, lock, roots, RCU, lists.

The parts are functions that receive this object, as KVM's receive `struct kvm`. `VmSeam` and `VcpuSeam` are all the
MMU needs of the VM above it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from migsim.kvm.config import VmConfig
from migsim.kvm.host_mm import HostMm
from migsim.kvm.memslot import Memslot, Memslots
from migsim.kvm.mmio import MmioCache
from migsim.kvm.mmu_lock import MmuLock, SpinLock
from migsim.kvm.roots import Role, Root, RootList
from migsim.kvm.spte import SpteFormat, l1tf_mask, spte_format
from migsim.kvm.stats import Stats
from migsim.kvm.vintage import SHADOW, VINTAGES, Vintage
from migsim.sim.meter import Meter

if TYPE_CHECKING:
    from migsim.kvm.shadow_page import ShadowPage

Owner = TypeVar("Owner")


class VcpuSeam(Protocol):
    """What the MMU asks of a vCPU. `smm`: it runs in system-management mode. `guest_mode`: it runs an L2 guest.

    `mmio`: what it last found to be MMIO.
    """

    id: int
    smm: bool
    guest_mode: bool
    mmio: MmioCache


class VmSeam(Protocol):
    """What the MMU asks of the VM."""

    stats: Stats
    host: HostMm
    warnings: list[str]  # what the kernel would WARN about

    @property
    def config(self) -> VmConfig: ...
    @property
    def meter(self) -> Meter: ...
    @property
    def pml_enabled(self) -> bool: ...
    @property
    def manual_dirty_log_protect(self) -> int: ...
    def memslots(self, as_id: int) -> Memslots: ...
    def gfn_to_slot(self, as_id: int, gfn: int) -> Memslot | None: ...
    def mark_page_dirty_in_slot(self, slot: Memslot, gfn: int, vcpu: Any = None) -> None: ...
    def flush_remote_tlbs(self) -> None: ...
    def flush_remote_tlbs_memslot(self, slot: Memslot) -> None: ...
    def flush_gfn_range(self, root: Root, gfn: int, n: int) -> None: ...
    def trace(self, name: str, **fields: Any) -> None: ...


class Sched:
    """The seam for yielding: nobody else wants the CPU or the lock. Tests override both methods."""

    def need_resched(self) -> bool:
        """Is the lock contended, or the time slice over?"""
        return False

    def resched(self) -> None:
        """The lock is free: others run now."""


class Rcu:
    """Read sections nest; what was deferred inside runs when the outermost ends."""

    def __init__(self) -> None:
        self.depth = 0
        self._deferred: list[Callable[[], None]] = []

    @property
    def pending(self) -> int:
        """Callbacks that wait for readers."""
        return len(self._deferred)

    def call(self, callback: Callable[[], None]) -> None:
        """Run `callback` once no reader can hold a pointer any more."""
        self._deferred.append(callback)
        if not self.depth:
            self._run()

    @contextmanager
    def read(self) -> Iterator[None]:
        """A read section."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self._run()

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """Leave every read section for a while, as a walker does when it yields."""
        depth, self.depth = self.depth, 0
        self._run()
        try:
            yield
        finally:
            self.depth = depth

    def _run(self) -> None:
        deferred, self._deferred = self._deferred, []
        for callback in deferred:
            callback()


class NxList(Generic[Owner]):
    """possible_nx_huge_pages: FIFO of tables kept small only because huge pages must not be executable.

    An entry is the structure a table belongs to (a root, or a shadow page is its own) and the table's frame.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[Owner, int], None] = {}

    def __len__(self) -> int:
        return len(self._tables)

    def __contains__(self, key: tuple[Owner, int]) -> bool:
        return key in self._tables

    def __iter__(self) -> Iterator[tuple[Owner, int]]:
        """(root, table frame), oldest first."""
        return iter(tuple(self._tables))

    def add(self, root: Owner, table_pfn: int) -> None:
        """Track one more table."""
        self._tables[root, table_pfn] = None

    def discard(self, root: Owner, table_pfn: int) -> bool:
        """Stop tracking; True if it was tracked."""
        return self._tables.pop((root, table_pfn), 0) is None


class InvalidateRange:
    """mmu_invalidate_*: how many notifiers run, over which gfns (their hull), and how many have finished.

    `active`: those that run over whatever memory, mapped by a slot or not (mn_active_invalidate_count).
    """

    def __init__(self) -> None:
        self.active = 0
        self.in_progress = 0
        self.seq = 0
        self.start = 0
        self.end = 0

    def begin(self, start: int, end: int) -> None:
        """A notifier over gfns [start, end) starts."""
        if self.in_progress:
            self.start, self.end = min(self.start, start), max(self.end, end)
        else:
            self.start, self.end = start, end
        self.in_progress += 1

    def finish(self) -> None:
        """It ends: the sequence moves before the count, so that a fault sees at least one of the two."""
        self.seq += 1
        self.in_progress -= 1
        assert self.in_progress >= 0, "an MMU notifier ended that never began"

    def covers(self, gfn: int) -> bool:
        """Is gfn being invalidated right now?"""
        return self.in_progress > 0 and self.start <= gfn < self.end

    def retry(self, seq: int, gfn: int) -> bool:
        """Must a fault that resolved its frame at `seq` start over?"""
        return self.covers(gfn) or self.seq != seq


def vintage_of(config: VmConfig) -> Vintage:
    """The row for a VM; without two-dimensional paging only the shadow MMU can serve it."""
    return VINTAGES[config.mmu] if config.tdp else SHADOW


class MmuState:
    """Shared by the TDP MMU, the shadow MMU and the fault handler of one VM; a snapshot taken at its creation."""

    def __init__(self, vm: VmSeam, vintage: Vintage | None = None) -> None:
        config = vm.config
        self.vm = vm
        self.vintage = vintage or vintage_of(config)
        self.mmio_caching = config.mmio_caching and (config.vendor == "intel" or config.maxphyaddr < 52)
        self.fmt: SpteFormat = spte_format(
            config.vendor,
            vintage_5_10=self.vintage.format_5_10,
            ad_bits=config.ad_bits,
            mmio_caching=self.mmio_caching,
            # the L1 cache of an affected CPU uses 44 bits or more (override_cache_bits)
            rsvd_mask=l1tf_mask(max(config.maxphyaddr, 44)) if config.l1tf else 0,
        )
        self.ad_enabled = config.vendor == "amd" or config.ad_bits
        self.level = 5 if config.maxphyaddr > 48 else 4
        self.nx_huge_pages = config.nx_huge_pages  # KVM_CAP_VM_DISABLE_NX_HUGE_PAGES may clear it
        self.lock = MmuLock(vm.meter, shared=self.vintage.shared_lock)
        self.roots = RootList()
        self.loaded: dict[int, Root] = {}  # vCPU id -> the root it holds a reference to
        self.rcu = Rcu()
        self.sched = Sched()
        self.tdp_mmu_pages_lock = SpinLock(lambda: vm.meter.count("tdp_mmu_pages_lock"))
        self.unsync_pages_lock = SpinLock(lambda: vm.meter.count("mmu_unsync_pages_lock"))
        self.nx: NxList[Root] = NxList()
        self.nx_shadow: NxList[ShadowPage] = NxList()  # those of shadowed guests (a list of their own since 6.18)
        self.invalidate = InvalidateRange()
        self.whole_slots = True  # operations on large ranges work on rows and planes at once (whole_slot.py)
        self.whole_slots_min_pages = 4096
        self.shadowed_leafs: Counter[int] = Counter()  # leaves of nested guests' shadow pages, by level
        self.write_tracked: dict[tuple[int, int], int] = {}  # (as_id, gfn) -> trackers
        self.indirect_shadow_pages = 0  # shadow pages with a guest's table behind them
        self.refuses_write: Callable[..., bool] = self.is_write_tracked  # unsync.py: what shadow pages have to say

    @property
    def at_once(self) -> bool:
        """May large operations skip the step for every SPTE (nobody wants a tracepoint for each, or page states)?"""
        watched = getattr(self.vm, "trace_sink", None) is not None or self.vm.host.page_state is not None
        return self.whole_slots and not watched

    @property
    def stats(self) -> Stats:
        """The VM's counters."""
        return self.vm.stats

    def role(self, vcpu: VcpuSeam) -> Role:
        """The role of the direct root a vCPU needs now."""
        return Role(self.level, smm=vcpu.smm, guest_mode=vcpu.guest_mode, ad_disabled=not self.ad_enabled)

    @property
    def stores_matter(self) -> bool:
        """Is there any gfn whose stores the MMU must see or protect: tracked, or a guest table that is shadowed?"""
        return bool(self.write_tracked) or self.indirect_shadow_pages > 0

    def is_write_tracked(self, slot: Memslot, gfn: int, **_: bool) -> bool:
        """Must stores to gfn reach the MMU (kvm_gfn_is_write_tracked)?"""
        return self.write_tracked.get((slot.as_id, gfn), 0) > 0

    def aging_lock(self) -> AbstractContextManager[bool]:
        """What aging holds: nothing but RCU today, mmu_lock for read before (exclusive where there is no other)."""
        return nullcontext(True) if self.vintage.lockless_aging else self.lock.read()

    def flush_gfn(self, root: Root, gfn: int, pages: int) -> None:
        """Forget translations of a range on every vCPU before going on."""
        self.vm.flush_gfn_range(root, gfn, pages)
