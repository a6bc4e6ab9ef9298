"""Every MMU and logging mode of a scenario through the fused loops, tracepoints, and what is watched meanwhile."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from migsim import simulation
from migsim.cli import main
from migsim.compare import by_mmu, table
from migsim.kvm.config import VmConfig
from migsim.kvm.trace import EVENTS
from migsim.kvm.vm import Vm
from migsim.planes import Plane
from migsim.result import Result
from migsim.scenario import Scenario
from migsim.scenario.load import build
from migsim.units import GIB, NS_PER_S
from migsim.watch import PLANES_NS, RECOUNT_NS, RECOUNTED_ROUNDS, Watch

MODES = [
    {"mmu": mmu, "vendor": vendor, "eager-page-split": eager, "manual-dirty-log-protect": manual}
    for mmu, vendor, eager, manual in product(
        ("shadow", "tdp-5.10", "tdp"), ("intel", "amd"), (True, False), ("off", "enable", "initially-set")
    )
    if eager or mmu == "tdp"  # the others never split eagerly
]
_OF_ONE_PATH = {"fast_page_fault", "pml_logged", "spte_cmpxchg"}  # metered by one of the two only


def scenario(memory: str = "32 MiB", backing: str = "2M", **kvm: Any) -> Scenario:
    return build(
        {
            "guest": {
                "memory": memory, "vcpus": 2, "backing": backing, "populated": 0.9, "device-state": "64 KiB",
                "workload": [{"pattern": "hot-cold", "rate": "9000 pages/s", "working-set": "12 MiB"}],
            },
            "kvm": kvm,
            "migration": {"max-bandwidth": 0, "time-limit": "30 s"},
            "link": {"bandwidth": "500 Mbit/s"},
        }
    )  # fmt: skip


def seen(result: Result) -> dict[str, Any]:
    """All that a result says of the migration, of KVM and of the host."""
    kvm = {name: value for name, value in result.kvm.items() if name not in ("operations", "exits", "halt_exits")}
    kvm["exits for faults"] = result.kvm["exits"] - result.kvm["halt_exits"]
    operations = {name: n for name, n in result.kvm["operations"].items() if name not in _OF_ONE_PATH}
    return {"rounds": result.rounds, "migration": result.migration, "kvm": kvm, "operations": operations,
            "host": result.host, "downtime": result.downtime}  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(value) for value in mode.values()))
def test_the_fused_loops_count_what_the_page_at_a_time_path_counts(mode: dict[str, Any]) -> None:
    what = scenario(**mode)
    fused, paged = simulation.run(what, seed=5), simulation.run(what, seed=5, page_at_a_time=True)
    assert fused.verify["lost-pages"] == paged.verify["lost-pages"] == 0 and fused.converged
    assert seen(fused) == seen(paged)


@pytest.mark.parametrize("backing", ["4K", "1G"])
@pytest.mark.parametrize(
    ("memory", "nodes"),
    [(2, 1), (3, 1), (4, 1), (4, 2)],
    ids=["a chunk", "chunks", "and a slot", "and slots and nodes"],
)
def test_a_scan_over_chunks_without_a_dirty_page_costs_both_paths_the_same(memory, nodes, backing: str) -> None:
    """Only the first GiB is written to. Of 4 GiB the last lies in a memslot of its own, behind the hole."""
    written = [{"pattern": "uniform", "rate": "3000 pages/s", "working-set": "4 MiB"}]
    guest = {"memory": memory * GIB, "vcpus": 2, "backing": backing, "numa-nodes": nodes, "populated": 0.01}
    what = build(
        {
            "guest": {**guest, "machine": "pc", "device-state": "64 KiB", "workload": written},
            "migration": {"max-bandwidth": 0}, "link": {"bandwidth": "1 Gbit/s"},
        }
    )  # fmt: skip
    fused, paged = simulation.run(what, seed=5), simulation.run(what, seed=5, page_at_a_time=True)
    assert fused.converged and fused.rounds[-1].sent_pages, "the last search comes after a page"
    assert seen(fused) == seen(paged)


def test_the_three_mmus_migrate_the_same_memory_at_different_cost_and_the_report_says_what_their_tables_take() -> None:
    columns = list(by_mmu(scenario(backing="2M"), seed=5))
    results = {column.name: column.result for column in columns}
    assert all(r.converged and r.verify["lost-pages"] == 0 for r in results.values())
    faults = {name: r.kvm["pf_taken"] for name, r in results.items()}
    assert 0 == faults["tdp"] < min(faults["shadow"], faults["tdp-5.10"]), "the others zap a huge page and fault it in"
    memory = {name: r.host["memory"] for name, r in results.items()}
    assert memory["shadow"]["rmap-bytes"] == 8 * (8192 + 16 + 1) and not memory["tdp"]["rmap-bytes"]
    assert memory["tdp"]["page-tables-bytes"] > memory["shadow"]["page-tables-bytes"] > 0, "only tdp splits eagerly"
    assert "page tables" in table(columns) and "reverse maps" in table(columns)


def test_a_cancelled_migration_ends_the_log_and_huge_pages_come_back() -> None:
    base = {"guest": {"memory": "32 MiB", "vcpus": 2, "backing": "2M"}, "link": {"bandwidth": "100 Mbit/s"}}
    result = simulation.run(build({**base, "migration": {"max-bandwidth": 0, "cancel-after": "500 ms"}}))
    assert not result.converged and result.migration["status"] == "cancelled"
    assert (result.kvm["pages_4k"], result.kvm["pages_2m"]) == (0, 16)


def test_trace_writes_kvms_tracepoints_and_the_migration_is_the_same(tmp_path: Path) -> None:
    what, out = tmp_path / "small.toml", tmp_path / "trace.jsonl"
    what.write_text(
        '[guest]\nmemory = "16 MiB"\nvcpus = 2\nbacking = "2M"\n[link]\nbandwidth = "1 Gbit/s"\n'
        '[[guest.workload]]\npattern = "uniform"\nrate = "3000 pages/s"\nworking-set = "8 MiB"\n'
    )
    results = [tmp_path / "plain.json", tmp_path / "traced.json"]
    settings = ["--set", "migration.max-bandwidth=0", "--set", "kvm.pml=false", "--quiet"]
    assert main(["run", str(what), "--json", str(results[0]), *settings]) == 0
    assert main(["run", str(what), "--json", str(results[1]), "--trace", str(out), *settings]) == 0
    plain, traced = (json.loads(path.read_text()) for path in results)
    assert traced["rounds"] == plain["rounds"] and traced["migration"] == plain["migration"]
    events = [json.loads(line) for line in out.read_text().splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert all(tuple(event)[2:] == EVENTS[event["event"]] for event in events)
    faults = sum(event["event"] == "kvm_page_fault" for event in events)
    assert faults == plain["kvm"]["pf_taken"] > 0
    assert {"kvm_mmu_split_huge_page", "kvm_tdp_mmu_spte_changed", "fast_page_fault"} <= {e["event"] for e in events}


@pytest.mark.parametrize("extra", [["--trace", "trace.jsonl"], ["--set", "kvm.dirty-ring-size=4096"]])
def test_a_guest_too_big_to_go_page_by_page_is_refused_with_a_sentence(extra, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("big.toml").write_text('[guest]\nmemory = "1 TiB"\nvcpus = 8\n[link]\nbandwidth = "10 Gbit/s"\n')
    assert main(["run", "big.toml", *extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "page by page, for guests up to" in captured.err and not captured.out
    assert not Path("trace.jsonl").exists()


def watched() -> tuple[Vm, Watch]:
    vm = Vm(VmConfig(smm=False))
    vm.set_user_memory_region(1, 0, 0, GIB, vm.alloc_memory(GIB))
    vm.create_vcpu(0).run([("w", 0, 1)])
    return vm, Watch(vm)


def test_what_breaks_a_counter_or_a_plane_is_named_while_the_migration_runs() -> None:
    vm, watch = watched()
    watch.between_windows(1, 0)
    watch.between_windows(1, 99 * NS_PER_S)
    assert watch.rounds == 1, "once a round"
    vm.mmu.root_of(vm.vcpus[0]).leaf[1].writable.set(9)
    watch.between_windows(2, 2 * NS_PER_S)
    with pytest.raises(AssertionError, match="after sync 3: slot 1: bits of a rare state without a present SPTE"):
        watch.between_windows(3, PLANES_NS)
    vm.stats.pages_4k += 1
    with pytest.raises(AssertionError, match="pages_4k is 2, a recount finds 1"):
        watch.between_windows(4, PLANES_NS + NS_PER_S)


def test_rounds_that_follow_at_once_are_recounted_at_first_and_then_now_and_then() -> None:
    vm, watch = watched()
    for sync in range(1, RECOUNTED_ROUNDS + 1):
        watch.between_windows(sync, sync)
    vm.stats.pages_4k += 1
    watch.between_windows(100, 100)
    assert (watch.rounds, watch.recounts) == (RECOUNTED_ROUNDS + 1, RECOUNTED_ROUNDS)
    with pytest.raises(AssertionError, match="after sync 101: pages_4k is 2"):
        watch.between_windows(101, 100 + RECOUNT_NS)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda vm: vm.mmu.root_of(vm.vcpus[0]).__setattr__("root_count", 5), "has 5 references, 2 holders are known"),
        (lambda vm: vm.mmu.state.rcu._deferred.append(int), "1 table pages wait to be freed"),
        (lambda vm: vm.memslots(0).by_id(1).__setattr__("dirty_bitmap", one_too_many()), "bits beyond page"),
    ],
    ids=["references", "frees", "tail-bits"],
)
def test_locks_references_and_tail_bits_are_looked_at_in_every_round(damage, sentence: str) -> None:
    vm, watch = watched()
    for sync in range(1, 50):
        watch.between_windows(sync, sync)
    recounts = watch.recounts
    damage(vm)
    with pytest.raises(AssertionError, match=sentence):
        watch.between_windows(50, 50)
    assert watch.recounts == recounts


def one_too_many() -> Plane:
    log = Plane(100)
    log.words[-1] = 1 << 63
    return log
