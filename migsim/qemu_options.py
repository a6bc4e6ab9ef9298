"""A scenario's `[migration]` as arguments of the loop: who throttles, who watches, what wraps RAM, the host's clock."""

from __future__ import annotations

from typing import Any

import numpy as np

from migsim.migration.compress import CompressRam
from migsim.migration.devices import DeviceSet, VfioDevice
from migsim.migration.failure import LinkFailure
from migsim.migration.loop_types import RamState
from migsim.migration.mapped_ram import MappedRam, bitmap_bytes
from migsim.migration.multifd import MultifdRam
from migsim.migration.policies.choice import platform_of, throttle_of
from migsim.migration.policies.dirty_limit import DirtyLimit
from migsim.migration.policies.protocol import GuestThrottle, Platform, SetVcpuDirtyLimit
from migsim.migration.policies.script import Scripted
from migsim.migration.ram import Ram
from migsim.migration.window import HostClock
from migsim.migration.xbzrle import Floats, Ints, XbzrleCache, XbzrleRam
from migsim.migration.zero_pages import rule_of
from migsim.qemu_costs import QemuCosts
from migsim.scenario import Scenario
from migsim.sim.prng import stream_key
from migsim.units import MIB, NS_PER_MS, NS_PER_S, PAGE_SIZE
from migsim.world import World, link_bytes_per_s, streams_of

__all__ = ["StreamWriters", "loop_options", "wire_ram"]

CLOCK = 7  # stream of the host clock's randomness: where in a ms the migration starts, how late wake-ups are


def loop_options(scenario: Scenario, seed: int, costs: QemuCosts) -> dict[str, Any]:
    """Keyword arguments of migration.precopy.Precopy."""
    throttle = throttle_of(scenario.migration, scenario.guest.vcpus, scenario.kvm.dirty_ring_size)
    return {
        "devices": _devices(scenario, costs),
        "failure": _failure(scenario),
        "to_file": scenario.migration.to_file,
        "return_path": bool({"return-path", "postcopy-ram"} & set(scenario.migration.capabilities)),
        "throttle": throttle,
        "vcpu_limit": _vcpu_limit(scenario, throttle),
        "platform": _platform(scenario),
        "clock": HostClock(stream_key(seed, CLOCK) % NS_PER_MS, stream_key(seed, CLOCK, 1)),
    }


def _vcpu_limit(scenario: Scenario, throttle: GuestThrottle) -> DirtyLimit | None:
    """dirty-limit's state, which QEMU has wherever there are dirty rings."""
    ring = scenario.kvm.dirty_ring_size
    if isinstance(throttle, DirtyLimit) or not ring:
        return throttle if isinstance(throttle, DirtyLimit) else None
    return DirtyLimit(scenario.guest.vcpus, ring)


def _platform(scenario: Scenario) -> Platform:
    """Who watches, and what is commanded at given times."""
    watching = platform_of(scenario.migration, scenario.guest.memory)
    limits = sorted(scenario.set_vcpu_dirty_limit, key=lambda limit: limit.at)
    commands = [(limit.at, SetVcpuDirtyLimit(limit.dirty_rate, limit.cpu_index)) for limit in limits]
    return Scripted(watching, commands) if commands else watching


def _failure(scenario: Scenario) -> LinkFailure | None:
    """[link] fail-at. Lost with it: a full send buffer (tcp_wmem, 4 MiB at most, assumed) and what the wire holds."""
    link = scenario.link
    if link.fail_at is None:
        return None
    on_the_wire = int(link.latency * link_bytes_per_s(scenario, link.fail_at) / NS_PER_S)
    recover = scenario.migration.postcopy_recover_after
    return LinkFailure(link.fail_at, link.fail_noticed_after, recover, 4 * MIB + on_the_wire)


