"""A VM under test: plays steps, keeps the script, refuses unexpected errors, looks inside where there is an inside."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from migsim.kvm import uapi
from migsim.units import PAGE_SIZE, words_of
from migsim.validate.door import Op, VmDoor
from migsim.validate.script import (
    Cap,
    Clear,
    CreateVcpu,
    Get,
    Harvest,
    Player,
    Region,
    Reset,
    Run,
    Step,
)
from migsim.validate.verdicts import CheckFailed

LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
GPA = 1 << 30
SLOT = 1


class Rig:
    """``vm`` is the backend's VM; every step goes through ``must`` (no error allowed) or ``player.play``."""

    def __init__(self, vm: VmDoor, *, arena_bytes: int | None = None, level: int = 1) -> None:
        self.vm: Any = vm
        try:
            self.player = Player(vm, arena_bytes, level)
        except BaseException:
            vm.close()
            raise
        self._history: list[Step] = []
        self.done = 0

    # -- steps

    def must(self, step: Step) -> Any:
        """Play a step that has to succeed; its value."""
        answer = self.play(step)
        if answer.error is not None:
            raise CheckFailed(f"{step} was refused with {answer.error}", self.script())
        return answer.value

    def play(self, step: Step) -> Any:
        """Play a step; its Answer."""
        self._history.append(step)
        self.done += 1 + (len(step.ops) if isinstance(step, Run) else 0)
        return self.player.play(step)

    def script(self) -> tuple[Step, ...]:
        """Everything played so far."""
        return tuple(self._history)

    def slot(self, n_pages: int, flags: int = LOG, *, slot: int = SLOT, gpa: int = GPA, hva: int = 0) -> None:
        """Create or change a slot of ``n_pages``."""
        self.must(Region(slot, flags, gpa, n_pages * PAGE_SIZE, hva))

    def vcpus(self, n: int) -> None:
        for id in range(n):
            self.must(CreateVcpu(id))

    def ring(self, size_bytes: int) -> None:
        self.must(Cap(uapi.KVM_CAP_DIRTY_LOG_RING, 0, (size_bytes,)))

    def manual_protect(self, value: int) -> None:
        self.must(Cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, (value,)))

    def run(self, ops: list[Op], vcpu: int = 0) -> tuple[int, int, tuple[int, ...]]:
        """KVM_RUN: (exit reason, operations done, values loaded)."""
        reason, done, data = self.must(Run(vcpu, tuple(ops)))
        return int(reason), int(done), data

    def store(self, pages: list[int], value: int, vcpu: int = 0, *, gpa: int = GPA) -> None:
        """Store ``value`` to each page; HLT is the only exit allowed."""
        self.halts([("w", gpa + page * PAGE_SIZE, value) for page in pages], vcpu)

    def halts(self, ops: list[Op], vcpu: int = 0) -> tuple[int, ...]:
        """Run to the end; the values loaded."""
        reason, done, data = self.run(ops, vcpu)
        if reason != uapi.KVM_EXIT_HLT or done != len(ops):
            raise CheckFailed(f"KVM_RUN stopped with exit reason {reason} after {done} of {len(ops)} operations")
        return data

    def get(self, n_pages: int, slot: int = SLOT) -> set[int]:
        """GET as the set of pages; a bit past the slot's end is a failure."""
        return bits_of(self.must(Get(slot, n_pages)), n_pages)

    def clear(self, n_pages: int, pages: set[int], slot: int = SLOT, first: int = 0, count: int | None = None) -> None:
        """CLEAR ``pages`` (of the slot) in [first, first + count)."""
        count = n_pages - first if count is None else count
        self.must(Clear(slot, first, count, words_from({page - first for page in pages}, count)))

    def harvest(self, vcpu: int = 0) -> list[tuple[int, int]]:
        return list(self.must(Harvest(vcpu)))

    def reset(self) -> int:
        return int(self.must(Reset()))

    def content(self, page: int, hva: int = 0) -> int:
        """The u32 at the page's start as the VMM reads it."""
        raw = self.vm.host_read(self.player.arena + hva + page * PAGE_SIZE, 4)
        return int.from_bytes(raw, "little")

    # -- looking inside the emulator

    @property
    def emulated(self) -> bool:
        return hasattr(self.vm, "mmu")

    def check_inside(self) -> None:
        """The emulator's own invariants: SPTEs, tables, roots, TLBs (nothing on a backend without an inside)."""
        if self.emulated:
            for sentence in self.vm.invariants():
                raise CheckFailed(f"invariant: {sentence}")

    def final_checks(self) -> None:
        """At the end: invariants, then that closing the VM leaks nothing."""
        self.check_inside()
        if self.emulated:
            try:
                self.vm.close()
            except AssertionError as leak:
                raise CheckFailed(f"closing the VM: {leak}") from leak

    def close(self) -> None:
        """Give the VM back.  A leak is ``final_checks``' business; after another failure it is only its echo."""
        with suppress(AssertionError):
            self.player.close()


def bits_of(words: tuple[int, ...], n_pages: int) -> set[int]:
    """Set bits as page numbers.  CheckFailed for a bit at or past ``n_pages``."""
    found = set()
    for index, word in enumerate(words):
        while word:
            low = word & -word
            found.add(index * 64 + low.bit_length() - 1)
            word ^= low
    past = [page for page in found if page >= n_pages]
    if past:
        raise CheckFailed(f"bit {past[0]} is set in the log of a slot of {n_pages} pages")
    return found


def words_from(pages: set[int], n_pages: int) -> tuple[int, ...]:
    """A mask of ``n_pages`` bits; page numbers outside are left out."""
    words = [0] * max(1, words_of(n_pages))
    for page in pages:
        if 0 <= page < n_pages:
            words[page >> 6] |= 1 << (page & 63)
    return tuple(words)
