"""The guest the bench runs: m2-ultramem-416, whole, doubled, or a fraction of it in the same shape.

A shape is a TOML text and --set settings. Memory, working sets, write rates and the link scale together, the page does
not: rounds keep their densities and their length. Only the tail does not scale (a sync of a larger guest takes longer,
and it writes faster meanwhile), so sizes are compared over the same few rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

from migsim.scenario import Scenario, parse
from migsim.units import PAGE_SIZE

__all__ = ["BUILT_IN", "Shape", "m2_ultramem"]

CONFIG: Final = Path(__file__).parents[2] / "configs" / "m2-ultramem-416.toml"
ROUNDS_MAX: Final = 40  # a run that no longer converges must not hold up the bench for hours
BLOCK: Final = 8 << 30  # sizes stay multiples of a chunk on each of eight NUMA nodes

BUILT_IN: Final = """
[guest]
name = "m2-ultramem-416"
memory = "12 TiB"
vcpus = 416
numa-nodes = 8
machine = "q35"
backing = "1G"
device-state = "64 MiB"

[[guest.workload]]
name = "transactions"
pattern = "hot-cold"
rate = "400000 pages/s"
working-set = "2 TiB"
hot-pages = "5 %"
hot-writes = "80 %"

[[guest.workload]]
name = "log"
pattern = "sequential"
rate = "400 MB/s"
working-set = "64 GiB"

[[guest.workload]]
name = "delta-merge"
pattern = "sequential"
rate = "300 MB/s"
working-set = "1 TiB"

[migration]
max-bandwidth = 0
capabilities = ["multifd"]
multifd-channels = 16
downtime-limit = "300 ms"
avail-switchover-bandwidth = "100 Gbit/s"
time-limit = "4 h"

[link]
bandwidth = "100 Gbit/s"
latency = "50 us"
"""


@dataclass(frozen=True)
class Shape:
    """A scenario as `migsim run - --set ...` takes it: TOML text and settings."""

    text: str
    settings: tuple[str, ...] = ()

    def scenario(self) -> Scenario:
        """The scenario itself."""
        return parse(self.text, self.settings)


def m2_ultramem(factor: Fraction = Fraction(1), *, rounds: int = ROUNDS_MAX) -> Shape:
    """The guest of configs/m2-ultramem-416.toml (built in where configs are not shipped) times `factor`; at most so
    many rounds."""
    text = CONFIG.read_text(encoding="utf-8") if CONFIG.is_file() else BUILT_IN
    whole = parse(text)
    limit = f"migration.round-limit={rounds}"
    if factor == 1:
        return Shape(text, (limit,))
    guest, link = whole.guest, whole.link
    out = [limit, f"guest.memory={_size(guest.memory * factor)}", f"link.bandwidth={_rate(link.bandwidth * factor)}"]
    for i, stream in enumerate(guest.workload):
        assert isinstance(stream.working_set, int), "resolved by the scenario"
        out.append(f"guest.workload.{i}.rate={_rate(stream.pages_per_s * PAGE_SIZE * factor)}")
        out.append(f"guest.workload.{i}.working-set={_size(stream.working_set * factor, PAGE_SIZE)}")
    switchover = whole.migration.avail_switchover_bandwidth
    out.append(f"migration.avail-switchover-bandwidth={_rate(switchover * factor)}")
    return Shape(text, tuple(out))


def _size(size: Fraction | int, multiple: int = BLOCK) -> str:
    return f"{max(multiple, int(size) // multiple * multiple)} B"


def _rate(bytes_per_s: Fraction | int) -> str:
    return f"{int(bytes_per_s)} B/s"
