"""Blocks, memslots and the PCI hole; the ground truth of one write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim.guest.memory import MEM_SLOT_PAGES_MAX, GuestMemory, layout
from migsim.units import GIB, MIB, TIB


@given(st.integers(1, 6000), st.integers(1, 16), st.sampled_from(["pc", "q35"]))
def test_every_page_lies_in_one_slot_and_no_slot_in_the_hole(gib_4: int, nodes: int, machine: str) -> None:
    memory = gib_4 * 256 * MIB
    blocks = layout(memory, nodes, machine)
    assert sum(pages for _, pages, _ in blocks) * 4096 == memory
    taken: list[tuple[int, int]] = []
    for _, pages, slots in blocks:
        assert sum(s.pages for s in slots) == pages and all(s.pages <= MEM_SLOT_PAGES_MAX for s in slots)
        assert [s.first for s in slots] == [sum(t.pages for t in slots[:k]) for k in range(len(slots))]
        taken += [(s.gfn, s.gfn + s.pages) for s in slots]
    taken.sort()
    assert all(a[1] <= b[0] for a, b in zip(taken, taken[1:], strict=False))
    low_end = {"pc": 0xE0000000, "q35": 0xB0000000}[machine] >> 12
    assert not any(a < 4 * GIB >> 12 and b > low_end for a, b in taken)


def test_twelve_tib_needs_two_slots_above_the_hole_even_with_one_node() -> None:
    blocks = layout(12 * TIB, 1, "q35")
    assert len(blocks) == 2 and [len(slots) for _, _, slots in blocks] == [2, 1]


def test_memory_must_be_whole_pages() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        layout(4097, 1, "pc")


def test_a_write_makes_a_page_differ_and_no_longer_zero_until_it_is_saved() -> None:
    memory = GuestMemory(layout(MIB, 1, "pc"), [(0, 128)])
    block = memory.blocks[0]
    for page in range(256):
        memory.saved(block, page)
    assert memory.stale_pages() == 0 and block.zero.get(200) and not block.zero.get(100)
    memory.write(block, 200)
    assert memory.stale_pages() == 1 and not block.zero.get(200)
    memory.saved(block, 200)
    assert memory.stale_pages() == 0
