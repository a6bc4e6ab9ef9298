"""Summaries of two levels: never less than what is set, and what the kernels that go by them leave behind."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.fused_kernels import check, keep_known, merge
from migsim.fused_views import FIRST_LOST, LOST, RESULTS_LEN
from migsim.jit import kernel
from migsim.planes import Words, new_summary, raise_words, summarise
from migsim.units import CHUNK_PAGES, CHUNK_WORDS
from migsim.words import drop_summary, raise_summary, raise_word, tidy

N = 2 * CHUNK_PAGES - 130  # two chunks, the second of which ends in the middle of a group
WORDS = -(-N // 64)


def words(pages: set[int]) -> Words:
    out = np.zeros(WORDS, dtype=np.uint64)
    for page in pages:
        out[page >> 6] |= np.uint64(1 << (page & 63))
    return out


def pages(plane: Words) -> set[int]:
    return {64 * int(w) + b for w in np.flatnonzero(plane) for b in range(64) if int(plane[w]) >> b & 1}


def summary(plane: Words, also: set[int] = frozenset()) -> Words:  # type: ignore[assignment]
    """Of a plane, and naming some words too many."""
    out = new_summary(N)
    summarise(plane, out)
    raise_words(out, np.array(sorted(also), dtype=np.intp))
    return out


def named(sums: Words) -> set[int]:
    """The words a summary names, by way of its tops; a group beyond them must be zero."""
    groups, tops = pages(sums[:128]), pages(sums[128:])
    assert {g >> 6 for g in groups} <= tops, "a group that is not zero is missing from its top"
    return groups


SETS = st.builds(
    lambda runs, singles: {p for a, n in runs for p in range(a, min(a + n, N))} | singles,
    st.lists(st.tuples(st.integers(0, N - 1), st.integers(1, 3000)), max_size=4),
    st.sets(st.integers(0, N - 1), max_size=30),
)
EXTRA = st.sets(st.integers(0, WORDS - 1), max_size=20)


@settings(max_examples=60, deadline=None)
@given(SETS, SETS, EXTRA, EXTRA)
def test_a_merge_adds_the_log_to_the_bitmap_and_says_so_only_of_equal_chunks(
    logged: set[int], marked: set[int], more: set[int], most: set[int]
) -> None:
    log, bmap = words(logged), words(marked)
    log_sums, sums = summary(log, more), summary(bmap, most)
    for chunk in (0, 1):
        w0, mine = chunk * CHUNK_WORDS, range(chunk * CHUNK_PAGES, (chunk + 1) * CHUNK_PAGES)
        new, equal = merge(log, log_sums, w0, bmap, sums, w0)
        here = {p for p in logged if p in mine}, {p for p in marked if p in mine}
        assert int(new) == len(here[0] - here[1])
        assert here[1] <= here[0] if equal else True
    assert pages(bmap) == logged | marked and pages(log) == logged
    assert {p >> 6 for p in logged | marked} <= named(sums)


@settings(max_examples=40, deadline=None)
@given(SETS, SETS, EXTRA)
def test_what_get_showed_is_kept_as_it_was(logged: set[int], old: set[int], more: set[int]) -> None:
    log, known = words(logged), words(old)
    log_sums, sums = summary(log, more), summary(known)
    for chunk in (0, 1):
        keep_known(log, log_sums, known, sums, chunk)
    assert pages(known) == logged and {p >> 6 for p in logged} <= named(sums)


@settings(max_examples=40, deadline=None)
@given(SETS, SETS, EXTRA)
def test_the_oracle_finds_every_page_that_differs_unmarked(stale: set[int], marked: set[int], more: set[int]) -> None:
    truth, bmap, results = words(stale), words(marked), np.zeros(RESULTS_LEN, dtype=np.int64)
    results[FIRST_LOST] = -1
    for chunk in (0, 1):
        check(truth, summary(truth, more), bmap, chunk, 1000, results)
    lost = stale - marked
    assert results[LOST] == len(lost) and results[FIRST_LOST] == (1000 + min(lost) if lost else -1)


@settings(max_examples=60, deadline=None)
@given(SETS, EXTRA)
def test_a_tidied_summary_still_names_what_is_set_and_no_more_in_sparse_groups(have: set[int], more: set[int]) -> None:
    plane = words(have)
    sums = summary(plane, more)
    before = named(sums)
    for chunk in (0, 1):
        tidy(plane, sums, chunk)
    after, real = named(sums), {p >> 6 for p in have}
    assert real <= after <= before
    for group in {w >> 6 for w in after}:
        assert any(w >> 6 == group for w in real), "a group of zeros is still named"
    sparse = {g for g in {w >> 6 for w in before} if sum(w >> 6 == g for w in before) < 8}
    assert {w for w in after if w >> 6 in sparse} <= real


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, WORDS - 1), st.integers(0, 300)), max_size=5), st.booleans())
def test_words_are_named_in_ranges_and_one_by_one(ranges: list[tuple[int, int]], dropped: bool) -> None:
    sums, want = new_summary(N), set[int]()
    for first, count in ranges:
        end = min(first + count, WORDS if first >= CHUNK_WORDS else CHUNK_WORDS)
        raise_summary(sums, first, end)
        raise_word(sums, first)
        want |= {first, *range(first, end)}
    if dropped:
        drop_summary(sums, 0)
        want = {w for w in want if w >= CHUNK_WORDS}
    assert named(sums) == want and {g >> 6 for g in want} == pages(sums[128:])


def test_cached_code_is_not_used_once_a_number_or_a_kernel_it_contains_has_changed() -> None:
    stamps = set()
    for constant in (1, 2):
        scope = {"kernel": kernel, "CONSTANT": constant}
        exec(compile("def f():\n    return CONSTANT\n", __file__, "exec"), scope)
        made = kernel(scope["f"])
        index = getattr(getattr(made, "_cache", None), "_cache_file", None)
        if index is None:  # NUMBA_DISABLE_JIT: nothing is compiled, so nothing is cached
            return
        stamps.add(index._source_stamp)
    assert len(stamps) == 2
