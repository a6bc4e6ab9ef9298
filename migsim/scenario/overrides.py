"""`--set a.b=c`: one value of a scenario, replaced before anything is checked.

The path is TOML's dotted keys, with numbers for the elements of a list (guest.workload.0.rate); the element one past
the end is appended. The value is TOML where it parses as one value (true, 3, [..], {..}) and plain text otherwise, so
that --set guest.memory="2 TiB" needs no quotes within quotes. Where the scenario has a text (migration.compat), what
would be a number or a truth value (7.2) is that text.
"""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec

from migsim.scenario.convert import is_text
from migsim.scenario.errors import ScenarioError

__all__ = ["apply"]


def apply(data: dict[str, Any], setting: str, kind: type[msgspec.Struct]) -> str:
    """Changes `data`, which is to become a `kind`, in place; returns the dotted path set.

    Raises ScenarioError with file "--set".
    """
    path, equals, text = setting.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ScenarioError("", "must look like guest.memory=2TiB", value=setting, file="--set")
    node: Any = data
    for depth, key in enumerate(keys[:-1]):
        node = _step(node, key, ".".join(keys[: depth + 1]), [] if keys[depth + 1].isdecimal() else {})
    value = _value(text.strip())
    if isinstance(value, bool | int | float) and is_text(kind, keys):
        value = text.strip()
    _store(node, keys[-1], value, ".".join(keys))
    return ".".join(keys)


def _step(node: Any, key: str, path: str, fresh: Any) -> Any:
    if isinstance(node, dict):
        return node.setdefault(key, fresh)
    if isinstance(node, list):
        index = _index(node, key, path)
        if index == len(node):
            node.append(fresh)
        return node[index]
    raise ScenarioError(path, "lies below a single value, not a table", file="--set")


def _store(node: Any, key: str, value: Any, path: str) -> None:
    if isinstance(node, dict):
        node[key] = value
    elif isinstance(node, list):
        index = _index(node, key, path)
        node[index : index + 1] = [value]
    else:
        raise ScenarioError(path, "lies below a single value, not a table", file="--set")


def _index(node: list[Any], key: str, path: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10) or int(key) > len(node):
        allowed = f"a number from 0 to {len(node)} stands here: this is a list of {len(node)}"
        raise ScenarioError(path, allowed, file="--set")
    return int(key)


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed.get("value")
    # A date, or text that smuggled in further keys, is text.
    plain = len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict)
    return value if plain else text
