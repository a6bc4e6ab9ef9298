"""``races``: what happens in the middle of a page fault or a slot change.  Only an emulator can be stopped there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from migsim.kvm import uapi
from migsim.units import PAGE_SIZE
from migsim.validate.backends import CONFIG, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.inside import Inside, Race
from migsim.validate.rig import GPA, SLOT, Rig
from migsim.validate.script import Region, Run
from migsim.validate.verdicts import CheckFailed

SUITE = "races"
OTHER_GPA = GPA + (64 << 20)


def cases(backend: Backend) -> Iterator[Case]:
    needs = (MMU, CONFIG)
    yield Case(SUITE, "root invalidated during a fault", root_invalidated, needs)
    yield Case(SUITE, "page taken away during a fault", page_taken_away, needs)
    for as_id in (0, 1):
        yield Case(SUITE, f"MMIO generation wraps,space {as_id}", partial(generation_wraps, as_id=as_id), needs)
    yield Case(SUITE, "MMIO while slots change", mmio_in_flux, needs)
    for mmu in ("tdp", "tdp-5.10", "shadow"):
        yield Case(SUITE, f"stores between the steps of GET,{mmu}", partial(stores_between, mmu=mmu), needs)
        yield Case(SUITE, f"huge page split under others,{mmu}", partial(split_under_others, mmu=mmu), needs)
        yield Case(SUITE, f"a tracked page stays protected,{mmu}", partial(tracked_stays, mmu=mmu), needs)


def once_while_resolving(rig: Rig, act: Callable[[], None]) -> None:
    """``act`` happens when the next fault looks up its host page: before mmu_lock is taken."""
    host: Any = rig.vm.host
    resolve = host.get_user_page

    def get_user_page(hva: int) -> Any:
        host.get_user_page = resolve
        page = resolve(hva)
        act()
        return page

    host.get_user_page = get_user_page


def root_invalidated(context: Context) -> None:
    """A slot is deleted, so every root dies, while a fault is resolving its page: it must not use the dead root."""
    for mmu in ("tdp", "tdp-5.10", "shadow"):
        with context.rig({"mmu": mmu}) as rig:
            rig.slot(64)
            rig.slot(8, slot=2, gpa=OTHER_GPA, hva=1 << 20)
            rig.vcpus(1)
            rig.store([1], 1)
            once_while_resolving(rig, lambda rig=rig: rig.must(Region(2, 0, 0, 0, 0)))  # type: ignore[misc]
            rig.store([2], 2)
            rig.check_inside()
            if rig.content(2) != 2:
                raise CheckFailed("the store of the fault that lost its root is not in memory")
            context.verified(64)


def page_taken_away(context: Context) -> None:
    """The host replaces the page between its lookup and mmu_lock: the fault must look again."""
    for mmu in ("tdp", "tdp-5.10", "shadow"):
        with context.rig({"mmu": mmu}) as rig:
            rig.slot(64)
            rig.vcpus(1)
            once_while_resolving(rig, lambda rig=rig: rig.must(Inside("replace", (5 * PAGE_SIZE, 1))))  # type: ignore[misc]
            rig.store([5], 77)
            rig.check_inside()
            if rig.content(5) != 77:
                raise CheckFailed("the guest's store went into a page that the host had taken back")
            context.verified(64)


def generation_wraps(context: Context, as_id: int) -> None:
    """When the generation an MMIO SPTE remembers comes round, every MMIO SPTE must go, in either address space."""
    with context.rig() as rig:
        rig.slot(8)
        rig.slot(8, slot=1 << 16 | SLOT, hva=1 << 20)
        rig.vcpus(1)
        rig.must(Inside("smm", (0, as_id)))
        _is_mmio(rig, OTHER_GPA)
        memslots: Any = rig.vm.memslots(as_id)
        spaces = rig.vm.config.nr_as_ids
        stamped = memslots.generation
        for dummy in range(2):  # the update that makes the remembered bits zero
            memslots.generation = (1 << 19) - spaces + as_id
            slot = as_id << 16 | 5 + dummy
            rig.slot(1, slot=slot, gpa=OTHER_GPA + (8 << 20) + dummy * PAGE_SIZE, hva=2 << 20)
        memslots.generation = stamped - spaces  # a whole turn later, one update before the same bits come again
        rig.slot(1, slot=as_id << 16 | 9, gpa=OTHER_GPA, hva=3 << 20)
        memslots.generation = stamped
        reason, done, _ = rig.run([("w", OTHER_GPA, 1)])
        if (reason, done) != (uapi.KVM_EXIT_HLT, 1):
            raise CheckFailed(f"address space {as_id}: an MMIO SPTE from before the wrap hides the new slot")
        rig.must(Inside("smm", (0, 0)))
        context.verified(8)


def _is_mmio(rig: Rig, gpa: int) -> None:
    reason, done, _ = rig.run([("w", gpa, 1)])
    if (reason, done) != (uapi.KVM_EXIT_MMIO, 0):
        raise CheckFailed(f"a store outside every slot exits with {reason}, done {done}")


def mmio_in_flux(context: Context) -> None:
    """An access while the slots are being changed may be taken for MMIO; it must not be remembered as that."""
    for skip in range(3):
        with context.rig() as rig:
            rig.slot(8)
            rig.vcpus(2)
            rig.must(Race("memslot: in progress", skip, 0, (("w", OTHER_GPA, 1),)))
            rig.slot(8, slot=2, gpa=OTHER_GPA, hva=1 << 20)
            rig.check_inside()
            reason, done, _ = rig.run([("w", OTHER_GPA, 2)])
            if (reason, done) != (uapi.KVM_EXIT_HLT, 1):
                raise CheckFailed(f"the new slot is hidden by what was remembered while it came (exit {reason})")
            context.verified(8)


def split_under_others(context: Context, mmu: str) -> None:
    """A store splits a huge page that logging has made read-only, while another vCPU holds its translation."""
    for pml in (False, True):
        with context.rig({"mmu": mmu, "pml": pml, "eager_page_split": False}, level=2) as rig:
            rig.slot(1024, 0)
            rig.vcpus(2)
            rig.store([0, 512], 1, 0)
            rig.slot(1024)
            for value, page in enumerate((7, 600, 511, 512), 2):
                rig.halts([("r", GPA + at * PAGE_SIZE, 0) for at in (0, 5, 512, 1023)], 1)
                rig.get(1024)
                rig.store([page], value, 0)
                rig.check_inside()
                if page not in rig.get(1024):
                    raise CheckFailed(f"the store that split the huge page of page {page} is not reported")
                rig.store([page], value + 10, 1)
                if page not in rig.get(1024):
                    raise CheckFailed(f"page {page} was stored to by the other vCPU after GET and is not reported")
                context.verified(2 * 1024)


def tracked_stays(context: Context, mmu: str) -> None:
    """A page that logging has protected is then write-tracked: every store must be emulated, none let through."""
    for pml in (False, True):
        with context.rig({"mmu": mmu, "pml": pml}) as rig:
            rig.slot(64)
            rig.vcpus(1)
            rig.store([3], 1)
            rig.get(64)
            rig.must(Inside("track", (SLOT, (GPA >> 12) + 3, 1)))
            spte, _ = rig.vm.mmu.walk(rig.vm.vcpus[0].load_root(), (GPA >> 12) + 3)
            if rig.vm.mmu.fmt.is_present(spte) and rig.vm.mmu.fmt.is_mmu_writable(spte):
                raise CheckFailed(f"SPTE {spte:#018x} of a write-tracked page can be made writable without mmu_lock")
            for value in range(2, 5):
                before = rig.vm.vcpus[0].stats_read()["insn_emulation"]
                rig.store([3], value)
                if rig.vm.vcpus[0].stats_read()["insn_emulation"] == before:
                    raise CheckFailed("a store to a write-tracked page went through without being emulated")
                if rig.get(64) != {3} or rig.content(3) != value:
                    raise CheckFailed("an emulated store to a write-tracked page is lost")
            rig.must(Inside("track", (SLOT, (GPA >> 12) + 3, 0)))
            context.verified(3 * 64)


def stores_between(context: Context, mmu: str) -> None:
    """A store at each point inside GET and RESET is reported then or by the next one."""
    points = ("log: synced", "log: taken", "log: protected", "log: before flush")
    for pml in (False, True):
        for point in points:
            for skip in range(3):
                for page in (0, 64, 130):
                    _store_inside_get(context, {"mmu": mmu, "pml": pml}, point, skip, page)


def _store_inside_get(context: Context, config: dict[str, Any], point: str, skip: int, page: int) -> None:
    with context.rig(config | {"bulk": False}) as rig:
        rig.slot(131)
        rig.vcpus(2)
        rig.store([0, 1, 64, 130], 1, 0)
        rig.must(Run(1, ()))  # it has its root: loading one would have to wait for GET
        rig.must(Race(point, skip, 1, (("w", GPA + page * PAGE_SIZE, 2),)))
        first = rig.get(131)
        copy = {known: rig.content(known) for known in first}
        rig.check_inside()
        second = rig.get(131)
        if rig.content(page) != copy.get(page) and page not in second:
            raise CheckFailed(f"lost page: page {page} stored to at '{point}' differs from its copy and is clean")
        rig.must(Run(0, ()))
        context.verified(2 * 131)
