"""Multifd packets, the XBZRLE cache, zero pages, dirty-rate estimators."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.multifd import FULL_PACKET, MultifdRam
from migsim.migration.ram import SaveCosts, Saved, SaveLimits
from migsim.migration.xbzrle import XbzrleCache, encoded_bytes
from migsim.migration.zero_pages import rule_of
from migsim.scenario import build
from migsim.units import PAGE_SIZE


@dataclass
class FakeRam:
    """Sends a list of pages (True: zero) under `Ram`'s rule, page by page."""

    pages: list[bool]
    costs: SaveCosts = field(default_factory=lambda: SaveCosts(1000, 100, 0, 0, 0, 4104, 9))
    spent_ps: int = 0
    total_bytes: int = 0

    @property
    def dirty_pages(self) -> int:
        return len(self.pages)

    def sync(self) -> int:
        return 0

    def save(self, limits: SaveLimits) -> Saved:
        normal = zero = used = spent = 0
        while self.pages and used <= limits.bytes and spent < limits.ps:
            is_zero = self.pages.pop(0)
            normal, zero = normal + (not is_zero), zero + is_zero
            used += self.costs.zero_bytes if is_zero else self.costs.normal_bytes
            spent += self.costs.zero_ps if is_zero else self.costs.normal_ps
        why = 0 if not self.pages else 1 if used > limits.bytes else 2
        return Saved(normal, zero, used, spent, why)


@given(st.integers(1, 2000), st.integers(0, 40 * FULL_PACKET))
def test_a_multifd_window_stops_with_the_first_packet_that_passes_its_quantum(pages: int, quantum: int) -> None:
    ram = MultifdRam(FakeRam([False] * pages), channels=2, sync_each_section=True, setup_synced=True)  # type: ignore[arg-type]
    saved = ram.save(SaveLimits(quantum, 1 << 62))
    packets = min(-(-pages // 128), quantum // FULL_PACKET + 1)
    assert saved.normal == min(pages, 128 * packets)
    assert saved.channel_bytes == saved.page_bytes == (packets + 2) * 1344 + saved.normal * PAGE_SIZE


@given(st.lists(st.booleans(), max_size=600))
def test_zero_pages_cost_a_record_before_9_0_and_only_header_room_after(pages: list[bool]) -> None:
    zeros, data = sum(pages), len(pages) - sum(pages)
    old = MultifdRam(FakeRam(list(pages)), 2, setup_synced=True)  # type: ignore[arg-type]
    new = MultifdRam(FakeRam(list(pages)), 2, setup_synced=True, zero_on_channels=True)  # type: ignore[arg-type]
    before, after = old.save(SaveLimits(1 << 60, 1 << 62)), new.save(SaveLimits(1 << 60, 1 << 62))
    barrier = 2 * 1344
    assert before.page_bytes == 9 * zeros + data * PAGE_SIZE + -(-data // 128) * 1344 + barrier
    assert after.page_bytes == data * PAGE_SIZE + -(-len(pages) // 128) * 1344 + barrier


def test_a_page_queued_twice_takes_a_place_but_is_no_normal_page() -> None:
    ram = MultifdRam(FakeRam([False] * 1270), 2, requeue=1.0, setup_synced=True)  # type: ignore[arg-type]
    saved = ram.save(SaveLimits(9 * FULL_PACKET, 1 << 62))  # ten packets, each with one page twice
    assert saved.normal == 1270 and saved.channel_bytes >= 10 * FULL_PACKET


class OnePageSlots:
    """page_cache.c page by page: the rule `XbzrleCache` follows in bulk."""

    def __init__(self, slots: int) -> None:
        self.slots, self.held = slots, dict[int, tuple[int, int]]()

    def insert(self, page: int, age: int) -> None:
        owner, since = self.held.get(page % self.slots, (page, age))
        if owner == page or since + 2 <= age:
            self.held[page % self.slots] = (page, age)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), max_size=60))
def test_the_cache_keeps_a_page_two_syncs_against_another_of_its_slot(inserts: list[tuple[int, int]]) -> None:
    cache, rule, age = XbzrleCache(4), OnePageSlots(4), 1
    for page, later in inserts:
        age += later
        cache.insert(np.array([page]), age, 0.0)
        rule.insert(page, age)
        for known in range(8):
            assert bool(cache.hits(np.array([known]))[0]) == (rule.held.get(known % 4, (-1, 0))[0] == known)


def test_encoded_sizes_grow_with_writes_until_a_page_overflows() -> None:
    writes = np.array([1.0, 2.0, 8.0, 50.0, 5000.0])
    sizes = encoded_bytes(writes, np.full(5, 64))
    assert list(sizes) == sorted(sizes) and 66 <= sizes[0] <= 69 and sizes[-1] >= 4000
    assert encoded_bytes(np.array([1.0]), np.array([4096]))[0] == PAGE_SIZE


@pytest.mark.parametrize("capabilities", [["xbzrle"], ["multifd"], []])
def test_no_page_is_lost_whatever_carries_them(capabilities: list[str]) -> None:
    scenario = build(
        {
            "guest": {"memory": "128 MiB", "zero": "10 %", "workload": [
                {"pattern": "hot-cold", "rate": "20000 pages/s", "working-set": "64 MiB"}]},
            "migration": {"max-bandwidth": "100 MB/s", "capabilities": capabilities, "xbzrle-cache-size": "32 MiB"},
            "link": {"bandwidth": "10 Gbit/s"},
        }
    )  # fmt: skip
    result = simulation.run(scenario, threads=1)
    assert result.converged and result.verify["lost-pages"] == 0


def test_zero_pages_are_looked_for_where_the_version_does() -> None:
    assert rule_of("multifd", ["multifd"], "10.0").on_channels
    assert not rule_of("multifd", [], "10.0").on_channels
    assert not rule_of("none", [], "10.0").looked_for
    assert rule_of("none", [], "7.2").bytes == 9
