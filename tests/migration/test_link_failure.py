"""The link dies: failed before the switch, postcopy-paused and recovery after it."""

from __future__ import annotations

from typing import Any

import pytest

from migsim import simulation
from migsim.migration.precopy import Precopy
from migsim.result import Result
from migsim.scenario import Scenario, ScenarioError, build

POSTCOPY = {"capabilities": ["postcopy-ram"], "postcopy-after": "400 ms", "max-bandwidth": 0}


def scenario(link: dict[str, Any], **migration: Any) -> Scenario:
    stream = {"pattern": "uniform", "rate": "20000 pages/s", "working-set": "60 MiB"}
    return build(
        {
            "guest": {"memory": "64 MiB", "vcpus": 2, "workload": [stream]},
            "migration": {"time-limit": "60 s", "downtime-limit": "50 ms", **migration},
            "link": {"bandwidth": "1 Gbit/s", **link},
        }
    )


def run(link: dict[str, Any], **migration: Any) -> Result:
    return simulation.run(scenario(link, **migration), threads=1)


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    seen: list[tuple[int, str]] = []
    original = Precopy.event

    def event(loop: Precopy, name: str, **data: object) -> None:
        seen.append((loop.now_ns, str(data.get("status", name))))
        original(loop, name, **data)

    monkeypatch.setattr(Precopy, "event", event)
    return seen


def test_a_link_that_dies_in_precopy_fails_the_migration_and_leaves_the_guest_where_it_was() -> None:
    result = run({"fail-at": "300 ms"})
    assert result.migration == {"status": "failed", "error-desc": "Unable to write to socket: Connection reset by peer"}
    assert not result.converged and result.exit_code == 1 and result.downtime == ()
    assert result.verdict.startswith("Fails after 3") and "goes on at the source" in result.verdict


def test_a_silent_loss_is_noticed_when_tcp_gives_up() -> None:
    result = run({"fail-at": "300 ms", "fail-noticed-after": "20 s"})
    assert "Connection timed out" in result.migration["error-desc"]
    assert result.verdict.startswith("Fails after 20.3")


def test_a_link_that_dies_in_the_blackout_resumes_the_guest_at_the_source(statuses: list[tuple[int, str]]) -> None:
    slow = {"bandwidth": "100 Mbit/s", "fail-at": "2 s"}  # the first window already admits the stop
    result = run(slow, **{"downtime-limit": "20 s", "max-bandwidth": 0})
    names = [name for _, name in statuses]
    assert names[-2:] == ["RESUME", "failed"]
    assert names.index("STOP") < names.index("RESUME")
    assert result.migration["status"] == "failed" and "standing still" in result.verdict


def test_a_link_that_dies_after_the_end_changes_nothing() -> None:
    calm = {"downtime-limit": "2 s", "max-bandwidth": 0}
    assert run({"fail-at": "1 h"}, **calm).migration == run({}, **calm).migration


def test_postcopy_without_recovery_stays_paused_and_the_guest_with_it() -> None:
    result = run({"fail-at": "700 ms"}, **POSTCOPY)
    assert result.migration["status"] == "postcopy-paused" and not result.converged
    assert result.migration["ram"]["remaining"] > 0
    assert "nobody recovers it" in result.verdict


@pytest.mark.parametrize("compat", ["7.2", "10.0"])
def test_a_recovered_postcopy_goes_through_recover_and_sends_again_what_was_in_flight(
    compat: str, statuses: list[tuple[int, str]]
) -> None:
    plain = run({}, **POSTCOPY, compat=compat)
    statuses.clear()
    result = run({"fail-at": "700 ms"}, **POSTCOPY, compat=compat, **{"postcopy-recover-after": "5 s"})
    assert result.converged and result.verify["lost-pages"] == 0
    names = [name for _, name in statuses if name.startswith("postcopy") or name == "completed"]
    setup = ["postcopy-recover-setup"] if compat == "10.0" else []
    recovery = ["postcopy-paused", *setup, "postcopy-recover", "postcopy-active"]
    assert names == ["postcopy-active", *recovery, "completed"]
    again = result.migration["ram"]["normal"] - plain.migration["ram"]["normal"]
    assert again == pytest.approx((4 << 20) // 4104, abs=3)
    assert result.migration["total-time"] >= plain.migration["total-time"] + 5000
    assert result.migration["downtime"] == plain.migration["downtime"]


@pytest.mark.parametrize(
    ("link", "migration", "problem"),
    [
        ({"fail-noticed-after": "1 s"}, {}, 'needs "fail-at"'),
        ({"fail-at": "1 s"}, {"postcopy-recover-after": "1 s"}, 'needs the capability "postcopy-ram"'),
        ({}, {**POSTCOPY, "postcopy-recover-after": "1 s"}, "needs link.fail-at"),
        (
            {"fail-at": "1 s"},
            {"capabilities": ["postcopy-ram", "release-ram"], "postcopy-recover-after": "1 s"},
            "gave away what it had sent",
        ),
        ({"fail-at": "soon"}, {}, "link.fail-at"),
    ],
)
def test_a_failure_that_cannot_be_is_refused_in_one_sentence(
    link: dict[str, Any], migration: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ScenarioError) as error:
        scenario(link, **migration)
    assert problem in str(error.value) and "\n" not in str(error.value)
