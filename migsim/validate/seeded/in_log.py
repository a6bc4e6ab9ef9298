"""Bugs of the dirty log, the ring, PML and the writes KVM makes itself.  Commits: Linux, unless said otherwise."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from migsim.validate.seeded.bug import bug, each_vcpu, swap

RANDOM_W = ("random/tdp,W", "random/shadow,W", "random/tdp,AMD", "random")
RANDOM_PML = ("random/tdp,PML", "random/shadow,PML", "random")


@bug("get-protects-before-it-takes", "kvm: GET: swap, then protect, 2010", "L",
     "races/stores between the steps of GET,tdp", *RANDOM_W)  # fmt: skip
def get_protects_before_it_takes(vm: Any, undo: ExitStack) -> None:
    """GET write-protects first and takes the bits after: a store in between is protected by nobody."""
    kernel = vm.word_kernel

    def harvest(slot: Any, scratch: Any) -> bool:
        log = slot.dirty_bitmap
        log.settle_range(0, slot.npages)
        scratch[: len(log.words)] = 0
        flush = False
        with vm.mmu_lock.write():
            for i in map(int, np.flatnonzero(log.words)):
                flush = True
                kernel.protect(slot, i * 64, int(log.words[i]))
                scratch[i] = kernel.take(log, i, (1 << 64) - 1)
        return flush

    kernel.harvest = harvest


@bug("clear-unbounded", "98938aa8", "K", "errno/clear-dirty-log")
def clear_unbounded(vm: Any, undo: ExitStack) -> None:
    """CLEAR does not bound first_page and num_pages by the slot."""
    vm.dirty_log.check_range = lambda slot, first_page, num_pages: None


@bug("clear-refuses-the-tail", "76d58e0f", "E", "errno/clear-dirty-log")
def clear_refuses_the_tail(vm: Any, undo: ExitStack) -> None:
    """CLEAR refuses a length that is no multiple of 64 even at the end of the slot."""

    def make(check: Any) -> Any:
        def check_range(slot: Any, first_page: int, num_pages: int) -> None:
            if num_pages & 63:
                raise OSError(22, "num_pages")
            check(slot, first_page, num_pages)

        return check_range

    swap(vm.dirty_log, "check_range", make)


@bug("log-flush-forgotten", "rule of GET", "S", *RANDOM_W)
def log_flush_forgotten(vm: Any, undo: ExitStack) -> None:
    """GET and CLEAR do not flush the TLBs after they have protected."""
    vm.dirty_log.flush = lambda slot: None


@bug("enable-flush-forgotten", "b64d740e", "S", *RANDOM_W)
def enable_flush_forgotten(vm: Any, undo: ExitStack) -> None:
    """Enabling the log protects but flushes nothing, so an entry made read-only earlier stays writable in a TLB."""
    vm.regions.flush_after_enable = lambda slot: None


@bug("get-forgets-pml", "rule of 843e4330", "L", *RANDOM_PML)
def get_forgets_pml(vm: Any, undo: ExitStack) -> None:
    """GET does not kick the vCPUs: what their PML buffers hold is neither reported nor protected."""
    vm.kick_for_dirty_log = lambda: None

    def change(vcpu: Any) -> None:
        def make(exit_guest: Any) -> Any:
            def halted() -> None:
                vcpu.count("exits")
                if len(vcpu.pml) > 400:
                    exit_guest()

            return halted

        swap(vcpu, "exit_guest", make)

    each_vcpu(vm, change)


@bug("clear-takes-whole-words", "rule of 2a31b9db", "L", *RANDOM_W)
def clear_takes_the_whole_word(vm: Any, undo: ExitStack) -> None:
    """CLEAR takes whole words of the log instead of the bits that user space named."""

    def make(clear_words: Any) -> Any:
        def whole(slot: Any, first_page: int, num_pages: int, mask: Any) -> Any:
            full = np.where(mask != 0, np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0))
            return clear_words(slot, first_page, num_pages, full)

        return whole

    swap(vm.dirty_log, "clear_words", make)


@bug("atomic-not-marked", "910c57df", "L", "random/instruction-emulation", "random")
def atomic_not_marked(vm: Any, undo: ExitStack) -> None:
    """An emulated locked instruction stores without marking its page."""
    vm.access.mark_atomic = lambda slot, gfn, vcpu: None


@bug("kvm-write-not-marked", "svm: mark SEV secret pages dirty, 2020", "L", "random")
def kvm_write_not_marked(vm: Any, undo: ExitStack) -> None:
    """KVM writes guest memory itself (a launch secret, a clock page) and does not mark the page."""

    def make(write_page: Any) -> Any:
        def silent(gfn: int, offset: int, data: bytes, vcpu: Any) -> bool:
            slot = vm.access.slot(gfn, vcpu)
            page = vm.access.host_page(slot, gfn, write=True)
            if page is not None:
                vm.memory.write(page.pfn, offset, data)
            return page is not None

        return silent

    swap(vm.access, "write_page", make)


@bug("pml-newest-first", "37c3ddfe", "O", "dirty_ring/order,tdp,PML")
def pml_newest_first(vm: Any, undo: ExitStack) -> None:
    """The PML buffer is drained newest first, so the last ring entry is not the page written last."""

    def change(vcpu: Any) -> None:
        vcpu.pml.newest_first = True

    each_vcpu(vm, change)


@bug("pml-runs-for-l2", "c3bb9a20", "O", "nested_dirty_log_test", *RANDOM_PML)
def pml_runs_for_l2(vm: Any, undo: ExitStack) -> None:
    """PML stays on while L2 runs: the CPU logs L2's addresses, and KVM takes them for L1's."""

    def change(vcpu: Any) -> None:
        vcpu.pml_off_for_l2 = lambda: False

        def make(walk: Any) -> Any:
            def page_walk_l2(l2: Any, gfn: int, write: bool) -> Any:
                pfn = walk(l2, gfn, write)
                if write and pfn is not None:
                    vcpu.log_to_pml(gfn << 12)
                return pfn

            return page_walk_l2

        swap(vcpu, "page_walk_l2", make)

    each_vcpu(vm, change)


@bug("pml-toggled-in-l2s-vmcs", "3e013d0a", "L", "nested_dirty_log_test", *RANDOM_PML)
def pml_toggled_in_l2s_vmcs(vm: Any, undo: ExitStack) -> None:
    """PML is switched in the VMCS that is loaded, L2's; L1's control keeps its old value for good."""

    def change(vcpu: Any) -> None:
        def make(update: Any) -> Any:
            def update_cpu_dirty_logging() -> None:
                if not vcpu.guest_mode:
                    update()

            return update_cpu_dirty_logging

        swap(vcpu, "update_cpu_dirty_logging", make)

    each_vcpu(vm, change)


@bug("pml-never-switched-on", "rule of a85863c2", "L", *RANDOM_PML)
def pml_never_enabled(vm: Any, undo: ExitStack) -> None:
    """PML is not switched on when the first slot starts logging: D is set and nobody hears of it."""
    vm.regions.update_cpu_dirty_logging = lambda enable: None


@bug("ring-flag-before-fields", "8929bc96", "O", "dirty_ring/a reader beside the writer")
def ring_flag_before_fields(vm: Any, undo: ExitStack) -> None:
    """A ring entry's flag becomes visible before its slot and offset."""

    def change(vcpu: Any) -> None:
        ring = vcpu.dirty_ring
        if ring is None:
            return

        def push(slot_key: int, offset: int) -> None:
            at = ring.dirty_index & (ring.size - 1)
            ring.set_dirtied(at)
            ring.write_fields(at, slot_key, offset)
            ring.dirty_index += 1
            ring.soft_full_requested = ring.soft_full_requested or ring.soft_full

        ring.push = push

    each_vcpu(vm, change)


