"""Annotations of scenario fields whose TOML form is text with a unit and whose Python form is a plain number.

`Annotated[int, size("...")]` is an int in bytes; `load` turns the text into it before the struct is built. Limits
that need nothing else (`ge`, `le`) stand in the annotation, so they hold for values built in Python through
`msgspec.convert` too and appear in the JSON Schema.
"""

from __future__ import annotations

from functools import partial

from msgspec import Meta

__all__ = [
    "bandwidth", "duration", "link_rate", "milliseconds", "percent", "share", "size", "size_or_share", "write_rate",
]  # fmt: skip


def _quantity(kind: str, about: str, *, ge: float | None = 0, le: float | None = None) -> Meta:
    return Meta(description=about, ge=ge, le=le, extra={"quantity": kind})


size = partial(_quantity, "size")  # int, bytes
bandwidth = partial(_quantity, "bandwidth")  # int, bytes/s; bare numbers are QMP's bytes/s
link_rate = partial(_quantity, "link-rate")  # int, bytes/s
write_rate = partial(_quantity, "write-rate")  # int, bytes/s; one page write a second is 4096
duration = partial(_quantity, "duration", le=1 << 62)  # int, ns; sums of two stay within 64 bits
milliseconds = partial(_quantity, "milliseconds")  # int, ms; bare numbers are QMP's ms
percent = partial(_quantity, "percent")  # int, per cent
share = partial(_quantity, "share", le=1)  # float, 0..1
size_or_share = partial(_quantity, "size-or-share", ge=None)  # int bytes, or float share
