"""dirty-limit: a quota of MiB/s for each vCPU, held by sleeping on every full dirty ring.

Source: QEMU 10.0 system/dirtylimit.c (019fbfa4bcd2). Unlike auto-converge it hurts only the vCPUs that write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from migsim.migration.policies.auto_converge import DirtyTrigger
from migsim.migration.policies.protocol import Period, VcpuDirtyRate
from migsim.units import NS_PER_MS, PAGE_SIZE

__all__ = ["TOLERANCE_MIB", "DirtyLimit", "VcpuLimit", "query_vcpu_dirty_limit", "throttled_rate"]

TOLERANCE_MIB: Final = 25  # nearer than this to the quota, nothing changes
LINEAR_PCT: Final = 50  # farther than this from the quota, the sleep changes in proportion
THROTTLE_PCT_MAX: Final = 99  # the sleep never exceeds 99 times the ring-full time
STEP_DIVISOR: Final = 10  # near the quota a step is a tenth of the ring-full time


@dataclass(slots=True)
class VcpuLimit:
    """One vCPU under a quota. throttle_us: its sleep at each ring-full exit, us."""

    quota_mib_per_s: int
    throttle_us: int = 0


@dataclass(slots=True)
class DirtyLimit:
    """Enables the quota at the auto-converge trigger, then adjusts the sleeps once a period.

    ring_size: entries of a vCPU's ring · quota: MiB/s a vCPU (`vcpu-dirty-limit`) · period_ms:
    `x-vcpu-dirty-limit-period`. The sleeps belong to the caller's vCPUs: `sleep_us(vcpu)` at each ring-full exit.
    """

    vcpus: int
    ring_size: int
    quota: int = 1
    period_ms: int = 1000
    trigger: DirtyTrigger = field(default_factory=DirtyTrigger)
    sync_interval_ns: int | None = None
    max_dirtyrate: int = 0  # MiB/s, the highest any vCPU ever showed; QEMU never lowers it
    limits: dict[int, VcpuLimit] = field(default_factory=dict)

    @property
    def period_ns(self) -> int:
        return self.period_ms * NS_PER_MS

    @property
    def in_service(self) -> bool:
        return bool(self.limits)

    def after_period(self, period: Period) -> int | None:
        """Never a cpu-throttle-percentage: enables or changes the quota instead."""
        if self.trigger.fires(period):
            self.set_limit(self.quota)
        return None

    def set_limit(self, quota_mib_per_s: int, vcpu: int | None = None) -> None:
        """set-vcpu-dirty-limit: one vCPU or all; 0 cancels."""
        for index in range(self.vcpus) if vcpu is None else (vcpu,):
            if quota_mib_per_s == 0:
                self.limits.pop(index, None)
            elif index in self.limits:
                self.limits[index].quota_mib_per_s = quota_mib_per_s
            else:
                self.limits[index] = VcpuLimit(quota_mib_per_s)

    def adjust(self, rates: Iterable[VcpuDirtyRate]) -> None:
        """End of a dirty-limit period: move each limited vCPU's sleep towards its quota."""
        current = list(rates)
        for rate in current:
            self.max_dirtyrate = max(self.max_dirtyrate, rate.mib_per_s)
        for rate in current:
            limit = self.limits.get(rate.vcpu)
            if limit is not None:
                self._adjust(limit, rate.mib_per_s)

    def _adjust(self, limit: VcpuLimit, current: int) -> None:
        quota = limit.quota_mib_per_s
        if abs(quota - current) <= TOLERANCE_MIB:
            return
        if current == 0:
            limit.throttle_us = 0
            return
        full_us = self.ring_full_us()
        pct = abs(quota - current) * 100 // max(quota, current)
        step = full_us * pct // (100 - pct) if pct > LINEAR_PCT else full_us // STEP_DIVISOR
        wanted = limit.throttle_us + (step if current > quota else -step)
        limit.throttle_us = max(0, min(wanted, full_us * THROTTLE_PCT_MAX))

    def ring_full_us(self) -> int:
        """us a vCPU at the highest rate ever seen takes to fill its ring; 0 where none wrote."""
        if not self.max_dirtyrate:
            return 0
        ring_mib = self.ring_size * PAGE_SIZE >> 20
        return ring_mib * 1_000_000 // self.max_dirtyrate

    def sleep_us(self, vcpu: int) -> int:
        """us this vCPU sleeps at each ring-full exit."""
        limit = self.limits.get(vcpu)
        return limit.throttle_us if limit is not None else 0

    def throttle_time_per_round_us(self) -> int:
        """dirty-limit-throttle-time-per-round of query-migrate."""
        return max((limit.throttle_us for limit in self.limits.values()), default=0)


def throttled_rate(pages_per_s: float, ring_size: int, sleep_us: int) -> float:
    """Distinct pages/s of a vCPU that would dirty `pages_per_s` and sleeps `sleep_us` at each full ring."""
    if not pages_per_s or not sleep_us:
        return pages_per_s
    fill_s = ring_size / pages_per_s
    return ring_size / (fill_s + sleep_us / 1e6)


def query_vcpu_dirty_limit(limit: DirtyLimit | None, current: Sequence[int]) -> list[dict[str, int]]:
    """query-vcpu-dirty-limit: the vCPUs under a quota, their quota and their rate; [] where none is."""
    if limit is None:
        return []
    return [
        {"cpu-index": vcpu, "limit-rate": row.quota_mib_per_s, "current-rate": current[vcpu]}
        for vcpu, row in sorted(limit.limits.items())
    ]
