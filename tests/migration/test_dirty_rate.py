"""calc-dirty-rate and query-vcpu-dirty-limit: QEMU's estimators on the emulated guest, their bias, their refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import migsim
from migsim import dirty_rate
from migsim.host_costs import HostCosts
from migsim.migration.dirty_rate import (
    dirty_bitmap_rate,
    dirty_ring_rates,
    page_sampling_rate,
    reply,
    sampled_pages,
)
from migsim.migration.dirty_rate_commands import CalcDirtyRate, check_request, check_vcpu_limit
from migsim.migration.parameters import QmpError
from migsim.migration.policies.dirty_limit import DirtyLimit, query_vcpu_dirty_limit
from migsim.qemu_costs import QemuCosts
from migsim.result import DirtyRate
from migsim.scenario import Scenario, ScenarioError, build
from migsim.sim.prng import stream_key, word
from migsim.terminal import summary
from migsim.units import GIB, PAGE_SIZE
from migsim.world import World


def guest_of(commands: list[dict[str, Any]], memory: str = "512 MiB", **tables: Any) -> Scenario:
    stream = {"pattern": "uniform", "rate": "12000 pages/s", "working-set": "200 MiB", "vcpus": 2}
    guest = {"memory": memory, "vcpus": 4, "workload": [stream]} | tables.pop("guest", {})
    return build({"guest": guest, "calc-dirty-rate": commands, "migration": {"max-bandwidth": 0}, **tables})


def measure(*commands: dict[str, Any], **tables: Any) -> tuple[DirtyRate, ...]:
    return migsim.calc_dirty_rate(guest_of(list(commands), **tables))


# -- the estimators alone


def test_page_sampling_skips_small_blocks_never_takes_the_last_page_and_breaks_from_8_tib_on() -> None:
    assert len(sampled_pages(31, 16384, 0, 0)) == 0 and len(sampled_pages(32, 16384, 0, 0)) == 2
    assert len(sampled_pages((64 << 20) // PAGE_SIZE, 512, 0, 0)) == 32, "as a live 7.2.22 does"
    assert len(sampled_pages(4 * GIB // PAGE_SIZE, 512, 0, 0)) == 2048
    assert sampled_pages(1 << 15, 16384, 0, 0).max() < (1 << 15) - 1
    assert not sampled_pages((1 << 31) + 1, 128, 0, 0).any(), "a negative range, which GLib answers with 0"


@given(st.integers(1 << 15, 1 << 22), st.integers(128, 2048), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_samples_are_the_words_of_their_stream(pages: int, per_gib: int, seed: int) -> None:
    chosen = sampled_pages(pages, per_gib, seed, 3)
    key = stream_key(seed, 11, 3)
    assert chosen[:50].tolist() == [word(key, i) % (pages - 1) for i in range(min(50, len(chosen)))]


def test_rates_round_down_where_qemu_does() -> None:
    assert page_sampling_rate(256, 512, 1024, 1000) == 512 and page_sampling_rate(1, 512, 1024, 3000) == 0
    assert dirty_bitmap_rate(25_600, 1000) == 100 and dirty_bitmap_rate(255, 1000) == 0
    assert dirty_ring_rates([25_600, 300], 1000) == [100, 1]
    measured = reply(CalcDirtyRate(1000, "dirty-ring"), "10.0", 7, [100, 1])
    assert measured["dirty-rate"] == 101 and measured["sample-pages"] == 0
    assert reply(CalcDirtyRate(1000, "dirty-bitmap"), "7.2", 7, None)["sample-pages"] == 512, "0 only once measured"


def test_query_vcpu_dirty_limit_lists_limited_vcpus_only() -> None:
    limit = DirtyLimit(vcpus=3, ring_size=4096)
    limit.set_limit(50, 1)
    assert query_vcpu_dirty_limit(limit, [5, 60, 7]) == [{"cpu-index": 1, "limit-rate": 50, "current-rate": 60}]
    assert query_vcpu_dirty_limit(None, []) == []


# -- on the emulated guest


def test_the_bitmap_finds_exactly_the_pages_that_were_written() -> None:
    (found,) = measure({"mode": "dirty-bitmap", "calc-time": "1 s"})
    pages = found.cost["dirty-pages"]
    assert pages * PAGE_SIZE / (1 << 20) == pytest.approx(found.distinct_rate, abs=1e-5)
    assert found.reply["dirty-rate"] == pages * PAGE_SIZE >> 20
    assert found.cost["reset-ns"] > 0 and found.cost["guest-throughput-share"] < 1.0, "logging costs the guest"


def test_a_sample_is_dirty_exactly_if_the_guest_wrote_to_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page sampled: the rate is then the distinct rate but for the last page, which is never drawn."""
    import numpy as np

    monkeypatch.setattr(
        dirty_rate, "sampled_pages", lambda pages, *_: np.arange(pages if pages >= 1 << 15 else 0, dtype=np.int64)
    )
    (found,) = measure({"calc-time": "1 s"})
    assert found.reply["dirty-rate"] == int(found.distinct_rate)


