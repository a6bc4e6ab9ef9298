"""The real /dev/kvm through HostVm: every errno and every quirk the emulator copies is first seen here."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migsim.host_kvm import HostUnavailable, HostVm, abi, unavailable_reason
from migsim.host_kvm.device import open_device
from migsim.host_kvm.guest_code import assemble
from migsim.host_kvm.mapping import Mapping
from migsim.kvm import uapi
from migsim.validate.script import Player
from migsim.validate.suites.errno_tables import GPA, LOG, TABLES, Row

REASON = unavailable_reason()
needs_kvm = pytest.mark.skipif(REASON is not None, reason=str(REASON))
PAGE = 4096
ROWS = [pytest.param(row, id=f"{name}: {row.title}") for name, rows in TABLES.items() for row in rows()]


@pytest.fixture
def vm() -> Iterator[HostVm]:
    with HostVm() as vm:
        yield vm


def bitmap_of(vm: HostVm, n_pages: int, slot: int = 1) -> list[int]:
    """The set pages of a slot's log."""
    words = np.zeros((n_pages + 63) // 64, np.uint64)
    vm.get_dirty_log(slot, words)
    return [i for i in range(n_pages) if int(words[i >> 6]) >> (i & 63) & 1]


@needs_kvm
@pytest.mark.parametrize("row", ROWS)
def test_the_real_kernel_answers_as_the_table_says(row: Row) -> None:
    if row.needs == "tdp":
        pytest.skip("a KVM without two-dimensional paging would allocate 16 GiB of rmap")
    with HostVm() as vm:
        if row.needs == "one-address-space" and vm.check_extension(uapi.KVM_CAP_MULTI_ADDRESS_SPACE) > 1:
            pytest.skip("this host has two address spaces (SMM)")
        player = Player(vm)
        player.play_all(row.setup)
        answer = player.play(row.step)
    if row.needs == "no-pml" and answer != row.answer and answer.error == "EINVAL":
        pytest.skip("this host's PML reserve makes the smallest ring larger")
    assert answer == row.answer


@needs_kvm
def test_stores_of_several_vcpus_at_once_all_reach_the_log(vm: HostVm) -> None:
    hva = vm.alloc_memory(256 * PAGE)
    vm.set_user_memory_region(1, LOG, GPA, 256 * PAGE, hva)
    vcpus = [vm.create_vcpu(i) for i in range(4)]
    work = {vcpu: [("w", GPA + (i * 4 + vcpu.id) * PAGE, i) for i in range(60)] for vcpu in vcpus}
    exits = vm.run_together(work)
    assert all(exit.reason == uapi.KVM_EXIT_HLT and exit.done == 60 for exit in exits.values())
    assert bitmap_of(vm, 256) == list(range(240))
    assert vm.host_read(hva + 239 * PAGE, 4) == (59).to_bytes(4, "little")


@needs_kvm
def test_one_run_executes_more_operations_than_the_control_slot_holds(vm: HostVm) -> None:
    vm.set_user_memory_region(1, LOG, GPA, 8 * PAGE, vm.alloc_memory(8 * PAGE))
    vcpu = vm.create_vcpu(0)
    ops = [("w", GPA + (i % 8) * PAGE, i) if i % 2 else ("r", GPA + (i % 8) * PAGE, 0) for i in range(30_000)]
    exit = vcpu.run(ops)
    assert (exit.reason, exit.done, len(exit.data)) == (uapi.KVM_EXIT_HLT, 30_000, 15_000)


@needs_kvm
def test_the_guest_loads_what_it_stored_and_locked_additions_are_logged(vm: HostVm) -> None:
    vm.set_user_memory_region(1, LOG, GPA, 8 * PAGE, vm.alloc_memory(8 * PAGE))
    vcpu = vm.create_vcpu(0)
    assert vcpu.run([("w", GPA, 41), ("r", GPA, 0)]).data == (41,)
    assert bitmap_of(vm, 8) == [0]
    assert vcpu.run([("a", GPA + PAGE, 5), ("a", GPA + PAGE, 6), ("r", GPA + PAGE, 0)]).data == (11,)
    assert bitmap_of(vm, 8) == [1]


@needs_kvm
def test_an_access_outside_every_slot_exits_with_mmio_and_counts_what_came_before(vm: HostVm) -> None:
    vm.set_user_memory_region(1, LOG, GPA, PAGE, vm.alloc_memory(PAGE))
    vcpu = vm.create_vcpu(0)
    outside = GPA + 64 * PAGE
    assert vcpu.run([("w", GPA, 1), ("w", outside, 2), ("w", GPA, 3)])[:2] == (uapi.KVM_EXIT_MMIO, 1)
    assert vcpu.run([("r", outside, 0), ("w", GPA, 3)])[:2] == (uapi.KVM_EXIT_MMIO, 0)
    assert vcpu.run([("r", GPA, 0)]) == (uapi.KVM_EXIT_HLT, 1, (1,))


@needs_kvm
def test_a_store_to_a_readonly_slot_exits_with_mmio_and_a_load_does_not(vm: HostVm) -> None:
    hva = vm.alloc_memory(PAGE)
    vm.host_write(hva, b"\x07\0\0\0")
    vm.set_user_memory_region(1, LOG | uapi.KVM_MEM_READONLY, GPA, PAGE, hva)
    vcpu = vm.create_vcpu(0)
    assert vcpu.run([("r", GPA, 0)]) == (uapi.KVM_EXIT_HLT, 1, (7,))
    assert vcpu.run([("w", GPA, 1)])[:2] == (uapi.KVM_EXIT_MMIO, 0)
    assert bitmap_of(vm, 1) == []


@needs_kvm
def test_the_vmms_own_store_is_not_logged(vm: HostVm) -> None:
    hva = vm.alloc_memory(PAGE)
    vm.set_user_memory_region(1, LOG, GPA, PAGE, hva)
    vm.host_write(hva, b"1234")
    assert bitmap_of(vm, 1) == []
    assert vm.create_vcpu(0).run([("r", GPA, 0)]).data == (int.from_bytes(b"1234", "little"),)


@needs_kvm
def test_the_clock_page_is_dirtied_by_kvm_at_the_next_entry(vm: HostVm) -> None:
    vm.set_user_memory_region(1, LOG, GPA, 4 * PAGE, vm.alloc_memory(4 * PAGE))
    vcpu = vm.create_vcpu(0)
    vcpu.set_msr(0x4B564D01, (GPA + 2 * PAGE) | 1)  # MSR_KVM_SYSTEM_TIME_NEW, enabled
    assert bitmap_of(vm, 4) == []
    vcpu.run([])
    assert bitmap_of(vm, 4) == [2]


@needs_kvm
def test_ring_entries_keep_slot_and_offset_after_reset_and_a_hole_stops_it(vm: HostVm) -> None:
    vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, 0, (65536,))
    vm.set_user_memory_region(5, LOG, GPA, 16 * PAGE, vm.alloc_memory(16 * PAGE))
    vcpu = vm.create_vcpu(0)
    vcpu.run([("w", GPA + i * PAGE, 1) for i in range(4)])
    ring = vcpu.ring
    assert [tuple(entry) for entry in ring.entries[:5]] == [(1, 5, 0), (1, 5, 1), (1, 5, 2), (1, 5, 3), (0, 0, 0)]
    ring.entries["flags"][1] = uapi.KVM_DIRTY_GFN_F_RESET
    assert vm.reset_dirty_rings() == 0
    ring.entries["flags"][0] = uapi.KVM_DIRTY_GFN_F_RESET | uapi.KVM_DIRTY_GFN_F_DIRTY
    assert vm.reset_dirty_rings() == 2
    assert [tuple(entry) for entry in ring.entries[:3]] == [(0, 5, 0), (0, 5, 1), (1, 5, 2)]


