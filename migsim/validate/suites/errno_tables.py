"""What KVM refuses, with which errno: rows of (setup, step, answer), each seen on a real Linux 6.18.

A row is a whole script on a fresh VM.  Sources: virt/kvm/kvm_main.c and dirty_ring.c, Linux 6.18; every row was run
on ``/dev/kvm``.  ``needs`` says where a row holds: "one-address-space" no SMM; "no-pml" no PML entries reserved in a
ring; "tdp" not on a KVM without two-dimensional paging, which allocates 8 bytes of rmap a page (16 GiB there).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from migsim.kvm import uapi
from migsim.validate.script import (
    OK,
    RAW,
    Answer,
    Cap,
    Clear,
    CreateVcpu,
    Extension,
    Get,
    Harvest,
    Region,
    Reset,
    Run,
    Step,
    pages,
    refused,
)

EINVAL, ENOENT, ENXIO, EFAULT = refused("EINVAL"), refused("ENOENT"), refused("ENXIO"), refused("EFAULT")
EEXIST, E2BIG = refused("EEXIST"), refused("E2BIG")
LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
READONLY = uapi.KVM_MEM_READONLY
GPA = 0x10_0000


@dataclass(frozen=True)
class Row:
    """After ``setup``, ``step`` answers ``answer``."""

    title: str
    setup: tuple[Step, ...]
    step: Step
    answer: Answer
    needs: str = ""


def slot(n_pages: int, flags: int = LOG, id: int = 1, gpa: int = GPA, hva: int = 0) -> Region:
    """A region of ``n_pages`` with the log on."""
    return Region(id, flags, gpa, pages(n_pages), hva)


def region_rows() -> Iterator[Row]:
    """KVM_SET_USER_MEMORY_REGION, in the order of the checks."""
    base = (slot(16),)
    yield Row("unknown flag 4", (), slot(16, flags=4), EINVAL)
    yield Row("unknown flag 8", (), slot(16, flags=8), EINVAL)
    yield Row("size not page aligned", (), Region(1, 0, GPA, 0x1800), EINVAL)
    yield Row("gpa not page aligned", (), Region(1, 0, GPA + 0x800, pages(1)), EINVAL)
    yield Row("hva not page aligned", (), Region(1, 0, GPA, pages(1), 0x800), EINVAL)
    yield Row("hva not a user address", (), Region(1, 0, GPA, pages(1), RAW + (1 << 56)), EINVAL)
    yield Row("id 32763 is the last", (), slot(1, id=32763), OK)
    yield Row("id 32764 is KVM's own", (), slot(1, id=32764), EINVAL)
    yield Row("id 32767 is KVM's own", (), slot(1, id=32767), EINVAL)
    yield Row("address space 1 without SMM", (), slot(1, id=1 << 16 | 1), EINVAL, "one-address-space")
    yield Row("address space 2", (), slot(1, id=2 << 16 | 1), EINVAL)
    yield Row("gpa + size wraps", (), Region(1, 0, (1 << 64) - 4096, pages(2)), EINVAL)
    yield Row("2^31 pages", (), Region(1, 0, 1 << 32, pages(1 << 31), RAW + (1 << 40)), EINVAL)
    yield Row("2^31 - 1 pages", (), Region(1, 0, 1 << 32, pages((1 << 31) - 1), RAW + (1 << 40)), OK, "tdp")
    yield Row("delete of nothing", (), Region(1, 0, GPA, 0), EINVAL)
    yield Row("delete", base, Region(1, 0, GPA, 0), OK)
    yield Row("delete twice", (*base, Region(1, 0, GPA, 0)), Region(1, 0, GPA, 0), EINVAL)
    yield Row("delete needs no matching address", base, Region(1, 0, 0, 0), OK)
    yield Row("unaligned gpa refuses a delete too", base, Region(1, 0, 0x800, 0), EINVAL)
    yield Row("other hva", base, slot(16, hva=4096), EINVAL)
    yield Row("other size", base, slot(17), EINVAL)
    yield Row("smaller size", base, slot(15), EINVAL)
    yield Row("READONLY toggled", base, slot(16, flags=LOG | READONLY), EINVAL)
    yield Row("same again", base, slot(16), OK)
    yield Row("overlap of the first page", base, slot(16, id=2, gpa=GPA - pages(15)), EEXIST)
    yield Row("overlap of the last page", base, slot(16, id=2, gpa=GPA + pages(15)), EEXIST)
    yield Row("touching below", base, slot(16, id=2, gpa=GPA - pages(16)), OK)
    yield Row("touching above", base, slot(16, id=2, gpa=GPA + pages(16)), OK)
    yield Row("hva shared by two slots", base, slot(16, id=2, gpa=GPA + pages(16), hva=0), OK)
    yield Row("move", base, slot(16, gpa=GPA * 2), OK)
    yield Row("move onto itself shifted", base, slot(16, gpa=GPA + pages(1)), OK)
    yield Row("move with the flag changed", base, slot(16, gpa=GPA * 2, flags=0), OK)
    other = (*base, slot(16, id=2, gpa=GPA * 2, hva=pages(16)))
    yield Row("move onto another", other, slot(16, gpa=GPA * 2), EEXIST)
    yield Row("move with another hva", base, slot(16, gpa=GPA * 2, hva=4096), EINVAL)
    yield Row("past MAXPHYADDR", (), Region(1, 0, 1 << 52, pages(1)), EINVAL)
    yield Row("READONLY with LOG", (), slot(16, flags=LOG | READONLY), OK)
    yield Row("bad flag beats bad size", (), Region(1, 4, GPA, 0x1801), EINVAL)


def get_rows() -> Iterator[Row]:
    """KVM_GET_DIRTY_LOG."""
    base = (slot(100),)
    yield Row("nothing dirty", base, Get(1, 100), Answer(None, (0, 0)))
    yield Row("no such slot", (), Get(1, 100), ENOENT)
    yield Row("slot not logged", (slot(100, flags=0),), Get(1, 100), ENOENT)
    yield Row("id out of range", base, Get(32764, 100), EINVAL)
    yield Row("address space out of range", base, Get(2 << 16 | 1, 100), EINVAL)
    yield Row("bad pointer", base, Get(1, None), EFAULT)
    yield Row("bad pointer of a slot without log", (slot(100, flags=0),), Get(1, None), ENOENT)
    yield Row("READONLY slot", (slot(100, flags=LOG | READONLY),), Get(1, 100), Answer(None, (0, 0)))
    gone = (*base, CreateVcpu(0), Run(0, (("w", GPA, 1),)), Get(1, None))
    yield Row("EFAULT loses the bits", gone, Get(1, 100), Answer(None, (0, 0)))
    dirty = (*base, CreateVcpu(0), Run(0, (("w", GPA + pages(99), 1),)))
    yield Row("last page", dirty, Get(1, 100), Answer(None, (0, 1 << 35)))
    yield Row("second GET is empty", (*dirty, Get(1, 100)), Get(1, 100), Answer(None, (0, 0)))
    moved = (*dirty, slot(100, gpa=GPA * 2))
    yield Row("MOVE keeps the bits", moved, Get(1, 100), Answer(None, (0, 1 << 35)))
    off_on = (*dirty, slot(100, flags=0), slot(100))
    yield Row("log off and on loses the bits", off_on, Get(1, 100), Answer(None, (0, 0)))
    again = (*dirty, Region(1, 0, 0, 0), slot(100))
    yield Row("delete and create loses the bits", again, Get(1, 100), Answer(None, (0, 0)))
    manual = (Cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(1,)), *dirty, Get(1, 100))
    yield Row("manual: second GET is the same", manual, Get(1, 100), Answer(None, (0, 1 << 35)))
    manual_fault = (Cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(1,)), *dirty, Get(1, None))
    yield Row("manual: EFAULT loses nothing", manual_fault, Get(1, 100), Answer(None, (0, 1 << 35)))
    initially = (Cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(3,)), slot(100, flags=0), slot(100))
    ones = Answer(None, ((1 << 64) - 1, (1 << 36) - 1))
    yield Row("initially set: exactly npages ones", initially, Get(1, 100), ones)


_CLEAR_CASES: tuple[tuple[int, int, int, bool], ...] = (
    # npages, first, num, allowed
    *((100, first, num, True) for first, num in ((0, 64), (0, 100), (64, 36), (64, 0), (0, 0))),
    *((100, first, num, False) for first, num in ((0, 65), (0, 99), (0, 128), (64, 64), (128, 0), (1, 64), (64, 35))),
    *((128, first, num, True) for first, num in ((0, 128), (64, 64), (128, 0), (0, 64))),
    *((128, first, num, False) for first, num in ((0, 127), (128, 64), (192, 0), (63, 65))),
    *((200, first, num, True) for first, num in ((192, 8), (64, 136), (64, 128), (0, 200))),
    *((200, first, num, False) for first, num in ((192, 64), (0, 0xFFFF_FFC0), (1 << 63, 64), (64, 135))),
    *((1, first, num, True) for first, num in ((0, 1), (0, 0))),
    *((1, first, num, False) for first, num in ((0, 64), (64, 0), (0, 2))),
    *((63, first, num, num in (0, 63)) for first, num in ((0, 63), (0, 64), (0, 0), (0, 62))),
    *((64, first, num, num in (0, 64)) for first, num in ((0, 63), (0, 64), (0, 65), (64, 0))),
    *((65, first, num, ok) for first, num, ok in ((0, 65, True), (64, 1, True), (0, 64, True), (64, 64, False))),
)


def clear_rows() -> Iterator[Row]:
    """KVM_CLEAR_DIRTY_LOG: bounds first (the size at the end is exact, not rounded up), then the pointer."""
    for n_pages, first, num, allowed in _CLEAR_CASES:
        words = (0,) * ((min(num, n_pages) + 63) // 64)
        yield Row(
            f"{n_pages} pages, clear ({first}, {num})",
            (slot(n_pages),),
            Clear(1, first, num, words or (0,)),
            OK if allowed else EINVAL,
        )
    base = (slot(100),)
    yield Row("no such slot", (), Clear(1, 0, 64, (0,)), ENOENT)
    yield Row("first_page & 63 beats no such slot", (), Clear(1, 1, 64, (0,)), EINVAL)
    yield Row("slot not logged", (slot(100, flags=0),), Clear(1, 0, 64, (0,)), ENOENT)
    yield Row("id out of range", base, Clear(32764, 0, 64, (0,)), EINVAL)
    yield Row("bad pointer", base, Clear(1, 0, 64, None), EFAULT)
    yield Row("bad pointer of nothing", base, Clear(1, 0, 0, None), OK)
    yield Row("bad bounds beat the bad pointer", base, Clear(1, 0, 65, None), EINVAL)
    dirty = (*base, CreateVcpu(0), Run(0, (("w", GPA, 1), ("w", GPA + pages(70), 1))))
    cleared = (*dirty, Clear(1, 0, 64, (1,)))
    yield Row("works without the manual capability", cleared, Get(1, 100), Answer(None, (0, 1 << 6)))
    tail = (*dirty, Clear(1, 64, 36, ((1 << 64) - 1,)))
    yield Row("bits past the slot are ignored", tail, Get(1, 100), Answer(None, (1, 0)))
    unset = (*dirty, Clear(1, 0, 100, (2, 0)))
    yield Row("a mask bit that is not set has no effect", unset, Get(1, 100), Answer(None, (1, 1 << 6)))


def cap_rows() -> Iterator[Row]:
    """KVM_ENABLE_CAP and KVM_CHECK_EXTENSION."""
    manual = uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    yield Row("manual protect is offered as 3", (), Extension(manual), Answer(None, 3))
    yield Row("the withdrawn capability 166", (), Extension(166), Answer(None, 0))
    yield Row("the withdrawn capability 166 is refused", (), Cap(166, args=(1,)), EINVAL)
    yield Row("user slots", (), Extension(uapi.KVM_CAP_NR_MEMSLOTS), Answer(None, 32764))
    for value in range(6):
        yield Row(f"manual protect {value}", (), Cap(manual, args=(value,)), OK_ZERO if value in (0, 1, 3) else EINVAL)
    yield Row("manual protect with a flag", (), Cap(manual, 1, (1,)), EINVAL)
    yield Row("manual protect twice", (Cap(manual, args=(3,)),), Cap(manual, args=(0,)), OK_ZERO)
    yield Row("with vCPU and slot", (slot(16), CreateVcpu(0)), Cap(manual, args=(1,)), OK_ZERO)


OK_ZERO = Answer(None, 0)


def ring_rows() -> Iterator[Row]:
    """The dirty ring's capability, GET/CLEAR refusal, soft limit, harvest and reset (no PML: limit = entries - 64)."""
    ring = uapi.KVM_CAP_DIRTY_LOG_RING
    on = (Cap(ring, args=(4096,)),)
    yield Row("offered as 1 MiB", (), Extension(ring), Answer(None, 1 << 20))
    yield Row("acquire/release form", (), Extension(uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL), Answer(None, 1 << 20))
    yield Row("with bitmap is not for x86", (), Extension(uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP), Answer(None, 0))
    yield Row("with bitmap is refused", on, Cap(uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP), EINVAL)
    for size in (0, 16, 2048, 4097, 6144):
        yield Row(f"{size} bytes", (), Cap(ring, args=(size,)), EINVAL)
    for size in (4096, 65536, 1 << 20):
        yield Row(f"{size} bytes", (), Cap(ring, args=(size,)), OK_ZERO, "no-pml" if size == 4096 else "")
    yield Row("2 MiB", (), Cap(ring, args=(2 << 20,)), E2BIG)
    yield Row("capability flags are ignored", (), Cap(ring, 1, (65536,)), OK_ZERO)
    yield Row("twice", on, Cap(ring, args=(4096,)), EINVAL, "no-pml")
    yield Row("after the other form", on, Cap(uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, args=(4096,)), EINVAL, "no-pml")
    yield Row("after a vCPU", (CreateVcpu(0),), Cap(ring, args=(4096,)), EINVAL)
    yield Row("after a slot", (slot(16),), Cap(ring, args=(65536,)), OK_ZERO)
    yield Row("GET", (*on, slot(16)), Get(1, 16), ENXIO, "no-pml")
    yield Row("GET of nothing", on, Get(1, 16), ENXIO, "no-pml")
    yield Row("CLEAR", (*on, slot(16)), Clear(1, 0, 16, (0,)), ENXIO, "no-pml")
    yield Row("CLEAR, all else wrong too", on, Clear(32764, 1, 65, None), ENXIO, "no-pml")
    yield Row("reset without ring", (), Reset(), EINVAL)
    yield Row("reset with ring, no vCPU", on, Reset(), OK_ZERO, "no-pml")
    yield from _ring_runs(on)


