"""A real QEMU's monitor on its standard streams, for tests that compare the model's answers with it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pytest

QEMU = shutil.which("qemu-system-x86_64")


class RealQemu:
    """`with RealQemu() as qemu: qemu.answer("query-version")`; a machine without anything, never started."""

    def __enter__(self) -> RealQemu:
        assert QEMU is not None
        command = [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._read()
        self.answer("qmp_capabilities")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def answer(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The reply object: {"return": ...} or {"error": {...}}."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def version(self) -> str:
        qemu = self.answer("query-version")["return"]["qemu"]
        return f"{qemu['major']}.{qemu['minor']}"

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            message: dict[str, Any] = json.loads(self._process.stdout.readline())
            if "event" not in message:
                return message


@pytest.fixture(scope="session")
def qemu() -> Iterator[RealQemu]:
    """A QEMU 7.2, which compat = "7.2" is compared with."""
    if QEMU is None:
        pytest.skip("no qemu-system-x86_64; tools/system-deps installs it")
    with RealQemu() as real:
        if real.version() != "7.2":
            pytest.skip(f"compat 7.2 is compared with QEMU 7.2, this is {real.version()}")
        yield real
