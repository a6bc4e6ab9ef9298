"""The capability `compress` of QEMU up to 9.0: each page packed by one of `compress-threads`.

Source: QEMU 7.2 migration/ram.c (save_compress_page, compress_page_with_multi_thread, do_compress_ram_page,
update_compress_thread_counts), compared with a live 7.2.22. The migration thread finds a page and hands it to an idle
thread; with `compress-wait-thread` it waits for one, else it sends the page itself. A thread looks for zeros, or
deflates the page as a stream of its own: header, be32 length, data. The first page of a block always goes out
whole. Packed pages count neither as normal nor as duplicate; query-migrate has `compression` for them. The
destination unpacks with `decompress-threads`, and when all are busy it reads no further. Every thread is assumed to
have a CPU of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from migsim.migration.compression import LEVEL_STEP
from migsim.migration.over_ram import OverRam
from migsim.migration.ram import PS_PER_NS, Ram, Saved, SaveLimits
from migsim.migration.wire import NORMAL_PAGE, PAGE_HEADER
from migsim.units import PAGE_SIZE

__all__ = ["ASSUMED_NS", "CompressRam", "ThreadedPage", "threaded_page"]

LENGTH: Final = 4  # be32, before the deflated data
STORED: Final = 11  # zlib's header, one stored block's, adler32: what level 0 adds to a page

#: ns, assumed: a page handed to a thread (two mutexes, a wake-up) and its result copied into the stream.
ASSUMED_NS: Final[Mapping[str, float]] = {"qemu_page_compress": 3_000.0}


class Options(Protocol):
    """The members of `[migration]` that decide it."""

    @property
    def compress_level(self) -> int: ...
    @property
    def compress_threads(self) -> int: ...
    @property
    def decompress_threads(self) -> int: ...
    @property
    def compress_wait_thread(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ThreadedPage:
    """A page of data. ns: all considered, the wire too · share: of pages that a thread takes (the migration thread
    sends the others itself) · packed_bytes: be32 length and deflated data · drain_ns: a section waits for its threads.
    """

    ns: float
    share: float
    packed_bytes: int
    drain_ns: float

    @property
    def bytes(self) -> float:
        """Of a page on the stream, on average."""
        return self.share * (PAGE_HEADER + self.packed_bytes) + (1 - self.share) * NORMAL_PAGE


def threaded_page(
    ns: Callable[[str], float], options: Options, left: float, page_ns: float, link_bytes_per_s: float
) -> ThreadedPage:
    """`left`: share of a page that deflating leaves · page_ns: what the migration thread pays to send one itself."""
    level = options.compress_level
    size = LENGTH + (PAGE_SIZE + STORED if not level else max(1, round(PAGE_SIZE * left)))
    slower = 1 + LEVEL_STEP["zlib"] * (level - 1) if level > 1 else 1.0
    pack_ns = (ns("multifd_zlib_page") * slower if level else 0.0) + ns("qemu_page_compress")
    unpack_ns = ns("multifd_unzlib_page") if level else 0.0
    hand_over_ns, threads = ns("qemu_page_compress"), options.compress_threads

    def pace(share: float) -> float:
        """ns a page where that share of them goes to threads."""
        own = share * hand_over_ns + (1 - share) * page_ns
        wire = (share * (PAGE_HEADER + size) + (1 - share) * NORMAL_PAGE) * 1e9 / link_bytes_per_s
        return max(own, wire, share * unpack_ns / options.decompress_threads)

    if options.compress_wait_thread:
        return ThreadedPage(max(pace(1.0), pack_ns / threads), 1.0, size, pack_ns)
    # a thread is idle as often as its work leaves it: share = pace(share) * threads / pack_ns, or all
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        low, high = (share, high) if pace(share) * threads >= share * pack_ns else (low, share)
    return ThreadedPage(pace(high), high, size, pack_ns)


@dataclass
class CompressRam(OverRam[Ram]):
    """`Ram` whose pages are deflated by threads. `page` follows the link's speed, as `ram.costs` do."""

    page: Callable[[], ThreadedPage]
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("pages", "busy", "size", "handled"), 0.0))
    before: dict[str, float] = field(default_factory=dict)
    busy_rate: float = 0.0
    compression_rate: float = 0.0

    def save(self, limits: SaveLimits) -> Saved:
        """One section. It ends when every thread has handed back its page."""
        page, first = self.page(), self.ram.first_pages
        saved = self.ram.save(limits)
        plain = min(self.ram.first_pages - first, saved.normal)  # the first page of a block
        others = saved.normal - plain
        packed = round(others * page.share)
        counts = self.counts
        counts["pages"] += packed
        counts["size"] += packed * page.packed_bytes
        counts["busy"] += (others + saved.duplicate) * (1 - page.share)
        counts["handled"] += saved.normal + saved.duplicate
        per_page = self.ram.costs.normal_bytes
        size = saved.page_bytes + plain * (NORMAL_PAGE - per_page)
        elapsed_ps = saved.elapsed_ps + (round(page.drain_ns * PS_PER_NS) if packed else 0)
        return Saved(saved.normal - packed, saved.duplicate, size, elapsed_ps, saved.why, packed=packed)

    def update_rates(self) -> None:
        """Busy a page handled, and bytes of pages a byte deflated, both of the period that ends."""
        period = {name: self.counts[name] - self.before.get(name, 0.0) for name in self.counts}
        if period["handled"]:
            self.busy_rate = period["busy"] / period["handled"]
            if period["size"]:
                self.compression_rate = period["pages"] * PAGE_SIZE / period["size"]
            self.before = dict(self.counts)
        self.ram.update_rates()

    def reply(self) -> dict[str, Any]:
        pages, busy, size = (round(self.counts[name]) for name in ("pages", "busy", "size"))
        return self.ram.reply() | {
            "compression": {
                "pages": pages, "busy": busy, "busy-rate": self.busy_rate, "compressed-size": size,
                "compression-rate": self.compression_rate,
            }
        }  # fmt: skip
