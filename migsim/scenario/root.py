"""`Scenario`: one file, one question."""

from __future__ import annotations

from msgspec import Struct, field

from migsim.migration.capabilities import HostFeatures, check, check_migrate
from migsim.migration.dirty_rate_commands import check_request, check_vcpu_limit
from migsim.migration.parameters import QmpError
from migsim.quantities import in_words
from migsim.scenario.dirty_rate import DirtyRateMeasurement, VcpuDirtyLimit, refused
from migsim.scenario.errors import ScenarioError
from migsim.scenario.guest import Guest
from migsim.scenario.host import Expect, Host, Kvm, Link, Storage
from migsim.scenario.migration import Migration
from migsim.units import NS_PER_S

__all__ = ["Scenario"]

_NOT_WITH_VFIO = {  # vfio_save_prepare; for post-copy from 8.2 on
    "background-snapshot": "background snapshot",
    "postcopy-ram": "postcopy migration",
}


class Scenario(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Everything a run depends on, except the seed. Hashable and comparable by value."""

    guest: Guest
    kvm: Kvm = field(default_factory=Kvm)
    migration: Migration = field(default_factory=Migration)
    link: Link = field(default_factory=Link)
    storage: Storage | None = None
    host: Host = field(default_factory=Host)
    calc_dirty_rate: tuple[DirtyRateMeasurement, ...] = ()
    set_vcpu_dirty_limit: tuple[VcpuDirtyLimit, ...] = ()
    expect: Expect | None = None

    def __post_init__(self) -> None:
        """Capabilities that exclude each other are refused as QEMU refuses them, in its words."""
        host = HostFeatures(dirty_ring=self.kvm.dirty_ring_size > 0)
        migration = self.migration
        if self.guest.device and migration.compat == "7.2":
            raise ScenarioError("guest.device", 'VFIO migration is that of QEMU 8.1 and later; use compat = "10.0"')
        for capability, what in _NOT_WITH_VFIO.items():
            if self.guest.device and capability in migration.capabilities:
                name = self.guest.device[0].name
                problem = f"QEMU refuses it: {name}: VFIO migration is not supported with {what}"
                raise ScenarioError("guest.device", problem, value=name)
        if migration.postcopy_recover_after is not None:
            self._check_recovery()
        try:
            check(migration.capabilities, migration.compat, host=host, parameters=migration.parameters())
            check_migrate(migration.capabilities, migration.migrate_uri, migration.parameters(), migration.compat)
        except QmpError as error:
            raise ScenarioError("migration.capabilities", error.desc, value=list(migration.capabilities)) from None
        self._check_transport()
        self._check_measurements()
        self._check_limits()

    def _check_transport(self) -> None:
        """What a file cannot do, and what is not emulated."""
        migration, uri = self.migration, self.migration.migrate_uri
        if uri.startswith("rdma:"):
            raise ScenarioError("migration.uri", "RDMA is not modelled here; tcp, unix and file are", value=uri)
        if not migration.to_file:
            if self.storage is not None:
                raise ScenarioError("storage", f'is what a "file:" uri writes to; migration.uri is "{uri}"')
            return
        answering = {"postcopy-ram", "return-path", "switchover-ack"} & set(migration.capabilities)
        for name in sorted(answering):
            problem = "needs a destination that answers; a file does not"
            raise ScenarioError("migration.capabilities", problem, value=name)
        if self.link.fail_at is not None:
            raise ScenarioError("link.fail-at", "a file has no connection that dies", value=self.link.fail_at)

    def _check_measurements(self) -> None:
        """calc-dirty-rate, one after the other, each refused as QEMU refuses it."""
        compat, ring, busy_until = self.migration.compat, self.kvm.dirty_ring_size > 0, 0
        for index, command in enumerate(self.calc_dirty_rate):
            field_ = f"calc-dirty-rate.{index}"
            try:
                check_request(command.request(), compat, dirty_ring=ring, measuring=command.at < busy_until)
            except QmpError as error:
                raise refused(field_, error, in_words(command.calc_time, "duration")) from None
            if compat == "7.2" and command.calc_time % NS_PER_S:
                raise ScenarioError(f"{field_}.calc-time", "is whole seconds in QEMU 7.2", value=command.calc_time)
            if compat == "7.2" and self.kvm.accel == "tcg" and command.mode != "page-sampling":
                raise ScenarioError(f"{field_}.mode", "QEMU 7.2 under TCG dies of it (SIGSEGV)", value=command.mode)
            busy_until = command.at + command.calc_time

    def _check_limits(self) -> None:
        """set-vcpu-dirty-limit."""
        for index, command in enumerate(self.set_vcpu_dirty_limit):
            try:
                check_vcpu_limit(command.cpu_index, self.guest.vcpus, dirty_ring=self.kvm.dirty_ring_size > 0)
            except QmpError as error:
                raise refused(f"set-vcpu-dirty-limit.{index}", error, command.cpu_index) from None

    def _check_recovery(self) -> None:
        """A recovery needs a post-copy, a link that dies, and pages that are still there to be sent again."""
        on, after = self.migration.capabilities, self.migration.postcopy_recover_after
        for broken, problem in (
            ("postcopy-ram" not in on, 'needs the capability "postcopy-ram"'),
            (self.link.fail_at is None, "needs link.fail-at, the time at which the connection dies"),
            ("release-ram" in on, 'cannot be: with "release-ram" the source gave away what it had sent'),
        ):
            if broken:
                raise ScenarioError("migration.postcopy-recover-after", problem, value=after)
