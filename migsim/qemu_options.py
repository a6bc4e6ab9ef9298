"""A scenario's `[migration]` as arguments of the loop: who throttles, who watches, and the host's clock."""

from __future__ import annotations

from typing import Any

from migsim.migration.policies.choice import throttle_of
from migsim.migration.window import HostClock
from migsim.scenario import Scenario
from migsim.sim.prng import stream_key
from migsim.units import NS_PER_MS

__all__ = ["loop_options"]

CLOCK = 7  # stream of the host clock's randomness: where in a ms the migration starts, how late wake-ups are


def loop_options(scenario: Scenario, seed: int) -> dict[str, Any]:
    """Keyword arguments of migration.precopy.Precopy."""
    return {
        "throttle": throttle_of(scenario.migration),
        "clock": HostClock(stream_key(seed, CLOCK) % NS_PER_MS, stream_key(seed, CLOCK, 1)),
    }
