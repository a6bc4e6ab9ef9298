"""How a mutation is declared, and how something else gets into the place of a function of migsim.kvm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from migsim.kvm.vintage import Vintage

Make = Callable[[Any], Any]  # what is honest -> what takes its place


class Patch:
    """Changes functions wherever they were imported to, and columns of the vintages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def wrap(self, name: str, make: Make) -> None:
        """name: "module.function" or "module.Class.method". AttributeError or KeyError: there is no such thing."""
        module, *path = name.split(".")
        owner: Any = sys.modules[f"migsim.kvm.{module}"]
        for part in path[:-1]:
            owner = getattr(owner, part)
        honest = getattr(owner, path[-1])
        if len(path) > 1:
            self._monkeypatch.setattr(owner, path[-1], make(honest))
        else:
            self._replace(honest, make(honest))

    def _replace(self, honest: object, other: object) -> None:
        """In every module, tests included, and in tables such as tdp_log.DISABLE_FORMS."""
        for place in list(sys.modules.values()):
            for key, value in list(getattr(place, "__dict__", {}).items()):
                if value is honest:
                    self._monkeypatch.setattr(place, key, other)
                elif isinstance(value, dict) and not key.startswith("__"):
                    for entry in [entry for entry, held in value.items() if held is honest]:
                        self._monkeypatch.setitem(value, entry, other)

    def column(self, name: str, value: object) -> None:
        """Every row of vintage.VINTAGES has this value there."""
        self._monkeypatch.setattr(Vintage, name, property(lambda _: value, lambda *_: None))


class Mutation(NamedTuple):
    """`row`, `of`, `without`: see the package. `apply`: puts it in place."""

    row: str
    of: str
    without: str
    apply: Callable[[Patch], None]


MUTATIONS: list[Mutation] = []


def without(row: str, of: str, what: str, make: Make | None = None) -> Make:
    """`make` (or the function this decorates) gets the honest `of` and returns what takes its place."""

    def declare(make: Make) -> Make:
        MUTATIONS.append(Mutation(row, of, what, lambda patch: patch.wrap(of, make)))
        return make

    return declare if make is None else declare(make)


def inside(row: str, of: str, what: str, inner: str, make: Make) -> None:
    """The same with `inner`, which `of` needs."""
    MUTATIONS.append(Mutation(row, of, what, lambda patch: patch.wrap(inner, make)))


def gone(row: str, of: str, what: str, answer: object = None) -> None:
    """`of` does nothing and answers `answer`."""
    MUTATIONS.append(Mutation(row, of, what, lambda patch: patch.wrap(of, lambda _: lambda *_, **__: answer)))


def column(row: str, of: str, name: str, value: object, what: str) -> None:
    """The kernels of every vintage are as those where the column `name` is `value`."""
    MUTATIONS.append(Mutation(row, of, what, lambda patch: patch.column(name, value)))


def unflushed(honest: Any) -> Any:
    """The same with flushes that reach nobody, neither the whole VM's nor a range's."""

    def other(owner: Any, *args: Any, **more: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for flush in ("flush_remote_tlbs", "flush_gfn_range", "flush_remote_tlbs_memslot"):
                patch.setattr(owner.vm, flush, lambda *_: None)
            return honest(owner, *args, **more)

    return other


def told(field: str, value: object, *, at: int) -> Make:
    """The honest function while `field` of its argument `at` is `value`; it is as before afterwards."""

    def make(honest: Any) -> Any:
        def other(*args: Any) -> Any:
            kept = getattr(args[at], field)
            setattr(args[at], field, value)
            answer = honest(*args)
            setattr(args[at], field, kept)
            return answer

        return other

    return make
