"""Play a printed script again: on the emulator, and on ``/dev/kvm`` where there is one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from migsim.validate.backends import emulated, host
from migsim.validate.differential.pair import first_difference
from migsim.validate.script import Answer, Player, Step
from migsim.validate.suites.differential import machine_like
from migsim.validate.suites.errors import AS_SEEN


def replay(steps: Sequence[Step]) -> int:
    """Print the first difference between emulator and host; 0 if there is none, 1 if there is, 2 without a host."""
    from migsim.host_kvm.device import unavailable_reason

    reason = unavailable_reason()
    if reason is not None:
        print(f"only the emulator can play this here: {reason}", file=sys.stderr)
        for step, answer in zip(steps, answers_of_emulator(steps), strict=True):
            print(f"{step} -> {answer}")
        return 2
    real = host()
    config = machine_like(real)
    difference = first_difference(steps, lambda: emulated().make(config), lambda: real.make({}))
    print(difference.sentence if difference else f"{len(steps)} steps, every answer equal")
    return 1 if difference else 0


def answers_of_emulator(steps: Sequence[Step]) -> list[Answer]:
    """What the emulator answers, set up as the host that the errno tables were seen on."""
    player = Player(emulated().make(AS_SEEN))
    try:
        return player.play_all(steps)
    finally:
        player.close()


def answers_as_host(steps: Sequence[Step]) -> list[Answer]:
    """What the real kernel answers; without one, the emulator."""
    from migsim.host_kvm.device import unavailable_reason

    if unavailable_reason() is not None:
        return answers_of_emulator(steps)
    player = Player(host().make({}))
    try:
        return player.play_all(steps)
    finally:
        player.close()
