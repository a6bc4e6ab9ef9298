"""What a selftest charges against what the emulated KVM does: the same faults, splits and flushes."""

from __future__ import annotations

import numpy as np
import pytest

from migsim.kvm.config import VmConfig
from migsim.kvm.ioctl import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES
from migsim.kvm.vm import Vm
from migsim.perf.memstress import Counts, Memstress
from migsim.perf.rules import MMUS
from migsim.sim.meter import CountingMeter
from migsim.units import MIB, PAGE_SIZE

_VCPUS, _PER_VCPU, _GPA, _SLOT = 2, 4 * MIB, 1 << 30, 1
_PAGES = _VCPUS * _PER_VCPU // PAGE_SIZE
_LEVELS = {"anonymous": 1, "anonymous_hugetlb_2mb": 2}


class _Emulated:
    """dirty_log_perf_test's phases on the emulated Vm; `seen` is what happened since it was last asked."""

    def __init__(self, mmu: str, backing: str, manual: int, *, pml: bool) -> None:
        self.meter = CountingMeter()
        self.vm = Vm(VmConfig(mmu=mmu, pml=pml, smm=False), meter=self.meter)  # type: ignore[arg-type]
        if manual:
            self.vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(manual, 0, 0, 0))
        self.hva = self.vm.alloc_memory(_PAGES * PAGE_SIZE, _LEVELS[backing])
        self.set_flags(0)
        self.vcpus = [self.vm.create_vcpu(i) for i in range(_VCPUS)]
        self.bitmap = np.zeros(_PAGES // 64, dtype=np.uint64)
        self._before: dict[str, int] = {}

    def set_flags(self, flags: int) -> None:
        self.vm.set_user_memory_region(_SLOT, flags, _GPA, _PAGES * PAGE_SIZE, self.hva)

    def write_all(self) -> None:
        each = _PAGES // _VCPUS
        for i, vcpu in enumerate(self.vcpus):
            vcpu.run([("w", _GPA + (i * each + page) * PAGE_SIZE, 1) for page in range(each)])

    def seen(self) -> dict[str, int]:
        now = {**self.vm.stats_read(), **self.meter.totals}
        before, self._before = self._before, now
        return {name: n - before.get(name, 0) for name, n in now.items()}


def _agree(seen: dict[str, int], counts: Counts, phase: str) -> None:
    """Everything both sides count."""
    slow = seen["pf_fixed"] - seen["pf_fast"]
    assert slow == counts.get("slow-fault", 0) + counts.get("present-fault", 0), phase
    assert seen["pf_fast"] == counts.get("fast-fault", 0), phase
    assert seen.get("huge_page_split", 0) == counts.get("split-table", 0), phase
    assert seen.get("remote_tlb_flush", 0) == counts.get("tlb-flush", 0), phase
    if "host-fault" not in counts:  # populate also makes the tables above its leaves
        assert seen.get("table_alloc", 0) == counts.get("table-alloc", 0), phase


def _populate(run: _Emulated, vm: Memstress) -> None:
    run.write_all()
    # The legacy MMU maps eight neighbours at once when the host has them; demand paging finds a host that has not.
    if vm.mmu == "shadow":
        run.seen()
    else:
        _agree(run.seen(), vm.populate(), "populate")


@pytest.mark.parametrize("pml", [True, False], ids=["pml", "wrprot"])
@pytest.mark.parametrize("manual", [0, 1, 3])
@pytest.mark.parametrize("backing", _LEVELS)
@pytest.mark.parametrize("mmu", MMUS)
def test_every_phase_charges_what_the_emulator_does(mmu: str, backing: str, manual: int, pml: bool) -> None:
    vm = Memstress(_VCPUS, _PER_VCPU, mmu, backing=backing, manual=manual, pml=pml)
    run = _Emulated(mmu, backing, manual, pml=pml)
    _populate(run, vm)
    run.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    counts, leaves = vm.enable()
    _agree(run.seen(), counts, "enable")
    for iteration in (1, 2):
        run.write_all()
        counts, leaves = vm.dirty(leaves)
        _agree(run.seen(), counts, f"dirty {iteration}")
        run.vm.get_dirty_log(_SLOT, run.bitmap)
        assert int(np.bitwise_count(run.bitmap).sum()) == vm.written
        counts, leaves = vm.get(leaves)
        _agree(run.seen(), counts, f"get {iteration}")
        if manual:
            run.vm.clear_dirty_log(_SLOT, 0, _PAGES, run.bitmap)
            counts, leaves = vm.clear(leaves, first=iteration == 1)
            _agree(run.seen(), counts, f"clear {iteration}")
    run.set_flags(0)
    seen, counts = run.seen(), vm.disable(leaves)
    _agree(seen, counts, "disable")
    zapped = counts.get("spte-zap", 0) + counts.get("rmap-zap", 0)
    assert -seen["pages_4k"] == zapped, "disable"
