"""The rows of `migsim bench`, what each should reach, and how a row is judged, printed and written.

A measure fills the rows of its group; one that cannot run raises `Missing` with the reason, and its rows say so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

__all__ = ["ROWS", "Measured", "Missing", "Report", "Row", "Spec", "judged", "lines", "selected", "to_json"]

Sense = Literal["at-most", "at-least"]


class Missing(Exception):
    """A row cannot be measured here; the text is the reason, one clause."""


@dataclass(frozen=True)
class Spec:
    """One row: which measure fills it (`group`), what the number is, and the number it should reach."""

    name: str
    group: str
    what: str
    target: float
    sense: Sense = "at-most"
    unit: str = "x"  # x: a plain ratio
    full_size: bool = False  # the target is for the full guest: --quick measures, but judges nothing


ROWS: Final[tuple[Spec, ...]] = (
    Spec("pace", "runs", "m2-ultramem-416: simulated seconds a wall second", 500, "at-least", "s/s", full_size=True),
    Spec("memory", "runs", "its peak RSS, bytes a page", 1.0, unit="B/page", full_size=True),
    Spec("lost-pages", "runs", "pages lost in any of the runs", 0, unit="pages"),
    Spec("dense-clear", "dense-clear", "dense CLEAR pass / memcpy of the same bytes", 1.5),
    Spec("kvm-clear", "kvm-clear", "real KVM_CLEAR_DIRTY_LOG / the emulated ioctl", 50, "at-least"),
    Spec("kvm-clear-fused", "kvm-clear", "real KVM_CLEAR_DIRTY_LOG / as the runs do it", 50, "at-least"),
    Spec("sparse-round", "sparse-round", "round at dirty density 1e-4 / dense round", 0.1),
    Spec("double-time", "runs", "24 TiB run / 12 TiB run, CPU time", 2.1, full_size=True),
    Spec("double-memory", "runs", "24 TiB run / 12 TiB run, peak RSS", 2.0, full_size=True),
    Spec("oracle", "runs", "ground truth on / off, CPU time", 1.5),
    Spec("pyroaring", "pyroaring", "harvest, OR, popcount / pyroaring, worst density", 1.2),
    Spec("help", "help", "migsim --help", 200, unit="ms"),
    Spec("compile", "compile", "first run after install: compiling", 15, unit="s"),
    Spec("compile-said", "compile", "first run says that it compiles", 1, "at-least", "yes"),
    Spec("total-time-median", "corpus", "real QEMU: total time, median error", 0.5, unit="%"),
    Spec("total-time-p95", "corpus", "real QEMU: total time, 95th percentile", 3.0, unit="%"),
    Spec("syncs", "corpus", "real QEMU: bitmap syncs, largest difference", 1, unit="syncs"),
    Spec("bytes-median", "corpus", "real QEMU: bytes sent, median error", 0.3, unit="%"),
    Spec("bytes-p95", "corpus", "real QEMU: bytes sent, 95th percentile", 3.0, unit="%"),
    Spec("downtime", "corpus", "real QEMU: downtimes off by over 20 % and 5 ms", 0, unit="runs"),
    Spec("verdict", "corpus", "real QEMU: wrong verdicts", 0, unit="runs"),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A number for one row. `detail`: what it was made from, JSON values."""

    number: float
    detail: Mapping[str, Any] = field(default_factory=dict)


class Row(Struct, frozen=True, kw_only=True, rename="kebab"):
    """One row of the report. Without a number, or unjudged (`met` null), `why` says the reason."""

    name: str
    what: str
    unit: str
    number: float | None
    target: float
    sense: Sense
    met: bool | None
    why: str = ""
    detail: dict[str, Any] = msgspec.field(default_factory=dict)


class Report(Struct, frozen=True, kw_only=True, rename="kebab"):
    """All rows, the machine they were measured on, and how long each group took to measure."""

    format: int = 1
    quick: bool
    machine: dict[str, Any]
    seconds: dict[str, float]
    rows: tuple[Row, ...]


def selected(names: Sequence[str]) -> tuple[Spec, ...]:
    """The rows of these names or groups, all of them for none. Raises KeyError with the first unknown name."""
    for name in names:
        if not any(name in (spec.name, spec.group) for spec in ROWS):
            raise KeyError(name)
    return tuple(spec for spec in ROWS if not names or spec.name in names or spec.group in names)


def judged(spec: Spec, found: Measured | str, *, quick: bool) -> Row:
    """The row for a number, or for the reason why there is none."""
    if isinstance(found, str):
        return _row(spec, None, None, found, {})
    if quick and spec.full_size:
        return _row(spec, found.number, None, "--quick: the target is for the full guest", found.detail)
    met = found.number <= spec.target if spec.sense == "at-most" else found.number >= spec.target
    return _row(spec, found.number, met, "", found.detail)


def _row(spec: Spec, number: float | None, met: bool | None, why: str, detail: Mapping[str, Any]) -> Row:
    return Row(
        name=spec.name, what=spec.what, unit=spec.unit, number=number, target=spec.target, sense=spec.sense, met=met,
        why=why, detail=dict(detail),
    )  # fmt: skip


def to_json(report: Report) -> bytes:
    """The report as indented JSON with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def lines(rows: Sequence[Row], columns: int = 100) -> Iterator[str]:
    """The table a person reads: what, measured, target, met or missed or why neither."""
    wide = max((len(row.what) for row in rows), default=0)
    yield f"{'':{wide}}  {'measured':>12}  {'target':>12}"
    for row in rows:
        number = "-" if row.number is None else _shown(row.number, row.unit)
        target = f"{'<=' if row.sense == 'at-most' else '>='} {_shown(row.target, row.unit)}"
        yield f"{row.what:{wide}}  {number:>12}  {target:>12}  {_verdict(row)}".rstrip()
        if row.why:
            yield from textwrap.wrap(row.why, columns, initial_indent="    ", subsequent_indent="    ")


def _verdict(row: Row) -> str:
    if row.met is None:
        return "not measured" if row.number is None else "not judged"
    return "met" if row.met else "MISSED"


def _shown(number: float, unit: str) -> str:
    if unit == "yes":
        return "yes" if number else "no"
    text = f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"
    return f"{text} {unit}" if unit in ("ms", "s", "%") else text
