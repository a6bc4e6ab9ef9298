"""A migration's source driven by hand: the fused RAM of a guest past its bulk pass, with nothing dirty any more."""

from __future__ import annotations

import math
from typing import Any, Final

from migsim.fused import FusedRam
from migsim.host_costs import HostCosts
from migsim.migration.ram import NO_LIMITS, Ram
from migsim.qemu_costs import QemuCosts
from migsim.scenario import build
from migsim.units import PAGE_SIZE
from migsim.world import World, link_bytes_per_s

__all__ = ["Source"]

RATE: Final = 1_000_000  # page writes a second; only its product with time matters


class Source:
    """`pages` of guest memory and one write pattern. After construction every page is sent, clean and re-armed."""

    def __init__(self, pages: int, pattern: str, *, verify: bool) -> None:
        workload: dict[str, Any] = {"pattern": pattern}
        if pattern != "idle":
            workload["rate"] = f"{RATE} pages/s"
        guest = {"memory": f"{pages * PAGE_SIZE} B", "vcpus": 1, "backing": "1G", "workload": [workload]}
        scenario = build({"guest": guest, "link": {"bandwidth": "100 Gbit/s"}})
        costs = QemuCosts(scenario, HostCosts(scenario).priced())
        self.pages = pages
        self.world = World(scenario, costs, 0, bulk=True)
        save = costs.save(link_bytes_per_s(scenario, 0))
        ram = Ram(self.world.memory, self.world.vm, self.world.slot_ids, save, True, self._tick, with_bitmaps=False)
        self.ram = FusedRam(ram, self.world.kvm_slots, self.world.workload, self._now, 1, verify)
        self.world.log_start()
        self.world.stop()
        self.round()

    def _now(self) -> int:
        return self.world.workload.now_ns

    def _tick(self, elapsed_ps: int) -> None:
        self.world.run_until(self._now())

    def write(self, density: float) -> None:
        """The guest runs until a uniform stream has hit that share of its pages, or a sweep that share (1: all)."""
        sweep = density >= 1.0
        writes = self.pages * (density if sweep else -math.log1p(-density))
        self.world.resume()
        self.world.run_until(self._now() + math.ceil(writes * 1e9 / RATE))
        self.world.stop()

    def round(self) -> int:
        """Sync and send everything; the pages sent."""
        self.ram.sync()
        saved = self.ram.save(NO_LIMITS)
        assert self.ram.dirty_pages == 0, "a round left pages behind"
        return saved.normal + saved.duplicate
