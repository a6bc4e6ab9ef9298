"""``errno``: every row of the errno tables, on every backend that claims to refuse what KVM refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from migsim.kvm import uapi
from migsim.validate.backends import ERRNO, Backend
from migsim.validate.case import Case, Context
from migsim.validate.suites.errno_tables import TABLES, Row
from migsim.validate.verdicts import CheckFailed

# What the rows were seen on: one address space, no PML, 52 address bits, every store emulated.
AS_SEEN: Mapping[str, Any] = {
    "vendor": "amd",
    "smm": False,
    "maxphyaddr": 52,
    "instruction_emulation": True,
}


def cases(backend: Backend) -> Iterator[Case]:
    for name, rows in TABLES.items():
        yield Case("errno", name, partial(table, rows=tuple(rows())), (ERRNO,))


def table(context: Context, rows: tuple[Row, ...]) -> None:
    """Each row on a VM of its own; rows that need another kind of machine are noted."""
    for row in rows:
        with context.rig(AS_SEEN) as rig:
            why_not = excuse(rig.vm, row.needs, real=not rig.emulated)
            if why_not:
                context.notes.append(f"{row.title}: {why_not}")
                continue
            for step in row.setup:
                rig.play(step)
            answer = rig.play(row.step)
            if answer != row.answer:
                raise CheckFailed(f"{row.title}: {row.step} answered {answer}, KVM answers {row.answer}", rig.script())
            context.verified(1)


def excuse(vm: Any, needs: str, *, real: bool) -> str:
    """Why a row cannot be asked of this machine, or nothing."""
    if needs == "tdp" and real:
        return "without two-dimensional paging the slot's rmap would take 16 GiB"
    if needs == "one-address-space" and vm.check_extension(uapi.KVM_CAP_MULTI_ADDRESS_SPACE) > 1:
        return "this machine has two address spaces"
    if needs == "no-pml" and real and _ring_minimum_exceeds(4096):
        return "this machine reserves PML entries in a ring"
    return ""


def _ring_minimum_exceeds(size_bytes: int) -> bool:
    from migsim.host_kvm import HostVm

    with HostVm() as probe:
        try:
            probe.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, 0, (size_bytes,))
        except OSError:
            return True
    return False
