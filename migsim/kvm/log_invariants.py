"""What must hold between any two calls, seen from the log: no store may go through without leaving a trace.

Each check yields sentences; none means that all is well. They look at every page of every slot, so they are for small
guests and tests. Source: the rules above kvm_get_dirty_log_protect and in Linux Documentation/virt/kvm/locking.rst.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from migsim.kvm.memslot import Memslot
from migsim.kvm.uapi import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET
from migsim.planes import tail_mask
from migsim.units import pages_per_level

if TYPE_CHECKING:
    from migsim.kvm.tlb import Translation
    from migsim.kvm.vcpu import Vcpu
    from migsim.kvm.vm import Vm


def log_violations(vm: Vm) -> list[str]:
    """All of the below."""
    checks = (stale_translations, untraced_pages, stray_tail_bits, ring_indices)
    return [sentence for check in checks for sentence in check(vm)]


def stale_translations(vm: Vm) -> Iterator[str]:
    """No TLB entry may allow more than the SPTE it came from, or name another frame, once no flush is due."""
    for vcpu in vm.vcpus:
        for tag, cached in vcpu.tlb:
            if tag is vcpu.root and vcpu.root is not None and not vcpu.root.invalid:
                why = _stronger(vm, cached, *vm.mmu.walk(vcpu.root, cached.gfn), by_d=True)
            elif tag is vcpu.l2 and vcpu.l2 is not None:
                why = _stronger(vm, cached, *vcpu.l2.walk(cached.gfn), by_d=False)
            else:
                continue  # left behind with its root: never looked up again
            if why:
                yield f"vCPU {vcpu.id}: stale translation of gfn {cached.gfn:#x} level {cached.level}: {why}"


def _stronger(vm: Vm, cached: Translation, spte: int, level: int, *, by_d: bool) -> str:
    fmt = vm.mmu.fmt
    if not fmt.is_present(spte) or not fmt.is_leaf(spte, level):
        return "the SPTE is gone"
    if fmt.pfn(spte) + (cached.gfn & (1 << 9 * (level - 1)) - 1) != cached.pfn:
        return "the SPTE names another frame"
    if cached.writable and not fmt.is_writable(spte):
        return "the SPTE is write-protected"
    # 5.10's aging clears D with no flush, harmless: the bit in the log stays, and whoever takes it flushes.
    by_d = by_d and fmt.ad_enabled(spte) and not vm.mmu.state.vintage.age_clears_dirty
    if by_d and cached.silent_store and not spte & fmt.dirty:
        return "the SPTE's D is clear"
    return ""


def untraced_pages(vm: Vm) -> Iterator[str]:
    """A clean page of a logged slot must be noticed when it is next written.

    Clean: not in the slot's bitmap, nor named by a ring entry that was pushed and not reset, nor by a PML buffer of a
    vCPU in the slot's address space.
    """
    for as_id in range(vm.config.nr_as_ids):
        shadowed = _writable_for_l2(vm, as_id)
        for slot in vm.memslots(as_id):
            if not slot.logging or slot.readonly:
                continue
            log, traced = slot.dirty_bitmap, _traced(vm, slot)
            for offset in range(slot.npages):
                if offset not in traced and not (log is not None and log.get(offset)):
                    yield from _silent_ways(vm, slot, slot.base_gfn + offset, shadowed)


def _traced(vm: Vm, slot: Memslot) -> set[int]:
    """Pages of a slot in the rings between reset_index and dirty_index, or in the PML buffers of its address space."""
    pages = set()
    for vcpu in vm.vcpus:
        if vcpu.as_id == slot.as_id:
            pages |= {(gpa >> 12) - slot.base_gfn for gpa in vcpu.pml.pending()}
        ring = vcpu.dirty_ring
        if ring is not None and ring.used <= ring.size:
            at = (ring.reset_index + np.arange(ring.used)) % ring.size
            pages |= set(ring.entries["offset"][at[ring.entries["slot"][at] == slot.key]].tolist())
    return pages


def _silent_ways(vm: Vm, slot: Memslot, gfn: int, shadowed: dict[int, list[str]]) -> Iterator[str]:
    page = f"slot {slot.key:#x} page {gfn - slot.base_gfn}: clean, yet"
    for root in vm.mmu.valid_roots(slot.as_id):
        fmt = vm.mmu.fmt
        spte, level = vm.mmu.walk(root, gfn)
        if not fmt.is_present(spte) or not fmt.is_writable(spte):
            continue
        pml_sees = vm.pml_enabled and level == 1 and not fmt.ad_need_write_protect(spte) and not spte & fmt.dirty
        if not pml_sees:
            yield f"{page} SPTE {spte:#x} lets stores pass"
    yield from (f"{page} {how}" for how in shadowed.get(gfn, ()))
    for vcpu in vm.vcpus:
        cached = vcpu.tlb.lookup(vcpu.root, gfn) if vcpu.as_id == slot.as_id else None
        if cached is not None and cached.silent_store:
            yield f"{page} vCPU {vcpu.id} may store unseen"


def _writable_for_l2(vm: Vm, as_id: int) -> dict[int, list[str]]:
    """L1 gfn -> how a nested guest may store there: SPTEs of its shadow pages, and translations made from them.

    W alone decides: PML is off while L2 runs.
    """
    ways: defaultdict[int, list[str]] = defaultdict(list)
    for level, gfn, entry in vm.mmu.shadow.rmap.shadowed_in(as_id, 0, 1 << 52):
        spte = entry.table.read(entry.at)
        if vm.mmu.fmt.is_writable(spte):
            for mapped in range(gfn, gfn + pages_per_level(level)):
                ways[mapped].append(f"SPTE {spte:#x} of a nested guest lets stores pass")
    for vcpu in vm.vcpus:
        l2 = vcpu.l2
        if l2 is None or l2.as_id != as_id:
            continue
        for tag, cached in vcpu.tlb:
            if tag is l2 and cached.silent_store:
                first = cached.l1_gfn_of(cached.gfn)
                for mapped in range(first, first + pages_per_level(cached.level)):
                    ways[mapped].append(f"vCPU {vcpu.id} may store unseen from L2")
    return ways


def stray_tail_bits(vm: Vm) -> Iterator[str]:
    """No bit of a log lies beyond its slot."""
    for as_id in range(vm.config.nr_as_ids):
        for slot in vm.memslots(as_id):
            log = slot.dirty_bitmap
            if log is not None and not log.full[-1] and int(log.words[-1]) & ~tail_mask(log.n):
                yield f"slot {slot.key:#x}: bits beyond page {slot.npages} in {int(log.words[-1]):#x}"


def ring_indices(vm: Vm) -> Iterator[str]:
    """Between reset_index and dirty_index come the RESET entries, then the DIRTY ones, none empty.

    One exit pushes no more than the reserve above the soft limit holds, so a ring is never full.
    """
    for vcpu in vm.vcpus:
        ring = vcpu.dirty_ring
        if ring is None:
            continue
        if ring.used >= ring.size:
            yield f"vCPU {vcpu.id}: ring of {ring.size} entries uses {ring.used} (user space reset what was not pushed)"
            continue
        yield from _entries_in_order(vcpu)


def _entries_in_order(vcpu: Vcpu) -> Iterator[str]:
    ring = vcpu.dirty_ring
    assert ring is not None
    waiting = False
    for index in range(ring.reset_index, ring.reset_index + ring.used):
        flags = int(ring.entries["flags"][index & (ring.size - 1)])
        if not flags & (KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET):
            yield f"vCPU {vcpu.id}: ring entry {index} is empty between reset_index and dirty_index"
        elif flags & KVM_DIRTY_GFN_F_RESET and waiting:
            yield f"vCPU {vcpu.id}: ring entry {index} was given back before one that was pushed earlier"
        waiting = waiting or not flags & KVM_DIRTY_GFN_F_RESET
