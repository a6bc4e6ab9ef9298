"""`migsim bench --host`: measure on this machine what a host profile states, and write one.

Without /dev/kvm: copying memory, scanning a bitmap, first touch of an anonymous page. With it also the real GET, CLEAR,
first-touch fault and the fault on a re-armed page, through the same calls the emulator offers. Best of several runs:
noise only ever adds. What cannot be measured here is inherited from the base profile.
"""

from __future__ import annotations

import mmap
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Final

import numpy as np
import psutil

from migsim.host_kvm.device import unavailable_reason
from migsim.host_kvm.vcpu import HostVcpu
from migsim.host_kvm.vm import HostVm
from migsim.kvm.uapi import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES
from migsim.perf.profile import load_profile
from migsim.units import MIB, PAGE_SIZE

__all__ = ["BASE", "Measured", "measure", "profile_name", "profile_text"]

BASE: Final = "skylake-2s-96"
_NODES: Final = Path("/sys/devices/system/node")
_RUNS: Final = 5
_GPA: Final = 0x1000_0000
_INITIALLY_SET: Final = 3


@dataclass(frozen=True)
class Measured:
    """One number of a profile: a machine quantity (bytes/s) or the ns of an operation, and how it was measured."""

    name: str
    value: float
    how: str
    machine: bool = False


