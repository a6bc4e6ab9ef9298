"""The suites on the emulator: they pass, and they are not empty."""

from __future__ import annotations

import pytest

from migsim.validate.backends import emulated
from migsim.validate.registry import all_plans
from migsim.validate.runner import Plan, run_case

SLOW = ("huge/12 TiB",)
SAMPLED = {"dirty_log_test": 7, "memslot_test": 2, "vmm": 2, "races": 2, "mmu_stress_test": 3, "huge": 3}  # every n-th
OPS = 4000


def plans() -> list[Plan]:
    """All cases of the quick suites, every n-th of the others."""
    chosen, seen = [], dict.fromkeys(SAMPLED, 0)
    for plan in all_plans([emulated()]):
        name = f"{plan.case.suite}/{plan.case.name}"
        if plan.case.suite in SAMPLED:
            seen[plan.case.suite] += 1
            if seen[plan.case.suite] % SAMPLED[plan.case.suite] != 1:
                continue
        if not name.startswith(SLOW):
            chosen.append(plan)
    return chosen


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: f"{plan.case.suite}/{plan.case.name}")
def test_the_emulator_passes(plan: Plan) -> None:
    outcome = run_case(plan.backend, plan.case, seed=3, ops=OPS)
    if outcome.status == "skipped":
        pytest.skip(outcome.reason)
    assert outcome.status == "passed", outcome.reason
    assert outcome.bits > 0
