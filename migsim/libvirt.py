"""A libvirt domain's shape as the `[guest]` of a scenario. Read only; the XML is not trusted.

`virsh dumpxml` prints what libvirt has normalised (sizes in KiB), but a hand-written file may use every unit of
libvirt's format, so all are read. Document types and entities are refused outright: neither libvirt nor virsh prints
any, and expanding them is how XML bombs work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from msgspec import Struct

from migsim.scenario import BACKING_BYTES, VCPUS_MAX, ScenarioError
from migsim.units import GIB, KIB, MIB, PAGE_SIZE, TIB

__all__ = ["XML_BYTES_MAX", "Shape", "read_domain", "shape_of_xml"]

XML_BYTES_MAX: Final = 4 << 20
_DEPTH_MAX: Final = 64
_ELEMENTS_MAX: Final = 100_000

_UNITS: Final[dict[str, int]] = {
    "b": 1, "bytes": 1, "KB": 10**3, "k": KIB, "KiB": KIB, "MB": 10**6, "M": MIB, "MiB": MIB,
    "GB": 10**9, "G": GIB, "GiB": GIB, "TB": 10**12, "T": TIB, "TiB": TIB,
}  # fmt: skip
_MEMORY_MAX: Final = 1 << 52


class Shape(Struct, frozen=True, kw_only=True):
    """What libvirt knows of a machine that a migration depends on. `notes`: what the reader should know besides."""

    name: str
    memory: int  # bytes
    populated: float
    vcpus: int
    numa_nodes: int
    machine: str  # q35 | pc
    backing: str  # 4K | 2M | 1G
    dirty_ring_size: int
    vendor: str | None
    notes: tuple[str, ...] = ()


def shape_of_xml(text: str, *, file: str = "") -> Shape:
    """The shape that domain XML describes. Raises ScenarioError where it is not a domain migsim can model."""
    try:
        return _shape(_parsed(text))
    except ScenarioError as error:
        raise error.within("", error.file or file) from None


def read_domain(uri: str, name: str) -> str:
    """The XML of domain `name` (or UUID, or id) at `uri`, over a read-only connection. Raises ScenarioError."""
    try:
        import libvirt
    except ImportError:
        enable = "pip install 'migsim[libvirt]' (it needs libvirt-dev, pkg-config and gcc)"
        problem = f"libvirt-python is missing: {enable}, or pipe `virsh dumpxml DOMAIN` into migsim shape --xml -"
        raise ScenarioError("", problem, file=uri) from None
    file = Path(uri.removeprefix("test://"))
    if uri.startswith("test:///") and uri != "test:///default" and not file.is_file():
        raise ScenarioError("", "cannot be opened: no such file", file=uri)  # libxml2 would print to stderr by itself
    libvirt.registerErrorHandler(lambda context, error: None, None)  # else every failure also prints to stderr
    try:
        connection = libvirt.openReadOnly(uri)
    except libvirt.libvirtError as error:
        raise ScenarioError("", f"cannot be opened: {_said(error)}", file=uri) from None
    try:
        return str(_domain(libvirt, connection, name).XMLDesc(0))
    except libvirt.libvirtError as error:
        raise ScenarioError("", f"domain {ascii(name)}: {_said(error)}", file=uri) from None
    finally:
        connection.close()


def _domain(libvirt: Any, connection: Any, name: str) -> Any:
    """By name; where there is none of that name, by UUID or by id."""
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError:
        if name.isdecimal() and len(name) < 10:
            return connection.lookupByID(int(name))
        if len(name) == 36:
            return connection.lookupByUUIDString(name)
        raise


def _said(error: Exception) -> str:
    return ascii(" ".join(str(error).split())[:200])[1:-1]


# --- XML to elements


def _parsed(text: str) -> Element:
    """The root element. Refuses document types, entities, and more depth or elements than a domain can have."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    depth = count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > _DEPTH_MAX or count > _ELEMENTS_MAX:
            raise ScenarioError("", f"is no domain XML: over {_DEPTH_MAX} levels deep or {_ELEMENTS_MAX} elements")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise ScenarioError("", "has a DOCTYPE or entities, which domain XML never has; refused unread")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise ScenarioError("", f"is not well-formed XML: {error}") from None
    root: Element = builder.close()
    return root


# --- elements to a shape


