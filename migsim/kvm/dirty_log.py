"""The dirty bitmap of a slot, as user space gets and clears it: KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG.

GET without manual protection works in four numbered steps, and the order is what makes it safe:
  0. whoever still has writes to deliver does so (the emulated hardware catches up; PML buffers are drained)
  1. take:    the word's bits leave the live log for the scratch half
  2. protect: those pages are made to be noticed again (W or D cleared)
  3. flush:   translations that could still write unnoticed are dropped
  4. copy:    the scratch half goes to user space
A store between 1 and 2 sets the bit again although it is also in the scratch half: reported twice, harmless. A
store between 2 and 3 through a stale translation is not reported again, but user space reads the page only
after the ioctl has returned. At every moment a page is in the live log or protected, or a flush is still due.

With manual protection GET only copies; CLEAR does 1 to 3 for the pages user space names, before it reads them.
Facts: Linux 6.18 virt/kvm/kvm_main.c kvm_get_dirty_log_protect, kvm_clear_dirty_log_protect.
"""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOENT, ENXIO
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from migsim.kvm.memslot import KVM_USER_MEM_SLOTS, Memslot
from migsim.kvm.uapi import kvm_error
from migsim.planes import ALL_ONES, Plane, Words, tail_mask
from migsim.units import WORD_BITS, chunks_of, words_of

if TYPE_CHECKING:
    from migsim.kvm.vm import Vm

UserBitmap = NDArray[np.uint64] | None


class LogKernel(Protocol):
    """The inner loops over a slot's words; what they return says whether a TLB flush is due."""

    def harvest(self, slot: Memslot, scratch: Words) -> bool:
        """Take every set bit into `scratch` (uint64[words], zeroed by the callee) and protect those pages."""

    def clear(self, slot: Memslot, first_page: int, num_pages: int, mask: Words) -> bool:
        """Take the live bits among `mask` (bit 0 = `first_page`, a multiple of 64) and protect those pages."""


