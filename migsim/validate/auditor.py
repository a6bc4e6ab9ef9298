"""The judge of one VM: watches steps and answers, keeps the truth, and objects when KVM's promise is broken.

The promise (user space's view): a page of a logged slot that was stored to is reported before its content can be
taken for copied.  Copying happens after the ioctl that takes the bit (GET, CLEAR or RESET) has returned, so a store
that lands while that ioctl runs is covered if the page was taken by it.  Over-reports are legal only for pages that
were touched (a read fault may map writable and mark) and for all pages after INITIALLY_SET.  Loads must see stores.
The auditor never looks at SPTEs or at the log itself, so it cannot share their mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from migsim.kvm import uapi
from migsim.units import PAGE_SHIFT, PAGE_SIZE
from migsim.validate.door import Op
from migsim.validate.inside import Inside
from migsim.validate.rig import bits_of
from migsim.validate.script import (
    RAW,
    Answer,
    Cap,
    Clear,
    CreateVcpu,
    Get,
    Harvest,
    HostRead,
    HostWrite,
    Player,
    Region,
    Reset,
    Run,
    Step,
)
from migsim.validate.verdicts import CheckFailed

LOG, READONLY = uapi.KVM_MEM_LOG_DIRTY_PAGES, uapi.KVM_MEM_READONLY
_RINGS = (uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)


@dataclass
class Slot:
    """A slot as its user knows it.  ``due``: pages stored to and not yet reported; ``touched``: may be reported."""

    region: Region
    due: set[int] = field(default_factory=set)
    touched: set[int] = field(default_factory=set)

    @property
    def n_pages(self) -> int:
        return self.region.size >> PAGE_SHIFT

    @property
    def logging(self) -> bool:
        return bool(self.region.flags & LOG)

    def restart(self, everything: bool) -> None:
        """The log starts anew: whoever migrates copies every page after this.

        What was touched may be reported still: an access may have come between the new log and the ioctl's return.
        """
        self.due.clear()
        if everything:
            self.touched = set(range(self.n_pages))


class Auditor:
    """Call ``watch`` after every step.  ``bits``: log bits compared with the truth."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self.slots: dict[int, Slot] = {}
        self.values: dict[int, int] = {}  # arena offset of a u32 -> what was stored there last
        self.ring = False
        self.manual = 0
        self.harvested: list[tuple[int, int]] = []
        self.unharvested: set[int] = set()  # vCPUs that have run since their ring was harvested
        self.outdated: set[int] = set()  # slots of which entries from an earlier life may still lie in rings
        self.smm: dict[int, bool] = {}
        self.unwritable: set[int] = set()  # arena pages that the host has made read-only
        self.bits = 0

    # -- steps

    def watch(self, step: Step, answer: Answer) -> None:
        """Take note of a step and what it answered.  Raises CheckFailed."""
        race = self._player.raced
        if isinstance(step, Run):
            self._ran(step, answer)
        raced: dict[int, set[int]] = {}
        if race is not None and race.fired:
            raced = self._apply(race.race.vcpu, race.race.ops[: race.done], race.data)
        if answer.error is not None:
            self._refused(step, answer, raced)
            return
        match step:
            case Region():
                self._region(step)
            case Get(slot, _):
                self._reported(slot, answer.value, raced.get(slot, set()))
            case Clear(slot, first, pages, words):
                mask = bits_of(words or (), 1 << 31)
                self._cleared(slot, {first + page for page in mask if page < pages})
            case Harvest(vcpu):
                self._harvest(vcpu, answer.value)
            case Reset():
                self._reset(raced)
            case Cap(cap, _, args):
                self._cap(cap, args)
            case CreateVcpu():
                self.smm[len(self.smm)] = False
            case HostWrite(hva, value):
                self.values[hva] = value
            case HostRead(hva):
                self._loaded(hva, answer.value)
            case Inside():
                self._inside(step)

    def _refused(self, step: Step, answer: Answer, raced: dict[int, set[int]]) -> None:
        """Without manual protection GET takes the bits before it copies them: EFAULT loses them, by KVM's ABI."""
        if isinstance(step, Get) and answer.error == "EFAULT" and not self.manual and step.slot in self.slots:
            slot = self.slots[step.slot]
            slot.due.clear()
            slot.touched = set(raced.get(step.slot, ()))

    def _cap(self, cap: int, args: tuple[int, ...]) -> None:
        if cap in _RINGS:
            self.ring = True
        elif cap == uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
            self.manual = args[0]

    def _region(self, step: Region) -> None:
        old = self.slots.get(step.slot)
        if self.ring and old is not None:
            self.outdated.add(step.slot)
        if step.size == 0:
            self.slots.pop(step.slot, None)
            return
        fresh = old is None or not old.logging
        if old is None:
            self.slots[step.slot] = old = Slot(step)
        old.region = step
        if old.logging and fresh:
            old.restart(everything=self.manual == 3 and not self.ring)

    # -- guest accesses

    def _ran(self, step: Run, answer: Answer) -> None:
        if answer.error is not None:
            if any(self._hva(step.vcpu, gpa) is None for _, gpa, _ in step.ops) or self._meets_read_only(step):
                return
            raise CheckFailed(f"KVM_RUN was refused with {answer.error} though every page can be accessed")
        assert isinstance(answer.value, tuple)
        reason, done, data = answer.value
        self._apply(step.vcpu, step.ops[:done], data)
        if reason == uapi.KVM_EXIT_MMIO:
            kind, gpa, _ = step.ops[done]
            slot = self._slot_at(step.vcpu, gpa)
            emulated = kind != "r" and slot is not None and slot.region.flags & READONLY
            if slot is not None and not emulated and not self._meets_read_only(step):
                raise CheckFailed(f"access to gpa {gpa:#x} inside slot {slot.region.slot:#x} left KVM as MMIO")
        elif reason == uapi.KVM_EXIT_HLT and done < len(step.ops):
            raise CheckFailed(f"the guest halted after {done} of {len(step.ops)} operations")
        elif reason == uapi.KVM_EXIT_DIRTY_RING_FULL and not self.ring:
            raise CheckFailed("dirty ring full without a dirty ring")

    def _meets_read_only(self, step: Run) -> bool:
        offsets = (self._hva(step.vcpu, gpa) for kind, gpa, _ in step.ops if kind != "r")
        return any(offset is not None and offset >> PAGE_SHIFT in self.unwritable for offset in offsets)

    def _apply(self, vcpu: int, ops: tuple[Op, ...], data: tuple[int, ...]) -> dict[int, set[int]]:
        """Operations that are done: contents, and for each logged slot the pages stored to."""
        values = iter(data)
        stored: dict[int, set[int]] = {}
        if vcpu >= 0:
            self.unharvested.add(vcpu)
        for kind, gpa, value in ops:
            slot = self._slot_at(vcpu, gpa)
            if slot is None:
                raise CheckFailed(f"access to gpa {gpa:#x} went through although no slot is there")
            hva = slot.region.hva + gpa - slot.region.gpa
            page = (gpa - slot.region.gpa) >> PAGE_SHIFT
            slot.touched.add(page)
            if kind == "r":
                self._loaded(hva, next(values, 0), f"gpa {gpa:#x}")
                continue
            if slot.region.flags & READONLY:
                raise CheckFailed(f"a store to gpa {gpa:#x} of a READONLY slot went through")
            self.values[hva] = value if kind == "w" else self.values.get(hva, 0) + value & 0xFFFFFFFF
            if slot.logging:
                slot.due.add(page)
                stored.setdefault(slot.region.slot, set()).add(page)
        return stored

    def _loaded(self, hva: int, value: Any, where: str = "the VMM") -> None:
        wanted = self.values.get(hva, 0)
        if value != wanted:
            raise CheckFailed(f"{where} loads {value} at arena offset {hva:#x}, {wanted} was stored there last")

    def _slot_at(self, vcpu: int, gpa: int) -> Slot | None:
        as_id = int(self.smm.get(vcpu, False))
        for slot in self.slots.values():
            region = slot.region
            if region.slot >> 16 == as_id and region.gpa <= gpa < region.gpa + region.size:
                return slot
        return None

    def _hva(self, vcpu: int, gpa: int) -> int | None:
        slot = self._slot_at(vcpu, gpa)
        if slot is None or slot.region.hva >= RAW:
            return None
        return slot.region.hva + gpa - slot.region.gpa

    # -- the log

    def _reported(self, key: int, words: Any, raced: set[int]) -> None:
        slot = self.slots.get(key)
        if slot is None or not slot.logging:
            raise CheckFailed(f"GET of slot {key:#x} succeeded although it is not logged")
        reported = bits_of(words, slot.n_pages)
        self.bits += slot.n_pages
        missing = slot.due - raced - reported
        if missing:
            raise CheckFailed(f"lost page: slot {key:#x} page {min(missing)} was stored to and GET does not report it")
        self._no_more_than_touched(key, slot, reported)
        if not self.manual:
            slot.due -= reported
            slot.touched = raced

    def _no_more_than_touched(self, key: int, slot: Slot, reported: set[int]) -> None:
        extra = reported - slot.touched
        if extra:
            raise CheckFailed(f"over-report: slot {key:#x} page {min(extra)} is reported and was never touched")

    def _cleared(self, key: int, pages: set[int]) -> None:
        slot = self.slots.get(key)
        if slot is None or not slot.logging:
            raise CheckFailed(f"CLEAR of slot {key:#x} succeeded although it is not logged")
        slot.due -= pages
        self.bits += len(pages)

    def _harvest(self, vcpu: int, entries: Any) -> None:
        self.unharvested.discard(vcpu)
        for key, offset in entries:
            slot = self.slots.get(key)
            self.harvested.append((key, offset))
            if slot is None or key in self.outdated:
                continue  # deleted or changed since
            if offset >= slot.n_pages:
                raise CheckFailed(f"ring entry names page {offset} of slot {key:#x} with {slot.n_pages} pages")
            self._no_more_than_touched(key, slot, {offset})

    def _reset(self, raced: dict[int, set[int]]) -> None:
        for key, offset in self.harvested:
            if key in self.slots:
                self.slots[key].due.discard(offset)
        complete = not self.unharvested
        for key, slot in self.slots.items():
            left = slot.due - raced.get(key, set())
            if complete and self.ring and slot.logging:
                self.bits += slot.n_pages
                if left:
                    raise CheckFailed(f"lost page: slot {key:#x} page {min(left)} was stored to, no entry names it")
        self.harvested.clear()
        if complete:
            self.outdated.clear()

    # -- what only an emulator does

    def _inside(self, step: Inside) -> None:
        args = step.args
        if step.what == "discard":
            first, last = args[0], args[0] + args[1] * PAGE_SIZE
            self.values = {hva: value for hva, value in self.values.items() if not first <= hva < last}
        elif step.what == "protect":
            pages = set(range(args[0] >> PAGE_SHIFT, (args[0] >> PAGE_SHIFT) + args[1]))
            self.unwritable = self.unwritable - pages if args[2] else self.unwritable | pages
        elif step.what == "smm":
            self.smm[args[0]] = bool(args[1])
        elif step.what == "kvm_write":
            self._apply(args[2], (("w", args[0], args[1]),), ())
        elif step.what == "exec":
            self.unharvested.add(args[0])
            slot = self._slot_at(args[0], args[1])
            if slot is not None:
                slot.touched.add((args[1] - slot.region.gpa) >> PAGE_SHIFT)

    def check_contents(self) -> None:
        """Everything stored must be what the VMM reads."""
        vm, arena = self._player.vm, self._player.arena
        for hva in self.values:
            self._loaded(hva, int.from_bytes(vm.host_read(arena + hva, 4), "little"))
