"""Any small scenario that is accepted runs to an answer and loses nothing; damage to one is refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migsim import run
from migsim.result import from_json, to_json
from migsim.scenario import Scenario, ScenarioError, build

PAGE = 4096
TIMES = st.sampled_from(["0 s", "1 ns", "40 ms", "700 ms", "2 s", "1000000 h"])
RATES = st.sampled_from(["0 B/s", "1 B/s", "500 pages/s", "30000 pages/s", "10 M pages/s", "1 TB/s"])
SHARES = st.sampled_from([0.0001, 0.1, 0.3])


def some_of(required: dict[str, Any], **optional: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    """A table with the required keys and any of the others."""
    fixed = {n: value if isinstance(value, st.SearchStrategy) else st.just(value) for n, value in required.items()}
    return st.fixed_dictionaries(fixed, optional={name.replace("_", "-"): value for name, value in optional.items()})


PACE = {"rate": RATES, "working-set": SHARES}
MORE: dict[str, st.SearchStrategy] = {
    "start": TIMES, "running": TIMES, "catch_up": st.booleans(), "write_bytes": st.integers(1, PAGE),
}  # fmt: skip
STREAMS = st.one_of(
    some_of({"pattern": "uniform", **PACE}, **MORE),
    some_of({"pattern": "sequential", **PACE}, **MORE),
    some_of({"pattern": "zipf", **PACE}, theta=st.sampled_from([0.01, 1.0, 9.9]), **MORE),
    some_of({"pattern": "hot-cold", **PACE}, hot_pages=SHARES, hot_writes=SHARES, **MORE),
    st.just({"pattern": "idle"}),
)
GUESTS = some_of(
    {"memory": st.sampled_from([1, 2, 63, 65, 1000, 8192]).map(lambda pages: pages * PAGE)},
    vcpus=st.sampled_from([1, 3, 64]),
    populated=st.sampled_from([0.6, 0.99]),
    zero=st.sampled_from([0.5, 1.0]),
    machine=st.sampled_from(["pc", "q35"]),
    device_state=st.sampled_from([0, 1, 1 << 20]),
    workload=st.lists(STREAMS, max_size=2),
)
KVM = some_of(
    {},
    mmu=st.sampled_from(["tdp", "tdp-5.10", "shadow"]),
    vendor=st.sampled_from(["intel", "amd"]),
    pml=st.booleans(),
    eager_page_split=st.booleans(),
    manual_dirty_log_protect=st.sampled_from(["initially-set", "enable", "off"]),
    dirty_ring_size=st.sampled_from([0, 1024]),
)
MIGRATIONS = some_of(
    {"time-limit": st.sampled_from(["0 s", "300 ms", "3 s"])},
    max_bandwidth=st.sampled_from([0, 1 << 20, (1 << 64) - 1]),
    downtime_limit=st.sampled_from([0, 30, 2_000_000]),
    round_limit=st.integers(1, 4),
    cancel_after=TIMES,
    platform=st.sampled_from(["nova", "kubevirt", "cloud-hypervisor", "ovirt-minimal-downtime"]),
    capabilities=st.sampled_from(
        [["auto-converge"], ["multifd"], ["xbzrle"], ["postcopy-ram"], ["return-path", "events"], ["zero-blocks"]]
    ),
)
LINKS = some_of(
    {"bandwidth": st.sampled_from(["8 bit/s", "10 Mbit/s", "1 Gbit/s", "1000 TB/s"])},
    latency=st.sampled_from(["0 s", "60 s"]),
    fail_at=TIMES,
)
SCENARIOS = some_of({"guest": GUESTS, "link": LINKS, "migration": MIGRATIONS}, kvm=KVM)
SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def accepted(data: dict[str, Any]) -> Scenario | None:
    try:
        return build(data)
    except ScenarioError as error:  # combinations that exclude each other
        assert error.field and "\n" not in str(error)
        return None


@settings(max_examples=40, **SLOW)
@given(SCENARIOS, st.integers(0, (1 << 64) - 1))
def test_it_runs_to_an_answer_and_the_answer_can_be_read_back(data, seed):
    scenario = accepted(data)
    if scenario is None:
        return
    result = run(scenario, seed=seed, threads=1)
    text = to_json(result)
    assert result.exit_code in (0, 1) and result.verify["lost-pages"] == 0, result.verdict
    assert to_json(run(scenario, seed=seed, threads=2)) == text
    assert to_json(from_json(text)) == text and from_json(text).scenario == scenario
    for before, after in zip(result.rounds, result.rounds[1:], strict=False):
        gone = before.sent_pages + before.zero_pages
        assert after.dirty_pages == before.dirty_pages - gone + after.new_dirty_pages
        assert after.start_ns == before.start_ns + before.duration_ns


JUNK = [-1, "", "x", "1 parsec", "nan", float("nan"), float("inf"), [], {}, [[1]], None, 1 << 80, "-3 s", "1e30 TiB"]
# Texts that are names: any will do, until something is looked up by them.
FREE = {"name", "profile"}


@settings(max_examples=100, **SLOW)
@given(SCENARIOS, st.data())
def test_damage_anywhere_is_one_sentence_that_names_the_place(data, draw):
    if accepted(data) is None:
        return
    table, path = data, []
    while True:
        key = draw.draw(st.sampled_from(sorted(table)))
        path.append(key)
        if not (isinstance(table[key], dict) and table[key] and draw.draw(st.booleans())):
            break
        table = table[key]
    if draw.draw(st.booleans()):
        table[f"{key}x"], path[-1] = table.pop(key), f"{key}x"
    else:
        table[key] = draw.draw(st.sampled_from(JUNK))
    try:
        build(data)
    except ScenarioError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        assert error.field.startswith(path[0]) or path[0] in str(error) or "missing" in str(error)
    else:  # what is accepted all the same must be a value that the field has
        assert not path[-1].endswith("x") and (path[-1] in FREE or table[key] in ("", [], {}, -1)), (path, table[key])


KEYS = {"guest": "vcpus", "migration": "downtime-limit", "kvm": "vendor", "link": "latency", "host": "profile"}


@pytest.mark.parametrize(("place", "known"), KEYS.items())
def test_a_misspelt_key_gets_its_nearest_name(place, known):
    data: dict[str, Any] = {"guest": {"memory": "64 MiB"}}
    data.setdefault(place, {})[known[:-1]] = 1
    with pytest.raises(ScenarioError, match=f'did you mean "{known}"'):
        build(data)
