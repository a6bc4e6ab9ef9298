"""A script: a list of ioctls and guest runs that means the same on every backend, and what each step answered.

The errno tables, the differential tester and the seeded-bug scripts are all written in it, and it can be printed
as a Python file or as a C program (``print_script``).  Addresses of host memory are offsets into one arena that the
player allocates, so that an answer never depends on where the host put it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from migsim.units import PAGE_SIZE, words_of
from migsim.validate.door import Op, VcpuDoor
from migsim.validate.inside import Inside, Race, Raced, arm, perform

ARENA_BYTES = 16 << 20
RAW = 1 << 62
"""``Region.hva`` values from here on name the raw address ``hva - RAW`` and no arena offset."""


@dataclass(frozen=True)
class Extension:
    """KVM_CHECK_EXTENSION."""

    cap: int


@dataclass(frozen=True)
class Cap:
    """KVM_ENABLE_CAP."""

    cap: int
    flags: int = 0
    args: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class CreateVcpu:
    """KVM_CREATE_VCPU."""

    id: int


@dataclass(frozen=True)
class Region:
    """KVM_SET_USER_MEMORY_REGION; ``hva`` is an arena offset in bytes, or RAW + an address."""

    slot: int
    flags: int
    gpa: int
    size: int
    hva: int = 0


@dataclass(frozen=True)
class Get:
    """KVM_GET_DIRTY_LOG of ``pages`` pages; None: a bad pointer."""

    slot: int
    pages: int | None


@dataclass(frozen=True)
class Clear:
    """KVM_CLEAR_DIRTY_LOG; ``words`` is the mask, None a bad pointer."""

    slot: int
    first: int
    pages: int
    words: tuple[int, ...] | None


@dataclass(frozen=True)
class Reset:
    """KVM_RESET_DIRTY_RINGS."""


@dataclass(frozen=True)
class Run:
    """KVM_RUN of the ``vcpu``-th created vCPU over ``ops``."""

    vcpu: int
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Harvest:
    """User space marks this vCPU's dirty ring entries RESET, in order."""

    vcpu: int


@dataclass(frozen=True)
class HostWrite:
    """The VMM stores a u32 through its own mapping, which KVM does not log."""

    hva: int
    value: int


@dataclass(frozen=True)
class HostRead:
    """The VMM reads a u32."""

    hva: int


Ioctl = Extension | Cap | CreateVcpu | Region | Get | Clear | Reset | Run
Step = Ioctl | Harvest | HostWrite | HostRead | Inside | Race


@dataclass(frozen=True)
class Answer:
    """What a step gave: an errno's name, or None and a value (words, counts, an exit), in plain tuples and integers."""

    error: str | None
    value: object = None

    def __str__(self) -> str:
        return self.error if self.error else repr(self.value)


OK = Answer(None)


def refused(name: str) -> Answer:
    """The answer of a refused ioctl: an errno by name."""
    assert hasattr(errno, name)
    return Answer(name)


class Player:
    """Plays steps on one VM.  ``vcpus`` in creation order."""

    def __init__(self, vm: Any, arena_bytes: int | None = None, level: int = 1) -> None:
        """``arena_bytes`` of host memory (16 MiB by default); ``level`` > 1: on huge pages, emulator only."""
        self.vm: Any = vm
        size = arena_bytes or ARENA_BYTES
        self.arena: int = self.vm.alloc_memory(size) if level == 1 else self.vm.alloc_memory(size, level)
        self.vcpus: list[VcpuDoor] = []
        self.raced: Raced | None = None  # the race of the step played last
        self._armed: Race | None = None

    def play(self, step: Step) -> Answer:
        """Do one step.  OSError becomes its errno's name; anything else is a defect and passes through."""
        self.raced = None
        if isinstance(step, Race):
            self._armed = step
            return OK
        if self._armed is not None:
            self.raced, self._armed = Raced(self._armed), None
            arm(self.vm, self.vcpus, self.raced)
        try:
            return Answer(None, self._do(step))
        except OSError as error:
            return Answer(errno.errorcode.get(error.errno or 0, str(error.errno)))
        finally:
            if self.raced is not None:
                self.vm.race_hook = None

    def close(self) -> None:
        self.vcpus.clear()
        self.vm.close()

    def play_all(self, steps: Iterable[Step]) -> list[Answer]:
        return [self.play(step) for step in steps]

    def _do(self, step: Step) -> object:
        match step:
            case Region(slot, flags, gpa, size, hva):
                address = hva - RAW if hva >= RAW else self.arena + hva
                self.vm.set_user_memory_region(slot, flags, gpa, size, address)
            case Get(slot, pages):
                return self._get(slot, pages)
            case Clear(slot, first, pages, words):
                mask = None if words is None else np.array(words, dtype=np.uint64)
                self.vm.clear_dirty_log(slot, first, pages, mask)
            case Run(vcpu, ops):
                return self._run(self.vcpus[vcpu], ops)
            case Harvest(vcpu):
                return tuple((int(slot), int(offset)) for slot, offset in self.vcpus[vcpu].ring.harvest())
            case Reset():
                return int(self.vm.reset_dirty_rings())
            case CreateVcpu(id):
                self.vcpus.append(self.vm.create_vcpu(id))
            case Cap(cap, flags, args):
                return self.vm.enable_cap(cap, flags, (*args, 0, 0, 0)[:4])
            case Extension(cap):
                return int(self.vm.check_extension(cap))
            case HostWrite(hva, value):
                self.vm.host_write(self.arena + hva, value.to_bytes(4, "little"))
            case HostRead(hva):
                return int.from_bytes(self.vm.host_read(self.arena + hva, 4), "little")
            case Inside():
                return perform(self, step)
        return None

    def _get(self, slot: int, pages: int | None) -> object:
        if pages is None:
            self.vm.get_dirty_log(slot, None)
            return None
        bitmap = np.zeros(max(1, words_of(pages)), dtype=np.uint64)
        self.vm.get_dirty_log(slot, bitmap)
        return tuple(int(word) for word in bitmap)

    def _run(self, vcpu: VcpuDoor, ops: Sequence[Op]) -> object:
        exit = vcpu.run(ops)
        return (int(exit.reason), int(exit.done), tuple(int(value) for value in exit.data or ()))

    def ring_contents(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """Each vCPU's ring entries (flags, slot, offset) up to the last one ever used."""
        return tuple(_used_entries(vcpu.ring.entries) for vcpu in self.vcpus)


def _used_entries(entries: object) -> tuple[tuple[int, int, int], ...]:
    array = np.asarray(entries)
    columns = [array[name].astype(np.uint64) for name in ("flags", "slot", "offset")]
    used = np.flatnonzero(columns[0] | columns[1] | columns[2])
    end = int(used[-1]) + 1 if used.size else 0
    return tuple((int(f), int(s), int(o)) for f, s, o in zip(*(column[:end] for column in columns), strict=True))


def pages(n: int) -> int:
    """Bytes of ``n`` pages."""
    return n * PAGE_SIZE
