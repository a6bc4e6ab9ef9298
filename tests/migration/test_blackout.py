"""The blackout: what counts as it, what may call it off, what each part pays; and counters that must add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim import simulation
from migsim.expectation import surprises
from migsim.migration.events import expected_order
from migsim.migration.marked import runs
from migsim.perf.migration_thread import clear_cost
from migsim.perf.profile import load_profile
from migsim.perf.rules import default_kernel, rules_for
from migsim.planes import Plane
from migsim.quantities import clock
from migsim.result import Result
from migsim.scenario import ScenarioError, build
from migsim.units import CHUNK_PAGES, NS_PER_MS


def run(**migration: Any) -> Result:
    expect = migration.pop("expect", None)
    stream = {"pattern": "uniform", "rate": "60000 pages/s", "working-set": "64 MiB"}
    document: dict[str, Any] = {
        "guest": {"memory": "128 MiB", "vcpus": 2, "zero": 0.1, "device-state": "2 MiB", "workload": [stream]},
        "migration": {"max-bandwidth": "50 MB/s", "time-limit": "30 s", "downtime-limit": 50, **migration},
        "link": {"bandwidth": "1 Gbit/s"},
    }
    return simulation.run(build(document | ({"expect": expect} if expect else {})), threads=1)


def parts(result: Result) -> dict[str, int]:
    return {part.name: part.duration_ns for part in result.downtime}


def test_a_guest_suspended_by_timeout_is_in_its_blackout_from_that_moment() -> None:
    after = {"platform": "libvirt-timeout-suspend", "platform-timeout": "4 s"}
    result = run(expect={"converged": True, "downtime": ["0 s", "500 ms"]}, **after)
    blackout_ns = sum(parts(result).values())
    assert parts(result)["suspended"] > 500 * NS_PER_MS > result.migration["downtime"] * NS_PER_MS
    assert blackout_ns == pytest.approx(result.migration["total-time"] * NS_PER_MS - 4e9, abs=150 * NS_PER_MS)
    assert "suspended by --timeout" in result.verdict and clock(blackout_ns) in result.verdict
    assert any("downtime" in text for text in surprises(result))


@pytest.mark.parametrize("compat", ["7.2", "10.0"])
@pytest.mark.parametrize("limit", ["time-limit", "cancel-after"])
def test_a_cancel_in_pre_switchover_brings_the_guest_back(compat: str, limit: str) -> None:
    held: dict[str, Any] = {"capabilities": ["pause-before-switchover"], "switchover-pause": "20 s", "compat": compat}
    result = run(**held, **{"max-bandwidth": 0, "downtime-limit": 900, limit: "9 s"})
    assert not result.converged and result.migration == {"status": "cancelled"}
    said = {"time-limit": "within the time-limit of 9 s", "cancel-after": "Cancelled by the operator"}
    assert said[limit] in result.verdict and result.downtime == ()


def test_a_pause_that_ends_before_the_limit_completes_and_counts() -> None:
    result = run(
        capabilities=["pause-before-switchover"],
        **{"max-bandwidth": 0, "downtime-limit": 900, "switchover-pause": "2 s"},
    )
    assert result.converged and parts(result)["pre-switchover"] == 2_000 * NS_PER_MS


def test_a_cancel_while_device_state_is_sent_is_heeded() -> None:
    quick: dict[str, Any] = {"max-bandwidth": 0, "downtime-limit": 900}
    done = run(**quick)
    assert done.converged
    late = done.migration["total-time"] - 2
    assert not run(**quick, **{"cancel-after": f"{late} ms"}).converged


@pytest.mark.parametrize("compat", ["7.2", "10.0"])
@pytest.mark.parametrize("capabilities", [[], ["multifd"], ["xbzrle"], ["postcopy-ram"]])
def test_the_bytes_of_the_phases_add_up_to_what_ram_sent(compat: str, capabilities: list[str]) -> None:
    switch = {"postcopy-after": "3 s"} if "postcopy-ram" in capabilities else {"downtime-limit": 2000}
    result = run(compat=compat, capabilities=capabilities, **switch)
    ram = result.migration["ram"]
    assert result.converged
    rest = ram["transferred"] - sum(ram[f"{phase}-bytes"] for phase in ("precopy", "downtime", "postcopy", "multifd"))
    if compat == "7.2":
        assert rest == 0
    else:
        assert 0 < rest - (2 << 20) < 100_000, "device state; setup, framing and post-copy's commands"
    last = result.rounds[-1]
    if not capabilities:  # pages of the block named last, without the section's end marker
        assert ram["downtime-bytes"] == last.sent_pages * 4104 + last.zero_pages * 9
    assert ("multifd" in capabilities) == (ram["multifd-bytes"] > ram["precopy-bytes"])


def test_the_post_copy_switch_pays_for_device_state_and_waits_for_the_client() -> None:
    switch: dict[str, Any] = {"postcopy-after": "3 s", "switchover-pause": "1 s"}
    result = run(capabilities=["postcopy-ram", "pause-before-switchover"], **switch)
    assert parts(result)["pre-switchover"] == 1_000 * NS_PER_MS
    assert parts(result)["device"] >= (2 << 20) * 8  # ns of 2 MiB at 1 Gbit/s
    plain = run(capabilities=["postcopy-ram"], **{"postcopy-after": "3 s"}).migration["ram"]
    ram = result.migration["ram"]
    assert ram["downtime-bytes"] == plain["downtime-bytes"] == 0, "device state and discard commands are not RAM's"


def test_post_copy_is_slowed_by_its_own_bandwidth_and_nothing_calls_it_off() -> None:
    switch: dict[str, Any] = {"capabilities": ["postcopy-ram"], "postcopy-after": "3 s", "time-limit": "6 s"}
    fast, slow = run(**switch), run(**switch, **{"max-postcopy-bandwidth": "5 MB/s"})
    assert fast.converged and slow.converged
    assert slow.migration["total-time"] > fast.migration["total-time"] + 2000
    assert slow.migration["ram"]["pages-per-second"] < 5_000_000 // 4096 + 200


@pytest.mark.parametrize(
    "asked", [{"postcopy-after": "3 s"}, {"postcopy-after-passes": 2}, {"platform": "libvirt-timeout-postcopy"}]
)
def test_post_copy_asked_for_without_its_capability_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ScenarioError, match='needs the capability "postcopy-ram"'):
        run(**asked)


def test_clears_with_the_guest_stopped_kick_nobody() -> None:
    rules = rules_for("tdp", default_kernel("tdp"))
    for pml in (False, True):
        cost = clear_cost(rules, load_profile("default"), 416, pml=pml)
        assert cost.stopped_call_ns <= cost.call_ns and (cost.stopped_call_ns < cost.call_ns) == pml


def test_the_last_pass_tells_clears_from_the_wire() -> None:
    result = run(**{"max-bandwidth": 0, "downtime-limit": 900})
    assert parts(result)["clear"] > 0 and parts(result)["wire"] > 0
    assert "the final sync added" in result.verdict


@given(st.lists(st.tuples(st.integers(0, 2 * CHUNK_PAGES - 1), st.integers(1, 200)), max_size=12), st.booleans())
def test_runs_of_dirty_pages_are_counted_across_words_and_chunks(ranges: list[tuple[int, int]], full: bool) -> None:
    plane = Plane(2 * CHUNK_PAGES)
    ones = np.zeros(2 * CHUNK_PAGES, dtype=bool)
    for first, pages in ranges:
        ones[first : first + pages] = True
    plane.words[:] = np.packbits(ones, bitorder="little").view(np.uint64)
    if full:
        plane.full[1], ones[CHUNK_PAGES:] = 1, True
    assert runs(plane) == int(np.sum(np.diff(np.concatenate([[False], ones]).astype(np.int8)) == 1))


def test_xbzrle_tells_its_cache_and_its_rates() -> None:
    result = run(capabilities=["xbzrle"], **{"downtime-limit": 2000, "xbzrle-cache-size": "128 MiB"})
    cache = result.migration["xbzrle-cache"]
    assert cache["cache-size"] == 128 << 20 and cache["pages"] + cache["cache-miss"] > 0
    assert 0 <= cache["cache-miss-rate"] <= 1 and cache["encoding-rate"] >= 0
    assert cache["bytes"] >= cache["overflow"] * 4096 * 0.9


def test_the_result_tells_qmps_events_only_where_qemu_emits_them() -> None:
    quick: dict[str, Any] = {"max-bandwidth": 0, "downtime-limit": 900}
    assert run(**quick).events == ()
    told = run(**quick, capabilities=["events"])
    order = expected_order(told.migration["ram"]["dirty-sync-count"], compat="10.0")
    shown = [" ".join([e["event"], *map(str, e.get("data", {}).values())]) for e in told.events]
    assert shown == [*order, "RESUME"]
    held: dict[str, Any] = {"capabilities": ["events", "pause-before-switchover"], "switchover-pause": "20 s"}
    called_off = run(**quick, **held, **{"cancel-after": "9 s"})
    names = [e["data"]["status"] if e["event"] == "MIGRATION" else e["event"] for e in called_off.events]
    assert names[-5:] == ["STOP", "pre-switchover", "cancelling", "RESUME", "cancelled"]


def test_cpr_reboot_stops_the_guest_first_and_copies_each_page_once() -> None:
    result = run(mode="cpr-reboot", capabilities=["events", "mapped-ram"], **{"max-bandwidth": 0})
    assert result.converged and result.verify["lost-pages"] == 0
    told = [e["data"]["status"] if e["event"] == "MIGRATION" else e["event"] for e in result.events]
    assert told[:4] == ["setup", "STOP", "MIGRATION_PASS", "active"] and "RESUME" not in told
    ram = result.migration["ram"]
    assert (ram["normal"] + ram["duplicate"]) * 4096 == ram["total"], "nothing is dirtied, so nothing goes twice"
    assert ram["precopy-bytes"] < 1000 < ram["downtime-bytes"]
    assert result.migration["downtime"] >= 0.99 * result.migration["total-time"]
    assert sum(parts(result).values()) / NS_PER_MS == pytest.approx(result.migration["downtime"], abs=2)


def test_what_is_accepted_and_not_modelled_is_refused_or_named() -> None:
    with pytest.raises(ScenarioError, match="QEMU accepts it; COLO"):
        run(capabilities=["x-colo"])
    with pytest.raises(ScenarioError, match="mode.*not modelled here"):
        run(mode="cpr-transfer")
    for name, conflict in (("postcopy-ram", "postcopy"), ("background-snapshot", "background snapshot")):
        with pytest.raises(ScenarioError, match=f"Cannot use {conflict} with CPR"):
            run(mode="cpr-reboot", capabilities=[name])
    named = run(capabilities=["release-ram"], **{"announce-rounds": 9, "max-bandwidth": 0, "downtime-limit": 900})
    assert named.host["not-modelled"] == ["release-ram", "announce-rounds"]


def test_multifd_pages_are_queued_twice_only_on_the_host_that_was_seen_doing_it() -> None:
    document: dict[str, Any] = {
        "guest": {"memory": "64 MiB"},
        "migration": {"compat": "7.2", "capabilities": ["multifd"], "max-bandwidth": "50 MB/s"},
        "link": {"bandwidth": "1 Gbit/s"},
    }
    plain = simulation.run(build(document), threads=1)
    seen = simulation.run(build(document | {"host": {"profile": "qemu-7.2-loopback"}}), threads=1)
    assert seen.migration["ram"]["multifd-bytes"] > plain.migration["ram"]["multifd-bytes"]


#: Parameter: (a value, what it takes for it to matter).
MATTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max-bandwidth": ("80 MB/s", {}),
    "downtime-limit": (2000, {}),
    "avail-switchover-bandwidth": ("1 GB/s", {}),
    "max-postcopy-bandwidth": ("5 MB/s", {"capabilities": ["postcopy-ram"], "postcopy-after": "2 s"}),
    "multifd-channels": (7, {"capabilities": ["multifd"]}),
    "xbzrle-cache-size": ("8 MiB", {"capabilities": ["xbzrle"]}),
    "throttle-trigger-threshold": (100, {"capabilities": ["auto-converge"], "max-bandwidth": "190 MB/s"}),
    "cpu-throttle-initial": (50, {"capabilities": ["auto-converge"]}),
    "cpu-throttle-increment": (30, {"capabilities": ["auto-converge"]}),
    "cpu-throttle-tailslow": (True, {"capabilities": ["auto-converge"], "cpu-throttle-increment": 60}),
    "max-cpu-throttle": (25, {"capabilities": ["auto-converge"]}),
    "zero-page-detection": ("none", {}),
}


@pytest.mark.parametrize("name", MATTERS)
def test_a_parameter_that_is_modelled_changes_a_result(name: str) -> None:
    value, needs = MATTERS[name]
    base = {"time-limit": "12 s", **needs}
    with_, without = run(**base | {name: value}), run(**base)
    assert (with_.migration, with_.rounds) != (without.migration, without.rounds)
