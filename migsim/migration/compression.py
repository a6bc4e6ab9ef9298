"""What multifd's compression, TLS and zero-copy do to a page: its size on the wire and the CPU time of a channel.

Source: QEMU 10.0 migration/multifd-{zlib,zstd,qpl,uadk,qatzip}.c, multifd-nocomp.c, tls.c. A packet's pages are
compressed as one stream by the channel's own thread and unpacked by its twin at the destination, so the slower of the
two sets the channel's pace and channels are the CPUs there are. How well pages compress is the guest's affair
(`guest.compressed`), assumed alike for all methods. Levels: each step up takes longer by a share, assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from migsim.units import PAGE_SIZE

__all__ = ["ASSUMED_NS", "ChannelPage", "channel_page"]

#: ns a page at level 1, assumed: zlib packs 100 MB/s and unpacks 350 MB/s a core, zstd 500 and 1400 MB/s; the
#: accelerators take a core's time only to submit and reap.
ASSUMED_NS: Final[Mapping[str, float]] = {
    "multifd_zlib_page": 41_000.0, "multifd_unzlib_page": 11_700.0,
    "multifd_zstd_page": 8_200.0, "multifd_unzstd_page": 2_900.0,
    "multifd_qpl_page": 1_000.0, "multifd_unqpl_page": 1_000.0,
    "multifd_uadk_page": 1_000.0, "multifd_unuadk_page": 1_000.0,
    "multifd_qatzip_page": 1_000.0, "multifd_unqatzip_page": 1_000.0,
    "multifd_page_zero_copy": 600.0,  # multifd-page without the copy into the socket; the page is pinned instead
    "multifd_page_zero_copy_copied": 1_600.0,  # multifd-page, and the page pinned for nothing
    "tls_byte": 0.4,  # AES-GCM through GnuTLS, 2.5 GB/s a core
}  # fmt: skip
LEVEL_STEP: Final = {"zlib": 0.5, "zstd": 0.3}  # each level above the first: so much longer to pack
TLS_RECORD: Final = 16 << 10
TLS_OVERHEAD: Final = 22  # header 5, tag 16, type 1 (TLS 1.3)


@dataclass(frozen=True, slots=True)
class ChannelPage:
    """One page of data on a channel. stream_bytes: what QEMU counts · wire_bytes: with TLS's records · cpu_ns."""

    stream_bytes: int
    wire_bytes: float
    cpu_ns: float


def tls_wire_bytes(size: float) -> float:
    """Bytes on the wire of `size` bytes under TLS, records full."""
    return size * (1 + TLS_OVERHEAD / TLS_RECORD)


def channel_page(
    ns: Callable[[str], float], method: str, level: int, compressed: float, *, tls: bool = False,
    sent_by: str = "multifd_page",
) -> ChannelPage:  # fmt: skip
    """A page under `multifd-compression` = `method` at `level`; `compressed`: share of its size that is left.

    sent_by: the operation that sends it (multifd_page, multifd_page_zero_copy, multifd_page_direct_io).
    """
    cpu_ns = ns(sent_by)
    size = PAGE_SIZE
    if method != "none":
        stored = method == "zlib" and level == 0
        size = PAGE_SIZE if stored else max(1, round(PAGE_SIZE * compressed))
        slower = 1 + LEVEL_STEP.get(method, 0.0) * (level - 1) if level > 1 else 1.0
        pack_ns = 0.0 if stored else ns(f"multifd_{method}_page") * slower
        cpu_ns += max(pack_ns, 0.0 if stored else ns(f"multifd_un{method}_page"))
    if not tls:
        return ChannelPage(size, size, cpu_ns)
    return ChannelPage(size, tls_wire_bytes(size), cpu_ns + ns("tls_byte") * size)
