"""KVM's own accesses to guest memory: emulated instructions, the clock page, kvm_write_guest. All of them are logged.

They go through the memslot and the host page tables, never through SPTEs or a TLB, and every write marks its page
whether or not the content changed. A write by the VMM through its own mapping does not come here and is not
logged. Facts: Linux 6.18 virt/kvm/kvm_main.c, arch/x86/kvm/x86.c; 910c57df for the atomic one.
"""

from __future__ import annotations

from errno import EFAULT
from typing import TYPE_CHECKING, NamedTuple

from migsim.kvm.host_mm import HostPage
from migsim.kvm.memory import pages_spanned
from migsim.kvm.memslot import Memslot
from migsim.kvm.uapi import kvm_error

if TYPE_CHECKING:
    from migsim.kvm.vcpu import Vcpu
    from migsim.kvm.vm import Vm


class GuestMap(NamedTuple):
    """A guest page KVM has mapped for itself: stores to `pfn` are KVM's own."""

    slot: Memslot
    gfn: int
    pfn: int


class GuestAccess:
    """Reads and writes by guest-physical address. `vcpu` decides the address space and the ring; None: KVM itself."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    # -- whole ranges: OSError EFAULT where there is no memory -------------------------------------------------------

    def write_guest(self, gpa: int, data: bytes, vcpu: Vcpu | None = None) -> None:
        """kvm_write_guest, kvm_vcpu_write_guest."""
        done = 0
        for gfn, offset, length in pages_spanned(gpa, len(data)):
            if not self.write_page(gfn, offset, data[done : done + length], vcpu):
                raise kvm_error(EFAULT, f"gpa {gpa:#x} cannot be written")
            done += length

    # -- one page ----------------------------------------------------------------------------------------------------

    def write_page(self, gfn: int, offset: int, data: bytes, vcpu: Vcpu | None) -> bool:
        """Step 1 store, step 2 mark (in that order); False if there is no slot, or not for writing."""
        slot = self.slot(gfn, vcpu)
        page = self.host_page(slot, gfn, write=True)
        if slot is None or page is None:
            return False
        self._vm.memory.write(page.pfn, offset, data)
        self._vm.mark_page_dirty_in_slot(slot, gfn, vcpu)
        return True

    def read_page(self, gfn: int, offset: int, n_bytes: int, vcpu: Vcpu | None) -> bytes | None:
        """None if there is no slot or no memory behind it."""
        page = self.host_page(self.slot(gfn, vcpu), gfn, write=False)
        return None if page is None else self._vm.memory.read(page.pfn, offset, n_bytes)

    def compare_exchange(self, gpa: int, old: int, new: int, vcpu: Vcpu) -> bool | None:
        """An emulated LOCK CMPXCHG of a u32: whether it succeeded; None if it must be done as a plain write.

        The page is marked before the outcome is looked at: a failing one writes the old value back.
        """
        gfn, offset = gpa >> 12, gpa & 0xFFF
        slot = self.slot(gfn, vcpu)
        page = self.host_page(slot, gfn, write=True)
        if slot is None or page is None:
            return None
        found = self._vm.memory.load(page.pfn, offset)
        if found == old:
            self._vm.memory.store(page.pfn, offset, new)
        self.mark_atomic(slot, gfn, vcpu)
        return found == old

    def map_guest(self, gfn: int, vcpu: Vcpu) -> GuestMap:
        """kvm_vcpu_map: KVM holds a page of the guest for a while. Raises OSError EFAULT."""
        slot = self.slot(gfn, vcpu)
        page = self.host_page(slot, gfn, write=True)
        if slot is None or page is None:
            raise kvm_error(EFAULT, f"gfn {gfn:#x} cannot be mapped")
        return GuestMap(slot, gfn, page.pfn)

    def unmap_guest(self, held: GuestMap, vcpu: Vcpu, *, dirty: bool) -> None:
        """kvm_vcpu_unmap: a map that was written through marks its page now, whenever the stores were."""
        if dirty:
            self._vm.mark_page_dirty_in_slot(held.slot, held.gfn, vcpu)

    def mark_atomic(self, slot: Memslot, gfn: int, vcpu: Vcpu) -> None:
        """The target of an emulated atomic instruction gets dirty too (910c57df)."""
        self._vm.mark_page_dirty_in_slot(slot, gfn, vcpu)

    def slot(self, gfn: int, vcpu: Vcpu | None) -> Memslot | None:
        """The slot a vCPU (or KVM itself, in address space 0) sees at `gfn`; an INVALID one is none."""
        slot = self._vm.gfn_to_slot(vcpu.as_id if vcpu is not None else 0, gfn)
        return None if slot is None or slot.invalid else slot

    def host_page(self, slot: Memslot | None, gfn: int, *, write: bool) -> HostPage | None:
        """The host page of `gfn`, if it can be accessed: READONLY slots and read-only host pages take no write."""
        if slot is None or (write and slot.readonly):
            return None
        found = self._vm.host.get_user_page(slot.hva(gfn))
        return found if isinstance(found, HostPage) and (found.writable or not write) else None