@needs_kvm
def test_reset_counts_an_entry_that_names_no_slot(vm: HostVm) -> None:
    vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, 0, (65536,))
    vm.set_user_memory_region(5, LOG, GPA, 16 * PAGE, vm.alloc_memory(16 * PAGE))
    vcpu = vm.create_vcpu(0)
    vcpu.run([("w", GPA, 1), ("w", GPA, 1)])
    for entry, bad in zip(vcpu.ring.entries[:2], ((2, 900, 3), (2, 5, 1 << 40)), strict=True):
        entry["flags"], entry["slot"], entry["offset"] = bad
    assert vm.reset_dirty_rings() == 2


@needs_kvm
def test_a_private_mapping_of_the_ring_is_refused(vm: HostVm) -> None:
    vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, 0, (65536,))
    vcpu = vm.create_vcpu(0)
    with pytest.raises(OSError) as refusal:
        Mapping(65536, fd=vcpu.fd, offset=abi.RING_MMAP_OFFSET, shared=False)
    assert refusal.value.errno == errno.EINVAL


@needs_kvm
def test_statistics_have_kvms_names(vm: HostVm) -> None:
    vm.set_user_memory_region(1, LOG, GPA, PAGE, vm.alloc_memory(PAGE))
    vcpu = vm.create_vcpu(0)
    vcpu.run([("w", GPA, 1)])
    assert {"pages_4k", "pages_2m", "pages_1g", "remote_tlb_flush"} <= vm.stats_read().keys()
    assert vcpu.stats_read()["exits"] >= 1