def measure(*, size: int = 256 * MIB, touched_pages: int = 4096) -> list[Measured]:
    """Everything measurable here. `size`: bytes of memory and of KVM slot; `touched_pages`: pages the guest writes."""
    measured = [*_topology(), _memcpy(size // 4), _bitmap_scan(size // 4), _host_fault(touched_pages)]
    if unavailable_reason() is None:
        measured += _kvm_log(size) + _kvm_faults(touched_pages, measured[-1].value)
    return measured


def profile_text(name: str, measured: list[Measured]) -> str:
    """A profile as TOML: `BASE`, and over it what was measured."""
    where = f"{_cpu_model()}, Linux {platform.release()}"
    missing = unavailable_reason()
    about = f"measured by migsim bench --host on {where}" + (f"; without KVM: {missing}" if missing else "")
    lines = [f'base = "{BASE}"', f"name = {_quoted(name)}", f"about = {_quoted(about)}", "", "[machine]"]
    lines += [_line(m, "value", where) for m in measured if m.machine]
    lines += ["", "[costs]", *(_line(m, "ns", where) for m in measured if not m.machine)]
    return "\n".join(lines) + "\n"


def profile_name(path: str) -> str:
    """What a profile written to `path` is called: as its file, or as this machine on standard output ("-")."""
    return (platform.node() or "here") if path == "-" else Path(path).stem


def _line(measured: Measured, unit: str, where: str) -> str:
    source = _quoted(f"measured: {measured.how}; {where}")
    return f"{measured.name} = {{ {unit} = {measured.value:.6g}, source = {source} }}"


def _quoted(text: str) -> str:
    safe = "".join(c if c.isprintable() and c not in '"\\' else " " for c in text)
    return f'"{safe}"'


# -- this machine ------------------------------------------------------------------------------------------------------


def _best_ns(step: Callable[[], object]) -> int:
    """Shortest of several runs of `step`."""
    return min(_timed(step) for _ in range(_RUNS))


def _timed(step: Callable[[], object]) -> int:
    start = perf_counter_ns()
    step()
    return max(perf_counter_ns() - start, 1)


def _topology() -> list[Measured]:
    """Sockets, cores and threads as /proc/cpuinfo names them; nothing where it names none (a guest may hide them)."""
    cpus = psutil.cpu_count() or 1
    cores = psutil.cpu_count(logical=False) or cpus
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    sockets = len({line for line in text.splitlines() if line.startswith("physical id")}) or 1
    how = "counted in /proc/cpuinfo"
    return [
        Measured("sockets", sockets, how, machine=True),
        Measured("cores-per-socket", max(cores // sockets, 1), how, machine=True),
        Measured("threads-per-core", max(cpus // cores, 1), how, machine=True),
        Measured("numa-nodes", len(list(_NODES.glob("node[0-9]*"))) or 1, f"counted in {_NODES}", machine=True),
    ]


def _memcpy(size: int) -> Measured:
    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    rate = 2 * size / _best_ns(lambda: np.copyto(target, source)) * 1e9
    return Measured("memory-bandwidth", rate, "bytes read and written by a memcpy on one core", machine=True)


def _bitmap_scan(size: int) -> Measured:
    words = np.zeros(size // 8, dtype=np.uint64)
    return Measured("bitmap-scan-word", _best_ns(words.any) / len(words), "64-bit words tested for a set bit")


def _host_fault(pages: int) -> Measured:
    def touch() -> int:
        with mmap.mmap(-1, pages * PAGE_SIZE) as memory:
            return _timed(partial(_touch, memory))

    return Measured("host-fault", min(touch() for _ in range(_RUNS)) / pages, "first touch of anonymous 4 KiB pages")


def _touch(memory: mmap.mmap) -> None:
    view = np.frombuffer(memory, dtype=np.uint8)
    view[::PAGE_SIZE] = 1


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# -- KVM ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _logged_vm(size: int) -> Iterator[tuple[HostVm, Callable[[int], None], HostVcpu]]:
    """A VM with one slot of `size` bytes; the callable sets the slot's flags."""
    with HostVm() as vm:
        vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(_INITIALLY_SET, 0, 0, 0))
        hva = vm.alloc_memory(size)
        vm.set_user_memory_region(0, 0, _GPA, size, hva)
        vcpu = vm.create_vcpu(0)
        yield vm, lambda flags: vm.set_user_memory_region(0, flags, _GPA, size, hva), vcpu


def _kvm_log(size: int) -> list[Measured]:
    """GET copies the log, CLEAR re-arms every page of it; all bits are set when logging starts."""
    pages = size // PAGE_SIZE
    bitmap = np.zeros(pages // 64, dtype=np.uint64)
    get, clear = [], []
    with _logged_vm(size) as (vm, set_flags, _):
        for _run in range(_RUNS):
            set_flags(KVM_MEM_LOG_DIRTY_PAGES)
            get += [_timed(lambda: vm.get_dirty_log(0, bitmap)) for _again in range(_RUNS)]
            clear.append(_timed(lambda: vm.clear_dirty_log(0, 0, pages, bitmap)))
            set_flags(0)
    return [
        Measured("bitmap-word", min(get) / len(bitmap), "KVM_GET_DIRTY_LOG with manual protection, a word"),
        Measured("kvm-clear-page", min(clear) / pages, "KVM_CLEAR_DIRTY_LOG of a full log, a page"),
    ]


def _kvm_faults(pages: int, host_fault_ns: float) -> list[Measured]:
    """Guest stores to fresh pages, to mapped ones and to re-armed ones; the differences are the faults."""
    size = pages * PAGE_SIZE
    ops = [("w", _GPA + page * PAGE_SIZE, 1) for page in range(pages)]
    bitmap = np.zeros(-(-pages // 64), dtype=np.uint64)
    with _logged_vm(size) as (vm, set_flags, vcpu):
        fresh = _timed(lambda: vcpu.run(ops))
        mapped = _best_ns(lambda: vcpu.run(ops))
        armed = []
        set_flags(KVM_MEM_LOG_DIRTY_PAGES)
        for _run in range(_RUNS):
            vm.get_dirty_log(0, bitmap)
            vm.clear_dirty_log(0, 0, pages, bitmap)
            armed.append(_timed(lambda: vcpu.run(ops)))
        if vcpu.stats_read().get("insn_emulation", 0) >= pages:
            return []  # this KVM emulates the guest's instructions: its stores never fault
    base = load_profile(BASE)
    exit_ns, fast_ns = base.ns("vm-exit"), base.ns("fast-page-fault")
    refault = max((min(armed) - mapped) / pages, 1.0)
    first = max((fresh - mapped) / pages - host_fault_ns, 1.0)
    exit_measured = refault * exit_ns / (exit_ns + fast_ns)
    split = "exit and handler divided as in the base profile"
    return [
        Measured("vm-exit", exit_measured, f"store to a re-armed page; {split}"),
        Measured("fast-page-fault", refault - exit_measured, f"store to a re-armed page; {split}"),
        Measured("fault-prepare", max(first - exit_measured, 0.0), "first store to a page, less exit and host fault"),
    ]
