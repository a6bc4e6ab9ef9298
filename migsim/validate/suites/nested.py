"""``nested_dirty_log_test``: an L2 guest's stores are charged to L1's pages, whichever L2 address they went through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from migsim.units import PAGE_SIZE
from migsim.validate.backends import CONFIG, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.rig import GPA, LOG, Rig
from migsim.validate.verdicts import CheckFailed

SUITE = "nested_dirty_log_test"
N_PAGES = 4  # logged pages of L1
TABLES_GFN = (GPA >> 12) + (1 << 18)  # L1's own page tables, in a slot of their own
L2_GFN = GPA >> 12  # the numbers of L1's logged pages, but one page off: taken for L1's they name the wrong page


def cases(backend: Backend) -> Iterator[Case]:
    for name, config in (
        ("PML", {}),
        ("W", {"pml": False}),
        ("AMD", {"vendor": "amd"}),
        ("shadow,PML", {"mmu": "shadow"}),
        ("tdp-5.10,PML", {"mmu": "tdp-5.10"}),
    ):
        yield Case(SUITE, f"L1 uses EPT,{name}", partial(with_tables, config=config), (MMU, CONFIG))
        yield Case(SUITE, f"L1 uses none,{name}", partial(without_tables, config=config), (MMU, CONFIG))
        yield Case(SUITE, f"logging starts while L2 runs,{name}", partial(started_inside, config=config), (MMU, CONFIG))


def _nested_guest(rig: Rig) -> Any:
    """L1's tables: L2 gfns L2_GFN + 0..3 and + 4..7 both map L1's pages 1, 2, 3, 0."""
    from migsim.kvm.nested import GuestPte, NestedGuest

    rig.slot(16, 0, slot=2, gpa=TABLES_GFN << 12, hva=1 << 20)
    l2 = NestedGuest(rig.vm, TABLES_GFN)
    vcpu = rig.vm.vcpus[0]
    for level in (4, 3, 2):
        index = L2_GFN >> 9 * (level - 1) & 511
        l2.write_entry(vcpu, TABLES_GFN + 4 - level, index, GuestPte(TABLES_GFN + 5 - level))
    for page in range(2 * N_PAGES):
        index = (L2_GFN + page) & 511
        l2.write_entry(vcpu, TABLES_GFN + 3, index, GuestPte((GPA >> 12) + (page + 1) % N_PAGES, leaf=True))
    return l2


def with_tables(context: Context, config: Mapping[str, Any]) -> None:
    """L2 stores through either of two addresses; the log names L1's page, once; a load after re-arming reports none."""
    with context.rig(config) as rig:
        rig.slot(N_PAGES, LOG)
        rig.vcpus(1)
        l2 = _nested_guest(rig)
        vcpu = rig.vm.vcpus[0]
        _expect(context, rig, "before L2 runs", set(), {0, 1, 2, 3})
        vcpu.enter_guest_mode(l2)
        for value, (page, kind) in enumerate(PLAN, 1):
            vcpu.run([(kind, (L2_GFN + page) << 12, value)])
            context.done += 1
            of_l1 = (page + 1) % N_PAGES
            _expect(context, rig, f"L2 '{kind}' at its page {page}", {of_l1} if kind == "w" else set(), {of_l1})
            if kind == "w" and rig.content(of_l1) != value:
                raise CheckFailed(f"L2's store at its page {page} did not reach L1's page {of_l1}")
        vcpu.leave_guest_mode()
        _expect(context, rig, "back in L1", set(), set())
        rig.store([2], 99)
        _expect(context, rig, "L1 again", {2}, {2})


# (L2 page, access): read first, then store through either of the two addresses of a page
PLAN = (
    (0, "r"), (0, "w"), (0, "r"), (4, "w"), (0, "w"), (1, "w"), (5, "w"),
    (1, "r"), (7, "w"), (3, "w"), (2, "w"), (6, "w"), (6, "w"), (0, "w"),
)  # fmt: skip


def without_tables(context: Context, config: Mapping[str, Any]) -> None:
    """L1 uses no second level for L2: L2 runs on a direct root, with the same addresses, logged by W."""
    with context.rig(config) as rig:
        rig.slot(70, LOG)
        rig.vcpus(1)
        vcpu = rig.vm.vcpus[0]
        for round_number in range(1, 4):
            rig.store([0, 64], round_number)
            vcpu.enter_guest_mode()
            rig.store([1, 64, 69], round_number + 10)
            found = rig.get(70)
            if found != {0, 1, 64, 69}:
                raise CheckFailed(f"L1 and L2 stored to pages 0, 1, 64, 69; reported are {sorted(found)}")
            rig.store([1, 2], round_number + 20)
            vcpu.leave_guest_mode()
            rig.store([0], round_number + 30)
            found = rig.get(70)
            if found != {0, 1, 2}:
                raise CheckFailed(f"re-armed, L1 and L2 stored to pages 0, 1, 2; reported are {sorted(found)}")
            rig.check_inside()
            context.verified(140)


def started_inside(context: Context, config: Mapping[str, Any]) -> None:
    """Logging starts, or stops, while L2 runs: L1's own controls must follow once it is back."""
    with context.rig(config) as rig:
        rig.slot(70, 0)
        rig.vcpus(1)
        rig.store(list(range(70)), 1)
        vcpu = rig.vm.vcpus[0]
        for round_number in range(1, 4):
            vcpu.enter_guest_mode()
            rig.slot(70, LOG)
            vcpu.leave_guest_mode()
            rig.store([3, 69], round_number)
            found = rig.get(70)
            if found != {3, 69}:
                raise CheckFailed(f"logging began while L2 ran; L1 stored to pages 3 and 69, reported: {sorted(found)}")
            vcpu.enter_guest_mode()
            rig.slot(70, 0)
            vcpu.leave_guest_mode()
            rig.store([3, 4], round_number)
            context.verified(70)


def _expect(context: Context, rig: Rig, what: str, must: set[int], may: set[int]) -> None:
    found = rig.get(N_PAGES)
    context.verified(N_PAGES)
    if must - found:
        raise CheckFailed(f"{what}: L1's page {min(must - found)} is not reported: a lost page")
    if found - may:
        raise CheckFailed(f"{what}: page {min(found - may)} is reported, which nobody touched")


assert PAGE_SIZE == 1 << 12
