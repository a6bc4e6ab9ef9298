"""MigrationCapabilities: the list, in query order, and which combinations QEMU refuses.

Sources: qapi/migration.json and migration/options.c (migrate_caps_check) of QEMU 10.0, conversations with 7.2.22.
migrate-set-capabilities is atomic: the merged set is checked, and a conflict changes nothing. All errors are
GenericError.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from migsim.migration.parameters import Compat, QmpError

__all__ = [
    "CAPABILITIES", "OTHER_LOOPS", "WITHOUT_EFFECT", "HostFeatures", "capabilities_of", "check", "check_migrate",
    "merged", "reply",
]  # fmt: skip

#: In enum order: name, first release with it, last one with it (None: older than 7.2, or still in 10.0).
CAPABILITIES: Final[tuple[tuple[str, str | None, str | None], ...]] = (
    ("xbzrle", None, None),
    ("rdma-pin-all", None, None),
    ("auto-converge", None, None),
    ("zero-blocks", None, None),
    ("compress", None, "9.0"),
    ("events", None, None),
    ("postcopy-ram", None, None),
    ("x-colo", None, None),
    ("release-ram", None, None),
    ("block", None, "9.0"),
    ("return-path", None, None),
    ("pause-before-switchover", None, None),
    ("multifd", None, None),
    ("dirty-bitmaps", None, None),
    ("postcopy-blocktime", None, None),
    ("late-block-activate", None, None),
    ("x-ignore-shared", None, None),
    ("validate-uuid", None, None),
    ("background-snapshot", None, None),
    ("zero-copy-send", None, None),
    ("postcopy-preempt", None, None),
    ("switchover-ack", "8.1", None),
    ("dirty-limit", "8.1", None),
    ("mapped-ram", "9.0", None),
)

#: Capabilities that QEMU accepts and that turn migration into another loop than any modelled here.
OTHER_LOOPS: Final[Mapping[str, str]] = {
    "x-colo": "COLO's checkpoints are not modelled here",
}

#: Capabilities and parameters that QEMU accepts and that have no effect here: on disks, on the destination's memory,
#: on who may connect, on announcements after the end, or on costs that a host profile carries.
WITHOUT_EFFECT: Final = frozenset({
    "rdma-pin-all", "zero-blocks", "block", "release-ram", "dirty-bitmaps", "x-ignore-shared",
    "announce-initial", "announce-max", "announce-rounds", "announce-step",
    "tls-hostname", "tls-authz", "block-bitmap-mapping", "block-incremental", "x-checkpoint-delay",
})  # fmt: skip

#: What background-snapshot cannot be combined with.
SNAPSHOT_CONFLICTS: Final = (
    "postcopy-ram", "dirty-bitmaps", "postcopy-blocktime", "late-block-activate", "return-path", "multifd",
    "pause-before-switchover", "auto-converge", "release-ram", "rdma-pin-all", "compress", "xbzrle", "x-colo",
    "validate-uuid", "zero-copy-send",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostFeatures:
    """What the host offers to the checks."""

    dirty_ring: bool = False  # the accelerator's dirty-ring-size is not 0


def capabilities_of(compat: Compat) -> list[str]:
    """Names in the order of query-migrate-capabilities."""
    return [n for n, since, last in CAPABILITIES if not ((compat == "7.2" and since) or (compat == "10.0" and last))]


def reply(on: Collection[str], compat: Compat) -> list[dict[str, Any]]:
    """query-migrate-capabilities: all of them, on or off."""
    return [{"state": name in on, "capability": name} for name in capabilities_of(compat)]


def merged(
    on: Collection[str], asked: Mapping[str, bool], compat: Compat, *, running: bool = False,
    host: HostFeatures = HostFeatures(), parameters: Mapping[str, Any] | None = None,
) -> frozenset[str]:  # fmt: skip
    """migrate-set-capabilities: the new set of those that are on, or QmpError and nothing changes."""
    if running:
        raise QmpError("There's a migration process in progress")
    known = capabilities_of(compat)
    for name in asked:
        if name not in known:
            raise QmpError(f"Parameter 'capability' does not accept value '{name}'")
    taken = frozenset(n for n in known if asked.get(n, n in on))
    check(taken, compat, host=host, parameters=parameters or {})
    return taken


def check(
    on: Collection[str], compat: Compat, *, host: HostFeatures = HostFeatures(),
    parameters: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """migrate_caps_check over a whole set. Raises QmpError at the first conflict, in QEMU's order."""
    for broken, text in _conflicts(frozenset(on), compat, host, parameters or {}):
        if broken:
            raise QmpError(text)


