"""What goes into KVM_RUN and what comes out: guest operations, exits, the MMIO user space is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from migsim.units import PAGE_SIZE

Op = tuple[str, int, int]
"""(kind, gpa, value): 'w' stores the u32 value, 'r' loads a u32, 'a' adds the u32 value under LOCK."""


class Mmio(NamedTuple):
    """What user space must do: `data` are the bytes stored, or zeros to be filled in for a load."""

    phys_addr: int
    is_write: bool
    data: bytes


class Exit(NamedTuple):
    """Why KVM_RUN came back: KVM's exit reason, operations completed, values loaded (u32, in order)."""

    reason: int
    done: int
    data: tuple[int, ...] = ()
    mmio: Mmio | None = None


class GuestLivelock(AssertionError):
    """An access faults for ever: the fault handler makes no progress."""


class StopRun(Exception):
    """Leave KVM_RUN for user space."""

    def __init__(self, reason: int, mmio: Mmio | None = None) -> None:
        self.reason = reason
        self.mmio = mmio


def check_ops(ops: Sequence[Op]) -> None:
    """ValueError for an operation this guest cannot execute."""
    for kind, gpa, _ in ops:
        if kind not in ("w", "r", "a"):
            raise ValueError(f"operation kind {kind!r}: 'w', 'r' or 'a'")
        if gpa < 0 or gpa % PAGE_SIZE > PAGE_SIZE - 4:
            raise ValueError(f"gpa {gpa:#x}: an operation is a u32 inside one page")
