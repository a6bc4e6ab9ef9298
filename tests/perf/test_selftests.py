"""The selftests on the model: the seed's two figures, the rules that make the difference, the command line."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.cli import main
from migsim.perf.memstress import Memstress
from migsim.perf.profile import load_profile
from migsim.perf.rules import MMUS
from migsim.selftest.access_tracking_perf import access_tracking_perf_test
from migsim.selftest.demand_paging import demand_paging_test
from migsim.selftest.dirty_log_perf import dirty_log_perf_test
from migsim.selftest.memslot_perf import TESTS, Machine, memslot_perf_test
from migsim.selftest.options import NAMES
from migsim.units import GIB, MIB

_SKYLAKE = load_profile("skylake-2s-96")


def _selftest(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["selftest", *arguments, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def test_the_seed_s_two_figures(capsys: pytest.CaptureFixture[str]) -> None:
    guest = ("demand_paging_test", "--vcpus", "416", "--memory-per-vcpu", "4GiB")
    shadow = _selftest(capsys, *guest, "--mmu", "shadow")
    tdp = _selftest(capsys, *guest, "--mmu", "tdp")
    assert shadow["lock-waiting-share"] == pytest.approx(0.98, abs=0.01)
    assert 1 - tdp["total-time-ns"] / shadow["total-time-ns"] == pytest.approx(0.89, abs=0.02)  # type: ignore[operator]
    assert tdp["lock-waiting-share"] < 0.05  # type: ignore[operator]


def test_the_exclusive_lock_of_5_10_keeps_most_of_the_waiting() -> None:
    runs = {mmu: demand_paging_test(Memstress(416, 4 * GIB, mmu), load_profile()) for mmu in MMUS}
    times = [runs[mmu].total_time_ns for mmu in MMUS]
    assert times == sorted(times, reverse=True)
    assert runs["tdp-5.10"].lock_waiting_share > 0.9


@given(vcpus=st.integers(1, 416), pages=st.integers(512, 4096), mmu=st.sampled_from(MMUS))
@settings(max_examples=30, deadline=None)
def test_more_memory_takes_longer_and_shares_stay_shares(vcpus: int, pages: int, mmu: str) -> None:
    less, more = (dirty_log_perf_test(Memstress(vcpus, size * 4096, mmu), _SKYLAKE) for size in (pages, 2 * pages))
    assert less.total_time_ns < more.total_time_ns
    assert all(0 <= phase.lock_waiting_share <= 1 for phase in less.phases)


def test_initially_set_moves_the_cost_from_enable_to_clear() -> None:
    guest = {"vcpus": 96, "memory_per_vcpu": GIB, "backing": "anonymous_hugetlb_1gb"}
    at_once = dirty_log_perf_test(Memstress(**guest, manual=1), _SKYLAKE)  # type: ignore[arg-type]
    in_chunks = dirty_log_perf_test(Memstress(**guest, manual=3), _SKYLAKE)  # type: ignore[arg-type]
    enable, clear = "enabling dirty logging", "iteration 1 clear dirty log"
    assert in_chunks.phase(enable).time_ns < at_once.phase(enable).time_ns / 100
    assert in_chunks.phase(clear).time_ns > at_once.phase(clear).time_ns


def test_userfaultfd_makes_the_host_mm_the_bottleneck_of_the_tdp_mmu() -> None:
    plain, uffd = (demand_paging_test(Memstress(416, 4 * GIB), load_profile(), uffd=u) for u in ("none", "MISSING"))
    assert uffd.total_time_ns > 2 * plain.total_time_ns
    assert uffd.lock_waiting_share < 0.01


def test_aging_without_ad_bits_makes_the_next_touch_fault() -> None:
    with_ad, without = (
        access_tracking_perf_test(Memstress(8, 256 * MIB, ad_bits=ad), _SKYLAKE) for ad in (True, False)
    )
    assert without.phase("Writing to idle memory").time_ns > 3 * with_ad.phase("Writing to idle memory").time_ns


def test_a_slot_change_copied_every_slot_before_5_17() -> None:
    old, new = (memslot_perf_test(Machine(kernel=k), _SKYLAKE).figures["iterations"] for k in ((5, 16), (5, 17)))
    assert old["move inactive area"]["ns-each"] > 2 * new["move inactive area"]["ns-each"]
    assert old["unmap"]["ns-each"] > 2 * new["unmap"]["ns-each"], "and a host address was looked for slot by slot"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("demand_paging_test", "--vcpus", "0"), "from 1 to 4096"),
        (("demand_paging_test", "--vcpus", "4097"), "from 1 to 4096"),
        (("demand_paging_test", "--vcpus", "9" * 5000), "from 1 to 4096"),
        (("demand_paging_test", "-v", "4096", "-b", "2T"), "physical addresses of 52 bits"),
        (("demand_paging_test", "-o", "-b", "5000TiB"), "physical addresses of 52 bits"),
        (("demand_paging_test", "-o", "-v", "4096", "-b", "2T"), "physical addresses of 52 bits"),
        (("demand_paging_test", "-r", "0"), "from 1 to 4096"),
        (("demand_paging_test", "-c", "1,2"), "-c is not modelled: every vCPU has a CPU of its own"),
        (("demand_paging_test", "-m", "2"), "-m is not modelled: x86 has one guest mode"),
        (("dirty_log_perf_test", "-e"), "-e is not modelled: vCPUs stand still"),
        (("dirty_log_perf_test", "-n"), "-n is not modelled: the guest is not nested"),
        (("dirty_log_perf_test", "-x", "3"), "cannot be evenly divided into 3 slots"),
        (("access_tracking_perf_test", "-w", "1"), "-w is not modelled"),
        (("memslot_perf_test", "--vcpus", "4"), "--vcpus"),
        (("memslot_perf_test", "-s", "1"), "from 2 to 32764"),
        (("memslot_perf_test", "-f", "3", "-e", "2"), "cannot be greater than"),
        (("no_such_test",), "no_such_test"),
        ((), "NAME"),
        (("demand_paging_test", "-d", "-1"), "from 0 to 60000000"),
        (("dirty_log_perf_test", "-i", "1000000000"), "from 2 to 10000"),
        (("dirty_log_perf_test", "-w", "101"), "from 0 to 100"),
        (("memslot_perf_test", "-l", "0"), "from 1 to 86400"),
        (("demand_paging_test", "-b", "5000"), "whole pages"),
        (("demand_paging_test", "-u", "MINOR"), "shared memory"),
        (("dirty_log_perf_test", "-i", "1"), "from 2 to 10000"),
        (("dirty_log_perf_test", "-u", "MISSING"), "unrecognized arguments: -u MISSING"),
        (("dirty_log_perf_test", "--kernel", "5.4"), "the TDP MMU came in 5.10"),
        (("memslot_perf_test", "-s", "40000"), "from 2 to 32764"),
        (("dirty_log_perf_test", "--host", "nowhere"), "no host profile"),
        (("dirty_log_perf_test", "--host", "/"), "/: is not a host profile: it is not a regular file"),
        (("dirty_log_perf_test", "--host", "/dev/zero"), "it is not a regular file"),
        (("dirty_log_perf_test", "--host", "a\0b"), "null byte"),
        (("dirty_log_perf_test", "--json", "/nonexistent/x"), "No such file or directory"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    try:
        code = main(["selftest", *arguments])
    except SystemExit as stop:  # argparse
        assert stop.code == 2
    else:
        assert code == 2
    out, error = capsys.readouterr()
    assert complaint in error
    assert (out, error.count("\n")) == ("", 1)


#: What the kernel's own tests print (Linux 6.18), numbers blanked out.
_PRINTED = {
    "demand_paging_test": """Random seed: 0x6b8b4567
