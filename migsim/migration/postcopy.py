"""Post-copy: the guest moves first, its pages follow.

Source: QEMU 7.2 and 10.0 migration.c (postcopy_start), ram.c (ram_postcopy_send_discard_bitmap), postcopy-ram.c. The
guest stops; a last sync; every page that is still dirty is named to the destination, which discards it; the device
state goes over as one package and the guest runs there. Then the rest is pushed in scan order under
max-postcopy-bandwidth while faults ask for pages out of turn. The source guest never runs again. Where RAM is backed by
huge pages, one that is dirty in part is dirty altogether, and asked for as a whole. Pages are placed one at a time and
whole, so multifd's channels (7.2 takes the pair) and xbzrle rest from the switch on.

A requested page is one of the dirty ones, sent earlier than its turn: requests change the order, hence the guest's
stall, not the number of pages. What a fault costs the destination is `fault_latency_ns`; how often it pays that, and
what it then writes, is perf.postcopy_faults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from migsim.migration import switchover
from migsim.migration.failure import pause_and_recover
from migsim.migration.ram import PS_PER_NS, SaveLimits
from migsim.units import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from migsim.migration.precopy import Precopy

__all__ = ["QUEUED_BYTES", "FaultCosts", "fault_latency_ns", "run"]

MAX_WAIT_PS = 50 * NS_PER_MS * PS_PER_NS
COMMAND = 1 + 2 + 2  # QEMU_VM_COMMAND, be16 command, be16 length
QUEUED_BYTES = 12.6e6  # in the sockets of one stream before a page asked for: QEMU's postcopy-preempt series, January
# 2022, 4 KiB pages over 10 Gbit/s, from a fault to its page 10.68 ms without and 0.57 ms with a channel of its own
RANGES = 12  # ranges a POSTCOPY_RAM_DISCARD command names, behind a version, the block's name and its zero byte
RANGE = 8 + 8  # be64 start and length
PACKAGE = COMMAND + 4 + COMMAND + COMMAND  # CMD_PACKAGED with be32 length, in it POSTCOPY_LISTEN and POSTCOPY_RUN


@dataclass(frozen=True, slots=True)
class FaultCosts:
    """ns of a destination fault: to raise and read it, to answer it on the source, and pages queued before it."""

    userfault_ns: float
    page_ns: float
    queued_pages: float = 0.0  # with postcopy-preempt 0: requests have a channel of their own


def fault_latency_ns(costs: FaultCosts, link_latency_ns: float) -> float:
    """How long a vCPU of the destination waits for one missing page: request there, page back, and the queue."""
    return costs.userfault_ns + 2 * link_latency_ns + (1 + costs.queued_pages) * costs.page_ns


def run(loop: Precopy) -> bool:
    """From the switch to the end; False if it was called off before the guest moved.

    Once post-copy is active nothing is called off: the guest runs at the destination, libvirt refuses to abort, and
    what is here is stale. time-limit and cancel-after mean nothing from there on.
    """
    if not _start(loop):
        return False
    loop.why = ""
    loop.window.restart(loop.clock.ms(loop.now_ns))
    if loop.progress is not None:
        loop.progress(loop)
    page_ns = _page_ns(loop)
    while loop.ram.dirty_pages:
        if loop.failure is not None and loop.link_failed():
            failure, loop.failure = loop.failure, None
            if not pause_and_recover(loop, failure):
                return True
            if loop.progress is not None:  # between pause and pushes: nothing came meanwhile
                loop.progress(loop)
        _push(loop, page_ns)
        if loop.progress is not None:
            loop.progress(loop)
    loop.stats.postcopy_requests = loop.machine.missing_page_requests()
    switchover.finish(loop)
    return True


def _start(loop: Precopy) -> bool:
    """postcopy_start; False if a cancel came while the client held the migration in pre-switchover."""
    start = loop.now_ns
    late_state, paused = loop.knobs.compat != "7.2", loop.knobs.pause_before_switchover
    if not late_state and not paused:
        loop.set_status("postcopy-active")
    switchover.stop_guest(loop)
    if switchover.hold(loop):
        switchover.cancel(loop)
        return False
    if late_state or paused:
        loop.set_status("device" if late_state else "postcopy-active")
    switchover.part(loop, "final-sync", loop.sync)
    loop.ram.round_out(loop.costs.host_page)
    loop.ram.enter_postcopy()
    switchover.part(loop, "discard", lambda: _discard(loop))
    switchover.part(loop, "device", lambda: _package(loop))
    loop.stats.downtime_ns = (loop.clock.ms(loop.now_ns) - loop.clock.ms(start)) * NS_PER_MS
    if late_state:
        loop.set_status("postcopy-active")
    switchover.resumed(loop, loop.costs.postcopy_run_ns)
    return True


def _discard(loop: Precopy) -> None:
    """Every range of dirty pages is named, twelve a command; the destination discards page by page."""
    runs, name = loop.ram.dirty_runs(), loop.costs.ram_name_bytes
    size = -(-runs // RANGES) * (COMMAND + 1 + 1 + name + 1) + runs * RANGE
    loop.sent_aside(size)
    wire_ns = int(size * NS_PER_S / loop.link_bytes_per_s(loop.now_ns))
    loop.pass_time(max(wire_ns, round(loop.ram.dirty_pages * loop.costs.discard_page_ns)))


def _package(loop: Precopy) -> None:
    """Device state in one package with the commands to listen and to run, and the time it takes on the wire."""
    size = loop.costs.device_bytes + PACKAGE
    loop.sent_aside(size)
    loop.pass_time(int(size * NS_PER_S / loop.link_bytes_per_s(loop.now_ns)) + loop.costs.device_ns)


def _page_ns(loop: Precopy) -> float:
    """What a pushed page costs on average: less where the guest that runs there misses no page it writes to."""
    missing = loop.ram.dirty_pages
    wanted = min(missing, sum(loop.ram.dirty_between(first, end) for first, end in loop.machine.written()))
    costs = loop.costs
    calm_ns = costs.postcopy_calm_page_ns or costs.postcopy_page_ns
    return (wanted * costs.postcopy_page_ns + (missing - wanted) * calm_ns) / max(missing, 1)


def _push(loop: Precopy, page_ns: float) -> None:
    """One turn of background pushes: paced by how fast the destination places pages, or by the limit."""
    pages = loop.ram.dirty_pages
    start = loop.now_ns
    loop.save(SaveLimits(loop.quantum - loop.window.bytes, MAX_WAIT_PS))
    sent = pages - loop.ram.dirty_pages
    placed_ns = round(sent * page_ns) - (loop.now_ns - start)
    if placed_ns > 0:
        loop.pass_time(placed_ns)
    loop.rate_limit()
