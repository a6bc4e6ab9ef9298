"""Steps that only an emulator can play: the host's side, the CPU's modes, and others running in the middle of a step.

They print as comments in a C program, for no ioctl does them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from migsim.units import PAGE_SHIFT, PAGE_SIZE
from migsim.validate.door import Op


@dataclass(frozen=True)
class Inside:
    """``what`` (a key of ACTS) with integer arguments; host addresses are arena offsets in bytes."""

    what: str
    args: tuple[int, ...] = ()


@dataclass(frozen=True)
class Race:
    """During the next step, at the ``skip``-th time the kernel passes ``point``, the ``vcpu``-th vCPU runs ``ops``."""

    point: str
    skip: int
    vcpu: int
    ops: tuple[Op, ...]


@dataclass
class Raced:
    """What a Race came to: nothing yet, or the operations done and the values they loaded."""

    race: Race
    passed: int = 0
    done: int = 0
    data: tuple[int, ...] = ()
    fired: bool = False


def arm(vm: Any, vcpus: list[Any], raced: Raced) -> None:
    """Set the VM's race hook for one step."""

    def hook(point: str) -> None:
        if raced.fired or point != raced.race.point:
            return
        raced.passed += 1
        if raced.passed > raced.race.skip:
            raced.fired = True
            exit = vcpus[raced.race.vcpu].run(raced.race.ops)
            raced.done, raced.data = exit.done, tuple(exit.data)

    vm.race_hook = hook


# -- what can be done ------------------------------------------------------------------------------------------------


def _discard(player: Any, hva: int, n_pages: int) -> None:
    player.vm.host_discard(player.arena + hva, n_pages * PAGE_SIZE)


def _replace(player: Any, hva: int, n_pages: int) -> None:
    player.vm.user.replace(player.arena + hva, n_pages * PAGE_SIZE)


def _protect(player: Any, hva: int, n_pages: int, writable: int) -> None:
    player.vm.host_protect(player.arena + hva, n_pages * PAGE_SIZE, writable=bool(writable))


def _age(player: Any, hva: int, n_pages: int) -> bool:
    at = player.arena + hva
    return bool(player.vm.mmu.age_hva(at, at + n_pages * PAGE_SIZE))


def _young(player: Any, hva: int) -> bool:
    return bool(player.vm.mmu.test_age_hva(player.arena + hva))


def _smm(player: Any, vcpu: int, on: int) -> None:
    """Entering or leaving SMM resets the MMU context: the next entry loads the other space's root."""
    player.vcpus[vcpu].smm = bool(on)
    player.vcpus[vcpu].load_root()


def _guest_mode(player: Any, vcpu: int, on: int) -> None:
    target = player.vcpus[vcpu]
    if on and not target.guest_mode:
        target.enter_guest_mode()
    elif not on and target.guest_mode:
        target.leave_guest_mode()


def _exec(player: Any, vcpu: int, gpa: int) -> int:
    """An instruction fetch: fault until it is allowed."""
    target, vm = player.vcpus[vcpu], player.vm
    with vm.running(target):
        for _ in range(8):
            spte, _level = vm.mmu.walk(target.load_root(), gpa >> PAGE_SHIFT)
            if vm.mmu.fmt.is_present(spte) and vm.mmu.fmt.is_executable(spte):
                return 1
            vm.mmu.page_fault(target, gpa, write=False, exec=True)
    raise AssertionError(f"vCPU {vcpu}: the instruction fetch at {gpa:#x} faults for ever")


def _recover_nx(player: Any) -> int:
    return int(player.vm.mmu.recover_nx(ratio=1))


def _kvm_write(player: Any, gpa: int, value: int, vcpu: int) -> None:
    """KVM itself writes guest memory (a clock page, a secret, a nested VMCS)."""
    player.vm.access.write_guest(gpa, value.to_bytes(4, "little"), player.vcpus[vcpu] if vcpu >= 0 else None)


def _track(player: Any, slot: int, gfn: int, on: int) -> None:
    found = player.vm.memslots(slot >> 16).by_id(slot & 0xFFFF)
    if found is None or not found.base_gfn <= gfn < found.base_gfn + found.npages:
        return
    (player.vm.mmu.track_writes if on else player.vm.mmu.untrack_writes)(found, gfn)


ACTS: dict[str, Callable[..., Any]] = {
    "discard": _discard,
    "replace": _replace,
    "protect": _protect,
    "age": _age,
    "young": _young,
    "smm": _smm,
    "guest_mode": _guest_mode,
    "exec": _exec,
    "recover_nx": _recover_nx,
    "kvm_write": _kvm_write,
    "track": _track,
}


def perform(player: Any, step: Inside) -> Any:
    """Do it; OSError passes through as any ioctl's would."""
    return ACTS[step.what](player, *step.args)