def _ring_runs(on: tuple[Step, ...]) -> Iterator[Row]:
    stores = tuple(("w", GPA + pages(i), i) for i in range(200))
    ready = (*on, slot(256), CreateVcpu(0))
    full = (*ready, Run(0, stores))
    no_pml = "no-pml"
    yield Row("soft limit", ready, Run(0, stores), Answer(None, (uapi.KVM_EXIT_DIRTY_RING_FULL, 192, ())), no_pml)
    yield Row("still full", full, Run(0, ()), Answer(None, (uapi.KVM_EXIT_DIRTY_RING_FULL, 0, ())), no_pml)
    harvest = tuple((1, i) for i in range(192))
    yield Row("harvest in order", full, Harvest(0), Answer(None, harvest), no_pml)
    yield Row("harvest alone frees nothing", (*full, Harvest(0)), Run(0, ()), _exit_full(0), no_pml)
    yield Row("reset counts", (*full, Harvest(0)), Reset(), Answer(None, 192), no_pml)
    yield Row("reset before harvest", full, Reset(), OK_ZERO, no_pml)
    again = (*full, Harvest(0), Reset())
    yield Row("runs after reset", again, Run(0, stores[:8]), Answer(None, (uapi.KVM_EXIT_HLT, 8, ())), no_pml)
    yield Row("reset twice", again, Reset(), OK_ZERO, no_pml)


def _exit_full(done: int) -> Answer:
    return Answer(None, (uapi.KVM_EXIT_DIRTY_RING_FULL, done, ()))


TABLES = {
    "set-user-memory-region": region_rows,
    "get-dirty-log": get_rows,
    "clear-dirty-log": clear_rows,
    "enable-cap": cap_rows,
    "dirty-ring": ring_rows,
}
