"""Staged (VFIO) devices, switchover-ack, the return path: what they add to the blackout and what they hold up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.devices import BLOCK_FRAMING, BUFFER_BYTES, DeviceSet, VfioDevice
from migsim.result import Result
from migsim.scenario import ScenarioError, build
from migsim.units import MIB, NS_PER_MS, NS_PER_S


def run(devices: list[dict[str, str]] | None = None, link: dict[str, Any] | None = None, **migration: Any) -> Result:
    stream = {"pattern": "uniform", "rate": "1000 pages/s", "working-set": "16 MiB"}
    scenario = build(
        {
            "guest": {"memory": "64 MiB", "vcpus": 2, "workload": [stream], "device": devices or []},
            "migration": {"max-bandwidth": 0, "time-limit": "20 s", **migration},
            "link": {"bandwidth": "1 Gbit/s", **(link or {})},
        }
    )
    return simulation.run(scenario, threads=1)


def parts(result: Result) -> dict[str, int]:
    return {part.name: part.duration_ns for part in result.downtime}


def test_with_a_return_path_downtime_includes_the_destinations_load() -> None:
    link = {"latency": "3 ms"}
    without, with_path = run(link=link), run(link=link, capabilities=["return-path"])
    assert "load" not in parts(without) and parts(with_path)["return-path"] == 3 * NS_PER_MS
    assert with_path.migration["downtime"] - without.migration["downtime"] in (7, 8, 9)  # 5 ms to load, 3 ms back
    assert sum(parts(with_path).values()) // NS_PER_MS - with_path.migration["downtime"] in (-1, 0, 1)


def test_a_device_without_pre_copy_goes_out_in_the_blackout_alone() -> None:
    device = {"name": "gpu", "stop-copy": "32 MiB", "load": "40 ms"}
    result = run([device], capabilities=["return-path"])
    wire_ns = 32 * MIB * NS_PER_S // 125_000_000
    assert parts(result)["vfio"] == pytest.approx(wire_ns, rel=0.001)
    assert parts(result)["load"] == 45 * NS_PER_MS
    assert result.migration["vfio"]["transferred"] == 32 * (MIB + BLOCK_FRAMING)
    assert "staged devices' stop-copy state" in result.verdict


def test_without_a_return_path_the_load_is_in_the_blackout_but_not_in_qemus_downtime() -> None:
    result = run([{"name": "gpu", "stop-copy": "1 MiB", "load": "400 ms"}])
    assert parts(result)["load"] == 400 * NS_PER_MS
    resumed_ms = sum(parts(result).values()) // NS_PER_MS
    assert result.migration["downtime"] in range(resumed_ms - 402, resumed_ms - 398)


def test_stop_copy_state_above_the_threshold_keeps_a_migration_from_ever_completing() -> None:
    result = run([{"name": "gpu", "stop-copy": "60 MiB"}], **{"downtime-limit": "300 ms", "time-limit": "600 ms"})
    assert not result.converged and "stop-copy state is 60 MiB" in result.verdict
    assert run([{"name": "gpu", "stop-copy": "60 MiB"}], **{"downtime-limit": "700 ms"}).converged


def test_pre_copy_shortens_the_blackout_by_what_went_out_before() -> None:
    whole = run([{"name": "nic", "stop-copy": "24 MiB"}])
    staged = run([{"name": "nic", "initial": "20 MiB", "stop-copy": "4 MiB", "dirty-rate": "1 MB/s"}])
    assert parts(staged)["vfio"] < parts(whole)["vfio"]
    assert staged.migration["vfio"]["transferred"] >= 24 * MIB


def test_switchover_ack_holds_the_stop_until_the_initial_state_is_there() -> None:
    device = {"name": "nic", "initial": "30 MiB"}
    caps = ["return-path", "switchover-ack", "events"]
    free = run([device], capabilities=["return-path"], **{"downtime-limit": "1 s"})
    held = run([device], capabilities=caps, **{"downtime-limit": "1 s"})
    assert parts(free)["vfio"] > parts(held)["vfio"]  # the threshold admits it, the acknowledgement does not
    assert held.migration["total-time"] >= (64 + 30) * MIB * 1000 // 125_000_000


def test_a_late_acknowledgement_costs_syncs_and_says_so() -> None:
    device = {"name": "nic", "initial": "1 MiB"}
    caps = ["return-path", "switchover-ack"]
    result = run([device], {"latency": "2 s"}, capabilities=caps, **{"round-limit": 60})
    assert not result.converged and "has not acknowledged" in result.verdict


def test_switchover_ack_needs_no_device() -> None:
    assert run(capabilities=["return-path", "switchover-ack"]).converged


def test_rate_limited_ram_leaves_devices_no_turn_until_it_is_done() -> None:
    result = run([{"name": "nic", "initial": "8 MiB"}], **{"max-bandwidth": "20 MB/s", "round-limit": 2})
    assert result.migration["status"] == "cancelled"
    first = result.rounds[0]
    assert first.sent_pages * 4104 > 0.5 * first.transferred_bytes


@given(st.integers(0, 8 * MIB), st.integers(0, 8 * MIB), st.integers(0, 10**9), st.lists(st.integers(0, 10**8)))
def test_all_of_a_device_leaves_it_and_never_more_than_it_dirtied(
    initial: int, stop: int, rate: int, gaps: list[int]
) -> None:
    device = VfioDevice("d", initial, rate, stop)
    devices = DeviceSet([device])
    sent = now = 0
    for gap in gaps:
        now += gap
        devices.advance(now, True)
        assert 0 <= devices.pending <= initial
        before = devices.pending
        devices.iterate()
        assert before - devices.pending <= BUFFER_BYTES
        sent += before - devices.pending
    rest = devices.pending
    devices.complete()
    assert devices.pending == 0
    assert initial <= sent + rest <= initial + rate * now // NS_PER_S + len(gaps) + 1


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        ({"dirty-rate": "1 MB/s"}, 'give "initial" too'),
        ({"initial": "-1 B"}, "guest.device.0.initial"),
        ({"stopcopy": "1 MiB"}, 'did you mean "stop-copy"?'),
    ],
)
def test_a_bad_device_is_refused_in_one_sentence(device: dict[str, str], problem: str) -> None:
    with pytest.raises(ScenarioError) as error:
        run([device])
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_vfio_is_refused_for_7_2() -> None:
    with pytest.raises(ScenarioError, match=r"8\.1 and later"):
        run([{"stop-copy": "1 MiB"}], compat="7.2")
