"""What a check says: passed, failed with a sentence and a way to repeat it, or skipped with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from migsim.validate.script import Step

Status = Literal["passed", "failed", "skipped"]


class CheckFailed(Exception):
    """A check found something wrong.  ``script``: the steps that show it, where the check works by script."""

    def __init__(self, sentence: str, script: tuple[Step, ...] = ()) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.script = script


class Skipped(Exception):
    """A check cannot be made here; the text says what is missing."""


@dataclass(frozen=True)
class Outcome:
    """One case on one backend.  ``bits``: page bits compared with the truth.  ``ops``: ioctls and guest accesses."""

    backend: str
    suite: str
    case: str
    status: Status
    reason: str = ""
    bits: int = 0
    ops: int = 0
    seconds: float = 0.0
    repro: str = ""
    script: tuple[Step, ...] = ()

    @property
    def name(self) -> str:
        """``backend/suite/case``, what ``--suite`` and the repro line name."""
        return f"{self.backend}/{self.suite}/{self.case}"
