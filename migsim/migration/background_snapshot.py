"""background-snapshot: the guest stands still only while its devices are saved; RAM is saved while it runs on.

Source: QEMU 10.0 migration/migration.c (bg_migration_thread, bg_migration_iteration_run, bg_migration_completion) and
ram.c (ram_write_tracking_prepare, _start). Setup reads every page, so that there is something to protect; the guest
stops; device state goes into a buffer; all of RAM is write-protected; the guest resumes, and `downtime` ends there. RAM
follows (migration.write_tracking), then the buffer. There is no dirty log, no sync, no rate limit; the guest goes on
where it is. Pages are counted here, not followed one by one: nothing is sent twice and nothing can be overtaken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from migsim.migration import switchover
from migsim.migration.loop_types import RoundLog
from migsim.migration.over_ram import OverRam
from migsim.migration.ram import NO_LIMITS, PS_PER_NS, Ram, SaveCosts, Saved, SaveLimits
from migsim.migration.ram_kernels import END_OF_SPAN, TIME_LIMIT
from migsim.migration.write_tracking import TrackedWrites
from migsim.units import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from migsim.migration.precopy import Precopy

__all__ = ["ASSUMED_NS", "PS_PER_S", "SnapshotCosts", "SnapshotRam", "run"]

MAX_WAIT_NS: Final = 50 * NS_PER_MS  # of one call of the RAM handler
PS_PER_S: Final = PS_PER_NS * NS_PER_S
LOWEST_SHARE: Final = 1e-9
CALLS_MAX: Final = 4000  # a longer snapshot is looked at less often, and sections are counted

#: ns, assumed: setup touches a page (MADV_POPULATE_READ), write-protecting a mapping and releasing one (UFFDIO_WRITE-
#: PROTECT with its TLB flush, and the stream flushed before it), a fault read and its vCPU woken.
ASSUMED_NS: Final[Mapping[str, float]] = {
    "qemu_snapshot_populate": 40.0, "qemu_snapshot_protect": 15.0, "qemu_snapshot_release": 3_000.0,
    "qemu_snapshot_fault": 8_000.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SnapshotCosts:
    """ns of the two steps over all of RAM."""

    populate_ns: int
    protect_ns: int


@dataclass
class SnapshotRam(OverRam[Ram]):
    """RAM as a snapshot saves it, each page once. `price()`: costs of a page now; `set_slowdown`: of the guest."""

    tracked: TrackedWrites
    price: Callable[[], SaveCosts]
    set_slowdown: Callable[[float], None]
    block_names: int  # bytes of the names that go with each block's first page
    section_bytes: int  # around a section, where several are told as one
    sent: tuple[int, int] = (0, 0)  # pages of data, zero pages
    saved: tuple[float, float] = (0.0, 0.0)  # the same, with the fractions of what is under way

    @property
    def dirty_pages(self) -> int:
        return self.tracked.pages - sum(self.sent)

    def save(self, limits: SaveLimits) -> Saved:
        """As many sections of 50 ms as `limits.ps` has room for."""
        costs, tracked = self.price(), self.tracked
        tracked.set_price(costs.normal_ps / PS_PER_S, costs.zero_ps / PS_PER_S)
        normal, zero, used_s, share = tracked.run(limits.ps / PS_PER_S)
        self.set_slowdown(1.0 / max(share, LOWEST_SHARE))
        self.saved = (self.saved[0] + normal, self.saved[1] + zero)
        whole = (tracked.pages - tracked.zero_pages, tracked.zero_pages)
        now = whole if tracked.done else (min(whole[0], int(self.saved[0])), min(whole[1], int(self.saved[1])))
        normal_pages, zero_pages = now[0] - self.sent[0], now[1] - self.sent[1]
        self.sent = now
        sections = max(0, -(-int(used_s * NS_PER_S) // MAX_WAIT_NS) - 1)
        size = normal_pages * costs.normal_bytes + zero_pages * costs.zero_bytes + sections * self.section_bytes
        size, self.block_names = size + self.block_names, 0
        why = END_OF_SPAN if tracked.done else TIME_LIMIT
        return Saved(normal_pages, zero_pages, size, int(used_s * PS_PER_S), why)

    def told(self) -> dict[str, float]:
        """What the guest paid."""
        t = self.tracked
        return {
            "write-faults": round(t.faults),
            "vcpu-stalled-ns": round(t.stalled_s * NS_PER_S),
            "highest-mean-fault-wait-ns": round(t.longest_s * NS_PER_S),
            "lowest-throughput-share": round(t.slowest_share, 6),
        }


def run(loop: Precopy, ram: SnapshotRam, costs: SnapshotCosts) -> str:
    """bg_migration_thread. Final status."""
    loop.knobs = replace(loop.knobs, max_bandwidth=0)  # RATE_LIMIT_DISABLED
    loop.begin()
    loop.pass_time(costs.populate_ns)
    loop.stats.setup_ns = (loop.clock.ms(loop.now_ns) - loop.start_ms) * NS_PER_MS
    loop.set_status("active")
    loop.rounds.append(RoundLog(1, loop.now_ns, ram.dirty_pages, 0))
    _stop_and_protect(loop, costs)
    whole_ps = int(ram.tracked.whole_s * PS_PER_S)  # each page once, whoever comes first
    step = SaveLimits(NO_LIMITS.bytes, max(MAX_WAIT_NS * PS_PER_NS, whole_ps // CALLS_MAX))
    while ram.dirty_pages:
        if loop.called_off():
            return switchover.cancel(loop)
        loop.save(step)
        loop.rate_limit()
        if loop.progress is not None:
            loop.progress(loop)
    ram.set_slowdown(1.0)
    loop.sent_aside(loop.costs.device_bytes)
    loop.pass_time(int(loop.costs.device_bytes * NS_PER_S / loop.link_bytes_per_s(loop.now_ns)) + loop.costs.flush_ns)
    switchover.finish(loop)
    return loop.status


def _stop_and_protect(loop: Precopy, costs: SnapshotCosts) -> None:
    """The guest stands still while devices are saved into a buffer and RAM is write-protected."""
    start = loop.now_ns
    switchover.stop_guest(loop)
    switchover.part(loop, "device", lambda: loop.pass_time(loop.costs.device_ns))
    switchover.part(loop, "protect", lambda: loop.pass_time(costs.protect_ns))
    loop.machine.resume()
    loop.guest_stopped = False
    loop.event("RESUME")
    loop.stats.downtime_ns = (loop.clock.ms(loop.now_ns) - loop.clock.ms(start)) * NS_PER_MS

