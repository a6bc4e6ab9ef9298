"""The MMU as one vCPU meets it: which root it runs on, what becomes of its faults, the bits its hardware sets.

Roots are taken and given back under the read lock, with tdp_mmu_pages_lock for the list (Linux 6.9); before that, and
by the shadow MMU always, under the exclusive one. Source: Linux 6.18, arch/x86/kvm/mmu/mmu.c, tdp_mmu.c
(kvm_tdp_mmu_alloc_root).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from migsim.kvm.levels import PageFault
from migsim.kvm.mmu_state import MmuState, VcpuSeam, VmSeam
from migsim.kvm.page_fault import classify, count_result, direct_page_fault, error_code, handle_mmio_page_fault
from migsim.kvm.roots import Root
from migsim.kvm.shadow_mmu import ShadowMmu
from migsim.kvm.spte import SpteFormat
from migsim.kvm.tdp_mmu import RetPf
from migsim.kvm.tdp_ops import TdpMmu
from migsim.units import PAGE_SHIFT


class VcpuMmu:
    """The vCPU's half of `mmu.Mmu`."""

    vm: VmSeam
    state: MmuState
    shadow: ShadowMmu
    parts: tuple[ShadowMmu | TdpMmu, ...]
    _loaded: dict[int, Root]

    @property
    def fmt(self) -> SpteFormat:
        """The SPTE format."""
        return self.state.fmt

    # -- roots ---------------------------------------------------------------------------------------------------------

    def valid_roots(self, as_id: int) -> list[Root]:
        """Roots that faults of one address space may use."""
        return list(self.state.roots.valid(as_id))

    def root_is_current(self, vcpu: VcpuSeam, root: Root) -> bool:
        """May the vCPU go on with `root`: not invalidated, and of the role it is in now?"""
        return not root.invalid and root.role == self.state.role(vcpu)

    def root_of(self, vcpu: VcpuSeam) -> Root:
        """The root a vCPU translates through, loaded first where it has none, an invalid one, or changed its role."""
        root = self._loaded.get(vcpu.id)
        return root if root is not None and self.root_is_current(vcpu, root) else self.load_root(vcpu)

    def load_root(self, vcpu: VcpuSeam, old: Root | None = None) -> Root:
        """Give the vCPU the root of its role and take its reference to the old one back (kvm_mmu_load).

        A root that is there is found under the lock; a new one is made under tdp_mmu_pages_lock after a second look, so
        that of vCPUs that come together one makes it.
        """
        assert old is None or self._loaded.get(vcpu.id) is old, f"vCPU {vcpu.id} gives back a root it does not hold"
        self.unload(vcpu)
        state, role = self.state, self.state.role(vcpu)
        with self._root_lock():
            root = state.roots.find(role)
            if root is None:
                if not state.vintage.tdp:
                    self.shadow.limit.make_available()
                with state.tdp_mmu_pages_lock if state.vintage.root_read_lock else nullcontext():
                    root = state.roots.get(self.fmt, role, self.vm.memslots(role.as_id), pml=self.vm.config.pml_enabled)
        self._loaded[vcpu.id] = root
        return root

    def unload(self, vcpu: VcpuSeam) -> None:
        """The vCPU lets its root go; freeing the last reference to one takes it off the list."""
        root = self._loaded.get(vcpu.id)
        if root is None:
            return
        with self._root_lock():
            del self._loaded[vcpu.id]
            last = root.root_count == 1 and self.state.vintage.root_read_lock
            with self.state.tdp_mmu_pages_lock if last else nullcontext():
                self.state.roots.put(root)
        vcpu.mmio.clear()

    def _root_lock(self) -> AbstractContextManager[bool]:
        return self.state.lock.read() if self.state.vintage.root_read_lock else self.state.lock.write()

    def walk(self, root: Root, gfn: int) -> tuple[int, int]:
        """(SPTE, level) where the hardware's walk for gfn ends."""
        return root.lookup(gfn)

    # -- faults --------------------------------------------------------------------------------------------------------

    def page_fault(
        self, vcpu: VcpuSeam, gpa: int, *, write: bool, exec: bool = False, prefetch: bool = False
    ) -> RetPf:
        """Handle a refused access (kvm_mmu_page_fault). RETRY, FIXED, SPURIOUS: run the guest again.

        EMULATE, WRITE_PROTECTED: the access is to be emulated. Raises OSError(EFAULT or EHWPOISON) where KVM_RUN fails,
        ENOSPC where the shadow MMU has no page left.
        """
        root = self.root_of(vcpu)
        fault = PageFault(vcpu, gpa, gpa >> PAGE_SHIFT, write, exec, prefetch)
        classify(self.state, root, fault)
        # EPT tells of an MMIO entry by an exit of its own (EPT misconfiguration), NPT by a page fault like any other
        if not prefetch and (not fault.rsvd or self.vm.config.vendor == "amd"):
            self.vm.trace("kvm_page_fault", vcpu_id=vcpu.id, fault_address=gpa, error_code=error_code(fault))
        if fault.rsvd:
            result = handle_mmio_page_fault(self.state, root, fault)
            if result != RetPf.INVALID:
                return result
        if not prefetch:
            self.vm.stats.count_vcpu(vcpu.id, "pf_taken")
        result = direct_page_fault(self.state, root, fault, self._map)
        count_result(self.state, vcpu, result, prefetch=prefetch)
        return result

    def _map(self, mmu: MmuState, root: Root, fault: PageFault) -> RetPf:
        return self.parts[-1].map(root, fault)

    # -- the hardware --------------------------------------------------------------------------------------------------

    def set_dirty_bit(self, vcpu: VcpuSeam, root: Root, gfn: int) -> bool:
        """The CPU stores through a leaf with W and sets D if it has D bits; True if D was clear (PML logs then)."""
        return self._set_hardware_bit(root, gfn, self.fmt.dirty)

    def set_accessed(self, vcpu: VcpuSeam, root: Root, gfn: int) -> bool:
        """The CPU reads through a leaf: A is set if the CPU has A bits; True if it was clear."""
        return self._set_hardware_bit(root, gfn, self.fmt.accessed)

    def _set_hardware_bit(self, root: Root, gfn: int, bit: int) -> bool:
        if not self.state.ad_enabled:
            return False
        *_, (at, spte, level) = root.walk(gfn)
        assert self.fmt.is_present(spte) and self.fmt.is_leaf(spte, level), f"gfn {gfn:#x}: SPTE {spte:#x} no leaf"
        if spte & bit:
            return False
        root.write(at, spte | bit)
        return True