@bug("ring-reset-ignores-signals", "49005a2a", "H", "dirty_ring/a signal stops the reset")
def ring_reset_ignores_signals(vm: Any, undo: ExitStack) -> None:
    """RESET of a ring that user space keeps filling goes on past any signal."""

    def make(reset_ring: Any) -> Any:
        def deaf(vcpu: Any, limit: int) -> Any:
            pending, vm.signal_pending = vm.signal_pending, lambda: False
            try:
                return reset_ring(vcpu, limit)
            finally:
                vm.signal_pending = pending

        return deaf

    swap(vm.dirty_rings, "reset_ring", make)


@bug("ring-reset-signal-drops-batch", "open since 49005a2a", "L", "dirty_ring/a signal stops the reset")
def ring_reset_signal_drops_batch(vm: Any, undo: ExitStack) -> None:
    """RESET that a signal breaks off leaves without re-arming the entries it has gathered and emptied."""
    rings, interrupted = vm.dirty_rings, [False]

    def make(rearm: Any) -> Any:
        def unless_interrupted(slot_key: int, offset: int, mask: int) -> None:
            if not interrupted[0]:
                rearm(slot_key, offset, mask)

        return unless_interrupted

    def make_reset(reset_ring: Any) -> Any:
        def broken_off(vcpu: Any, limit: int) -> Any:
            pending = vm.signal_pending

            def notice() -> bool:
                interrupted[0] = pending()
                return interrupted[0]

            vm.signal_pending = notice
            try:
                return reset_ring(vcpu, limit)
            finally:
                vm.signal_pending, interrupted[0] = pending, False

        return broken_off

    swap(rings, "rearm", make)
    swap(rings, "reset_ring", make_reset)


