"""pytest plug-in: the fixture ``migsim_vm``, a VM to write one's own dirty-logging cases against.

Use it with ``pytest -p migsim.pytest_plugin``, or ``pytest_plugins = ["migsim.pytest_plugin"]`` in the top conftest.
``--migsim-backend`` chooses emulated (default), host (the real ``/dev/kvm``, skipped with the reason where there is
none), all, or module:Class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from migsim.validate.rig import Rig

MakeRig = Callable[..., "Rig"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--migsim-backend``."""
    parser.getgroup("migsim").addoption(
        "--migsim-backend", default="emulated", help="emulated, host, all or module:Class (default: emulated)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``all`` every test that takes ``migsim_vm`` runs on both backends."""
    if "migsim_backend_name" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--migsim-backend")
        names = ["emulated", "host"] if chosen == "all" else [chosen]
        metafunc.parametrize("migsim_backend_name", names, scope="session")


@pytest.fixture
def migsim_vm(migsim_backend_name: str) -> Iterator[MakeRig]:
    """A function that opens a VM: ``migsim_vm(pml=False, mmu="shadow")`` takes the emulator's VmConfig fields.

    What it gives has ``slot``, ``vcpus``, ``store``, ``get``, ``clear``, ``harvest``, ``reset``, ``content`` and, as
    ``vm``, the ioctls themselves.  At the end of the test the emulator's invariants are checked and the VM is closed.
    """
    from migsim.host_kvm.device import unavailable_reason
    from migsim.validate.backends import emulated, host, plugin
    from migsim.validate.rig import Rig

    if migsim_backend_name == "host":
        reason = unavailable_reason()
        if reason is not None:
            pytest.skip(reason)
        backend = host()
    else:
        backend = emulated() if migsim_backend_name == "emulated" else plugin(migsim_backend_name)
    rigs: list[Rig] = []

    def make(**config: Any) -> Rig:
        rigs.append(Rig(backend.make(config)))
        return rigs[-1]

    try:
        yield make
        for rig in rigs:
            rig.final_checks()
    finally:
        for rig in rigs:
            rig.close()
