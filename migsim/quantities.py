"""Text with a unit to an integer: "12 TiB", "100 Gbit/s", "25000 pages/s", "300 ms", "30 %".

Every parser takes what TOML gives (a string or a number) and returns an int (a share: a float), or raises ValueError
with a sentence that says what is allowed. Arithmetic is on Fractions, so "0.1 s" is exactly 100 000 000 ns, and a value
that is not a whole number of the smallest unit is refused rather than rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Final

from migsim.units import GIB, KIB, MIB, NS_PER_MS, NS_PER_S, NS_PER_US, PAGE_SIZE, TIB

__all__ = [
    "PARSERS", "bandwidth", "clock", "counted", "duration", "in_words", "milliseconds", "percent", "share", "size",
    "write_rate",
]  # fmt: skip

# At most 20 digits before the point and 12 behind: a 64-bit number fits, and no text can cost much to convert.
_QUANTITY: Final = re.compile(r"\s*([+-]?)([0-9]{1,20}(?:_[0-9]{3})*)(?:\.([0-9]{1,12}))?\s*(\S(?:.{0,22}\S)?)?\s*")

_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "B": 1,
        "KiB": KIB,
        "MiB": MIB,
        "GiB": GIB,
        "TiB": TIB,
        "PiB": TIB << 10,
        "kB": 10**3,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "PB": 10**15,
    }
)
_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {"bit": 1, "kbit": 10**3, "Kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9, "Tbit": 10**12}
)
_PAGES: Final[Mapping[str, int]] = MappingProxyType(
    {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}
)
_TIMES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "ns": 1,
        "us": NS_PER_US,
        "µs": NS_PER_US,
        "ms": NS_PER_MS,
        "s": NS_PER_S,
        "min": 60 * NS_PER_S,
        "h": 3600 * NS_PER_S,
    }
)

_BYTE_RATE: Final = {f"{unit}/s": Fraction(n) for unit, n in _SIZES.items()}
_BIT_RATE: Final = {f"{unit}{per}": Fraction(n, 8) for unit, n in _BITS.items() for per in ("/s", "ps")}
# "25000 pages/s" and "10 M pages/s"; the blank between prefix and noun is optional.
_PAGE_RATE: Final = {
    f"{prefix}{gap}{noun}/s": Fraction(n * PAGE_SIZE)
    for prefix, n in _PAGES.items()
    for gap in ("", " ")
    for noun in ("page", "pages")
}

_SIZE_TEXT: Final = 'a size with a unit, such as "64 MiB", "1.5 TiB" or "40 GB"'
_BANDWIDTH_TEXT: Final = 'a bandwidth with a unit, such as "100 Gbit/s", "12.5 GB/s" or "128 MiB/s"'
_RATE_TEXT: Final = 'a rate with a unit, such as "25000 pages/s", "10 M pages/s" or "40 GB/s"'
_DURATION_TEXT: Final = 'a duration with a unit, such as "300 ms", "50 us", "10 s" or "2 h"'
_SHARE_TEXT: Final = 'a share from 0 to 1, such as 0.3 or "30 %"'
_PERCENT_TEXT: Final = 'a whole percentage, such as 30 or "30 %"'


def size(raw: object) -> int:
    """Bytes. A bare integer is bytes, as in QMP."""
    return _whole(raw, {k: Fraction(n) for k, n in _SIZES.items()}, _SIZE_TEXT, bare=True)


def bandwidth(raw: object) -> int:
    """Bytes a second. A bare integer is bytes a second, as in QMP; "1 GiB" without "/s" is read as QMP's size."""
    units = {**_BYTE_RATE, **_BIT_RATE, **{k: Fraction(n) for k, n in _SIZES.items()}}
    return _whole(raw, units, _BANDWIDTH_TEXT, bare=True)


def link_rate(raw: object) -> int:
    """Bytes a second, unit required: nobody should have to guess whether 100 is bits, bytes or gigabits."""
    return _whole(raw, {**_BYTE_RATE, **_BIT_RATE}, _BANDWIDTH_TEXT, bare=False)


def write_rate(raw: object) -> int:
    """Bytes a second, unit required; one page write a second is 4096 bytes a second."""
    return _whole(raw, {**_BYTE_RATE, **_PAGE_RATE}, _RATE_TEXT, bare=False)


def duration(raw: object) -> int:
    """Nanoseconds, unit required."""
    return _whole(raw, {k: Fraction(n) for k, n in _TIMES.items()}, _DURATION_TEXT, bare=False)


def milliseconds(raw: object) -> int:
    """Milliseconds: QMP's unit for times. A bare integer is milliseconds."""
    text = f"{_DURATION_TEXT}, or a whole number of milliseconds"
    return _whole(raw, {k: Fraction(n, NS_PER_MS) for k, n in _TIMES.items()}, text, bare=True)


