"""The three ways of asking KVM what got dirty, one row each: dirty-log, clear-log, dirty-ring.

The names and the split into hooks are those of KVM's own dirty_log_test.  A fourth way is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from migsim.kvm import uapi
from migsim.validate.backends import CLEAR_LOG, DIRTY_LOG, DIRTY_RING
from migsim.validate.rig import SLOT, Rig
from migsim.validate.verdicts import CheckFailed

RING_BYTES = 16384  # the smallest that PML's reserve allows: 1024 entries


@dataclass(frozen=True)
class LogMode:
    """``prepare`` runs before slots and vCPUs exist; ``collect`` takes what is dirty and re-arms it.

    ``enabled_all``: does enabling the log mark every page?
    """

    name: str
    needs: str
    prepare: Callable[[Rig], None]
    collect: Callable[[Rig, int, int], set[int]]
    enabled_all: bool = False


def _prepare_nothing(_rig: Rig) -> None:
    """GET alone needs no capability."""


def _collect_get(rig: Rig, n_pages: int, slot: int = SLOT) -> set[int]:
    return rig.get(n_pages, slot)


def _prepare_clear(rig: Rig) -> None:
    rig.manual_protect(3)


def _collect_clear(rig: Rig, n_pages: int, slot: int = SLOT) -> set[int]:
    """GET, then CLEAR what it showed, in pieces as QEMU does, the last one partial."""
    dirty = rig.get(n_pages, slot)
    piece = max(64, n_pages // 4 // 64 * 64)
    for first in range(0, n_pages, piece):
        rig.clear(n_pages, dirty, slot, first, min(piece, n_pages - first))
    return dirty


def _prepare_ring(rig: Rig) -> None:
    rig.ring(RING_BYTES)


def _collect_ring(rig: Rig, n_pages: int, slot: int = SLOT) -> set[int]:
    """Harvest every vCPU's ring, then reset; the count of resets must be that of the harvest."""
    entries = [entry for vcpu in range(len(rig.player.vcpus)) for entry in rig.harvest(vcpu)]
    taken = rig.reset()
    if taken != len(entries):
        raise CheckFailed(f"{len(entries)} ring entries were harvested, {taken} reset")
    wrong = [(key, offset) for key, offset in entries if key != slot or offset >= n_pages]
    if wrong:
        raise CheckFailed(f"ring entry slot {wrong[0][0]:#x} offset {wrong[0][1]:#x} names no page of slot {slot:#x}")
    return {offset for _, offset in entries}


MODES: tuple[LogMode, ...] = (
    LogMode("dirty-log", DIRTY_LOG, _prepare_nothing, _collect_get),
    LogMode("clear-log", CLEAR_LOG, _prepare_clear, _collect_clear, enabled_all=True),
    LogMode("dirty-ring", DIRTY_RING, _prepare_ring, _collect_ring),
)


def store_all(rig: Rig, mode: LogMode, pages: list[int], value: int, vcpu: int, gpa: int, n_pages: int) -> set[int]:
    """Store to every page however often the ring gets full; what had to be collected on the way."""
    ops = [("w", gpa + page * 4096, value) for page in pages]
    collected: set[int] = set()
    while True:
        reason, done, _ = rig.run(ops, vcpu)
        ops = ops[done:]
        if reason == uapi.KVM_EXIT_HLT:
            return collected
        if reason != uapi.KVM_EXIT_DIRTY_RING_FULL or mode.needs != DIRTY_RING:
            raise CheckFailed(f"KVM_RUN stopped with exit reason {reason} with {len(ops)} stores left")
        fresh = mode.collect(rig, n_pages, SLOT)
        if not fresh:
            raise CheckFailed("the ring is full and nothing can be harvested from it")
        collected |= fresh
