"""Zero pages: who looks for them, what a look costs whom, and what they cost on the stream.

Source: QEMU 10.0 migration/{ram,multifd-zero-page}.c. `zero-page-detection` (9.0): none sends every page whole;
legacy looks in the main thread and sends 9-byte records on the main stream; multifd (the default) looks in the channel
threads and lists zero pages in the packets, where offsets are paid for anyway. Without the capability multifd it means
legacy. Before 9.0 there is legacy alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from migsim.migration.wire import NORMAL_PAGE, ZERO_PAGE

__all__ = ["Detection", "ZeroPageRule", "rule_of"]

Detection = Literal["none", "legacy", "multifd"]


@dataclass(frozen=True, slots=True)
class ZeroPageRule:
    """looked_for: zero pages are recognised at all · on_channels: by channel threads · bytes: one on the stream."""

    looked_for: bool
    on_channels: bool
    bytes: int


def rule_of(detection: Detection, capabilities: Collection[str], compat: str) -> ZeroPageRule:
    """How this migration treats zero pages."""
    if compat == "7.2":
        detection = "legacy"
    if detection == "none":
        return ZeroPageRule(False, False, NORMAL_PAGE)
    if detection == "multifd" and "multifd" in capabilities:
        return ZeroPageRule(True, True, 0)
    return ZeroPageRule(True, False, ZERO_PAGE)
