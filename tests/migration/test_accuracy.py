"""Recordings: what a prediction may see, that it runs through the loop, and how bad input is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from migsim import accuracy
from migsim.accuracy import RecordingError
from migsim.accuracy.prediction import _late_ms
from migsim.accuracy.replayed import writes_per_s


def recording(**config: Any) -> dict[str, Any]:
    """As tools/record_qemu writes it, with the members a prediction needs; `result` of QEMU 7.2 for the idle guest."""
    return {
        "id": "idle-512m-bw100",
        "config": {
            "mem_mib": 512, "vcpus": 1, "accel": "tcg", "fill_pct": 100, "ws_mib": 64, "rate": 0, "pattern": "uniform",
            "write_bytes": 64, "catch_up": 0, "limit_s": 40.0, "postcopy_after": None, **config,
        },
        "guest": {"fill_pages": 126976, "ws_pages": 16384 if config.get("rate") else 0, "zero_pages": 4094},
        "migrate_parameters": {"max-bandwidth": 100000000, "downtime-limit": 300, "tls-creds": ""},
        "migrate_capabilities_on": ["events"],
        "pre": {"writes_per_s": config.get("rate", 0)},
        "result": {
            "status": "completed", "rounds": 3, "total_time_ms": 5019, "setup_time_ms": 1, "downtime_events_ms": 10.281,
            "transferred": 521176255, "normal": 126983, "duplicate": 4171, "last_throttle_pct": None,
        },
        "series": {"rows": [[0, "secret"]]},
    }  # fmt: skip


def written(folder: Path, data: object, name: str = "a.json") -> Path:
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


def test_an_idle_guest_is_predicted_to_the_byte_and_within_half_a_percent() -> None:
    predicted, seconds = accuracy.predict(accuracy.given(recording()))
    real = accuracy.measured(recording())
    assert {k: predicted[k] for k in ("status", "rounds", "transferred", "normal", "duplicate")} == {
        k: real[k] for k in ("status", "rounds", "transferred", "normal", "duplicate")
    }
    assert abs(predicted["total_time_ms"] / real["total_time_ms"] - 1) < 0.005
    assert set(predicted) == set(accuracy.KEYS) and seconds > 0


def test_a_prediction_cannot_see_what_happened() -> None:
    facts = accuracy.given(recording())
    assert set(facts) == set(accuracy.GIVEN)
    with pytest.raises(RecordingError, match="nothing else"):
        accuracy.predict(facts | {"result": {}})


@pytest.mark.parametrize("hidden", ["series", "result"])
def test_what_really_happened_does_not_change_a_prediction(hidden: str) -> None:
    other = recording(rate=10000) | {hidden: {}}
    seeds = (1,)
    assert (
        accuracy.predict(accuracy.given(recording(rate=10000)), seeds=seeds)[0]
        == accuracy.predict(accuracy.given(other), seeds=seeds)[0]
    )


def test_the_report_has_the_keys_of_the_format_and_the_table_every_metric(tmp_path: Path) -> None:
    report = accuracy.replay(written(tmp_path, recording()))
    assert [set(entry) for entry in report] == [{"id", "measured", "predicted"}]
    assert set(report[0]["measured"]) == set(accuracy.KEYS)
    assert set(report[0]["predicted"]) == {*accuracy.KEYS, "seconds"}
    text = accuracy.table(report)
    assert "verdict wrong in 0 of 1" in text and "total_time_ms" in text


def drop(*path: str) -> dict[str, Any]:
    data = recording(rate=1000)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ('{"id": "x", ', "is not JSON"),
        ("[1]", "not a recording"),
        (drop("pre"), "the field pre is missing"),
        (drop("config", "mem_mib"), "the field mem_mib is missing"),
        (drop("pre", "writes_per_s"), "the field writes_per_s is missing"),
        (recording(mem_mib="x"), "the field config.mem_mib must be a number"),
        (recording(mem_mib=1 << 40), "the field config.mem_mib must be a number"),
        (recording(limit_s=True), "the field config.limit_s must be a number"),
        (recording() | {"guest": []}, "the field guest must be an object"),
        (recording() | {"migrate_capabilities_on": "multifd"}, "migrate_capabilities_on must be a list"),
        (recording() | {"qemu": "10.0.2"}, "recorded with QEMU 10.0.2"),
        (recording(pattern="spiral", rate=5), "config.pattern must be one of uniform, sequential, hotcold"),
        (recording(accel="xen"), "config.accel must be one of tcg, kvm"),
        (recording(hot_pages_pct="10"), "the field config.hot_pages_pct must be a number"),
        (recording(limit_s=float("nan")), "the field config.limit_s must be a number"),
        (recording() | {"id": 7}, "the field id must be a name"),
        (recording() | {"result": {"status": "postcopy-active"}}, "result.status must be one of completed"),
        (recording() | {"result": {"status": "completed", "rounds": "3"}}, "the field result.rounds must be a number"),
        (recording() | {"migrate_capabilities_on": [1]}, "migrate_capabilities_on must be a list"),
        (recording() | {"migrate_parameters": {"max-bandwidth": "100M"}}, "max-bandwidth"),
        (recording() | {"migrate_parameters": {"max-bandwidth": -5}}, "max-bandwidth"),
    ],
)
def test_bad_recordings_are_one_sentence(tmp_path: Path, data: object, text: str, capsys: Any) -> None:
    assert accuracy.main([str(written(tmp_path, data))]) == 2
    told = capsys.readouterr().err
    assert text in told and told.startswith("accuracy: a.json: ") and told.count("\n") == 1


def test_the_guest_keeps_the_rate_it_was_told_unless_it_falls_short_for_good() -> None:
    facts = accuracy.given(recording(rate=10000))
    assert writes_per_s(facts | {"pre": {"writes_per_s": 9950.0}}) == 10000.0
    assert writes_per_s(facts | {"pre": {"writes_per_s": 10003.0}}) == 10000.0
    assert writes_per_s(facts | {"pre": {"writes_per_s": 9000.0}}) == 9000.0


def test_a_destination_without_its_memory_sets_the_pace_of_the_first_pass_alone() -> None:
    """Really: 1512 ms without a limit, and 7120 ms at 100 MB/s, where it is fast enough."""
    unlimited = {"max-bandwidth": 0, "downtime-limit": 300}
    slow, fast = (
        accuracy.predict(accuracy.given(recording(prealloc=there) | {"migrate_parameters": unlimited}))[0]
        for there in (False, True)
    )
    assert abs(slow["total_time_ms"] / 1512 - 1) < 0.1 and abs(slow["downtime_events_ms"] / 274 - 1) < 0.1
    assert fast["total_time_ms"] < 250
    limited = [
        accuracy.predict(accuracy.given(recording(rate=10000, ws_mib=256, prealloc=there)), seeds=(1,))[0]
        for there in (False, True)
    ]
    assert abs(limited[0]["total_time_ms"] - limited[1]["total_time_ms"]) < 5


def test_draws_stop_once_they_are_alike() -> None:
    """A guest that hardly writes ends the same way each time; near the link's speed it does not."""
    assert [_late_ms(at, 7) for at in range(4)] == [0.0, -20.0, 20.0, -40.0]
    guest = {"fill_pages": 126976, "ws_pages": 102400, "zero_pages": 4094}
    calm, near = (accuracy.given(recording(rate=rate) | {"guest": guest}) for rate in (1000, 20000))
    assert accuracy.predict(calm, seeds=(1, 2, 3))[0] == accuracy.predict(calm, seeds=(1, 2, 3, 4, 5, 6, 7))[0]
    ends = {accuracy.predict(near, seeds=(seed,))[0]["rounds"] for seed in (1, 2, 3, 4, 5)}
    assert len(ends) > 1


