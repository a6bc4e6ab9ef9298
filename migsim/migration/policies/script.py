"""QMP commands at times laid down beforehand, beside whatever platform watches the migration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from migsim.migration.policies.protocol import Command, Platform, Sample
from migsim.units import NS_PER_MS

__all__ = ["Scripted"]


@dataclass(slots=True)
class Scripted:
    """`commands`: (ns since the migrate command, command) in order of time; the platform keeps its own interval."""

    platform: Platform
    commands: Sequence[tuple[int, Command]]
    poll_interval_ns: int = NS_PER_MS
    given: int = 0
    next_poll_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self.next_poll_ns = self.platform.poll_interval_ns

    def before_migrate(self) -> tuple[Command, ...]:
        return (*self.platform.before_migrate(), *self._due(0))

    def poll(self, sample: Sample) -> tuple[Command, ...]:
        out = self._due(sample.now_ns)
        if sample.now_ns >= self.next_poll_ns:
            self.next_poll_ns = sample.now_ns + self.platform.poll_interval_ns
            out += self.platform.poll(sample)
        return out

    def _due(self, now_ns: int) -> tuple[Command, ...]:
        first = self.given
        while self.given < len(self.commands) and self.commands[self.given][0] <= now_ns:
            self.given += 1
        return tuple(command for _, command in self.commands[first : self.given])
