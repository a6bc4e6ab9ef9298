"""QEMU's bulk kernels against their page-at-a-time rules on random bitmaps, budgets and clocks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.migration.ram_kernels import (
    ELAPSED_PS,
    END_OF_SPAN,
    STATE_LEN,
    TURNS,
    USED,
    SaveRule,
    merge_span,
    must_stop,
    next_dirty,
    save_span,
)
from migsim.planes import new_summary, summarise, summary_of_ones

N = 64 * 70 + 13


def words(pages: set[int]) -> np.ndarray:
    out = np.zeros((N + 63) // 64, dtype=np.uint64)
    for page in pages:
        out[page >> 6] |= np.uint64(1 << (page & 63))
    return out


def pages(plane: np.ndarray) -> set[int]:
    return {64 * int(w) + b for w in np.flatnonzero(plane) for b in range(64) if int(plane[w]) >> b & 1}


def summary(plane: np.ndarray) -> np.ndarray:
    out = new_summary(N)
    summarise(plane, out)
    return out


def named(sums: np.ndarray) -> set[int]:
    """The words a summary names, by way of its top."""
    return {w for w in pages(sums[:64]) if w >> 6 in pages(sums[64:])}


SETS = st.builds(
    lambda runs, singles: {p for a, n in runs for p in range(a, min(a + n, N))} | singles,
    st.lists(st.tuples(st.integers(0, N - 1), st.integers(1, 300)), max_size=4),
    st.sets(st.integers(0, N - 1), max_size=40),
)


@settings(max_examples=150, deadline=None)
@given(
    SETS, SETS, SETS, st.integers(0, N), st.integers(0, N), st.integers(0, 400_000), st.integers(0, 900_000),
    st.integers(0, 5000), st.integers(0, 300),
)  # fmt: skip
def test_save_span_sends_what_the_rule_sends_and_stops_where_it_stops(
    dirty: set[int], stale: set[int], zero: set[int], a: int, b: int, byte_limit: int, ps_limit: int, word_ps: int,
    turns: int,
) -> None:  # fmt: skip
    first, end = min(a, b), max(a, b)
    state = np.zeros(STATE_LEN, dtype=np.int64)
    state[TURNS] = turns
    bmap, truth, zeros = words(dirty), words(stale), words(zero)
    sums = summary(bmap)
    got = save_span(
        bmap, sums, truth, zeros, bool(zero), first, end, 4104, 9, byte_limit, 700, 50, word_ps, ps_limit, state
    )
    rule = SaveRule(set(dirty), set(stale), set(zero), [0, 0, turns, 0, 0, 0])
    want = rule.run(first, end, (4104, 9), (700, 50, word_ps), (byte_limit, ps_limit))
    assert (tuple(map(int, got)), state.tolist()) == (want, rule.state)
    assert (pages(bmap), pages(truth)) == (rule.dirty, rule.stale)
    assert {int(w) for w in np.flatnonzero(bmap)} <= named(sums), "a dirty word is missing from the summary"


def test_a_window_overshoots_its_quantum_by_one_page_at_most() -> None:
    state = np.zeros(STATE_LEN, dtype=np.int64)
    all_ones = words(set(range(N)))
    sums, stale, quantum = summary_of_ones(N), all_ones.copy(), 100 * 4104
    save_span(all_ones, sums, stale, all_ones, False, 0, N, 4104, 9, quantum, 1, 1, 0, 1 << 60, state)
    assert state[USED] == 101 * 4104


@settings(deadline=None)
@given(SETS, st.integers(0, N - 1), st.booleans())
def test_next_dirty_finds_the_first_page_and_pays_for_the_words_passed(dirty: set[int], page: int, full: bool) -> None:
    bmap, state = words(dirty), np.zeros(STATE_LEN, dtype=np.int64)
    found = next_dirty(bmap, summary(bmap), np.array([full], dtype=np.uint8), page, N, 3, state)
    ahead = [p for p in sorted(dirty) if p >= page]
    want = page if full else (ahead[0] if ahead else -1)
    assert found == want
    last = (N + 63) // 64 if want < 0 else want >> 6
    assert state[ELAPSED_PS] == 3 * (last - (page >> 6))


@settings(deadline=None)
@given(SETS, SETS)
def test_merging_counts_pages_that_were_not_marked_before(have: set[int], log: set[int]) -> None:
    bmap = words(have)
    sums = summary(bmap)
    assert merge_span(bmap, sums, 0, words(log), 0, len(bmap)) == len(log - have)
    assert pages(bmap) == have | log
    assert {int(w) for w in np.flatnonzero(bmap)} <= named(sums)


def test_the_clock_is_looked_at_before_each_64th_page_but_the_first() -> None:
    state = np.zeros(STATE_LEN, dtype=np.int64)
    state[ELAPSED_PS] = 10
    stops = []
    for turn in range(130):
        state[TURNS] = turn
        if must_stop(state, 1 << 60, 5) != END_OF_SPAN:
            stops.append(turn)
    assert stops == [64, 128]
