"""Post-copy: the guest moves first, its pages follow.

Source: QEMU 7.2 and 10.0 migration.c (postcopy_start), ram.c (ram_postcopy_send_discard_bitmap), postcopy-ram.c. The
guest stops; a last sync; every page that is still dirty is named to the destination, which discards it; the device
state goes over as one package and the guest runs there. Then the rest is pushed in scan order under
max-postcopy-bandwidth while faults ask for pages out of turn. The source guest never runs again.

A requested page is one of the dirty ones, sent earlier than its turn: requests change the order, hence the guest's
stall, not the number of pages. What a fault costs the destination is `fault_latency_ns`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migsim.migration import switchover
from migsim.migration.ram import PS_PER_NS, SaveLimits
from migsim.migration.window import quantum
from migsim.units import NS_PER_MS

if TYPE_CHECKING:
    from migsim.migration.precopy import Precopy

__all__ = ["FaultCosts", "fault_latency_ns", "requests", "run"]

MAX_WAIT_PS = 50 * NS_PER_MS * PS_PER_NS


@dataclass(frozen=True, slots=True)
class FaultCosts:
    """ns of a destination fault: to raise and read it, to answer it on the source, and pages queued before it."""

    userfault_ns: float
    page_ns: float
    queued_pages: float = 0.0  # with postcopy-preempt 0: requests have a channel of their own


def fault_latency_ns(costs: FaultCosts, link_latency_ns: float) -> float:
    """How long a vCPU of the destination waits for one missing page: request there, page back, and the queue."""
    return costs.userfault_ns + 2 * link_latency_ns + (1 + costs.queued_pages) * costs.page_ns


def requests(missing_pages: int, working_set_pages: int, writes_per_s: float, push_s: float) -> int:
    """Pages asked for out of turn while `missing_pages` of a working set are pushed evenly over `push_s`.

    Uniform writes: at time t a write hits a page still missing with probability m(t)/ws, m falling by the push and by
    the requests; the expectation of the hits, one a page.
    """
    if not missing_pages or not working_set_pages or push_s <= 0:
        return 0
    rate = writes_per_s / working_set_pages  # visits a page and second
    # a page whose turn comes at time t (uniform in push_s) was asked for before with 1 - exp(-rate t)
    asked = 1.0 - (1.0 - math.exp(-rate * push_s)) / (rate * push_s) if rate > 0 else 0.0
    return round(missing_pages * asked)


def run(loop: Precopy) -> bool:
    """From the switch to the end; always True: the migration is over."""
    _start(loop)
    loop.window.restart(loop.clock.ms(loop.now_ns))
    before = loop.ram.dirty_pages
    pushed_from = loop.now_ns
    while loop.ram.dirty_pages:
        _push(loop)
    loop.stats.postcopy_requests = loop.machine.missing_page_requests(before, loop.now_ns - pushed_from)
    switchover.finish(loop)
    return True


def _start(loop: Precopy) -> None:
    start = loop.now_ns
    late_state = loop.knobs.compat != "7.2"
    if not late_state:
        loop.set_status("postcopy-active")
    switchover.part(loop, "stop", lambda: switchover.stop_guest(loop))
    if late_state:
        loop.set_status("device")
    switchover.part(loop, "final-sync", lambda: loop.sync(stopped=True))
    switchover.part(loop, "discard", lambda: _discard(loop))
    switchover.part(loop, "device", lambda: loop.pass_time(loop.costs.device_ns))
    loop.stats.downtime_ns = (loop.clock.ms(loop.now_ns) - loop.clock.ms(start)) * NS_PER_MS
    if late_state:
        loop.set_status("postcopy-active")
    switchover.resumed(loop, loop.costs.postcopy_run_ns)


def _discard(loop: Precopy) -> None:
    loop.pass_time(round(loop.ram.dirty_pages * loop.costs.discard_page_ns))


def _push(loop: Precopy) -> None:
    """One window of background pushes: paced by how fast the destination places pages, or by the limit."""
    limit = quantum(loop.knobs.max_postcopy_bandwidth)
    pages = loop.ram.dirty_pages
    start = loop.now_ns
    loop.save(SaveLimits(limit - loop.window.bytes, MAX_WAIT_PS))
    sent = pages - loop.ram.dirty_pages
    placed_ns = round(sent * loop.costs.postcopy_page_ns) - (loop.now_ns - start)
    if placed_ns > 0:
        loop.pass_time(placed_ns)
    now_ms = loop.clock.ms(loop.now_ns)
    if loop.window.over(now_ms):
        loop.window.restart(now_ms)
    elif loop.window.bytes > limit:
        loop.pass_time(loop.window.left_ms(now_ms) * NS_PER_MS + loop.clock.spread(loop.costs.wake_ns))
        loop.window.restart(loop.clock.ms(loop.now_ns))
