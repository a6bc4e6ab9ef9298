"""Parameters and capabilities: defaults, ranges and refusals, as told in QAPI and by a real QEMU 7.2."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from migsim.migration import capabilities, parameters
from migsim.migration.parameters import QmpError

VALUES: tuple[Any, ...] = (
    -1, 0, 1, 2, 9, 10, 20, 21, 50, 99, 100, 101, 255, 256, 1000, 1001, 4095, 4096, 4097, 8192, 100000, 100001, 2000000,
    2000001, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1, 1 << 64, True, False, "x", "none", "zlib", "zstd",
    "qatzip", "", None, 1.5, [], "multifd",
)  # fmt: skip


def test_a_fresh_qemu_7_2_reports_exactly_these_parameters_and_capabilities(qemu: Any) -> None:
    assert parameters.reply(parameters.defaults("7.2")) == qemu.answer("query-migrate-parameters")["return"]
    assert capabilities.reply((), "7.2") == qemu.answer("query-migrate-capabilities")["return"]


@pytest.mark.parametrize("name", [*parameters.PARAMETERS, "bogus"])
def test_every_parameter_takes_and_refuses_what_qemu_7_2_does_in_its_words(qemu: Any, name: str) -> None:
    if name == "block-bitmap-mapping":
        pytest.skip("takes node names, which this machine has not")
    fresh = qemu.answer("query-migrate-parameters")["return"]
    for value in VALUES:
        current = qemu.answer("query-migrate-parameters")["return"]
        real = qemu.answer("migrate-set-parameters", **{name: value}).get("error")
        try:
            taken = parameters.merged(current, {name: value}, "7.2")
            assert real is None, (value, real)
            assert qemu.answer("query-migrate-parameters")["return"] == parameters.reply(taken), value
        except QmpError as refusal:
            assert refusal.answer() == real, value
        qemu.answer("migrate-set-parameters", **fresh)


def test_every_pair_of_capabilities_is_taken_or_refused_as_qemu_7_2_does(qemu: Any) -> None:
    names = capabilities.capabilities_of("7.2")
    off = [{"capability": name, "state": False} for name in names]
    for pair in itertools.combinations(names, 2):
        real = qemu.answer("migrate-set-capabilities", capabilities=[{"capability": n, "state": True} for n in pair])
        try:
            taken = capabilities.merged((), dict.fromkeys(pair, True), "7.2")
            assert "error" not in real, (pair, real)
            assert capabilities.reply(taken, "7.2") == qemu.answer("query-migrate-capabilities")["return"]
        except QmpError as refusal:
            assert refusal.answer() == real.get("error"), pair
        qemu.answer("migrate-set-capabilities", capabilities=off)


@pytest.mark.parametrize("compat", ["7.2", "10.0"])
def test_defaults_pass_their_own_checks(compat: parameters.Compat) -> None:
    parameters.check(parameters.defaults(compat), compat)
    capabilities.check((), compat)


def test_versions_bring_and_take_parameters() -> None:
    assert "compress-level" in parameters.defaults("7.2") and "compress-level" not in parameters.defaults("10.0")
    assert "zero-page-detection" in parameters.defaults("10.0") and "mode" not in parameters.defaults("7.2")
    assert "mapped-ram" in capabilities.capabilities_of("10.0")
    assert capabilities.capabilities_of("7.2").index("compress") == 4


def test_10_0_checks_the_levels_7_2_forgot_and_the_max_throttle_against_the_initial_one() -> None:
    fresh = parameters.defaults("10.0")
    with pytest.raises(QmpError, match="multifd_zlib_level' expects a value between 0 and 9"):
        parameters.merged(fresh, {"multifd-zlib-level": 10}, "10.0")
    with pytest.raises(QmpError, match="max_cpu_throttle"):
        parameters.merged(fresh, {"cpu-throttle-initial": 60, "max-cpu-throttle": 50}, "10.0")
    assert parameters.merged(fresh, {"max-bandwidth": -1}, "10.0")["max-bandwidth"] == (1 << 64) - 1


@pytest.mark.parametrize(
    "pair", [("postcopy-ram", "multifd"), ("multifd", "xbzrle"), ("mapped-ram", "xbzrle"), ("dirty-limit", "events")]
)
def test_10_0_refuses_these_pairs(pair: tuple[str, str]) -> None:
    with pytest.raises(QmpError) as refusal:
        capabilities.merged((), dict.fromkeys(pair, True), "10.0")
    assert refusal.value.answer()["class"] == "GenericError"


def test_a_refused_set_changes_nothing_and_a_running_migration_refuses_any() -> None:
    on = capabilities.merged((), {"events": True}, "10.0")
    with pytest.raises(QmpError):
        capabilities.merged(on, {"multifd": True, "xbzrle": True}, "10.0")
    assert on == {"events"}
    with pytest.raises(QmpError, match="in progress"):
        capabilities.merged(on, {"xbzrle": True}, "10.0", running=True)


def test_migrate_refuses_transports_that_cannot_carry_the_capabilities() -> None:
    with pytest.raises(QmpError, match="multi-channel"):
        capabilities.check_migrate({"multifd"}, "exec:cat", {}, "10.0")
    with pytest.raises(QmpError, match="seekable"):
        capabilities.check_migrate({"mapped-ram"}, "tcp:h:1", {}, "10.0")
    capabilities.check_migrate({"multifd", "mapped-ram"}, "file:/f", {}, "10.0")
