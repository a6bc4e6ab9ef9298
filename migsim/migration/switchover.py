"""The end of pre-copy: the guest stops, the last pages go out at line rate, devices follow; or it is called off.

Source: QEMU 7.2 and 10.0 migration.c (migration_completion, migration_iteration_finish). 7.2 goes from active to
completed at once; 10.0 always passes through `device`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from migsim.migration.ram import NO_LIMITS
from migsim.units import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from migsim.migration.precopy import Precopy

__all__ = ["cancel", "complete", "finish", "part", "resumed", "stop_guest"]


def stop_guest(loop: Precopy) -> None:
    """vm_stop: from here on nothing is written. The time a vCPU takes to notice belongs to the blackout."""
    if loop.guest_stopped:
        return
    loop.pass_time(loop.machine.stop())
    loop.guest_stopped = True
    loop.event("STOP")


def complete(loop: Precopy) -> None:
    """migration_completion."""
    start = loop.now_ns
    part(loop, "stop", lambda: stop_guest(loop))
    if loop.knobs.pause_before_switchover:
        loop.set_status("pre-switchover")
        part(loop, "pre-switchover", lambda: loop.pass_time(loop.limits.switchover_pause_ns))
    if loop.knobs.pause_before_switchover or loop.knobs.compat != "7.2":
        loop.set_status("device")
    part(loop, "final-sync", lambda: loop.sync(stopped=True))
    part(loop, "ram", lambda: loop.save(NO_LIMITS, last=True))
    assert loop.ram.dirty_pages == 0, f"{loop.ram.dirty_pages} pages left with the guest stopped"
    part(loop, "device", lambda: _save_devices(loop))
    part(loop, "flush", lambda: loop.pass_time(loop.costs.flush_ns))
    loop.stats.downtime_ns = (loop.clock.ms(loop.now_ns) - loop.clock.ms(start)) * NS_PER_MS
    finish(loop)
    resumed(loop, loop.costs.resume_ns)


def finish(loop: Precopy) -> None:
    """migration_calculate_complete, then the state; the throttle ends with the migration."""
    loop.close_round()
    stats = loop.stats
    stats.total_ns = (loop.clock.ms(loop.now_ns) - loop.start_ms) * NS_PER_MS
    run_ms = max(1, (stats.total_ns - stats.setup_ns) // NS_PER_MS)
    stats.mbps = stats.transferred * 8.0 / run_ms / 1000
    loop.set_status("completed")
    loop.machine.log_stop()


def resumed(loop: Precopy, after_ns: int) -> None:
    """The destination's vCPUs run `after_ns` from now; neither total-time nor downtime of QEMU's source knows it."""
    if after_ns:
        loop.parts.append(("resume", after_ns))
    loop.events.append((loop.now_ns + after_ns, "RESUME", {}))


def cancel(loop: Precopy) -> str:
    """migrate_cancel: the guest keeps running here."""
    loop.set_status("cancelling")
    loop.close_round()
    loop.stats.total_ns = (loop.clock.ms(loop.now_ns) - loop.start_ms) * NS_PER_MS
    loop.machine.set_throttle(0)
    if loop.guest_stopped:
        loop.machine.resume()
        loop.guest_stopped = False
    loop.set_status("cancelled")
    loop.machine.log_stop()
    return loop.status


def part(loop: Precopy, name: str, step: Callable[[], object]) -> None:
    """One term of the blackout."""
    start = loop.now_ns
    step()
    loop.parts.append((name, loop.now_ns - start))


def _save_devices(loop: Precopy) -> None:
    loop.sent_devices()
    wire_ns = int(loop.costs.device_bytes * NS_PER_S / loop.link_bytes_per_s(loop.now_ns))
    loop.pass_time(wire_ns + loop.costs.device_ns)
