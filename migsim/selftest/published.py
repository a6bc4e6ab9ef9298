"""The published figures by source: cover letters, commits and mails, each beside what the same run gives here.

What was fitted to a figure says so in the host profile; everything else is predicted, or explained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from migsim.perf.memstress import Memstress
from migsim.perf.phases import parallel_phase, thread_phase
from migsim.perf.profile import load_profile
from migsim.selftest.demand_paging import demand_paging_test
from migsim.selftest.figures import Figure, Published, Table, dirty_log, figure, figures_of
from migsim.selftest.memslot_perf import Machine, memslot_perf_test
from migsim.units import GIB, MIB, PAGE_SIZE

__all__ = ["tables"]

_FIT, _PREDICT = "fitted", "predicted"
_SKYLAKE: Final = "--host skylake-2s-96"


def tables() -> tuple[Table, ...]:
    """All of them, in the order of the document."""
    makers: tuple[Callable[[], Table], ...] = (
        _seed, _part2_partitioned, _part2_legacy_after, _part2_overlap, _eager_v2, _split_on_fault, _disable,
        _memslots, _initially_set, _elsewhere,
    )  # fmt: skip
    return tuple(make() for make in makers)


def _seed() -> Table:
    host = load_profile()
    runs = {
        uffd: [demand_paging_test(Memstress(416, 4 * GIB, mmu), host, uffd=uffd) for mmu in ("shadow", "tdp")]
        for uffd in ("none", "MISSING")
    }
    waiting = {uffd: 100 * shadow.lock_waiting_share for uffd, (shadow, _) in runs.items()}
    less = {uffd: 100 * (1 - tdp.total_time_ns / shadow.total_time_ns) for uffd, (shadow, tdp) in runs.items()}
    legacy, tdp = (
        dirty_log(vcpus=96, memory_per_vcpu=3 * GIB, manual=0, mmu=mmu, kernel=(5, 12)).phase("populate memory").time_ns
        for mmu in ("shadow", "tdp")
    )
    note = (
        "should the published run have used userfaultfd (its profile names the ioctl): three rounds of mmap_lock a "
        "fault instead of one keep the TDP run slower here"
    )
    return Table(
        "Introduce the TDP MMU, v2 cover letter, October 2020",
        "demand_paging_test, 416 vCPUs, 4 GiB each; host profile m2-ultramem-416",
        "migsim selftest demand_paging_test --vcpus 416 --memory-per-vcpu 4GiB --mmu shadow",
        "%",
        (
            Figure("time waiting for the MMU lock, shadow", 98, waiting["none"], "fitted"),
            Figure("less total time, tdp", 89, less["none"], "fitted"),
            Figure("waiting, shadow, with -u MISSING", 98, waiting["MISSING"], "predicted"),
            Figure(
                "the neighbour, 96 vCPUs on two sockets (part 2, populate): less total time, tdp",
                100 * (1 - 16.112 / 110.193), 100 * (1 - tdp / legacy), "predicted",
            ),
            Figure("less total time, tdp, with -u MISSING", 89, less["MISSING"], "explained", note),
        ),
    )  # fmt: skip


_PART2: Final = "Allow parallel page faults with TDP MMU, cover letter, 2021: "
_NO_PML: Final = (
    "the published time is that of a fault a page; with PML nothing faults, in either MMU. See the next row"
)


def _part2_partitioned() -> Table:
    guest: dict[str, Any] = {"vcpus": 96, "memory_per_vcpu": 3 * GIB, "manual": 0}
    legacy = dirty_log(**guest, mmu="shadow", kernel=(5, 11))
    protected = dirty_log(**guest, mmu="shadow", kernel=(5, 11), pml=False)
    tdp = dirty_log(**guest, mmu="tdp", kernel=(5, 12))
    before: dict[str, Published] = {
        "populate": (110.193, _FIT), "enable": (4.829, _FIT), "dirty": (3.949, _NO_PML), "get": (0.822, _FIT),
        "disable": (2.995, _FIT),
    }  # fmt: skip
    after: dict[str, Published] = {
        "populate": (16.112, _PREDICT), "enable": (7.057, _PREDICT), "dirty": (0.275, _PREDICT),
        "get": (5.468, _PREDICT), "disable": (3.088, _FIT),
    }  # fmt: skip
    logged = "one fast page fault a page; the mail does not say how the legacy run logged"
    return Table(
        f"{_PART2}partitioned",
        "dirty_log_perf_test, 96 vCPUs, 3 GiB each, 4 KiB pages, GET re-arms; without and with the TDP MMU",
        f"migsim selftest dirty_log_perf_test -v 96 -b 3G -g {_SKYLAKE} --kernel 5.12",
        "s",
        (
            *figures_of(legacy, before, ", legacy"),
            *figures_of(protected, {"dirty": (3.949, logged)}, ", legacy, if it write-protected"),
            *figures_of(tdp, after, ", TDP MMU"),
        ),
    )


def _part2_legacy_after() -> Table:
    published: dict[str, Published] = {
        "populate": (110.917, _PREDICT), "enable": (5.196, _PREDICT), "dirty": (4.559, "as dirty, legacy, above"),
        "get": (0.879, _PREDICT), "disable": (3.278, _PREDICT),
    }  # fmt: skip
    run = dirty_log(vcpus=96, memory_per_vcpu=3 * GIB, manual=0, mmu="shadow", kernel=(5, 12))
    return Table(
        "The same series applied, TDP MMU off: no regression of the legacy MMU",
        "as above",
        f"migsim selftest dirty_log_perf_test -v 96 -b 3G -g {_SKYLAKE} --kernel 5.12 --mmu shadow",
        "s",
        tuple(figures_of(run, published)),
    )


def _part2_overlap() -> Table:
    guest: dict[str, Any] = {"vcpus": 96, "memory_per_vcpu": 64 * MIB, "manual": 0, "overlap": True}
    dearer = (
        "published, a page costs 60 ns more than partitioned, with either MMU: 0.1 s that is not MMU work and that "
        "nothing here charges"
    )
    getting = (
        "published, three times the partitioned run's time for a 48th of its pages, the same with either MMU: not MMU "
        "work, and nothing in the ioctl explains it"
    )
    before: dict[str, Published] = {
        "populate": (117.31, _PREDICT), "enable": (0.191, _PREDICT), "dirty": (0.193, _PREDICT), "get": (2.33, getting),
        "disable": (0.059, _PREDICT),
    }  # fmt: skip
    after: dict[str, Published] = {
        "populate": (141.155, _FIT), "enable": (0.245, dearer), "dirty": (0.236, _PREDICT), "get": (2.35, getting),
        "disable": (0.075, _PREDICT),
    }  # fmt: skip
    return Table(
        f"{_PART2}overlapping",
        "dirty_log_perf_test -o, 96 vCPUs over the same 6 GiB",
        f"migsim selftest dirty_log_perf_test -v 96 -b 64M -o -g {_SKYLAKE} --kernel 5.12",
        "s",
        (
            *figures_of(dirty_log(**guest, mmu="shadow", kernel=(5, 11)), before, ", legacy"),
            *figures_of(dirty_log(**guest, mmu="tdp", kernel=(5, 12)), after, ", TDP MMU"),
        ),
    )


def _huge_guest(vcpus: int = 96) -> dict[str, Any]:
    return {"vcpus": vcpus, "memory_per_vcpu": GIB, "backing": "anonymous_hugetlb_1gb"}


def _eager_v2() -> Table:
    published: tuple[tuple[int, bool, dict[str, Published]], ...] = (
        (3, False, {"CLEAR 1": (0.0496, _PREDICT), "dirty 2": (2.751, _PREDICT), "CLEAR 3": (1.3745, _FIT)}),
        (3, True, {"CLEAR 1": (1.668, _FIT), "dirty 2": (0.127, _PREDICT), "CLEAR 3": (1.4225, _PREDICT)}),
        (1, False, {"enable": (0.00168, _FIT), "dirty 1": (2.944, _PREDICT)}),
        (1, True, {"enable": (1.547, _PREDICT), "dirty 1": (0.146, _PREDICT)}),
    )
    rows: list[Figure] = []
    for manual, eager, phases in published:
        run = dirty_log(**_huge_guest(), kernel=(5, 18), iterations=3, manual=manual, eager_page_split=eager)
        how = f", {'INITIALLY_SET' if manual == 3 else 'not initially set'}, {'on' if eager else 'off'}"
        rows += figures_of(run, phases, how)
    return Table(
        "Eager page splitting for the TDP MMU, v2, January 2022 (merged as a3fe5dbd)",
        "dirty_log_perf_test, 96 vCPUs, 1 GiB each, 1 GiB HugeTLB; eager split off and on",
        f"migsim selftest dirty_log_perf_test -v 96 -i 3 -s anonymous_hugetlb_1gb {_SKYLAKE} --kernel 5.18",
        "s",
        tuple(rows),
    )


#: vCPUs to seconds of the first dirty pass: eager split off before, off after, on.
_SPLIT_ON_FAULT: Final = {
    2: (0.318, 0.296, 0.059), 8: (0.386, 0.297, 0.060), 32: (1.720, 0.313, 0.076), 96: (2.681, 0.674, 0.165),
}  # fmt: skip
_SPLIT_FITTED: Final = {(2, 1), (2, 2), (96, 1), (96, 2)}


def _split_on_fault() -> Table:
    rows: list[Figure] = []
    cases = (("zapped on fault", (6, 1), False), ("split on fault", (6, 2), False), ("eager split", (6, 2), True))
    for vcpus, published in _SPLIT_ON_FAULT.items():
        for column, (name, kernel, eager) in enumerate(cases):
            run = dirty_log(**_huge_guest(vcpus), kernel=kernel, eager_page_split=eager, manual=1)
            kind = _FIT if (vcpus, column) in _SPLIT_FITTED else _PREDICT
            rows += figures_of(run, {"dirty": (published[column], kind)}, f", {vcpus} vCPUs, {name}")
    return Table(
        "Split huge pages mapped by the TDP MMU on fault, October 2022 (6.2): the first dirty pass",
        "dirty_log_perf_test, 1 GiB a vCPU, 1 GiB HugeTLB",
        "migsim selftest dirty_log_perf_test -v 96 -s anonymous_hugetlb_1gb --no-initially-set --no-eager-page-split"
        f" {_SKYLAKE} --kernel 6.1",
        "s",
        tuple(rows),
    )


def _disable() -> Table:
    cases: tuple[tuple[str, str, tuple[int, int], Published], ...] = (
        (", TDP MMU, leaf by leaf (5.18)", "tdp", (5, 18), (200, _FIT)),
        (", TDP MMU, non-leaf SPTEs (5.19)", "tdp", (5, 19), (3, _PREDICT)),
        (", legacy MMU", "shadow", (5, 19), (4, _PREDICT)),
        (", TDP MMU, in place (6.13: about 3 times faster)", "tdp", (6, 13), (1, _PREDICT)),
    )
    rows: list[Figure] = []
    for name, mmu, kernel, published in cases:
        run = dirty_log(**_huge_guest(), kernel=kernel, mmu=mmu, manual=1)
        rows += figures_of(run, {"disable": published}, name)
    return Table(
        "Disabling dirty logging: Linux commit 5ba7c4c6, May 2022, and the merge text of 6.13",
        "96 vCPUs, 96 GiB, 1 GiB pages",
        f"migsim selftest dirty_log_perf_test -v 96 -s anonymous_hugetlb_1gb --no-initially-set {_SKYLAKE}"
        " --kernel 5.18",
        "s",
        tuple(rows),
    )


#: memslot_perf_test, 509 slots, ms: before (slot array) and after (trees, 5.17), and whether either was fitted.
_SLOTS: Final[dict[str, tuple[float, float, set[str]]]] = {
    "map": (24.6, 24.0, set()),
    "unmap": (83.3, 31.8, {"before"}),
    "unmap chunked": (1.77, 0.917, set()),
    "move active area": (0.0959, 0.0816, set()),
    "move inactive area": (0.0960, 0.0799, set()),
    "slot setup": (10.7, 8.25, {"after"}),
}


def _memslots() -> Table:
    rows = []
    for when, kernel in (("before", (5, 11)), ("after", (5, 17))):
        run = memslot_perf_test(Machine("shadow", kernel), load_profile("skylake-2s-96"), slots=510)
        for name, (before, after, fitted) in _SLOTS.items():
            each = run.figures["iterations"].get(name, {"ns-each": run.phase("RW: slot setup").time_ns})["ns-each"]
            published, kind = before if when == "before" else after, _FIT if when in fitted else _PREDICT
            rows.append(figure(f"{name}, {when}", published, each / 1e6, kind))
    return Table(
        "Scalable memslots implementation, patch of 1 February 2021 (merged, reworked, for 5.17)",
        "memslot_perf_test, 509 slots, Xeon 8167M, the legacy MMU: one iteration, and all slots made",
        f"migsim selftest memslot_perf_test -s 510 --mmu shadow {_SKYLAKE} --kernel 5.17",
        "ms",
        tuple(rows),
    )


def _initially_set() -> Table:
    def start(manual: int, kernel: tuple[int, int]) -> float:
        vm = Memstress(1, 128 * GIB, "shadow", kernel, backing="anonymous_thp", manual=manual)
        return thread_phase(vm.enable()[0], load_profile("skylake-2s-96")).time_ns / 1e6

    return Table(
        "Enable dirty log gradually in small chunks, Linux commit 3c9bd400, 2020 (5.7)",
        "Xeon Gold 6152, 128 GiB Windows guest: memory_global_dirty_log_start; 2 MiB pages assumed, not stated",
        f"migsim selftest dirty_log_perf_test -b 128G -s anonymous_thp --mmu shadow {_SKYLAKE} --kernel 5.7",
        "ms",
        (
            Figure("before", 460, start(1, (5, 6)), "predicted"),
            Figure("INITIALLY_SET", 10, start(3, (5, 7)), "predicted"),
        ),
    )


def _elsewhere() -> Table:
    host = load_profile("skylake-2s-96")
    gib = Memstress(1, GIB, manual=1)
    counts, armed = gib.enable()
    enable = thread_phase(counts, host).time_ns / 1e6

    def clear(percent: int) -> float:
        guest = Memstress(1, GIB, manual=1, write_percent=percent)
        return thread_phase(guest.clear(armed, first=False)[0], host).time_ns / 1e6

    slow, fast = (
        parallel_phase({"guest-write": 4, fault: 4}, 4, "exclusive-rmap", host).time_ns
        for fault in ("present-fault", "fast-fault")
    )
    heads, huge = 24 * GIB // PAGE_SIZE, 20 * GIB // (2 * MIB)
    stop = thread_phase({"rmap-visit": heads, "rmap-zap": 20 * GIB // PAGE_SIZE}, host).time_ns / 1e6
    stop_huge = thread_phase({"rmap-empty": heads, "rmap-zap": huge}, host).time_ns / 1e6
    fault, entry = host.ns("vm-exit") + host.ns("fast-page-fault"), host.ns("pml-entry")
    explained: tuple[tuple[str, float, float, str], ...] = (
        ("the same: CLEAR, ms/GiB", 1.5, clear(100), f"here every page is dirty; with a third of them it is "
         f"{clear(33):.2g}. The density is not stated"),
        ("the same: a re-dirtied page, ns", 260, fault, f"a fast page fault on Skylake; a PML entry is {entry:g} ns. "
         "Host not stated"),
        ("fast page fault, 2012: autotest 512.5 to 269.2 ms, ratio", 512.5 / 269.2, slow / fast,
         "the faults alone, 4 vCPUs assumed; the autotest also does what is not a fault"),
        ("QEMU 19310760: log stop and slot delete, 24 GiB, ms", 300, stop,
         f"4 KiB pages all through; with 2 MiB pages {stop_huge:.0f}. The backing is not stated"),
    )  # fmt: skip
    first = Figure("Cloud Hypervisor issue 8899: start_dirty_log, ms/GiB", 4.5, enable, "predicted")
    return Table(
        "Single figures whose setup is not fully stated",
        "as each row says",
        "migsim selftest dirty_log_perf_test --no-initially-set",
        "as stated",
        (first, *(Figure(what, published, value, "explained", note) for what, published, value, note in explained)),
    )
