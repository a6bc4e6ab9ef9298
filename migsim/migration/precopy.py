"""QEMU's migration thread: set up, sync, send in 100 ms windows, decide, stop the guest, send the rest.

Station 8 on the path of a dirty page. The loop is qemu.md 1.3 to 1.6: a round ends when what is left falls below the
threshold that the last 100 ms window set, not when nothing is left; then the bitmap is synced and the test made
again. Time is virtual, integer ns, and moves only here. RAM, guest and link are arguments; so is what a platform
above QEMU decides (`policies`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from migsim.migration.ram import NO_LIMITS, PS_PER_NS, Saved, SaveLimits
from migsim.migration.stats import MigrationStats
from migsim.units import NS_PER_MS, NS_PER_S, PAGE_SIZE

BUFFER_DELAY_NS = 100 * NS_PER_MS
MAX_WAIT_PS = 50 * NS_PER_MS * PS_PER_NS
RATE_PERIOD_NS = 1000 * NS_PER_MS  # between two evaluations of dirty-pages-rate and the throttle
SECTION_BYTES = 18  # of one RAM section: 5 header, 8 EOS, 5 footer (qemu.md 2.4)


class RamState(Protocol):
    """What the loop asks of RAM (migration.ram, or migsim.fused for the same in fewer visits)."""

    dirty_pages: int

    @property
    def total_bytes(self) -> int: ...
    def sync(self) -> int:
        """migration_bitmap_sync: how many pages became dirty."""

    def save(self, limits: SaveLimits) -> Saved:
        """ram_save_iterate until a limit or until nothing is dirty."""


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


@dataclass(frozen=True)
class LoopCosts:
    """Times of the loop's own steps, ns unless named otherwise; from the host profile."""

    sync_ns: int  # one bitmap sync, whatever the size
    sync_page_ps: int  # and for each page of RAM (bitmap copied and scanned)
    section_ns: int  # one call of the RAM handler
    device_bytes: int
    device_ns: int  # saving and, with a return path, loading device state
    flush_ns: int  # the last bytes reach the destination: latency of the link


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
    pause_before_switchover: bool = False
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


class Interrupted(Exception):
    """The user pressed Ctrl-C; what has been logged so far stays readable."""


