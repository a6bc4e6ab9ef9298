"""A mapping to a struct: unknown keys with the nearest known one, unit text to numbers, then msgspec's conversion.

The walk follows the structs' own annotations, so a new field needs no line here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from migsim.quantities import PARSERS, in_words
from migsim.scenario.errors import ScenarioError, nearest, shown

__all__ = ["convert", "is_text", "quantity_of"]

T = TypeVar("T", bound=msgspec.Struct)

_WORDS: Final = {
    "int": "a whole number", "float": "a number", "str": "text in quotes", "bool": "true or false",
    "array": "a list", "object": "a table", "null": "null",
}  # fmt: skip
_SAID_AS: Final = {
    "size": "size", "duration": "duration", "bandwidth": "rate", "link-rate": "rate", "write-rate": "rate",
}  # fmt: skip
_AT: Final = re.compile(r" - at `\$(?P<path>.*)`$")
_LIMIT: Final = re.compile(r"Expected `(?P<type>\w+)` (?P<op>[<>]=?) (?P<limit>\S+)$")
_TYPE: Final = re.compile(r"Expected `(?P<want>[\w |]+)`, got `(?P<got>\w+)`$")
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>.+)`$")


def convert(data: Mapping[str, Any], kind: type[T]) -> T:
    """`data` as a `kind`. Raises ScenarioError with the dotted path of the field."""
    plain = _plain(data, kind, "")
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise _translated(error, data, kind) from None


def quantity_of(annotation: Any) -> str | None:
    """The unit-bearing quantity an annotation names, or None."""
    for part in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
        if get_origin(part) is Annotated:
            for meta in part.__metadata__:
                if isinstance(meta, msgspec.Meta) and meta.extra and "quantity" in meta.extra:
                    return str(meta.extra["quantity"])
    return None


def is_text(kind: type[msgspec.Struct], keys: Sequence[str]) -> bool:
    """Is what the dotted `keys` name below `kind` a text, or one of some texts, without a unit?"""
    annotation = _annotation(kind, keys)
    core = _core(annotation)
    choices = get_args(core) if get_origin(core) is Literal else ()
    return quantity_of(annotation) is None and (core is str or any(isinstance(choice, str) for choice in choices))


def _annotation(kind: Any, keys: Sequence[str]) -> Any:
    """What stands at the dotted `keys` below `kind`; None where nothing does."""
    annotation = kind
    for key in keys:
        annotation = _member(_core(annotation), key)
    return annotation


def _member(kind: Any, key: str) -> Any:
    """The annotation of `key` in a struct or a tuple, None for what has no such member."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}.get(key)
    if get_origin(kind) is tuple and key.isdecimal():
        return get_args(kind)[0]
    return None


def _plain(value: Any, annotation: Any, path: str) -> Any:
    """`value` with its unit texts turned into numbers; wrong types are left for msgspec to name."""
    kind = _core(annotation)
    quantity = quantity_of(annotation)
    if quantity is not None:
        try:
            return PARSERS[quantity](value)
        except ValueError as error:
            raise ScenarioError(path, str(error), value=value) from None
    if get_origin(kind) is Literal:
        _check_choice(value, get_args(kind), path)
    elif get_origin(kind) is tuple and isinstance(value, list):
        members = get_args(kind)
        return [
            _plain(item, members[0] if members[-1] is ... else members[min(i, len(members) - 1)], _join(path, i))
            for i, item in enumerate(value)
        ]
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, Mapping):
        known = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        for name in value:
            if name not in known:
                raise ScenarioError(_join(path, name), f"is not a known key{nearest(name, known)}")
        return {name: _plain(item, known[name], _join(path, name)) for name, item in value.items()}
    return value


def _core(annotation: Any) -> Any:
    """The annotation without Annotated and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _core(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        return _core(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _check_choice(value: Any, choices: tuple[Any, ...], path: str) -> None:
    if value in choices and isinstance(value, str):
        return
    listed = ", ".join(shown(choice) for choice in choices)
    hint = nearest(value, choices) if isinstance(value, str) else ""
    raise ScenarioError(path, f"must be one of {listed}{hint if 'did you' in hint else ''}", value=value)


def _join(path: str, name: object) -> str:
    text = str(name)
    safe = text if text.isascii() and text.isprintable() and len(text) <= 64 else shown(text)
    return f"{path}.{safe}" if path else safe


def _translated(error: msgspec.ValidationError, data: Mapping[str, Any], kind: type) -> ScenarioError:
    """msgspec's report in the user's words."""
    match = _AT.search(str(error))
    path = re.sub(r"\[(\d+)\]", r".\1", match["path"]).strip(".") if match else ""
    if isinstance(error.__cause__, ScenarioError):
        return error.__cause__.within(path, "")
    text = _AT.sub("", str(error))
    if missing := _MISSING.match(text):
        return ScenarioError(_join(path, missing["name"]), "is missing")
    value = _lookup(data, path)
    if limit := _LIMIT.match(text):
        quantity = quantity_of(_annotation(kind, path.split(".")))
        return ScenarioError(path, f"must be {limit['op']} {_with_unit(limit['limit'], quantity)}", value=value)
    if wrong := _TYPE.match(text):
        want = " or ".join(_WORDS.get(t.strip(), t.strip()) for t in wrong["want"].split("|"))
        return ScenarioError(path, f"expected {want}", value=value)
    return ScenarioError(path, text[0].lower() + text[1:], value=value)


def _with_unit(limit: str, quantity: str | None) -> str:
    """A limit as it would be written in a scenario."""
    said = _SAID_AS.get(quantity or "")
    if said is not None and limit.isdecimal():
        return in_words(int(limit), said)
    return f"{limit} ms" if quantity == "milliseconds" else f"{limit} %" if quantity == "percent" else limit


def _lookup(data: Any, path: str) -> Any:
    for key in path.split(".") if path else ():
        if isinstance(data, Mapping):
            data = data.get(key)
        elif isinstance(data, list) and key.isdecimal() and int(key) < len(data):
            data = data[int(key)]
    return data
