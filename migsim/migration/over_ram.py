"""What stands between the loop and RAM: everything a data path does not change, passed through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from migsim.migration.loop_types import RamState

__all__ = ["OverRam"]

R = TypeVar("R", bound=RamState)


@dataclass
class OverRam(Generic[R]):
    """migration.loop_types.RamState over `ram`; a data path overrides what it does differently, `save` at least."""

    ram: R

    @property
    def dirty_pages(self) -> int:
        return self.ram.dirty_pages

    @property
    def total_bytes(self) -> int:
        return self.ram.total_bytes

    def sync(self) -> int:
        return self.ram.sync()

    def stop_vcpus(self) -> None:
        self.ram.stop_vcpus()

    def enter_last_stage(self) -> None:
        self.ram.enter_last_stage()

    def update_rates(self) -> None:
        self.ram.update_rates()

    def reply(self) -> dict[str, Any]:
        return self.ram.reply()

    def clear_ps(self) -> int:
        return self.ram.clear_ps()

    def get_ps(self) -> int:
        return self.ram.get_ps()

    def round_out(self, host_page: int) -> None:
        self.ram.round_out(host_page)

    def enter_postcopy(self) -> None:
        self.ram.enter_postcopy()

    def dirty_between(self, first: int, end: int) -> int:
        return self.ram.dirty_between(first, end)

    def dirty_runs(self) -> int:
        return self.ram.dirty_runs()
