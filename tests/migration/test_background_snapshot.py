"""background-snapshot: pages saved once, faults first, the guest still for a moment and slowed for a while."""

from __future__ import annotations

import heapq
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.write_tracking import Segment, TrackedWrites, fault_wait_s
from migsim.result import Result
from migsim.scenario import ScenarioError, build
from migsim.terminal import summary

PAGE_S, RELEASE_S = 2e-6, 3e-6


def snapshot_page_by_page(pages: int, vcpus: int, writes_per_s: float, seed: int) -> tuple[int, float, float]:
    """The rule, page at a time: (write faults, seconds until all are saved, share of its writes the guest made).

    vCPUs store to random pages; one whose page is not saved sleeps. Before each page the thread takes the first
    sleeper's page, else the next one from where it is.
    """
    draw, saved, at, now = random.Random(seed), [False] * pages, 0, 0.0
    think = vcpus / writes_per_s
    writers = [(draw.expovariate(1 / think), v) for v in range(vcpus)]
    heapq.heapify(writers)
    asleep: list[int] = []  # pages, first come first served; a page may be wanted twice
    faults = done = left = 0
    left = pages
    while left:
        while writers and writers[0][0] <= now:
            when, vcpu = heapq.heappop(writers)
            page = draw.randrange(pages)
            if saved[page]:
                done += 1
                heapq.heappush(writers, (when + draw.expovariate(1 / think), vcpu))
            else:
                asleep.append(page)
                faults += 1
        page = asleep[0] if asleep else at
        while saved[page]:
            page = (page + 1) % pages
        now += PAGE_S + RELEASE_S
        saved[page], at, left = True, (page + 1) % pages, left - 1
        for woken in [p for p in asleep if p == page]:
            done += 1
            heapq.heappush(writers, (now + draw.expovariate(1 / think), -1))
            asleep.remove(woken)
    return faults, now, done / (writes_per_s * now)


@pytest.mark.parametrize(("vcpus", "writes"), [(1, 20_000.0), (4, 60_000.0), (8, 400_000.0), (16, 2_000_000.0)])
def test_expectations_agree_with_the_rule_page_by_page(vcpus: int, writes: float) -> None:
    pages = 6000
    runs = [snapshot_page_by_page(pages, vcpus, writes, seed) for seed in range(4)]
    faults, seconds, share = (sum(run[i] for run in runs) / len(runs) for i in range(3))
    tracked = TrackedWrites([Segment(0, pages, 0, writes)], vcpus, 1, PAGE_S, PAGE_S, RELEASE_S, 0.0)
    used = made = 0.0
    while not tracked.done:
        _, _, took, got = tracked.run(1e-3)
        used, made = used + took, made + took * got
    assert used == pytest.approx(seconds, rel=1e-3), "each page once, whoever comes first"
    assert tracked.faults == pytest.approx(faults, rel=0.1)
    assert made / used == pytest.approx(share, abs=0.06)


@given(st.floats(1, 4096), st.floats(1e-7, 10.0), st.floats(1e-7, 1e-2))
def test_a_fault_waits_at_least_for_its_own_page_and_at_most_for_everybodys(
    v: float, think: float, serve: float
) -> None:
    wait = fault_wait_s(v, think, serve)
    assert serve * 0.999 <= wait <= serve * v * 1.001 + 1e-12