@pytest.mark.parametrize("mode", ["page-sampling", "dirty-bitmap"])
def test_a_longer_measurement_gives_a_smaller_rate_although_the_guest_writes_as_fast(mode: str) -> None:
    deep = {"sample-pages": 16384} if mode == "page-sampling" else {}
    first, second = (
        {"mode": mode, "calc-time": time, "at": at, **deep} for time, at in (("1 s", "0 s"), ("20 s", "2 s"))
    )
    short, long = measure(first, second)
    assert short.write_rate == pytest.approx(long.write_rate, rel=0.01)
    assert long.reply["dirty-rate"] < short.reply["dirty-rate"] / 2 < short.write_rate


def test_a_small_sample_errs_and_a_large_one_hits() -> None:
    small, large = measure({"calc-time": "1 s"}, {"calc-time": "1 s", "at": "1 s", "sample-pages": 16384})
    assert large.reply["dirty-rate"] == pytest.approx(large.distinct_rate, rel=0.06)
    assert small.cost["sampled-pages"] == 256 and large.cost["sampled-pages"] == 8192


def test_the_first_pass_of_a_huge_sample_takes_longer_than_was_asked_for() -> None:
    (found,) = measure({"calc-time": "50 ms", "sample-pages": 16384}, memory="16 GiB", guest={"workload": []})
    assert found.elapsed_ns > 300_000_000 and found.reply["calc-time"] == found.elapsed_ns // 1_000_000


RING = {"kvm": {"dirty-ring-size": 1024}, "memory": "128 MiB"}
WRITERS = {"pattern": "uniform", "working-set": "32 MiB"}


def test_a_ring_counts_each_vcpu_and_a_page_again_after_each_reap() -> None:
    streams = [{**WRITERS, "rate": "6000 pages/s", "vcpus": 2}, {**WRITERS, "rate": "1000 pages/s"}]
    (found,) = measure({"mode": "dirty-ring", "calc-time": "2 s"}, **RING, guest={"workload": streams})
    each = [row["dirty-rate"] for row in found.reply["vcpu-dirty-rate"]]
    assert len(each) == 4 and each[0] > 5 * each[3] and abs(each[0] - each[1]) <= 1
    assert found.reply["dirty-rate"] == sum(each)
    assert found.cost["reaps"] > found.cost["ring-full-exits"] > 0
    assert found.distinct_rate < found.cost["ring-entries"] / 256 / 2 < found.write_rate


