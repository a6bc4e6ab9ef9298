"""QEMU's migration thread: set up, sync, send in 100 ms windows, decide, stop the guest, send the rest.

Station 8 on the path of a dirty page. The loop is QEMU's migration_thread (7.2 and 10.0 migration.c): a round ends
when what is left falls below the threshold that the last window set, not when nothing is left; then the bitmap is
synced and the test made again. Time is virtual, integer ns, and moves only here. RAM, guest, link and the policies
are arguments. Switch-over and post-copy, which end the loop, are in
migration.switchover and migration.postcopy; migration.periodic runs beside it, migration.platform_commands steers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from migsim.migration import periodic, platform_commands, postcopy, switchover
from migsim.migration.devices import DeviceSet
from migsim.migration.failure import LINK, LinkFailure
from migsim.migration.loop_types import Knobs, Limits, LoopCosts, Machine, RamState, RoundLog
from migsim.migration.policies.dirty_limit import DirtyLimit
from migsim.migration.policies.protocol import GuestThrottle, NoPlatform, NoThrottle, Platform
from migsim.migration.ram import NO_LIMITS, PS_PER_NS, Saved, SaveLimits
from migsim.migration.stats import MigrationStats
from migsim.migration.window import HostClock, Window, quantum
from migsim.units import NS_PER_MS, NS_PER_S, PAGE_SIZE

__all__ = ["Interrupted", "Knobs", "Limits", "LoopCosts", "Machine", "Precopy", "RamState", "RoundLog"]

MAX_WAIT_PS = 50 * NS_PER_MS * PS_PER_NS
EOS_BYTES = 8
FRAMING_BYTES = 10  # header and footer of a section around one call of the RAM handler


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
    throttle: GuestThrottle = field(default_factory=NoThrottle)
    platform: Platform = field(default_factory=NoPlatform)
    clock: HostClock = field(default_factory=HostClock)
    devices: DeviceSet = field(default_factory=DeviceSet)
    failure: LinkFailure | None = None
    vcpu_limit: DirtyLimit | None = None  # with dirty rings: quotas by the capability, or by set-vcpu-dirty-limit
    snapshot: Callable[[Precopy], str] | None = None  # background-snapshot's thread, in the place of this one
    to_file: bool = False  # nobody resumes the guest at the end
    return_path: bool = False  # the capability, or post-copy's: the source waits for the destination's end

    status: str = "none"
    now_ns: int = 0
    rounds: list[RoundLog] = field(default_factory=list)
    events: list[tuple[int, str, dict[str, object]]] = field(default_factory=list)
    parts: list[tuple[str, int]] = field(default_factory=list)
    why: str = ""
    guest_stopped: bool = False
    stopped_ns: int | None = None  # when the guest was told to stop: the blackout begins
    suspended_by: str = ""  # whose `stop` that was, if not the switch-over's
    postcopy_asked: bool = False

    def __post_init__(self) -> None:
        self.stats = MigrationStats(self.ram.total_bytes, expected_downtime_ms=self.knobs.downtime_limit_ms)
        self.window = Window()
        self.set_quantum()
        self.start_ms = 0
        self.last_sync_ms: int | None = None
        self.period_dirty = 0  # pages found dirty since the last evaluation
        self.period_bytes = 0  # transferred until then
        self._next_poll_ns = self.platform.poll_interval_ns
        self.next_limit_ns = 0
        self.limited: list[dict[str, int]] = []  # query-vcpu-dirty-limit at the end of dirty-limit's last period
        self._first_deadline_ns = min([NO_LIMITS.ps, *self._deadlines()])
        self.timer: tuple[int, int] = (0, 0)  # 9.2's sync timer: due ns, dirty_sync_count at its last tick

    # -- the thread --------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Migrate. Final status: completed, cancelled, failed, or postcopy-paused."""
        for command in self.platform.before_migrate():
            platform_commands.obey(self, command)
        if self.snapshot is not None:
            return self.snapshot(self)
        self._setup()
        while True:
            if self.called_off() or self._out_of_rounds():
                return switchover.cancel(self)
            if not self.rate_exceeded() and self._iteration():
                return self.status
            self.rate_limit()
            periodic.sync_timer(self)
            periodic.dirty_limit(self)
            self._ask_platform()
            if self.progress is not None:
                self.progress(self)

    def begin(self) -> None:
        """State setup, and everything on the stream before the first page."""
        self.start_ms = self.window.start_ms = self.clock.ms(self.now_ns)
        self.set_status("setup")
        self._sent(self.costs.setup_bytes, counted=0 if self.knobs.compat == "7.2" else self.costs.setup_bytes)

    def _setup(self) -> None:
        self.begin()
        if self.knobs.stop_first:
            switchover.suspend(self, "cpr-reboot")
        self.pass_time(self.machine.log_start())
        self.sync()
        self.stats.setup_ns = (self.clock.ms(self.now_ns) - self.start_ms) * NS_PER_MS
        self.set_status("active")
        if self.throttle.sync_interval_ns is not None:
            self.timer = (self.now_ns + self.throttle.sync_interval_ns, 0)

    def _iteration(self) -> bool:
        """migration_iteration_run: decide, or send for a while. True when the migration is over."""
        threshold, devices = self.stats.threshold_bytes, self.devices
        may_switch_over = devices.may_switch_over(self.now_ns, self.guest_stopped)
        staged = devices.pending
        pending = self.ram.dirty_pages * PAGE_SIZE + staged
        if pending < threshold:
            self.sync()  # the estimate says yes: make it exact
            if devices.devices:
                self.pass_time(len(devices.devices) * devices.query_ns)
            staged = devices.pending + devices.stop_copy
            pending = self.ram.dirty_pages * PAGE_SIZE + staged
        if (pending == 0 or pending < threshold) and may_switch_over:
            switchover.complete(self)
            return True
        if self.postcopy_asked and staged <= threshold and may_switch_over:
            postcopy.run(self)
            return True
        saved = self.save(SaveLimits(self.quantum - self.window.bytes, MAX_WAIT_PS))
        if devices.devices:
            self._save_devices()
        if saved.elapsed_ps == 0:
            self.pass_time(1)
        return False

    def _save_devices(self) -> None:
        """The staged devices' turn, which RAM leaves them only where the window has bytes left."""
        if not self.rate_exceeded():
            self.sent_staged(*self.devices.iterate())

    def sent_staged(self, size: int, read_ns: int) -> None:
        """State of staged devices on the stream: read, then on the wire, whichever takes longer."""
        self._sent(size, counted=size)
        self.stats.extra["vfio"] = {"transferred": self.devices.transferred}
        self.pass_time(max(read_ns, int(size * NS_PER_S / self.link_bytes_per_s(self.now_ns))))

    def rate_exceeded(self) -> bool:
        """Are the window's bytes used up?"""
        return self.window.bytes > self.quantum

    def set_quantum(self) -> None:
        """Bytes of a window under the limit in force, which status and knobs decide."""
        knobs, after = self.knobs, self.status == "postcopy-active"
        self.quantum = quantum(knobs.max_postcopy_bandwidth if after else knobs.max_bandwidth)

    def rate_limit(self) -> None:
        """migration_rate_limit: close the window once 100 ms are over, else wait for that if its bytes are used."""
        now_ms = self.clock.ms(self.now_ns)
        self._update_counters(now_ms)
        if self.rate_exceeded():
            self.pass_time(self.window.left_ms(now_ms) * NS_PER_MS + self.clock.spread(self.costs.wake_ns))

    def _update_counters(self, now_ms: int) -> None:
        if not self.window.over(now_ms):
            return
        self.stats.end_window(
            self.window.bytes, self.window.pages, (now_ms - self.window.start_ms) * NS_PER_MS,
            self.knobs.downtime_limit_ms, self.knobs.avail_switchover_bandwidth,
        )  # fmt: skip
        self.pass_time(self.clock.spread(self.costs.window_ns))
        self.window.restart(self.clock.ms(self.now_ns))

    # -- steps -------------------------------------------------------------------------------------------------------

    def pass_time(self, duration_ns: int) -> None:
        """The one place where time moves."""
        self.now_ns += duration_ns
        self.machine.run_until(self.now_ns)
        if self.devices.devices:
            self.devices.advance(self.now_ns, not self.guest_stopped)

    def set_status(self, status: str) -> None:
        self.status = status
        self.set_quantum()
        self.event("MIGRATION", status=status)

    def event(self, name: str, **data: object) -> None:
        self.events.append((self.now_ns, name, data))

    def wait(self, duration_ns: int) -> bool:
        """The thread waits, somebody else acts; True if the migration was called off, and then the wait ended there."""
        end = self.now_ns + duration_ns
        while not self.called_off() and self.now_ns < end:
            self.pass_time(max(1, min([end, self._next_poll_ns, *self._deadlines()]) - self.now_ns))
            self._ask_platform()
        return bool(self.why)

    def left_ps(self) -> int:
        """Until the first deadline, for a step that looks at the clock; no deadline is NO_LIMITS."""
        return min([NO_LIMITS.ps, *((at - self.now_ns) * PS_PER_NS for at in self._deadlines())])

    def sync(self) -> None:
        """migration_bitmap_sync: its row, its event, and once a second the rate and the throttle."""
        self.close_round()
        start = self.now_ns
        if self.last_sync_ms is None:
            self.last_sync_ms = self.clock.ms(start)
        self.stats.dirty_sync_count += 1
        before_ps = self.ram.get_ps()
        new = self.ram.sync()
        rearm_ns = (self.ram.get_ps() - before_ps) // PS_PER_NS
        pages = self.stats.total_bytes // PAGE_SIZE
        stopped = self.guest_stopped
        wait_ns = 0 if stopped else self.machine.sync_wait_ns()
        self.pass_time(self.costs.sync_ns + pages * self.costs.sync_page_ps // PS_PER_NS + rearm_ns + wait_ns)
        self.period_dirty += new
        self.stats.dirty_bytes_last_sync = self.ram.dirty_pages * PAGE_SIZE
        self.rounds.append(RoundLog(self.stats.dirty_sync_count, start, self.ram.dirty_pages, new, stopped=stopped))
        periodic.evaluate(self, self.clock.ms(self.now_ns))
        self.event("MIGRATION_PASS", **{"pass": self.stats.dirty_sync_count})

    def close_round(self) -> None:
        if not self.rounds:
            return
        row, stats = self.rounds[-1], self.stats
        row.duration_ns = self.now_ns - row.start_ns
        row.threshold_bytes, row.expected_downtime_ms = stats.threshold_bytes, stats.expected_downtime_ms
        row.cpu_throttle_percentage = stats.cpu_throttle_percentage

    def save(self, limits: SaveLimits, *, last: bool = False) -> Saved:
        """One RAM section: pages, then its framing. The header counts before the first page's test."""
        saved = self.ram.save(SaveLimits(limits.bytes - self.costs.section_header_bytes, limits.ps))
        framing = EOS_BYTES + FRAMING_BYTES
        ram_bytes = saved.page_bytes + (0 if last else EOS_BYTES)  # ram_save_complete does not add its end marker
        # `transferred` is no more than these in 7.2, and the whole stream in later versions
        counted = ram_bytes if self.knobs.compat == "7.2" else saved.page_bytes + framing
        self._sent(saved.page_bytes + framing, counted=counted)
        self.stats.multifd_bytes += saved.channel_bytes
        self._ram_transferred_add(ram_bytes - saved.channel_bytes)
        self.window.pages += saved.normal + saved.duplicate + saved.packed
        stats, row = self.stats, self.rounds[-1]
        stats.normal_pages += saved.normal
        stats.zero_pages += saved.duplicate
        stats.dirty_sync_missed_zero_copy += saved.missed_zero_copy
        stats.extra |= self.ram.reply()
        row.sent_pages += saved.normal + saved.packed
        row.zero_pages += saved.duplicate
        self.pass_time(-(-saved.elapsed_ps // PS_PER_NS) + self.costs.section_ns)
        return saved

    def _sent(self, size: int, *, counted: int) -> None:
        """`size` bytes on the stream, of which query-migrate's `transferred` sees `counted`."""
        self.window.bytes += size
        self.stats.transferred += counted
        if self.rounds:
            self.rounds[-1].transferred_bytes += counted

    def _ram_transferred_add(self, size: int) -> None:
        """precopy-, downtime- and postcopy-bytes: pages of the main channel, end markers, a file's bitmaps."""
        stats = self.stats
        if self.status == "postcopy-active":
            stats.postcopy_bytes += size
        elif self.guest_stopped:
            stats.downtime_bytes += size
        else:
            stats.precopy_bytes += size

    def count_lost(self, pages: int, size: int) -> None:
        """Pages sent into a dead connection: counted, and still to be sent."""
        self._sent(size, counted=size)
        self._ram_transferred_add(size)
        self.stats.normal_pages += pages
        self.rounds[-1].sent_pages += pages

    def sent_aside(self, size: int) -> None:
        """Device state or commands on the stream; 7.2's `transferred` counts RAM only."""
        self._sent(size, counted=0 if self.knobs.compat == "7.2" else size)

    # -- what others ask of it ---------------------------------------------------------------------------------------

    def called_off(self) -> bool:
        """Has anybody sent migrate_cancel by now? Looked at between two windows and in every wait of pre-copy."""
        if self.now_ns >= self._first_deadline_ns:
            for what, at in (("time-limit", self.limits.time_ns), ("cancel-after", self.limits.cancel_ns)):
                if at is not None and self.now_ns >= at:
                    self.why = what
            if self.link_failed():
                self.why = LINK
        return bool(self.why)

    def link_failed(self) -> bool:
        """Is the connection gone by now?"""
        return self.failure is not None and self.now_ns >= self.failure.at_ns

    def _deadlines(self) -> list[int]:
        dies_ns = None if self.failure is None else self.failure.at_ns
        return [at for at in (self.limits.time_ns, self.limits.cancel_ns, dies_ns) if at is not None]

    def _out_of_rounds(self) -> bool:
        most = self.limits.rounds
        if most is not None and self.stats.dirty_sync_count >= most:
            self.why = "round-limit"
        return bool(self.why)

    def _ask_platform(self) -> None:
        if self.now_ns < self._next_poll_ns:
            return
        self._next_poll_ns = self.now_ns + self.platform.poll_interval_ns
        for command in self.platform.poll(platform_commands.sample(self)):
            platform_commands.obey(self, command)


assert NO_LIMITS.bytes > 0
