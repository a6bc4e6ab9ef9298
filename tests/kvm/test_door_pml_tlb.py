"""PML buffers, the TLB, contents of memory, and the exits of a vCPU."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim.kvm.ioctl import KVM_EXIT_HLT, KVM_EXIT_MMIO, Vm, VmConfig
from migsim.kvm.memory import Memory
from migsim.kvm.pml import PML_LOG_NR_ENTRIES, PmlBuffer
from migsim.kvm.tlb import Tlb, Translation

PAGE = 4096
GPA = 0x200000


@given(st.integers(0, PML_LOG_NR_ENTRIES), st.booleans())
def test_a_pml_buffer_is_read_in_the_order_it_was_written(n: int, newest_first: bool) -> None:
    pml = PmlBuffer(newest_first)
    for i in range(n):
        assert not pml.full
        pml.log(i * PAGE + 123)
    assert len(pml) == n and pml.full == (n == PML_LOG_NR_ENTRIES)
    expected = [i * PAGE for i in range(n)]
    assert pml.pending() == (expected[::-1] if newest_first else expected)
    pml.reset()
    assert pml.pending() == [] and len(pml) == 0


def test_a_full_pml_buffer_exits_before_the_next_store_and_loses_nothing() -> None:
    with Vm() as vm:
        n = 1300
        vm.set_user_memory_region(1, 1, GPA, n * PAGE, vm.alloc_memory(n * PAGE))
        vcpu = vm.create_vcpu(0)
        ops = [("w", GPA + page * PAGE, 1) for page in range(n)]
        bitmap = np.zeros(-(-n // 64), dtype=np.uint64)
        vcpu.run(ops)
        vm.get_dirty_log(1, bitmap)
        exits = vcpu.stats_read()["exits"]
        faults = vcpu.stats_read()["pf_taken"]
        vcpu.run(ops)
        assert vcpu.stats_read()["pf_taken"] == faults, "with PML a store to a mapped page takes no fault"
        assert vcpu.stats_read()["exits"] - exits == n // 512 + 1
        vm.get_dirty_log(1, bitmap)
        assert int(np.bitwise_count(bitmap).sum()) == n


def test_pml_is_on_only_while_some_slot_logs_and_off_for_a_nested_guest() -> None:
    with Vm() as vm:
        hva = vm.alloc_memory(2 * PAGE)
        vm.set_user_memory_region(1, 0, GPA, PAGE, hva)
        vcpu = vm.create_vcpu(0)
        assert not vcpu.pml.enabled
        vm.set_user_memory_region(1, 1, GPA, PAGE, hva)
        assert vcpu.pml.enabled and vm.create_vcpu(1).pml.enabled
        vcpu.enter_guest_mode()
        vm.set_user_memory_region(1, 0, GPA, PAGE, hva)
        assert vcpu.pml.enabled and not vm.vcpus[1].pml.enabled, "put off until L2 is left"
        vcpu.leave_guest_mode()
        assert not vcpu.pml.enabled


def test_stores_of_a_nested_guest_are_logged_by_write_protection() -> None:
    with Vm() as vm:
        vm.set_user_memory_region(1, 1, GPA, 4 * PAGE, vm.alloc_memory(4 * PAGE))
        vcpu = vm.create_vcpu(0)
        vcpu.enter_guest_mode()
        bitmap = np.zeros(1, dtype=np.uint64)
        for _ in range(2):
            vcpu.run([("w", GPA + PAGE, 1)])
            assert len(vcpu.pml) == 0
            vm.get_dirty_log(1, bitmap)
            assert int(bitmap[0]) == 2
        vcpu.leave_guest_mode()
        vcpu.run([("w", GPA + 2 * PAGE, 1)])
        vm.get_dirty_log(1, bitmap)
        assert int(bitmap[0]) == 4
        assert not vm.invariants()


def test_the_tlb_answers_for_huge_translations_and_forgets_on_flush() -> None:
    tlb, root = Tlb(), object()
    tlb.insert(root, Translation(512, 2, 7 * 512, True, False))
    found = tlb.lookup(root, 1000)
    assert found is not None and found.pfn_of(1000) == 7 * 512 + 488 and not found.silent_store
    assert tlb.lookup(object(), 1000) is None and tlb.lookup(root, 1024) is None
    tlb.invalidate(root, 600)
    assert tlb.lookup(root, 1000) is None
    tlb.insert(root, Translation(5, 1, 9, True, True))
    assert len(tlb) == 1
    tlb.flush()
    assert len(tlb) == 0


@given(st.lists(st.tuples(st.integers(0, 4090), st.binary(min_size=1, max_size=6)), max_size=20))
def test_memory_reads_back_what_was_written(writes: list[tuple[int, bytes]]) -> None:
    memory, model = Memory(), bytearray(PAGE)
    for offset, data in writes:
        memory.write(3, offset, data)
        model[offset : offset + len(data)] = data
    assert memory.read(3, 0, PAGE) == bytes(model)
    assert memory.load(3, 8) == int.from_bytes(model[8:12], "little")
    memory.copy_page(3, 4)
    assert memory.read(4, 0, PAGE) == bytes(model)


@pytest.mark.parametrize("emulation", [False, True])
def test_loads_stores_atomics_and_mmio(emulation: bool) -> None:
    with Vm(VmConfig(instruction_emulation=emulation)) as vm:
        vm.set_user_memory_region(1, 1, GPA, 2 * PAGE, vm.alloc_memory(2 * PAGE))
        vcpu = vm.create_vcpu(0)
        exit = vcpu.run([("w", GPA + 4, 40), ("a", GPA + 4, 2), ("r", GPA + 4, 0), ("r", GPA, 0)])
        assert (exit.reason, exit.done, exit.data) == (KVM_EXIT_HLT, 4, (42, 0))
        exit = vcpu.run([("w", GPA, 1), ("w", 0x9000, 5), ("w", GPA, 2)])
        assert (exit.reason, exit.done) == (KVM_EXIT_MMIO, 1)
        assert exit.mmio is not None and exit.mmio.data == b"\5\0\0\0"
        exit = vcpu.run([("r", 0x9000, 0)])
        assert exit.mmio == (0x9000, False, bytes(4))
        with pytest.raises(ValueError, match="one page"):
            vcpu.run([("w", GPA + PAGE - 2, 1)])


def test_memory_the_host_does_not_have_is_efault_on_a_cpu_and_mmio_to_the_emulator() -> None:
    for emulation in (False, True):
        with Vm(VmConfig(instruction_emulation=emulation)) as vm:
            vm.set_user_memory_region(1, 0, GPA, PAGE, 0x5000)
            vcpu = vm.create_vcpu(0)
            if emulation:
                assert vcpu.run([("w", GPA, 1)]).reason == KVM_EXIT_MMIO
            else:
                with pytest.raises(OSError) as caught:
                    vcpu.run([("w", GPA, 1)])
                assert caught.value.errno == errno.EFAULT


def test_a_discarded_page_reads_as_zero_and_a_moved_one_keeps_its_contents() -> None:
    with Vm() as vm:
        hva = vm.alloc_memory(2 * PAGE)
        vm.set_user_memory_region(1, 0, GPA, 2 * PAGE, hva)
        vcpu = vm.create_vcpu(0)
        vcpu.run([("w", GPA, 1), ("w", GPA + PAGE, 2)])
        vm.host_discard(hva, PAGE)
        vm.user.replace(hva + PAGE, PAGE)
        assert vcpu.run([("r", GPA, 0), ("r", GPA + PAGE, 0)]).data == (0, 2)
        assert not vm.invariants()


def test_vcpu_ids_are_checked() -> None:
    with Vm() as vm:
        vm.create_vcpu(4095)
        for id, number in ((4095, errno.EEXIST), (4096, errno.EINVAL), (-1, errno.EINVAL)):
            with pytest.raises(OSError) as caught:
                vm.create_vcpu(id)
            assert caught.value.errno == number


def test_a_dead_vm_answers_eio_and_a_closed_one_ebadf() -> None:
    vm = Vm()
    vm.dead = True
    with pytest.raises(OSError) as caught:
        vm.check_extension(10)
    assert caught.value.errno == errno.EIO
    vm.close()
    with pytest.raises(OSError) as caught:
        vm.create_vcpu(0)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("emulation", [False, True])
def test_the_truth_hears_of_every_store_that_reached_memory(emulation: bool) -> None:
    with Vm(VmConfig(instruction_emulation=emulation)) as vm:
        vm.set_user_memory_region(1, 1, GPA, 3 * PAGE, vm.alloc_memory(3 * PAGE))
        vcpu = vm.create_vcpu(0)
        heard: list[int] = []
        vm.store_hook = lambda vcpu, slot, gfn: heard.append(gfn - (GPA >> 12))
        vcpu.run([("w", GPA, 1), ("a", GPA + PAGE, 1), ("r", GPA + 2 * PAGE, 0), ("w", 0x9000, 1)])
        assert heard == [0, 1]


def test_an_atomic_instruction_interrupted_by_mmio_stores_to_the_slot_that_has_come_meanwhile() -> None:
    with Vm(VmConfig(instruction_emulation=True)) as vm:
        vcpu = vm.create_vcpu(0)
        assert vcpu.run([("a", GPA, 5)]).reason == KVM_EXIT_MMIO
        vm.set_user_memory_region(1, 1, GPA, PAGE, vm.alloc_memory(PAGE))
        assert vcpu.run([("r", GPA, 0)]).data == (5,)
        bitmap = np.zeros(1, dtype=np.uint64)
        vm.get_dirty_log(1, bitmap)
        assert int(bitmap[0]) == 1
