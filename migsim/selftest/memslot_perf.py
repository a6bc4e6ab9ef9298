"""memslot_perf_test: how often memory can be mapped, unmapped, moved and used when there are many slots.

One vCPU. Host and guest work on opposite halves of the area at the same time and meet after each half, so an iteration
takes as long as the slower of the two, twice. Sizes are the test's own (Linux 6.18).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from migsim.perf.memstress import Counts
from migsim.perf.phases import parallel_phase, thread_phase
from migsim.perf.profile import HostProfile
from migsim.perf.rules import Kernel, Rules, default_kernel, rules_for
from migsim.selftest.options import SLOTS_MAX
from migsim.selftest.outcome import Outcome, Phase, seconds
from migsim.selftest.vm import RANDOM_SEED_LINE, lock_mode
from migsim.units import MIB, PAGE_SIZE

__all__ = ["TESTS", "Machine", "memslot_perf_test"]

TESTS: Final = ("map", "unmap", "unmap chunked", "move active area", "move inactive area", "RW")
_EXTRA: Final = 65536 // PAGE_SIZE  # where host and guest meet
_MAP_PAGES: Final = 32 * MIB // PAGE_SIZE
_UNMAP_PAGES: Final = 128 * MIB // PAGE_SIZE
_CHUNK_PAGES: Final = 512
_RW_PAGES: Final = 512 * MIB // PAGE_SIZE
_MOVE_PAGES: Final = 3 * 65536 // PAGE_SIZE  # half of them in the slot that moves
_SLOT_BYTES: Final = 128  # struct kvm_memory_slot, one copy of which a change moved before 5.17 (assumed size)


@dataclass(frozen=True)
class Machine:
    """The kernel under the test. zap_all_quirk: KVM_X86_QUIRK_SLOT_ZAP_ALL, moving a slot zaps the whole VM."""

    mmu: str = "tdp"
    kernel: Kernel | None = None
    zap_all_quirk: bool = True
    rules: Rules = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", rules_for(self.mmu, self.kernel or default_kernel(self.mmu)))


@dataclass(frozen=True)
class _Area:
    """A test's memory: `pages` in `slots` memslots, the last of which takes what does not divide."""

    pages: int
    slots: int

    @property
    def each(self) -> int:
        """Pages of every slot but the last."""
        return self.pages // self.slots

    @property
    def last(self) -> int:
        """Pages of the last slot."""
        return self.pages - self.each * (self.slots - 1)

    def pieces(self, pages: int) -> int:
        """madvise calls for a stretch of `pages`: one for each slot it reaches into."""
        return -(-pages // self.each)


def memslot_perf_test(
    vm: Machine, host: HostProfile, *, slots: int = -1, first: int = 0, last: int = len(TESTS) - 1,
    seconds_per_test: int = 5, runs: int = 1, verbose: bool = False,
) -> Outcome:  # fmt: skip
    """Tests `first` to `last` of `TESTS`. slots: KVM's at most, slot 0 included, or -1 for all it has.

    figures["iterations"]: of each test that could run, how many were done and the ns each took. ValueError for numbers
    out of range.
    """
    if first > last:
        raise ValueError(f"the first test to run, {first}, cannot be greater than the last, {last}")
    if slots != -1 and not 2 <= slots <= SLOTS_MAX:
        raise ValueError(f"slots must be 2..{SLOTS_MAX} or -1, not {slots}")
    run = _Run(vm, host, (SLOTS_MAX if slots == -1 else slots) - 1, seconds_per_test, runs, verbose)
    for at in range(first, last + 1):
        run.test(TESTS[at], blank=at > first)
    if run.best_setup_ns is not None:
        run.lines.append(f"Best slot setup time for the whole test area was {seconds(run.best_setup_ns)}")
    kernel = vm.kernel or default_kernel(vm.mmu)
    options: dict[str, Any] = {
        "mmu": vm.mmu, "kernel": f"{kernel[0]}.{kernel[1]}", "host": host.name, "slots": slots, "first": first,
        "last": last, "seconds": seconds_per_test, "runs": runs, "quirk-slot-zap-all": vm.zap_all_quirk,
    }  # fmt: skip
    return Outcome("memslot_perf_test", options, tuple(run.phases), tuple(run.lines), {"iterations": run.iterations})


class _Run:
    """Collects phases and lines of one run."""

    def __init__(self, vm: Machine, host: HostProfile, nslots: int, length: int, runs: int, verbose: bool) -> None:
        self.vm, self.host, self.nslots = vm, host, nslots
        self.length, self.runs, self.verbose = length, runs, verbose
        self.phases: list[Phase] = []
        self.lines: list[str] = [RANDOM_SEED_LINE]
        self.iterations: dict[str, dict[str, int]] = {}
        self.best_setup_ns: int | None = None
        if verbose:
            self.lines.append(f"Allowed Number of memory slots: {nslots + 1}")

    def test(self, name: str, *, blank: bool) -> None:
        self.lines += [""] * blank
        self.lines.append(f"Testing {name} performance with {self.runs} runs, {self.length} seconds each")
        area = _Area(_area_pages(name), self.nslots)
        if not area.each:
            most = area.pages + 1
            self.lines.append(f"Memslot count too high for this test, decrease the cap (max is {most})")
            return
        if self.verbose:
            rest = area.pages % self.nslots
            each = f"each slot with {area.each} pages + {rest} extra pages last"
            self.lines.append(f"Adding slots 1..{self.nslots}, {each}")
        if name == "move active area" and area.last < _MOVE_PAGES // 2:
            self.lines.append("Memslot count may be too high for this test, try adjusting the cap")
            return
        for _ in range(self.runs):
            self._once(name, area)
        done = self.iterations[name]
        each = f"{seconds(done['ns-each'])} per iteration (with {done['done']} iterations)"
        self.lines.append(f"Best runtime result was {each}")

    def _once(self, name: str, area: _Area) -> None:
        setup = {"slot-swap": self.nslots, "slot-copy-bytes": self._copied(self.nslots) // 2}
        setup_ns = thread_phase(setup, self.host).time_ns
        guest, thread = _halves(name, area, self)
        mode = lock_mode(self.vm.rules)
        guest_ns = parallel_phase(guest, 1, mode, self.host).time_ns if guest else 0
        once_ns = 2 * max(guest_ns, thread_phase(thread, self.host).time_ns)
        done = -(-self.length * 10**9 // once_ns)
        took = f"{seconds(setup_ns)} for slot setup + {seconds(done * once_ns)} all iterations"
        self.lines += [f"Test took {took}", f"Done {done} iterations, avg {seconds(once_ns)} each"]
        each = {op: 2 * done * n for op, n in {**guest, **thread}.items()}
        self.phases += [Phase(f"{name}: slot setup", setup_ns, 0.0, setup), Phase(name, done * once_ns, 0.0, each)]
        self.iterations[name] = {"done": done, "ns-each": once_ns}
        if area.pages == _RW_PAGES + _EXTRA:
            self.best_setup_ns = min(setup_ns, self.best_setup_ns or setup_ns)

    def _copied(self, nslots: int) -> int:
        """Bytes of slot array a change copies: all of it until 5.16, nothing since the slots are linked in trees."""
        return nslots * nslots * _SLOT_BYTES if self.vm.rules.slot_array_copied else 0

    def discarded(self, pages: int, area: _Area, calls: int, mapped: int) -> Counts:
        """`calls` madvise calls over `pages` of which `mapped` are there, each looking its memslots up."""
        counts = {"madvise": calls, "host-unmap-page": mapped, "spte-zap": mapped, "tlb-flush": min(mapped, calls)}
        counts["rmap-empty" if self.vm.rules.rmap else "spte-walk"] = pages
        if self.vm.rules.slot_array_copied:  # until 5.16 a host address is looked for slot by slot
            counts["slot-hva-scan"] = calls * area.slots
        return counts

    def moved(self) -> Counts:
        """One move: the slot made invalid, then placed anew, each a swap; what it drops the guest maps meanwhile."""
        copied = self._copied(self.nslots) // self.nslots
        dropped = _MOVE_PAGES if self.vm.zap_all_quirk else _MOVE_PAGES // 2
        return {"slot-swap": 2, "slot-copy-bytes": copied, "tlb-flush": 1, "tlb-flush-vcpu": 1, "spte-zap": dropped}


def _area_pages(name: str) -> int:
    return {"map": _MAP_PAGES, "unmap": _UNMAP_PAGES, "unmap chunked": _UNMAP_PAGES}.get(name, _RW_PAGES) + _EXTRA


def _halves(name: str, area: _Area, run: _Run) -> tuple[Counts, Counts]:
    """What vCPU and VMM do in half an iteration."""
    touched: Counts = {"guest-write": 1, "slow-fault": 1, "host-fault": 1}
    if name == "map":
        half = _MAP_PAGES // 2
        return dict.fromkeys(touched, half), run.discarded(half, area, area.pieces(half), half)
    if name == "unmap":  # the guest touches one page of a half, the host drops page after page
        half = _UNMAP_PAGES // 2
        return touched, run.discarded(half, area, half, 1)
    if name == "unmap chunked":
        half = _UNMAP_PAGES // 2
        return touched, run.discarded(half, area, half // _CHUNK_PAGES * area.pieces(_CHUNK_PAGES), 1)
    if name == "RW":
        return {"guest-write": _RW_PAGES}, {"guest-write": _RW_PAGES}
    return {}, run.moved()  # the guest writes on, and the host does not wait for it