def percent(raw: object) -> int:
    """Whole per cent: QMP's unit for throttles. A bare integer is per cent."""
    return _whole(raw, {"%": Fraction(1)}, _PERCENT_TEXT, bare=True)


def share(raw: object) -> float:
    """A float from 0 to 1."""
    value = float(_number(raw, {"%": Fraction(1, 100)}, _SHARE_TEXT, bare=True))
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"expected {_SHARE_TEXT}")
    return value


def size_or_share(raw: object) -> int | float:
    """Bytes (a string with a size unit) or a share of populated memory (a float, or "30 %")."""
    if isinstance(raw, float) or (isinstance(raw, str) and raw.rstrip().endswith("%")):
        return share(raw)
    try:
        return size(raw)
    except ValueError as error:
        raise ValueError(f"{error}, or {_SHARE_TEXT}") from None


#: The quantity a field's annotation names, to its parser.
PARSERS: Final[Mapping[str, Callable[[object], int | float]]] = MappingProxyType(
    {
        "size": size,
        "bandwidth": bandwidth,
        "link-rate": link_rate,
        "write-rate": write_rate,
        "duration": duration,
        "milliseconds": milliseconds,
        "percent": percent,
        "share": share,
        "size-or-share": size_or_share,
    }
)

#: Those of which a bare number is refused, but for 0.
UNIT_NEEDED: Final = frozenset({"link-rate", "write-rate", "duration"})

#: The same quantities in words, for the JSON Schema and for errors.
ALLOWED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "size": _SIZE_TEXT,
        "bandwidth": _BANDWIDTH_TEXT,
        "link-rate": _BANDWIDTH_TEXT,
        "write-rate": _RATE_TEXT,
        "duration": _DURATION_TEXT,
        "milliseconds": f"{_DURATION_TEXT}, or a whole number of milliseconds",
        "percent": _PERCENT_TEXT,
        "share": _SHARE_TEXT,
        "size-or-share": f"{_SIZE_TEXT}, or {_SHARE_TEXT}",
    }
)


_SAID: Final[Mapping[str, tuple[tuple[str, int], ...]]] = MappingProxyType(
    {
        "size": (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1)),
        "rate": (("TB/s", 10**12), ("GB/s", 10**9), ("MB/s", 10**6), ("kB/s", 10**3), ("B/s", 1)),
        "duration": (("h", 3600 * NS_PER_S), ("s", NS_PER_S), ("ms", NS_PER_MS), ("us", NS_PER_US), ("ns", 1)),
    }
)


def in_words(value: int, kind: str) -> str:
    """A size, rate (bytes/s) or duration (ns) for people, to four significant digits: '11.5 TiB', '300 ms'."""
    units = _SAID[kind]
    unit, factor = next(((u, f) for u, f in units if abs(value) >= f), units[-1])
    return f"{value / factor:,.4g} {unit}" if abs(value) < 9_999 * factor else f"{value / factor:,.0f} {unit}"


def clock(ns: int) -> str:
    """A time of a migration for people: '300 ms', '59.64 s', and from a minute on '20:40 min' or '2:05:10 h'."""
    if ns < 60 * NS_PER_S:
        return in_words(ns, "duration")
    minutes, seconds = divmod(ns // NS_PER_S, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} h" if hours else f"{minutes}:{seconds:02} min"


def counted(number: int, noun: str) -> str:
    """'1 round', '2 rounds'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _whole(raw: object, units: Mapping[str, Fraction], allowed: str, *, bare: bool) -> int:
    value = _number(raw, units, allowed, bare=bare)
    if value < 0:
        raise ValueError(f"it is negative; expected {allowed}")
    if value.denominator != 1:
        raise ValueError(f"it is not a whole number of its smallest unit; expected {allowed}")
    if value >= 1 << 64:
        raise ValueError(f"it does not fit in 64 bits; expected {allowed}")
    return int(value)


def _number(raw: object, units: Mapping[str, Fraction], allowed: str, *, bare: bool) -> Fraction:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError(f"expected {allowed}")
    if not isinstance(raw, str):
        if not bare and raw != 0:
            raise ValueError(f"the unit is missing; expected {allowed}")
        return _fraction(raw, allowed)
    match = _QUANTITY.fullmatch(raw)
    if match is None:
        raise ValueError(f"expected {allowed}")
    sign, whole, decimals, unit = match.groups()
    number = Fraction(f"{sign}{whole.replace('_', '')}.{decimals or 0}")
    if unit is None:
        if not bare and number != 0:
            raise ValueError(f"the unit is missing; expected {allowed}")
        return number
    if unit not in units:
        raise ValueError(f"unknown unit {unit!r}; expected {allowed}")
    return number * units[unit]


def _fraction(number: int | float, allowed: str) -> Fraction:
    try:
        return Fraction(str(number))  # through its text: 0.3 means three tenths
    except ValueError:  # inf, nan
        raise ValueError(f"expected {allowed}") from None
