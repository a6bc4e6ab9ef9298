"""Random scripts for one VM under an auditor: ioctls, guests, the host's side, SMM, nesting, and races in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from migsim.kvm import uapi
from migsim.units import PAGE_SHIFT, PAGE_SIZE
from migsim.validate.auditor import Auditor
from migsim.validate.differential.choice import Chooser
from migsim.validate.differential.steps import KINDS, Shadow, odds
from migsim.validate.inside import Inside, Race
from migsim.validate.rig import Rig
from migsim.validate.script import Answer, Cap, CreateVcpu, Get, Harvest, Region, Reset, Run, Step, pages
from migsim.validate.verdicts import CheckFailed

HUGE_PAGES = 2  # the arena's host pages
RACE_POINTS = (
    "log: synced", "log: taken", "log: protected", "log: before flush", "ring: popped", "ring: protected",
    "ring: before flush", "enable: protected", "host: invalidated",
)  # fmt: skip
RACE_OFFSET = 256  # bytes into a page: apart from what the script's own stores touch
YIELDS_MAX = 500_000  # of one VM: a script of 150 steps needs some thousands
INVARIANTS_EVERY = 8  # steps: they walk every page of every slot

Steps = tuple[Step, ...]


def _target(choose: Chooser, shadow: Shadow) -> Region | None:
    known = sorted(shadow.slots)
    return shadow.slots[choose.pick(known)] if known else None


def _hva_range(choose: Chooser, shadow: Shadow) -> tuple[int, int] | None:
    slot = _target(choose, shadow)
    if slot is None:
        return None
    n_pages = slot.size >> PAGE_SHIFT
    first = choose.integer(0, n_pages - 1)
    return slot.hva + pages(first), min(n_pages - first, choose.pick((1, 1, 2, 64)))


def _discard(choose: Chooser, shadow: Shadow) -> Steps:
    found = _hva_range(choose, shadow)
    return (Inside(choose.pick(("discard", "replace")), found),) if found else ()


def _age(choose: Chooser, shadow: Shadow) -> Steps:
    found = _hva_range(choose, shadow)
    return (Inside("age", found),) if found else ()


def _read_only(choose: Chooser, shadow: Shadow) -> Steps:
    """A host page becomes read-only, the guest stores (KVM_RUN fails), and it becomes writable again."""
    slot = _target(choose, shadow)
    if slot is None or slot.slot >> 16 or slot.flags & uapi.KVM_MEM_READONLY or not shadow.vcpus:
        return ()
    page = choose.integer(0, (slot.size >> PAGE_SHIFT) - 1)
    hva, gpa = slot.hva + pages(page), slot.gpa + pages(page)
    vcpu = choose.integer(0, len(shadow.vcpus) - 1)
    load, store = Run(vcpu, (("r", gpa, 0),)), Run(vcpu, (("w", gpa, 7),))
    return Inside("protect", (hva, 1, 0)), load, store, Inside("protect", (hva, 1, 1)), store


def _smm(choose: Chooser, shadow: Shadow) -> Steps:
    on = choose.integer(0, 1)
    return (Inside("smm", (choose.integer(0, len(shadow.vcpus) - 1), on)),) if shadow.spaces > 1 else ()


def _guest_mode(choose: Chooser, shadow: Shadow) -> Steps:
    return (Inside("guest_mode", (choose.integer(0, len(shadow.vcpus) - 1), choose.integer(0, 1))),)


def _fetch(choose: Chooser, shadow: Shadow) -> Steps:
    slot = _target(choose, shadow)
    if slot is None or slot.slot >> 16:
        return ()
    gpa = slot.gpa + pages(choose.integer(0, (slot.size >> PAGE_SHIFT) - 1))
    vcpu = choose.integer(0, len(shadow.vcpus) - 1)
    return Inside("smm", (vcpu, 0)), Inside("exec", (vcpu, gpa))


def _recover_nx(_choose: Chooser, _shadow: Shadow) -> Steps:
    return (Inside("recover_nx"),)


def _kvm_write(choose: Chooser, shadow: Shadow) -> Steps:
    slot = _target(choose, shadow)
    if slot is None or slot.slot >> 16 or slot.flags & uapi.KVM_MEM_READONLY:
        return ()
    vcpu = choose.integer(0, len(shadow.vcpus) - 1)
    gpa = slot.gpa + pages(choose.integer(0, (slot.size >> PAGE_SHIFT) - 1)) + 8
    return Inside("smm", (vcpu, 0)), Inside("kvm_write", (gpa, choose.integer(1, 255), vcpu))


def _track(choose: Chooser, shadow: Shadow) -> Steps:
    slot = _target(choose, shadow)
    if slot is None:
        return ()
    gfn = (slot.gpa >> PAGE_SHIFT) + choose.integer(0, (slot.size >> PAGE_SHIFT) - 1)
    store = Run(choose.integer(0, len(shadow.vcpus) - 1), (("w", gfn << PAGE_SHIFT, 3),))
    return Inside("track", (slot.slot, gfn, 1)), store, Inside("track", (slot.slot, gfn, 0))


def _sync(_choose: Chooser, shadow: Shadow) -> Steps:
    """Ask for everything, as the end of a migration does."""
    if shadow.ring:
        return (*(Harvest(vcpu) for vcpu in range(len(shadow.vcpus))), Reset())
    return tuple(Get(slot, region.size >> PAGE_SHIFT) for slot, region in sorted(shadow.slots.items()))


@dataclass(frozen=True)
class Burst:
    """Steps that belong together; ``weight`` beside the ioctl kinds of ``KINDS``."""

    make: Callable[[Chooser, Shadow], Steps]
    weight: int


BURSTS: tuple[Burst, ...] = (
    Burst(_sync, 5),
    Burst(_discard, 2),
    Burst(_age, 2),
    Burst(_read_only, 1),
    Burst(_smm, 2),
    Burst(_guest_mode, 1),
    Burst(_fetch, 1),
    Burst(_recover_nx, 1),
    Burst(_kvm_write, 2),
    Burst(_track, 1),
)


def _race(choose: Chooser, shadow: Shadow, step: Step) -> Race | None:
    """Perhaps a store by some vCPU in the middle of ``step``."""
    slot = _target(choose, shadow)
    if slot is None or not shadow.vcpus or not _may_race(shadow, step) or not odds(choose, 2):
        return None
    page = choose.integer(0, (slot.size >> PAGE_SHIFT) - 1)
    ops = (("w", slot.gpa + pages(page) + RACE_OFFSET, choose.integer(1, 255)),)
    vcpu = choose.integer(0, len(shadow.vcpus) - 1)
    return Race(choose.pick(RACE_POINTS), choose.integer(0, 2), vcpu, ops)


def _may_race(shadow: Shadow, step: Step) -> bool:
    if isinstance(step, Region):  # only where the slot stays in place: its user's view is the same before and after
        old = shadow.slots.get(step.slot)
        return old is not None and step.size == old.size and step.gpa == old.gpa
    return isinstance(step, Get | Reset) or type(step).__name__ == "Clear" or isinstance(step, Inside)


def next_steps(choose: Chooser, shadow: Shadow) -> Iterator[Step]:
    """The next few steps, by weight; the caller has played the earlier ones."""
    table: list[Callable[[Chooser, Shadow], Steps]] = []
    for kind in KINDS.values():
        if kind.when(shadow):
            table += [lambda choose, shadow, kind=kind: (kind.make(choose, shadow),)] * kind.weight  # type: ignore[misc]
    if shadow.vcpus and shadow.slots:
        for burst in BURSTS:
            table += [burst.make] * burst.weight
    for step in choose.pick(table)(choose, shadow):
        race = _race(choose, shadow, step)
        if race is not None:
            yield race
        yield step


def play_random(rig: Rig, choose: Chooser, config: Mapping[str, Any], *, steps: int, ring: bool) -> Auditor:
    """``steps`` random steps under an auditor.  Raises CheckFailed with the script, AssertionError of the emulator."""
    emulates = bool(config.get("instruction_emulation"))
    if rig.emulated:
        preempt(rig.vm)
    shadow = Shadow(spaces=2 if rig.emulated and config.get("smm", True) else 1)
    auditor = Auditor(rig.player)
    opening: tuple[Step, ...] = (CreateVcpu(0), CreateVcpu(1))
    if ring:
        opening = (Cap(uapi.KVM_CAP_DIRTY_LOG_RING, 0, (16384,)), *opening)
    for step in opening:
        take(rig, auditor, shadow, step)
    for number in range(steps):
        for step in next_steps(choose, shadow):
            if _left_out(step, emulates=emulates, ring=ring) or (isinstance(step, Inside | Race) and not rig.emulated):
                continue
            answer = take(rig, auditor, shadow, step)
            if isinstance(step, Run) and _left_for_mmio(answer):  # let KVM complete it before anything else changes
                take(rig, auditor, shadow, Run(step.vcpu, ()))
        if number % INVARIANTS_EVERY == 0:
            rig.check_inside()
    auditor.check_contents()
    return auditor


def _left_for_mmio(answer: Answer) -> bool:
    return isinstance(answer.value, tuple) and answer.value[0] == uapi.KVM_EXIT_MMIO


def preempt(vm: Any) -> None:
    """Others want the CPU at every third look, so that long walks of the MMU yield and start again.

    CheckFailed for a walk that yields for ever: between two of the guest's entries it has no reason to.
    """
    looks, yields = count(), count()

    def resched() -> None:
        if next(yields) > YIELDS_MAX:
            raise CheckFailed(f"a walk of the MMU has yielded {YIELDS_MAX} times: it makes no progress")

    vm.mmu.state.sched.need_resched = lambda: next(looks) % 3 == 2
    vm.mmu.state.sched.resched = resched


def _left_out(step: Step, *, emulates: bool, ring: bool) -> bool:
    """Steps that mean nothing where the CPU executes nothing, and a trap of the ABI.

    INITIALLY_SET protects nothing when logging is enabled, and a ring has no bitmap to set instead: together they lose
    pages by design, which is why no VMM enables both.
    """
    if isinstance(step, Inside):
        return emulates and step.what in ("exec", "track", "guest_mode")
    return ring and isinstance(step, Cap) and step.cap == uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2


def take(rig: Rig, auditor: Auditor, shadow: Shadow, step: Step) -> Answer:
    """Play one step, let the auditor see it, remember it."""
    answer: Answer = rig.play(step)
    auditor.watch(step, answer)
    shadow.learn(step, answer)
    return answer


def replay_audited(rig: Rig, script: Sequence[Step]) -> CheckFailed | None:
    """Play a fixed script under an auditor, checking the inside after every step; what fails, or None."""
    auditor, shadow = Auditor(rig.player), Shadow()
    try:
        for step in script:
            take(rig, auditor, shadow, step)
            if not isinstance(step, Race):
                rig.check_inside()
        auditor.check_contents()
        rig.final_checks()
    except CheckFailed as failure:
        return failure
    except AssertionError as defect:
        return CheckFailed(f"assertion: {defect}")
    return None


assert PAGE_SIZE > 2 * RACE_OFFSET
