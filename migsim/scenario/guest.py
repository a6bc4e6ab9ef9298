"""`[guest]` and `[[guest.workload]]`: what the machine is and what it writes.

A `Guest` is resolved when it is built: every stream then has a whole `working_set` and `offset` in bytes, its vCPUs
and a name, so that readers need no defaults of their own and the result repeats exactly what ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct
from msgspec.structs import force_setattr, replace

from migsim.quantities import in_words
from migsim.scenario.errors import ScenarioError
from migsim.scenario.fields import bandwidth, duration, share, size, size_or_share, write_rate
from migsim.units import GIB, MIB, PAGE_SIZE

__all__ = ["BACKING_BYTES", "Backing", "Device", "Extent", "Guest", "Pattern", "Rom", "Workload", "WorkloadPhase"]

Pattern = Literal["uniform", "sequential", "hot-cold", "zipf", "idle"]
Backing = Literal["4K", "2M", "1G"]
BACKING_BYTES: Final[dict[str, int]] = {"4K": PAGE_SIZE, "2M": 2 * MIB, "1G": GIB}

VCPUS_MAX: Final = 1024  # CONFIG_KVM_MAX_NR_VCPUS by default (Linux 6.8); MAXSMP kernels alone have 4096
_STREAMS_MAX: Final = 64
_MEMORY_MAX: Final = 1 << 52  # x86-64 physical addresses have at most 52 bits


class WorkloadPhase(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """From `at` ns after the migrate command on, the stream's rate is multiplied by `rate_factor`."""

    at: Annotated[int, duration("since the migrate command")]
    rate_factor: Annotated[float, Meta(ge=0, le=1e6)]


