"""``mmu_stress_test``: every vCPU over many slots that share one memory; write, read, protect, unprotect, tear down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from migsim.kvm import uapi
from migsim.units import PAGE_SIZE
from migsim.validate.backends import CONFIG, MMU, Backend
from migsim.validate.case import Case, Context
from migsim.validate.inside import Inside
from migsim.validate.rig import GPA, LOG, Rig
from migsim.validate.script import Region, Run
from migsim.validate.verdicts import CheckFailed

SUITE = "mmu_stress_test"
N_SLOTS, SLOT_PAGES, N_VCPUS = 6, 512, 3
STRIDE = 16  # a page of every STRIDE is touched


def cases(backend: Backend) -> Iterator[Case]:
    for name, config in (
        ("tdp", {}),
        ("tdp,W", {"pml": False}),
        ("tdp,NX", {"nx_huge_pages": True}),
        ("tdp-5.10", {"mmu": "tdp-5.10"}),
        ("shadow", {"mmu": "shadow"}),
        ("slot zap", {"quirk_slot_zap_all": False}),
    ):
        yield Case(SUITE, name, partial(stages, config=config), (MMU, CONFIG))


def _gpa(slot: int, page: int) -> int:
    return GPA + (slot * SLOT_PAGES + page) * PAGE_SIZE


def _everywhere(kind: str, value: int) -> list[tuple[str, int, int]]:
    return [(kind, _gpa(slot, page), value) for slot in range(N_SLOTS) for page in range(0, SLOT_PAGES, STRIDE)]


def stages(context: Context, config: Mapping[str, Any]) -> None:
    """The stages of the selftest; all slots alias one memory, so a store through one is seen through all."""
    with context.rig(config, level=2) as rig:
        for slot in range(N_SLOTS):
            rig.slot(SLOT_PAGES, LOG if slot % 2 else 0, slot=slot + 1, gpa=_gpa(slot, 0))
        rig.vcpus(N_VCPUS)
        for stage, value in (("write", 1), ("rewrite", 2)):
            for vcpu in range(N_VCPUS):
                rig.halts(_everywhere("w", value), vcpu)
            _reads(rig, value, stage)
        _reads(rig, 2, "read")
        _read_only(context, rig)
        for vcpu in range(N_VCPUS):
            rig.halts(_everywhere("w", 3), vcpu)
        _reads(rig, 3, "writable again")
        rig.check_inside()
        _tear_down(context, rig)


def _reads(rig: Rig, wanted: int, stage: str) -> None:
    for vcpu in range(N_VCPUS):
        loaded = set(rig.halts(_everywhere("r", 0), vcpu))
        if loaded != {wanted}:
            raise CheckFailed(f"stage '{stage}': vCPU {vcpu} loads {sorted(loaded)[:4]}, stored was {wanted}")


def _read_only(context: Context, rig: Rig) -> None:
    """mprotect(READ): every store makes KVM_RUN fail with EFAULT, loads go on; mprotect(RW): all well again."""
    rig.must(Inside("protect", (0, SLOT_PAGES, 0)))
    for vcpu in range(N_VCPUS):
        for slot in range(N_SLOTS):
            answer = rig.play(Run(vcpu, (("w", _gpa(slot, 3 * STRIDE), 9),)))
            if answer.error != "EFAULT":
                raise CheckFailed(f"a store to memory the host protects answers {answer}, not EFAULT")
    _reads(rig, 2, "read-only")
    rig.must(Inside("protect", (0, SLOT_PAGES, 1)))
    context.verified(N_VCPUS * N_SLOTS)


def _tear_down(context: Context, rig: Rig) -> None:
    """Every other slot is deleted, half the memory unmapped under the rest, and the VM destroyed as it stands."""
    for slot in range(0, N_SLOTS, 2):
        rig.must(Region(slot + 1, 0, 0, 0, 0))
    rig.must(Inside("discard", (0, SLOT_PAGES // 2)))
    rig.check_inside()
    for slot in range(N_SLOTS):
        reason, done, data = rig.run([("r", _gpa(slot, 0), 0), ("r", _gpa(slot, SLOT_PAGES - STRIDE), 0)])
        if slot % 2 == 0 and reason != uapi.KVM_EXIT_MMIO:
            raise CheckFailed(f"slot {slot + 1} was deleted, a load from it still answers {data}")
        if slot % 2 and data != (0, 3):
            raise CheckFailed(f"slot {slot + 1}: loads {data}, wanted zero where memory was discarded and 3")
    context.verified(N_SLOTS)
