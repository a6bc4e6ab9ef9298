"""A case: one body, run on a backend inside a Context that counts what was verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from migsim.validate.backends import Backend
from migsim.validate.rig import Rig
from migsim.validate.verdicts import CheckFailed

Body = Callable[["Context"], None]


@dataclass(frozen=True)
class Case:
    """``suite/name``; ``needs``: features of a backend without which it is skipped aloud."""

    suite: str
    name: str
    body: Body
    needs: tuple[str, ...] = ()


@dataclass
class Context:
    """What a body gets.  ``seed`` is its own; ``ops`` how many operations a random case should do.

    ``bits``: page bits compared with the truth; ``done``: ioctls and guest accesses.
    """

    backend: Backend
    seed: int
    ops: int
    bits: int = 0
    done: int = 0
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def rig(self, config: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Rig]:
        """A fresh VM with a player; closed, and on the emulator checked for leaks, at the end."""
        rig = Rig(self.backend.make(config or {}), **options)
        try:
            yield rig
            rig.final_checks()
        except CheckFailed as failure:
            if not failure.script:
                raise CheckFailed(failure.sentence, rig.script()) from failure
            raise
        finally:
            self.done += rig.done
            rig.close()

    def verified(self, n_bits: int) -> None:
        """``n_bits`` page bits were compared with the truth."""
        self.bits += n_bits
