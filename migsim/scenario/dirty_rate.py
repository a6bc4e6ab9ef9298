"""`[[calc-dirty-rate]]` and `[[set-vcpu-dirty-limit]]`: QMP's commands, and when they are given."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from migsim.migration.dirty_rate_commands import CalcDirtyRate, Mode
from migsim.migration.parameters import QmpError
from migsim.scenario.errors import ScenarioError
from migsim.scenario.fields import duration
from migsim.units import NS_PER_MS

__all__ = ["DirtyRateMeasurement", "VcpuDirtyLimit"]


class DirtyRateMeasurement(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """calc-dirty-rate on the scenario's guest while nobody migrates it. `at` is a moment of the workload's time."""

    calc_time: Annotated[int, duration("how long it measures; whole seconds in QEMU 7.2")]
    mode: Mode = "page-sampling"
    sample_pages: Annotated[int, Meta(ge=0, description="a GiB; page-sampling, default 512")] | None = None
    at: Annotated[int, duration("when the command is given")] = 0

    def __post_init__(self) -> None:
        if self.calc_time % NS_PER_MS:
            raise ScenarioError("calc-time", "must be a whole number of ms", value=self.calc_time)

    def request(self) -> CalcDirtyRate:
        """The command's arguments."""
        return CalcDirtyRate(self.calc_time // NS_PER_MS, self.mode, self.sample_pages)


class VcpuDirtyLimit(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """set-vcpu-dirty-limit: a quota of MB/s for one vCPU, or for all; 0 takes it away."""

    dirty_rate: Annotated[int, Meta(ge=0, le=(1 << 63) - 1, description="MB/s")]
    cpu_index: Annotated[int, Meta(ge=0)] | None = None
    at: Annotated[int, duration("since the migrate command")] = 0


def refused(field: str, refusal: QmpError, value: object) -> ScenarioError:
    """QEMU's refusal of a command, as a scenario's."""
    return ScenarioError(field, f"QEMU refuses it: {refusal.desc}", value=value)
