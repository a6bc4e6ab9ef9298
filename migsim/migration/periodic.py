"""Beside the sending: rate and throttle once a second, QEMU 9.2's sync timer, dirty-limit's thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migsim.migration.policies.dirty_limit import query_vcpu_dirty_limit
from migsim.migration.policies.protocol import Period
from migsim.units import PAGE_SIZE

if TYPE_CHECKING:
    from migsim.migration.precopy import Precopy

__all__ = ["dirty_limit", "dirty_limit_cancelled", "evaluate", "sync_timer"]

_THROTTLE_TIME, _RING_FULL_TIME = "dirty-limit-throttle-time-per-round", "dirty-limit-ring-full-time"
RATE_PERIOD_MS = 1000  # between two evaluations of dirty-pages-rate and the throttle


def evaluate(loop: Precopy, now_ms: int) -> None:
    """Once more than 1 s has passed since the last time: throttle decision, dirty-pages-rate, a new period."""
    assert loop.last_sync_ms is not None
    gone_ms = now_ms - loop.last_sync_ms
    if gone_ms <= RATE_PERIOD_MS:
        return
    sent = loop.stats.transferred - loop.period_bytes
    wanted = loop.throttle.after_period(Period(loop.period_dirty * PAGE_SIZE, sent, loop.now_ns))
    if wanted is not None:
        loop.stats.cpu_throttle_percentage = wanted
        if not loop.guest_stopped:
            loop.machine.set_throttle(wanted)
    loop.stats.dirty_pages_rate = loop.period_dirty * 1000 // gone_ms
    loop.ram.update_rates()
    loop.last_sync_ms, loop.period_dirty, loop.period_bytes = now_ms, 0, loop.stats.transferred


def sync_timer(loop: Precopy) -> None:
    """QEMU 9.2: with auto-converge a sync is forced where a whole timer interval went by without one."""
    interval = loop.throttle.sync_interval_ns
    if interval is None or loop.now_ns < loop.timer[0]:
        return
    count = loop.stats.dirty_sync_count
    if count > 1 and count == loop.timer[1]:
        loop.sync()
    loop.timer = (loop.now_ns + interval, loop.stats.dirty_sync_count)


def dirty_limit(loop: Precopy) -> None:
    """dirty-limit's thread: once a period every limited vCPU's sleep moves towards its quota."""
    limit = loop.vcpu_limit
    if limit is None or not limit.in_service or loop.now_ns < loop.next_limit_ns:
        return
    loop.next_limit_ns = loop.now_ns + limit.period_ns
    rates = loop.machine.vcpu_dirty_rates()
    limit.adjust(rates)
    loop.limited = query_vcpu_dirty_limit(limit, [rate.mib_per_s for rate in rates])
    loop.machine.set_vcpu_sleeps([limit.sleep_us(vcpu) for vcpu in range(limit.vcpus)])
    if limit is loop.throttle:  # query-migrate tells of it under the capability alone, query-vcpu-dirty-limit always
        loop.stats.extra |= {
            _THROTTLE_TIME: limit.throttle_time_per_round_us(),
            _RING_FULL_TIME: limit.ring_full_us(),
        }


def dirty_limit_cancelled(loop: Precopy) -> None:
    """No vCPU has a quota any more: none sleeps, and nobody is told of quotas."""
    assert loop.vcpu_limit is not None
    loop.limited = []
    loop.machine.set_vcpu_sleeps([0] * loop.vcpu_limit.vcpus)
    for name in (_THROTTLE_TIME, _RING_FULL_TIME):
        loop.stats.extra.pop(name, None)
