"""Multifd: pages leave in packets on several channels; the main thread scans, batches and looks for zero pages.

Source: QEMU 7.2 and 10.0 migration/multifd.c. A packet holds up to 128 pages of one block and always pays for its full
header. The rate limit sees a packet when it is handed over, so a window overshoots by up to a packet. SYNC packets on
every channel end each section in 7.2, each scan of RAM later (8.1 machine types).

QEMU up to 8.1 had a race in multifd_queue_page: having handed a full packet over, it compared the block of the array
it no longer owned, which the channel may have reset already, and then queued the last page once more. The page goes
out twice and is counted in multifd-bytes, not in `normal`. How often depends on how fast a channel wakes up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from migsim.migration.over_ram import OverRam
from migsim.migration.ram import Ram, SaveCosts, Saved, SaveLimits
from migsim.migration.ram_kernels import END_OF_SPAN, RATE_LIMIT, TIME_LIMIT
from migsim.migration.wire import MULTIFD_PACKET_PAGES, ZERO_PAGE, multifd_packet, multifd_packet_header
from migsim.units import PAGE_SIZE

__all__ = ["MultifdRam"]

FULL_PACKET: Final = multifd_packet(MULTIFD_PACKET_PAGES)


@dataclass
class MultifdRam(OverRam[Ram]):
    """`Ram` whose pages go out in packets. Same protocol; sizes to the byte, channels' pace is in `ram.costs`.

    requeue: the 7.2 race above, as a share of full packets; 0 for versions without it. sync_each_section: 7.2.
    """

    channels: int
    requeue: float = 0.0
    sync_each_section: bool = False
    zero_on_channels: bool = False  # 9.0: zero pages ride in packet headers
    page_bytes: int = PAGE_SIZE  # of a page of data in a packet: less with compression
    header_bytes: int = multifd_packet_header()  # of a packet; none where pages go to their places in a file
    zero_bytes: int = ZERO_PAGE  # of a zero page the main thread found
    setup_synced: bool = False
    owed: float = 0.0  # fractional requeued pages not yet sent
    copied: bool = False  # zero-copy-send, and the kernel copied all the same: each flush of a channel counts
    main_costs: Callable[[], SaveCosts] | None = None  # of a page on the main channel: post-copy's
    in_postcopy: bool = False
    unflushed: int = 0  # pages sent since the last flush
    _places: tuple[SaveCosts, SaveCosts] | None = field(default=None, init=False)  # costs and _in_places of them

    def enter_postcopy(self) -> None:
        assert self.main_costs is not None, "without what a page costs there"
        self.in_postcopy = True
        self.ram.enter_postcopy()

    def save(self, limits: SaveLimits) -> Saved:
        """One section: whole packets until the limit is passed, what is left in a last one, then the barrier."""
        if self.in_postcopy:
            return self._on_main_channel(limits)
        sum_ = _Sum(page_bytes=self.page_bytes, header_bytes=self.header_bytes)
        ram, costs = self.ram, self.ram.costs
        ram.costs, ram.spent_ps = self._in_places(costs), 0
        try:
            why = self._packets(limits, sum_)
        finally:
            ram.costs, ram.spent_ps = costs, 0
        if sum_.queued:
            sum_.channel_bytes += self.header_bytes + sum_.queued_data * self.page_bytes
        syncs = self._barrier(why)
        sum_.channel_bytes += syncs * self.header_bytes
        page_bytes, missed = sum_.main_bytes + sum_.channel_bytes, self._missed(sum_.normal, flushed=syncs > 0)
        return Saved(sum_.normal, sum_.zero, page_bytes, sum_.elapsed_ps, why, sum_.channel_bytes, 0, missed)

    def _on_main_channel(self, limits: SaveLimits) -> Saved:
        """Post-copy: no page in a packet, but sections still end with SYNC packets where they did (7.2)."""
        assert self.main_costs is not None
        self.ram.costs = self.main_costs()
        saved = self.ram.save(limits)
        syncs = self._barrier(saved.why)
        size, missed = syncs * self.header_bytes, self._missed(0, flushed=syncs > 0)
        return saved._replace(page_bytes=saved.page_bytes + size, channel_bytes=size, missed_zero_copy=missed)

    def _missed(self, pages: int, *, flushed: bool) -> int:
        """Flushes that found every send since the last one copied; a channel without sends since then says nothing."""
        self.unflushed += pages
        if not (self.copied and flushed):
            return 0
        channels, self.unflushed = min(self.channels, -(-self.unflushed // MULTIFD_PACKET_PAGES)), 0
        return channels

    def _packets(self, limits: SaveLimits, sum_: _Sum) -> int:
        while True:
            left = limits.bytes - sum_.main_bytes - sum_.channel_bytes
            if left < 0:
                return RATE_LIMIT
            if sum_.elapsed_ps >= limits.ps:
                return TIME_LIMIT
            # all packets but the last in one go; zero pages between them may make that one superfluous
            full = self.header_bytes + MULTIFD_PACKET_PAGES * self.page_bytes
            packets = max(1, min(left // full, 1 << 20))
            why = self._send(packets * MULTIFD_PACKET_PAGES - sum_.queued, packets, limits.ps - sum_.elapsed_ps, sum_)
            if why != RATE_LIMIT:
                return why

    def _send(self, room: int, packets: int, ps: int, sum_: _Sum) -> int:
        """Queue pages until `room` places are taken, some of them by pages queued twice."""
        twice = min(int(self.owed + self.requeue * packets), room - 1)
        sent = self.ram.save(SaveLimits(room - twice - 1, ps))
        self.ram.spent_ps += sent.elapsed_ps
        sum_.elapsed_ps += sent.elapsed_ps
        sum_.normal += sent.normal
        sum_.zero += sent.duplicate
        listed = sent.duplicate if self.zero_on_channels else 0
        sum_.main_bytes += sent.page_bytes - sent.normal - listed + self.zero_bytes * (sent.duplicate - listed)
        if sent.normal + listed < room - twice:  # cut short: only packets that were filled had a last page
            packets = (sum_.queued + sent.normal + listed) // MULTIFD_PACKET_PAGES
            twice = int(self.owed + self.requeue * packets)
        self.owed += self.requeue * packets - twice
        sum_.queue(sent.normal + twice, listed)
        return sent.why

    def _barrier(self, why: int) -> int:
        """SYNC packets, over all channels: once at setup, then after each section (7.2) or once a scan of RAM."""
        rounds = int(not self.setup_synced) + int(self.sync_each_section or why == END_OF_SPAN)
        self.setup_synced = True
        return rounds * self.channels

    def _in_places(self, costs: SaveCosts) -> SaveCosts:
        """With these the inner RAM counts places in packets: a page of data takes one, a zero page if it is listed."""
        if self._places is None or self._places[0] is not costs:
            self._places = costs, replace(costs, normal_bytes=1, zero_bytes=int(self.zero_on_channels))
        return self._places[1]


@dataclass(slots=True)
class _Sum:
    """What one section has sent so far; `queued` places, `queued_data` of them data, wait in a packet not yet full."""

    normal: int = 0
    zero: int = 0
    main_bytes: int = 0
    channel_bytes: int = 0
    elapsed_ps: int = 0
    queued: int = 0
    queued_data: int = 0
    page_bytes: int = PAGE_SIZE
    header_bytes: int = multifd_packet_header()

    def queue(self, data: int, zero: int) -> None:
        """Fill packets with `data` pages and `zero` listed ones; where both occur they are spread evenly."""
        places, pages = self.queued + data + zero, self.queued_data + data
        full, self.queued = divmod(places, MULTIFD_PACKET_PAGES)
        self.queued_data = self.queued * pages // places if places else 0
        self.channel_bytes += full * self.header_bytes + (pages - self.queued_data) * self.page_bytes


assert FULL_PACKET == 128 * PAGE_SIZE + 1344
