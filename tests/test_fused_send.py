"""The open chunk, sent without a word of memory, against save_span over a chunk of ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.fused_send import close_chunk, send_open
from migsim.fused_views import BlockView, Costs
from migsim.migration.ram_kernels import END_OF_SPAN, STATE_LEN, save_span
from migsim.planes import Plane, summary_of_ones
from migsim.units import CHUNK_PAGES, CHUNK_WORDS


def block() -> Any:
    """A block of one chunk, all of it dirty and different, the chunk open."""
    bmap, stale, zero = Plane(CHUNK_PAGES, ones=True), Plane(CHUNK_PAGES, ones=True), Plane(CHUNK_PAGES)
    values = {
        "pages": CHUNK_PAGES, "first_page": 0, "first_chunk": 0, "bmap": bmap.words, "bmap_full": bmap.full,
        "bmap_summary": summary_of_ones(CHUNK_PAGES), "clear_bmap": np.zeros(1, dtype=np.uint8), "stale": stale.words,
        "stale_summary": summary_of_ones(CHUNK_PAGES), "stale_full": stale.full, "zero": zero.words,
        "zero_full": zero.full, "zero_any": np.zeros(1, dtype=np.uint8), "verify": True, "open": np.array([0, 0]),
    }  # fmt: skip
    return BlockView(**{name: values[name] for name in BlockView._fields})


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2 << 30), st.integers(0, 400_000_000)), min_size=1, max_size=6),
    st.integers(0, 9000), st.integers(0, 3000), st.sampled_from([4104, 4107, 1]),
)  # fmt: skip
def test_an_open_chunk_goes_out_as_save_span_would_send_it(
    calls: list[tuple[int, int]], normal_ps: int, word_ps: int, normal_bytes: int
) -> None:
    view, costs = block(), Costs(normal_ps, 7, word_ps, 0, 0, normal_bytes, 9, 0, 0)
    bmap, stale, zero = (np.full(CHUNK_WORDS, 2**64 - 1, dtype=np.uint64) for _ in range(3))
    sums, page = summary_of_ones(CHUNK_PAGES), 0
    for byte_limit, time_limit_ps in [*calls, (1 << 60, 1 << 60)]:
        state, want = np.zeros(STATE_LEN, dtype=np.int64), np.zeros(STATE_LEN, dtype=np.int64)
        got = send_open(byte_limit, time_limit_ps, view, costs, state)
        rule = save_span(
            bmap, sums, stale, zero, False, page, CHUNK_PAGES, normal_bytes, 9, byte_limit, normal_ps, 7, word_ps,
            time_limit_ps, want,
        )  # fmt: skip
        page = int(rule[0])
        assert (tuple(map(int, got)), state.tolist()) == (tuple(map(int, rule)), want.tolist())
        if rule[1] == END_OF_SPAN:
            assert view.open[0] == -1 and not view.bmap_full[0] and not view.bmap.any() and not view.stale.any()
            return


@given(st.integers(0, CHUNK_PAGES - 1))
@settings(max_examples=30, deadline=None)
def test_closing_an_open_chunk_writes_what_is_left_of_it(sent: int) -> None:
    view = block()
    view.open[1] = sent
    close_chunk(view)
    left = np.unpackbits(view.bmap.view(np.uint8), bitorder="little")
    assert view.open[0] == -1 and not view.bmap_full[0]
    assert not left[:sent].any() and left[sent:].all() and np.array_equal(view.bmap, view.stale)
