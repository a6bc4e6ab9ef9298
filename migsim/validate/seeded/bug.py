"""What a seeded bug is: one historic mistake, put into one VM by replacing one step from outside."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

Effect = str  # L lost page, S stale permission, E wrong errno, O over-report, K leak or corruption, H hang, P cost


@dataclass(frozen=True)
class Bug:
    """``install(vm, undo)`` changes one step of that VM; what is not the VM's own is put back through ``undo``.

    ``commit``: the fix in Linux, QEMU or elsewhere.  ``suites``: where to look first, as ``suite`` or ``suite/case``.
    """

    name: str
    commit: str
    effect: Effect
    about: str
    install: Callable[[Any, ExitStack], None]
    suites: tuple[str, ...]


BUGS: dict[str, Bug] = {}


def bug(name: str, commit: str, effect: Effect, *suites: str) -> Callable[[Any], Any]:
    """Register the decorated ``install``; its docstring says what is done wrongly."""

    def register(install: Callable[[Any, ExitStack], None]) -> Callable[[Any, ExitStack], None]:
        assert name not in BUGS and install.__doc__, name
        BUGS[name] = Bug(name, commit, effect, install.__doc__.strip().splitlines()[0], install, suites)
        return install

    return register


def swap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace one method of one instance by what ``make`` makes of it."""
    setattr(owner, name, make(getattr(owner, name)))


def swap_shared(owner: Any, name: str, make: Callable[[Any], Any], undo: ExitStack) -> None:
    """The same for a class or a module, where a step is no instance's; put back when the VM is closed."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    undo.callback(setattr, owner, name, original)


def each_vcpu(vm: Any, change: Callable[[Any], None]) -> None:
    """Apply ``change`` to every vCPU as it is created."""

    def make(create: Any) -> Any:
        def create_vcpu(id: int) -> Any:
            vcpu = create(id)
            change(vcpu)
            return vcpu

        return create_vcpu

    swap(vm, "create_vcpu", make)