@needs_kvm
def test_a_forked_child_is_refused_with_eio(vm: HostVm) -> None:
    child = os.fork()
    if child == 0:
        code = 0
        try:
            vm.check_extension(uapi.KVM_CAP_NR_MEMSLOTS)
        except OSError as error:
            code = error.errno or 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == errno.EIO


@needs_kvm
def test_a_bitmap_shorter_than_the_slot_never_reaches_the_kernel(vm: HostVm) -> None:
    vm.set_user_memory_region(1, LOG, GPA, 65 * PAGE, vm.alloc_memory(65 * PAGE))
    with pytest.raises(ValueError, match="at least 2 words"):
        vm.get_dirty_log(1, np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match="at least 2 words"):
        vm.clear_dirty_log(1, 0, 65, np.zeros(1, np.uint64))


@needs_kvm
def test_nothing_is_left_open_or_mapped() -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("kvm")

    def use() -> None:
        with HostVm() as vm:
            vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, 0, (65536,))
            vm.set_user_memory_region(1, LOG, GPA, PAGE, vm.alloc_memory(PAGE))
            vm.create_vcpu(0).run([("w", GPA, 1)])

    use()
    before = held()
    use()
    forgotten = HostVm()
    forgotten.create_vcpu(0)
    del forgotten
    with pytest.raises(OSError, match="Invalid argument"), HostVm() as vm:
        vm.create_vcpu(0)
        vm.set_user_memory_region(1, 4, GPA, PAGE, 0)
    assert held() == before


@needs_kvm
def test_an_interrupt_ends_a_running_guest_and_closes_everything() -> None:
    program = (
        "import os, sys\n"
        "from migsim.host_kvm import HostVm\n"
        "ops = [('w', 0x100000, 1)] * 10_000\n"
        "try:\n"
        "    with HostVm() as vm:\n"
        "        vm.set_user_memory_region(1, 1, 0x100000, 4096, vm.alloc_memory(4096))\n"
        "        vcpu = vm.create_vcpu(0)\n"
        "        print('running', flush=True)\n"
        "        while True: vcpu.run(ops)\n"
        "except KeyboardInterrupt:\n"
        "    left = [os.readlink('/proc/self/fd/' + f) for f in os.listdir('/proc/self/fd') if int(f) > 2\n"
        "            and os.path.islink('/proc/self/fd/' + f)]\n"
        "    sys.exit(1 if any('kvm' in name for name in left) else 130)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"running\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=20) == 130
    child.stdout.close()


def test_a_missing_device_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailable, match=r"^no .*/kvm: "):
        open_device(str(tmp_path / "kvm"))


def test_a_file_that_is_not_kvm_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "kvm").write_bytes(b"")
    reason = unavailable_reason(str(tmp_path / "kvm"))
    assert reason is not None and "KVM_GET_API_VERSION" in reason


def test_a_refused_permission_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostUnavailable, match="no permission on /dev/kvm"):
        open_device()


def test_addresses_past_4_gib_are_refused_by_the_assembler() -> None:
    with pytest.raises(ValueError, match="below 4 GiB"):
        assemble([("w", 1 << 32, 0)], 0)
    with pytest.raises(ValueError, match="operation kind"):
        assemble([("x", 0, 0)], 0)
