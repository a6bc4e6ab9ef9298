"""Counting a bitmap: ranges that begin and end inside words, chunks of all ones, against one bit at a time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.migration.marked import between
from migsim.planes import Plane
from migsim.units import CHUNK_PAGES

_PAGES = CHUNK_PAGES + 1000


@given(
    pages=st.sets(st.one_of(st.integers(0, 300), st.integers(CHUNK_PAGES - 200, _PAGES - 1)), max_size=60),
    first=st.one_of(st.integers(0, 200), st.integers(CHUNK_PAGES - 100, CHUNK_PAGES + 100)),
    length=st.one_of(st.integers(0, 200), st.integers(CHUNK_PAGES - 10, CHUNK_PAGES + 10)), full=st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_between_counts_what_single_bits_say(pages: set[int], first: int, length: int, full: bool) -> None:
    plane, end = Plane(_PAGES), min(first + length, _PAGES)
    for page in pages:
        plane.set(page)
    if full:
        plane.full[1] = 1  # all of the second chunk, whatever its words hold
        pages = {page for page in pages if page < CHUNK_PAGES} | set(range(CHUNK_PAGES, _PAGES))
    assert between(plane, first, end) == sum(first <= page < end for page in pages)
