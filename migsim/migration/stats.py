"""What QEMU counts while it migrates (mig_stats, MigrationState), and query-migrate's reply made of it.

Names are QMP's with underscores. `WindowStats` holds what one 100 ms window decides (migration_update_counters);
`reply` gives `query-migrate` field for field by status (QEMU 10.0 migration.c, fill_source_migration_info).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migsim.units import NS_PER_MS, PAGE_SIZE

Reply = dict[str, Any]


@dataclass
class MigrationStats:
    """Counters of one migration. Bytes, pages, ns, ms as the names say."""

    total_bytes: int
    transferred: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    multifd_bytes: int = 0
    normal_pages: int = 0
    zero_pages: int = 0  # QMP: duplicate
    postcopy_requests: int = 0
    dirty_sync_count: int = 0
    dirty_pages_rate: int = 0
    dirty_bytes_last_sync: int = 0
    dirty_sync_missed_zero_copy: int = 0
    mbps: float = 0.0
    pages_per_second: int = 0
    expected_downtime_ms: int = 0
    threshold_bytes: int = 0
    cpu_throttle_percentage: int = 0
    setup_ns: int = 0
    total_ns: int = 0
    downtime_ns: int = 0
    error_desc: str = ""  # the first error, if any
    extra: Reply = field(default_factory=dict)  # xbzrle-cache, vfio, dirty-limit-*: by who models them

    def end_window(self, sent_bytes: int, sent_pages: int, elapsed_ns: int, limit_ms: int, switchover_bw: int) -> None:
        """migration_update_counters: bandwidth and threshold of this window alone."""
        elapsed_ms = max(1, elapsed_ns // NS_PER_MS)
        bandwidth = sent_bytes / elapsed_ms
        usable = float(switchover_bw // 1000) if switchover_bw else bandwidth
        self.threshold_bytes = int(usable * limit_ms)
        self.mbps = sent_bytes * 8.0 / (elapsed_ms / 1000.0) / 1e6
        self.pages_per_second = int(sent_pages / (elapsed_ms / 1000.0))
        if self.dirty_pages_rate and sent_bytes > 10_000:
            # below 1000 B/s QEMU divides by 0.0 and converts what comes out, which C leaves undefined: 0 here
            self.expected_downtime_ms = int(self.dirty_bytes_last_sync / usable) if usable else 0

    def reply(self, status: str, remaining_pages: int) -> Reply:
        """query-migrate on the source in `status`."""
        if status in ("none",):
            return {}
        error: Reply = {"error-desc": self.error_desc} if self.error_desc and status != "completed" else {}
        if status in ("setup", "wait-unplug", "failed", "cancelled"):
            return {"status": status} | error
        out: Reply = {
            "status": status,
            "setup-time": self.setup_ns // NS_PER_MS,
            "total-time": self.total_ns // NS_PER_MS,
        }
        if status == "completed":
            out["downtime"] = self.downtime_ns // NS_PER_MS
        else:
            out["expected-downtime"] = self.expected_downtime_ms
        out["ram"] = self._ram(0 if status == "completed" else remaining_pages, status)
        if self.cpu_throttle_percentage and status != "completed":
            out["cpu-throttle-percentage"] = self.cpu_throttle_percentage
        out.update(self.extra | error)
        return out

    def _ram(self, remaining_pages: int, status: str) -> Reply:
        return {
            "transferred": self.transferred,
            "remaining": remaining_pages * PAGE_SIZE,
            "total": self.total_bytes,
            "duplicate": self.zero_pages,
            "normal": self.normal_pages,
            "normal-bytes": self.normal_pages * PAGE_SIZE,
            "dirty-pages-rate": 0 if status == "completed" else self.dirty_pages_rate,
            "mbps": self.mbps,
            "dirty-sync-count": self.dirty_sync_count,
            "postcopy-requests": self.postcopy_requests,
            "page-size": PAGE_SIZE,
            "multifd-bytes": self.multifd_bytes,
            "pages-per-second": self.pages_per_second,
            "precopy-bytes": self.precopy_bytes,
            "downtime-bytes": self.downtime_bytes,
            "postcopy-bytes": self.postcopy_bytes,
            "dirty-sync-missed-zero-copy": self.dirty_sync_missed_zero_copy,
        }