def _devices(scenario: Scenario, costs: QemuCosts) -> DeviceSet:
    return DeviceSet(
        [VfioDevice(d.name, d.initial, d.dirty_rate, d.stop_copy, d.load) for d in scenario.guest.device],
        round_trip_ns=2 * scenario.link.latency, byte_ns=costs.ns("qemu_vfio_byte"),
        query_ns=round(costs.ns("qemu_vfio_query")),
        ack="switchover-ack" in scenario.migration.capabilities,
    )  # fmt: skip


def wire_ram(scenario: Scenario, ram: Ram, world: World, costs: QemuCosts) -> RamState:
    """RAM as the stream sees it: in packets with multifd, as differences with xbzrle, else page by page.

    With both (7.2 takes the pair, 10.0 refuses it) multifd carries the pages, as QEMU tries it first.
    """
    m = scenario.migration
    old = m.compat == "7.2"
    if "mapped-ram" in m.capabilities:
        return _mapped(scenario, ram)
    if "multifd" in m.capabilities:
        writes = any(stream.pages_per_s for stream in world.workload.streams)
        requeue = costs.ns("multifd_requeue_busy" if writes else "multifd_requeue_idle") if old else 0.0
        zero = rule_of(m.zero_page_detection, m.capabilities, m.compat)
        return MultifdRam(
            ram, m.multifd_channels, requeue, sync_each_section=old, zero_on_channels=zero.on_channels,
            page_bytes=costs.channel_page().stream_bytes,
            copied="zero-copy-send" in m.capabilities and scenario.link.copies_zero_copy,
            main_costs=lambda: costs.save(link_bytes_per_s(scenario, world.workload.now_ns), postcopy=True),
        )  # fmt: skip
    if "compress" in m.capabilities:
        return CompressRam(ram, lambda: costs.threaded_page(link_bytes_per_s(scenario, world.workload.now_ns)))
    if "xbzrle" in m.capabilities:
        cache = XbzrleCache(m.xbzrle_cache_size // PAGE_SIZE)
        return XbzrleRam(ram, cache, StreamWriters(scenario, world), costs.ns("qemu_xbzrle"))
    return ram


def _mapped(scenario: Scenario, ram: Ram) -> RamState:
    """Pages to their places in a file: by the migration thread, or by channels without packets."""
    m = scenario.migration
    ram.names_blocks = False
    bitmaps = sum(bitmap_bytes(state.block.pages) for state in ram.blocks)
    if "multifd" not in m.capabilities:
        return MappedRam(ram, bitmaps, link_bytes_per_s(scenario, 0))
    on_channels = rule_of(m.zero_page_detection, m.capabilities, m.compat).on_channels
    channels = MultifdRam(ram, m.multifd_channels, zero_on_channels=on_channels, header_bytes=0, zero_bytes=0)
    return MappedRam(channels, bitmaps, link_bytes_per_s(scenario, 0))


class StreamWriters:
    """What XBZRLE's encoder knows of the guest's streams: a page's mean rate, and bytes a write."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        self.workload = world.workload
        self.sizes = [config.write_bytes for config in scenario.guest.workload for _ in streams_of(config)]
        self.running_s, self.at_ns = 0.0, 0

    def clock(self) -> float:
        """Seconds of running at full speed: the throttle stretches time, not work."""
        now = self.workload.now_ns
        self.running_s += (now - self.at_ns) / NS_PER_S * self.workload.duty / self.workload.slowdown
        self.at_ns = now
        return self.running_s

    def writes_a_second(self, pages: Ints) -> Floats:
        rates = np.zeros(len(pages))
        for stream in self.workload.streams:
            inside = (pages >= stream.first) & (pages < stream.end)
            rates += inside * (stream.pages_per_s * stream.factor(self.workload.now_ns) / (stream.end - stream.first))
        return rates

    def write_bytes(self, pages: Ints) -> Ints:
        """Of the stream with the largest writes there; 64 where none writes."""
        sizes = np.zeros(len(pages), dtype=np.int64)
        for stream, size in zip(self.workload.streams, self.sizes, strict=True):
            inside = (pages >= stream.first) & (pages < stream.end)
            sizes = np.maximum(sizes, inside * size)
        return np.where(sizes == 0, 64, sizes)

