"""Compressed packets, TLS records, zero-copy: bytes on the stream, and channels as the CPUs that pay for them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.compression import channel_page
from migsim.qemu_costs import ASSUMED_NS
from migsim.result import Result
from migsim.scenario import ScenarioError, build
from migsim.units import PAGE_SIZE


def run(gbit: float = 10, compressed: float = 0.5, capabilities: tuple[str, ...] = ("multifd",), **more: Any) -> Result:
    scenario = build(
        {
            "guest": {"memory": "64 MiB", "vcpus": 1, "zero": 0.0, "compressed": compressed},
            "migration": {"capabilities": list(capabilities), "max-bandwidth": 0, **more},
            "link": {"bandwidth": f"{gbit} Gbit/s"},
        }
    )
    return simulation.run(scenario, threads=1)


def total_ms(result: Result) -> int:
    return int(result.migration["total-time"])


def test_compressed_packets_carry_the_share_that_is_left() -> None:
    ram = run(compressed=0.25, **{"multifd-compression": "zstd"}).migration["ram"]
    pages = 64 * 256
    assert ram["normal"] == pages
    headers = ram["multifd-bytes"] - pages * 1024
    assert headers % 1344 == 0 and headers >= pages // 128 * 1344


def test_on_a_slow_link_compression_pays_and_on_a_fast_one_it_costs() -> None:
    zstd = {"multifd-compression": "zstd", "multifd-channels": 4}
    assert total_ms(run(0.5, **zstd)) < 0.6 * total_ms(run(0.5, **{"multifd-channels": 4}))
    assert total_ms(run(100, **zstd)) > 2 * total_ms(run(100, **{"multifd-channels": 4}))


def test_channels_are_the_cpus_of_compression() -> None:
    few, many = (run(100, **{"multifd-compression": "zlib", "multifd-channels": n}) for n in (2, 16))
    assert total_ms(few) == pytest.approx(8 * total_ms(many), rel=0.25)


def test_tls_costs_cpu_and_wire_but_no_byte_that_qemu_counts() -> None:
    for capabilities in ((), ("multifd",)):
        plain, tls = (run(100, capabilities=capabilities, **{"tls-creds": name}) for name in ("", "tls0"))
        assert plain.migration["ram"]["transferred"] == pytest.approx(tls.migration["ram"]["transferred"], rel=0.001)
        assert total_ms(tls) > 1.2 * total_ms(plain)


def test_zero_copy_shortens_a_channels_work() -> None:
    assert total_ms(run(100, capabilities=("multifd", "zero-copy-send"))) < total_ms(run(100))


@given(st.sampled_from(["zlib", "zstd", "qpl", "uadk", "qatzip"]), st.integers(1, 9), st.floats(0, 1))
def test_a_higher_level_never_costs_less_and_no_page_grows(method: str, level: int, share: float) -> None:
    page = channel_page(ASSUMED_NS.__getitem__, method, level, share)
    above = channel_page(ASSUMED_NS.__getitem__, method, level + 1, share)
    assert 1 <= page.stream_bytes <= PAGE_SIZE and page.wire_bytes == page.stream_bytes
    assert above.cpu_ns >= page.cpu_ns > ASSUMED_NS["multifd_page"]


def test_a_share_above_one_is_refused_in_one_sentence() -> None:
    with pytest.raises(ScenarioError, match=r"guest\.compressed"):
        run(compressed=1.5)
