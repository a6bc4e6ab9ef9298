"""``vmm``: a whole migration's bookkeeping in user space against KVM's log; in the end the copy equals the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from random import Random
from typing import Any

from migsim.units import PAGE_SIZE
from migsim.validate.backends import CLEAR_LOG, DIRTY_LOG, ERRNO, Backend
from migsim.validate.case import Case, Context
from migsim.validate.rig import GPA
from migsim.validate.verdicts import CheckFailed
from migsim.validate.vmm import Vmm

SUITE = "vmm"
SIZES = (100, 37, 1, 190)  # slots of one block whose borders lie inside 64-bit words
CHUNK = 96  # pages a CLEAR covers: not a multiple of 64, across slots
ROUNDS_MAX = 40


def cases(backend: Backend) -> Iterator[Case]:
    for variant, config in backend.variants[:3]:
        name = f",{variant}" if variant else ""
        for manual in (False, True):
            needs = (CLEAR_LOG, ERRNO) if manual else (DIRTY_LOG, ERRNO)
            title = "clear-log" if manual else "dirty-log"
            yield Case(SUITE, f"migration,{title}{name}", partial(migration, config=config, manual=manual), needs)
        yield Case(SUITE, f"differential snapshot{name}", partial(snapshot, config=config), (DIRTY_LOG, ERRNO))


def _guest(vmm: Vmm, random: Random, n_stores: int, value: int) -> None:
    edges = [slot.first + offset for slot in vmm.slots for offset in (0, slot.n_pages - 1)]
    pages = [random.choice([random.randrange(vmm.n_pages), random.choice(edges)]) for _ in range(n_stores)]
    vmm.rig.halts([("w", GPA + page * PAGE_SIZE, value) for page in pages])


def migration(context: Context, config: Mapping[str, Any], manual: bool) -> None:
    """Chunks are sent while the guest and a device go on writing, less each round; then the guest stops."""
    random = Random(context.seed)
    with context.rig(config) as rig:
        vmm = Vmm(rig, SIZES, manual=manual)
        rig.vcpus(1)
        _guest(vmm, random, 300, 1)
        vmm.log_start()
        for round_number in range(8):
            vmm.meanwhile = partial(_guest, vmm, random, 12 - round_number, 2 + round_number)
            for first in range(0, vmm.n_pages, CHUNK):
                vmm.save_chunk(first, CHUNK)
            start = random.randrange(vmm.n_pages - 3) * PAGE_SIZE + PAGE_SIZE - 8
            vmm.device_write(start, PAGE_SIZE + 16, 100 + round_number)
            _log_off_and_on(vmm, round_number)
            vmm.log_sync()
            _free_pages(vmm)
        _finish(context, vmm)


def _log_off_and_on(vmm: Vmm, round_number: int) -> None:
    """Once in a migration the log is stopped with bits in it, and started again: nothing may get lost by that."""
    if round_number == 4:
        known = vmm.dirty | set()
        vmm.log_stop()
        pending = set(vmm.dirty)
        vmm.log_start()
        vmm.dirty = pending | known
        for slot in vmm.slots:
            slot.seen.clear()


def _free_pages(vmm: Vmm) -> None:
    """A hint of free pages; nobody writes there any more, so the next sync must not show them."""
    vmm.skip_free(40, 8)
    vmm.log_sync()
    if vmm.dirty & set(range(40, 48)):
        page = min(vmm.dirty & set(range(40, 48)))
        raise CheckFailed(f"page {page} was skipped as free and nobody wrote it, yet it is dirty again")
    vmm.dirty |= set(range(40, 48))  # the hint was for this round only


def _finish(context: Context, vmm: Vmm) -> None:
    """The guest has stopped: sync and send until nothing is left, which must happen; then compare every page."""
    vmm.meanwhile = lambda: None
    for round_number in range(ROUNDS_MAX):
        vmm.log_sync()
        if not vmm.dirty:
            break
        if round_number == ROUNDS_MAX - 1:
            raise CheckFailed(f"the guest has stopped, yet after {ROUNDS_MAX} rounds {len(vmm.dirty)} pages are dirty")
        for first in range(0, vmm.n_pages, CHUNK):
            vmm.save_chunk(first, CHUNK)
    if round_number > 2:
        raise CheckFailed(f"the guest has stopped, yet it took {round_number} rounds until no page was dirty")
    for page in range(vmm.n_pages):
        if vmm.copied.get(page) != vmm.read(page):
            raise CheckFailed(f"lost page: page {page} of the block was written after it was sent and not sent again")
    context.verified(vmm.n_pages * 10)


def snapshot(context: Context, config: Mapping[str, Any]) -> None:
    """Differential snapshots over several slots restore to the memory, also where a slot's last page is clean."""
    random = Random(context.seed)
    with context.rig(config) as rig:
        vmm = Vmm(rig, SIZES, manual=False)
        rig.vcpus(1)
        vmm.log_start()
        vmm.log_sync()
        image = {page: vmm.read(page) for page in range(vmm.n_pages)}
        for value in range(1, 7):
            last_pages = {slot.first + slot.n_pages - 1 for slot in vmm.slots if slot.n_pages > 1}
            pages = [page for page in random.sample(range(vmm.n_pages), 40) if value % 2 or page not in last_pages]
            rig.halts([("w", GPA + page * PAGE_SIZE, value) for page in pages])
            image = vmm.snapshot(image)
            for page in range(vmm.n_pages):
                if image.get(page) != vmm.read(page):
                    raise CheckFailed(f"snapshot {value}: page {page} of the image is not the memory's")
            context.verified(vmm.n_pages)
