"""`[migration]`: QEMU's MigrationParameters under QMP's names, the capabilities, and what the operator does.

Types, ranges and defaults are those of QEMU 10.0 (qapi/migration.json, migration/options.c), and of 7.2 for the
members it still had. Sizes are bytes, bandwidths bytes/s, QMP's times whole ms, exactly as QMP takes them; the last
group is migsim's own and in ns.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import fields

from migsim.scenario.errors import ScenarioError, nearest
from migsim.scenario.fields import bandwidth, duration, milliseconds, percent, size
from migsim.units import MIB, PAGE_SIZE

__all__ = ["CAPABILITIES", "PARAMETER_VERSIONS", "BitmapAlias", "BlockBitmapMapping", "Compat", "Migration"]

Compat = Literal["7.2", "10.0"]

# First and last release with it; None: before 7.2, or still there in 10.0.
_Versions = tuple[str | None, str | None]
PARAMETER_VERSIONS: Final[dict[str, _Versions]] = {
    "avail-switchover-bandwidth": ("8.2", None),
    "vcpu-dirty-limit": ("8.1", None),
    "x-vcpu-dirty-limit-period": ("8.1", None),
    "mode": ("8.2", None),
    "zero-page-detection": ("9.0", None),
    "direct-io": ("9.1", None),
    "multifd-qatzip-level": ("9.2", None),
    "compress-level": (None, "9.0"),
    "compress-threads": (None, "9.0"),
    "compress-wait-thread": (None, "9.0"),
    "decompress-threads": (None, "9.0"),
    "block-incremental": (None, "9.0"),
}

#: In the order of query-migrate-capabilities.
CAPABILITIES: Final[dict[str, _Versions]] = {
    "xbzrle": (None, None),
    "rdma-pin-all": (None, None),
    "auto-converge": (None, None),
    "zero-blocks": (None, None),
    "compress": (None, "9.0"),
    "events": (None, None),
    "postcopy-ram": (None, None),
    "x-colo": (None, None),
    "release-ram": (None, None),
    "block": (None, "9.0"),
    "return-path": (None, None),
    "pause-before-switchover": (None, None),
    "multifd": (None, None),
    "dirty-bitmaps": (None, None),
    "postcopy-blocktime": (None, None),
    "late-block-activate": (None, None),
    "x-ignore-shared": (None, None),
    "validate-uuid": (None, None),
    "background-snapshot": (None, None),
    "zero-copy-send": (None, None),
    "postcopy-preempt": (None, None),
    "switchover-ack": ("8.1", None),
    "dirty-limit": ("8.1", None),
    "mapped-ram": ("9.0", None),
}


class BitmapAlias(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """BitmapMigrationBitmapAlias."""

    name: str
    alias: str


class BlockBitmapMapping(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """BitmapMigrationNodeAlias; disk bitmaps do not touch RAM, it is carried for completeness."""

    node_name: str
    alias: str
    bitmaps: tuple[BitmapAlias, ...] = ()


class Migration(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """How QEMU is told to migrate. Attributes are QMP's names with underscores."""

    compat: Compat = "10.0"
    capabilities: tuple[str, ...] = ()

    announce_initial: Annotated[int, milliseconds("", le=100_000)] = 50
    announce_max: Annotated[int, milliseconds("", le=100_000)] = 550
    announce_rounds: Annotated[int, Meta(ge=0, le=1000)] = 5
    announce_step: Annotated[int, milliseconds("", ge=1, le=10_000)] = 100
    throttle_trigger_threshold: Annotated[int, percent("", ge=1, le=100)] = 50
    cpu_throttle_initial: Annotated[int, percent("", ge=1, le=99)] = 20
    cpu_throttle_increment: Annotated[int, percent("", ge=1, le=99)] = 10
    cpu_throttle_tailslow: bool = False
    max_cpu_throttle: Annotated[int, percent("", ge=1, le=99)] = 99
    max_bandwidth: Annotated[int, bandwidth("0 is unlimited")] = 128 * MIB
    avail_switchover_bandwidth: Annotated[int, bandwidth("0: QEMU estimates it")] = 0
    downtime_limit: Annotated[int, milliseconds("", le=2_000_000)] = 300
    max_postcopy_bandwidth: Annotated[int, bandwidth("0 is unlimited")] = 0
    multifd_channels: Annotated[int, Meta(ge=1, le=255)] = 2
    multifd_compression: Literal["none", "zlib", "zstd", "qpl", "uadk", "qatzip"] = "none"
    multifd_zlib_level: Annotated[int, Meta(ge=0, le=9)] = 1
    multifd_zstd_level: Annotated[int, Meta(ge=0, le=20)] = 1
    multifd_qatzip_level: Annotated[int, Meta(ge=1, le=9)] = 1
    xbzrle_cache_size: Annotated[int, size("a power of two", ge=PAGE_SIZE, le=1 << 62)] = 64 * MIB
    zero_page_detection: Literal["none", "legacy", "multifd"] = "multifd"
    direct_io: bool = False
    mode: Literal["normal", "cpr-reboot", "cpr-transfer"] = "normal"
    x_vcpu_dirty_limit_period: Annotated[int, milliseconds("", ge=1, le=1000)] = 1000
    vcpu_dirty_limit: Annotated[int, Meta(ge=1, description="MB/s a vCPU")] = 1
    x_checkpoint_delay: Annotated[int, milliseconds("", le=(1 << 32) - 1)] = 20_000
    tls_creds: str | None = ""
    tls_hostname: str | None = ""
    tls_authz: str | None = ""
    block_bitmap_mapping: tuple[BlockBitmapMapping, ...] | None = None
    compress_level: Annotated[int, Meta(ge=0, le=9)] = 1
    compress_threads: Annotated[int, Meta(ge=1, le=255)] = 8
    compress_wait_thread: bool = True
    decompress_threads: Annotated[int, Meta(ge=1, le=255)] = 2
    block_incremental: bool = False

    # What the operator does; QEMU has no such parameters.
    time_limit: Annotated[int, duration("give up (cancel) after this long")] | None = None
    round_limit: Annotated[int, Meta(ge=1, description="give up (cancel) after this many bitmap syncs")] | None = None
    cancel_after: Annotated[int, duration("the operator sends migrate_cancel then")] | None = None
    switchover_pause: Annotated[int, duration("how long the client waits in pre-switchover")] = 0

    def __post_init__(self) -> None:
        self._check_versions()
        if self.max_cpu_throttle < self.cpu_throttle_initial:
            problem = f"must be from cpu-throttle-initial ({self.cpu_throttle_initial}) to 99"
            raise ScenarioError("max-cpu-throttle", problem, value=self.max_cpu_throttle)
        if self.xbzrle_cache_size & (self.xbzrle_cache_size - 1):
            raise ScenarioError("xbzrle-cache-size", "must be a power of two", value=self.xbzrle_cache_size)
        for name in ("max_bandwidth", "avail_switchover_bandwidth", "max_postcopy_bandwidth"):
            if getattr(self, name) >= 1 << 64:
                raise ScenarioError(name.replace("_", "-"), "does not fit in 64 bits", value=getattr(self, name))
        if self.switchover_pause and "pause-before-switchover" not in self.capabilities:
            problem = 'needs the capability "pause-before-switchover"'
            raise ScenarioError("switchover-pause", problem, value=self.switchover_pause)

    def _check_versions(self) -> None:
        seen: set[str] = set()
        for index, name in enumerate(self.capabilities):
            if name not in CAPABILITIES:
                known = (n for n, versions in CAPABILITIES.items() if _in(versions, self.compat))
                problem = f"not a capability of QEMU {self.compat}{nearest(name, known)}"
                raise ScenarioError(f"capabilities.{index}", problem, value=name)
            if name in seen:
                raise ScenarioError(f"capabilities.{index}", "is there twice", value=name)
            seen.add(name)
            _require_version(f"capabilities.{index}", name, CAPABILITIES[name], self.compat)
        for field in fields(Migration):
            versions = PARAMETER_VERSIONS.get(field.encode_name)
            value = getattr(self, field.name)
            if versions is not None and value != field.default:
                _require_version(field.encode_name, value, versions, self.compat)


def _in(versions: _Versions, compat: str) -> bool:
    since, last = versions
    return (since is None or compat == "10.0") and (last is None or compat == "7.2")


def _require_version(field: str, value: object, versions: _Versions, compat: str) -> None:
    if _in(versions, compat):
        return
    since, last = versions
    when = f"exists since QEMU {since}" if since is not None else f"was last in QEMU {last}"
    raise ScenarioError(field, f'{when}; this scenario has compat = "{compat}"', value=value)


assert {f.encode_name for f in fields(Migration)} >= PARAMETER_VERSIONS.keys()
