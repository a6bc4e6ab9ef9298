"""Stream sizes and windows: the exact checks against QEMU 7.2, to the byte."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration import wire
from migsim.migration.stats import MigrationStats
from migsim.migration.window import UNLIMITED, HostClock, Window, quantum
from migsim.scenario import build
from migsim.units import NS_PER_MS

ROMS = (
    ("pc.bios", 16, (0, 15)), ("pc.rom", 32, ()), ("/rom@etc/acpi/tables", 32, (0,)),
    ("/rom@etc/table-loader", 1, (0,)), ("/rom@etc/acpi/rsdp", 1, (0,)),
)  # fmt: skip


def bare_pc(memory_mib: int, bandwidth: int, **migration: Any) -> Any:
    """QEMU 7.2's `pc` with an own firmware: 16 MiB of zero pages but for two, then data, then the ROM blocks."""
    data = [{"offset": f"{page * 4096} B", "size": "4 KiB"} for page in (1, 3)]
    data.append({"offset": "16 MiB", "size": f"{memory_mib - 16} MiB"})
    return build(
        {
            "guest": {
                "memory": f"{memory_mib} MiB", "machine": "pc", "data": data,
                "rom": [
                    {"name": name, "size": f"{pages * 4} KiB",
                     "data": [{"offset": f"{page * 4} KiB", "size": "4 KiB"} for page in full]}
                    for name, pages, full in ROMS
                ],
            },
            "kvm": {"accel": "tcg"},
            "migration": {"compat": "7.2", "max-bandwidth": bandwidth, **migration},
            "link": {"bandwidth": "100 Gbit/s", "latency": "0 s"},
            "host": {"profile": "qemu-7.2-loopback"},
        }
    )  # fmt: skip


def test_sizes_of_page_zero_page_section_and_packet() -> None:
    assert (wire.NORMAL_PAGE, wire.ZERO_PAGE, wire.RAM_SECTION) == (4104, 9, 18)
    assert wire.multifd_packet_header() == 1344 and wire.multifd_packet(128) == 525_632


def test_setup_of_a_bare_7_2_pc_is_196_bytes() -> None:
    blocks = [wire.RamBlockName("pc.ram", 1)] + [wire.RamBlockName(name, pages) for name, pages, _ in ROMS]
    assert wire.stream_setup("pc-i440fx-7.2", blocks) == 196


def test_a_window_at_64_mib_per_s_carries_1636_pages_and_reports_537_13296_mbps() -> None:
    budget, used, pages = quantum(64 << 20), wire.SECTION_HEADER, 0
    while used <= budget:
        used, pages = used + wire.NORMAL_PAGE, pages + 1
    payload = pages * wire.NORMAL_PAGE + wire.EOS
    assert (budget, pages, payload) == (6_710_886, 1636, 6_714_152)
    assert (payload + wire.RAM_SECTION - wire.EOS) * 8 / 0.1 / 1e6 == 537.13296


def test_an_idle_512_mib_guest_transfers_what_qemu_7_2_transfers_to_the_byte() -> None:
    ram = simulation.run(bare_pc(512, 100_000_000), threads=1).migration["ram"]
    assert (ram["normal"], ram["duplicate"], ram["total"]) == (126_983, 4171, 537_206_784)
    assert ram["transferred"] == 521_176_255  # 50 sections
    unlimited = simulation.run(bare_pc(512, 0), threads=1).migration["ram"]
    assert unlimited["transferred"] == 521_175_871  # two calls of 50 ms


def test_a_multifd_packet_is_counted_when_handed_over() -> None:
    scenario = bare_pc(512, 200_000_000, capabilities=["multifd"])
    ram = simulation.run(scenario, threads=1).migration["ram"]
    assert ram["normal"] == 126_983
    assert ram["multifd-bytes"] >= 126_983 * 4096 + 993 * 1344
    assert ram["transferred"] - ram["multifd-bytes"] < 40_000  # zero pages, names and section ends on the main stream


def test_events_come_in_the_order_qemu_7_2_emits_them() -> None:
    from migsim.migration.events import expected_order
    from migsim.migration.precopy import Precopy

    logs: list[list[str]] = []
    original = Precopy.run

    def run(loop: Precopy) -> str:
        status = original(loop)
        named = {"MIGRATION": "status", "MIGRATION_PASS": "pass"}
        logs.append([f"{n} {d[named[n]]}" if n in named else n for _, n, d in loop.events if n != "RESUME"])
        return status

    Precopy.run = run  # type: ignore[method-assign]
    try:
        simulation.run(bare_pc(512, 0), threads=1)
    finally:
        Precopy.run = original  # type: ignore[method-assign]
    assert logs == [expected_order(3, compat="7.2")]


@given(st.integers(0, 10**9), st.integers(0, NS_PER_MS - 1), st.integers(0, 99 * NS_PER_MS))
def test_a_window_that_sleeps_ends_100_or_101_ms_after_it_began(start: int, phase: int, sending: int) -> None:
    clock = HostClock(phase)
    window = Window(clock.ms(start))
    sent = start + sending
    woken = sent + window.left_ms(clock.ms(sent)) * NS_PER_MS + 90_000
    assert window.over(clock.ms(woken))
    assert clock.ms(woken) - window.start_ms in (100, 101)


def test_no_bandwidth_limit_means_no_quantum() -> None:
    assert quantum(0) == UNLIMITED and quantum(100_000_000) == 10_000_000


@given(st.integers(1, 2000), st.integers(0, 10**9))
def test_a_window_ends_with_any_avail_switchover_bandwidth(switchover_bw: int, dirty_bytes: int) -> None:
    stats = MigrationStats(1 << 30, dirty_pages_rate=1, dirty_bytes_last_sync=dirty_bytes, expected_downtime_ms=300)
    stats.end_window(20_000, 5, 100 * NS_PER_MS, 300, switchover_bw)
    per_ms = switchover_bw // 1000
    assert stats.threshold_bytes == per_ms * 300
    assert stats.expected_downtime_ms == (dirty_bytes // per_ms if per_ms else 0)
