"""`Scenario`: one file, one question."""

from __future__ import annotations

from msgspec import Struct, field

from migsim.migration.capabilities import HostFeatures, check, check_migrate
from migsim.migration.parameters import QmpError
from migsim.scenario.errors import ScenarioError
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

    def __post_init__(self) -> None:
        """Capabilities that exclude each other are refused as QEMU refuses them, in its words."""
        host = HostFeatures(dirty_ring=self.kvm.dirty_ring_size > 0)
        migration = self.migration
        if self.guest.device and migration.compat == "7.2":
            raise ScenarioError("guest.device", 'VFIO migration is that of QEMU 8.1 and later; use compat = "10.0"')
        if migration.postcopy_recover_after is not None:
            self._check_recovery()
        try:
            check(migration.capabilities, migration.compat, host=host, parameters=migration.parameters())
            uri = "file:guest" if "mapped-ram" in migration.capabilities else "tcp:destination:49152"
            check_migrate(migration.capabilities, uri, migration.parameters(), migration.compat)
        except QmpError as error:
            raise ScenarioError("migration.capabilities", error.desc, value=list(migration.capabilities)) from None

    def _check_recovery(self) -> None:
        """A recovery needs a post-copy, a link that dies, and pages that are still there to be sent again."""
        on, after = self.migration.capabilities, self.migration.postcopy_recover_after
        for broken, problem in (
            ("postcopy-ram" not in on, 'needs the capability "postcopy-ram"'),
            (self.link.fail_at is None, 'needs link.fail-at, the time at which the connection dies'),
            ("release-ram" in on, 'cannot be: with "release-ram" the source gave away what it had sent'),
        ):
            if broken:
                raise ScenarioError("migration.postcopy-recover-after", problem, value=after)