def test_bands_name_what_is_outside() -> None:
    entry = {"id": "a", "measured": accuracy.measured(recording()), "predicted": accuracy.measured(recording())}
    assert all(band.holds for band in accuracy.bands_of([entry]))
    off = entry | {"predicted": entry["predicted"] | {"rounds": 5, "total_time_ms": 5100, "downtime_events_ms": 16.0}}
    held = {band.name.split()[0]: band for band in accuracy.bands_of([off])}
    assert [name for name, band in held.items() if not band.holds] == ["total", "syncs", "downtime"]
    assert held["syncs"].outside == ("a",)
    many = {"rounds": 30}
    for rounds, holds in ((32, True), (33, False)):
        far = entry | {"measured": entry["measured"] | many, "predicted": entry["predicted"] | {"rounds": rounds}}
        assert next(band for band in accuracy.bands_of([far]) if "syncs" in band.name).holds == holds


def test_a_prediction_is_the_middle_of_its_draws() -> None:
    guest = {"fill_pages": 126976, "ws_pages": 102400, "zero_pages": 4094}
    facts = accuracy.given(recording(rate=20000) | {"guest": guest})
    runs = [accuracy.predict(facts, seeds=(seed,))[0] for seed in (1, 2, 3)]
    middle = accuracy.predict(facts, seeds=(1, 2, 3))[0]
    for key in ("rounds", "total_time_ms", "transferred", "downtime_events_ms"):
        assert middle[key] == sorted(run[key] for run in runs)[1]


def test_an_empty_or_missing_folder_is_one_sentence(tmp_path: Path, capsys: Any) -> None:
    assert accuracy.main([str(tmp_path)]) == 2 and accuracy.main([str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_json_goes_where_it_is_told(tmp_path: Path, capsys: Any) -> None:
    folder = written(tmp_path, recording())
    assert accuracy.main([str(folder / "a.json"), "--json", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out").read_text())[0]["id"] == "idle-512m-bw100"
    assert "median" in capsys.readouterr().out
