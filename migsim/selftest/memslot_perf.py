"""memslot_perf_test: how often memory can be mapped, unmapped, moved and used when there are many slots.

One vCPU. The sizes are the test's own: map 32 MiB + 64 KiB, unmap 128 MiB + 64 KiB, chunks of 2 MiB, RW 512 MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from migsim.perf.memstress import Counts, Memstress
from migsim.perf.phases import parallel_phase, thread_phase
from migsim.perf.profile import HostProfile
from migsim.selftest.outcome import Outcome, Phase, seconds
from migsim.selftest.vm import lock_mode, options_of
from migsim.units import MIB, PAGE_SIZE

__all__ = ["SLOTS_MAX", "memslot_perf_test"]

SLOTS_MAX: Final = 32763
_SYNC_PAGES: Final = 16
_MAP_PAGES: Final = 32 * MIB // PAGE_SIZE + _SYNC_PAGES
_UNMAP_PAGES: Final = 128 * MIB // PAGE_SIZE + _SYNC_PAGES
_CHUNK_PAGES: Final = 512
_RW_PAGES: Final = 512 * MIB // PAGE_SIZE
_MOVED_PAGES: Final = 65536 // PAGE_SIZE  # what the guest keeps writing while the slot under it moves
_SLOT_BYTES: Final = 128  # struct kvm_memory_slot, one copy of which a change moved before 5.17 (assumed size)


def memslot_perf_test(
    vm: Memstress, host: HostProfile, *, nslots: int = SLOTS_MAX, seconds_per_test: int = 5, zap_all_quirk: bool = True
) -> Outcome:
    """The test's rows: iterations in `seconds_per_test` and time per iteration, after creating `nslots` slots.

    zap_all_quirk: KVM_X86_QUIRK_SLOT_ZAP_ALL, moving a slot zaps the whole VM. ValueError for a bad number of slots.
    """
    if not 1 <= nslots <= SLOTS_MAX or seconds_per_test < 1:
        raise ValueError(f"slots must be 1..{SLOTS_MAX} and the run at least a second")
    tests = _iterations(vm, nslots, zap_all_quirk)
    creation = thread_phase({"slot-swap": nslots, "slot-copy-bytes": _copied(vm, nslots) // 2}, host)
    phases = [Phase.of("slot setup", {"slot-swap": nslots}, creation)]
    lines = [f"Test created {nslots} slots, took {seconds(creation.time_ns)}"]
    for name, guest, thread in tests:
        once = parallel_phase(guest, 1, lock_mode(vm.rules), host).time_ns + thread_phase(thread, host).time_ns
        done = max(seconds_per_test * 10**9 // once, 1)
        lines.append(f"{name}: done {done} iterations, avg per iteration {seconds(once)}")
        phases.append(Phase(name, once, 0.0, {**guest, **thread}))
    options: dict[str, Any] = {
        **options_of(vm, host),
        "slots": nslots,
        "seconds": seconds_per_test,
        "quirk-slot-zap-all": zap_all_quirk,
    }
    return Outcome("memslot_perf_test", options, tuple(phases), tuple(lines))


def _iterations(vm: Memstress, nslots: int, zap_all_quirk: bool) -> list[tuple[str, Counts, Counts]]:
    """Name, the vCPU's operations and the VMM's, one iteration each. Host and guest take turns, so times add."""
    move: Counts = {"slot-swap": 2, "slot-copy-bytes": 2 * _copied(vm, nslots), "tlb-flush": 1}
    dropped = _MOVED_PAGES if zap_all_quirk else 0
    rows: list[tuple[str, Callable[[], tuple[Counts, Counts]]]] = [
        ("map", lambda: (_touched(_MAP_PAGES), _discarded(_MAP_PAGES, 2))),
        ("unmap", lambda: (_touched(_UNMAP_PAGES), _discarded(_UNMAP_PAGES, _UNMAP_PAGES))),
        ("unmap chunked", lambda: (_touched(_UNMAP_PAGES), _discarded(_UNMAP_PAGES, -(-_UNMAP_PAGES // _CHUNK_PAGES)))),
        ("move active area", lambda: (_refaulted(_MOVED_PAGES), move | {"spte-zap": _MOVED_PAGES})),
        ("move inactive area", lambda: (_refaulted(dropped), move | {"spte-zap": dropped})),
        ("RW", lambda: ({"guest-write": 2 * _RW_PAGES}, {"guest-write": 2 * _RW_PAGES})),
    ]
    return [(name, *counts()) for name, counts in rows]


def _copied(vm: Memstress, nslots: int) -> int:
    """Bytes of slot array a change copies: all of it until 5.16, nothing since the slots are linked in trees."""
    return nslots * _SLOT_BYTES if vm.rules.slot_array_copied else 0


def _touched(pages: int) -> Counts:
    return {"guest-write": pages, "slow-fault": pages, "host-fault": pages}


def _refaulted(pages: int) -> Counts:
    return {"guest-write": _MOVED_PAGES} | ({"present-fault": pages} if pages else {})


def _discarded(pages: int, calls: int) -> Counts:
    return {"madvise": calls, "host-unmap-page": pages, "spte-zap": pages, "tlb-flush": calls, "tlb-flush-vcpu": calls}
