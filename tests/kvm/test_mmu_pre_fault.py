"""KVM_PRE_FAULT_MEMORY: what it maps, what it answers, and what it refuses."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from migsim.kvm.config import VmConfig
from migsim.kvm.uapi import KVM_CAP_PRE_FAULT_MEMORY

PAGE = 4096
SIMPLE = VmConfig(smm=False)


def refused(call) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("level", [1, 2])
def test_a_range_is_mapped_as_pages_nobody_has_touched(mmu_guest, level: int) -> None:
    guest = mmu_guest(SIMPLE, level=level, pages=1024)
    assert guest.vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY) == 1
    assert guest.vcpu.pre_fault_memory(510 * PAGE, 4 * PAGE) == (514 * PAGE, 0)
    fmt = guest.mmu.fmt
    sptes = [guest.spte(gfn)[0] for gfn in range(510, 514)]
    assert all(fmt.is_present(spte) and not fmt.is_accessed(spte) for spte in sptes)
    assert guest.counts() == ((4, 0, 0) if level == 1 else (0, 2, 0))
    assert (guest.vm.stats.pf_taken, guest.vm.stats.pf_fixed) == (0, 0), "nobody faulted"
    assert guest.vcpu.pre_fault_memory(510 * PAGE, 4 * PAGE).size == 0 and guest.vm.stats.pf_spurious == 0
    guest.close()


def test_it_stops_where_memory_ends_and_says_what_is_left(mmu_guest) -> None:
    guest = mmu_guest(SIMPLE, level=1, pages=100)
    assert guest.vcpu.pre_fault_memory(98 * PAGE, 5 * PAGE) == (100 * PAGE, 3 * PAGE)
    assert refused(lambda: guest.vcpu.pre_fault_memory(100 * PAGE, PAGE)) == errno.ENOENT
    guest.close()


def test_a_page_of_a_logged_slot_that_becomes_writable_is_dirty(mmu_guest) -> None:
    guest = mmu_guest(SIMPLE, level=1)
    guest.log()
    guest.vcpu.pre_fault_memory(5 * PAGE, 2 * PAGE)
    assert guest.get() == {5, 6}
    guest.close()


def test_what_is_refused_and_in_which_order(mmu_guest) -> None:
    guest = mmu_guest(SIMPLE, level=1)
    for gpa, size, flags in ((0, PAGE, 1), (1, PAGE, 0), (0, 1, 0), (0, 0, 0), ((1 << 64) - PAGE, PAGE, 0)):
        assert refused(lambda: guest.vcpu.pre_fault_memory(gpa, size, flags)) == errno.EINVAL  # noqa: B023
    guest.vm.signal_pending = lambda: True
    assert refused(lambda: guest.vcpu.pre_fault_memory(0, PAGE)) == errno.EINTR
    guest.vm.signal_pending = lambda: False
    guest.close()
    guest = mmu_guest(replace(SIMPLE, tdp=False, mmu="shadow"), level=1)
    assert guest.vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY) == 0
    assert refused(lambda: guest.vcpu.pre_fault_memory(0, PAGE)) == errno.EOPNOTSUPP
    guest.vm.signal_pending = lambda: True
    assert refused(lambda: guest.vcpu.pre_fault_memory(0, PAGE)) == errno.EINTR, "asked before what MMU there is"
    guest.close()


def test_a_slot_that_is_going_away_is_not_waited_for(mmu_guest) -> None:
    guest, seen = mmu_guest(SIMPLE, level=1), []

    def hook(point: str) -> None:
        if point == "memslot: invalid":
            seen.append(refused(lambda: guest.vcpu.pre_fault_memory(0, PAGE)))

    guest.vm.race_hook = hook
    guest.delete_slot()
    assert seen == [errno.EAGAIN]
    guest.vm.race_hook = None
    guest.vm.close()
