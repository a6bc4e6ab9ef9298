"""Lazy writes: the kernels against the page-at-a-time rule of the same law, and the law against arithmetic."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.guest import draw
from migsim.guest.catch_up import draw_hits, pages_hit
from migsim.guest.workload import SEQUENTIAL, UNIFORM, Phase, Stream, Workload, hot_cold, zipf
from migsim.planes import new_summary
from migsim.sim import prng

PAGES = 4096 + 70  # a partial last word, and words in two summary groups


def bits(words: np.ndarray) -> set[int]:
    return {64 * int(w) + b for w in np.flatnonzero(words) for b in range(64) if int(words[w]) >> b & 1}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, PAGES), st.integers(0, PAGES), st.integers(0, 2**64 - 1),
    st.one_of(st.floats(1e-5, 1.0), st.sampled_from([0.0, 1.0, draw.DENSE_FROM, 0.5, 1 / 4096])),
)  # fmt: skip
def test_a_uniform_draw_hits_the_pages_the_rule_hits(a: int, b: int, key: int, p: float) -> None:
    first, end = min(a, b), max(a, b)
    out, scratch, summary = np.zeros(70, dtype=np.uint64), np.zeros(70, dtype=np.uint64), new_summary(PAGES)
    draw.draw_uniform(out, summary, scratch, first, end, p, np.uint64(key))
    assert bits(out) == draw.bits_hit(first, end, p, key)
    assert {int(w) for w in np.flatnonzero(out)} <= bits(summary[:64]), "a hit word is missing from the summary"
    assert {int(g) for g in np.flatnonzero(summary[:64])} <= bits(summary[64:]), "a group is missing from the top"


def test_a_uniform_draw_has_the_probability_asked_for() -> None:
    """Within five standard deviations over 256 chunks, dense, sparse and at the seam between the two."""
    out, scratch, summary = (np.zeros(n, dtype=np.uint64) for n in (4096, 4096, 65))
    for p in (1e-4, draw.DENSE_FROM * 0.99, draw.DENSE_FROM, 0.0301, 0.5, 0.93):
        hits = 0
        for k in range(256):
            out[:] = 0
            draw.draw_uniform(out, summary, scratch, 0, 262144, p, np.uint64(prng.stream_key(1, k)))
            hits += int(np.bitwise_count(out).sum())
        n = 256 * 262144
        assert abs(hits - n * p) < 5 * math.sqrt(n * p * (1 - p)), (p, hits / n)


STREAMS = st.lists(
    st.tuples(st.sampled_from([UNIFORM, SEQUENTIAL]), st.integers(0, 9000), st.integers(1, 9000), st.floats(0, 2e4)),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    STREAMS, st.integers(0, 4000), st.integers(1, PAGES), st.integers(0, 99), st.lists(st.floats(0, 3e4), max_size=3)
)  # fmt: skip
def test_a_unit_is_brought_up_to_date_with_the_pages_the_rule_names(
    laws: list[tuple[int, int, int, float]], base: int, pages: int, seed: int, steps: list[float]
) -> None:
    law, first, end = (np.array(x, dtype=np.int64) for x in zip(*[(k, a, a + n) for k, a, n, _ in laws], strict=True))
    seen = np.zeros(len(laws))
    hits, scratch, summary = (np.zeros(n, dtype=np.uint64) for n in (70, 70, 65))
    visits, clock = np.zeros(4, dtype=np.uint32), np.zeros(len(laws))
    for step in steps:
        clock = clock + np.array([rate * step / 1e4 for *_, rate in laws])
        want = pages_hit(base, pages, 3, law, first, end, clock, seen.copy(), int(visits[3]), seed)
        drawn = draw_hits(
            hits, summary, scratch, base, pages, 3, law, first, end, clock, seen, visits, np.uint64(seed)
        )
        assert (bits(hits) if drawn else set()) == want


def test_looking_twice_at_one_moment_finds_nothing_new() -> None:
    w = Workload([Stream(UNIFORM, 0, 640, 1e6)], 1, 5)
    w.advance(1_000_000_000)
    hits, scratch, summary = (np.zeros(n, dtype=np.uint64) for n in (10, 10, 65))
    arguments = (w.law, w.first, w.end, w.clock, w.seen[0], w.visits, w.seed_key)
    assert draw_hits(hits, summary, scratch, 0, 640, 0, *arguments)
    assert not draw_hits(hits, summary, scratch, 0, 640, 0, *arguments)


def test_write_clocks_follow_rate_phases_throttle_and_slowdown() -> None:
    w = Workload([Stream(UNIFORM, 0, 100, 1000.0, (Phase(2_000_000_000, 0.5),))], 1, 0)
    w.advance(1_000_000_000)
    assert math.isclose(w.clock[0], 1000.0)
    w.set_pace(0.5, 2.0)
    w.advance(2_000_000_000)
    assert math.isclose(w.clock[0], 1250.0)
    w.set_pace(1.0, 1.0)
    w.advance(4_000_000_000)
    assert math.isclose(w.clock[0], 2250.0)


def test_hot_cold_and_zipf_streams_make_all_the_writes_and_cover_the_range() -> None:
    for streams in (hot_cold(10, 1010, 500.0, 0.1, 0.9), zipf(10, 1010, 500.0, 0.99), zipf(0, 1 << 28, 7.0, 1.2)):
        assert math.isclose(sum(s.pages_per_s for s in streams), 500.0 if streams[0].first == 10 else 7.0)
        assert all(a.end == b.first for a, b in zip(streams, streams[1:], strict=False))
    ranks = zipf(0, 1000, 1.0, 0.8)
    whole = sum(r**-0.8 for r in range(1, 1001))
    assert math.isclose(ranks[0].pages_per_s, 1 / whole)


def test_counter_based_words_do_not_depend_on_who_asked_first() -> None:
    assert [prng.word(9, i) for i in (3, 1, 2)] == [prng.word(9, i) for i in (3, 1, 2)]
    assert len({prng.word(prng.stream_key(0, s, c, v), 0) for s in range(4) for c in range(4) for v in range(4)}) == 64
    assert int(draw.chunk_key(np.uint64(prng.stream_key(5)), 1, 2, 3)) == _chained(prng.stream_key(5), 1, 2, 3)


def _chained(key: int, *names: int) -> int:
    for name in names:
        key = prng.mix(key + (name + 1) * prng.GOLDEN)
    return key
