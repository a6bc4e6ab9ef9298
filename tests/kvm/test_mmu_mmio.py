"""MMIO: what an SPTE keeps of a gfn under L1TF, and what a vCPU remembers, how long, and for which address."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim.kvm import mmio
from migsim.kvm.config import VmConfig
from migsim.kvm.ioctl import KVM_CAP_VM_DISABLE_NX_HUGE_PAGES, KVM_EXIT_HLT, KVM_EXIT_MMIO
from migsim.kvm.nested import GuestPte, NestedGuest
from migsim.kvm.spte import l1tf_mask, spte_format
from migsim.kvm.tdp_mmu import RetPf

PAGE = 4096
SIMPLE = VmConfig(smm=False)
OUTSIDE = 0x10000


# -- L1TF ----------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["intel", "amd"]), st.booleans(), st.integers(44, 46), st.integers(0, (1 << 34) - 1),
    st.integers(0, (1 << 20) - 1),
)  # fmt: skip
def test_an_mmio_spte_names_no_page_below_the_top_of_what_the_cache_holds(
    vendor: str, old: bool, bits: int, gfn: int, generation: int
) -> None:
    gfn &= (1 << bits - 12) - 1
    mask = l1tf_mask(bits)
    fmt = spte_format(vendor, vintage_5_10=old, rsvd_mask=mask)
    spte = mmio.make_mmio_spte(fmt, generation=generation, gfn=gfn)
    assert spte & mask == mask and bin(mask).count("1") == 5 and mask >> bits == 0
    assert mmio.mmio_gfn(fmt, spte) == gfn
    assert mmio.mmio_generation(fmt, spte) == generation & mmio.generation_mask(fmt)
    assert fmt.is_mmio(spte) and not fmt.is_present(spte) and not fmt.is_frozen(spte)


def test_a_cpu_without_the_bug_or_with_a_wide_cache_keeps_the_gfn_where_it_is(mmu_guest) -> None:
    assert l1tf_mask(47) == 0
    for config, mask in ((SIMPLE, 0), (replace(SIMPLE, l1tf=True), 0x1F << 41)):
        guest = mmu_guest(config)
        assert guest.mmu.page_fault(guest.vcpu, OUTSIDE * PAGE, write=False) == RetPf.EMULATE
        spte = guest.spte(OUTSIDE)[0]
        assert guest.mmu.fmt.is_mmio(spte) and spte & 0x1F << 41 == mask
        assert mmio.mmio_gfn(guest.mmu.fmt, spte) == OUTSIDE
        guest.close()


@pytest.mark.parametrize(("vendor", "maxphyaddr"), [("amd", 46), ("intel", 52)])
def test_l1tf_on_a_cpu_that_cannot_have_it_is_refused(vendor, maxphyaddr: int) -> None:
    with pytest.raises(ValueError, match="l1tf"):
        VmConfig(vendor=vendor, maxphyaddr=maxphyaddr, l1tf=True)


# -- what a vCPU remembers -----------------------------------------------------------------------------------------


def test_a_second_access_to_the_same_page_asks_neither_tables_nor_slots(mmu_guest) -> None:
    guest = mmu_guest(SIMPLE)
    assert guest.vcpu.run([("r", OUTSIDE * PAGE, 0)]).reason == KVM_EXIT_MMIO
    spte = guest.spte(OUTSIDE)[0]
    for root in guest.mmu.state.roots:
        root.mmio[OUTSIDE] = spte ^ 1 << 52  # of another generation, if anybody looked
    assert guest.mmu.page_fault(guest.vcpu, OUTSIDE * PAGE, write=False) == RetPf.EMULATE
    assert guest.vm.stats.pf_taken == 1
    guest.vcpu.mmio.gfn = 0
    guest.mmu.page_fault(guest.vcpu, OUTSIDE * PAGE, write=False)
    assert guest.vm.stats.pf_taken == 2, "the SPTE was stale"
    guest.close()


def test_it_is_forgotten_with_the_generation_and_not_learned_while_that_changes(mmu_guest) -> None:
    guest = mmu_guest(SIMPLE, vcpus=2)
    for vcpu in guest.vcpus:
        vcpu.run([("r", OUTSIDE * PAGE, 0)])
    assert guest.vcpu.mmio.match_gpa(OUTSIDE * PAGE + 8, guest.vm.memslots(0).generation)
    learned: list[int] = []

    def look(point: str) -> None:
        if point == "memslot: in progress":
            guest.vcpu.mmio.gfn = 0
            guest.mmu.page_fault(guest.vcpu, (OUTSIDE + 1) * PAGE, write=False)
            learned.append(guest.vcpu.mmio.gfn)

    guest.vm.race_hook = look
    guest.vm.set_user_memory_region(2, 0, OUTSIDE * PAGE, PAGE, guest.vm.alloc_memory(PAGE))
    guest.vm.race_hook = None
    assert learned == [0]
    for vcpu in reversed(guest.vcpus):
        assert vcpu.run([("w", OUTSIDE * PAGE, 1)]).reason == KVM_EXIT_HLT
    guest.close()


def test_every_vcpu_remembers_for_itself_and_only_the_last_page(mmu_guest) -> None:
    guest = mmu_guest(SIMPLE, vcpus=2)
    first, second = guest.vcpus
    first.run([("r", OUTSIDE * PAGE, 0)])
    first.run([("r", (OUTSIDE + 1) * PAGE, 0)])
    generation = guest.vm.memslots(0).generation
    assert first.mmio.match_gpa((OUTSIDE + 1) * PAGE, generation)
    assert not first.mmio.match_gpa(OUTSIDE * PAGE, generation)
    assert not second.mmio.match_gpa((OUTSIDE + 1) * PAGE, generation)
    guest.close()


def test_a_store_to_a_read_only_slot_is_not_remembered_as_mmio(mmu_guest) -> None:
    """Else a load there would be given to user space, too."""
    guest = mmu_guest(SIMPLE, level=1)
    guest.vm.set_user_memory_region(2, 2, OUTSIDE * PAGE, PAGE, guest.vm.alloc_memory(PAGE))
    assert guest.vcpu.run([("w", OUTSIDE * PAGE, 1)]).reason == KVM_EXIT_MMIO
    assert guest.vcpu.run([("r", OUTSIDE * PAGE, 0)]).reason == KVM_EXIT_HLT
    guest.close()


def test_an_address_of_a_guest_with_paging_is_forgotten_by_its_flushes(mmu_guest) -> None:
    guest = mmu_guest(VmConfig(smm=False, tdp=False, mmu="shadow", vendor="amd"), level=1, vcpus=2)
    guest.write(16, 17, 18, 19)
    tables, paging = NestedGuest(guest.vm, 16), guest.vcpus[1]
    for depth in range(3):
        tables.write_entry(guest.vcpu, 16 + depth, 0, GuestPte(17 + depth))
    tables.write_entry(guest.vcpu, 19, 5, GuestPte(OUTSIDE))
    paging.set_paging(tables)
    for forget in (
        lambda: tables.invlpg(paging, 5 * PAGE), lambda: tables.flush(paging),
    ):  # fmt: skip
        assert paging.run([("r", 5 * PAGE, 0)]).reason == KVM_EXIT_MMIO
        generation = guest.vm.memslots(0).generation
        assert paging.mmio.match_gva(5 * PAGE + 4, generation) and paging.mmio.match_gpa(OUTSIDE * PAGE, generation)
        tables.invlpg(paging, 6 * PAGE)
        assert paging.mmio.match_gva(5 * PAGE, generation), "INVLPG of another page"
        forget()
        assert not paging.mmio.match_gva(5 * PAGE, generation), "what the address names may have changed"
        assert paging.mmio.match_gpa(OUTSIDE * PAGE, generation), "the gfn has not"
    paging.set_paging(None)
    guest.close()


def test_l2_addresses_are_no_addresses_to_remember(mmu_guest) -> None:
    guest = mmu_guest(SIMPLE, level=1)
    guest.write(16, 17, 18, 19)
    l2 = NestedGuest(guest.vm, 16)
    for depth in range(3):
        l2.write_entry(guest.vcpu, 16 + depth, 0, GuestPte(17 + depth))
    l2.write_entry(guest.vcpu, 19, 5, GuestPte(OUTSIDE))
    assert l2.page_fault(guest.vcpu, 5, write=False) == RetPf.EMULATE
    assert guest.vcpu.mmio.gva == 0 and guest.vcpu.mmio.gfn == OUTSIDE
    guest.close()


# -- NX ------------------------------------------------------------------------------------------------------------


def test_disabling_the_nx_workaround_is_refused_in_kvms_order(mmu_guest) -> None:
    from migsim.kvm.vm import Vm

    cap = KVM_CAP_VM_DISABLE_NX_HUGE_PAGES
    for allowed in (True, False):
        with Vm(replace(SIMPLE, nx_huge_pages=True, cap_sys_boot=allowed)) as vm:
            refusals = [
                (1, (0,), errno.EINVAL), (0, (1,), errno.EINVAL if allowed else errno.EPERM),
                (0, (0,), None if allowed else errno.EPERM),
            ]  # fmt: skip
            for flags, args, expected in refusals:
                got = None
                try:
                    vm.enable_cap(cap, flags, args)
                except OSError as error:
                    got = error.errno
                assert got == expected, (allowed, flags, args)
            assert vm.mmu.state.nx_huge_pages is not allowed
            vm.create_vcpu(0)
            with pytest.raises(OSError) as late:
                vm.enable_cap(cap, 0, (0,))
            assert late.value.errno == (errno.EINVAL if allowed else errno.EPERM)
