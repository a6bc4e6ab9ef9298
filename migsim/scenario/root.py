"""`Scenario`: one file, one question."""

from __future__ import annotations

from msgspec import Struct, field

from migsim.scenario.guest import Guest
from migsim.scenario.host import Expect, Host, Kvm, Link
from migsim.scenario.migration import Migration

__all__ = ["Scenario"]


class Scenario(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Everything a run depends on, except the seed. Hashable and comparable by value."""

    guest: Guest
    kvm: Kvm = field(default_factory=Kvm)
    migration: Migration = field(default_factory=Migration)
    link: Link = field(default_factory=Link)
    host: Host = field(default_factory=Host)
    expect: Expect | None = None
