"""What a host profile means for QEMU's migration thread: ns and bytes a page, on this link, with these capabilities.

Operations a profile does not price take the assumed values below; `assumed_costs` names them for the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from migsim.migration.precopy import LoopCosts
from migsim.migration.ram import PS_PER_NS, SaveCosts
from migsim.scenario import Scenario
from migsim.units import NS_PER_S, PAGE_SIZE

PAGE_HEADER_BYTES = 8
ZERO_PAGE_BYTES = 9
MULTIFD_PACKET_PAGES = 128
MULTIFD_PACKET_BYTES = 320 + 8 * MULTIFD_PACKET_PAGES

#: ns each, assumed where a host profile says nothing: a 2.7 GHz server, TCP, not measured here.
ASSUMED_NS: Mapping[str, float] = {
    "qemu_page": 1600.0,  # read, zero test, copy into the socket: one thread sends about 20 Gbit/s
    "qemu_page_multifd": 120.0,  # the main thread finds the page and queues it
    "multifd_page": 1300.0,  # one channel reads, tests and sends it
    "qemu_zero_page": 350.0,  # read 4 KiB, find nothing
    "qemu_bitmap_word": 1.0,
    "qemu_section": 2_000.0,
    "kvm_clear": 5_000.0,
    "kvm_clear_page": 7.0,  # a real KVM_CLEAR_DIRTY_LOG on a development machine: about 7 ns a page
    "qemu_sync": 100_000.0,
    "qemu_sync_page": 0.05,  # 1/8 byte a page, copied and scanned four times at 10 GB/s
    "qemu_stop": 2_000_000.0,
    "qemu_stop_vcpu": 20_000.0,
    "qemu_device_state": 10_000_000.0,
    "qemu_setup": 1_000_000.0,
}


@dataclass(frozen=True)
class QemuCosts:
    """Costs of one scenario's migration thread; `ns(op)` gives the priced operation."""

    scenario: Scenario
    priced_ns: Mapping[str, float]

    def ns(self, op: str) -> float:
        """ns of one operation: the profile's, or the assumed."""
        return self.priced_ns.get(op, ASSUMED_NS[op])

    @property
    def multifd(self) -> bool:
        """Do channels carry the pages?"""
        return "multifd" in self.scenario.migration.capabilities

    def save(self, link_bytes_per_s: float) -> SaveCosts:
        """Costs of a page on a link of that speed: the slowest of thread, channels and wire sets the pace."""
        normal_bytes = PAGE_SIZE + PAGE_HEADER_BYTES
        thread_ns, zero_ns = self.ns("qemu_page"), self.ns("qemu_zero_page")
        if self.multifd:
            channels = self.scenario.migration.multifd_channels
            normal_bytes = PAGE_SIZE + -(-MULTIFD_PACKET_BYTES // MULTIFD_PACKET_PAGES)
            thread_ns = max(self.ns("qemu_page_multifd"), self.ns("multifd_page") / channels)
            zero_ns = max(self.ns("qemu_page_multifd"), zero_ns / channels)
        return SaveCosts(
            normal_ps=round(max(thread_ns * PS_PER_NS, _wire_ps(normal_bytes, link_bytes_per_s))),
            zero_ps=round(max(zero_ns * PS_PER_NS, _wire_ps(ZERO_PAGE_BYTES, link_bytes_per_s))),
            word_ps=round(self.ns("qemu_bitmap_word") * PS_PER_NS),
            clear_ps=round(self.ns("kvm_clear") * PS_PER_NS),
            clear_page_ps=round(self.ns("kvm_clear_page") * PS_PER_NS),
            normal_bytes=normal_bytes,
            zero_bytes=ZERO_PAGE_BYTES,
        )

    def loop(self) -> LoopCosts:
        """Costs of the loop's own steps."""
        return LoopCosts(
            sync_ns=round(self.ns("qemu_sync")),
            sync_page_ps=round(self.ns("qemu_sync_page") * PS_PER_NS),
            section_ns=round(self.ns("qemu_section")),
            device_bytes=self.scenario.guest.device_state,
            device_ns=round(self.ns("qemu_device_state")),
            flush_ns=2 * self.scenario.link.latency,
        )

    def stop_ns(self) -> int:
        """vm_stop: every vCPU is kicked and waited for."""
        return round(self.ns("qemu_stop") + self.scenario.guest.vcpus * self.ns("qemu_stop_vcpu"))

    def assumed_costs(self) -> dict[str, float]:
        """Operations no profile priced, and what was assumed, ns."""
        return {op: ns for op, ns in ASSUMED_NS.items() if op not in self.priced_ns}


def _wire_ps(size: int, link_bytes_per_s: float) -> float:
    return size * NS_PER_S * PS_PER_NS / link_bytes_per_s
