"""hypothesis drives random ioctl and store sequences into a pair until something differs.

Its own shrinking is left out: it shrinks choices, `shrink` leaves out steps, which is some hundred times faster here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from migsim.validate.differential.pair import Pair
from migsim.validate.differential.steps import KINDS, Kind, Shadow
from migsim.validate.verdicts import CheckFailed

T = TypeVar("T")
STEPS_PER_EXAMPLE = 60


class DrawnChooser:
    """Choices drawn from hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def pick(self, items: Sequence[T]) -> T:
        return items[self._data.draw(st.integers(0, len(items) - 1))]


class Tally:
    """What a whole run compared, over all examples."""

    def __init__(self) -> None:
        self.operations = 0
        self.bits = 0
        self.steps = 0
        self.examples = 0


def machine_class(open_pair: Callable[[], Pair], tally: Tally) -> type[RuleBasedStateMachine]:
    """A state machine with one rule for each kind of step; rules of common kinds are repeated by weight."""

    class Differential(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.pair = open_pair()
            self.shadow = Shadow()
            tally.examples += 1

        def teardown(self) -> None:
            tally.operations += self.pair.operations
            tally.bits += self.pair.bits
            tally.steps += len(self.pair.history)
            self.pair.close()

    for name, kind in KINDS.items():
        for copy in range(min(kind.weight, 4)):
            setattr(Differential, f"{name}_{copy}" if copy else name, _rule(kind, name))
    return Differential


def _rule(kind: Kind, name: str) -> Any:
    def play(self: Any, data: st.DataObject) -> None:
        step = kind.make(DrawnChooser(data), self.shadow)
        self.shadow.learn(step, self.pair.play(step))

    play.__name__ = name
    return precondition(lambda self: kind.when(self.shadow))(rule(data=st.data())(play))


def run_machine(open_pair: Callable[[], Pair], *, seed_value: int, examples: int) -> tuple[Tally, CheckFailed | None]:
    """Play ``examples`` random scripts; the tally and the first difference (None: all equal)."""
    tally = Tally()
    machine = seed(seed_value)(machine_class(open_pair, tally))
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS_PER_EXAMPLE,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    try:
        run_state_machine_as_test(machine, settings=chosen)
    except CheckFailed as failure:
        return tally, failure
    return tally, None
