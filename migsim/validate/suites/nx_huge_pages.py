"""``nx_huge_pages_test``: what is fetched from is mapped small, and the recovery worker makes it huge again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from migsim.kvm.log_invariants import stale_translations
from migsim.units import PAGE_SIZE
from migsim.validate.backends import CONFIG, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.inside import Inside
from migsim.validate.rig import GPA, LOG, Rig
from migsim.validate.verdicts import CheckFailed

SUITE = "nx_huge_pages_test"
HUGE_BYTES = 512 * PAGE_SIZE

# (what, huge page touched, pages_2m and nx_lpage_splits after it); the fifth row is the worker's period
STEPS: tuple[tuple[str, int, int, int], ...] = (
    ("read", 0, 1, 0),
    ("read", 1, 2, 0),
    ("exec", 0, 1, 1),
    ("exec", 2, 1, 2),
    ("read", 0, 1, 2),
    ("recover", 0, 1, 0),
    ("read", 2, 2, 0),
)
STEPS_WITHOUT: tuple[tuple[str, int, int, int], ...] = tuple(
    (what, page, huge, 0) for (what, page, _, _), huge in zip(STEPS, (1, 2, 2, 3, 3, 3, 3), strict=True)
)


def cases(backend: Backend) -> Iterator[Case]:
    needs = (MMU, CONFIG)
    yield Case(SUITE, "mitigation on", partial(steps, on=True), needs)
    yield Case(SUITE, "mitigation off", partial(steps, on=False), needs)
    yield Case(SUITE, "no recovery while logging", no_recovery_while_logging, needs)
    yield Case(SUITE, "recovery flushes", recovery_flushes, needs)
    yield Case(SUITE, "recovery flushes before it yields", recovery_yields, needs)


def _touch(rig: Rig, what: str, page: int) -> None:
    gpa = GPA + page * HUGE_BYTES
    if what == "read":
        rig.halts([("r", gpa, 0)])
    elif what == "exec":
        rig.must(Inside("exec", (0, gpa)))
    else:
        rig.must(Inside("recover_nx"))


def steps(context: Context, on: bool) -> None:
    """The selftest's seven steps and the two statistics after each."""
    with context.rig({"nx_huge_pages": on}, level=2) as rig:
        rig.slot(3 * 512, 0)
        rig.vcpus(1)
        for what, page, huge, splits in STEPS if on else STEPS_WITHOUT:
            _touch(rig, what, page)
            stats = rig.vm.stats_read()
            found = (stats["pages_2m"], stats["nx_lpage_splits"])
            if found != (huge, splits):
                where = f"after {what} of huge page {page + 1}"
                raise CheckFailed(f"{where}: (2m, splits) {found}, wanted {(huge, splits)}")
            rig.check_inside()
            context.verified(2)


def no_recovery_while_logging(context: Context) -> None:
    """Tables of a logged slot are left alone (Linux 6.2): zapping them would only make them fault back small."""
    with context.rig({"nx_huge_pages": True}, level=2) as rig:
        rig.slot(512, 0)
        rig.vcpus(1)
        _touch(rig, "exec", 0)
        rig.store(list(range(0, 512, 8)), 1)
        rig.slot(512, LOG)
        before = rig.vm.stats_read()["pages_4k"]
        rig.must(Inside("recover_nx"))
        after = rig.vm.stats_read()["pages_4k"]
        if before != after:
            raise CheckFailed(f"recovery zapped {before - after} pages of a logged slot")
        rig.store([5], 2)
        if rig.get(512) != {5}:
            raise CheckFailed("a store after the recovery period is not reported alone")
        context.verified(512)


def _execute_from_three(rig: Rig) -> None:
    """Two vCPUs; of three huge pages the first executes, which makes 4 KiB pages of them, and the second stores."""
    rig.slot(3 * 512, 0)
    rig.vcpus(2)
    for page in range(3):
        _touch(rig, "exec", page)
        rig.store([page * 512 + 7], 1, 1)


def recovery_flushes(context: Context) -> None:
    """After the worker has zapped a table no vCPU may use what it held."""
    with context.rig({"nx_huge_pages": True}, level=2) as rig:
        _execute_from_three(rig)
        rig.must(Inside("recover_nx"))
        rig.check_inside()
        for page in range(3):
            rig.must(Inside("replace", ((page * 512 + 7) * PAGE_SIZE, 1)))
            rig.store([page * 512 + 7], 2, 1)
            if rig.content(page * 512 + 7) != 2:
                raise CheckFailed("a store through a translation of a zapped table is lost")
        context.verified(3)


def recovery_yields(context: Context) -> None:
    """Where the worker lets others run between two tables, no vCPU may use what the tables so far held."""
    with context.rig({"nx_huge_pages": True}, level=2) as rig:
        _execute_from_three(rig)
        sched = rig.vm.mmu.state.sched
        sched.need_resched, sched.resched = lambda: True, lambda: _no_stale_translation(rig)
        try:
            rig.must(Inside("recover_nx"))
        finally:
            del sched.need_resched, sched.resched
        context.verified(3)


def _no_stale_translation(rig: Rig) -> None:
    for sentence in stale_translations(rig.vm):
        raise CheckFailed(f"while recovery yields: {sentence}")
