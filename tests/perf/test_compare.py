"""`migsim compare`: the seed's story in one table, results beside each other, bad input in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from migsim import simulation
from migsim.cli import main
from migsim.compare import MMUS, by_mmu, table
from migsim.result import write_json
from migsim.scenario import load

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_TINY = str(_CONFIGS / "tiny.toml")
# The m2-ultramem-416 guest with a 128th of its memory and the same vCPUs, and a workload that fills the lock.
_SMALL_M2 = [
    "guest.memory=96 GiB",
    "guest.workload.0.working-set=48 GiB",
    "guest.workload.0.rate=1200000 pages/s",
    "migration.time-limit=5 min",
    "guest.workload.1.working-set=1 GiB",
    "guest.workload.2.working-set=8 GiB",
]


def test_the_same_guest_waits_for_the_lock_under_shadow_and_hardly_at_all_under_tdp() -> None:
    columns = {c.name: c.result for c in by_mmu(load(str(_CONFIGS / "m2-ultramem-416.toml"), _SMALL_M2))}
    waiting = [float(columns[mmu].host["lock-waiting-share"]) for mmu in MMUS]
    share = [float(columns[mmu].host["guest-throughput-share"]) for mmu in MMUS]
    assert waiting[0] > 0.03 and waiting[1] > 0.03 and waiting[2] < 0.001
    assert max(share[0], share[1]) < 0.97 and share[2] > 0.99
    assert all(result.verify["lost-pages"] == 0 for result in columns.values())


def test_the_table_has_a_column_for_each_mmu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--mmu", _TINY]) == 0
    numbers, words = capsys.readouterr().out.split("\n\n")
    heading, *rows = numbers.splitlines()
    assert heading.split() == list(MMUS)
    assert any("waiting for mmu_lock" in row for row in rows)
    assert len({len(row) for row in numbers.splitlines()}) == 1, "columns are aligned"
    assert [line.split(":")[0] for line in words.splitlines() if not line.startswith(" ")] == list(MMUS)


def test_it_says_where_the_costs_of_each_mmu_come_from() -> None:
    why = {c.name: c.why for c in by_mmu(load(str(_CONFIGS / "m2-ultramem-416.toml"), ["guest.memory=8 GiB",
           *(f"guest.workload.{i}.working-set=2 GiB" for i in range(3)), "migration.time-limit=1 min"]))}  # fmt: skip
    assert "took mmu_lock alone: a store below a huge page drops it" in why["shadow"] and "reverse map" in why["shadow"]
    assert "took mmu_lock alone: a store below a huge page drops it" in why["tdp-5.10"]
    assert "touch of each struct page" in why["tdp-5.10"] and "struct page" not in why["tdp"]
    assert why["tdp"].startswith("no store took mmu_lock; PML logged") and "4,104 splits" in why["tdp"]


def test_many_short_rounds_are_explained_by_what_comes_back_in_a_sync() -> None:
    settings = ["migration.downtime-limit=1 ms", "migration.time-limit=30 s", "guest.workload.0.rate=60000 pages/s"]
    hovering = {c.name: c.why for c in by_mmu(load(_TINY, settings))}
    assert all("of its syncs are less than a second apart" in why for why in hovering.values())


def test_results_and_scenarios_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "before.json"
    write_json(simulation.run(load(_TINY)), str(path))
    assert main(["compare", str(path), _TINY, "--set", "link.bandwidth=10 Gbit/s"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["before", "tiny"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([_TINY], "two files at least"),
        (["--mmu", _TINY, _TINY], "takes one scenario"),
        (["nowhere.json", _TINY], "nowhere.json"),
        ([__file__, _TINY], "TOML"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_a_row_nobody_can_fill_is_left_out() -> None:
    columns = list(by_mmu(load(_TINY)))
    assert "reverse maps" in table(columns)
    assert "reverse maps" not in table([c for c in columns if c.name == "tdp"])