@dataclass
class Precopy:
    """One migration. `run()` returns the final MigrationStatus."""

    ram: RamState
    machine: Machine
    knobs: Knobs
    costs: LoopCosts
    limits: Limits
    link_bytes_per_s: Callable[[int], float]
    progress: Callable[[Precopy], None] | None = None
    after_sync: Callable[[Precopy, bool], None] | None = None  # policies; True when the 1 s gate was passed

    status: str = "none"
    now_ns: int = 0
    rounds: list[RoundLog] = field(default_factory=list)
    events: list[tuple[int, str, dict[str, object]]] = field(default_factory=list)
    parts: list[tuple[str, int]] = field(default_factory=list)
    why: str = ""

    def __post_init__(self) -> None:
        self.stats = MigrationStats(self.ram.total_bytes, expected_downtime_ms=self.knobs.downtime_limit_ms)
        self._window_start = self._window_bytes = self._window_pages = 0
        self._period_start: int | None = None
        self.period_dirty = 0
        self.period_bytes = 0

    # -- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Migrate. Final status: completed or cancelled."""
        self._setup()
        while True:
            if not self._rate_exceeded() and self._iteration():
                return self.status
            if self._give_up():
                return self._cancel()
            self._rate_limit()
            if self.progress is not None:
                self.progress(self)

    def _setup(self) -> None:
        self._set_status("setup")
        self._pass_time(self.machine.log_start())
        self._sync()
        self.stats.setup_ns = self.now_ns
        self._set_status("active")
        self._window_start = self.now_ns

    def _iteration(self) -> bool:
        """migration_iteration_run: decide, or send for a while. True when the migration is over."""
        threshold = self.stats.threshold_bytes
        if self.ram.dirty_pages * PAGE_SIZE < threshold:
            self._sync()  # the estimate says yes: make it exact
        pending = self.ram.dirty_pages * PAGE_SIZE
        if pending == 0 or pending < threshold:
            self._complete()
            return True
        saved = self._save(SaveLimits(self._quantum_left(), MAX_WAIT_PS))
        if saved.elapsed_ps == 0:
            self._pass_time(1)
        return False

    def _quantum_left(self) -> int:
        quantum = self.knobs.max_bandwidth // 10
        return NO_LIMITS.bytes if quantum == 0 else quantum - self._window_bytes

    def _rate_exceeded(self) -> bool:
        return self._quantum_left() < 0

    def _rate_limit(self) -> None:
        """migration_rate_limit: close the window when 100 ms are over, else wait for that if its bytes are used."""
        self._update_counters()
        if self._rate_exceeded():
            self._pass_time(max(0, self._window_start + BUFFER_DELAY_NS - self.now_ns))

    def _update_counters(self) -> None:
        elapsed_ns = self.now_ns - self._window_start
        if elapsed_ns < BUFFER_DELAY_NS:
            return
        limit_ms, usable = self.knobs.downtime_limit_ms, self.knobs.avail_switchover_bandwidth
        self.stats.end_window(self._window_bytes, self._window_pages, elapsed_ns, limit_ms, usable)
        self._window_start, self._window_bytes, self._window_pages = self.now_ns, 0, 0

    # -- steps -------------------------------------------------------------------------------------------------------

    def _pass_time(self, duration_ns: int) -> None:
        self.now_ns += duration_ns
        self.machine.run_until(self.now_ns)

    def _set_status(self, status: str) -> None:
        self.status = status
        self._event("MIGRATION", status=status)

    def _event(self, name: str, **data: object) -> None:
        self.events.append((self.now_ns, name, data))

    def _sync(self, stopped: bool = False) -> None:
        """migration_bitmap_sync, its row, its event, and once a second the rate (qemu.md 2.2)."""
        self._close_round()
        start = self.now_ns
        self._period_start = start if self._period_start is None else self._period_start
        self.stats.dirty_sync_count += 1
        new = self.ram.sync()
        self._pass_time(self.costs.sync_ns + self.stats.total_bytes // PAGE_SIZE * self.costs.sync_page_ps // PS_PER_NS)
        self.period_dirty += new
        self.stats.dirty_bytes_last_sync = self.ram.dirty_pages * PAGE_SIZE
        self.rounds.append(RoundLog(self.stats.dirty_sync_count, start, self.ram.dirty_pages, new, stopped=stopped))
        gate = self.now_ns - self._period_start > RATE_PERIOD_NS
        if self.after_sync is not None:
            self.after_sync(self, gate)
        if gate:
            self.stats.dirty_pages_rate = self.period_dirty * 1000 // ((self.now_ns - self._period_start) // NS_PER_MS)
            self._period_start, self.period_dirty, self.period_bytes = self.now_ns, 0, self.stats.transferred
        self._event("MIGRATION_PASS", **{"pass": self.stats.dirty_sync_count})

    def _close_round(self) -> None:
        if not self.rounds:
            return
        row, stats = self.rounds[-1], self.stats
        row.duration_ns = self.now_ns - row.start_ns
        row.threshold_bytes, row.expected_downtime_ms = stats.threshold_bytes, stats.expected_downtime_ms
        row.cpu_throttle_percentage = stats.cpu_throttle_percentage

    def _save(self, limits: SaveLimits) -> Saved:
        """One RAM section: pages, then its framing."""
        saved = self.ram.save(limits)
        self._account(saved.page_bytes + SECTION_BYTES)
        self._window_pages += saved.normal + saved.duplicate
        self.stats.normal_pages += saved.normal
        self.stats.zero_pages += saved.duplicate
        row = self.rounds[-1]
        row.sent_pages += saved.normal
        row.zero_pages += saved.duplicate
        self._pass_time(-(-saved.elapsed_ps // PS_PER_NS) + self.costs.section_ns)
        return saved

    def _account(self, size: int) -> None:
        self._window_bytes += size
        self.stats.transferred += size
        self.rounds[-1].transferred_bytes += size
        if self.rounds[-1].stopped or self.status in ("device", "pre-switchover"):
            self.stats.downtime_bytes += size
        else:
            self.stats.precopy_bytes += size

    # -- switch-over (qemu.md 1.6) -----------------------------------------------------------------------------------

    def _complete(self) -> None:
        start = self.now_ns
        self._part("stop", self._stop_guest)
        if self.knobs.pause_before_switchover:
            self._set_status("pre-switchover")
            self._part("pre-switchover", lambda: self._pass_time(self.limits.switchover_pause_ns))
        if self.knobs.pause_before_switchover or self.knobs.compat != "7.2":
            self._set_status("device")
        self._part("final-sync", lambda: self._sync(stopped=True))
        self._part("ram", lambda: self._save(NO_LIMITS))
        assert self.ram.dirty_pages == 0, f"{self.ram.dirty_pages} pages left with the guest stopped"
        self._part("device", self._save_devices)
        self._part("flush", lambda: self._pass_time(self.costs.flush_ns))
        self._close_round()
        self.stats.downtime_ns = self.now_ns - start
        self.stats.total_ns = self.now_ns
        run_ms = max(1, (self.stats.total_ns - self.stats.setup_ns) // NS_PER_MS)
        self.stats.mbps = self.stats.transferred * 8.0 / run_ms / 1000
        self._set_status("completed")  # logging stays on: QEMU stops it only when the guest runs here again

    def _stop_guest(self) -> None:
        self._pass_time(self.machine.stop())
        self._event("STOP")

    def _save_devices(self) -> None:
        self._account(self.costs.device_bytes)
        wire_ns = int(self.costs.device_bytes * NS_PER_S / self.link_bytes_per_s(self.now_ns))
        self._pass_time(wire_ns + self.costs.device_ns)

    def _part(self, name: str, step: Callable[[], object]) -> None:
        start = self.now_ns
        step()
        self.parts.append((name, self.now_ns - start))

    # -- giving up ---------------------------------------------------------------------------------------------------

    def _give_up(self) -> bool:
        limits = self.limits
        for what, bound, value in (
            ("time-limit", limits.time_ns, self.now_ns),
            ("cancel-after", limits.cancel_ns, self.now_ns),
            ("round-limit", limits.rounds, self.stats.dirty_sync_count),
        ):
            if bound is not None and value >= bound:
                self.why = what
        return bool(self.why)

    def _cancel(self) -> str:
        """migrate_cancel: the guest keeps running here."""
        self._set_status("cancelling")
        self._close_round()
        self.stats.total_ns = self.now_ns
        self.machine.set_throttle(0)
        self._set_status("cancelled")
        self.machine.log_stop()
        return self.status
