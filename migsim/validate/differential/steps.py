"""Random steps worth playing: mostly legal, aimed at word edges, slot edges and states that exist; sometimes wrong.

``Shadow`` remembers just enough of what was done to aim; it never says what the answer should be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from migsim.kvm import uapi
from migsim.units import PAGE_SIZE, words_of
from migsim.validate.differential.choice import Chooser
from migsim.validate.door import Op
from migsim.validate.script import (
    Answer,
    Cap,
    Clear,
    CreateVcpu,
    Extension,
    Get,
    Harvest,
    HostRead,
    HostWrite,
    Region,
    Reset,
    Run,
    Step,
    pages,
)

LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
RING_CAPS = (uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
SLOT_IDS = (1, 2, 3, 4)
SIZES = (1, 2, 63, 64, 65, 100, 128, 129, 200, 512, 600, 1000)
GPA_STEP = pages(1024)
HVA_STEP = pages(1024)
VCPUS_MAX = 3
ALL_ONES = (1 << 64) - 1


@dataclass
class Shadow:
    """Slots by id, vCPU ids, whether rings are on: what earlier steps were answered OK."""

    slots: dict[int, Region] = field(default_factory=dict)
    vcpus: list[int] = field(default_factory=list)
    ring: bool = False
    spaces: int = 1

    def learn(self, step: Step, answer: Answer) -> None:
        """Take note of a step that was answered without an error."""
        if answer.error is not None:
            return
        match step:
            case Region(slot, _, _, size, _):
                if size:
                    self.slots[slot] = step
                else:
                    self.slots.pop(slot, None)
            case CreateVcpu(id):
                self.vcpus.append(id)
            case Cap(cap, _, _) if cap in RING_CAPS:
                self.ring = True


def odds(choose: Chooser, one_in: int) -> bool:
    """True once in ``one_in``; the simpler choice is False."""
    return choose.integer(0, one_in - 1) == one_in - 1


def region(choose: Chooser, shadow: Shadow) -> Step:
    """Create, move, delete, switch the log; once in a while with something wrong."""
    known = sorted(shadow.slots)
    if known and not odds(choose, 3):
        return _changed(choose, shadow.slots[choose.pick(known)])
    id = choose.pick(SLOT_IDS)
    if shadow.spaces > 1 and odds(choose, 4):
        id |= 1 << 16
    size = pages(choose.pick(SIZES))
    gpa = GPA_STEP * choose.integer(1, 6) + pages(choose.pick((0, 0, 1, 63, 512)))
    hva = HVA_STEP * ((id & 0xFFFF) - 1) + pages(choose.pick((0, 0, 0, 1)))
    flags = choose.pick((LOG, LOG, LOG, 0, LOG | uapi.KVM_MEM_READONLY))
    return _spoiled(choose, Region(id, flags, gpa, size, hva))


def _changed(choose: Chooser, old: Region) -> Step:
    kind = choose.integer(0, 5)
    if kind == 0:
        return Region(old.slot, old.flags ^ LOG, old.gpa, old.size, old.hva)
    if kind == 1:
        return Region(old.slot, old.flags, GPA_STEP * choose.integer(1, 6), old.size, old.hva)
    if kind == 2:
        return Region(old.slot, old.flags ^ LOG, GPA_STEP * choose.integer(1, 6), old.size, old.hva)
    if kind == 3:
        return Region(old.slot, 0, 0, 0, 0)
    if kind == 4:
        return old
    return _spoiled(choose, old)


def _spoiled(choose: Chooser, good: Region) -> Region:
    if not odds(choose, 6):
        return good
    slot, flags, gpa, size, hva = good.slot, good.flags, good.gpa, good.size, good.hva
    wrong = choose.integer(0, 8)
    slot = {0: slot | 1 << 16, 1: slot | 2 << 16, 2: 32764}.get(wrong, slot)
    flags = {3: flags ^ uapi.KVM_MEM_READONLY, 4: flags | 8}.get(wrong, flags)
    gpa = {5: gpa + 0x200, 8: (1 << 64) - PAGE_SIZE}.get(wrong, gpa)
    size = {6: size + 0x200}.get(wrong, size)
    hva = {7: hva + PAGE_SIZE}.get(wrong, hva)
    return Region(slot, flags, gpa, size, hva)


def _some_slot(choose: Chooser, shadow: Shadow) -> tuple[int, int]:
    known = sorted(shadow.slots)
    if not known or odds(choose, 12):
        return choose.pick((1, 4, 32764, 1 << 16 | 1)), 64
    id = choose.pick(known)
    return id, shadow.slots[id].size // PAGE_SIZE


def get(choose: Chooser, shadow: Shadow) -> Step:
    """GET of a slot; once in a while through a bad pointer."""
    slot, n_pages = _some_slot(choose, shadow)
    return Get(slot, None if odds(choose, 16) else max(n_pages, SIZES[-1]))


def clear(choose: Chooser, shadow: Shadow) -> Step:
    """CLEAR of a range that mostly fits, with a mask of all, some or other bits."""
    slot, n_pages = _some_slot(choose, shadow)
    first = 64 * choose.integer(0, n_pages // 64)
    count = n_pages - first
    if count > 64 and odds(choose, 2):
        count = 64 * choose.integer(1, count // 64)
    if odds(choose, 8):
        first += choose.pick((0, 1, 64, 63))
        count = max(0, count + choose.pick((1, -1, 64, 28)))
    if odds(choose, 20):
        return Clear(slot, first, count, None)
    return Clear(slot, first, count, _mask(choose, max(1, words_of(count))))


def _mask(choose: Chooser, n_words: int) -> tuple[int, ...]:
    kind = choose.integer(0, 2)
    if kind == 0:
        return (ALL_ONES,) * n_words
    if kind == 1:
        return tuple(1 << choose.integer(0, 63) for _ in range(n_words))
    return tuple(choose.integer(0, ALL_ONES) for _ in range(n_words))


def run(choose: Chooser, shadow: Shadow) -> Step:
    """A burst of loads and stores by one vCPU, at pages of slots and their edges, sometimes outside."""
    return Run(choose.integer(0, len(shadow.vcpus) - 1), ops(choose, shadow, choose.integer(1, 24)))


def ops(choose: Chooser, shadow: Shadow, count: int) -> tuple[Op, ...]:
    """``count`` accesses; a burst keeps to one slot and mostly stores, as guests do."""
    known = sorted(shadow.slots)
    if not known:
        return (("w", GPA_STEP, 1),)
    target = shadow.slots[choose.pick(known)]
    n_pages = target.size // PAGE_SIZE
    found: list[Op] = []
    for _ in range(count):
        page = choose.pick((0, n_pages - 1, choose.integer(0, n_pages - 1), choose.integer(0, n_pages - 1)))
        if odds(choose, 64):
            page = n_pages + choose.integer(0, 2)
        kind = choose.pick(("w", "w", "w", "w", "r", "a"))
        found.append((kind, target.gpa + page * PAGE_SIZE + 4 * choose.integer(0, 3), choose.integer(1, 255)))
    return tuple(found)


def vcpu(choose: Chooser, shadow: Shadow) -> Step:
    """A new vCPU, sometimes with an id in use."""
    taken = shadow.vcpus and odds(choose, 4)
    return CreateVcpu(choose.pick(shadow.vcpus) if taken else len(shadow.vcpus))


def manual_protect(choose: Chooser, _shadow: Shadow) -> Step:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with a good or bad argument, at any time."""
    flags = 1 if odds(choose, 10) else 0
    return Cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags, (choose.pick((0, 1, 3, 3, 1, 2, 4)),))


