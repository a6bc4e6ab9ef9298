"""What a host profile means for QEMU's migration thread: ns and bytes a page, on this link, with these capabilities.

Operations a profile does not price take the assumed values below; `assumed_costs` names them for the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from migsim.guest.memory import layout
from migsim.migration import background_snapshot, compress, compression, dirty_rate, mapped_ram
from migsim.migration.loop_types import LoopCosts
from migsim.migration.policies.auto_converge import TIMESLICE_NS
from migsim.migration.ram import PS_PER_NS, SaveCosts
from migsim.migration.wire import NORMAL_PAGE, ZERO_PAGE, RamBlockName, stream_setup
from migsim.scenario import BACKING_BYTES, Scenario
from migsim.units import NS_PER_MS, NS_PER_S, PAGE_SIZE

TICK_SHARE, TICK_FROM_NS = 0.2, 5 * NS_PER_MS

#: ns each, assumed where a host profile says nothing: a 2.7 GHz server, TCP, not measured here.
ASSUMED_NS: Mapping[str, float] = {
    "qemu_page": 1600.0,  # read, zero test, copy into the socket: one thread sends about 20 Gbit/s
    "qemu_page_multifd": 120.0,  # the main thread finds the page and queues it
    "multifd_page": 1300.0,  # one channel reads, tests and sends it
    "multifd_requeue_busy": 0.0,  # a share: full packets whose last page QEMU up to 8.1 queues twice, busy guest
    "multifd_requeue_idle": 0.0,  # the same beside an idle guest
    "qemu_page_after_sleep": 1600.0,  # the same in a thread that sleeps most of each window: caches and clock are cold
    "qemu_page_untouched": 2600.0,  # a page whose place at the destination is not there yet: a fault and 4 KiB cleared
    "qemu_page_kvm": 0.0,  # more, where reading guest memory costs KVM's shadow pages something
    "qemu_zero_page": 350.0,  # read 4 KiB, find nothing
    "qemu_bitmap_word": 1.0,
    "qemu_section": 2_000.0,
    "kvm_clear": 5_000.0,
    "kvm_clear_stopped": 5_000.0,  # the same with every vCPU out of the guest: requests set, nobody kicked
    "kvm_clear_page": 7.0,  # a real KVM_CLEAR_DIRTY_LOG on a development machine: about 7 ns a page
    "kvm_clear_leaf": 0.0,  # and each of these that a 4K leaf maps; every host profile prices it
    "kvm_clear_table": 0.0,  # each table a CLEAR splits a huge page into; every host profile prices it
    "kvm_get": 0.0,  # a GET that re-arms at once, beyond its copy: only without manual protection, priced with it
    "kvm_get_page": 0.0,
    "qemu_sync": 100_000.0,
    "qemu_sync_page": 0.05,  # 1/8 byte a page, copied and scanned four times at 10 GB/s
    "qemu_stop": 2_000_000.0,
    "qemu_stop_vcpu": 20_000.0,
    "qemu_device_state": 10_000_000.0,
    "qemu_device_load": 5_000_000.0,  # the destination, from the last byte until all but VFIO devices have their state
    "qemu_vfio_query": 1_000_000.0,  # a device asked for its stop-copy size: a command to its firmware
    "qemu_vfio_byte": 0.2,  # reading device state out of the kernel driver, 5 GB/s
    "qemu_resume": 0.0,  # from the source's end until the destination's vCPUs run
    "qemu_setup": 1_000_000.0,
    "qemu_xbzrle": 1_500.0,  # a page compared with its cached copy and encoded
    "qemu_tcg_write": 2_000.0,  # a page write at full speed under TCG; bounds how fast lost time is made up for
    "qemu_kvm_write": 205.0,  # the same under KVM, as guest-write of the host profiles
    "qemu_tcg_slowdown": 0.0,  # share of its time a TCG guest loses while it is migrated
    "qemu_wake": 80_000.0,  # a timed wait ends late: timer slack of 50 us and a wake-up
    "qemu_window": 80_000.0,  # reading the clock, flushing the stream, reading it again
    "qemu_throttle_wake": 90_000.0,  # a throttled vCPU's sleep ends late
    "qemu_throttle_tick_tcg": 0.0,  # how late, at most, a throttle tick is under TCG
    "qemu_sync_handover": 0.0,  # from a throttled vCPU's waking until the sync that waited for it goes on, under TCG
    "qemu_postcopy_page": 3_000.0,  # sent, received, placed with UFFDIO_COPY
    "qemu_postcopy_page_calm": 3_000.0,  # the same beside a guest that misses none of the pages it writes to
    # from a fault to its page, but for the wire and the queue before it: 0.57 ms with postcopy-preempt and 4 KiB pages
    # over 10 Gbit/s (QEMU's series of January 2022), less a round trip of about 0.1 ms
    "qemu_postcopy_request": 470_000.0,
    "qemu_postcopy_discard_page": 130.0,  # a dirty page named to the destination and discarded there
    **compression.ASSUMED_NS,
    **dirty_rate.ASSUMED_NS,
    **compress.ASSUMED_NS,
    **mapped_ram.ASSUMED_NS,
    **background_snapshot.ASSUMED_NS,
    "qemu_postcopy_run": 6_000_000.0,  # package received and loaded until the destination's vCPUs run
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

    @property
    def tls(self) -> bool:
        """Is the stream encrypted?"""
        return bool(self.scenario.migration.tls_creds)

    @property
    def mapped_ram(self) -> bool:
        """Does every page go to its own place in a file?"""
        return "mapped-ram" in self.scenario.migration.capabilities

    @property
    def compressed(self) -> bool:
        """Do threads of the capability compress deflate the pages?"""
        return "compress" in self.scenario.migration.capabilities

    def threaded_page(self, link_bytes_per_s: float) -> compress.ThreadedPage:
        """A page of data under the capability compress, on a link of that speed."""
        m, left = self.scenario.migration, self.scenario.guest.compressed
        return compress.threaded_page(self.ns, m, left, self._page_ns(), link_bytes_per_s)

    def channel_page(self) -> compression.ChannelPage:
        """A page of data on one of multifd's channels."""
        m = self.scenario.migration
        levels = {"zlib": m.multifd_zlib_level, "zstd": m.multifd_zstd_level, "qatzip": m.multifd_qatzip_level}
        return compression.channel_page(
            self.ns, m.multifd_compression, levels.get(m.multifd_compression, 1), self.scenario.guest.compressed,
            tls=self.tls, sent_by=self._sent_by(),
        )  # fmt: skip

    def _sent_by(self) -> str:
        """The operation by which a channel sends a page."""
        m = self.scenario.migration
        if "zero-copy-send" in m.capabilities:
            return "multifd_page_zero_copy_copied" if self.scenario.link.copies_zero_copy else "multifd_page_zero_copy"
        return "multifd_page_direct_io" if m.direct_io and self.mapped_ram else "multifd_page"

    def save(self, link_bytes_per_s: float, *, first_pass: bool = False, postcopy: bool = False) -> SaveCosts:
        """Costs of a page on a link of that speed: the slowest of thread, channels and wire sets the pace.

        In the first pass over RAM a destination that was started without its memory is the slowest. In post-copy pages
        leave multifd's channels for the main one.
        """
        thread_ns, zero_ns, normal_bytes = self._page_ns(), self.ns("qemu_zero_page"), NORMAL_PAGE
        wire_bytes, zero_bytes = float(normal_bytes), 0 if self.mapped_ram else ZERO_PAGE
        if self.multifd and not postcopy:
            channels = self.scenario.migration.multifd_channels
            page = self.channel_page()
            normal_bytes, wire_bytes = page.stream_bytes, page.wire_bytes  # packets are migration.multifd's
            thread_ns = max(self.ns("qemu_page_multifd"), page.cpu_ns / channels)
            if self.scenario.migration.compat != "7.2":  # channels look for zero pages since 9.0
                zero_ns = max(self.ns("qemu_page_multifd"), zero_ns / channels)
        elif self.compressed:
            threaded = self.threaded_page(link_bytes_per_s)
            thread_ns, normal_bytes, wire_bytes = threaded.ns, round(threaded.bytes), 0.0
            zero_ns = max(self.ns("qemu_page_compress"), zero_ns / self.scenario.migration.compress_threads)
        elif self.mapped_ram:
            thread_ns, normal_bytes, wire_bytes = thread_ns + self.ns("qemu_pwrite_page"), PAGE_SIZE, float(PAGE_SIZE)
        elif self.tls:
            thread_ns += self.ns("tls_byte") * NORMAL_PAGE
            wire_bytes = compression.tls_wire_bytes(NORMAL_PAGE)
        if first_pass and not (self.scenario.host.destination_prealloc or self.mapped_ram):
            receivers = self.scenario.migration.multifd_channels if self.multifd else 1
            thread_ns = max(thread_ns, self.ns("qemu_page_untouched") / receivers)
        return SaveCosts(
            normal_ps=round(max(thread_ns * PS_PER_NS, _wire_ps(wire_bytes, link_bytes_per_s))),
            zero_ps=round(max(zero_ns * PS_PER_NS, _wire_ps(zero_bytes, link_bytes_per_s))),
            word_ps=round(self.ns("qemu_bitmap_word") * PS_PER_NS),
            clear_ps=round(self.ns("kvm_clear") * PS_PER_NS),
            clear_page_ps=round(self.ns("kvm_clear_page") * PS_PER_NS),
            normal_bytes=normal_bytes,
            zero_bytes=zero_bytes,
            clear_stopped_ps=round(self.ns("kvm_clear_stopped") * PS_PER_NS),
            clear_leaf_ps=round(self.ns("kvm_clear_leaf") * PS_PER_NS),
            clear_table_ps=round(self.ns("kvm_clear_table") * PS_PER_NS),
            get_ps=round(self.ns("kvm_get") * PS_PER_NS),
            get_page_ps=round(self.ns("kvm_get_page") * PS_PER_NS),
        )

    def _page_ns(self) -> float:
        """What the thread pays for a page: it is dearer to one that sleeps off its rate limit in every window."""
        limit, busy_ns = self.scenario.migration.max_bandwidth, self.ns("qemu_page")
        sleeps = limit and limit / PAGE_SIZE * busy_ns < NS_PER_S
        page_ns = self.ns("qemu_page_after_sleep") if sleeps else busy_ns
        return page_ns + (self.ns("qemu_page_kvm") if self.scenario.kvm.accel == "kvm" else 0.0)

    def throttle_tick_delay_ns(self, percentage: int) -> int:
        """How much later than asked the throttle timer fires under TCG, where vCPU and main loop share a lock.

        Nothing up to sleeps of 5 ms, then a share of them up to the bound: recordings at 20 to 99 % of throttle.
        """
        if self.scenario.kvm.accel != "tcg" or not percentage:
            return 0
        sleep_ns = TIMESLICE_NS * percentage / (100 - percentage)
        return round(min(self.ns("qemu_throttle_tick_tcg"), TICK_SHARE * max(0.0, sleep_ns - TICK_FROM_NS)))

    @property
    def machine(self) -> str:
        """The machine type as the stream names it."""
        compat = self.scenario.migration.compat
        return f"pc-i440fx-{compat}" if self.scenario.guest.machine == "pc" else f"pc-q35-{compat}"

    @property
    def blocks(self) -> list[RamBlockName]:
        """RAM's blocks as the stream names them."""
        guest = self.scenario.guest
        blocks = [(name, pages) for name, pages, _ in layout(guest.memory, guest.numa_nodes, guest.machine)]
        blocks += [(rom.name, rom.size // PAGE_SIZE) for rom in guest.rom]
        return [RamBlockName(name, pages) for name, pages in blocks]

    def setup_bytes(self) -> int:
        """The stream before its first page: header, machine type, RAM's blocks."""
        headers = mapped_ram.HEADER * len(self.blocks) if self.mapped_ram else 0
        return stream_setup(self.machine, self.blocks) + headers

    def loop(self) -> LoopCosts:
        """Costs of the loop's own steps."""
        latency_ns = 0 if self.scenario.migration.to_file else self.scenario.link.latency
        tls_ns = self.ns("tls_byte") * NORMAL_PAGE if self.tls else 0.0  # where pages are placed, decrypting adds up
        return LoopCosts(
            setup_bytes=self.setup_bytes(),
            load_ns=round(self.ns("qemu_device_load")),
            latency_ns=latency_ns,
            resume_ns=round(self.ns("qemu_resume")),
            wake_ns=round(self.ns("qemu_wake")),
            window_ns=round(self.ns("qemu_window")),
            discard_page_ns=self.ns("qemu_postcopy_discard_page"),
            host_page=BACKING_BYTES[self.scenario.guest.backing] // PAGE_SIZE,
            postcopy_page_ns=self.ns("qemu_postcopy_page") + tls_ns,
            postcopy_calm_page_ns=self.ns("qemu_postcopy_page_calm") + tls_ns,
            postcopy_run_ns=round(self.ns("qemu_postcopy_run")),
            sync_ns=round(self.ns("qemu_sync")),
            sync_page_ps=round(self.ns("qemu_sync_page") * PS_PER_NS),
            section_ns=round(self.ns("qemu_section")),
            device_bytes=self.scenario.guest.device_state,
            device_ns=round(self.ns("qemu_device_state")),
            flush_ns=2 * latency_ns,
        )

    def stop_ns(self) -> int:
        """vm_stop: every vCPU is kicked and waited for."""
        return round(self.ns("qemu_stop") + self.scenario.guest.vcpus * self.ns("qemu_stop_vcpu"))

    def assumed_costs(self) -> dict[str, float]:
        """Operations no profile priced, and what was assumed, ns."""
        return {op: ns for op, ns in ASSUMED_NS.items() if op not in self.priced_ns}


def _wire_ps(size: float, link_bytes_per_s: float) -> float:
    return size * NS_PER_S * PS_PER_NS / link_bytes_per_s
