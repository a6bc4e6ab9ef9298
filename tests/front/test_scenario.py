"""Scenarios: every QMP name, placed streams, and errors that name file, field, value and the nearest known name."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim.migration.parameters import PARAMETERS
from migsim.scenario import Guest, Migration, Scenario, ScenarioError, Workload, build, json_schema, load, parse
from migsim.units import PAGE_SIZE

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
MINIMAL = {"guest": {"memory": "1 GiB"}}


def refused(data, *settings):
    with pytest.raises(ScenarioError) as caught:
        build(data, settings, file="x.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_guest(**values):
    return {"guest": {"memory": "1 GiB", **values}}


def stream(**values):
    return {"pattern": "uniform", "rate": "1 MB/s", **values}


def test_every_migration_parameter_has_qmps_default():
    plain = build(MINIMAL).migration
    for name, spec in PARAMETERS.items():
        assert getattr(plain, name.replace("-", "_")) == spec.default, name


@pytest.mark.parametrize("name", [n for n, p in PARAMETERS.items() if p.kind in ("uint8", "uint32")])
def test_a_parameter_out_of_qmps_range_is_refused(name):
    spec = PARAMETERS[name]
    compat = "7.2" if spec.last else "10.0"
    for value in (spec.high + 1, spec.low - 1):
        text = refused({**MINIMAL, "migration": {"compat": compat, name: value}})
        assert f"migration.{name} = {value}" in text


@pytest.mark.parametrize("name", [n for n, p in PARAMETERS.items() if p.kind in ("uint8", "uint32")])
def test_a_parameter_at_the_ends_of_qmps_range_is_taken(name):
    spec = PARAMETERS[name]
    compat = "7.2" if spec.last else "10.0"
    for value in (spec.low, spec.high):
        # max-cpu-throttle is never below cpu-throttle-initial.
        floor = {"cpu-throttle-initial": value} if name == "max-cpu-throttle" else {}
        migration = build({**MINIMAL, "migration": {"compat": compat, name: value, **floor}}).migration
        assert migration.parameters()[name] == value


def test_a_parameter_of_another_release_says_since_when_it_exists():
    text = refused({**MINIMAL, "migration": {"compat": "7.2", "avail-switchover-bandwidth": "1 GB/s"}})
    assert "exists since QEMU 8.2" in text
    assert "was last in QEMU 9.0" in refused({**MINIMAL, "migration": {"compress-level": 9}})


def test_capabilities_that_exclude_each_other_are_refused_in_qemus_words():
    text = refused({**MINIMAL, "migration": {"capabilities": ["multifd", "xbzrle"]}})
    assert "Multifd is not compatible with xbzrle" in text
    old = {**MINIMAL, "migration": {"compat": "7.2", "capabilities": ["multifd", "xbzrle"]}}
    assert build(old).migration.capabilities == ("multifd", "xbzrle")


SUGGESTED = [
    ("guest.memry=1 GiB", 'did you mean "memory"?'),
    ("guest.Memory=1 GiB", 'did you mean "memory"?'),
    ("migration.max_bandwidth=1", 'did you mean "max-bandwidth"?'),
    ("migration.downtime-limt=1", 'did you mean "downtime-limit"?'),
    ("link.bandwith=1 Gbit/s", 'did you mean "bandwidth"?'),
    ("kvm.mmu=tpd", 'did you mean "tdp"?'),
    ('migration.capabilities=["autoconverge"]', 'did you mean "auto-converge"?'),
    ("gest.memory=1", 'did you mean "guest"?'),
    ("guest.xyzzy=1", "known: memory, vcpus"),
]


@pytest.mark.parametrize(("setting", "hint"), SUGGESTED)
def test_an_unknown_name_suggests_the_nearest_known_one(setting, hint):
    text = refused(MINIMAL, setting)
    assert hint in text and "--set: " in text


LIMITS = [
    (with_guest(memory="5000 B"), "guest.memory", "multiple of the page"),
    (with_guest(memory="-1 GiB"), "guest.memory", "negative"),
    (with_guest(memory="1 GB/s"), "guest.memory", "unknown unit 'GB/s'"),
    (with_guest(memory="3 GiB", backing="1G", vcpus=0), "guest.vcpus = 0", ">= 1"),
    (with_guest(memory="3 MiB", backing="2M"), "guest.memory", "multiple of its backing"),
    (with_guest(memory="8192 PiB"), "guest.memory", "<="),
    (with_guest(zero="10 %", populated="50 %"), "guest.zero = 0.1", "at least 0.5"),
    (with_guest(workload=[stream(rate=None)]), "guest.workload.0.rate", "expected a rate"),
    (with_guest(workload=[{"pattern": "uniform"}]), "guest.workload.0.rate", "exactly one"),
    (with_guest(workload=[stream(pattern="idle")]), "guest.workload.0.rate", "writes nothing"),
    (with_guest(workload=[stream(vcpus=2)]), "guest.workload.0.vcpus = 2", "the guest has 1"),
    (with_guest(workload=[stream(), stream()]), "guest.workload", "at most one stream may leave out"),
    (with_guest(workload=[stream(**{"working-set": "600 MiB"})] * 2), "guest.workload", "together write 1.172 GiB"),
    (with_guest(workload=[stream(**{"working-set": "1 GiB", "offset": "4 KiB"})]), "working-set", "ends at 1 GiB"),
    (with_guest(populated="50 %", workload=[stream(**{"working-set": "1 GiB"})]), "guest.workload", "512 MiB"),
    (with_guest(workload=[stream(start="2 s", stop="1 s")]), "guest.workload.0.stop", "after start"),
    (with_guest(workload=[stream(phases=[{"at": "2 s", "rate-factor": 1.0}] * 2)]), "workload.0.phases", "in order"),
    ({"guest": {}}, "guest.memory", "is missing"),
    ({}, "guest", "is missing"),
    ({**MINIMAL, "kvm": {"dirty-ring-size": 1000}}, "kvm.dirty-ring-size = 1000", "power of two"),
    ({**MINIMAL, "link": {"bandwidth": "0 Gbit/s"}}, "link.bandwidth", ">= 1"),
    ({**MINIMAL, "migration": {"xbzrle-cache-size": 5000}}, "xbzrle-cache-size", "power of two"),
    ({**MINIMAL, "migration": {"max-cpu-throttle": 10}}, "max-cpu-throttle = 10", "cpu-throttle-initial (20)"),
    ({**MINIMAL, "migration": {"switchover-pause": "1 s"}}, "switchover-pause", "pause-before-switchover"),
    ({**MINIMAL, "migration": 5}, "migration = 5", "expected a table"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "field", "why"), LIMITS)
def test_a_value_that_cannot_be_names_its_field_and_what_is_allowed(data, field, why):
    text = refused(data)
    assert text.startswith("x.toml: ") and field in text and why in text


def test_an_override_reaches_into_lists_and_appends():
    data = with_guest(workload=[stream()])
    settings = ["guest.workload.0.rate=2 MB/s", "guest.workload.0.working-set=0.25", "guest.workload.1.pattern=idle"]
    guest = build(data, settings).guest
    assert guest.workload[0].rate == 2_000_000 and guest.workload[0].working_set == 256 << 20
    assert guest.workload[1].pattern == "idle"
    assert data["guest"]["workload"][0]["rate"] == "1 MB/s", "the caller's mapping is left alone"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("migration.compat=7.2", "7.2"),
        ("migration.compat='7.2'", "7.2"),
        ("migration.tls-creds=true", "true"),
        ("guest.name=0x10", "0x10"),
        ("guest.workload.0.name=1e3", "1e3"),
        ("guest.vcpus=3", 3),
        ("guest.populated=0.5", 0.5),
    ],
)
def test_an_override_of_a_text_is_its_text_though_it_looks_like_a_number(setting, value):
    node = build(with_guest(workload=[stream()]), [setting])
    for key in setting.partition("=")[0].replace("-", "_").split("."):
        node = node[int(key)] if key.isdecimal() else getattr(node, key)
    assert node == value and type(node) is type(value)


def test_a_number_for_one_of_some_texts_names_them():
    assert 'must be one of "intel", "amd"' in refused(MINIMAL, "kvm.vendor=1")


@pytest.mark.parametrize(
    "setting", ["x", "=1", "a..b=1", "guest.memory.x=1", "guest.workload.9.rate=1", "guest.name=a\nb=1"]
)
def test_an_override_that_is_none_is_refused_or_plain_text(setting):
    if "\n" in setting:
        assert build(MINIMAL, [setting]).guest.name == "a\nb=1"
    else:
        assert refused({**MINIMAL, "guest": {"memory": "1 GiB", "workload": []}}, setting).startswith("--set")


sizes = st.integers(1, 64).map(lambda n: n * PAGE_SIZE)


@given(st.lists(sizes, max_size=5), st.integers(0, 256), st.booleans())
def test_streams_without_offset_lie_end_to_end_and_inside_populated_memory(extents, spare_pages, open_end):
    workload = [stream(**{"working-set": extent}) for extent in extents]
    if open_end:
        workload.append(stream())
    memory = sum(extents) + (spare_pages + 1) * PAGE_SIZE
    guest = build({"guest": {"memory": memory, "workload": workload}}).guest
    at = 0
    for placed in guest.workload:
        assert placed.offset == at and isinstance(placed.working_set, int) and placed.working_set > 0
        at += placed.working_set
    assert at == memory if open_end else at <= memory


@given(st.floats(0, 1), st.floats(0, 1))
def test_untouched_pages_count_as_zero_pages(populated, zero):
    try:
        guest = build({"guest": {"memory": "4 MiB", "populated": populated, "zero": zero}}).guest
    except ScenarioError as error:
        assert error.field == "guest.zero"
    else:
        assert guest.zero_pages + guest.populated_pages >= guest.pages


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_loaded_scenario_survives_json(path):
    scenario = load(path)
    assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario


def test_the_schema_knows_every_field_and_takes_text_for_quantities():
    schema = json.loads(json.dumps(json_schema()))
    migration = schema["$defs"]["Migration"]["properties"]
    assert migration.keys() >= PARAMETERS.keys()
    memory = schema["$defs"]["Guest"]["properties"]["memory"]
    assert {option["type"] for option in memory["anyOf"]} == {"integer", "string"}
    assert schema["$defs"]["Guest"]["additionalProperties"] is False


toml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from(["guest", "kvm", "migration", "link", "host", "expect", "memory", "workload"])


@given(st.dictionaries(field_names | st.text(max_size=6), toml_values, max_size=4))
def test_any_mapping_at_all_is_a_scenario_or_a_sentence(data):
    try:
        build(data, file="x.toml")
    except ScenarioError as error:
        assert "\n" not in str(error) and str(error).isprintable()


@given(st.sampled_from(["memory", "vcpus", "populated", "zero", "backing", "workload", "name", "machine"]), toml_values)
def test_any_value_of_a_guest_field_is_taken_or_a_sentence(name, value):
    try:
        build({"guest": {"memory": "1 GiB", name: value}}, file="x.toml")
    except ScenarioError as error:
        assert name in str(error) and "\n" not in str(error)


@given(st.text(max_size=200))
def test_any_text_at_all_is_a_scenario_or_a_sentence(text):
    with pytest.raises(ScenarioError) as caught:
        parse(text, file="x.toml")
    assert str(caught.value).startswith("x.toml: ") and "\n" not in str(caught.value)


def test_scenarios_can_be_built_in_python_too():
    guest = Guest(memory=1 << 30, vcpus=2, workload=(Workload(pattern="uniform", rate=4096),))
    assert guest.workload[0].working_set == 1 << 30 and guest.workload[0].pages_per_s == 1
    assert Scenario(guest=guest, migration=Migration(downtime_limit=500)).migration.downtime_limit == 500
    with pytest.raises(ScenarioError, match="multiple of the page"):
        Guest(memory=5000)


def test_the_schema_takes_what_the_loader_takes():
    defs = json_schema()["$defs"]
    bounds = next(part for part in defs["Expect"]["properties"]["total-time"]["anyOf"] if "prefixItems" in part)
    kinds = [[choice["type"] for choice in bound["anyOf"]] for bound in bounds["prefixItems"]]
    assert kinds == [["integer", "string"]] * 2
    latency = defs["Link"]["properties"]["latency"]
    assert latency["anyOf"][0] == {"const": 0}, "a duration without its unit is refused"
    assert build({"guest": {"memory": "1 GiB"}, "link": {"latency": latency["default"]}}) == build(
        {"guest": {"memory": "1 GiB"}}
    )
