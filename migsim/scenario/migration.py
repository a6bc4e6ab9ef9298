"""`[migration]`: QEMU's MigrationParameters under QMP's names, the capabilities, and what the operator does.

Types, ranges and defaults are those of QEMU 10.0 (qapi/migration.json, migration/options.c), and of 7.2 for the
members it still had. Sizes are bytes, bandwidths bytes/s, QMP's times whole ms, exactly as QMP takes them; the last
group is migsim's own and in ns.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import fields

from migsim.migration.capabilities import CAPABILITIES, OTHER_LOOPS, WITHOUT_EFFECT, capabilities_of
from migsim.migration.parameters import PARAMETERS, Compat, parameters_of
from migsim.scenario.errors import ScenarioError, nearest
from migsim.scenario.fields import bandwidth, duration, milliseconds, percent, size
from migsim.units import MIB, PAGE_SIZE

__all__ = ["BitmapAlias", "BlockBitmapMapping", "Compat", "Migration"]

_INT64_MAX: Final = (1 << 63) - 1


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
    vcpu_dirty_limit: Annotated[int, Meta(ge=1, le=_INT64_MAX, description="MB/s a vCPU")] = 1
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

    uri: Annotated[str | None, Meta(description="of migrate; default tcp, with mapped-ram a file")] = None

    # What the operator does; QEMU has no such parameters.
    time_limit: Annotated[int, duration("give up (cancel) after this long")] | None = None
    round_limit: Annotated[int, Meta(ge=1, le=_INT64_MAX, description="give up after this many syncs")] | None = None
    cancel_after: Annotated[int, duration("the operator sends migrate_cancel then")] | None = None
    switchover_pause: Annotated[int, duration("how long the client waits in pre-switchover")] = 0
    platform: Annotated[
        Literal[
            "none", "nova", "kubevirt", "kubevirt-ramp", "cloud-hypervisor", "ovirt-minimal-downtime",
            "ovirt-suspend-workload", "ovirt-post-copy", "libvirt-timeout-suspend", "libvirt-timeout-postcopy",
        ],
        Meta(description="the management layer that polls query-migrate and sends commands"),
    ] = "none"
    platform_timeout: Annotated[int, duration("libvirt-timeout-*: virsh migrate --timeout")] | None = None
    postcopy_after: Annotated[int, duration("migrate-start-postcopy is sent then")] | None = None
    postcopy_recover_after: Annotated[int, duration("of postcopy-paused; migrate-recover then")] | None = None
    postcopy_after_passes: Annotated[int, Meta(ge=1, le=_INT64_MAX, description="or after so many syncs")] | None = None

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
        self._check_postcopy()
        self._check_modelled()
        if self.switchover_pause and "pause-before-switchover" not in self.capabilities:
            problem = 'needs the capability "pause-before-switchover"'
            raise ScenarioError("switchover-pause", problem, value=self.switchover_pause)

    def _check_modelled(self) -> None:
        """What QEMU takes and what would change the loop into one that is not emulated."""
        for index, name in enumerate(self.capabilities):
            if name in OTHER_LOOPS:
                raise ScenarioError(f"capabilities.{index}", f"QEMU accepts it; {OTHER_LOOPS[name]}", value=name)
        if {"compress", "xbzrle"} <= set(self.capabilities):
            problem = "QEMU 7.2 accepts the pair (deflates the first pass, then turns to xbzrle); not modelled here"
            raise ScenarioError("capabilities", problem, value=list(self.capabilities))
        if {"background-snapshot", "mapped-ram"} <= set(self.capabilities):
            problem = "QEMU accepts the pair; a snapshot into fixed places of a file is not modelled here"
            raise ScenarioError("capabilities", problem, value=list(self.capabilities))
        if self.mode == "cpr-transfer":
            problem = "QEMU accepts it; RAM changes hands without being copied, hence not modelled here"
            raise ScenarioError("mode", problem, value=self.mode)

    @property
    def to_file(self) -> bool:
        """Does it end in a file instead of a destination?"""
        return self.migrate_uri.startswith("file:")

    @property
    def is_snapshot(self) -> bool:
        """Is RAM saved behind the running guest's back, by write faults?"""
        return "background-snapshot" in self.capabilities

    @property
    def migrate_uri(self) -> str:
        """The argument of migrate."""
        return self.uri or ("file:guest.mig" if "mapped-ram" in self.capabilities else "tcp:destination:49152")

    def not_modelled(self) -> list[str]:
        """Capabilities and parameters in force that change nothing here: the result names them."""
        set_ = [f.encode_name for f in fields(Migration) if f.default != getattr(self, f.name)]
        return [name for name in (*self.capabilities, *set_) if name in WITHOUT_EFFECT]

    def _check_postcopy(self) -> None:
        """QEMU refuses migrate-start-postcopy where the capability is off."""
        if "postcopy-ram" in self.capabilities:
            return
        asked: dict[str, object] = {"postcopy-after": self.postcopy_after}
        asked["postcopy-after-passes"] = self.postcopy_after_passes
        if self.platform in ("libvirt-timeout-postcopy", "ovirt-post-copy"):
            asked["platform"] = self.platform
        for name, value in asked.items():
            if value is not None:
                raise ScenarioError(name, 'needs the capability "postcopy-ram"', value=value)

    def _check_versions(self) -> None:
        known = capabilities_of(self.compat)
        for index, name in enumerate(self.capabilities):
            if name not in known:
                problem = _version_problem(CAPABILITY_VERSIONS.get(name), self.compat)
                problem = problem or f"not a capability of QEMU {self.compat}{nearest(name, known)}"
                raise ScenarioError(f"capabilities.{index}", problem, value=name)
            if name in self.capabilities[:index]:
                raise ScenarioError(f"capabilities.{index}", "is there twice", value=name)
        for field in fields(Migration):
            spec = PARAMETERS.get(field.encode_name)
            value = getattr(self, field.name)
            if spec is not None and not spec.exists(self.compat) and value != field.default:
                problem = _version_problem((spec.since, spec.last), self.compat)
                raise ScenarioError(field.encode_name, problem, value=value)

    def parameters(self) -> dict[str, Any]:
        """The MigrationParameters of this release under their QMP names, in QMP's units."""
        known = parameters_of(self.compat)
        return {f.encode_name: getattr(self, f.name) for f in fields(Migration) if f.encode_name in known}


def _version_problem(versions: tuple[str | None, str | None] | None, compat: Compat) -> str:
    since, last = versions or (None, None)
    if since is None and last is None:
        return ""
    when = f"exists since QEMU {since}" if since is not None else f"was last in QEMU {last}"
    return f'{when}; this scenario has compat = "{compat}"'


CAPABILITY_VERSIONS: Final = {name: (since, last) for name, since, last in CAPABILITIES}
assert {f.encode_name for f in fields(Migration)} >= PARAMETERS.keys()
