"""MigrationParameters of QMP: every member with its type, range and default, and the refusals QEMU answers with.

Sources: qapi/migration.json and migration/options.c of QEMU 10.0 (2400fad57290), live conversations with 7.2.22. All
errors are GenericError. Two message families: the schema's use the dashed name ("Parameter 'x-y' expects uint8_t"),
the range checks' the underscored one ("Parameter 'x_y' expects an integer in the range of 1 to 99").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from migsim.units import KIB, MIB, PAGE_SIZE

__all__ = [
    "PARAMETERS", "Compat", "ParameterSpec", "QmpError", "check", "defaults", "merged", "parameters_of", "reply",
]  # fmt: skip

Compat = Literal["7.2", "10.0"]
Kind = Literal["uint8", "uint32", "uint64", "size", "bool", "enum", "str-or-null", "list"]

UINT64_MAX: Final = (1 << 64) - 1
DOWNTIME_LIMIT_MAX_MS: Final = 2_000_000
_BITS: Final = {"uint8": 8, "uint32": 32, "uint64": 64, "size": 64}


class QmpError(Exception):
    """A refused command as QMP answers it: `{"class": ..., "desc": ...}`."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class

    def answer(self) -> dict[str, str]:
        return {"class": self.error_class, "desc": self.desc}


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One member. low, high: accepted range of integers; applied_7_2: 7.2 takes it (unchecked) and forgets it."""

    name: str
    kind: Kind
    default: Any
    low: int = 0
    high: int = UINT64_MAX
    choices: tuple[str, ...] = ()
    since: str | None = None
    last: str | None = None
    expects: str = ""  # what the refusal says instead of "an integer in the range of"
    applied_7_2: bool = True

    def exists(self, compat: Compat) -> bool:
        return not ((compat == "7.2" and self.since) or (compat == "10.0" and self.last))

    @property
    def underscored(self) -> str:
        return self.name.replace("-", "_")


def _p(name: str, kind: Kind, default: Any, low: int = 0, high: int = UINT64_MAX, **rest: Any) -> ParameterSpec:
    return ParameterSpec(name, kind, default, low, high, **rest)


_COMPRESSIONS: Final = ("none", "zlib", "zstd", "qpl", "uadk", "qatzip")
_BANDWIDTH: Final = f"an integer in the range of 0 to {UINT64_MAX} bytes/second"
_DOWNTIME: Final = "an integer in the range of 0 to (2000 * 1000) ms"

_MAX_THROTTLE: Final = "an integer in the range of cpu_throttle_initial to 99"

#: In the order of query-migrate-parameters of 10.0.
PARAMETERS: Final[dict[str, ParameterSpec]] = {
    p.name: p
    for p in (
        _p("announce-initial", "size", 50, 0, 100_000, expects="a value between 0 and 100000"),
        _p("announce-max", "size", 550, 0, 100_000, expects="a value between 0 and 100000"),
        _p("announce-rounds", "size", 5, 0, 1000, expects="a value between 0 and 1000"),
        _p("announce-step", "size", 100, 1, 10_000, expects="a value between 0 and 10000"),
        _p("compress-level", "uint8", 1, 0, 9, last="9.0", expects="a value between 0 and 9"),
        _p("compress-threads", "uint8", 8, 1, 255, last="9.0", expects="a value between 1 and 255"),
        _p("compress-wait-thread", "bool", True, last="9.0"),
        _p("decompress-threads", "uint8", 2, 1, 255, last="9.0", expects="a value between 1 and 255"),
        _p("throttle-trigger-threshold", "uint8", 50, 1, 100),
        _p("cpu-throttle-initial", "uint8", 20, 1, 99),
        _p("cpu-throttle-increment", "uint8", 10, 1, 99),
        _p("cpu-throttle-tailslow", "bool", False),
        _p("tls-creds", "str-or-null", ""),
        _p("tls-hostname", "str-or-null", ""),
        _p("tls-authz", "str-or-null", ""),
        _p("max-bandwidth", "size", 128 * MIB, expects=_BANDWIDTH),
        _p("avail-switchover-bandwidth", "size", 0, since="8.2", expects=_BANDWIDTH),
        _p("downtime-limit", "uint64", 300, 0, DOWNTIME_LIMIT_MAX_MS, expects=_DOWNTIME),
        _p("x-checkpoint-delay", "uint32", 20_000, 0, (1 << 32) - 1),
        _p("block-incremental", "bool", False, last="9.0"),
        _p("multifd-channels", "uint8", 2, 1, 255, expects="a value between 1 and 255"),
        _p("multifd-compression", "enum", "none", choices=_COMPRESSIONS),
        _p("multifd-zlib-level", "uint8", 1, 0, 9, expects="a value between 0 and 9", applied_7_2=False),
        _p("multifd-qatzip-level", "uint8", 1, 1, 9, since="9.2", expects="a value between 1 and 9"),
        _p("multifd-zstd-level", "uint8", 1, 0, 20, expects="a value between 0 and 20", applied_7_2=False),
        _p(
            "xbzrle-cache-size", "size", 64 * MIB, PAGE_SIZE,
            expects="a power of two no less than the target page size",
        ),
        _p("max-postcopy-bandwidth", "size", 0, expects=_BANDWIDTH),
        _p("max-cpu-throttle", "uint8", 99, 1, 99, expects=_MAX_THROTTLE),
        _p("block-bitmap-mapping", "list", None),
        _p(
            "x-vcpu-dirty-limit-period", "uint64", 1000, 1, 1000, since="8.1",
            expects="a value between 1 and 1000",
        ),
        _p("vcpu-dirty-limit", "uint64", 1, 1, since="8.1", expects="is invalid, it must greater then 1 MB/s"),
        _p("mode", "enum", "normal", choices=("normal", "cpr-reboot", "cpr-transfer"), since="8.2"),
        _p("zero-page-detection", "enum", "multifd", choices=("none", "legacy", "multifd"), since="9.0"),
        _p("direct-io", "bool", False, since="9.1"),
    )
}  # fmt: skip
assert PARAMETERS["xbzrle-cache-size"].default == 64 * KIB * KIB


def parameters_of(compat: Compat) -> dict[str, ParameterSpec]:
    """The members that exist in that release."""
    return {name: spec for name, spec in PARAMETERS.items() if spec.exists(compat)}


def defaults(compat: Compat) -> dict[str, Any]:
    """What a fresh QEMU has; `block-bitmap-mapping` is absent until set."""
    return {name: spec.default for name, spec in parameters_of(compat).items() if spec.kind != "list"}


def merged(current: Mapping[str, Any], asked: Mapping[str, Any], compat: Compat) -> dict[str, Any]:
    """migrate-set-parameters: the new set, or QmpError and nothing changes."""
    known = parameters_of(compat)
    taken = dict(current)
    for name, value in asked.items():
        if name not in known:
            raise QmpError(f"Parameter '{name}' is unexpected")
        typed = _typed(known[name], value, compat)
        if compat != "7.2" or known[name].applied_7_2:
            taken[name] = typed
    check(taken, compat)
    return taken


def check(parameters: Mapping[str, Any], compat: Compat) -> None:
    """migrate_params_check over a whole set. Raises QmpError naming the parameter."""
    for name, spec in parameters_of(compat).items():
        value = parameters.get(name)
        if value is None or spec.kind not in _BITS:
            continue
        if not spec.low <= value <= spec.high or (name == "xbzrle-cache-size" and value & (value - 1)):
            raise _range_error(spec)
    low, high = parameters.get("cpu-throttle-initial"), parameters.get("max-cpu-throttle")
    if low is not None and high is not None and high < low:
        raise _range_error(PARAMETERS["max-cpu-throttle"])


def reply(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """query-migrate-parameters: null strings are reported empty, absent members are left out."""
    strings = {n for n, spec in PARAMETERS.items() if spec.kind == "str-or-null"}
    told = {n: "" if v is None and n in strings else v for n, v in parameters.items()}
    return {n: v for n, v in told.items() if v is not None}


def _range_error(spec: ParameterSpec) -> QmpError:
    if spec.name == "vcpu-dirty-limit":
        return QmpError(f"Parameter '{spec.underscored}' {spec.expects}")
    expects = spec.expects or f"an integer in the range of {spec.low} to {spec.high}"
    return QmpError(f"Parameter '{spec.underscored}' expects {expects}")


def _typed(spec: ParameterSpec, value: Any, compat: Compat) -> Any:
    """The value as the schema takes it. Integers of 64 bits wrap when negative, as 7.2 does with -1."""
    if spec.kind in _BITS:
        return _integer(spec, value)
    if spec.kind == "bool" and not isinstance(value, bool):
        raise QmpError(f"Invalid parameter type for '{spec.name}', expected: boolean")
    if spec.kind == "str-or-null" and not (value is None or isinstance(value, str)):
        raise QmpError(f"Invalid parameter type for '{spec.name}', expected: StrOrNull")
    if spec.kind == "enum":
        _choice(spec, value, compat)
    return value


def _choice(spec: ParameterSpec, value: Any, compat: Compat) -> None:
    if not isinstance(value, str):
        raise QmpError(f"Invalid parameter type for '{spec.name}', expected: string")
    new = compat == "7.2" and spec.name == "multifd-compression" and value in ("qpl", "uadk", "qatzip")
    if value not in spec.choices or new:
        raise QmpError(f"Parameter '{spec.name}' does not accept value '{value}'")


def _integer(spec: ParameterSpec, value: Any) -> int:
    bits = _BITS[spec.kind]
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 64:
        raise QmpError(f"Parameter '{spec.name}' expects uint64")  # the visitor's word before it narrows
    if bits == 64:
        return value % (1 << 64)
    if not 0 <= value < 1 << bits:
        raise QmpError(f"Parameter '{spec.name}' expects {spec.kind}_t")
    return value