def test_a_ring_that_never_fills_and_is_reaped_once_counts_distinct_pages() -> None:
    slow = [{**WRITERS, "rate": "300 pages/s", "vcpus": 1}]
    ring = {**RING, "kvm": {"dirty-ring-size": 65536}}
    (found,) = measure({"mode": "dirty-ring", "calc-time": "100 ms"}, **ring, guest={"workload": slow})
    assert found.cost["ring-full-exits"] == 0
    assert found.cost["ring-entries"] == round(found.distinct_rate * 256 / 10)


def test_the_fused_loops_and_the_readable_ones_measure_alike() -> None:
    scenario = guest_of([{"mode": "dirty-bitmap", "calc-time": "1 s"}, {"calc-time": "1 s", "at": "1 s"}], "256 MiB")
    fused, readable = (dirty_rate.measure(scenario, 3, fused=fused) for fused in (True, False))
    assert [r.reply for r in fused] == [r.reply for r in readable]
    assert [r.distinct_rate for r in fused] == [r.distinct_rate for r in readable]


@pytest.mark.parametrize(
    ("rate", "pages", "qemu"),
    [(12_000, 51_200, 41), (12_000, 16_384, 33), (2_000, 65_536, 7)],
    ids=["12k in 200 MiB", "12k in 64 MiB", "2k in 256 MiB"],
)
def test_the_bitmap_mode_answers_what_qemu_7_2_answered_under_kvm(rate: int, pages: int, qemu: int) -> None:
    """Recorded with QEMU 7.2.22: a guest that writes uniformly, calc-time 1 s."""
    stream = {"pattern": "uniform", "rate": f"{rate} pages/s", "working-set": pages * PAGE_SIZE}
    (found,) = measure({"mode": "dirty-bitmap", "calc-time": "1 s"}, guest={"workload": [stream]})
    assert abs(found.reply["dirty-rate"] - qemu) <= 1
    assert found.reply["dirty-rate"] == pytest.approx(pages * -math.expm1(-rate / pages) / 256, rel=0.03, abs=1)


def test_measuring_changes_nothing_of_the_migration() -> None:
    asked = guest_of([{"mode": "dirty-bitmap", "calc-time": "1 s"}])
    plain = guest_of([])
    with_rates, without = migsim.run(asked, threads=1), migsim.run(plain, threads=1)
    assert with_rates.migration == without.migration and with_rates.rounds == without.rounds
    assert len(with_rates.dirty_rate) == 1 and not without.dirty_rate
    assert max(map(len, summary(with_rates, 60).splitlines())) <= 60
    told = summary(with_rates, 100)
    assert "dirty-bitmap, 1 s" in told and f"{with_rates.dirty_rate[0].reply['dirty-rate']}" in told


def test_phases_of_the_workload_are_seen_when_the_command_is_given_in_them() -> None:
    stream = {
        "pattern": "uniform", "rate": "12000 pages/s", "working-set": "200 MiB",
        "phases": [{"at": "10 s", "rate-factor": 0.1}],
    }  # fmt: skip
    before, after = measure(
        {"mode": "dirty-bitmap", "calc-time": "1 s", "at": "5 s"},
        {"mode": "dirty-bitmap", "calc-time": "1 s", "at": "12 s"},
        guest={"workload": [stream]},
    )
    assert after.reply["dirty-rate"] < before.reply["dirty-rate"] / 5 and after.reply["start-time"] == 12


# -- refusals


@pytest.mark.parametrize(
    ("request_", "compat", "ring", "text"),
    [
        (CalcDirtyRate(61_000), "7.2", False, "calc-time is out of range[1, 60]."),
        (CalcDirtyRate(49), "10.0", False, "calc-time is out of range[50, 60000]."),
        (CalcDirtyRate(1000, "dirty-bitmap"), "10.0", True, "mode dirty-bitmap is not enabled"),
        (CalcDirtyRate(1000, "dirty-ring"), "10.0", False, "mode dirty-ring is not enabled"),
        (CalcDirtyRate(1000, "dirty-ring", 512), "10.0", True, "sample-pages is used only in page-sampling mode"),
        (CalcDirtyRate(1000, "dirty-ring", 512), "7.2", True, "either sample-pages or dirty-ring can be specified."),
        (CalcDirtyRate(1000, "page-sampling", 1), "7.2", False, "sample-pages is out of range[128, 16384]."),
    ],
)
def test_calc_dirty_rate_refuses_what_qemu_refuses(request_: CalcDirtyRate, compat: str, ring: bool, text: str) -> None:
    with pytest.raises(QmpError) as refusal:
        check_request(request_, compat, dirty_ring=ring)  # type: ignore[arg-type]
    assert text in refusal.value.desc


