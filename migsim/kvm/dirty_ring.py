"""The dirty ring of a vCPU: KVM pushes pages as they get dirty, user space harvests them, KVM_RESET re-arms them.

Entry life: 0 empty -> DIRTY (KVM) -> RESET (user space, in order) -> 0 (KVM_RESET_DIRTY_RINGS; slot and offset stay
as they were). User space must reset before it lets anybody read the pages: until then a page may change unlogged.
Facts: Linux 6.18 virt/kvm/dirty_ring.c; the quirks were checked against a real /dev/kvm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.memslot import KVM_USER_MEM_SLOTS
from migsim.kvm.uapi import DIRTY_GFN, KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET
from migsim.units import WORD_BITS

if TYPE_CHECKING:
    from migsim.kvm.vcpu import Vcpu
    from migsim.kvm.vm import Vm

KVM_DIRTY_RING_RSVD_ENTRIES: Final = 64
KVM_DIRTY_RING_MAX_ENTRIES: Final = 65536
RESET_ENTRIES_MAX: Final = (1 << 31) - 1  # of one ioctl (Linux 6.17: bounded, and broken off by a signal)
_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1
_S64_BIAS: Final = 1 << 63


class DirtyRing:
    """KVM's side: `entries` structured array of (flags, slot, offset), shared with user space.

    `dirty_index` and `reset_index` run freely modulo 2**32. `soft_limit`: entries from which the vCPU may not enter
    the guest; the reserve above it (64, and 512 with PML) holds what one exit can still push.
    """

    def __init__(self, size: int, reserved: int) -> None:
        self.entries: NDArray[Any] = np.zeros(size, dtype=DIRTY_GFN)
        self.size = size
        self.soft_limit = size - reserved
        self.dirty_index = 0
        self.reset_index = 0
        self.soft_full_requested = False

    @property
    def used(self) -> int:
        """Pushed and not yet reset, as KVM counts: user space that resets entries never pushed corrupts it."""
        return (self.dirty_index - self.reset_index) & _U32

    @property
    def soft_full(self) -> bool:
        """Is it time to stop entering the guest?"""
        return self.used >= self.soft_limit

    def push(self, slot_key: int, offset: int) -> None:
        """One page: fields first, the flag after a barrier, then the index; asks for an exit when soft-full.

        Nothing stops it when the ring is full, as nothing stops KVM; the reserve is there so that it never is.
        """
        at = self.dirty_index & (self.size - 1)
        self.write_fields(at, slot_key, offset)
        self.set_dirtied(at)
        self.dirty_index = (self.dirty_index + 1) & _U32
        if self.soft_full:
            self.soft_full_requested = True

    def write_fields(self, at: int, slot_key: int, offset: int) -> None:
        """What the entry says; must be visible before its flag."""
        self.entries["slot"][at] = slot_key
        self.entries["offset"][at] = offset & _U64

    def set_dirtied(self, at: int) -> None:
        """The release store of the flag."""
        self.entries["flags"][at] = KVM_DIRTY_GFN_F_DIRTY

    def check_request(self) -> bool:
        """At guest entry: must the vCPU exit with DIRTY_RING_FULL instead? The request stays while it is full."""
        self.soft_full_requested = self.soft_full_requested and self.soft_full
        return self.soft_full_requested

    def harvested(self) -> bool:
        """Has user space given back the entry at reset_index?"""
        return bool(int(self.entries["flags"][self.reset_index & (self.size - 1)]) & KVM_DIRTY_GFN_F_RESET)

    def pop(self) -> tuple[int, int]:
        """Make the entry at reset_index empty and return its (slot, offset)."""
        at = self.reset_index & (self.size - 1)
        found = int(self.entries["slot"][at]), int(self.entries["offset"][at])
        self.entries["flags"][at] = 0
        self.reset_index = (self.reset_index + 1) & _U32
        return found


class RingView:
    """User space's side: the same entries mapped, and the index up to which they were collected."""

    def __init__(self, entries: NDArray[Any]) -> None:
        self.entries = entries
        self.size = len(entries)
        self.fetch_index = 0

    def harvest(self, limit: int | None = None) -> list[tuple[int, int]]:
        """Collect up to `limit` dirty entries in order as (slot, offset), marking each RESET."""
        found: list[tuple[int, int]] = []
        flags = self.entries["flags"]
        while limit is None or len(found) < limit:
            at = self.fetch_index % self.size
            if int(flags[at]) != KVM_DIRTY_GFN_F_DIRTY:
                break
            found.append((int(self.entries["slot"][at]), int(self.entries["offset"][at])))
            flags[at] = KVM_DIRTY_GFN_F_RESET
            self.fetch_index += 1
        return found

    def used(self) -> int:
        """Entries pushed and not yet reset by the kernel, counted from their flags."""
        return int(np.count_nonzero(self.entries["flags"]))


