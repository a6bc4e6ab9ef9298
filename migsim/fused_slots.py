"""What the fused loops work on: a memslot's planes as KVM shows them, and its part of a block from both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from migsim.fused_views import BlockView, Ints, SlotView
from migsim.guest.memory import RamBlock
from migsim.kvm.bulk import Leaves
from migsim.planes import Plane, Words

__all__ = ["Extent", "LoggedSlot", "any_zero"]


class LoggedSlot(Protocol):
    """What of KVM's side of one memslot the fused loops work on: planes over its pages."""

    log: Plane
    writable: Plane
    dirty: Plane
    present: Plane
    leaves: Leaves
    tabled: np.ndarray[tuple[int], np.dtype[np.uint8]]
    reach: np.ndarray[tuple[int], np.dtype[np.uint8]]
    pml: bool
    fast_path: bool
    plain: bool
    silent: bool
    walks: bool

    def make_tables(self, chunk: int, hits: Words, counts: Ints) -> None:
        """What the slow page faults of stores to a chunk do above level 1."""

    def reach_4k(self, chunk: int, taken: Words | None = None) -> None:
        """What CLEAR of `taken` (None: of every page) does about the huge pages of a chunk."""

    def harvested(self, taken: int) -> None:
        """A GET without manual protection re-armed `taken` pages."""

    def count(self, counts: Ints) -> None:
        """Add the kernels' counts to KVM's statistics."""


@dataclass
class Extent:
    """One memslot's part of a block, pages [first, end) of it, seen from both sides."""

    kvm: LoggedSlot
    slot: SlotView
    block: BlockView
    first: int
    end: int


def any_zero(block: RamBlock) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """uint8[chunks]: may a page of the chunk be zero?"""
    out = block.zero.full.copy()
    for chunk in np.flatnonzero(out == 0):
        out[chunk] = np.count_nonzero(block.zero.words[block.zero.chunk_words(int(chunk))]) > 0
    return out
