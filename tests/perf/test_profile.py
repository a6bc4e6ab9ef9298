"""Host profiles: every number sourced, every operation the model charges priced, bad files refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from migsim.perf import phases
from migsim.perf.memstress import BACKING_LEVELS, Memstress
from migsim.perf.profile import ProfileError, available_profiles, load_profile
from migsim.perf.rules import MMUS


@pytest.mark.parametrize("name", ["default", *available_profiles()])
def test_every_number_has_a_source(name: str) -> None:
    profile = load_profile(name)
    machine = profile.machine
    quantities = [getattr(machine, field) for field in machine.__struct_fields__]
    assert all(len(number.source) > 6 for number in [*quantities, *profile.costs.values()])


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("backing", BACKING_LEVELS)
@pytest.mark.parametrize("manual", [0, 1, 3])
def test_every_operation_a_selftest_counts_has_a_price(mmu: str, backing: str, manual: int) -> None:
    vm = Memstress(2, 1 << 30, mmu, backing=backing, manual=manual, pml=manual != 1)
    enable, leaves = vm.enable()
    dirty, leaves = vm.dirty(leaves)
    get, leaves = vm.get(leaves)
    clear, leaves = vm.clear(leaves, first=True)
    host = load_profile()
    for thread in (enable, get, clear, vm.disable(leaves)):
        assert phases.thread_phase(thread, host).time_ns > 0
    for parallel in (vm.populate(), dirty):
        assert phases.parallel_phase(parallel, 2, "read", host).time_ns > 0


def test_more_sockets_make_a_contended_line_dearer() -> None:
    two, eight = load_profile("skylake-2s-96"), load_profile("m2-ultramem-416")
    assert two.machine.line_ns < eight.machine.line_ns
    assert two.ns("shadow-map", 96) < eight.ns("shadow-map", 96)


def test_hyperthreads_slow_each_other_only_once_cores_are_shared() -> None:
    machine = load_profile("skylake-2s-96").machine
    assert machine.slowdown(machine.cores) == 1.0
    assert machine.slowdown(machine.cores + 1) > 1.0
    assert machine.slowdown(2 * machine.cores) == machine.slowdown(10 * machine.cores) == machine.smt_slowdown.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "nowhere"', "no host profile"),
        ('base = "skylake-2s-96"\n[costs]\nvm-exit = { ns = -1, source = "assumed" }', "ns >= 0"),
        ('base = "skylake-2s-96"\n[costs]\nvm-exit = { ns = 1 }', "source"),
        ('base = "skylake-2s-96"\nmachine = 3', "machine must be a table"),
        ('base = "skylake-2s-96"\nspeed = 3', "speed"),
        ("name = ", "Invalid value"),
    ],
)
def test_a_bad_profile_is_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_operation_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ProfileError, match='did you mean "vm-exit"'):
        load_profile().ns("vm-exits")
