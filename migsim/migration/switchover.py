"""The end of pre-copy: the guest stops, the last pages go out at line rate, devices follow; or it is called off.

Source: QEMU 7.2 and 10.0 migration.c (migration_completion, migration_iteration_finish). 7.2 goes from active to
completed at once; 10.0 always passes through `device`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from migsim.migration.failure import LINK
from migsim.migration.ram import NO_LIMITS, PS_PER_NS, SaveLimits
from migsim.units import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from migsim.migration.precopy import Precopy

__all__ = ["cancel", "complete", "finish", "hold", "part", "resumed", "save_devices", "stop_guest", "suspend"]


def stop_guest(loop: Precopy) -> None:
    """vm_stop: from here on nothing is written. The time a vCPU takes to notice belongs to the blackout."""
    if loop.stopped_ns is not None:  # suspended long ago: all that time is part of the blackout
        loop.parts.append(("suspended", loop.now_ns - loop.stopped_ns - loop.parts[0][1]))
        return
    loop.stopped_ns = loop.now_ns
    part(loop, "stop", lambda: loop.pass_time(loop.machine.stop()))
    loop.guest_stopped = True
    loop.ram.stop_vcpus()
    loop.event("STOP")


def suspend(loop: Precopy, by: str) -> None:
    """QMP's `stop` while the migration goes on: the guest's blackout begins here, QEMU's downtime at the switch."""
    stop_guest(loop)
    loop.suspended_by = by


def hold(loop: Precopy) -> bool:
    """With pause-before-switchover the client holds the migration here; True if it was called off meanwhile."""
    if not loop.knobs.pause_before_switchover:
        return False
    loop.set_status("pre-switchover")
    part(loop, "pre-switchover", lambda: loop.wait(loop.limits.switchover_pause_ns))
    return bool(loop.why)


def complete(loop: Precopy) -> None:
    """migration_completion. A cancel is heeded between its steps and in those that wait or send."""
    start = loop.stopped_ns if loop.knobs.stop_first and loop.stopped_ns is not None else loop.now_ns
    stop_guest(loop)
    if hold(loop):
        cancel(loop)
        return
    if loop.knobs.pause_before_switchover or loop.knobs.compat != "7.2":
        loop.set_status("device")
    loop.ram.enter_last_stage()
    for name, step in _last_steps(loop):
        part(loop, name, step)
        if loop.called_off():
            cancel(loop)
            return
    if loop.return_path:
        _await_destination(loop)
    loop.stats.downtime_ns = (loop.clock.ms(loop.now_ns) - loop.clock.ms(start)) * NS_PER_MS
    finish(loop)
    if not loop.return_path and not loop.to_file:
        load_ns = loop.devices.load_ns
        if load_ns:
            loop.parts.append(("load", load_ns))
        resumed(loop, loop.costs.resume_ns, behind_ns=load_ns)


def _await_destination(loop: Precopy) -> None:
    """With a return path the source's downtime ends when the destination shuts it, its vCPUs running."""
    part(loop, "load", lambda: loop.pass_time(loop.costs.load_ns + loop.devices.load_ns))
    part(loop, "resume", lambda: loop.pass_time(loop.costs.resume_ns))
    loop.event("RESUME")
    part(loop, "return-path", lambda: loop.pass_time(loop.costs.latency_ns))


def finish(loop: Precopy) -> None:
    """migration_calculate_complete, then the state; the throttle ends with the migration."""
    loop.close_round()
    stats = loop.stats
    stats.total_ns = (loop.clock.ms(loop.now_ns) - loop.start_ms) * NS_PER_MS
    run_ms = max(1, (stats.total_ns - stats.setup_ns) // NS_PER_MS)
    stats.mbps = stats.transferred * 8.0 / run_ms / 1000
    loop.set_status("completed")
    loop.machine.log_stop()


def resumed(loop: Precopy, after_ns: int, *, behind_ns: int = 0) -> None:
    """The destination's vCPUs run `behind_ns + after_ns` from now; QEMU's source counts neither."""
    if after_ns:
        loop.parts.append(("resume", after_ns))
    loop.events.append((loop.now_ns + behind_ns + after_ns, "RESUME", {}))


def cancel(loop: Precopy) -> str:
    """migrate_cancel, or an error before completion: the guest keeps running here."""
    failure = loop.failure if loop.why == LINK else None
    if failure is None:
        loop.set_status("cancelling")
    else:  # until the socket reports it, the thread hangs in a write
        loop.pass_time(failure.noticed_ns)
        loop.stats.error_desc = failure.error_desc
    loop.close_round()
    loop.stats.total_ns = (loop.clock.ms(loop.now_ns) - loop.start_ms) * NS_PER_MS
    loop.machine.set_throttle(0)
    if loop.guest_stopped:
        loop.machine.resume()
        loop.guest_stopped = False
        loop.event("RESUME")
    loop.set_status("cancelled" if failure is None else "failed")
    loop.machine.log_stop()
    return loop.status


def part(loop: Precopy, name: str, step: Callable[[], object]) -> None:
    """One term of the blackout."""
    start, before = loop.now_ns, len(loop.parts)
    step()
    inner = sum(ns for _, ns in loop.parts[before:])
    loop.parts.append((name, loop.now_ns - start - inner))


def _last_steps(loop: Precopy) -> list[tuple[str, Callable[[], object]]]:
    """What is done with the guest stopped, each with its name as a part of the blackout."""
    steps: list[tuple[str, Callable[[], object]]] = [("final-sync", loop.sync), ("wire", lambda: _send_rest(loop))]
    if loop.devices.devices:
        steps.append(("vfio", lambda: loop.sent_staged(*loop.devices.complete())))
    steps.append(("device", lambda: save_devices(loop)))
    steps.append(("flush", lambda: loop.wait(loop.costs.flush_ns)))
    return steps


def _send_rest(loop: Precopy) -> None:
    """ram_save_complete. The CLEARs it still makes, a part of their own, come out of the wire's."""
    before, start = loop.ram.clear_ps(), loop.now_ns
    loop.save(SaveLimits(NO_LIMITS.bytes, loop.left_ps()), last=True)
    assert loop.ram.dirty_pages == 0 or loop.called_off(), f"{loop.ram.dirty_pages} pages left, the guest stopped"
    clear_ns = min((loop.ram.clear_ps() - before) // PS_PER_NS, loop.now_ns - start)
    if clear_ns:
        loop.parts.append(("clear", clear_ns))


def save_devices(loop: Precopy) -> None:
    """Device state of everything that is not iterable, read and put on the wire."""
    loop.sent_aside(loop.costs.device_bytes)
    wire_ns = int(loop.costs.device_bytes * NS_PER_S / loop.link_bytes_per_s(loop.now_ns))
    loop.wait(wire_ns + loop.costs.device_ns)
