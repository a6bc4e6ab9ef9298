"""mmu_lock: a spinlock until Linux 5.12, an rwlock since. The model only checks and counts; queues are perf's business.

Operations nest only where a test interleaves a second actor at a chosen step: readers may overlap readers, a writer
nobody. What the kernel would deadlock or corrupt on raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from migsim.sim.meter import Meter


class WouldBlock(AssertionError):
    """A second actor, interleaved by a test, needs a lock whose holder waits for it: the kernel would simply wait."""


class SpinLock:
    """One of the small locks inside mmu_lock: held for a few instructions, never while something sleeps.

    tdp_mmu_pages_lock guards what faults under the read lock share beside the SPTEs: the list of roots, the NX list and
    (until Linux 6.1) the list of all table pages; mmu_unsync_pages_lock the marks of shadow pages. `taken` is told.
    """

    def __init__(self, taken: Callable[[], None]) -> None:
        self._taken, self._held = taken, False

    def __enter__(self) -> None:
        assert not self._held, "a spinlock is taken twice"
        self._held = True
        self._taken()

    def __exit__(self, *_: object) -> None:
        self._held = False

    @property
    def held(self) -> bool:
        """Is it taken?"""
        return self._held


class MmuLock:
    """`shared=False` turns every acquisition into an exclusive one (shadow MMU, TDP MMU of 5.10)."""

    def __init__(self, meter: Meter, *, shared: bool) -> None:
        self._meter = meter
        self._shared = shared
        self.readers = 0
        self.writer = False

    @contextmanager
    def read(self) -> Iterator[bool]:
        """Hold for read; yields whether others may hold it too (`shared` in the MMU's function arguments)."""
        if not self._shared:
            with self.write():
                yield False
            return
        if self.writer:
            raise WouldBlock("mmu_lock read-locked while a writer holds it")
        self._meter.count("mmu_lock_read")
        self.readers += 1
        try:
            yield True
        finally:
            self.readers -= 1

    @contextmanager
    def write(self) -> Iterator[bool]:
        """Hold exclusively."""
        if self.writer or self.readers:
            raise WouldBlock(f"mmu_lock write-locked with {self.readers} readers inside")
        self._meter.count("mmu_lock_write")
        self.writer = True
        try:
            yield False
        finally:
            self.writer = False

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """A yield: the lock is free inside, then taken again as it was held (cond_resched_rwlock)."""
        readers, writer = self.readers, self.writer
        self.readers, self.writer = max(readers - 1, 0), False
        try:
            yield
        finally:
            self.readers, self.writer = readers, writer

    @property
    def held(self) -> bool:
        """By anybody."""
        return self.writer or self.readers > 0
