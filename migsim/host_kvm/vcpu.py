"""One virtual CPU of the real KVM, running flat 32-bit code that executes a list of loads and stores."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from typing import NamedTuple

from migsim.host_kvm import abi
from migsim.host_kvm.guest_code import OP_BYTES_MAX, Op, assemble
from migsim.host_kvm.mapping import Mapping
from migsim.host_kvm.ring import HostDirtyRing
from migsim.host_kvm.stats import read_stats
from migsim.kvm import uapi

CONTROL_BYTES = 256 << 10  # a vCPU's share of the control slot: code in the lower half, loaded values above
CODE_BYTES = CONTROL_BYTES // 2
OPS_PER_ENTRY = min((CODE_BYTES - 1) // OP_BYTES_MAX, (CONTROL_BYTES - CODE_BYTES) // 4)


class HostExit(NamedTuple):
    """Why KVM_RUN came back: KVM's exit reason, operations completed, values loaded (u32, in order)."""

    reason: int
    done: int
    data: tuple[int, ...]


class HostVcpu:
    """Created by :meth:`HostVm.create_vcpu`; owns ``fd``.  ``run`` may be called from any one thread at a time."""

    def __init__(self, fd: int, id: int, run_bytes: int, control: Mapping, control_gpa: int, ring_bytes: int) -> None:
        self.id = id
        self.fd = fd
        self._control, self._control_gpa = control, control_gpa
        self._control_offset = id * CONTROL_BYTES
        self._ring: HostDirtyRing | None = None
        self._run: Mapping | None = None
        self._mmio_pending = False
        try:
            self._run = Mapping(run_bytes, fd=fd)
            if ring_bytes:
                self._ring = HostDirtyRing(fd, ring_bytes)
            self._enter_flat_mode()
        except BaseException:
            self.close()
            raise

    @property
    def ring(self) -> HostDirtyRing:
        """The mapped dirty ring.  RuntimeError where the VM has none."""
        if self._ring is None:
            raise RuntimeError("this VM has no dirty ring: enable KVM_CAP_DIRTY_LOG_RING before the first vCPU")
        return self._ring

    def run(self, ops: Sequence[Op]) -> HostExit:
        """Execute ``ops`` in order, then HLT.

        Stops early on any other exit: EXIT_MMIO for an address outside every slot or a store to a READONLY one (that
        operation does not count as done), EXIT_DIRTY_RING_FULL at the soft limit.  An emulating KVM looks at the soft
        limit at guest entry only, so with a ring the list is entered in pieces that end where the limit does.
        Raises OSError with KVM_RUN's errno (EFAULT for memory KVM cannot reach), ValueError for addresses past 4 GiB.
        """
        done = 0
        data: list[int] = []
        while True:
            room = self._entry_room()
            exit = self._enter(ops[done : done + room])
            done += exit.done
            data.extend(exit.data)
            if exit.reason != uapi.KVM_EXIT_HLT or done >= len(ops):
                return HostExit(exit.reason, done, tuple(data))

    def _entry_room(self) -> int:
        if self._ring is None:
            return OPS_PER_ENTRY
        reserve = 64  # KVM_DIRTY_RING_RSVD_ENTRIES; with PML 512 more, then the kernel exits by itself
        return max(1, self._ring.size - reserve - self._ring.used())

    def _enter(self, ops: Sequence[Op]) -> HostExit:
        base = self._control_gpa + self._control_offset
        program = assemble(ops, base + CODE_BYTES)
        self._finish_mmio()
        self._control.write(self._control_offset, program.code)
        self._set_rip(base)
        reason = self._kvm_run()
        done = program.operations_before(self._rip() - base) if reason != uapi.KVM_EXIT_HLT else len(ops)
        if reason == uapi.KVM_EXIT_MMIO:
            self._mmio_pending = True
            done -= self._mmio_is_write()  # KVM has stepped over the store whose bytes it hands to user space
        loads = sum(1 for kind, _, _ in ops[:done] if kind == "r")
        raw = self._control.read(self._control_offset + CODE_BYTES, 4 * loads)
        return HostExit(reason, done, tuple(int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)))

    def _kvm_run(self) -> int:
        while True:
            try:
                fcntl.ioctl(self.fd, uapi.KVM_RUN, 0)
            except InterruptedError:
                continue  # a signal: Python has run its handler, which raises where it means to stop us
            raw = self._shared().read(abi.RUN_EXIT_REASON_OFFSET, abi.RUN_EXIT_REASON.size)
            return int(abi.RUN_EXIT_REASON.unpack(raw)[0])

    def _shared(self) -> Mapping:
        """struct kvm_run."""
        assert self._run is not None, "the vCPU is closed"
        return self._run

    def _mmio_is_write(self) -> int:
        raw = self._shared().read(abi.RUN_MMIO_OFFSET, abi.RUN_MMIO.size)
        return int(abi.RUN_MMIO.unpack(raw)[3])

    def _finish_mmio(self) -> None:
        """Let KVM complete the instruction it left for user space, without entering the guest."""
        if not self._mmio_pending:
            return
        self._shared().write(abi.RUN_IMMEDIATE_EXIT, b"\1")
        try:
            fcntl.ioctl(self.fd, uapi.KVM_RUN, 0)
        except InterruptedError:
            self._mmio_pending = False  # the answer asked for: completed, then stopped before entry
        finally:
            self._shared().write(abi.RUN_IMMEDIATE_EXIT, b"\0")

    def _rip(self) -> int:
        regs = bytearray(abi.REGS.size)
        fcntl.ioctl(self.fd, abi.KVM_GET_REGS, regs, True)
        return int(abi.REGS.unpack(regs)[abi.REG_RIP])

    def _set_rip(self, rip: int) -> None:
        fcntl.ioctl(self.fd, abi.KVM_SET_REGS, abi.REGS.pack(*[0] * abi.REG_RIP, rip, abi.RFLAGS_FIXED))

    def _enter_flat_mode(self) -> None:
        """Protected mode without paging, every segment 0..4 GiB."""
        sregs = bytearray(abi.SREGS_SIZE)
        fcntl.ioctl(self.fd, abi.KVM_GET_SREGS, sregs, True)
        for index, name in enumerate(abi.SREGS_SEGMENTS[:6]):
            selector, kind = (8, 11) if name == "cs" else (16, 3)  # code execute/read; data read/write; both accessed
            flat = (0, 0xFFFFFFFF, selector, kind, 1, 0, 1, 1, 0, 1, 0, 0, 0)
            abi.SEGMENT.pack_into(sregs, index * abi.SEGMENT.size, *flat)
        sregs[abi.SREGS_CR0_OFFSET] |= abi.CR0_PE
        fcntl.ioctl(self.fd, abi.KVM_SET_SREGS, bytes(sregs))

    def set_msr(self, index: int, value: int) -> None:
        """KVM_SET_MSRS of one register.  OSError EINVAL where KVM refuses it."""
        if fcntl.ioctl(self.fd, uapi.KVM_SET_MSRS, bytearray(abi.ONE_MSR.pack(1, index, value)), True) != 1:
            raise OSError(22, os.strerror(22))

    def stats_read(self) -> dict[str, int]:
        """This vCPU's statistics under KVM's names."""
        return read_stats(self.fd)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd < 0:
            return
        if self._ring is not None:
            self._ring.close()
        if self._run is not None:
            self._run.close()
            self._run = None
        os.close(fd)