def coalesce(offset: int, mask: int, next_offset: int) -> tuple[int, int] | None:
    """Add `next_offset` of the same slot to a pending (offset, 64-bit mask); None if it does not fit.

    Forward up to 63 pages; backward by as much as the mask can be shifted without losing a bit. Offsets are user
    space's u64 and their difference is taken as s64, so the pair may wrap: `in_slot` refuses it then.
    """
    delta = (next_offset - offset + _S64_BIAS & _U64) - _S64_BIAS
    if 0 <= delta < WORD_BITS:
        return offset, mask | 1 << delta
    if -WORD_BITS < delta < 0 and mask << -delta <= _U64:
        return next_offset, mask << -delta | 1
    return None


class DirtyRings:
    """KVM_RESET_DIRTY_RINGS over all vCPUs of a VM."""

    entries_max = RESET_ENTRIES_MAX

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def reset(self) -> int:
        """Re-arm what user space has harvested, ring by ring; returns the entries taken back, over all vCPUs.

        Each ring stops at its first entry that is not RESET. One TLB flush of the VM follows if any was taken back.
        """
        cleared = 0
        for vcpu in self._vm.vcpus:
            taken, interrupted = self.reset_ring(vcpu, self.entries_max - cleared)
            cleared += taken
            if interrupted:
                break
        if cleared:
            self.flush()
        return cleared

    def flush(self) -> None:
        """After every ring, outside mmu_lock."""
        self._vm.race("ring: before flush")
        self._vm.flush_remote_tlbs()

    def reset_ring(self, vcpu: Vcpu, limit: int) -> tuple[int, bool]:
        """One ring: (entries taken back, whether a signal broke it off).

        A signal leaves nothing unprotected here. Linux since 49005a2a (6.17) returns at once instead, without
        re-arming the entries it has gathered: they are empty by then, so their pages stay writable with nobody to
        report them. The seeded bug ring-reset-signal-drops-batch is that kernel.
        """
        ring = vcpu.dirty_ring
        assert ring is not None, f"vCPU {vcpu.id} of a ring VM has no ring"
        pending: tuple[int, int, int] | None = None  # slot, offset, mask
        taken, interrupted = 0, False
        while taken < limit:
            interrupted = self._vm.signal_pending()
            if interrupted or not ring.harvested():
                break
            slot_key, offset = ring.pop()
            taken += 1
            self._vm.race("ring: popped")
            pending = self.gather(pending, slot_key, offset)
        if pending is not None:
            self.rearm(*pending)
        self._vm.trace("kvm_dirty_ring_reset", index=vcpu.id, dirty_index=ring.dirty_index,
                       reset_index=ring.reset_index)  # fmt: skip
        return taken, interrupted

    def gather(self, pending: tuple[int, int, int] | None, slot_key: int, offset: int) -> tuple[int, int, int]:
        """Coalesce one entry into the pending ones, or re-arm those and begin anew with it."""
        if pending is not None:
            joined = coalesce(pending[1], pending[2], offset) if pending[0] == slot_key else None
            if joined is not None:
                return slot_key, *joined
            self.rearm(*pending)
        return slot_key, offset, 1

    def rearm(self, slot_key: int, offset: int, mask: int) -> None:
        """Protect pages `offset` + set bits of `mask`; entries that name no page of a slot are ignored."""
        as_id, id = slot_key >> 16, slot_key & 0xFFFF
        if as_id >= self._vm.config.nr_as_ids or id >= KVM_USER_MEM_SLOTS:
            return
        slot = self._vm.memslots(as_id).by_id(id)
        if slot is None or not self.in_slot(offset, mask, slot.npages):
            return
        self._vm.observe(slot, offset, mask.bit_length())
        with self._vm.mmu_lock.write():
            self._vm.mmu.enable_log_dirty_pt_masked(slot, offset, mask)
        self._vm.race("ring: protected")

    def in_slot(self, offset: int, mask: int, npages: int) -> bool:
        """Does the highest page of the mask lie in the slot? Must not wrap: user space can write any u64 offset."""
        return offset + mask.bit_length() - 1 < npages
