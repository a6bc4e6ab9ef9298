"""JSON Schema of a scenario, from the structs' annotations; unit-bearing fields also take their text form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

import msgspec

from migsim.quantities import ALLOWED, UNIT_NEEDED, in_words
from migsim.scenario.convert import quantity_of
from migsim.scenario.root import Scenario

__all__ = ["json_schema"]


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of what `migsim run` takes, as a dict of JSON's types."""
    schema = msgspec.json.schema(Scenario)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for kind in _structs(Scenario):
        properties = schema["$defs"][kind.__name__]["properties"]
        for field in msgspec.structs.fields(kind):
            quantity = quantity_of(field.type)
            if quantity is not None:
                properties[field.encode_name] = _with_text(properties[field.encode_name], quantity)
            else:
                _pair_with_text(properties[field.encode_name], field.type)
    result: dict[str, Any] = msgspec.to_builtins(schema)
    return result


def _with_text(number: dict[str, Any], quantity: str) -> dict[str, Any]:
    """The number, where one may stand without its unit, or text."""
    rest: dict[str, Any] = {name: number.pop(name) for name in ("default", "description") if name in number}
    if quantity in UNIT_NEEDED:
        number = {"const": 0}
        if isinstance(rest.get("default"), int):
            rest["default"] = in_words(rest["default"], "duration" if quantity == "duration" else "rate")
    return {"anyOf": [number, {"type": "string", "description": ALLOWED[quantity]}], **rest}


def _pair_with_text(schema: dict[str, Any], annotation: Any) -> None:
    """In place: the members of a tuple of quantities, such as the two bounds of [expect], may be text."""
    for part in get_args(annotation):
        if get_origin(part) is tuple:
            for array in (choice for choice in schema.get("anyOf", ()) if "prefixItems" in choice):
                kinds = [quantity_of(member) for member in get_args(part)]
                pairs = zip(array["prefixItems"], kinds, strict=True)
                array["prefixItems"] = [item if kind is None else _with_text(item, kind) for item, kind in pairs]


def _structs(kind: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """`kind` and every struct its fields mention."""
    seen: list[type[msgspec.Struct]] = []
    open_types: list[Any] = [kind]
    while open_types:
        current = open_types.pop()
        if isinstance(current, type) and issubclass(current, msgspec.Struct):
            if current not in seen:
                seen.append(current)
                yield current
                open_types += [field.type for field in msgspec.structs.fields(current)]
        else:
            open_types += get_args(current)