@bug("ring-offset-wraps", "fixes fb04a1ed, 2026", "K", "dirty_ring/corrupt entries")
def ring_offset_wraps(vm: Any, undo: ExitStack) -> None:
    """The bound test of a ring entry adds in 64 bits and wraps: a corrupt offset passes."""

    def in_slot(offset: int, mask: int, npages: int) -> bool:
        return (offset + mask.bit_length() - 1) % (1 << 64) < npages

    vm.dirty_rings.in_slot = in_slot


@bug("ring-flush-forgotten", "rule of fb04a1ed", "S", *RANDOM_W)
def ring_flush_forgotten(vm: Any, undo: ExitStack) -> None:
    """RESET protects the pages and flushes no TLB."""
    vm.dirty_rings.flush = lambda: None


@bug("ring-coalesces-too-far", "rule of fb04a1ed", "L", "dirty_ring", *RANDOM_W)
def ring_coalesces_too_far(vm: Any, undo: ExitStack) -> None:
    """A backward jump shifts the pending mask although bits fall off its end: those pages stay writable."""

    def gather(pending: Any, slot_key: int, offset: int) -> Any:
        if pending is not None and pending[0] == slot_key:
            delta = offset - pending[1]
            if 0 <= delta < 64:
                return slot_key, pending[1], pending[2] | 1 << delta
            if -64 < delta < 0:
                return slot_key, offset, (pending[2] << -delta | 1) & (1 << 64) - 1
        if pending is not None:
            vm.dirty_rings.rearm(*pending)
        return slot_key, offset, 1

    vm.dirty_rings.gather = gather


@bug("ring-soft-limit-ignored", "rule of fb04a1ed", "K", "errno/dirty-ring")
def ring_soft_limit_ignored(vm: Any, undo: ExitStack) -> None:
    """A vCPU enters the guest with a full ring."""

    def change(vcpu: Any) -> None:
        vcpu.check_ring_full = lambda: None

    each_vcpu(vm, change)


@bug("enable-cap-takes-2", "rule of 3c9bd400", "E", "errno/enable-cap")
def enable_cap_takes_anything(vm: Any, undo: ExitStack) -> None:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 takes INITIALLY_SET without ENABLE."""

    def make(enable: Any) -> Any:
        def lax(cap: int, flags: int, args: Any) -> Any:
            if cap == 168 and flags == 0:
                vm.manual_dirty_log_protect = args[0] & 3
                return 0
            return enable(cap, flags, args)

        return lax

    swap(vm.caps, "enable", make)


@bug("get-in-ring-mode", "rule of b2cc64c4", "E", "errno/dirty-ring")
def get_in_ring_mode(vm: Any, undo: ExitStack) -> None:
    """GET and CLEAR of a VM with rings look for a slot instead of answering ENXIO."""

    def make(logged_slot: Any) -> Any:
        def lenient(slot_key: int, first_page: int = 0) -> Any:
            if not vm.use_dirty_bitmap:
                raise OSError(2, "no bitmap")
            return logged_slot(slot_key, first_page)

        return lenient

    swap(vm.dirty_log, "logged_slot", make)
