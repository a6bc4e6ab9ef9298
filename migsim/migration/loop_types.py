"""What the migration loop is made of: the seams to RAM and machine, its knobs, costs and limits, a round's row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from migsim.migration.policies.protocol import VcpuDirtyRate
from migsim.migration.ram import Saved, SaveLimits


class RamState(Protocol):
    """What the loop asks of RAM (migration.ram, migsim.fused for the same in fewer visits, and what wraps them)."""

    @property
    def dirty_pages(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    def sync(self) -> int:
        """migration_bitmap_sync: how many pages became dirty."""

    def save(self, limits: SaveLimits) -> Saved:
        """ram_save_iterate until a limit or until nothing is dirty."""

    def stop_vcpus(self) -> None:
        """The vCPUs stand still: from here on a CLEAR kicks nobody."""

    def enter_last_stage(self) -> None:
        """What follows is the last pass (RAMState.last_stage): caches take no more pages."""

    def round_out(self, host_page: int) -> None:
        """At post-copy's switch: a host page (of so many target pages) with a dirty page is dirty altogether."""

    def enter_postcopy(self) -> None:
        """From here on every page goes out on the main channel, by itself: no packets, no differences."""

    def update_rates(self) -> None:
        """migration_update_rates: a period of statistics ends."""

    def reply(self) -> dict[str, Any]:
        """What it adds to query-migrate."""

    def clear_ps(self) -> int:
        """What all CLEARs so far cost at the present price; differences count while the price stands."""

    def get_ps(self) -> int:
        """The same of GETs that re-arm pages at once, without manual protection."""

    def dirty_between(self, first: int, end: int) -> int:
        """Dirty pages of the guest's [first, end)."""

    def dirty_runs(self) -> int:
        """Ranges of dirty pages that follow one another: what post-copy's discard commands list."""


class Machine(Protocol):
    """The source VM and its host, as the loop can touch them."""

    def log_start(self) -> int:
        """Start dirty logging on every slot, allocate bitmaps; ns it took."""

    def log_stop(self) -> None:
        """Stop dirty logging."""

    def run_until(self, now_ns: int) -> None:
        """The guest has run until now."""

    def stop(self) -> int:
        """vm_stop; ns until every vCPU stood still (the guest ran until this call)."""

    def resume(self) -> None:
        """The guest runs again on the source."""

    def set_throttle(self, percentage: int) -> None:
        """cpu-throttle-percentage of every vCPU; 0 none."""

    def sync_wait_ns(self) -> int:
        """How long a sync that begins now waits for throttled vCPUs."""

    def vcpu_dirty_rates(self) -> list[VcpuDirtyRate]:
        """What the dirty rings counted for each vCPU over the last period."""

    def set_vcpu_sleeps(self, sleeps_us: list[int]) -> None:
        """us each vCPU sleeps at a full ring from now on."""

    def written(self) -> list[tuple[int, int]]:
        """Ranges of guest pages [first, end) that the guest writes to, none of them twice."""

    def missing_page_requests(self) -> int:
        """Post-copy: how many pages the running guest has asked for."""


@dataclass(frozen=True)
class LoopCosts:
    """Times of the loop's own steps, ns unless named otherwise, and sizes; from host profile and stream format."""

    sync_ns: int  # one bitmap sync, whatever the size
    sync_page_ps: int  # and for each page of RAM (bitmap copied and scanned)
    section_ns: int  # one call of the RAM handler
    device_bytes: int
    device_ns: int  # saving device state
    flush_ns: int  # the last bytes reach the destination: latency of the link
    load_ns: int = 0  # the destination loads it; known to the source, and counted, only with a return path
    latency_ns: int = 0  # of the link, one way
    resume_ns: int = 0  # from the source's end to the destination's vCPUs running
    wake_ns: int = 0  # a timed wait ends this much late, on average
    window_ns: int = 0  # between reading the clock and starting the next window, on average
    setup_bytes: int = 0  # stream header, configuration and RAM's setup section
    section_header_bytes: int = 5  # written before a section's first page
    ram_name_bytes: int = len("pc.ram")  # the block's name in post-copy's discard commands
    host_page: int = 1  # target pages of the page size that backs RAM: what post-copy discards and places
    discard_page_ns: float = 0.0  # post-copy: naming one dirty page to the destination
    postcopy_page_ns: float = 0.0  # post-copy: one page sent, received and placed while the guest asks for others
    postcopy_calm_page_ns: float = 0.0  # the same once it misses none of those it writes to; 0: as much
    postcopy_run_ns: int = 0  # post-copy: from the package sent to the destination's vCPUs running


@dataclass(frozen=True)
class Limits:
    """What ends a migration that does not converge."""

    time_ns: int | None = None
    rounds: int | None = None
    cancel_ns: int | None = None
    switchover_pause_ns: int = 0


@dataclass(frozen=True)
class Knobs:
    """The MigrationParameters the loop reads; bytes/s and ms."""

    max_bandwidth: int = 134217728
    downtime_limit_ms: int = 300
    avail_switchover_bandwidth: int = 0
    max_postcopy_bandwidth: int = 0
    pause_before_switchover: bool = False
    stop_first: bool = False  # mode cpr-reboot: the guest stands still from the start
    compat: str = "10.0"


@dataclass
class RoundLog:
    """One row a bitmap sync, filled in when the next sync or the end comes."""

    sync: int
    start_ns: int
    dirty_pages: int
    new_dirty_pages: int
    sent_pages: int = 0
    zero_pages: int = 0
    transferred_bytes: int = 0
    duration_ns: int = 0
    threshold_bytes: int = 0
    expected_downtime_ms: int = 0
    cpu_throttle_percentage: int = 0
    stopped: bool = False
