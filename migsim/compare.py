"""Results side by side: one column a result, one row a question an operator asks."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from migsim import simulation
from migsim.perf.memstress import Memstress
from migsim.perf.profile import HostProfile, load_profile
from migsim.perf.rules import Rules, default_kernel, rules_for
from migsim.quantities import clock, in_words
from migsim.result import Result
from migsim.scenario import Scenario
from migsim.selftest.demand_paging import demand_paging_test
from migsim.units import NS_PER_MS, NS_PER_S, PAGE_SIZE

__all__ = ["MMUS", "Column", "by_mmu", "column", "table"]

MMUS: Final = ("shadow", "tdp-5.10", "tdp")
HOVERING_SYNCS: Final = 30  # so many rounds below a second: QEMU asks again and again and the answer is just no
TEXT_WIDTH: Final = 100
Row = tuple[str, Callable[[Result], str]]


@dataclass(frozen=True)
class Column:
    """A result and what it is called. extra: rows that no migration result holds, by label. why: its costs in words."""

    name: str
    result: Result
    extra: tuple[tuple[str, str], ...] = ()
    why: str = ""


def column(name: str, result: Result) -> Column:
    """A result as a column."""
    return Column(name, result)


def by_mmu(scenario: Scenario, *, seed: int = 0, verify: bool = True) -> Iterator[Column]:
    """The same migration of the same guest under each MMU, and what populating the guest took there."""
    host = load_profile(scenario.host.profile)
    for mmu in MMUS:
        chosen = msgspec.structs.replace(scenario, kvm=msgspec.structs.replace(scenario.kvm, mmu=mmu))
        result = simulation.run(chosen, seed=seed, verify=verify)
        yield Column(mmu, result, _populate(chosen, mmu, host), _why(chosen, result))


def _populate(scenario: Scenario, mmu: str, host: HostProfile) -> tuple[tuple[str, str], ...]:
    """demand_paging_test over the guest's populated memory, 4 KiB pages, all vCPUs at once."""
    guest = scenario.guest
    pages = max(guest.populated_pages // guest.vcpus, 1)
    run = demand_paging_test(Memstress(guest.vcpus, pages * PAGE_SIZE, mmu), host)
    return (
        ("populating it by demand paging (4 KiB)", _time(run.total_time_ns)),
        ("  of that, waiting for mmu_lock", _share(run.lock_waiting_share)),
    )


# -- where the costs come from -------------------------------------------------------------------------------------


def _why(scenario: Scenario, result: Result) -> str:
    """What this MMU did for the migration, by KVM's own counters and the rules its costs are charged by."""
    if scenario.kvm.accel != "kvm" or result.interrupted:
        return ""
    rules = rules_for(scenario.kvm.mmu, default_kernel(scenario.kvm.mmu))
    said = (_faults(rules, scenario, result), _logging(result), _clear(rules, result), _hovering(result))
    return "; ".join(part for part in said if part) + "."


def _faults(rules: Rules, scenario: Scenario, result: Result) -> str:
    slow = result.kvm["pf_taken"] - result.kvm["pf_fast"]
    if not slow:
        return "no store took mmu_lock"
    how = "together with others" if rules.shared_faults else "alone"
    huge = scenario.guest.backing != "4K" and not rules.split_on_fault
    zapped = ": a store below a huge page drops it, and its 4 KiB pages fault one by one" if huge else ""
    return f"{_many(slow)} faults took mmu_lock {how}{zapped}"


def _logging(result: Result) -> str:
    fast, logged = result.kvm["pf_fast"], result.kvm["operations"].get("pml_logged", 0)
    parts = [f"{_many(fast)} stores were let through without the lock"] if fast else []
    parts += [f"PML logged {_many(logged)} stores"] if logged else []
    return " and ".join(parts)


def _clear(rules: Rules, result: Result) -> str:
    pages, held = int(result.host.get("rearmed-pages", 0)), float(result.host.get("lock-write-held-ns", 0))
    if not pages:
        return ""
    way = "through the reverse map, gfn by gfn" if rules.rmap else "by a walk from the root for every 64 pages"
    if rules.sets_page_dirty and not rules.rmap:
        way += ", with a touch of each struct page"
    splits = result.kvm["operations"].get("huge_page_split", 0)
    split = f", {_many(splits)} splits of huge pages included" if splits else ""
    return f"CLEAR held it {held / pages:.0f} ns a page, {way}{split}"


def _hovering(result: Result) -> str:
    """Many syncs say that what comes back during one is about what is sent until the next."""
    short = [row for row in result.rounds if not row.stopped and row.duration_ns < NS_PER_S]
    if len(short) < HOVERING_SYNCS:
        return ""
    new, sent = (sum(getattr(row, name) for row in short) // len(short) for name in ("new_dirty_pages", "sent_pages"))
    limit = result.rounds[-1].threshold_bytes // PAGE_SIZE
    return (
        f"{len(short)} of its syncs are less than a second apart: about {_many(new)} pages were dirtied from one to the"
        f" next and {_many(sent)} sent, so what was left stayed near the {_many(limit)} that may be left"
    )


def _many(n: int) -> str:
    return f"{n / 1e6:,.1f} M" if n >= 1_000_000 else f"{n:,}"


# -- the table -----------------------------------------------------------------------------------------------------


def table(columns: Sequence[Column]) -> str:
    """All columns as aligned text, and below what is to say of each; a row that no column can fill is left out."""
    extra = [label for label, _ in columns[0].extra]
    rows = [[label, *(dict(c.extra).get(label, "-") for c in columns)] for label in extra]
    rows += [[label, *(say(c.result) for c in columns)] for label, say in _ROWS]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    cells = [["", *(c.name for c in columns)], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        f"{row[0]:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in cells
    ]
    said = [textwrap.fill(f"{c.name}: {c.why}", TEXT_WIDTH, subsequent_indent="  ") for c in columns if c.why]
    return "\n".join([*lines, *([""] if said else []), *said])


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


def _checked(result: Result) -> str:
    pages = result.verify.get("pages-checked")
    return "-" if pages is None else f"{pages:,}"


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
    ("pages compared at the destination", _checked),
    ("pages lost", lambda r: str(r.verify.get("lost-pages", "-"))),
)