@given(
    st.lists(st.tuples(st.integers(64, 5000), st.floats(0, 1), st.floats(0, 1e6)), min_size=1, max_size=5),
    st.integers(1, 64), st.sampled_from([1, 512]), st.floats(1e-4, 1.0),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_page_is_saved_exactly_once(
    parts: list[tuple[int, float, float]], vcpus: int, host_page: int, step_s: float
) -> None:
    at, segments = 0, []
    for pages, zero, rate in parts:
        segments.append(Segment(at, at + pages, int(pages * zero), rate))
        at += pages
    tracked = TrackedWrites(segments, vcpus, host_page, PAGE_S, PAGE_S / 5, RELEASE_S, 1e-6)
    normal = zero_pages = seconds = 0.0
    for _ in range(100_000):
        if tracked.done:
            break
        data, zeros, used, share = tracked.run(step_s)
        assert 0 <= share <= 1 and used <= step_s * (1 + 1e-9)
        normal, zero_pages, seconds = normal + data, zero_pages + zeros, seconds + used
    assert tracked.done
    assert normal + zero_pages == pytest.approx(at, abs=1e-3 * len(segments) * host_page)
    assert seconds == pytest.approx(tracked.whole_s, rel=0.02, abs=1e-6)


def run(rate: str = "20000 pages/s", **tables: Any) -> Result:
    stream = {"pattern": "uniform", "rate": rate, "working-set": "128 MiB"}
    migration = {"capabilities": ["background-snapshot", "events"]} | tables.pop("migration", {})
    guest = {"memory": "512 MiB", "vcpus": 4, "zero": "25 %", "workload": [stream]} | tables.pop("guest", {})
    return simulation.run(build({"guest": guest, "migration": migration, **tables}), threads=1)


@pytest.mark.parametrize("compat", ["7.2", "10.0"])
def test_the_guest_runs_on_at_the_source_and_pages_go_out_once(compat: str) -> None:
    result = run(migration={"compat": compat})
    ram = result.migration["ram"]
    assert result.converged and result.exit_code == 0 and result.verify["lost-pages"] == 0
    assert (ram["normal"], ram["duplicate"], ram["dirty-sync-count"]) == (98304, 32768, 0)
    told = [e["data"]["status"] if "data" in e else e["event"] for e in result.events]
    assert told == ["setup", "active", "STOP", "RESUME", "completed"]
    assert "runs on" in result.verdict
    rest = ram["transferred"] - 98304 * 4104 - 32768 * 9 - 7
    assert (0 if compat == "7.2" else 4 << 20) < rest < (4 << 20) * (compat != "7.2") + 3000
    assert result.migration["downtime"] == sum(part.duration_ns for part in result.downtime) // 10**6


def test_max_bandwidth_is_not_heeded_and_the_link_is() -> None:
    limited, free = run(migration={"max-bandwidth": "1 MB/s"}), run(migration={"max-bandwidth": 0})
    assert limited.migration == free.migration
    slow = run(link={"bandwidth": "400 Mbit/s"})
    assert slow.migration["total-time"] > 3 * free.migration["total-time"]


def test_a_busy_guest_waits_for_its_pages_and_an_idle_one_for_nothing() -> None:
    idle, calm, busy = run("0 pages/s"), run("2000 pages/s"), run("500000 pages/s")
    faults = [r.host["snapshot"]["write-faults"] for r in (idle, calm, busy)]
    shares = [r.rounds[0].guest_throughput_share for r in (idle, calm, busy)]
    assert faults[0] == 0 < faults[1] < faults[2] <= 32768
    assert shares[0] >= shares[1] > shares[2] < 0.9
    assert busy.migration["total-time"] == pytest.approx(idle.migration["total-time"], rel=0.02)


def test_a_huge_page_is_saved_whole_before_its_writer_goes_on() -> None:
    small, huge = run("20000 pages/s"), run("20000 pages/s", guest={"backing": "2M"})
    waits = [r.host["snapshot"]["highest-mean-fault-wait-ns"] for r in (small, huge)]
    assert waits[1] > 100 * waits[0]
    protects = [next(p.duration_ns for p in r.downtime if p.name == "protect") for r in (small, huge)]
    assert protects[0] == 512 * protects[1]


def test_a_cancelled_snapshot_lets_the_guest_run() -> None:
    result = run(migration={"cancel-after": "200 ms"})
    assert result.migration == {"status": "cancelled"} and not result.converged
    assert result.verify["lost-pages"] == 0 and result.exit_code == 1
    assert [e["data"]["status"] for e in result.events if "data" in e][-2:] == ["cancelling", "cancelled"]


@pytest.mark.parametrize(
    ("migration", "problem"),
    [
        ({"capabilities": ["background-snapshot", name]}, f"Background-snapshot is not compatible with {name}")
        for name in ("postcopy-ram", "multifd", "return-path", "auto-converge", "xbzrle", "pause-before-switchover")
    ]
    + [({"capabilities": ["background-snapshot", "mapped-ram"]}, "accepts the pair")],
)
def test_what_cannot_be_is_refused(migration: dict[str, Any], problem: str) -> None:
    with pytest.raises(ScenarioError) as error:
        run(migration=migration)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("capability", "what"), [("background-snapshot", "background snapshot"), ("postcopy-ram", "postcopy migration")]
)
def test_qemu_refuses_a_snapshot_and_a_post_copy_of_a_guest_with_a_vfio_device(capability: str, what: str) -> None:
    guest = {"memory": "64 MiB", "vcpus": 1, "device": [{"name": "0000:b1:00.2", "stop-copy": "1 MiB"}]}
    with pytest.raises(ScenarioError, match=f"b1:00.2: VFIO migration is not supported with {what}"):
        build({"guest": guest, "migration": {"capabilities": [capability]}})


def test_a_snapshot_claims_no_page_that_was_not_compared() -> None:
    result = run()
    assert result.verify == {"lost-pages": 0, "pages-checked": 0, "bits-verified": 0}
    told = summary(result, 100)
    assert "pages counted, not followed" in told and "verified" not in told and "checked" not in told
