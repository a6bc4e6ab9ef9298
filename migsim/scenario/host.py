"""`[kvm]`, `[link]`, `[host]` and `[expect]`: the machine under the guest, the wire, and what an author foresaw."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from msgspec import Meta, Struct

from migsim.scenario.errors import ScenarioError
from migsim.scenario.fields import duration, link_rate, milliseconds, share
from migsim.units import NS_PER_S

__all__ = ["Expect", "Host", "Kvm", "Link", "LinkPhase", "Storage"]

_LINK_MAX = 1 << 50  # bytes/s; what a window admits is counted in 64 bits
_Syncs = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_RING_MIN, _RING_MAX = 1024, 65536  # KVM_DIRTY_RING_MAX_ENTRIES; the floor leaves room for PML's 512 and KVM's reserve


class Kvm(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Module parameters and capabilities of KVM, under KVM's names."""

    mmu: Annotated[
        Literal["tdp", "tdp-5.10", "shadow"],
        Meta(description="tdp: of today; tdp-5.10: as first merged; shadow: what it replaced (tdp_mmu=N)"),
    ] = "tdp"
    accel: Annotated[
        Literal["kvm", "tcg"],
        Meta(description="tcg: QEMU emulates the guest; dirty tracking is re-armed at the sync, there is no CLEAR"),
    ] = "kvm"
    vendor: Literal["intel", "amd"] = "intel"
    pml: Annotated[bool, Meta(description="page-modification logging; Intel only, ignored on AMD")] = True
    eager_page_split: bool = True
    manual_dirty_log_protect: Annotated[
        Literal["initially-set", "enable", "off"],
        Meta(description="KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 3, 1 or 0; QEMU takes what the kernel offers"),
    ] = "initially-set"
    dirty_ring_size: Annotated[int, Meta(ge=0, le=_RING_MAX, description="entries a vCPU; 0: bitmap")] = 0
    nx_huge_pages: bool = False

    def __post_init__(self) -> None:
        ring = self.dirty_ring_size
        if ring and (ring < _RING_MIN or ring & (ring - 1)):
            problem = f"must be 0 (bitmap) or a power of two from {_RING_MIN} to {_RING_MAX}"
            raise ScenarioError("dirty-ring-size", problem, value=ring)
        if self.accel == "tcg" and ring:
            raise ScenarioError("dirty-ring-size", 'is KVM\'s; accel = "tcg" has none', value=ring)

    @property
    def lazy_clear(self) -> bool:
        """Does QEMU re-arm tracking chunk by chunk, just before it sends (KVM's manual protection)?"""
        return self.accel == "kvm" and self.manual_dirty_log_protect != "off"


class LinkPhase(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """From `at` ns after the migrate command on, the migration gets `share` of the link."""

    at: Annotated[int, duration("since the migrate command")]
    share: Annotated[float, share("of the bandwidth")]


class Link(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """The network between the hosts. bandwidth: bytes/s of payload, latency: ns one way."""

    bandwidth: Annotated[int, link_rate("of the migration network", ge=1, le=_LINK_MAX)] = 1_250_000_000
    latency: Annotated[int, duration("one way", le=60 * NS_PER_S)] = 50_000
    phases: tuple[LinkPhase, ...] = ()
    copies_zero_copy: Annotated[
        bool, Meta(description="MSG_ZEROCOPY sends are copied all the same: loopback, or a NIC without scatter-gather")
    ] = False
    fail_at: Annotated[int, duration("the connection dies, since the migrate command")] | None = None
    fail_noticed_after: Annotated[int, duration("until the socket reports it; 0: the peer resets")] = 0

    def __post_init__(self) -> None:
        if self.fail_noticed_after and self.fail_at is None:
            problem = 'needs "fail-at", the time at which the connection dies'
            raise ScenarioError("fail-noticed-after", problem, value=self.fail_noticed_after)
        times = [phase.at for phase in self.phases]
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise ScenarioError("phases", 'must be in order of "at", each later than the one before')


class Storage(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What a migration to a file (uri "file:...") is written to, in the link's stead."""

    bandwidth: Annotated[int, link_rate("of sustained writes", ge=1, le=_LINK_MAX)] = 2_000_000_000


class Host(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Whose costs are charged: the name of a host profile; and how the destination was started."""

    profile: str = "default"
    destination_prealloc: Annotated[
        bool,
        Meta(description="the destination's guest memory is there at the start; else each page is got when it arrives"),
    ] = True


class Expect(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What the scenario's author foresaw; `migsim run` says whether it came true. Bounds are inclusive."""

    converged: bool
    total_time: tuple[Annotated[int, milliseconds("")], Annotated[int, milliseconds("")]] | None = None
    downtime: tuple[Annotated[int, milliseconds("")], Annotated[int, milliseconds("")]] | None = None
    syncs: tuple[_Syncs, _Syncs] | None = None

    def __post_init__(self) -> None:
        for name, bounds in (("total-time", self.total_time), ("downtime", self.downtime), ("syncs", self.syncs)):
            if bounds is not None and bounds[0] > bounds[1]:
                raise ScenarioError(name, "must name the smaller bound first", value=list(bounds))