class WordKernel:
    """One word after the other, as KVM does it: the readable rule, right for any slot."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def harvest(self, slot: Memslot, scratch: Words) -> bool:
        log = _log(slot)
        log.settle_range(0, slot.npages)
        scratch[: len(log.words)] = 0
        flush = False
        with self._vm.mmu_lock.write():
            for i in map(int, np.flatnonzero(log.words)):
                flush = True
                mask = self.take(log, i, (1 << WORD_BITS) - 1)
                scratch[i] = mask
                self.protect(slot, i * WORD_BITS, mask)
        return flush

    def clear(self, slot: Memslot, first_page: int, num_pages: int, mask: Words) -> bool:
        log = _log(slot)
        log.settle_range(first_page, num_pages)
        first_word, n = first_page // WORD_BITS, words_of(num_pages)
        flush = False
        with self._vm.mmu_lock.write():
            for i in map(int, np.flatnonzero(mask[:n])):
                taken = self.take(log, first_word + i, int(mask[i]))
                if taken:
                    flush = True
                    self.protect(slot, first_page + i * WORD_BITS, taken)
        return flush

    def take(self, log: Plane, word: int, mask: int) -> int:
        """Step 1, one atomic act: clear the bits of `mask` in a word of the log and return those that were set."""
        old = int(log.words[word])
        log.words[word] = np.uint64(old & ~mask)
        self._vm.race("log: taken")
        return old & mask

    def protect(self, slot: Memslot, offset: int, mask: int) -> None:
        """Step 2: pages `offset` + set bits of `mask` will be noticed when next written."""
        self._vm.mmu.enable_log_dirty_pt_masked(slot, offset, mask)
        self._vm.race("log: protected")


class DirtyLog:
    """GET and CLEAR of one VM. Steps are methods, in the order of the module's text."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    # -- the two ioctls ----------------------------------------------------------------------------------------------

    def get(self, slot_key: int, user: UserBitmap) -> None:
        """KVM_GET_DIRTY_LOG into `user`, uint64[ceil(npages / 64)].

        Raises OSError: ENXIO the VM logs through rings; EINVAL no such address space or id; ENOENT no slot, or it has
        no log; EFAULT (last) a bad pointer, that is None, read-only or too short. Without manual protection the bits
        are lost by EFAULT.
        """
        slot = self.logged_slot(slot_key)
        n_words = words_of(slot.npages)
        self.sync(slot, 0, slot.npages)
        if self._vm.manual_dirty_log_protect:
            self.copy_live(slot, user)
            return
        # Harvesting into the user's own array instead of a scratch half and a copy: nobody can see the difference.
        scratch = user if writable_words(user, n_words) else np.zeros(n_words, dtype=np.uint64)
        assert scratch is not None
        if self.harvest(slot, scratch):
            self.flush(slot)
        self.copy_to_user(scratch, user, n_words)

    def clear(self, slot_key: int, first_page: int, num_pages: int, user: UserBitmap) -> None:
        """KVM_CLEAR_DIRTY_LOG of the pages whose bit is set in `user` (bit 0 = `first_page`).

        Only pages that are set in `user` and in the live log are cleared and re-armed. Raises OSError in KVM's order:
        ENXIO; EINVAL for the slot argument; EINVAL `first_page` is no multiple of 64; ENOENT; EINVAL the range leaves
        the slot, or its length is neither a multiple of 64 nor ends exactly with the slot; EFAULT.
        """
        slot = self.logged_slot(slot_key, first_page)
        self.check_range(slot, first_page, num_pages)
        self.sync(slot, first_page, num_pages)
        mask = self.copy_from_user(user, words_of(num_pages))
        if self.clear_words(slot, first_page, num_pages, mask):
            self.flush(slot)

    # -- checks ------------------------------------------------------------------------------------------------------

    def logged_slot(self, slot_key: int, first_page: int = 0) -> Memslot:
        """The slot of an ioctl, which must have a log; `first_page` is checked where KVM checks it."""
        if not self._vm.use_dirty_bitmap:
            raise kvm_error(ENXIO, "this VM logs through dirty rings")
        as_id, id = slot_key >> 16, slot_key & 0xFFFF
        if as_id >= self._vm.config.nr_as_ids or id >= KVM_USER_MEM_SLOTS:
            raise kvm_error(EINVAL, f"slot {slot_key:#x}: no such address space or id")
        if first_page % WORD_BITS:
            raise kvm_error(EINVAL, f"first_page {first_page} is no multiple of 64")
        slot = self._vm.memslots(as_id).by_id(id)
        if slot is None or slot.dirty_bitmap is None:
            raise kvm_error(ENOENT, f"slot {slot_key:#x} does not exist or does not log")
        return slot

    def check_range(self, slot: Memslot, first_page: int, num_pages: int) -> None:
        """CLEAR's range: a partial last word must end exactly where the slot does."""
        rest = slot.npages - first_page
        if rest < 0 or num_pages > rest or (num_pages < rest and num_pages % WORD_BITS):
            raise kvm_error(EINVAL, f"pages {first_page}+{num_pages} of a slot of {slot.npages}")

    # -- steps -------------------------------------------------------------------------------------------------------

    def sync(self, slot: Memslot, first_page: int, num_pages: int) -> None:
        """Step 0: lazy writers deliver, then every vCPU is kicked so that it drains its PML buffer."""
        self._vm.observe(slot, first_page, num_pages)
        self._vm.kick_for_dirty_log()
        self._vm.race("log: synced")

    def harvest(self, slot: Memslot, scratch: Words) -> bool:
        """Steps 1 and 2 over the whole slot; True if any bit was set."""
        return self._vm.log_kernel(slot).harvest(slot, scratch)

    def clear_words(self, slot: Memslot, first_page: int, num_pages: int, mask: Words) -> bool:
        """Steps 1 and 2 over a range, masked; True if any bit was cleared."""
        return self._vm.log_kernel(slot).clear(slot, first_page, num_pages, mask)

    def flush(self, slot: Memslot) -> None:
        """Step 3, outside mmu_lock."""
        self._vm.race("log: before flush")
        self._vm.flush_remote_tlbs_memslot(slot)

    def copy_to_user(self, scratch: Words, user: UserBitmap, n_words: int) -> None:
        """Step 4; EFAULT comes too late to give the bits back."""
        if not writable_words(user, n_words):
            raise kvm_error(EFAULT, "the bitmap's address is bad")
        assert user is not None
        if scratch is not user:
            user[:n_words] = scratch

    def copy_live(self, slot: Memslot, user: UserBitmap) -> None:
        """Manual protection: the live log is copied, nothing is cleared and nothing protected."""
        log = _log(slot)
        if not writable_words(user, len(log.words)):
            raise kvm_error(EFAULT, "the bitmap's address is bad")
        assert user is not None
        for chunk in range(chunks_of(log.n)):
            where = log.chunk_words(chunk)
            user[where] = ALL_ONES if log.full[chunk] else log.words[where]
        if log.full[-1]:
            user[len(log.words) - 1] = tail_mask(log.n)

    def copy_from_user(self, user: UserBitmap, n_words: int) -> Words:
        """CLEAR's mask; a length of zero reads nothing and so cannot fail."""
        if n_words == 0:
            return np.zeros(0, dtype=np.uint64)
        if user is None or user.size < n_words:
            raise kvm_error(EFAULT, "the bitmap's address is bad")
        return user[:n_words]


def writable_words(user: UserBitmap, n_words: int) -> bool:
    """Can KVM write `n_words` to this address?"""
    return user is not None and user.flags.writeable and user.size >= n_words


def _log(slot: Memslot) -> Plane:
    assert slot.dirty_bitmap is not None, slot
    return slot.dirty_bitmap
