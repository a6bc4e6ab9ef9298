"""A result as a person reads it at a glance, and the progress bar.

Verdict first; then a line a round; then what the blackout consists of; then counters. Fits the terminal's width.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from migsim.expectation import surprises
from migsim.quantities import clock, counted, in_words
from migsim.result import Progress, Result, Round
from migsim.units import NS_PER_MS, NS_PER_S, NS_PER_US, PAGE_SIZE

__all__ = ["ProgressBar", "summary"]

_ROUNDS_SHOWN: Final = 24
_BAR: Final = 24
_ROUNDS_TOLD: Final = 8  # by which the progress bar tells whether a run gets further
_PROGRESS: Final = 0.02  # less than that share between so many rounds is none
_STALLS: Final = "vcpu-stalls."  # and the upper bound of a class of stalls, us
_PLAIN_GROUPS: Final = ("memory", "operations")  # their members' names speak for themselves


def summary(result: Result, width: int | None = None) -> str:
    """The text of `migsim run`. `width`: columns; default the terminal's."""
    columns = width or shutil.get_terminal_size((100, 24)).columns
    parts = [
        textwrap.fill(result.verdict, columns),
        *(textwrap.fill(line, columns) for line in _expectation(result)),
        _rounds(result.rounds, columns),
        _downtime(result, columns),
        _dirty_rates(result, columns),
        _counters("Host", result.host, columns),
        _counters("KVM", result.kvm, columns),
        textwrap.fill(_verified(result), columns),
    ]
    return "\n\n".join(part for part in parts if part)


def _expectation(result: Result) -> Iterator[str]:
    if result.scenario.expect is None or result.interrupted:
        return
    wrong = surprises(result)
    yield f"Not as the scenario expected: {'; '.join(wrong)}." if wrong else "As the scenario expected."


# --- rounds

_Cell = Callable[[Round], str]
# Heading, what stands below it, and how dearly it is kept: the lowest goes first on a narrow terminal.
_COLUMNS: Final[tuple[tuple[str, _Cell, int], ...]] = (
    ("sync", lambda r: f"{r.sync}", 9),
    ("start", lambda r: _start(r.start_ns), 8),
    ("dirty", lambda r: _pages(r.dirty_pages), 9),
    ("sent", lambda r: _pages(r.sent_pages), 7),
    ("zero", lambda r: _pages(r.zero_pages), 3),
    ("rate", lambda r: f"{r.bandwidth * 8 / 1e9:.2f} Gbit/s" if r.bandwidth else "-", 6),
    ("threshold", lambda r: in_words(r.threshold_bytes, "size"), 4),
    ("expected downtime", lambda r: clock(r.expected_downtime_ms * NS_PER_MS), 5),
    ("throttle", lambda r: f"{r.cpu_throttle_percentage} %", 2),
)


def _rounds(rounds: Sequence[Round], columns: int) -> str:
    if not rounds:
        return ""
    throttled = any(r.cpu_throttle_percentage for r in rounds)
    shown = [c for c in _COLUMNS if c[0] != "throttle" or throttled]
    head, tail = _elided(rounds)
    lines = _table(shown, head + tail)
    while max(map(len, lines)) > columns and len(shown) > 3:
        shown.remove(min(shown, key=lambda c: c[2]))
        lines = _table(shown, head + tail)
    left_out = len(rounds) - len(head) - len(tail)
    if left_out:
        lines.insert(1 + len(head), f"... {counted(left_out, 'more round')} (all of them with --json) ...")
    return "\n".join(lines)


