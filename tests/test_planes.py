"""A lazy bit plane is a set of pages, whatever has been done to it in which order."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from migsim.planes import Plane, new_summary, summarise, summary_of_ones
from migsim.units import CHUNK_PAGES, chunks_of, words_of

N = CHUNK_PAGES + 100


class PlaneIsASet(RuleBasedStateMachine):
    pages = st.one_of(st.integers(0, N - 1), st.integers(CHUNK_PAGES - 70, N - 1))

    @initialize(ones=st.booleans())
    def make(self, ones: bool) -> None:
        self.plane = Plane(N, ones=ones)
        self.model = np.full(N, ones)

    @rule(page=pages)
    def set(self, page: int) -> None:
        self.plane.set(page)
        self.model[page] = True

    @rule(page=pages)
    def clear(self, page: int) -> None:
        self.plane.clear(page)
        self.model[page] = False

    @rule(a=st.one_of(st.just(0), pages), b=st.one_of(st.just(N), st.just(CHUNK_PAGES), pages), value=st.booleans())
    def fill(self, a: int, b: int, value: bool) -> None:
        first, end = min(a, b), max(a, b)
        (self.plane.set_range if value else self.plane.clear_range)(first, end - first)
        self.model[first:end] = value

    @rule(chunk=st.integers(0, 1))
    def settle(self, chunk: int) -> None:
        self.plane.settle(chunk)

    @rule()
    def clear_all(self) -> None:
        self.plane.clear_all()
        self.model[:] = False

    @rule(page=pages)
    def reads_back(self, page: int) -> None:
        assert self.plane.get(page) == self.model[page]

    @invariant()
    def same_set(self) -> None:
        if not hasattr(self, "plane"):
            return
        assert self.plane.count() == int(self.model.sum())
        words = self.plane.slice_words(0, N)
        assert np.array_equal(np.unpackbits(words.view(np.uint8), bitorder="little")[:N].astype(bool), self.model)
        for chunk in np.flatnonzero(self.plane.full == 2):
            assert not self.plane.words[self.plane.chunk_words(int(chunk))].any(), "a chunk said to be untouched is not"


TestPlaneIsASet = PlaneIsASet.TestCase
TestPlaneIsASet.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_a_summary_of_ones_names_every_word_and_none_beyond() -> None:
    for n in (1, 64, 4096, 4097, 30 * 256, N):
        exact = new_summary(n)
        summarise(np.ones(words_of(n), dtype=np.uint64), exact)
        assert np.array_equal(summary_of_ones(n), exact)
        groups = chunks_of(n) * 64
        assert int(np.bitwise_count(exact[:groups]).sum()) == words_of(n)
        assert int(np.bitwise_count(exact[groups:]).sum()) == -(-words_of(n) // 64)