def ring_cap(choose: Chooser, _shadow: Shadow) -> Step:
    """A dirty ring capability; 4096 bytes so that the soft limit is met."""
    return Cap(choose.pick(RING_CAPS), 0, (choose.pick((4096, 4096, 4096, 16384, 2048, 5000, 2 << 20)),))


def harvest(choose: Chooser, shadow: Shadow) -> Step:
    """Mark one vCPU's entries RESET."""
    return Harvest(choose.integer(0, len(shadow.vcpus) - 1))


def reset(_choose: Chooser, _shadow: Shadow) -> Step:
    """KVM_RESET_DIRTY_RINGS."""
    return Reset()


def host_access(choose: Chooser, _shadow: Shadow) -> Step:
    """The VMM's own store or load somewhere in the arena that slots use."""
    hva = HVA_STEP * choose.integer(0, 3) + pages(choose.integer(0, 601))
    return HostWrite(hva, choose.integer(1, 255)) if odds(choose, 2) else HostRead(hva)


def extension(choose: Chooser, _shadow: Shadow) -> Step:
    """KVM_CHECK_EXTENSION of what dirty logging offers."""
    caps = (uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 166, *RING_CAPS, uapi.KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP)
    return Extension(choose.pick((*caps, uapi.KVM_CAP_NR_MEMSLOTS, uapi.KVM_CAP_USER_MEMORY)))


Maker = Callable[[Chooser, Shadow], Step]


@dataclass(frozen=True)
class Kind:
    """A kind of step: when it makes sense and how often a seeded script plays it."""

    make: Maker
    weight: int
    when: Callable[[Shadow], bool] = lambda shadow: True


def _no_vcpus(shadow: Shadow) -> bool:
    return not shadow.vcpus


def _has_vcpus(shadow: Shadow) -> bool:
    return bool(shadow.vcpus)


def _rings(shadow: Shadow) -> bool:
    return shadow.ring and bool(shadow.vcpus)


KINDS: dict[str, Kind] = {
    "region": Kind(region, 5),
    "get": Kind(get, 6),
    "clear": Kind(clear, 5),
    "run": Kind(run, 12, _has_vcpus),
    "vcpu": Kind(vcpu, 2, lambda shadow: len(shadow.vcpus) < VCPUS_MAX),
    "manual_protect": Kind(manual_protect, 1),
    "ring_cap": Kind(ring_cap, 1, _no_vcpus),
    "harvest": Kind(harvest, 3, _rings),
    "reset": Kind(reset, 3),
    "host_access": Kind(host_access, 2),
    "extension": Kind(extension, 1),
}


def any_step(choose: Chooser, shadow: Shadow) -> Step:
    """One step of a kind that makes sense now, by weight."""
    able = [kind for kind in KINDS.values() if kind.when(shadow) for _ in range(kind.weight)]
    return choose.pick(able).make(choose, shadow)
