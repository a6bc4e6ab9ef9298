"""The instruction emulator of one vCPU: accesses KVM carries out itself, and the MMIO exits where there is no memory.

It works through memslots and host page tables (guest_access.py), so no SPTE and no TLB entry can help or harm it; what
can is the address it remembers as MMIO. Facts: Linux 6.18 arch/x86/kvm/x86.c, x86.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from migsim.kvm.exits import Mmio, Op, StopRun
from migsim.kvm.uapi import KVM_EXIT_INTR, KVM_EXIT_MMIO
from migsim.units import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from migsim.kvm.vcpu import Vcpu
    from migsim.kvm.vm import Vm

_U32: Final = (1 << 32) - 1


class Emulator:
    """Carries out what the CPU could not. Every store is shown to the shadow MMU (kvm_page_track_write)."""

    def __init__(self, vm: Vm, vcpu: Vcpu) -> None:
        self._vm = vm
        self._vcpu = vcpu
        self._mmio_data = 0  # kvm_run's mmio.data
        self._unfinished_atomic: tuple[int, int] | None = None

    def match_mmio_gpa(self, gpa: int) -> bool:
        """Is gpa known to be MMIO? The emulator then asks no slot."""
        return self._vcpu.mmio.match_gpa(gpa, self._vm.memslots(0).generation)

    # -- the instruction emulator ------------------------------------------------------------------------------------

    def emulate(self, op: Op) -> int | None:
        """Carry out one operation in KVM; the value if it loads. No memory there: user space's MMIO."""
        kind, gpa, value = op
        if kind != "r" and self._vm.mmu.shadow.writes.would_block:
            raise StopRun(KVM_EXIT_INTR)
        self._vcpu.count("insn_emulation")
        if kind == "w":
            self.emulated_write(gpa, value)
            return None
        known = self.match_mmio_gpa(gpa)
        raw = None if known else self._vm.access.read_page(gpa >> PAGE_SHIFT, gpa % PAGE_SIZE, 4, self._vcpu)
        if raw is None:
            self._unfinished_atomic = (gpa, value) if kind == "a" else None
            raise self.mmio(Mmio(gpa, False, bytes(4)))
        found = int.from_bytes(raw, "little")
        if kind == "r":
            return found
        if self.compare_exchange(gpa, found, found + value & _U32) is None:
            self.emulated_write(gpa, found + value & _U32)
        return None

    def compare_exchange(self, gpa: int, old: int, new: int) -> bool | None:
        """The store of an atomic instruction; None: there is no memory that takes it."""
        done = self._vm.access.compare_exchange(gpa, old, new, self._vcpu)
        if done:
            self._vm.mmu.shadow.writes.track_write(gpa, 4)
            self._vm.stored(self._vcpu, gpa >> PAGE_SHIFT)
        return done

    def emulated_write(self, gpa: int, value: int) -> None:
        """A plain store of the emulator: logged like any other, on every store anew."""
        data = (value & _U32).to_bytes(4, "little")
        known = self.match_mmio_gpa(gpa)
        if known or not self._vm.access.write_page(gpa >> PAGE_SHIFT, gpa % PAGE_SIZE, data, self._vcpu):
            raise self.mmio(Mmio(gpa, True, data))
        self._vm.mmu.shadow.writes.track_write(gpa, len(data))
        self._vm.stored(self._vcpu, gpa >> PAGE_SHIFT)

    def complete_userspace_io(self) -> None:
        """The next KVM_RUN after an MMIO load finishes the instruction: of an atomic one, the store is still to come.

        What was loaded is what user space left in kvm_run, here the bytes of the last MMIO store.
        """
        if self._unfinished_atomic is None:
            return
        (gpa, addend), self._unfinished_atomic = self._unfinished_atomic, None
        loaded = self._mmio_data
        if self.compare_exchange(gpa, loaded, loaded + addend & _U32) is None:
            self._mmio_data = loaded + addend & _U32

    def mmio(self, what: Mmio) -> StopRun:
        """The exit to user space for an access with no memory behind it."""
        self._vcpu.count("mmio_exits")
        if what.is_write:
            self._mmio_data = int.from_bytes(what.data, "little")
        self._vm.trace("kvm_mmio", type="write" if what.is_write else "read", len=len(what.data), gpa=what.phys_addr,
                      val=int.from_bytes(what.data, "little"))  # fmt: skip
        return StopRun(KVM_EXIT_MMIO, what)
