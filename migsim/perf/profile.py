"""Host profiles: what a machine is and what each named operation costs on it, every number with its source.

A profile is a TOML file in `configs/hosts` (also of an installed migsim: the package holds a link to `configs`, and a
wheel the files); one that names a `base` inherits every number it does not state itself.
Numbers are tables: `{ value = ..., source = "..." }` for the machine, `{ ns = ..., lines = ..., source = "..." }` for
an operation: `ns` of work the CPU does alone and `lines`, contended cache lines it fetches from another CPU on the way.
A source is a commit, a mail, a measurement, or begins with "assumed"; one that was fitted says to which figure.
"""

from __future__ import annotations

import difflib
import math
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import msgspec

__all__ = [
    "DEFAULT_PROFILE",
    "Cost",
    "HostProfile",
    "Machine",
    "ProfileError",
    "Quantity",
    "available_profiles",
    "load_profile",
]

DEFAULT_PROFILE = "m2-ultramem-416"
_DEPTH_MAX = 4
_BYTES_MAX = 1 << 20


class ProfileError(ValueError):
    """A host profile that cannot be used; the text is one sentence naming file and problem."""


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number of the machine and where it comes from."""

    value: float
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.value < math.inf or not self.source.strip():
            raise ValueError("a number needs a finite value >= 0 and a source")


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One operation: ns of private work, cache lines taken from other CPUs, and the source of both."""

    source: str
    ns: float = 0.0
    lines: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.ns < math.inf and 0 <= self.lines < math.inf and self.source.strip()):
            raise ValueError("a cost needs finite ns >= 0, lines >= 0 and a source")


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """The hardware. Latencies in ns, memory_bandwidth and nic in bytes/s; smt_slowdown: with all threads busy, >= 1."""

    sockets: Quantity
    cores_per_socket: Quantity
    threads_per_core: Quantity
    numa_nodes: Quantity
    smt_slowdown: Quantity
    line_local_ns: Quantity
    line_remote_ns: Quantity
    memory_bandwidth: Quantity
    nic: Quantity

    def __post_init__(self) -> None:
        for name in (
            "sockets",
            "cores_per_socket",
            "threads_per_core",
            "numa_nodes",
            "smt_slowdown",
            "memory_bandwidth",
        ):
            if getattr(self, name).value < (1 if name != "memory_bandwidth" else 1e6):
                raise ValueError(f"{name.replace('_', '-')} is too small")

    @property
    def cores(self) -> int:
        """Physical cores of the host."""
        return int(self.sockets.value * self.cores_per_socket.value)

    @property
    def line_ns(self) -> float:
        """Mean time to take a modified cache line from a CPU chosen at random."""
        same = 1.0 / self.sockets.value
        return same * self.line_local_ns.value + (1.0 - same) * self.line_remote_ns.value

    def line_transfer_ns(self, contenders: int) -> float:
        """The same when `contenders` CPUs take turns: with probability 1/contenders it is still here."""
        return self.line_ns * (1.0 - 1.0 / max(contenders, 1))

    def slowdown(self, busy_threads: int) -> float:
        """How much slower private work runs with `busy_threads` busy: 1 up to one a core, then up to smt_slowdown."""
        cores = self.cores
        shared = min(max(busy_threads - cores, 0) / cores, 1.0) if self.threads_per_core.value > 1 else 0.0
        return 1.0 + (self.smt_slowdown.value - 1.0) * shared


class HostProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One host: what it is, and what each operation costs there."""

    name: str
    about: str
    machine: Machine
    costs: dict[str, Cost]

    def cost(self, op: str) -> Cost:
        """The cost of `op`; ProfileError when the profile has none."""
        try:
            return self.costs[op]
        except KeyError:
            close = difflib.get_close_matches(op, self.costs, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise ProfileError(f'{self.name}: no cost for operation "{op}"{hint}') from None

    def ns(self, op: str, contenders: int = 1) -> float:
        """ns of one `op`: its work and its line transfers with `contenders` CPUs doing the same."""
        cost = self.cost(op)
        return cost.ns + cost.lines * self.machine.line_transfer_ns(contenders)


def available_profiles() -> list[str]:
    """Names of the profiles that come with migsim."""
    return sorted(path.stem for path in _directory().glob("*.toml"))


def load_profile(name: str = "default") -> HostProfile:
    """A profile by name, or by the path of a .toml file, relative to the working directory.

    "default" is the host of the published 416-vCPU figures.

    Raises ProfileError for an unknown name, an unreadable file, or one that is not a profile.
    """
    data = _merged(DEFAULT_PROFILE if name == "default" else name, _DEPTH_MAX)
    try:
        return msgspec.convert(data, HostProfile)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{name}: not a host profile: {error}") from None


def _directory() -> Path:
    return Path(__file__).resolve().parents[1] / "configs" / "hosts"


def _merged(name: str, depth: int) -> dict[str, Any]:
    named = not name.endswith(".toml") and os.sep not in name
    path = _directory() / f"{name}.toml" if named else Path(name)
    try:
        data = tomllib.loads(_text(path))
    except FileNotFoundError:
        known = ["default", *available_profiles()]
        close = difflib.get_close_matches(name[:64], known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}, or the path of a .toml file"
        where = "" if named else " (a path is relative to the working directory)"
        raise ProfileError(f'no host profile "{name}"{where}; {hint}') from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ProfileError(f"{path}: is nested too deeply to be a host profile") from None
    except ValueError as error:  # a NUL in the name, no UTF-8, no TOML, absurdly long digits
        raise ProfileError(f"{path}: is not a host profile: {' '.join(str(error).split())[:200]}") from None
    base = data.pop("base", None)
    if base is None:
        return data
    if depth == 0 or not isinstance(base, str):
        raise ProfileError(f"{path}: base must be the name of a profile, at most {_DEPTH_MAX} deep")
    inherited = _merged(base, depth - 1)
    tables = {key: {**_table(path, inherited, key), **_table(path, data, key)} for key in ("machine", "costs")}
    return {**inherited, **data, **tables}


def _text(path: Path) -> str:
    """What a profile's file holds. Raises OSError, or ValueError for what is no file of a profile's size."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a directory, a FIFO or a device
        raise ValueError("it is not a regular file")
    with path.open("rb") as stream:
        raw = stream.read(_BYTES_MAX + 1)
    if len(raw) > _BYTES_MAX:
        raise ValueError(f"it is longer than {_BYTES_MAX} bytes")
    return raw.decode("utf-8")


def _table(path: Path, data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise ProfileError(f"{path}: {key} must be a table")
    return value
