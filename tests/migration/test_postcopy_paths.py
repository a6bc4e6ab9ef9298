"""What carries pages after post-copy's switch: whole host pages, the main channel, TLS; and the waiting reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.marked import between, round_out, runs
from migsim.planes import Plane, new_summary, summarise
from migsim.result import Result
from migsim.scenario import ScenarioError, build
from migsim.units import CHUNK_PAGES


def summary_of(plane: Plane) -> Any:
    """A bit for each word that is not zero, and one for each group of 64 that has such a word."""
    summary = new_summary(plane.n)
    summarise(plane.words, summary)
    return summary


@given(
    st.integers(1, 3 * 512 + 77), st.sampled_from([64, 512, CHUNK_PAGES]), st.booleans(),
    st.lists(st.tuples(st.booleans(), st.integers(0, 3 * 512 + 76)), max_size=12),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_host_page_with_a_dirty_page_is_dirty_altogether(
    tail: int, host_page: int, first_full: bool, dirty: list[tuple[bool, int]]
) -> None:
    n = CHUNK_PAGES + tail
    plane, marked = Plane(n), set[int]()
    for last_chunk, page in dirty:
        page = min(page + CHUNK_PAGES * last_chunk, n - 1)
        plane.set(page)
        marked.add(page)
    if first_full:
        plane.set_range(0, CHUNK_PAGES)
        marked |= set(range(CHUNK_PAGES))
    summary = summary_of(plane)
    added = round_out(plane, summary, host_page)
    whole = {p for h in {p // host_page for p in marked} for p in range(h * host_page, min((h + 1) * host_page, n))}
    assert added == len(whole) - len(marked) and between(plane, 0, n) == len(whole)
    assert all(plane.get(page) for page in list(whole)[:2000])
    known = np.unpackbits(summary.view(np.uint8), bitorder="little")[: len(plane.words)]
    assert known[np.flatnonzero(plane.words)].all(), "a word that is not zero is in the summary"
    tops = np.unpackbits(summary[len(summary) // 65 * 64 :].view(np.uint8), bitorder="little")
    assert tops[np.flatnonzero(plane.words) >> 6].all(), "its group is in the top"
    assert runs(plane) <= max(1, len({p // host_page for p in whole}))


def run(*capabilities: str, page_at_a_time: bool = False, seed: int = 0, **tables: Any) -> Result:
    stream = {"pattern": "uniform", "rate": "20000 pages/s", "working-set": "100 MiB"}
    guest = {"memory": "128 MiB", "vcpus": 2, "zero": "10 %", "workload": [stream]} | tables.pop("guest", {})
    migration = {
        "capabilities": ["postcopy-ram", *capabilities], "postcopy-after": "300 ms", "max-bandwidth": 0,
        "downtime-limit": "5 ms", "time-limit": "1 min",
    }  # fmt: skip
    migration |= tables.pop("migration", {})
    tables = {"link": {"bandwidth": "1 Gbit/s"}} | tables
    scenario = build({"guest": guest, "migration": migration, **tables})
    result = simulation.run(scenario, threads=1, seed=seed, page_at_a_time=page_at_a_time)
    assert result.migration["ram"]["postcopy-bytes"] > 0, "it did move by post-copy"
    return result


@pytest.mark.parametrize("backing", ["4K", "2M"])
@pytest.mark.parametrize("protect", ["initially-set", "off"])
def test_the_fused_loops_round_out_as_the_readable_ones_do(backing: str, protect: str) -> None:
    options: dict[str, Any] = {"guest": {"backing": backing}, "kvm": {"manual-dirty-log-protect": protect}}
    fused, readable = run(**options), run(page_at_a_time=True, **options)
    assert fused.migration == readable.migration and fused.rounds == readable.rounds
    assert fused.converged and fused.verify["lost-pages"] == 0


def test_huge_pages_make_more_of_what_is_left_and_fewer_requests() -> None:
    stream = {"pattern": "uniform", "rate": "4000 pages/s", "working-set": "100 MiB"}
    late = {"migration": {"postcopy-after": "1 min", "postcopy-after-passes": 2, "downtime-limit": "1 ms"}}
    small, huge = (run(guest={"backing": b, "workload": [stream]}, **late) for b in ("4K", "2M"))
    sent = [r.migration["ram"]["normal"] + r.migration["ram"]["duplicate"] for r in (small, huge)]
    assert sent[1] > sent[0] and huge.migration["total-time"] > small.migration["total-time"]
    early = [run("postcopy-preempt", guest={"backing": b}).migration["ram"]["postcopy-requests"] for b in ("4K", "2M")]
    assert 0 < early[1] <= 50 < early[0], "of 50 huge pages each is asked for once at most"


def test_multifd_in_7_2_leaves_pages_to_the_main_channel_after_the_switch() -> None:
    plain, multi = run(migration={"compat": "7.2"}), run("multifd", migration={"compat": "7.2"})
    ram = multi.migration["ram"]
    assert multi.converged and multi.verify["lost-pages"] == 0
    assert ram["multifd-bytes"] > 0 and ram["postcopy-bytes"] > 0.9 * plain.migration["ram"]["postcopy-bytes"]
    pushed = ram["postcopy-bytes"] // 4104
    packets = ram["multifd-bytes"] / (ram["normal"] - pushed)
    assert 4096 < packets < 4096 * 1.2, "what the channels carried is what was sent before"


def test_10_0_refuses_multifd_with_postcopy() -> None:
    with pytest.raises(ScenarioError, match="Postcopy is not yet compatible with multifd"):
        run("multifd")


def test_xbzrle_rests_after_the_switch() -> None:
    stream = {"pattern": "hot-cold", "rate": "20000 pages/s", "working-set": "100 MiB", "write-bytes": 8}
    late = {"postcopy-after": "1 min", "postcopy-after-passes": 3, "xbzrle-cache-size": "256 MiB"}
    late["downtime-limit"] = "1 ms"
    result = run("xbzrle", guest={"workload": [stream]}, migration=late)
    ram, cache = result.migration["ram"], result.migration["xbzrle-cache"]
    assert result.converged and cache["pages"] > 0 and result.verify["lost-pages"] == 0
    whole, rest = divmod(ram["postcopy-bytes"], 4104)
    assert whole > 100 and rest < 4104, "pages go out whole: nothing is a difference"
    sent_after = sum(row.sent_pages + row.zero_pages for row in result.rounds if row.stopped)
    assert sent_after * 4104 >= ram["postcopy-bytes"] - 20_000 >= whole * 4104 - 30_000


def test_tls_makes_placing_dearer() -> None:
    early = {"postcopy-after": "30 ms", "downtime-limit": "0 ms"}
    fast: dict[str, Any] = {"link": {"bandwidth": "40 Gbit/s"}, "guest": {"memory": "1 GiB"}}
    plain, secret = (run(migration={**early, **tls}, **fast) for tls in ({}, {"tls-creds": "tls0"}))
    pushed = [
        r.migration["total-time"] / r.migration["ram"]["postcopy-bytes"] * r.migration["ram"]["total"]
        for r in (plain, secret)
    ]
    assert pushed[1] > pushed[0] * 1.1


@pytest.mark.parametrize("compat", ["7.2", "10.0"])
def test_zero_copy_that_is_copied_counts_each_flush_and_costs_more(compat: str) -> None:
    real, copied = (
        simulation.run(
            build(
                {
                    "guest": {"memory": "256 MiB"},
                    "migration": {
                        "compat": compat, "max-bandwidth": 0, "capabilities": ["multifd", "zero-copy-send"],
                        "multifd-channels": 3,
                    },
                    "link": {"bandwidth": "100 Gbit/s", "copies-zero-copy": copies},
                }
            ),
            threads=1,
        )
        for copies in (False, True)
    )  # fmt: skip
    missed = copied.migration["ram"]["dirty-sync-missed-zero-copy"]
    assert real.migration["ram"]["dirty-sync-missed-zero-copy"] == 0
    assert missed >= 3 and missed % 3 == 0
    if compat == "10.0":
        assert missed <= copied.migration["ram"]["dirty-sync-count"] * 3
    assert copied.migration["total-time"] > real.migration["total-time"]


def test_blocktime_is_the_destinations_and_counts_who_waited() -> None:
    result = run("postcopy-blocktime")
    reply = result.destination
    waited = reply["postcopy-vcpu-blocktime"]
    assert reply["status"] == "completed" and len(waited) == 2 and waited[0] > 0
    assert 0 <= reply["postcopy-blocktime"] <= min(waited)
    one = [{"pattern": "uniform", "rate": "20000 pages/s", "working-set": "100 MiB", "vcpus": 1}]
    idle = run("postcopy-blocktime", guest={"workload": one}).destination
    assert idle["postcopy-vcpu-blocktime"][1] == 0 == idle["postcopy-blocktime"]
    assert run().destination == {}
