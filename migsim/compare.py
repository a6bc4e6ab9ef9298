"""Results side by side: one column a result, one row a question an operator asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from migsim import simulation
from migsim.perf.memstress import Memstress
from migsim.perf.profile import HostProfile, load_profile
from migsim.quantities import clock, in_words
from migsim.result import Progress, Result
from migsim.scenario import Scenario
from migsim.selftest.demand_paging import demand_paging_test
from migsim.units import NS_PER_MS, PAGE_SIZE

__all__ = ["MMUS", "Column", "by_mmu", "column", "table"]

MMUS: Final = ("shadow", "tdp-5.10", "tdp")
Row = tuple[str, Callable[[Result], str]]


@dataclass(frozen=True)
class Column:
    """A result and what it is called. extra: rows that no migration result holds, by label."""

    name: str
    result: Result
    extra: tuple[tuple[str, str], ...] = ()


def column(name: str, result: Result) -> Column:
    """A result as a column."""
    return Column(name, result)


def by_mmu(
    scenario: Scenario, *, seed: int = 0, threads: int | None = None, verify: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Column]:  # fmt: skip
    """The same migration of the same guest under each MMU, and what populating the guest took there."""
    host = load_profile(scenario.host.profile)
    for mmu in MMUS:
        chosen = msgspec.structs.replace(scenario, kvm=msgspec.structs.replace(scenario.kvm, mmu=mmu))
        result = simulation.run(chosen, seed=seed, threads=threads, verify=verify, progress=progress)
        yield Column(mmu, result, _populate(chosen, mmu, host))


def _populate(scenario: Scenario, mmu: str, host: HostProfile) -> tuple[tuple[str, str], ...]:
    """demand_paging_test over the guest's populated memory, 4 KiB pages, all vCPUs at once."""
    guest = scenario.guest
    pages = max(guest.populated_pages // guest.vcpus, 1)
    run = demand_paging_test(Memstress(guest.vcpus, pages * PAGE_SIZE, mmu), host)
    return (
        ("populating it by demand paging (4 KiB)", _time(run.total_time_ns)),
        ("  of that, waiting for mmu_lock", _share(run.lock_waiting_share)),
    )


def table(columns: Sequence[Column]) -> str:
    """All columns as aligned text; a row that no column has anything for is left out."""
    extra = [label for label, _ in columns[0].extra]
    rows = [[label, *(dict(c.extra).get(label, "-") for c in columns)] for label in extra]
    rows += [[label, *(say(c.result) for c in columns)] for label, say in _ROWS]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    cells = [["", *(c.name for c in columns)], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        f"{row[0]:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in cells
    )


def _time(ns: float) -> str:
    return clock(round(ns))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _of_host(name: str, say: Callable[[Any], str]) -> Callable[[Result], str]:
    return lambda result: say(result.host[name]) if name in result.host else "-"


def _worst(say: Callable[[float], str], name: str, pick: Callable[[list[float]], float]) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        seen = [float(getattr(row, name)) for row in result.rounds if not row.stopped and row.duration_ns]
        return say(pick(seen)) if seen else "-"

    return cell


def _longest_stall(result: Result) -> str:
    stalls = result.host.get("vcpu-stalls", {})
    if not stalls:
        return "-"
    name = list(stalls)[-1]
    return "above 1 s" if name == "more" else f"up to {_time(int(name) * 1000)}"


def _memory(name: str) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        size = result.host.get("memory", {}).get(name, 0)
        return in_words(size, "size") if size else "-"

    return cell


def _blackout(result: Result) -> str:
    """From the first STOP to RESUME, as in the verdict."""
    return clock(sum(part.duration_ns for part in result.downtime)) if result.downtime else "-"


_ROWS: Final[tuple[Row, ...]] = (
    ("converges", lambda r: "yes" if r.converged else "no"),
    ("total time", lambda r: _time(int(r.migration.get("total-time", 0)) * NS_PER_MS)),
    ("bitmap syncs", lambda r: str(len(r.rounds))),
    ("blackout", _blackout),
    ("guest throughput while it migrates", _of_host("guest-throughput-share", _share)),
    ("  in its worst round", _worst(_share, "guest_throughput_share", min)),
    ("vCPU time waiting for mmu_lock", _of_host("lock-waiting-share", _share)),
    ("  in its worst round", _worst(_share, "lock_waiting_share", max)),
    ("longest vCPU stall", _longest_stall),
    ("mmu_lock held for write", _of_host("lock-write-held-ns", _time)),
    ("  longest hold", _of_host("longest-hold-ns", _time)),
    ("soft lockups", _of_host("soft-lockups", str)),
    ("migration thread CPU", lambda r: _time(sum(row.migration_thread_cpu_ns for row in r.rounds))),
    ("page tables", _memory("page-tables-bytes")),
    ("reverse maps", _memory("rmap-bytes")),
    ("pages lost", lambda r: str(r.verify.get("lost-pages", "-"))),
)