def _elided(rounds: Sequence[Round]) -> tuple[list[Round], list[Round]]:
    if len(rounds) <= _ROUNDS_SHOWN:
        return list(rounds), []
    return list(rounds[: _ROUNDS_SHOWN // 2]), list(rounds[-_ROUNDS_SHOWN // 2 :])


def _table(columns: Sequence[tuple[str, _Cell, int]], rounds: Sequence[Round]) -> list[str]:
    rows = [[name for name, _, _ in columns], *([cell(r) for _, cell, _ in columns] for r in rounds)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in rows]
    return [line + ("  stopped" if i and rounds[i - 1].stopped else "") for i, line in enumerate(lines)]


# --- downtime, counters


def _downtime(result: Result, columns: int) -> str:
    total = sum(part.duration_ns for part in result.downtime)
    if not result.downtime:
        return ""
    wide = max(len(part.name) for part in result.downtime)
    own = result.migration.get("downtime")
    title = "Stopped until saved" if result.file else "Blackout"
    lines = [f"{title} {clock(total)}" + ("" if own is None else f" (QEMU's own downtime: {own} ms)")]
    for part in result.downtime:
        share = part.duration_ns / total if total else 0.0
        line = f"  {part.name:<{wide}}  {clock(part.duration_ns):>9}  {share:6.1%}  "
        lines.append((line + "#" * round(share * _BAR) if len(line) + _BAR <= columns else line).rstrip())
    return "\n".join(lines)


def _dirty_rates(result: Result, columns: int) -> str:
    """What calc-dirty-rate answered, and what the guest really wrote meanwhile."""
    if not result.dirty_rate:
        return ""
    lines = textwrap.wrap("Dirty rate, MiB/s: as QEMU says; distinct pages and page writes as they were", columns)
    for found in result.dirty_rate:
        asked = f"  {found.reply['mode']}, {clock(found.elapsed_ns)} from {clock(found.at_ns)}"
        said = f"{found.reply['dirty-rate']:>9,}  {found.distinct_rate:>11,.1f}  {found.write_rate:>11,.1f}"
        row = f"{asked:<36}  {said}"
        lines += [row] if len(row) <= columns else [asked, f"    {said}"]
    return "\n".join(lines)


def _verified(result: Result) -> str:
    """The ground truth in a sentence."""
    if not result.verify:
        return "Ground truth: off (--no-verify)." if not result.interrupted else ""
    lost = result.verify.get("lost-pages", 0)
    checked, bits = (result.verify.get(name, 0) for name in ("pages-checked", "bits-verified"))
    if lost:
        return f"Ground truth: {lost:,} PAGES LOST: {', '.join(map(str, result.verify.get('first-lost-pages', ())))}."
    if not checked:
        return "Ground truth: none left over; pages counted, not followed."
    return f"Ground truth: no page lost; {checked:,} pages checked, {bits:,} bits verified."


def _counters(title: str, values: Mapping[str, Any], columns: int) -> str:
    """`name value` pairs in as many columns as fit; zeros, texts and assumed costs are left to the JSON."""
    pairs = {
        _named(name): _count(name, value)
        for name, value in _flat(values)
        if isinstance(value, int | float) and value and not name.startswith("assumed-ns.")
    }
    if not pairs:
        return ""
    names, numbers = max(map(len, pairs)), max(map(len, pairs.values()))
    cells = [f"  {name:<{names}} {number:>{numbers}}" for name, number in pairs.items()]
    across = max(1, min(3, columns // len(cells[0])))
    down = -(-len(cells) // across)
    lines = ["".join(cells[row::down]) for row in range(down)]
    return "\n".join([title, *lines])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix if name in _PLAIN_GROUPS else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _named(name: str) -> str:
    """The counter's own name; a unit that its value shows is left out."""
    if name.startswith(_STALLS):
        bound = name.removeprefix(_STALLS)
        return f"vCPU stalls {'above 1 s' if bound == 'more' else f'up to {clock(int(bound) * NS_PER_US)}'}"
    return name.removesuffix("-bytes").removesuffix("-ns")


def _count(name: str, value: float) -> str:
    if name.endswith("-bytes"):
        return in_words(int(value), "size")
    if name.endswith(("-ns", "_ns")):
        return clock(int(value))
    if name.endswith("-share"):
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _start(ns: int) -> str:
    """As `clock`, but rounds of a fraction of a second are told apart."""
    return clock(ns).replace(" ", f".{ns % NS_PER_S * 10 // NS_PER_S} ") if ns >= 60 * NS_PER_S else clock(ns)


def _pages(pages: int) -> str:
    return in_words(pages * PAGE_SIZE, "size")


class ProgressBar:
    """tqdm on stderr over simulated time; its end is estimated anew at every update. Nothing where not `enabled`."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, now: Progress) -> None:
        """Shows where the run stands."""
        if not self._enabled:
            return
        first = self._bar is None
        if first:
            from tqdm import tqdm

            form = "{desc} {percentage:3.0f}%|{bar}| {n:.0f} s simulated, {rate_fmt}, ETA {remaining}"
            self._bar = tqdm(total=1.0, unit="s", bar_format=form, leave=False, dynamic_ncols=True)
        self._bar.total = _end_estimate_s(now)
        self._bar.set_description_str(_stands(now), refresh=False)
        self._bar.update(now.now_ns / NS_PER_S - self._bar.n)  # draws ten times a second at most
        if first:
            self._bar.refresh()


def _shrinking(rounds: Sequence[Round]) -> bool:
    """Do the last rounds leave less than those before? True while there are too few of them to tell."""
    dirty = [r.dirty_pages for r in rounds[-2 * _ROUNDS_TOLD :]]
    return len(dirty) < 2 * _ROUNDS_TOLD or min(dirty[_ROUNDS_TOLD:]) < min(dirty[:_ROUNDS_TOLD]) * (1 - _PROGRESS)


def _stands(now: Progress) -> str:
    """Phase and sync; of a run that gets no further, also by how much the downtime it expects is too long."""
    stands = f"{now.phase}, sync {now.sync}"
    if _shrinking(now.rounds):
        return stands
    expected = min(r.expected_downtime_ms for r in now.rounds[-_ROUNDS_TOLD - 1 : -1])
    return f"{stands}, downtime {clock(expected * NS_PER_MS)}, limit {clock(now.downtime_limit_ms * NS_PER_MS)}"


def _end_estimate_s(now: Progress) -> float:
    """Simulated second at which the pages still dirty would all be sent, at the last round's (else the mean) rate.

    Where rounds no longer leave less than those before, nobody knows; the time-limit is what ends it at the latest.
    """
    seconds = now.now_ns / NS_PER_S
    if now.time_limit_ns is not None and not _shrinking(now.rounds):
        return max(seconds, now.time_limit_ns / NS_PER_S)
    rate = next((r.bandwidth for r in reversed(now.rounds) if r.bandwidth), 0.0)
    if not rate and seconds:
        rate = (now.total_bytes - now.remaining_bytes) / seconds
    return seconds + (now.remaining_bytes / rate if rate > 0 else seconds + 1.0)