def _conflicts(
    on: frozenset[str], compat: Compat, host: HostFeatures, parameters: Mapping[str, Any]
) -> list[tuple[bool, str]]:
    """(conflict present, QEMU's text), in the order of the checks."""
    new = compat != "7.2"
    compressed = parameters.get("multifd-compression", "none") != "none"
    tls = bool(parameters.get("tls-creds"))
    snapshot = "background-snapshot" in on
    rows: list[tuple[bool, str]] = [
        ({"postcopy-ram", "x-ignore-shared"} <= on, "Postcopy is not compatible with ignore-shared"),
        (new and {"postcopy-ram", "multifd"} <= on, "Postcopy is not yet compatible with multifd"),
        *(
            (snapshot and name in on, f"Background-snapshot is not compatible with {name}")
            for name in SNAPSHOT_CONFLICTS
        ),
        (
            "zero-copy-send" in on and ("multifd" not in on or "xbzrle" in on or "compress" in on or compressed or tls),
            "Zero copy only available for non-compressed non-TLS multifd migration",
        ),
        ("postcopy-preempt" in on and "postcopy-ram" not in on, "Postcopy preempt requires postcopy-ram"),
        ({"postcopy-preempt", "compress"} <= on, "Postcopy preempt not compatible with compress"),
        ({"multifd", "compress"} <= on, "Multifd is not compatible with compress"),
        (
            "switchover-ack" in on and "return-path" not in on,
            "Capability 'switchover-ack' requires capability 'return-path'",
        ),
        (
            {"dirty-limit", "auto-converge"} <= on,
            "dirty-limit conflicts with auto-converge either of then available currently",
        ),
        (
            "dirty-limit" in on and not host.dirty_ring,
            "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set",
        ),
        (new and {"multifd", "xbzrle"} <= on, "Multifd is not compatible with xbzrle"),
        ({"mapped-ram", "xbzrle"} <= on, "Mapped-ram migration is incompatible with xbzrle"),
        ({"mapped-ram", "postcopy-ram"} <= on, "Mapped-ram migration is incompatible with postcopy"),
    ]  # fmt: skip
    return rows


def check_migrate(on: Collection[str], uri: str, parameters: Mapping[str, Any], compat: Compat) -> None:
    """What `migrate` itself refuses (10.0 checks before it touches the state). Raises QmpError."""
    scheme = uri.split(":", 1)[0]
    if scheme not in ("tcp", "unix", "exec", "fd", "file", "rdma", "vsock") or (scheme == "file" and compat == "7.2"):
        raise QmpError("Parameter 'uri' expects a valid migration protocol")
    if parameters.get("mode", "normal").startswith("cpr-"):
        conflicts = {"postcopy-ram": "postcopy", "dirty-bitmaps": "postcopy"}  # migrate_postcopy() asks for either
        conflicts |= {"background-snapshot": "background snapshot", "x-colo": "COLO"}
        for name, conflict in conflicts.items():
            if name in on:
                raise QmpError(f"Cannot use {conflict} with CPR")
    if "mapped-ram" in on:
        if parameters.get("tls-creds"):
            raise QmpError("Cannot use TLS with mapped-ram")
        if parameters.get("multifd-compression", "none") != "none":
            raise QmpError("Cannot use compression with mapped-ram")
        if scheme not in ("file", "fd"):
            raise QmpError("Migration requires seekable transport (e.g. file)")
    multi = scheme in ("tcp", "unix", "vsock") or (scheme == "file" and "mapped-ram" in on)
    if ("multifd" in on or "postcopy-preempt" in on) and not multi:
        raise QmpError("Migration requires multi-channel URIs (e.g. tcp)")
