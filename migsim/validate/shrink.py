"""Make a failing script short: leave out halves, quarters, single steps, then parts of steps, while it still fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from migsim.validate.script import Run, Step

Fails = Callable[[Sequence[Step]], bool]
TRIES_MAX = 600


class _Budget:
    def __init__(self, tries: int) -> None:
        self.left = tries

    def spend(self) -> bool:
        self.left -= 1
        return self.left >= 0


def shrink(script: Sequence[Step], fails: Fails, tries_max: int = TRIES_MAX) -> tuple[Step, ...]:
    """A short script that still ``fails``.  A candidate that cannot be played at all must count as not failing."""
    budget = _Budget(tries_max)
    best = _without_chunks(tuple(script), fails, budget)
    return _shorter_runs(best, fails, budget)


def _without_chunks(script: tuple[Step, ...], fails: Fails, budget: _Budget) -> tuple[Step, ...]:
    size = max(1, len(script) // 2)
    while True:
        at, shorter = 0, False
        while at < len(script) and budget.left > 0:
            candidate = script[:at] + script[at + size :]
            if candidate and budget.spend() and fails(candidate):
                script, shorter = candidate, True
            else:
                at += size
        if budget.left <= 0 or (size == 1 and not shorter):
            return script
        size = max(1, size // 2)


def _shorter_runs(script: tuple[Step, ...], fails: Fails, budget: _Budget) -> tuple[Step, ...]:
    for at, step in enumerate(script):
        if not isinstance(step, Run):
            continue
        ops = step.ops
        for drop in range(len(ops) - 1, -1, -1):
            candidate = replace(step, ops=ops[:drop] + ops[drop + 1 :])
            whole = (*script[:at], candidate, *script[at + 1 :])
            if len(ops) > 1 and budget.spend() and fails(whole):
                ops, script = candidate.ops, whole
                step = candidate
    return script