def test_qemu_7_2_refuses_page_sampling_in_the_same_words(qemu: Any) -> None:
    for seconds in (-1, 0, 1, 60, 61):
        for pages in (127, 128, 16384, 16385):
            request = CalcDirtyRate(seconds * 1000, "page-sampling", pages)
            try:
                check_request(request, "7.2", dirty_ring=False)
            except QmpError as refusal:
                arguments = {"calc-time": seconds, "sample-pages": pages}
                assert qemu.answer("calc-dirty-rate", **arguments)["error"] == refusal.answer()
            else:
                assert seconds in (1, 60) and pages in (128, 16384)


def test_qemu_7_2_refuses_vcpu_limits_without_rings_in_the_same_words(qemu: Any) -> None:
    for arguments in ({"dirty-rate": 1}, {"dirty-rate": 0, "cpu-index": 99}):
        with pytest.raises(QmpError) as refusal:
            check_vcpu_limit(arguments.get("cpu-index"), 1, dirty_ring=False)
        assert qemu.answer("set-vcpu-dirty-limit", **arguments)["error"] == refusal.value.answer()
    assert qemu.answer("query-vcpu-dirty-limit")["return"] == query_vcpu_dirty_limit(None, [])


@pytest.mark.parametrize(
    ("commands", "tables", "problem"),
    [
        ([{"calc-time": "61 s"}], {}, "calc-time is out of range[50, 60000]."),
        ([{"calc-time": "5 s"}, {"calc-time": "1 s", "at": "4 s"}], {}, "the dirty rate is already being measured."),
        ([{"calc-time": "1 s", "mode": "dirty-ring"}], {}, "is not enabled, use other method"),
        ([{"calc-time": "1500 ms"}], {"migration": {"compat": "7.2"}}, "whole seconds"),
        (
            [{"calc-time": "1 s", "mode": "dirty-bitmap"}],
            {"migration": {"compat": "7.2"}, "kvm": {"accel": "tcg"}},
            "SIGSEGV",
        ),
        ([{"calc-time": "1500 us"}], {}, "whole number of ms"),
        ([{"calc-time": "1 s", "mode": "dirty-page"}], {}, "must be one of"),
        ([{"mode": "dirty-bitmap"}], {}, "calc-time: is missing"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused_in_one_sentence(
    commands: list[dict[str, Any]], tables: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ScenarioError) as error:
        guest_of(commands, **tables)
    told = str(error.value)
    assert problem in told and told.startswith("calc-dirty-rate.") and "\n" not in told


def test_a_measurements_cost_is_the_hosts() -> None:
    """The whole reset is one call a memslot, its pages priced as CLEAR's."""
    scenario = guest_of([{"mode": "dirty-bitmap", "calc-time": "1 s"}])
    host = HostCosts(scenario)
    costs = QemuCosts(scenario, host.priced())
    (found,) = migsim.calc_dirty_rate(scenario)
    slots = len(World(scenario, costs, 0, bulk=True).slots)
    pages = scenario.guest.pages
    page_ns = costs.ns("kvm_clear_page") + costs.ns("kvm_clear_leaf")
    expected = pages * page_ns + slots * costs.ns("kvm_clear")
    assert found.cost["reset-ns"] == pytest.approx(expected, rel=0.01)
