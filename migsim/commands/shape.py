"""`migsim shape`: a real VM's shape as scenario TOML that `migsim run` takes.

libvirt knows the machine, not what it writes nor over which network it will move: those sections are there, runnable,
and marked ASSUMED.
"""

from __future__ import annotations

import argparse
import json
import sys

from migsim.libvirt import XML_BYTES_MAX, Shape, read_domain, shape_of_xml
from migsim.scenario import ScenarioError
from migsim.scenario.load import parse, read_text
from migsim.units import GIB, KIB, MIB, TIB

__all__ = ["add_arguments", "run_shape", "toml_of"]

# libvirt always asks for pause-before-switchover, and for return-path unless the migration is tunnelled; its default
# bandwidth is unlimited (libvirt 9.0, qemu_migration.c and qemu_migration_params.c).
_ASSUMED = """\
# ASSUMED: libvirt does not know what the guest writes. Put its measured dirty rate here.
[[guest.workload]]
pattern = "uniform"
rate-per-vcpu = "1000 pages/s"
working-set = "10 %"

[migration]
# As libvirt migrates: no bandwidth cap, QEMU's downtime limit; time-limit is ASSUMED.
capabilities = ["return-path", "pause-before-switchover"]
max-bandwidth = 0
downtime-limit = "300 ms"
time-limit = "2 h"

# ASSUMED: the migration network.
[link]
bandwidth = "10 Gbit/s"
latency = "50 us"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `migsim shape`."""
    parser.add_argument("uri", nargs="?", metavar="URI", help="of libvirt, e.g. qemu:///system or test:///default")
    parser.add_argument("domain", nargs="?", metavar="DOMAIN", help="name, UUID or id")
    parser.add_argument("--xml", metavar="FILE", help="what `virsh dumpxml` printed; - is standard input")


def run_shape(arguments: argparse.Namespace) -> int:
    """Prints the scenario. Raises ScenarioError."""
    if arguments.xml is not None and arguments.uri is None:
        text = read_text(arguments.xml, XML_BYTES_MAX, "domain XML")
        source = arguments.xml
    elif arguments.xml is None and arguments.domain is not None:
        text = read_domain(arguments.uri, arguments.domain)
        source = arguments.uri
    else:
        raise ScenarioError("", "give either URI DOMAIN or --xml FILE")
    toml = toml_of(shape_of_xml(text, file=source), source)
    parse(toml, file=source)  # what is printed must run
    sys.stdout.flush()
    sys.stdout.buffer.write(toml.encode())  # TOML is UTF-8 whatever the locale
    return 0


def toml_of(shape: Shape, source: str) -> str:
    """The scenario as TOML text."""
    guest = {
        "name": shape.name,
        "memory": _size(shape.memory),
        "vcpus": shape.vcpus,
        "populated": shape.populated,
        "numa-nodes": shape.numa_nodes,
        "machine": shape.machine,
        "backing": shape.backing,
    }
    kvm: dict[str, object] = {}
    if shape.vendor is not None:
        kvm["vendor"] = shape.vendor
    notes = list(shape.notes)
    if shape.dirty_ring_size and _ring_can_be_followed(shape.memory):
        kvm["dirty-ring-size"] = shape.dirty_ring_size
    elif shape.dirty_ring_size:
        ring = f"dirty rings of {shape.dirty_ring_size} entries"
        notes.append(f"the domain has {ring}; a guest of this size is modelled with KVM's bitmap instead")
    sections = [
        f"# The shape of a libvirt domain, read by migsim from {ascii(source)[1:-1]}.\n",
        *(f"# note: {note}\n" for note in notes),
        "\n",
        _section("guest", guest),
        *([_section("kvm", kvm)] if kvm else []),
        _ASSUMED,
    ]
    return "".join(sections)


def _ring_can_be_followed(memory: int) -> bool:
    """Rings are followed page by page, which `migsim run` refuses for large guests."""
    from migsim.simulation import PAGED_MAX

    return memory <= PAGED_MAX


def _section(name: str, values: dict[str, object]) -> str:
    # JSON's strings are TOML's, but for DEL, which TOML wants escaped.
    lines = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return f"[{name}]\n{lines}\n".replace("\x7f", "\\u007f")


def _size(size: int) -> str:
    units = (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB))
    unit, factor = next((u, f) for u, f in units if size % f == 0)
    return f"{size // factor} {unit}"