def _shape(domain: Element) -> Shape:
    if domain.tag != "domain":
        raise ScenarioError("", f"its root is <{ascii(domain.tag[:40])[1:-1]}>, not <domain>")
    memory = _size(domain, "memory")
    if memory is None:
        raise ScenarioError("domain/memory", "is missing")
    if not PAGE_SIZE <= memory <= _MEMORY_MAX:
        raise ScenarioError("domain/memory", f"must be from {PAGE_SIZE} to {_MEMORY_MAX} bytes", value=memory)
    current = _size(domain, "currentMemory")
    memory -= memory % PAGE_SIZE
    notes = list(_warnings(domain))
    machine = _machine(domain, notes)
    vcpus = _vcpus(domain, notes)
    populated = 1.0
    if current is not None and 0 < current < memory:
        populated = current / memory
        notes.append("the balloon holds the rest of the memory, so it counts as never touched")
    return Shape(
        name=(domain.findtext("name") or "").strip()[:256],
        memory=memory,
        populated=populated,
        vcpus=vcpus,
        numa_nodes=max(1, len(domain.findall("cpu/numa/cell"))),
        machine=machine,
        backing=_backing(domain, memory, notes),
        dirty_ring_size=_dirty_ring(domain),
        vendor={"Intel": "intel", "AMD": "amd"}.get((domain.findtext("cpu/vendor") or "").strip()),
        notes=tuple(notes),
    )


def _size(domain: Element, tag: str) -> int | None:
    """Bytes of a sized element (unit KiB where none is given), or None where it is absent."""
    element = domain.find(tag)
    if element is None:
        return None
    return _integer(element.text, f"domain/{tag}") * _unit(element.get("unit", "KiB"), f"domain/{tag}/@unit")


def _unit(text: str, field: str) -> int:
    if text not in _UNITS:
        raise ScenarioError(field, f"must be one of {', '.join(_UNITS)}", value=text)
    return _UNITS[text]


def _integer(text: str | None, field: str) -> int:
    digits = (text or "").strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 20):
        raise ScenarioError(field, "expected a whole number", value=digits)
    return int(digits)


def _vcpus(domain: Element, notes: list[str]) -> int:
    element = domain.find("vcpu")
    if element is None:
        return 1
    most = _integer(element.text, "domain/vcpu")
    online = _integer(element.get("current"), "domain/vcpu/@current") if "current" in element.attrib else most
    if online != most:
        notes.append(f"{online} of {most} vCPUs are online")
    if not 1 <= online <= VCPUS_MAX:
        raise ScenarioError("domain/vcpu", f"must be from 1 to {VCPUS_MAX}", value=online)
    return online


def _machine(domain: Element, notes: list[str]) -> str:
    kind = domain.find("os/type")
    arch = "x86_64" if kind is None else kind.get("arch", "x86_64")
    if arch not in ("x86_64", "i686"):
        raise ScenarioError("domain/os/type/@arch", "migsim models x86 only", value=arch)
    machine = "" if kind is None else kind.get("machine", "")
    if "q35" in machine:
        return "q35"
    if machine.startswith("pc"):
        return "pc"
    said = f"machine type {ascii(machine[:40])}" if machine else "the machine type libvirt does not tell"
    notes.append(f"{said} is taken as q35")
    return "q35"


def _backing(domain: Element, memory: int, notes: list[str]) -> str:
    hugepages = domain.find("memoryBacking/hugepages")
    if hugepages is None:
        notes.append('backing "4K" is assumed; transparent huge pages would make it "2M"')
        return "4K"
    pages = hugepages.findall("page")
    sizes = {
        _integer(page.get("size"), "hugepages/page/@size") * _unit(page.get("unit", "KiB"), "hugepages/page/@unit")
        for page in pages
    }
    if not pages:
        notes.append("huge pages of the host's default size are taken as 2M")
        sizes = {2 * MIB}
    if len(sizes) > 1:
        notes.append("huge pages of several sizes; the smallest stands for all")
    wanted = min(sizes)
    if wanted not in BACKING_BYTES.values():
        raise ScenarioError("hugepages/page/@size", "x86 has pages of 4 KiB, 2 MiB and 1 GiB", value=wanted)
    fitting = [(name, size) for name, size in BACKING_BYTES.items() if size <= wanted and memory % size == 0]
    name, size = fitting[-1]
    if size != wanted:
        notes.append(f'memory is not a multiple of its huge pages, so backing is "{name}"')
    return name


def _dirty_ring(domain: Element) -> int:
    ring = domain.find("features/kvm/dirty-ring")
    if ring is None or ring.get("state") != "on":
        return 0
    return _integer(ring.get("size"), "features/kvm/dirty-ring/@size")


def _warnings(domain: Element) -> Iterator[str]:
    """What keeps such a domain from migrating, or changes how it does."""
    kind = domain.get("type", "")
    if kind not in ("kvm", "test"):
        yield f"domain type {ascii(kind[:20])} is modelled as kvm"
    if domain.find("devices/hostdev") is not None:
        yield "a host device is passed through: it may block migration, and its dirty pages are not modelled"
    if domain.find("launchSecurity") is not None:
        yield "launchSecurity is set: such guests normally cannot migrate"
    if domain.find("devices/memory") is not None:
        yield "memory devices (DIMM, virtio-mem) are counted as ordinary RAM"


assert list(BACKING_BYTES.values()) == sorted(BACKING_BYTES.values())
