"""A vCPU: executes guest loads and stores the way a CPU under KVM does, and exits where it would.

One access: 1 the TLB answers, or 2 the page tables are walked: A and D are set by the CPU, and a D that goes from 0 to
1 is written into the PML buffer; 3 otherwise the CPU exits, KVM drains the buffer and handles the fault; 4 KVM looks at
what was asked of this vCPU and enters the guest again. A hit in 1 is silent: this is what flushes are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from migsim.kvm.dirty_ring import DirtyRing, RingView
from migsim.kvm.emulator import Emulator
from migsim.kvm.exits import Exit, GuestLivelock, Op, StopRun, check_ops
from migsim.kvm.mmio import MmioCache
from migsim.kvm.mmu_lock import WouldBlock
from migsim.kvm.pml import PmlBuffer
from migsim.kvm.pre_fault import PreFaultRange, pre_fault_memory
from migsim.kvm.pvclock import PvClock
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.tlb import Tlb, Translation
from migsim.kvm.uapi import (
    KVM_EXIT_DIRTY_RING_FULL,
    KVM_EXIT_HLT,
    KVM_EXIT_INTR,
    KVM_EXIT_SHUTDOWN,
)
from migsim.units import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from migsim.kvm.nested import NestedGuest
    from migsim.kvm.roots import Root
    from migsim.kvm.vm import Vm

FAULTS_MAX: Final = 100  # of one access, one after the other: what is more is a livelock (KVM itself would never end)
_U32: Final = (1 << 32) - 1


class Vcpu:
    """Made by Vm.create_vcpu. `smm` selects address space 1; `guest_mode`: an L2 guest runs."""

    def __init__(self, vm: Vm, id: int, ring: DirtyRing | None) -> None:
        self.vm = vm
        self.id = id
        self.smm = False
        self.guest_mode = False
        self.l2: NestedGuest | None = None
        self.root: Root | None = None
        self._root_mode = (False, False)
        self.tlb = Tlb()
        self.mmio = MmioCache()
        self.pml = PmlBuffer(newest_first=vm.config.mmu == "tdp-5.10")
        self.dirty_ring = ring
        self._ring_view = RingView(ring.entries) if ring is not None else None
        self.emulator = Emulator(vm, self)
        self._pml_update_deferred = False
        self._flushes_before = vm.stats.remote_tlb_flush_requests
        self.clock = PvClock(self)

    @property
    def as_id(self) -> int:
        """The address space this vCPU sees now."""
        return int(self.smm)

    @property
    def ring(self) -> RingView:
        """The mapped dirty ring. RuntimeError where the VM has none."""
        if self._ring_view is None:
            raise RuntimeError("this VM has no dirty ring: enable KVM_CAP_DIRTY_LOG_RING before the first vCPU")
        return self._ring_view

    # -- KVM_RUN -----------------------------------------------------------------------------------------------------

    def run(self, ops: Sequence[Op]) -> Exit:
        """Execute `ops` in order, then HLT.

        Stops early with KVM_EXIT_MMIO for an address outside every slot or a store to a READONLY one (that operation
        does not count as done), KVM_EXIT_DIRTY_RING_FULL at guest entry, KVM_EXIT_INTR where an interleaved vCPU would
        have to wait for the one inside, KVM_EXIT_SHUTDOWN for a fault of L2 that L1 would have to take. Raises OSError
        EFAULT for memory the host cannot reach, ValueError for an operation that crosses a page.
        """
        check_ops(ops)
        done, loaded = 0, []
        with self.vm.running(self):
            try:
                self.emulator.complete_userspace_io()
                self.enter_guest()
                for op in ops:
                    if self.vm.config.instruction_emulation:
                        self.check_ring_full()
                        value = self.emulator.emulate(op)
                    else:
                        value = self.execute(op)
                    done += 1
                    if value is not None:
                        loaded.append(value)
            except StopRun as stop:
                self.exit_guest()
                return Exit(stop.reason, done, tuple(loaded), stop.mmio)
            self.exit_guest()
            self.count("halt_exits")
        return Exit(KVM_EXIT_HLT, done, tuple(loaded))

    def enter_guest(self) -> None:
        """What KVM looks at before every guest entry: the ring first, then root and clock."""
        self.check_ring_full()
        self.load_root()
        self.clock.update()
        self.vm.trace("kvm_entry", vcpu_id=self.id)

    def check_ring_full(self) -> None:
        """kvm_dirty_ring_check_request."""
        if self.dirty_ring is not None and self.dirty_ring.check_request():
            self.vm.trace("kvm_dirty_ring_exit", vcpu_id=self.id)
            raise StopRun(KVM_EXIT_DIRTY_RING_FULL)

    def exit_guest(self) -> None:
        """Any VM exit: the PML buffer is drained before the exit is handled."""
        self.count("exits")
        self.flush_pml_buffer()

    def load_root(self) -> Root:
        """The root for the vCPU's present role; a root that was invalidated is left, and its translations with it."""
        mode = self.smm, self.guest_mode
        if self.root is None or self.root.invalid or mode != self._root_mode:
            with self.may_block():
                self.root, self._root_mode = self.vm.mmu.root_of(self), mode
            self.tlb.flush()
        return self.root

    @contextmanager
    def may_block(self) -> Iterator[None]:
        """Inside, KVM may have to wait for mmu_lock: a vCPU that a test interleaves leaves KVM_RUN instead."""
        try:
            yield
        except WouldBlock:
            if not self.vm.interleaved:
                raise
            raise StopRun(KVM_EXIT_INTR) from None

    # -- the CPU -----------------------------------------------------------------------------------------------------

    def execute(self, op: Op) -> int | None:
        """One operation on the CPU; the value if it loads."""
        kind, gpa, value = op
        found = self.translate(gpa, write=kind != "r")
        gfn, offset = gpa >> PAGE_SHIFT, gpa % PAGE_SIZE
        if found is None:
            return self.emulator.emulate((kind, self.l1_gpa(gpa), value))
        memory, pfn = self.vm.memory, found.pfn_of(gfn)
        if kind == "r":
            return memory.load(pfn, offset)
        memory.store(pfn, offset, value if kind == "w" else memory.load(pfn, offset) + value & _U32)
        self.vm.stored(self, found.l1_gfn_of(gfn))
        return None

    def translate(self, gpa: int, *, write: bool) -> Translation | None:
        """What an access goes through, faulting until there is one; None: KVM must emulate the instruction."""
        for _ in range(FAULTS_MAX):
            found = self.cpu_access(gpa, write)
            if found is not None:
                return found
            result = self.fault(gpa, write)
            if result in (RetPf.EMULATE, RetPf.WRITE_PROTECTED):
                return None
            self.enter_guest()
        if self.vm.interleaved:
            raise StopRun(KVM_EXIT_INTR)
        raise GuestLivelock(f"vCPU {self.id}: access to gpa {gpa:#x} (write={write}) faulted {FAULTS_MAX} times")

    def cpu_access(self, gpa: int, write: bool) -> Translation | None:
        """Steps 1 and 2: the translation used, or None: the access faults."""
        gfn, root = gpa >> PAGE_SHIFT, self.load_root()
        if self.l2 is not None:
            assert self.l2.as_id == self.as_id, f"vCPU {self.id}: SMM begins with leaving the tables it ran on"
            with self.may_block():
                self.l2.load(self)
        cached = self.tlb.lookup(self.l2 or root, gfn)
        if cached is not None and (not write or cached.silent_store):
            return cached
        return self.page_walk(root, gpa, write) if self.l2 is None else self.page_walk_l2(self.l2, gfn, write)

    def page_walk(self, root: Root, gpa: int, write: bool) -> Translation | None:
        """The CPU's walk: permission first, then A, then for a store D with its PML entry; then the TLB is filled."""
        gfn, fmt = gpa >> PAGE_SHIFT, self.vm.mmu.fmt
        spte, level = self.vm.mmu.walk(root, gfn)
        if not fmt.is_present(spte) or not fmt.allows(spte, write=write, exec=False):
            self.tlb.invalidate(root, gfn)
            return None
        has_ad = fmt.ad_enabled(spte)
        dirty = not has_ad or bool(spte & fmt.dirty)
        if has_ad and not spte & fmt.accessed:
            self.vm.mmu.set_accessed(self, root, gfn)
        if write and not dirty:
            if not self.log_to_pml(gpa):
                return self.cpu_access(gpa, write)
            self.vm.mmu.set_dirty_bit(self, root, gfn)
            dirty = True
        base = gfn & -(1 << 9 * (level - 1))
        found = Translation(base, level, fmt.pfn(spte), fmt.is_writable(spte), dirty)
        self.remember(root, found)
        return found

    def page_walk_l2(self, l2: NestedGuest, gfn: int, write: bool) -> Translation | None:
        """The walk of the shadow pages of L2. Stores are found by W there: D is of no use, nor is PML."""
        fmt = self.vm.mmu.fmt
        spte, level = l2.walk(gfn)
        if not fmt.is_present(spte) or not fmt.allows(spte, write=write, exec=False):
            self.tlb.invalidate(l2, gfn)
            return None
        base = gfn & -(1 << 9 * (level - 1))
        of_l1 = l2.mapped_gfn(base)
        assert of_l1 is not None, f"L2 gfn {gfn:#x}: SPTE {spte:#x} leads to no frame of L1"
        found = Translation(base, level, fmt.pfn(spte), fmt.is_writable(spte), dirty=True, of_l1=of_l1)
        self.remember(l2, found)
        return found

    def remember(self, tag: object, found: Translation) -> None:
        """Fill the TLB; from here on this vCPU is among those a flush must reach."""
        self.tlb.insert(tag, found)
        self.vm.translating[self] = None

    def l1_gpa(self, gpa: int) -> int:
        """Where an access that KVM emulates lies in L1's memory: L1's tables are walked anew for it."""
        walked = self.l2.walk_guest(gpa >> PAGE_SHIFT) if self.l2 is not None else None
        if walked is None:
            return gpa
        return (walked.pte.gfn << PAGE_SHIFT) + gpa % (1 << PAGE_SHIFT + 9 * (walked.level - 1))

    def log_to_pml(self, gpa: int) -> bool:
        """The CPU is about to set D: log the page. False: the buffer was full, so it exited and begins anew."""
        if not self.pml.enabled or self.pml_off_for_l2():
            return True
        if self.pml.full:
            self.vm.trace("kvm_pml_full", vcpu_id=self.id)
            self.exit_guest()
            self.enter_guest()
            return False
        self.pml.log(gpa)
        self.vm.pml_holders[self] = None
        return True

    def pml_off_for_l2(self) -> bool:
        """PML is off in hardware while L2 runs (c3bb9a20): the CPU would log L2's addresses."""
        return self.guest_mode

    # -- KVM's side of an exit ---------------------------------------------------------------------------------------

    def fault(self, gpa: int, write: bool) -> RetPf:
        """Step 3: exit, drain, handle. Raises OSError EFAULT if the host has no page there."""
        self.exit_guest()
        with self.may_block():
            if self.l2 is None:
                return self.vm.mmu.page_fault(self, gpa, write=write)
            result = self.l2.page_fault(self, gpa >> PAGE_SHIFT, write=write)
        if result == RetPf.INVALID:  # L1's tables forbid it: L1's fault, and there is no L1 code to take it
            raise StopRun(KVM_EXIT_SHUTDOWN)
        return result

    def flush_pml_buffer(self) -> None:
        """vmx_flush_pml_buffer: mark every logged page, oldest first, and empty the buffer. Not while L2 runs."""
        if self.guest_mode or not len(self.pml):
            return
        for gpa in self.pml.pending():
            gfn = gpa >> PAGE_SHIFT
            slot = self.vm.gfn_to_slot(self.as_id, gfn)
            if slot is not None:
                self.vm.mark_page_dirty_in_slot(slot, gfn, self)
        self.pml.reset()
        self.vm.pml_holders.pop(self, None)

    def kick(self) -> None:
        """An IPI: a vCPU inside the guest exits, and so drains its buffer."""
        self.flush_pml_buffer()

    def update_cpu_dirty_logging(self) -> None:
        """Switch PML to whether any slot logs; put off while L2 runs, whose controls these are not (3e013d0a)."""
        self._pml_update_deferred = self.guest_mode
        if not self.guest_mode:
            self.flush_pml_buffer()
            self.pml.enabled = self.vm.pml_enabled and self.vm.regions.nr_memslots_dirty_logging > 0

    def enter_guest_mode(self, l2: NestedGuest | None = None) -> None:
        """VMLAUNCH by L1: from now on `run` is L2's, with gpas as `l2`'s tables map them (None: L1 uses no EPT).

        The exit that brought us here has drained the buffer.
        """
        self.flush_pml_buffer()
        self.guest_mode, self.l2 = True, l2

    def set_paging(self, tables: NestedGuest | None) -> None:
        """CR0.PG and CR3 where there is no TDP: from now on addresses are virtual, of `tables`; None: paging off."""
        assert not self.vm.config.tdp, "with TDP the guest's own tables are nobody's business"
        self.l2 = tables
        self.mmio.clear()
        self.tlb.flush()

    def leave_guest_mode(self) -> None:
        """A nested VM exit: back to L1, whose dirty logging controls may have to be updated."""
        self.guest_mode, self.l2 = False, None
        if self._pml_update_deferred:
            self.update_cpu_dirty_logging()

    # -- other calls -------------------------------------------------------------------------------------------------

    def set_msr(self, index: int, value: int) -> None:
        """KVM_SET_MSRS of one register: kvm-clock's. Raises OSError EINVAL."""
        self.clock.set_msr(index, value)

    def pre_fault_memory(self, gpa: int, size: int, flags: int = 0) -> PreFaultRange:
        """KVM_PRE_FAULT_MEMORY of `size` bytes at gpa: what is still to do. OSError as pre_fault.pre_fault_memory."""
        return pre_fault_memory(self, gpa, size, flags)

    def destroy(self) -> None:
        """The vCPU goes with its VM."""
        self.tlb.flush()
        self.root = None

    # -- counters ----------------------------------------------------------------------------------------------------

    def count(self, name: str) -> None:
        """One more of a vCPU statistic."""
        self.vm.stats.count_vcpu(self.id, name)

    def stats_read(self) -> dict[str, int]:
        """This vCPU's statistics under KVM's names."""
        values = self.vm.stats.read_vcpu(self.id)
        values["tlb_flush"] += self.vm.stats.remote_tlb_flush_requests - self._flushes_before
        return values
