"""JSON Schema of a scenario, from the structs' annotations; unit-bearing fields also take their text form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import msgspec

from migsim.quantities import ALLOWED
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
    result: dict[str, Any] = msgspec.to_builtins(schema)
    return result


def _with_text(number: dict[str, Any], quantity: str) -> dict[str, Any]:
    default = {"default": number.pop("default")} if "default" in number else {}
    return {"anyOf": [number, {"type": "string", "description": ALLOWED[quantity]}], **default}


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
