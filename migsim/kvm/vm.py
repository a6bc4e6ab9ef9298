"""Vm: one virtual machine, shaped like KVM's file descriptors. It owns every part and is the only way between them.

User space's half (the ioctls) is at the top; below it what the parts of KVM ask of the VM: slot lookup, marking a
page dirty, TLB flushes. A VM refuses what KVM refuses, in the same order, with OSError and KVM's errno.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EEXIST, EINVAL, EIO
from types import TracebackType
from typing import Any, Final

from migsim.kvm.bulk_log import BulkKernel
from migsim.kvm.caps import KVM_MAX_VCPU_IDS, KVM_MAX_VCPUS, Caps, reserved_entries
from migsim.kvm.config import VmConfig
from migsim.kvm.dirty_log import DirtyLog, LogKernel, UserBitmap, WordKernel
from migsim.kvm.dirty_ring import DirtyRing, DirtyRings
from migsim.kvm.guest_access import GuestAccess
from migsim.kvm.host_mm import HostMm
from migsim.kvm.log_invariants import log_violations
from migsim.kvm.memory import Memory
from migsim.kvm.memory_region import MemoryRegions, Region
from migsim.kvm.memslot import Memslot, Memslots
from migsim.kvm.mmu import Mmu
from migsim.kvm.mmu_lock import MmuLock
from migsim.kvm.stats import Stats
from migsim.kvm.uapi import DIRTY_GFN, kvm_error
from migsim.kvm.user_memory import UserMemory
from migsim.kvm.vcpu import Vcpu
from migsim.sim.meter import Meter, NullMeter

Observer = Callable[[Memslot, int, int], None]
TraceSink = Callable[[str, dict[str, Any]], None]
_DEFAULT_CONFIG: Final = VmConfig()


def _no_signal() -> bool:
    """The empty form of `Vm.signal_pending`."""
    return False


class Vm:
    """A virtual machine. A context manager; `close` checks that nothing leaks.

    Seams, all empty by default: `observer(slot, first_page, n_pages)` is called before anybody looks at those pages
    (lazy writers deliver); `race_hook(point)` is called where the kernel lets others run, so that a test can put
    stores there; `signal_pending()` interrupts long ioctls; `store_hook(vcpu, slot, gfn)` sees every store a guest
    completes; `trace_sink(name, fields)`; `meter`.
    `bulk`: large slots that begin on a 2 MiB boundary have their log handled chunk by chunk (bulk_log.py).
    """

    def __init__(self, config: VmConfig = _DEFAULT_CONFIG, *, bulk: bool = True, meter: Meter | None = None) -> None:
        self.config = config
        self.meter: Meter = meter or NullMeter()
        self.observer: Observer | None = None
        self.race_hook: Callable[[str], None] | None = None
        self.signal_pending: Callable[[], bool] = _no_signal
        self.trace_sink: TraceSink | None = None
        self.store_hook: Callable[[Vcpu, Memslot | None, int], None] | None = None
        self.stats = Stats()
        self.host = HostMm()
        self.memory = Memory()
        self.user = UserMemory(self)
        self.manual_dirty_log_protect = 0
        self.dirty_ring_size = 0  # bytes a vCPU
        self.quirk_slot_zap_all = config.quirk_slot_zap_all
        self.vcpus: list[Vcpu] = []
        self.warnings: list[str] = []  # what the kernel would WARN about
        self.dead = False
        self._memslots = tuple(Memslots(as_id) for as_id in range(config.nr_as_ids))
        self.translating: dict[Vcpu, None] = {}  # vCPUs that hold translations: of 416 few do in a bulk run
        self.pml_holders: dict[Vcpu, None] = {}  # vCPUs whose PML buffer is not empty
        self._running: list[Vcpu] = []
        self._races = 0
        self._closed = False
        self._bulk = bulk
        self.mmu = Mmu(self)
        self.regions = MemoryRegions(self)
        self.caps = Caps(self)
        self.dirty_log = DirtyLog(self)
        self.dirty_rings = DirtyRings(self)
        self.access = GuestAccess(self)
        self.word_kernel = WordKernel(self)
        self.bulk_kernel = BulkKernel(self)

    # -- ioctls ------------------------------------------------------------------------------------------------------

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where there is no such capability."""
        self.check_alive()
        return self.caps.check_extension(cap)

    def enable_cap(self, cap: int, flags: int = 0, args: Sequence[int] = (0, 0, 0, 0)) -> int:
        """KVM_ENABLE_CAP. Raises OSError EINVAL, E2BIG."""
        self.check_alive()
        return self.caps.enable(cap, flags, args)

    def create_vcpu(self, id: int) -> Vcpu:
        """KVM_CREATE_VCPU. Raises OSError: EINVAL an id or a number past the maximum, EEXIST an id in use."""
        self.check_alive()
        if not 0 <= id < KVM_MAX_VCPU_IDS or len(self.vcpus) >= KVM_MAX_VCPUS:
            raise kvm_error(EINVAL, f"vCPU id {id}")
        if any(vcpu.id == id for vcpu in self.vcpus):
            raise kvm_error(EEXIST, f"vCPU id {id}")
        ring = None
        if self.dirty_ring_size:
            ring = DirtyRing(self.dirty_ring_size // DIRTY_GFN.itemsize, reserved_entries(self.pml_enabled))
        vcpu = Vcpu(self, id, ring)
        vcpu.update_cpu_dirty_logging()
        self.vcpus.append(vcpu)
        return vcpu

    def set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION; `slot` is as_id << 16 | id, sizes and addresses in bytes. See MemoryRegions."""
        self.check_alive()
        self.regions.set(Region(slot, flags, guest_phys_addr, memory_size, userspace_addr))

    def get_dirty_log(self, slot: int, dirty_bitmap: UserBitmap) -> None:
        """KVM_GET_DIRTY_LOG into uint64[ceil(npages / 64)]; None or read-only: a bad pointer. See DirtyLog."""
        self.check_alive()
        self.dirty_log.get(slot, dirty_bitmap)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, dirty_bitmap: UserBitmap) -> None:
        """KVM_CLEAR_DIRTY_LOG of the pages set in `dirty_bitmap` (bit 0 = `first_page`). See DirtyLog."""
        self.check_alive()
        self.dirty_log.clear(slot, first_page, num_pages, dirty_bitmap)

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: entries taken back. Raises OSError EINVAL without rings."""
        self.check_alive()
        if not self.dirty_ring_size:
            raise kvm_error(EINVAL, "the dirty ring is not enabled")
        return self.dirty_rings.reset()

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES: the shadow MMU keeps at most so many pages. Raises OSError EINVAL below 64."""
        self.check_alive()
        self.mmu.shadow.limit.set_nr_mmu_pages(pages)

    def stats_read(self) -> dict[str, int]:
        """The VM's statistics under KVM's names."""
        return self.stats.read()

    def check_alive(self) -> None:
        """EIO once KVM has given the VM up; a closed one has no file descriptor left (EBADF)."""
        if self._closed:
            raise OSError(9, os.strerror(9))
        if self.dead:
            raise kvm_error(EIO, "the VM is dead")

    # -- the VMM's own memory (see UserMemory) -----------------------------------------------------------------------

    def alloc_memory(self, size: int, level: int = 1) -> int:
        """Address of `size` bytes of fresh zeroed memory, backed by host pages of `level` (1 = 4K, 2 = 2M, 3 = 1G)."""
        return self.user.alloc(size, level)

    def host_write(self, hva: int, data: bytes) -> None:
        """A store by the VMM itself: KVM does not log it."""
        self.user.write(hva, data)

    def host_read(self, hva: int, n_bytes: int) -> bytes:
        """A load by the VMM itself."""
        return self.user.read(hva, n_bytes)

    def host_discard(self, hva: int, n_bytes: int) -> None:
        """madvise(MADV_DONTNEED) over whole pages: zero afterwards, unmapped by KVM's MMU notifier."""
        self.user.discard(hva, n_bytes)

    def host_protect(self, hva: int, n_bytes: int, *, writable: bool) -> None:
        """mprotect over whole pages, read-only or back to read-write."""
        self.user.protect(hva, n_bytes, writable=writable)

    # -- what the parts ask ------------------------------------------------------------------------------------------

    @property
    def pml_enabled(self) -> bool:
        """Does KVM use PML for this VM at all (cpu_dirty_log_size != 0)?"""
        return self.config.pml_enabled

    @property
    def use_dirty_bitmap(self) -> bool:
        """kvm_use_dirty_bitmap: x86 has no rings with a bitmap beside them."""
        return not self.dirty_ring_size

    @property
    def mmu_lock(self) -> MmuLock:
        """The MMU's lock."""
        return self.mmu.lock

    def memslots(self, as_id: int) -> Memslots:
        """One address space's slots."""
        return self._memslots[as_id]

    def gfn_to_slot(self, as_id: int, gfn: int) -> Memslot | None:
        """The slot at `gfn`, also while it is invalid."""
        return self._memslots[as_id].gfn_to_slot(gfn)

    def mark_page_dirty_in_slot(self, slot: Memslot | None, gfn: int, vcpu: Vcpu | None = None) -> None:
        """The one place where a page gets dirty: a ring entry of the running vCPU, or a bit of the slot's log.

        With rings and no vCPU running the write is lost and KVM warns: x86 has no such writers.
        """
        vcpu = vcpu or self.running_vcpu
        if vcpu is None and self.dirty_ring_size:
            self.warnings.append(f"gfn {gfn:#x} written with no running vCPU")
        if slot is None or not slot.logging:
            return
        offset = gfn - slot.base_gfn
        if vcpu is not None and vcpu.dirty_ring is not None:
            self.push_to_ring(vcpu, slot, offset)
        elif slot.dirty_bitmap is not None:
            slot.dirty_bitmap.set(offset)

    def push_to_ring(self, vcpu: Vcpu, slot: Memslot, offset: int) -> None:
        """One entry for `vcpu`; the same page again is a second entry."""
        ring = vcpu.dirty_ring
        assert ring is not None, vcpu.id
        if ring.used >= ring.size:  # user space has corrupted the index
            self.warnings.append(f"dirty ring of vCPU {vcpu.id} is full")
        ring.push(slot.key, offset)
        self.trace("kvm_dirty_ring_push", index=vcpu.id, dirty_index=ring.dirty_index, reset_index=ring.reset_index,
                   slot=slot.key, offset=offset)  # fmt: skip

    def flush_remote_tlbs(self) -> None:
        """Every vCPU forgets every translation before it enters the guest again."""
        self.stats.remote_tlb_flush_requests += 1
        self.stats.remote_tlb_flush += bool(self.vcpus)
        self.meter.count("remote_tlb_flush")
        self.stats.tlb_flush += len(self.vcpus)
        for vcpu in self.translating:
            vcpu.tlb.flush()
        self.translating.clear()

    def flush_remote_tlbs_memslot(self, slot: Memslot) -> None:
        """x86 has no ranged flush outside Hyper-V: everything goes."""
        self.flush_remote_tlbs()

    def flush_gfn_range(self, root: object, gfn: int, n: int) -> None:
        """The same for `n` frames from `gfn` on in one root."""
        self.flush_remote_tlbs()

    def observe(self, slot: Memslot, first_page: int, n_pages: int) -> None:
        """Somebody is about to look at these pages: lazy writers deliver first."""
        if self.observer is not None and n_pages:
            self.observer(slot, first_page, n_pages)

    def kick_for_dirty_log(self) -> None:
        """kvm_arch_sync_dirty_log: with PML every vCPU must exit, which drains its buffer."""
        if self.pml_enabled:
            for vcpu in list(self.pml_holders):
                vcpu.kick()

    def log_kernel(self, slot: Memslot) -> LogKernel:
        """The loops over a slot's log: chunk by chunk where the slot allows, else one word after the other."""
        return self.bulk_kernel if self._bulk and self.bulk_kernel.suits(slot) else self.word_kernel

    def trace(self, name: str, **fields: Any) -> None:
        """A tracepoint of KVM; nothing unless a sink is set."""
        if self.trace_sink is not None:
            self.trace_sink(name, fields)

    def stored(self, vcpu: Vcpu, gfn: int) -> None:
        """A guest store has reached memory."""
        if self.store_hook is not None:
            self.store_hook(vcpu, self.gfn_to_slot(vcpu.as_id, gfn), gfn)

    @property
    def running_vcpu(self) -> Vcpu | None:
        """kvm_get_running_vcpu: the vCPU whose KVM_RUN is going on, the innermost if a test interleaves."""
        return self._running[-1] if self._running else None

    @property
    def interleaved(self) -> bool:
        """Does a vCPU run inside a step of somebody else, so that waiting for them could never end?"""
        return self._races > 0

    def race(self, point: str) -> None:
        """Others may run here, in the middle of what is going on."""
        if self.race_hook is None or self._races:
            return
        self._races += 1
        try:
            self.race_hook(point)
        finally:
            self._races -= 1

    @contextmanager
    def running(self, vcpu: Vcpu) -> Iterator[None]:
        """KVM_RUN of `vcpu` goes on inside."""
        self.check_alive()
        self._running.append(vcpu)
        try:
            yield
        finally:
            self._running.pop()

    # -- the end -----------------------------------------------------------------------------------------------------

    def invariants(self) -> list[str]:
        """Everything that must hold between two calls (kvm's and the log's); one sentence for each violation."""
        return [*self.mmu.invariants(), *log_violations(self)]

    def close(self) -> None:
        """Destroy the VM. Idempotent. Raises AssertionError if a page table or a reference is left over."""
        if self._closed:
            return
        self._closed = True
        for vcpu in self.vcpus:
            vcpu.destroy()
        leaks = self.mmu.pre_destroy()
        assert not leaks, "; ".join(leaks)

    def __enter__(self) -> Vm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            self.close()
        else:  # do not hide what went wrong behind a leak it caused
            self._closed = True
