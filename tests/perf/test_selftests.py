"""The selftests on the model: the seed's two figures, the rules that make the difference, the command line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim.cli import main
from migsim.perf.memstress import Memstress
from migsim.perf.profile import load_profile
from migsim.perf.rules import MMUS
from migsim.selftest import command
from migsim.selftest.access_tracking_perf import access_tracking_perf_test
from migsim.selftest.demand_paging import demand_paging_test
from migsim.selftest.dirty_log_perf import dirty_log_perf_test
from migsim.selftest.memslot_perf import SLOTS_MAX, memslot_perf_test
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
    old, new = (memslot_perf_test(Memstress(kernel=k), _SKYLAKE) for k in ((5, 16), (5, 17)))
    assert old.phase("move inactive area").time_ns > new.phase("move inactive area").time_ns


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("demand_paging_test", "--vcpus", "0"), "from 1 to 4096"),
        (("demand_paging_test", "--vcpus", "4097"), "from 1 to 4096"),
        (("demand_paging_test", "--vcpus", "9" * 5000), "from 1 to 4096"),
        (("demand_paging_test", "-v", "4096", "-b", "2T"), "physical addresses of 52 bits"),
        (("demand_paging_test", "-o", "-b", "5000TiB"), "physical addresses of 52 bits"),
        (("demand_paging_test", "-d", "-1"), "from 0 to 60000000"),
        (("dirty_log_perf_test", "-i", "1000000000"), "from 2 to 10000"),
        (("dirty_log_perf_test", "-w", "101"), "from 0 to 100"),
        (("memslot_perf_test", "-l", "0"), "from 1 to 86400"),
        (("demand_paging_test", "-b", "5000"), "whole pages"),
        (("demand_paging_test", "-u", "MINOR"), "shared memory"),
        (("dirty_log_perf_test", "-i", "1"), "from 2 to 10000"),
        (("dirty_log_perf_test", "-u", "MISSING"), "belongs to demand_paging_test"),
        (("dirty_log_perf_test", "--kernel", "5.4"), "the TDP MMU came in 5.10"),
        (("memslot_perf_test", "-n", "40000"), "from 1 to 32763"),
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


def test_overlapping_vcpus_share_one_memory(capsys: pytest.CaptureFixture[str]) -> None:
    _selftest(capsys, "demand_paging_test", "-v", "4096", "-b", "2T", "-o")


def test_the_most_slots_are_the_tests_own() -> None:
    assert command._SLOTS_MAX == SLOTS_MAX


@pytest.mark.parametrize(
    "name", ["demand_paging_test", "dirty_log_perf_test", "access_tracking_perf_test", "memslot_perf_test"]
)
def test_every_selftest_prints_its_lines_and_the_total(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["selftest", name, "--vcpus", "4"]) == 0
    out = capsys.readouterr().out
    assert "Total time:" in out
    assert "Time waiting for mmu_lock:" in out


def test_phases_add_up_to_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    result = _selftest(capsys, "dirty_log_perf_test", "-v", "96", "-b", "3G", "-g")
    phases = result["phases"]
    assert isinstance(phases, list)
    assert sum(phase["time-ns"] for phase in phases) == result["total-time-ns"]