class Workload(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """One stream of page writes. Streams add up.

    pattern: uniform (every page of the working set alike), sequential (one sweep after another), hot-cold (`hot_writes`
    of the writes fall on the first `hot_pages` of the pages), zipf (page of rank k with weight k^-theta), idle.
    rate: bytes/s, 4096 for each page write a second; `rate_per_vcpu` times `vcpus` instead where that is given.
    """

    pattern: Pattern
    name: str = ""
    rate: Annotated[int, write_rate("page writes of the whole stream")] | None = None
    rate_per_vcpu: Annotated[int, write_rate("page writes of each vCPU")] | None = None
    vcpus: Annotated[int, Meta(ge=1, description="writing this stream; default: all of the guest")] | None = None
    working_set: Annotated[int | float, size_or_share("default: what is left of populated memory")] | None = None
    offset: Annotated[int, size("from the start of RAM; default: behind the streams before it")] | None = None
    hot_pages: Annotated[float, share("hot-cold: share of the working set that is hot")] = 0.1
    hot_writes: Annotated[float, share("hot-cold: share of the writes that fall on hot pages")] = 0.9
    theta: Annotated[float, Meta(gt=0, lt=10, description="zipf: exponent of the rank")] = 0.99
    start: Annotated[int, duration("first write, since the migrate command")] = 0
    stop: Annotated[int, duration("last write, since the migrate command")] | None = None
    phases: tuple[WorkloadPhase, ...] = ()
    write_bytes: Annotated[int, size("bytes one write changes (XBZRLE sees them)", ge=1, le=PAGE_SIZE)] = 64
    catch_up: Annotated[bool, Meta(description="writes held up by a throttle are made up for later")] = False
    catch_up_limit: Annotated[int, duration("held up longer at a stretch, time is lost; default: never")] | None = None
    running: Annotated[int, duration("how long it has been writing when migrate is issued")] = 0

    def __post_init__(self) -> None:
        if self.pattern == "idle":
            if self.rate or self.rate_per_vcpu:
                raise ScenarioError("rate", 'an "idle" stream writes nothing; remove the rate or choose a pattern')
        elif (self.rate is None) == (self.rate_per_vcpu is None):
            raise ScenarioError("rate", 'give exactly one of "rate" and "rate-per-vcpu"')
        if self.pattern == "hot-cold" and not 0 < self.hot_pages < 1:
            raise ScenarioError("hot-pages", "must lie between 0 and 1, both excluded", value=self.hot_pages)
        if self.catch_up_limit is not None and not self.catch_up:
            raise ScenarioError("catch-up-limit", 'needs "catch-up" = true', value=self.catch_up_limit)
        if self.stop is not None and self.stop <= self.start:
            raise ScenarioError("stop", f"must come after start ({in_words(self.start, 'duration')})", value=self.stop)
        times = [phase.at for phase in self.phases]
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise ScenarioError("phases", 'must be in order of "at", each later than the one before')

    @property
    def bytes_per_s(self) -> int:
        """Full rate of the stream, bytes/s (4096 a page write)."""
        if self.rate_per_vcpu is not None:
            return self.rate_per_vcpu * (self.vcpus or 1)
        return self.rate or 0

    @property
    def pages_per_s(self) -> Fraction:
        """Full rate of the stream in page writes a second, exact."""
        return Fraction(self.bytes_per_s, PAGE_SIZE)


class Extent(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A run of memory, from `offset` on."""

    offset: Annotated[int, size("from the start of the block")]
    size: Annotated[int, size("a multiple of the page", ge=PAGE_SIZE)]

    def __post_init__(self) -> None:
        for name in ("offset", "size"):
            if getattr(self, name) % PAGE_SIZE:
                raise ScenarioError(name, f"must be a multiple of {PAGE_SIZE} bytes", value=getattr(self, name))


class Rom(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A RAMBlock beside RAM that the guest only reads: firmware, ACPI tables. Pages outside `data` are zero."""

    name: Annotated[str, Meta(min_length=1, max_length=255, description="RAMBlock idstr, as the stream names it")]
    size: Annotated[int, size("a multiple of the page", ge=PAGE_SIZE, le=GIB)]
    data: tuple[Extent, ...] = ()

    def __post_init__(self) -> None:
        if self.size % PAGE_SIZE:
            raise ScenarioError("size", f"must be a multiple of {PAGE_SIZE} bytes", value=self.size)
        _check_extents("data", self.data, self.size)


class Device(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A VFIO device that migrates in stages. Without pre-copy support `initial` is 0 and all of it is stop-copy."""

    name: Annotated[str, Meta(min_length=1, max_length=255)] = "vfio"
    initial: Annotated[int, size("pre-copy state, sent and loaded while the guest runs", le=1 << 50)] = 0
    dirty_rate: Annotated[int, bandwidth("how fast pre-copy state changes again, at most all of it")] = 0
    stop_copy: Annotated[int, size("state that can be read only with the device stopped", le=1 << 50)] = 0
    load: Annotated[int, duration("of the destination's device, from its last byte to ready")] = 0

    def __post_init__(self) -> None:
        if self.dirty_rate and not self.initial:
            raise ScenarioError("dirty-rate", 'is of the pre-copy state; give "initial" too', value=self.dirty_rate)


class Guest(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """The machine. `populated`: share of memory ever touched, from the start of RAM. `zero`: share of the pages that
    are all zero, at the end of RAM; untouched pages read as zeros, so it is at least 1 - populated (its default)."""

    memory: Annotated[int, size("RAM of the guest", ge=PAGE_SIZE, le=_MEMORY_MAX)]
    vcpus: Annotated[int, Meta(ge=1, le=VCPUS_MAX, description="KVM_MAX_VCPUS")] = 1
    name: str = ""
    populated: Annotated[float, share("share of memory ever touched")] = 1.0
    zero: Annotated[float, share("share of all pages that are zero")] | None = None
    backing: Backing = "4K"
    numa_nodes: Annotated[int, Meta(ge=1, le=128)] = 1
    machine: Literal["q35", "pc"] = "q35"
    device_state: Annotated[int, size("state of the devices, sent while stopped", le=64 * GIB)] = 4 * MIB
    compressed: Annotated[float, share("of a data page that is left when compressed; 0.5 is assumed")] = 0.5
    data: Annotated[tuple[Extent, ...] | None, Meta(description="RAM that is not zero; default: all but `zero`")] = None
    rom: tuple[Rom, ...] = ()
    device: tuple[Device, ...] = ()
    workload: tuple[Workload, ...] = ()

    def __post_init__(self) -> None:
        if self.memory % PAGE_SIZE:
            raise ScenarioError("memory", f"must be a multiple of the page, {PAGE_SIZE} bytes", value=self.memory)
        if self.memory % BACKING_BYTES[self.backing]:
            raise ScenarioError("memory", f'must be a multiple of its backing "{self.backing}"', value=self.memory)
        if self.memory < self.numa_nodes * PAGE_SIZE:
            raise ScenarioError("numa-nodes", "a node needs at least one page", value=self.numa_nodes)
        untouched = 1 - self.populated_pages / self.pages
        if self.data is not None:
            _check_extents("data", self.data, self.memory)
            left = 1 - sum(e.size for e in self.data) / self.memory
            if self.zero not in (None, left):  # a result repeats both
                raise ScenarioError("zero", 'is what "data" leaves out; give one of the two', value=self.zero)
            force_setattr(self, "zero", left)
        elif self.zero is None:
            force_setattr(self, "zero", untouched)
        elif self.zero < untouched:
            problem = f"untouched pages read as zeros: with populated = {self.populated} it is at least {untouched:g}"
            raise ScenarioError("zero", problem, value=self.zero)
        if len(self.workload) > _STREAMS_MAX:
            raise ScenarioError("workload", f"at most {_STREAMS_MAX} streams", value=len(self.workload))
        force_setattr(self, "workload", tuple(_placed(self)))

    @property
    def pages(self) -> int:
        """4 KiB pages of RAM."""
        return self.memory // PAGE_SIZE

    @property
    def populated_pages(self) -> int:
        """Pages ever touched: the first ones of RAM."""
        return round(self.populated * self.pages)

    @property
    def zero_pages(self) -> int:
        """All-zero pages of RAM when the migration starts."""
        return round((self.zero or 0.0) * self.pages)

    @property
    def data_pages(self) -> list[tuple[int, int]]:
        """Ranges [first, end) of pages that hold data when the migration starts."""
        if self.data is None:
            return [(0, self.pages - self.zero_pages)]
        return [(e.offset // PAGE_SIZE, (e.offset + e.size) // PAGE_SIZE) for e in self.data]


def _check_extents(field: str, extents: tuple[Extent, ...], limit: int) -> None:
    """In order, apart, and inside a block of `limit` bytes."""
    end = 0
    for index, extent in enumerate(extents):
        if extent.offset < end or extent.offset + extent.size > limit:
            problem = f"must lie after the one before it and inside {in_words(limit, 'size')}"
            raise ScenarioError(f"{field}.{index}", problem, value=extent.offset)
        end = extent.offset + extent.size


def _placed(guest: Guest) -> Iterator[Workload]:
    """The streams with name, vCPUs, working set and offset filled in; those without an offset lie end to end."""
    room = guest.populated_pages * PAGE_SIZE
    sizes = [_working_set(guest, index, room) for index in range(len(guest.workload))]
    stacked = [s for s, w in zip(sizes, guest.workload, strict=True) if w.offset is None]
    left = room - sum(s for s in stacked if s is not None)
    if left < 0:
        asked = in_words(room - left, "size")
        problem = f"the streams together write {asked}, but only {in_words(room, 'size')} of the guest are populated"
        raise ScenarioError("workload", f'{problem}; shrink them, or give "offset" where they are to overlap')
    if stacked.count(None) > 1:
        raise ScenarioError("workload", 'at most one stream may leave out both "working-set" and "offset"')
    end = 0
    for index, (workload, known) in enumerate(zip(guest.workload, sizes, strict=True)):
        offset = end if workload.offset is None else workload.offset
        extent = known if known is not None else (left if workload.offset is None else room - offset)
        _check_range(guest, index, offset, extent, room)
        if workload.offset is None:
            end += extent
        vcpus = guest.vcpus if workload.vcpus is None else workload.vcpus
        name = workload.name or f"{workload.pattern}-{index}"
        yield replace(workload, name=name, vcpus=vcpus, working_set=extent, offset=offset)


def _working_set(guest: Guest, index: int, room: int) -> int | None:
    """Bytes of one stream's working set, a page multiple, or None where the scenario leaves it open."""
    workload = guest.workload[index]
    if workload.working_set is None:
        return 0 if workload.pattern == "idle" else None
    if isinstance(workload.working_set, float):
        pages = int(Fraction(str(workload.working_set)) * (room // PAGE_SIZE))
        return max(pages, 1) * PAGE_SIZE
    return workload.working_set


def _check_range(guest: Guest, index: int, offset: int, extent: int, room: int) -> None:
    workload = guest.workload[index]
    path = f"workload.{index}"
    if workload.vcpus is not None and workload.vcpus > guest.vcpus:
        raise ScenarioError(f"{path}.vcpus", f"the guest has {guest.vcpus}", value=workload.vcpus)
    if offset % PAGE_SIZE:
        raise ScenarioError(f"{path}.offset", f"must be a multiple of {PAGE_SIZE} bytes", value=workload.offset)
    if extent % PAGE_SIZE:
        raise ScenarioError(
            f"{path}.working-set", f"must be a multiple of {PAGE_SIZE} bytes", value=workload.working_set
        )
    if extent <= 0 and workload.pattern != "idle":
        raise ScenarioError(f"{path}.working-set", "no populated memory is left for this stream")
    if offset + extent > room:
        end, limit = in_words(offset + extent, "size"), in_words(room, "size")
        problem = f"reaches to {end}, but populated memory ends at {limit}"
        raise ScenarioError(f"{path}.working-set", problem, value=in_words(extent, "size"))


