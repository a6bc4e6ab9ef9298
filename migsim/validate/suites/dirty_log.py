"""``dirty_log_test``: the guest writes the iteration's number into pages; log and content must tell the same story.

Legal excuses, as the kernel's selftest has them: with a dirty ring the page pushed last may not be written yet; the
first iteration after INITIALLY_SET reports every page; a page that is only read may be reported.  A floor stops a
run that proves nothing from passing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from random import Random
from typing import Any

from migsim.validate.backends import DIRTY_RING, PARALLEL, Backend
from migsim.validate.case import Case, Context
from migsim.validate.modes import MODES, LogMode, store_all
from migsim.validate.rig import GPA, LOG, SLOT, Rig
from migsim.validate.verdicts import CheckFailed

SUITE = "dirty_log_test"
N_PAGES = 512 + 3  # as the selftest's 1 GiB + 3 pages: the last word is partial
ITERATIONS = 6
WRITES_MIN = 0x100  # per iteration, over all vCPUs: TEST_MIN_WRITES_PER_ITERATION


def cases(backend: Backend) -> Iterator[Case]:
    for mode in MODES:
        for variant, config in backend.variants:
            for vcpus in (1, 3):
                name = ",".join(part for part in (mode.name, variant, f"{vcpus} vCPU") if part)
                yield Case(SUITE, name, partial(iterations, mode=mode, config=config, vcpus=vcpus), (mode.needs,))
        parallel = partial(beside_a_running_guest, mode=mode)
        yield Case(SUITE, f"{mode.name},vCPU running", parallel, (mode.needs, PARALLEL))


def iterations(context: Context, mode: LogMode, config: Mapping[str, Any], vcpus: int) -> None:
    """Touch every page, enable the log, then ``ITERATIONS`` times: write, collect once midway, collect, verify."""
    random = Random(context.seed)
    with context.rig(config) as rig:
        mode.prepare(rig)
        rig.slot(N_PAGES, 0)
        rig.vcpus(vcpus)
        rig.store(list(range(N_PAGES)), 0)
        rig.slot(N_PAGES, LOG)
        for iteration in range(1, ITERATIONS + 1):
            reported = _one_iteration(rig, mode, random, iteration, vcpus)
            verify(context, rig, mode, reported, iteration)


def _one_iteration(rig: Rig, mode: LogMode, random: Random, iteration: int, vcpus: int) -> set[int]:
    reported: set[int] = set()
    writes = 0
    for _midway in range(2):
        for vcpu in range(vcpus):
            pages = [random.randrange(N_PAGES) for _ in range(WRITES_MIN // vcpus)]
            reported |= store_all(rig, mode, pages, iteration, vcpu, GPA, N_PAGES)
            writes += len(pages)
        reported |= mode.collect(rig, N_PAGES, SLOT)
    if writes < WRITES_MIN:
        raise CheckFailed(f"iteration {iteration}: the guest wrote {writes} times, which proves nothing")
    return reported


def verify(context: Context, rig: Rig, mode: LogMode, reported: set[int], iteration: int) -> None:
    """Host page by host page: reported means written in this iteration, not reported means not written."""
    everything = mode.enabled_all and iteration == 1
    unwritten = 0
    for page in range(N_PAGES):
        written = rig.content(page) == iteration
        if written and page not in reported:
            raise CheckFailed(f"iteration {iteration}: page {page} was written and not reported: a lost page")
        if page in reported and not written and not everything:
            unwritten += 1
    excused = len(rig.player.vcpus) if mode.needs == DIRTY_RING else 0
    if unwritten > excused:
        raise CheckFailed(f"iteration {iteration}: {unwritten} pages were reported without having been written")
    context.verified(N_PAGES)


def beside_a_running_guest(context: Context, mode: LogMode) -> None:
    """The log is collected while a vCPU stores: the real race.  Nothing written may be missing in the end.

    The stores are not in the failure's script, which repeats the ioctls alone.
    """
    from concurrent.futures import ThreadPoolExecutor

    random = Random(context.seed)
    with context.rig() as rig, ThreadPoolExecutor(max_workers=1) as pool:
        mode.prepare(rig)
        rig.slot(N_PAGES, 0)
        rig.vcpus(1)
        rig.store(list(range(N_PAGES)), 0)
        rig.slot(N_PAGES, LOG)
        stores = 400 if mode.needs == DIRTY_RING else 40_000
        for iteration in range(1, ITERATIONS + 1):
            ops = tuple(("w", GPA + random.randrange(N_PAGES) * 4096, iteration) for _ in range(stores))
            running = pool.submit(rig.player.vcpus[0].run, ops)
            reported: set[int] = set()
            while not running.done():
                reported |= mode.collect(rig, N_PAGES, SLOT)
            if running.result().done < WRITES_MIN:
                raise CheckFailed(f"iteration {iteration}: exit {running.result()} before {WRITES_MIN} stores")
            reported |= mode.collect(rig, N_PAGES, SLOT)
            rig.done += len(ops)
            verify(context, rig, mode, reported, iteration)
