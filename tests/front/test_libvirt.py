"""A real VM's shape as a scenario: from XML, and from libvirt's own test driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim.cli import main
from migsim.commands.shape import toml_of
from migsim.libvirt import shape_of_xml
from migsim.scenario import parse
from migsim.simulation import fused_serves

MACHINES = Path(__file__).parent / "machines"
ULTRAMEM = MACHINES / "m2-ultramem-416.xml"


def domain(inner: str = "", memory: str = "<memory unit='GiB'>4</memory>") -> str:
    return f"<domain type='kvm'><name>a</name>{memory}<vcpu>4</vcpu>{inner}</domain>"


def guest_of(xml: str):
    return parse(toml_of(shape_of_xml(xml), "x")).guest


def test_a_12_tib_machine_keeps_its_shape():
    scenario = parse(toml_of(shape_of_xml(ULTRAMEM.read_text()), "x"))
    guest = scenario.guest
    assert (guest.memory, guest.vcpus, guest.numa_nodes) == (12 << 40, 416, 8)
    assert (guest.backing, guest.machine, guest.name) == ("1G", "q35", "m2-ultramem-416")
    assert scenario.kvm.vendor == "intel"
    assert scenario.migration.max_bandwidth == 0, "libvirt's default is unlimited"


RING = "<features><kvm><dirty-ring state='on' size='4096'/></kvm></features>"


def test_a_small_guest_keeps_its_dirty_ring_and_a_large_one_runs_with_the_bitmap():
    assert parse(toml_of(shape_of_xml(domain(RING)), "x")).kvm.dirty_ring_size == 4096
    large = toml_of(shape_of_xml(ULTRAMEM.read_text()), "x")
    assert parse(large).kvm.dirty_ring_size == 0 and "# note: the domain has dirty rings of 4096 entries" in large
    assert fused_serves(parse(large)), "and so `run` takes it"


def test_the_workload_is_marked_as_assumed(capsys):
    assert main(["shape", "--xml", str(ULTRAMEM)]) == 0
    text = capsys.readouterr().out
    assert text.index("# ASSUMED: libvirt does not know what the guest writes") < text.index("[[guest.workload]]")


SIZES = [("KiB", "8", 8 << 10), ("k", "8", 8 << 10), ("KB", "4096", 4096_000), ("b", "8192", 8192), ("T", "2", 2 << 40)]


@pytest.mark.parametrize(("unit", "text", "size"), SIZES)
def test_every_unit_of_libvirt_is_read(unit, text, size):
    assert guest_of(domain(memory=f"<memory unit='{unit}'>{text}</memory>")).memory == size


def test_without_a_unit_memory_is_kib():
    assert guest_of(domain(memory="<memory>4194304</memory>")).memory == 4 << 30


def test_a_balloon_is_memory_never_touched():
    guest = guest_of(domain("<currentMemory unit='GiB'>1</currentMemory>"))
    assert guest.populated == 0.25 and guest.zero == 0.75


@pytest.mark.parametrize(
    ("pages", "backing"),
    [
        ("", "2M"),
        ("<page size='2048'/>", "2M"),
        ("<page size='1' unit='G'/>", "1G"),
        ("<page size='1' unit='G'/><page size='2' unit='M' nodeset='1'/>", "2M"),
        ("<page size='4'/>", "4K"),
    ],
)
def test_huge_pages_are_the_backing(pages, backing):
    assert guest_of(domain(f"<memoryBacking><hugepages>{pages}</hugepages></memoryBacking>")).backing == backing


@pytest.mark.parametrize(
    ("machine", "kind"), [("pc-q35-8.2", "q35"), ("pc-i440fx-jammy", "pc"), ("pc", "pc"), ("microvm", "q35")]
)
def test_machine_types(machine, kind):
    xml = domain(f"<os><type arch='x86_64' machine='{machine}'>hvm</type></os>")
    assert guest_of(xml).machine == kind
    assert ("microvm" in " ".join(shape_of_xml(xml).notes)) == (machine == "microvm")


def test_what_may_keep_a_guest_from_migrating_is_noted():
    inner = "<devices><hostdev mode='subsystem'/><memory model='dimm'/></devices><launchSecurity type='sev'/>"
    notes = " ".join(shape_of_xml(domain(inner)).notes)
    assert "passed through" in notes and "launchSecurity" in notes and "memory devices" in notes


names = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\t\x7f"), max_size=40)


@given(names)
def test_any_name_survives_the_way_through_toml(name):
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    xml = domain().replace("<name>a</name>", f"<name>{escaped}</name>")
    try:
        shape = shape_of_xml(xml)
    except ValueError:
        return  # characters XML itself refuses
    assert parse(toml_of(shape, "x\ny")).guest.name == shape.name == name.strip()


# --- libvirt's test driver: no daemon, no root

ENABLE = "tools/system-deps (as root), then .venv/bin/pip install -e '.[libvirt]'"


@pytest.fixture
def libvirt():
    return pytest.importorskip("libvirt", reason=f"libvirt-python is missing; to enable: {ENABLE}")


def test_the_default_test_domain_becomes_a_scenario(libvirt, capsys):
    assert main(["shape", "test:///default", "test"]) == 0
    guest = parse(capsys.readouterr().out).guest
    assert (guest.name, guest.vcpus) == ("test", 2) and guest.populated <= 1


@pytest.mark.parametrize("key", ["m2-ultramem-416", "1", "8c2f1f7e-5d0c-4a0e-9a5e-3b1d7c2e4160"])
def test_a_12_tib_machine_of_the_test_driver_by_name_id_and_uuid(libvirt, capsys, key):
    assert main(["shape", f"test://{(MACHINES / 'm2-ultramem-416.node.xml').resolve()}", key]) == 0
    printed = parse(capsys.readouterr().out)
    from_file = parse(toml_of(shape_of_xml(ULTRAMEM.read_text()), "x"))
    assert printed == from_file and printed.guest.memory == 12 << 40


@pytest.mark.parametrize(
    ("uri", "domain", "why"),
    [
        ("test:///default", "absent", "Domain not found"),
        ("test:///nowhere/at/all.xml", "x", "cannot be opened"),
        ("no-such-driver:///x", "x", "cannot be opened"),
    ],
)
def test_what_libvirt_refuses_is_one_sentence(libvirt, capfd, uri, domain, why):
    assert main(["shape", uri, domain]) == 2
    out, err = capfd.readouterr()
    assert out == "" and why in err and err.count("\n") == 1


def test_without_libvirt_python_the_sentence_says_what_enables_it(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "libvirt", None)
    assert main(["shape", "test:///default", "test"]) == 2
    assert "pip install 'migsim[libvirt]'" in capsys.readouterr().err
