"""Page-modification logging: the CPU writes down the address of every page whose D bit it sets.

One buffer a vCPU, 512 entries, filled from index 511 down. When it is full the next D 0 -> 1 exits before the write.
KVM drains it on every exit while no nested guest runs. Facts: Intel SDM volume 3, "Page-Modification Logging"; Linux
6.14 arch/x86/kvm/vmx/vmx.c (37c3ddfe: drained in the order it was written; before that, newest first).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from migsim.units import PAGE_SIZE

PML_LOG_NR_ENTRIES: Final = 512
PML_HEAD_INDEX: Final = PML_LOG_NR_ENTRIES - 1
_WRAPPED: Final = 0xFFFF  # the 16-bit index after the write at 0


class PmlBuffer:
    """`entries`: uint64[512] guest-physical page addresses (bytes). `enabled`: the CPU's control bit."""

    __slots__ = ("enabled", "entries", "index", "newest_first")

    def __init__(self, newest_first: bool = False) -> None:
        self.entries = np.zeros(PML_LOG_NR_ENTRIES, dtype=np.uint64)
        self.index = PML_HEAD_INDEX
        self.enabled = False
        self.newest_first = newest_first

    def __len__(self) -> int:
        return PML_LOG_NR_ENTRIES if self.full else PML_HEAD_INDEX - self.index

    @property
    def full(self) -> bool:
        """The next log attempt would exit instead."""
        return self.index == _WRAPPED

    def log(self, gpa: int) -> None:
        """The CPU's act: write the page's address at the index and count it down."""
        assert not self.full, "the CPU exits before it writes past the buffer"
        self.entries[self.index] = gpa & -PAGE_SIZE
        self.index = (self.index - 1) & 0xFFFF

    def pending(self) -> list[int]:
        """The logged page addresses (bytes), in the order in which KVM reads them."""
        tail = 0 if self.full else self.index + 1
        logged = [int(gpa) for gpa in self.entries[tail:]]
        return logged if self.newest_first else logged[::-1]

    def reset(self) -> None:
        """Empty again."""
        self.index = PML_HEAD_INDEX
