"""Where random steps get their choices: from a seed, or from hypothesis, which can then shrink them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol, TypeVar

T = TypeVar("T")


class Chooser(Protocol):
    """A source of choices; smaller integers and earlier items are the simpler ones."""

    def integer(self, low: int, high: int) -> int: ...
    def pick(self, items: Sequence[T]) -> T: ...


class SeededChooser:
    """Choices by a seed: the same seed, the same script."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def pick(self, items: Sequence[T]) -> T:
        return items[self._random.randrange(len(items))]
