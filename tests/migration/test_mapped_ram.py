"""mapped-ram and files: where pages lie, what is written, and what a file cannot do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.mapped_ram import ALIGNMENT, HEADER, bitmap_bytes, file_bytes, places
from migsim.migration.wire import RamBlockName
from migsim.quantities import clock
from migsim.result import Result
from migsim.scenario import ScenarioError, build
from migsim.terminal import summary
from migsim.units import PAGE_SIZE


def run(*capabilities: str, **tables: Any) -> Result:
    stream = {"pattern": "uniform", "rate": "3000 pages/s", "working-set": "32 MiB"}
    migration = {"max-bandwidth": 0, "downtime-limit": "100 ms", "capabilities": ["mapped-ram", *capabilities]}
    guest = {"memory": "256 MiB", "vcpus": 2, "zero": "25 %", "workload": [stream]} | tables.pop("guest", {})
    return simulation.run(
        build(
            {
                "guest": guest,
                "migration": migration | tables.pop("migration", {}),
                "storage": {"bandwidth": "500 MB/s"},
                **tables,
            }
        ),
        threads=1,
    )


@given(st.lists(st.integers(1, 1 << 22), min_size=1, max_size=6), st.integers(0, 5000))
def test_blocks_follow_one_another_aligned_and_apart(sizes: list[int], start: int) -> None:
    blocks = [RamBlockName(f"block{i}", pages) for i, pages in enumerate(sizes)]
    laid_out, at = places(blocks, start), start
    for block, place in zip(blocks, laid_out, strict=True):
        assert place.bitmap_offset == at + 1 + len(block.idstr) + 8 + HEADER
        assert place.pages_offset % ALIGNMENT == 0
        assert 0 <= place.pages_offset - place.bitmap_offset - bitmap_bytes(block.pages) < ALIGNMENT
        at = place.end
    assert file_bytes(laid_out, start, start + sum(9 + len(b.idstr) + HEADER for b in blocks)) == at


def test_the_file_holds_ram_once_however_often_its_pages_were_written() -> None:
    calm, busy = run(guest={"workload": []}), run(migration={"downtime-limit": "10 ms"})
    assert busy.migration["ram"]["normal"] > calm.migration["ram"]["normal"]
    assert busy.file["written-bytes"] > calm.file["written-bytes"]
    ram = 256 << 20
    for result in (calm, busy):
        assert result.file["blocks"] == [{"idstr": "pc.ram", "bitmap-offset": 92, "pages-offset": 1 << 20}]
        assert 0 < result.file["size-bytes"] - ram - (1 << 20) < (4 << 20) + 10_000, "device state and section ends"
        assert result.converged and result.verify["lost-pages"] == 0


def test_a_page_is_written_without_a_header_and_a_zero_page_not_at_all() -> None:
    ram = run(guest={"workload": []}).migration["ram"]
    assert ram["duplicate"] == 16384 and ram["normal"] == 49152
    rest = ram["transferred"] - ram["normal"] * PAGE_SIZE - bitmap_bytes(65536) - (4 << 20)
    assert 92 < rest < 400, "setup and section ends"


def test_nobody_resumes_the_guest_and_the_bitmap_belongs_to_the_blackout() -> None:
    result = run("events")
    names = [event["event"] for event in result.events]
    assert names.count("STOP") == 1 and "RESUME" not in names
    assert {part.name for part in result.downtime} == {"stop", "final-sync", "clear", "wire", "device", "flush"}
    assert "saved to its file" in result.verdict and "saved to its file" in summary(result, 80).replace("\n", " ")


@pytest.mark.parametrize("mode", ["normal", "cpr-reboot"])
def test_the_guest_of_a_file_is_said_to_stay_stopped_and_nothing_of_it_to_be_on_a_wire(mode: str) -> None:
    result = run(storage={"bandwidth": "100 MB/s"}, migration={"mode": mode})
    told = result.verdict + summary(result, 200)
    assert "the guest stays stopped, since " in result.verdict and "Stopped until saved" in told
    assert not any(words in told.lower() for words in ("blackout", "on the wire", "line rate"))
    stood = clock(sum(part.duration_ns for part in result.downtime))
    assert f"saving took {stood} from there" in result.verdict
    assert ("to storage" in result.verdict) == (mode == "normal"), "longest is the whole copy where it stopped first"


def test_storage_bandwidth_is_the_speed() -> None:
    fast, slow = run(storage={"bandwidth": "400 MB/s"}), run(storage={"bandwidth": "100 MB/s"})
    assert slow.migration["total-time"] > 3 * fast.migration["total-time"]
    assert slow.migration["total-time"] > 192 / 100 * 1000


def test_channels_write_pages_without_packets_and_direct_io_makes_them_faster() -> None:
    storage = {"bandwidth": "100 GB/s"}
    one = run(storage=storage)
    two = run("multifd", storage=storage)
    direct = run("multifd", storage=storage, migration={"direct-io": True})
    for result in (two, direct):
        ram = result.migration["ram"]
        assert ram["multifd-bytes"] == ram["normal"] * PAGE_SIZE and result.verify["lost-pages"] == 0
    times = [r.migration["total-time"] for r in (one, two, direct)]
    assert times == sorted(times, reverse=True) and times[0] > times[2]
    ignored = run(storage=storage, migration={"direct-io": True})  # QEMU takes it only with multifd
    assert ignored.migration == one.migration


def test_a_plain_file_takes_the_whole_stream() -> None:
    mapped = run(guest={"workload": []})
    plain = run(guest={"workload": []}, migration={"capabilities": [], "uri": "file:/var/tmp/guest"})
    assert plain.file == {"size-bytes": plain.migration["ram"]["transferred"]} | {
        "written-bytes": plain.migration["ram"]["transferred"]
    }
    assert plain.migration["ram"]["transferred"] > mapped.migration["ram"]["transferred"]


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"migration": {"compat": "7.2"}}, "exists since QEMU 9.0"),
        ({"migration": {"compat": "7.2", "capabilities": [], "uri": "file:x"}}, "expects a valid migration protocol"),
        ({"migration": {"uri": "tcp:host:4444"}}, "requires seekable transport"),
        ({"migration": {"tls-creds": "tls0"}}, "Cannot use TLS with mapped-ram"),
        ({"migration": {"multifd-compression": "zlib"}}, "Cannot use compression with mapped-ram"),
        ({"migration": {"capabilities": ["mapped-ram", "xbzrle"]}}, "incompatible with xbzrle"),
        ({"migration": {"capabilities": ["mapped-ram", "postcopy-ram"]}}, "incompatible with postcopy"),
        ({"migration": {"capabilities": ["mapped-ram", "return-path"]}}, "a file does not"),
        ({"migration": {"capabilities": ["multifd"], "uri": "file:x"}}, "requires multi-channel URIs"),
        ({"migration": {"capabilities": [], "uri": "rdma:host:1"}, "storage": None}, "RDMA is not modelled"),
        ({"migration": {"capabilities": []}}, 'is what a "file:" uri writes to'),
        ({"link": {"fail-at": "1 s"}}, "no connection that dies"),
    ],
)
def test_what_cannot_be_is_refused(tables: dict[str, Any], problem: str) -> None:
    with pytest.raises(ScenarioError) as error:
        run(**tables)
    assert problem in str(error.value) and "\n" not in str(error.value)
