"""Two players of one script.  The first difference, of an answer or of a ring entry, ends it with a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from migsim.validate.door import VmDoor
from migsim.validate.script import Answer, Get, Player, Run, Step
from migsim.validate.shrink import shrink
from migsim.validate.verdicts import CheckFailed

MakeVm = Callable[[], VmDoor]


class Pair:
    """A subject and a judge that get the same steps.  ``operations``: ioctls plus guest accesses compared so far.

    ``bits``: log bits among what was compared.
    """

    def __init__(self, subject: MakeVm, judge: MakeVm, names: tuple[str, str] = ("emulated", "host")) -> None:
        self.names = names
        self.history: list[Step] = []
        self.operations = 0
        self.bits = 0
        self._players: list[Player] = []
        try:
            for make in (subject, judge):
                self._players.append(Player(make()))
        except BaseException:
            self.close()
            raise

    def play(self, step: Step) -> Answer:
        """Play one step on both; raise CheckFailed with the history if anything differs; else the judge's answer."""
        self.history.append(step)
        subject, judge = self._players
        answers = [player.play(step) for player in self._players]
        self.operations += 1 + (len(step.ops) if isinstance(step, Run) else 0)
        if isinstance(step, Get) and answers[1].error is None:
            self.bits += step.pages or 0
        if answers[0] != answers[1]:
            self._differ(f"answered {answers[0]}, {self.names[1]} {answers[1]}")
        rings = [_rings_of(player) for player in (subject, judge)]
        if rings[0] != rings[1]:
            self._differ(f"has rings {rings[0]}, {self.names[1]} {rings[1]}")
        return answers[1]

    def _differ(self, what: str) -> None:
        sentence = f"after {len(self.history)} steps, at {self.history[-1]}: {self.names[0]} {what}"
        raise CheckFailed(sentence, tuple(self.history))

    def close(self) -> None:
        while self._players:
            self._players.pop().vm.close()

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rings_of(player: Player) -> object:
    try:
        return player.ring_contents()
    except RuntimeError:
        return ()  # no ring was enabled before the vCPUs


def shortened(failure: CheckFailed, subject: MakeVm, judge: MakeVm) -> CheckFailed:
    """The same difference shown by as short a script as can be found."""

    def differs(script: Sequence[Step]) -> bool:
        try:
            return first_difference(script, subject, judge) is not None
        except IndexError:
            return False  # a step names a vCPU that is no longer created

    script = shrink(failure.script, differs)
    return first_difference(script, subject, judge) or failure


def first_difference(steps: Iterable[Step], subject: MakeVm, judge: MakeVm) -> CheckFailed | None:
    """Play ``steps`` on a fresh pair; the difference found, or None."""
    with Pair(subject, judge) as pair:
        try:
            for step in steps:
                pair.play(step)
        except CheckFailed as failure:
            return failure
    return None
