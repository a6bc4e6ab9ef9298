"""Switch to post-copy after a time or a number of passes, as virsh and guestperf do."""

from __future__ import annotations

from dataclasses import dataclass

from migsim.migration.policies.protocol import Command, Sample, StartPostcopy
from migsim.units import NS_PER_MS

__all__ = ["PostcopyAfter"]


@dataclass(slots=True)
class PostcopyAfter:
    """migrate-start-postcopy once `after_ns` have passed or `passes` bitmap syncs were counted, whichever is first.

    passes: guestperf's post-copy-iters (QEMU tests/migration-stress/guestperf/engine.py), and with 2 virsh's
    --postcopy-after-precopy (the first pass over memory has ended).
    """

    after_ns: int | None = None
    passes: int | None = None
    poll_interval_ns: int = NS_PER_MS
    sent: bool = False

    def __post_init__(self) -> None:
        assert self.after_ns is not None or self.passes is not None

    def before_migrate(self) -> tuple[Command, ...]:
        return ()

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        if self.sent or sample.status != "active":
            return ()
        late = self.after_ns is not None and sample.now_ns >= self.after_ns
        enough = self.passes is not None and sample.dirty_sync_count >= self.passes
        if not (late or enough):
            return ()
        self.sent = True
        return (StartPostcopy(),)
