"""The capability compress of QEMU up to 9.0: who packs a page, what it weighs, what query-migrate counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.compress import threaded_page
from migsim.migration.wire import NORMAL_PAGE
from migsim.qemu_costs import ASSUMED_NS
from migsim.result import Result
from migsim.scenario import ScenarioError, build

FAST = 1e12


@dataclass
class Options:
    compress_level: int = 1
    compress_threads: int = 8
    decompress_threads: int = 2
    compress_wait_thread: bool = True


def page(left: float = 0.5, link: float = FAST, **options: Any) -> Any:
    return threaded_page(ASSUMED_NS.__getitem__, Options(**options), left, ASSUMED_NS["qemu_page"], link)


@given(
    st.integers(0, 9), st.integers(1, 64), st.integers(1, 64), st.booleans(), st.floats(0.01, 1.0), st.floats(1e6, 1e11)
)
@settings(max_examples=200)
def test_more_threads_never_slow_a_thread_that_waits_for_them_and_none_beats_the_wire(
    level: int, threads: int, unpack: int, wait: bool, left: float, link: float
) -> None:
    options = {"compress_level": level, "decompress_threads": unpack, "compress_wait_thread": wait}
    one, more = (page(left, link, compress_threads=n, **options) for n in (threads, threads + 1))
    assert (more.ns <= one.ns or not wait) and 0 < one.share <= 1 and (one.share == 1 or not wait)
    assert one.ns >= one.bytes * 1e9 / link * (1 - 1e-6)
    if not wait and one.share < 1:
        work = one.drain_ns * one.share / one.ns
        assert work == pytest.approx(threads, rel=1e-3), "the threads are never idle while a page goes out whole"


def test_one_thread_paces_it_and_waiting_for_it_costs_time_that_sending_whole_saves() -> None:
    waiting, impatient = (page(compress_threads=1, compress_wait_thread=wait) for wait in (True, False))
    assert waiting.ns == pytest.approx(44_000) and waiting.share == 1
    assert impatient.ns < waiting.ns / 10 and impatient.bytes > 0.9 * NORMAL_PAGE


def test_few_decompress_threads_hold_the_source_up() -> None:
    assert page(compress_threads=64, decompress_threads=1).ns == pytest.approx(11_700)
    assert page(compress_threads=64, decompress_threads=4).ns == pytest.approx(3_000)


def run(**migration: Any) -> Result:
    stream = {"pattern": "uniform", "rate": "2000 pages/s", "working-set": "32 MiB"}
    rom = [{"name": "pc.rom", "size": "128 KiB", "data": [{"offset": "4 KiB", "size": "4 KiB"}]}]
    return simulation.run(
        build(
            {
                "guest": {"memory": "128 MiB", "zero": "20 %", "workload": [stream], "rom": rom},
                "migration": {"compat": "7.2", "max-bandwidth": 0, "capabilities": ["compress"], **migration},
                "link": {"bandwidth": "400 Mbit/s"},
            }
        ),
        threads=1,
    )


def test_packed_pages_count_as_compression_alone_and_every_byte_adds_up() -> None:
    result = run()
    ram, counts = result.migration["ram"], result.migration["compression"]
    assert result.converged and result.verify["lost-pages"] == 0
    assert counts["busy"] == 0 and counts["compressed-size"] == counts["pages"] * (4 + 2048)
    assert ram["normal"] >= 1, "the first page of RAM, which holds data, goes out whole"
    named = ram["transferred"] - ram["normal"] * 4104 - ram["duplicate"] * 9 - counts["pages"] * 8
    sections = named - counts["compressed-size"]
    assert 0 < sections < 2000 and sections % 8 < 8
    sent = sum(row.sent_pages + row.zero_pages for row in result.rounds)
    assert ram["normal"] + ram["duplicate"] + counts["pages"] == sent


def test_the_wire_carries_less_and_the_migration_is_sooner_over_where_pages_pack_well() -> None:
    packed, whole = run(), run(capabilities=[])
    assert packed.migration["ram"]["transferred"] < 0.6 * whole.migration["ram"]["transferred"]
    assert packed.migration["total-time"] < 0.7 * whole.migration["total-time"]


def test_without_waiting_busy_threads_leave_pages_to_the_migration_thread() -> None:
    result = run(**{"compress-threads": 1, "compress-wait-thread": False, "compress-level": 9})
    ram, counts = result.migration["ram"], result.migration["compression"]
    assert counts["busy"] >= ram["normal"] > counts["pages"] > 0
    assert result.verify["lost-pages"] == 0


def test_level_0_stores_and_makes_pages_longer() -> None:
    ram = run(**{"compress-level": 0}).migration
    assert ram["compression"]["compressed-size"] == ram["compression"]["pages"] * (4 + 4096 + 11)
    assert ram["compression"]["compression-rate"] < 1.0


@pytest.mark.parametrize(
    ("migration", "problem"),
    [
        ({"compat": "10.0"}, "was last in QEMU 9.0"),
        ({"capabilities": ["compress", "multifd"]}, "Multifd is not compatible with compress"),
        ({"capabilities": ["compress", "xbzrle"]}, "accepts the pair"),
        ({"capabilities": ["compress", "postcopy-ram", "postcopy-preempt"]}, "not compatible with compress"),
        ({"compress-threads": 0}, ">= 1"),
        ({"compress-level": 10}, "<= 9"),
    ],
)
def test_what_cannot_be_is_refused(migration: dict[str, Any], problem: str) -> None:
    with pytest.raises(ScenarioError) as error:
        run(**migration)
    assert problem in str(error.value)