Testing guest mode: PA-bits:ANY, VA-bits:48,  4K pages
guest physical test memory: [#, #)
Finished creating vCPUs and starting uffd threads
Started all vCPUs
All vCPU threads joined
Total guest execution time:\t#s
Per-vcpu demand paging rate:\t# pgs/sec/vcpu
Overall demand paging rate:\t# pgs/sec
""",
    "dirty_log_perf_test": """Random seed: 0x6b8b4567
Test iterations: #
Testing guest mode: PA-bits:ANY, VA-bits:48,  4K pages
Random seed: #
guest physical test memory: [#, #)
Populate memory time: #s
Enabling dirty logging time: #s

Iteration # dirty memory time: #s
Iteration # get dirty log time: #s
Iteration # clear dirty log time: #s
Iteration # dirty memory time: #s
Iteration # get dirty log time: #s
Iteration # clear dirty log time: #s
Disabling dirty logging time: #s
Get dirty log over # iterations took #s. (Avg #s/iteration)
Clear dirty log over # iterations took #s. (Avg #s/iteration)
""",
    "access_tracking_perf_test": """Random seed: 0x6b8b4567
Using page_idle for aging
Testing guest mode: PA-bits:ANY, VA-bits:48,  4K pages
guest physical test memory: [#, #)

Populating memory             : #s
Writing to populated memory   : #s
Reading from populated memory : #s
Mark memory idle (page_idle)  : #s
Writing to idle memory        : #s
Mark memory idle (page_idle)  : #s
Reading from idle memory      : #s
""",
    "memslot_perf_test": """Random seed: 0x6b8b4567
Testing map performance with # runs, # seconds each
Memslot count too high for this test, decrease the cap (max is #)

Testing unmap performance with # runs, # seconds each
Test took #s for slot setup + #s all iterations
Done # iterations, avg #s each
Best runtime result was #s per iteration (with # iterations)
""",
}
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?")
_FIXED = ("Random seed: 0x6b8b4567", "Testing guest mode: PA-bits:ANY, VA-bits:48,  4K pages")


@pytest.mark.parametrize("name", NAMES)
def test_every_selftest_prints_the_kernel_test_s_lines_and_the_total(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["selftest", name]) == 0
    out = capsys.readouterr().out.splitlines()
    blanked = "".join(f"{line if line in _FIXED else _NUMBER.sub('#', line)}\n" for line in out)
    assert blanked.startswith(_PRINTED[name])
    assert "Total time: #s" in blanked and "Time waiting for mmu_lock: # %" in blanked


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("name", NAMES)
def test_every_selftest_s_json_has_phases_total_and_share(
    capsys: pytest.CaptureFixture[str], name: str, mmu: str
) -> None:
    result = _selftest(capsys, name, "--mmu", mmu)
    phases = result["phases"]
    assert isinstance(phases, list) and phases
    assert all(phase["time-ns"] > 0 and 0 <= phase["lock-waiting-share"] <= 1 for phase in phases)
    assert sum(phase["time-ns"] for phase in phases) == result["total-time-ns"]
    assert 0 <= result["lock-waiting-share"] <= 1  # type: ignore[operator]


def test_a_page_met_more_than_once_counts_once() -> None:
    guest = {"vcpus": 8, "memory_per_vcpu": MIB}
    rng = random.Random(3)
    pages = Memstress(**guest).pages
    at_random = len({rng.randrange(pages) for _ in range(pages) if rng.random() < 0.5})
    overlapped = sum(any(rng.random() < 0.5 for _ in range(8)) for _ in range(pages))
    assert Memstress(**guest, random_access=True, write_percent=50).written == pytest.approx(at_random, rel=0.06)
    assert Memstress(**guest, overlap=True, write_percent=50).written == pytest.approx(overlapped, rel=0.06)


def test_one_userfaultfd_with_one_reader_holds_everybody_up() -> None:
    vm, more = Memstress(96, 64 * MIB), {"uffd": "MISSING", "uffd_delay_us": 10}
    each, one, sixteen = (
        demand_paging_test(vm, _SKYLAKE, **more, **how).total_time_ns  # type: ignore[arg-type]
        for how in ({}, {"single_uffd": True}, {"single_uffd": True, "readers": 16})
    )
    assert one > 10 * each
    assert sixteen == pytest.approx(max(one / 16, each), rel=1e-6)


def test_a_memslot_test_that_has_too_many_slots_says_how_many_would_do() -> None:
    run = memslot_perf_test(Machine(), _SKYLAKE, slots=8210)
    assert "Memslot count too high for this test, decrease the cap (max is 8209)" in run.lines
    assert "map" not in run.figures["iterations"]
    assert set(memslot_perf_test(Machine(), _SKYLAKE, slots=8209).figures["iterations"]) == set(TESTS)


def test_phases_add_up_to_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    result = _selftest(capsys, "dirty_log_perf_test", "-v", "96", "-b", "3G", "-g")
    phases = result["phases"]
    assert isinstance(phases, list)
    assert sum(phase["time-ns"] for phase in phases) == result["total-time-ns"]
