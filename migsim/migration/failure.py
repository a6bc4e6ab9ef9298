"""The connection dies: before the switch the guest goes on at the source, after it post-copy pauses until recovered.

Source: QEMU 10.0 migration.c (migration_detect_error, postcopy_pause, postcopy_do_resume, resume handshake), ram.c
(ram_state_resume_prepare), postcopy-ram.c. An error before completion ends in `failed` with an error-desc. In
postcopy-active it ends in `postcopy-paused`: the guest runs at the destination and a vCPU stands still at the first
page that is not there. Recovery (migrate-recover there, `migrate resume` here) goes through postcopy-recover-setup
(9.1) and postcopy-recover: the destination sends the bitmap of what it has received, and what it has not is sent
again. Pages in flight when the link died were sent and not received; the scan takes them up again, which here means
that the next pages in scan order are paid for twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from migsim.migration.wire import BE64, NORMAL_PAGE
from migsim.units import NS_PER_S, PAGE_SIZE

if TYPE_CHECKING:
    from migsim.migration.precopy import Precopy

__all__ = ["LINK", "LinkFailure", "pause_and_recover"]

LINK: Final = "the link"  # Precopy.why of a migration that ended so
SENDING: Final = "Unable to write to socket: "
BITMAP_FRAMING: Final = 2 * BE64  # size before the received bitmap, end mark behind it


@dataclass(frozen=True, slots=True)
class LinkFailure:
    """at_ns: nothing gets through from here on · noticed_ns: how much later the source's socket reports an error
    (0: the peer resets the connection; a silent loss takes TCP's retransmissions to give up) · recover_ns: after the
    pause began, a new connection is offered; None: nobody does · buffered_bytes: what sockets and wire hold.
    """

    at_ns: int
    noticed_ns: int = 0
    recover_ns: int | None = None
    buffered_bytes: int = 0

    @property
    def error_desc(self) -> str:
        """What query-migrate says."""
        return SENDING + ("Connection timed out" if self.noticed_ns else "Connection reset by peer")


def pause_and_recover(loop: Precopy, failure: LinkFailure) -> bool:
    """Post-copy without a connection; True once pages flow again, False where nobody recovers it."""
    loop.pass_time(failure.noticed_ns)
    _lose(loop, failure)
    loop.set_status("postcopy-paused")
    loop.stats.error_desc = failure.error_desc
    if failure.recover_ns is None:
        loop.close_round()
        loop.why = LINK
        return False
    loop.pass_time(failure.recover_ns)
    if loop.knobs.compat != "7.2":
        loop.set_status("postcopy-recover-setup")
        loop.pass_time(2 * loop.costs.latency_ns)
    loop.set_status("postcopy-recover")
    bitmap = loop.ram.total_bytes // PAGE_SIZE // 8 + BITMAP_FRAMING
    loop.pass_time(int(bitmap * NS_PER_S / loop.link_bytes_per_s(loop.now_ns)) + 2 * loop.costs.latency_ns)
    loop.set_status("postcopy-active")
    loop.window.restart(loop.clock.ms(loop.now_ns))
    return True


def _lose(loop: Precopy, failure: LinkFailure) -> None:
    """Pages that were sent, and counted, and never arrived: their bits are set again by the received bitmap."""
    pages = min(loop.ram.dirty_pages, failure.buffered_bytes // NORMAL_PAGE)
    loop.count_lost(pages, pages * NORMAL_PAGE)
