"""Rows about CLEAR: a dense pass against memcpy, and the emulated ioctl against the one of the real KVM."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Final

import numpy as np

from migsim.bench.table import Measured, Missing
from migsim.bench.timing import interleaved, median_ratio, timed_ns
from migsim.host_kvm import HostVm
from migsim.host_kvm.device import unavailable_reason
from migsim.host_kvm.vcpu import HostVcpu
from migsim.kvm.bulk import COUNTS_LEN, REARMED, rearm
from migsim.kvm.config import VmConfig
from migsim.kvm.populate import populate
from migsim.kvm.uapi import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES
from migsim.kvm.vcpu import Vcpu
from migsim.kvm.vm import Vm
from migsim.planes import ALL_ONES, Words, summary_of_ones
from migsim.units import CHUNK_WORDS, GIB, MIB, PAGE_SIZE, WORD_BITS, chunks_of

__all__ = ["measure_dense_clear", "measure_kvm_clear"]

GPA: Final = 0x1000_0000
SLOT: Final = 0
INITIALLY_SET: Final = 3
TURNS: Final = 9
IN_A_ROW: Final = 5
OPS: Final = 8192  # stores a KVM_RUN


def measure_dense_clear(*, quick: bool) -> dict[str, Measured | str]:
    """CLEAR's word kernel where every page is marked, against a memcpy that reads and writes as many bytes.

    The pass reads mask, log and protection plane and writes the latter two: of planes of P bytes 5 P move, so the
    memcpy is one of 2.5 P. The planes are those of a 4 TiB guest (--quick: 512 GiB), past any cache.
    """
    pages = (512 if quick else 4096) * GIB // PAGE_SIZE
    mask, log, protection = (np.full(pages // WORD_BITS, ALL_ONES) for _ in range(3))
    summary = summary_of_ones(pages)
    source = np.ones(5 * mask.nbytes // 2, dtype=np.uint8)  # not zeros: those would all be the one zero page
    target = np.full_like(source, 2)

    def clear_pass() -> float:
        log.fill(ALL_ONES)
        protection.fill(ALL_ONES)
        counts = np.zeros(COUNTS_LEN, dtype=np.int64)
        took = timed_ns(lambda: rearm(mask, summary, 0, log, protection, 0, chunks_of(pages), counts))
        assert counts[REARMED] == pages and not log.any() and not protection.any()
        return took

    clear_pass()  # loads the kernel
    rivals: dict[str, Callable[[], float]] = {
        "clear": clear_pass,
        "memcpy": lambda: timed_ns(lambda: np.copyto(target, source)),
    }
    times = interleaved(rivals, turns=TURNS)
    detail = {
        "pages": pages,
        "bytes-moved": 5 * mask.nbytes,
        "clear-ns-a-page": median(times["clear"]) / pages,
        "memcpy-ns": median(times["memcpy"]),
    }
    return {"dense-clear": Measured(median_ratio(times["clear"], times["memcpy"]), detail)}


def measure_kvm_clear(*, quick: bool) -> dict[str, Measured | str]:
    """KVM_CLEAR_DIRTY_LOG of a full log, all pages mapped, on one slot: the real KVM's ns over the emulated one's."""
    reason = unavailable_reason()
    if reason is not None:
        raise Missing(reason)
    size = 128 * MIB if quick else GIB
    with ExitStack() as stack:
        real = stack.enter_context(HostVm())
        emulated = stack.enter_context(Vm(VmConfig(), bulk=True))
        here, there = _slot(real, size), _slot(emulated, size)
        _touch(real.create_vcpu(0), size)
        _populate(emulated, emulated.create_vcpu(0), size)
        steps: dict[str, Callable[[], float]] = {
            "real": partial(_clear_ns, real, here, size),
            "emulated": partial(_clear_ns, emulated, there, size),
            "fused": _fused_clear(size // PAGE_SIZE),
        }
        rivals = {name: partial(_in_a_row, step) for name, step in steps.items()}
        times = interleaved(rivals, turns=3 if quick else TURNS)
    pages = size // PAGE_SIZE
    detail = {"pages": pages} | {f"{name}-ns-a-page": median(found) / pages for name, found in times.items()}
    return {
        "kvm-clear": Measured(median_ratio(times["real"], times["emulated"]), detail),
        "kvm-clear-fused": Measured(median_ratio(times["real"], times["fused"]), detail),
    }


def _in_a_row(step: Callable[[], float]) -> float:
    """The median of a few turns of one rival: a migration does CLEAR after CLEAR, and none finds its caches cold."""
    return median(step() for _ in range(IN_A_ROW))


def _fused_clear(pages: int) -> Callable[[], float]:
    """The same work as the fused loops of a 12 TiB run do it: CLEAR's word kernel, chunk by chunk."""
    mask, log, protection = (np.full(pages // WORD_BITS, ALL_ONES) for _ in range(3))
    summary = summary_of_ones(pages)
    counts = np.zeros(COUNTS_LEN, dtype=np.int64)

    def clear_all() -> None:
        for w0 in range(0, len(mask), CHUNK_WORDS):
            rearm(mask, summary, w0, log, protection, w0, 1, counts)

    def timed() -> float:
        log.fill(ALL_ONES)
        protection.fill(ALL_ONES)
        return timed_ns(clear_all)

    timed()  # loads the kernel
    return timed


def _slot(vm: Vm | HostVm, size: int) -> int:
    """A slot of `size` bytes, not logged yet; its hva."""
    vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(INITIALLY_SET, 0, 0, 0))
    hva = vm.alloc_memory(size)
    vm.set_user_memory_region(SLOT, 0, GPA, size, hva)
    return hva


def _touch(vcpu: HostVcpu, size: int) -> None:
    """The guest stores to every page, so that every page is mapped."""
    for first in range(0, size // PAGE_SIZE, OPS):
        vcpu.run([("w", GPA + page * PAGE_SIZE, 1) for page in range(first, min(first + OPS, size // PAGE_SIZE))])


def _populate(vm: Vm, vcpu: Vcpu, size: int) -> None:
    """The same in bulk: as if the guest had stored to every page."""
    slot = vm.memslots(0).by_id(SLOT)
    assert slot is not None
    populate(vm.mmu.state, vm.mmu.root_of(vcpu), slot, 0, size // PAGE_SIZE)


def _clear_ns(vm: Vm | HostVm, hva: int, size: int) -> float:
    """Logging on (every bit is set then), GET, the CLEAR that is timed, logging off."""
    pages = size // PAGE_SIZE
    bitmap: Words = np.zeros(pages // WORD_BITS, dtype=np.uint64)
    vm.set_user_memory_region(SLOT, KVM_MEM_LOG_DIRTY_PAGES, GPA, size, hva)
    vm.get_dirty_log(SLOT, bitmap)
    assert (bitmap == ALL_ONES).all()
    took = timed_ns(lambda: vm.clear_dirty_log(SLOT, 0, pages, bitmap))
    vm.set_user_memory_region(SLOT, 0, GPA, size, hva)
    return took
