"""The kernel tests' command lines, test by test: their short options as they are (Linux 6.18), long names beside them.

What a test takes and the model has no use for is refused with a sentence that says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from migsim.commands.bounded import Bounded
from migsim.commands.output import destination

__all__ = ["BACKINGS", "NAMES", "SLOTS_MAX", "add_arguments"]

VCPUS_MAX: Final = 4096  # KVM_MAX_VCPUS at most (Linux 6.7)
ITERATIONS_MAX: Final = 10_000  # a second of work here; the phases of each are printed
SECONDS_MAX: Final = 86_400
DELAY_MAX_US: Final = 60_000_000
READERS_MAX: Final = 4096
RUNS_MAX: Final = 1000
SEED_MAX: Final = (1 << 31) - 1
SLOTS_MAX: Final = 32764  # KVM_CAP_NR_MEMSLOTS; slot 0 is the tests' own
BACKINGS: Final = (
    "anonymous", "anonymous_thp", "anonymous_hugetlb", "anonymous_hugetlb_2mb", "anonymous_hugetlb_1gb", "shmem",
    "shared_hugetlb",
)  # fmt: skip

_ONE_MODE: Final = "x86 has one guest mode: PA-bits:ANY, VA-bits:48, 4K pages"
_PINNED: Final = "every vCPU has a CPU of its own already"


class _NotModelled(argparse.Action):
    """An option of the kernel's test without meaning here: refused with its reason."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, help=argparse.SUPPRESS, **more)
        self.why = dest

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is not modelled: {self.why}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A sub-command a test, each with its own options."""
    tests = parser.add_subparsers(dest="name", metavar="NAME", required=True, help=", ".join(NAMES))
    for name, (about, add) in _TESTS.items():
        test = tests.add_parser(name, help=about, description=about)
        test.add_argument("--mmu", choices=("shadow", "tdp-5.10", "tdp"), default="tdp", help="default: tdp")
        test.add_argument("--kernel", type=_kernel, metavar="X.Y", help="rules of that release (default: the MMU's)")
        test.add_argument("--host", default="default", metavar="PROFILE", help="host profile, by name or .toml file")
        test.add_argument("--json", type=destination, metavar="FILE", help="the result as JSON; - for stdout")
        add(test)


def _memstress(test: argparse.ArgumentParser) -> None:
    """Options of every test whose guest is memstress."""
    test.add_argument("-v", "--vcpus", type=Bounded(1, VCPUS_MAX), default=1, metavar="N", help="vCPUs (default: 1)")
    size = "such as 4GiB, 3G (default: 1GiB)"
    test.add_argument("-b", "--memory-per-vcpu", type=_size, default=1 << 30, metavar="SIZE", help=size)
    test.add_argument("-s", "--backing", choices=BACKINGS, default="anonymous", help="backing source type")
    test.add_argument("-o", "--overlap", action="store_true", help="all vCPUs touch the same memory")
    test.add_argument("--no-pml", action="store_true", help="without page-modification logging")
    test.add_argument("--no-ad-bits", action="store_true", help="without hardware accessed and dirty bits")
    test.add_argument("--no-eager-page-split", action="store_true", help="the module parameter off")
    test.add_argument("-m", action=_NotModelled, dest=_ONE_MODE)


def _demand_paging(test: argparse.ArgumentParser) -> None:
    _memstress(test)
    test.add_argument("-u", "--uffd", choices=("MISSING", "MINOR"), help="userfaultfd mode")
    test.add_argument("-a", "--single-uffd", action="store_true", help="one userfaultfd for all, as with -o")
    delay = "the handler's delay per fault, us; without -u ignored"
    test.add_argument("-d", "--uffd-delay", type=Bounded(0, DELAY_MAX_US), default=0, metavar="US", help=delay)
    readers = "reader threads per userfaultfd (default: 1)"
    test.add_argument("-r", "--readers", type=Bounded(1, READERS_MAX), default=1, metavar="N", help=readers)
    test.add_argument("-c", action=_NotModelled, dest=_PINNED)


def _dirty_log_perf(test: argparse.ArgumentParser) -> None:
    _memstress(test)
    rounds = Bounded(2, ITERATIONS_MAX)
    test.add_argument("-i", "--iterations", type=rounds, default=2, metavar="N", help="dirty rounds (default: 2)")
    test.add_argument("-a", "--random-access", action="store_true", help="pages at random rather than in order")
    percent = "chance of a write, per cent (default: 100)"
    test.add_argument("-w", "--write-percent", type=Bounded(0, 100), default=100, metavar="P", help=percent)
    test.add_argument("-g", "--no-manual-caps", action="store_true", help="without manual protection")
    test.add_argument("--no-initially-set", action="store_true", help="manual protection without INITIALLY_SET")
    slots = "memslots the guest is split over"
    test.add_argument("-x", "--slots", type=Bounded(1, SLOTS_MAX - 1), default=1, metavar="N", help=slots)
    seed = "the guest's random seed (default: 1); expectations do not depend on it"
    test.add_argument("-r", "--random-seed", type=Bounded(1, SEED_MAX), default=1, metavar="N", help=seed)
    test.add_argument("-c", action=_NotModelled, dest=_PINNED)
    test.add_argument("-e", action=_NotModelled, dest="vCPUs stand still while logging is disabled", nargs=0)
    test.add_argument("-n", action=_NotModelled, dest="the guest is not nested", nargs=0)
    test.add_argument("-p", action=_NotModelled, dest="the kernel's test reads the offset and uses it nowhere")


def _memslot_perf(test: argparse.ArgumentParser) -> None:
    slots = "memslots at most, the test's own included; -1: as many as KVM has (default)"
    test.add_argument("-s", "--slots", type=_slots, default=-1, metavar="N", help=slots)
    first, last = "first test to run (default: 0)", "last test to run (default: 5)"
    test.add_argument("-f", "--first", type=Bounded(0, 5), default=0, metavar="N", help=first)
    test.add_argument("-e", "--last", type=Bounded(0, 5), default=5, metavar="N", help=last)
    length = Bounded(1, SECONDS_MAX)
    test.add_argument("-l", "--length", type=length, default=5, metavar="S", help="seconds per test (default: 5)")
    test.add_argument("-r", "--runs", type=Bounded(1, RUNS_MAX), default=1, metavar="N", help="runs per test")
    test.add_argument("-q", "--no-zap-all-quirk", action="store_true", help="KVM_X86_QUIRK_SLOT_ZAP_ALL off")
    test.add_argument("-v", "--verbose", action="store_true", help="what the slots look like, too")
    test.add_argument("-d", action=_NotModelled, dest="there are no contents to check", nargs=0)


def _access_tracking(test: argparse.ArgumentParser) -> None:
    _memstress(test)
    test.add_argument("-w", action=_NotModelled, dest="no page is found idle against expectation")


_TESTS: Final[dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]]] = {
    "access_tracking_perf_test": ("populate, write, read, mark idle, touch again", _access_tracking),
    "demand_paging_test": ("every vCPU touches its memory once", _demand_paging),
    "dirty_log_perf_test": ("populate, enable logging, rounds of dirty, get and clear, disable", _dirty_log_perf),
    "memslot_perf_test": ("map, unmap, move and use memory with many memslots", _memslot_perf),
}
NAMES: Final = tuple(_TESTS)


def _size(text: str) -> int:
    """Bytes: "4GiB", and as in the kernel's tests "4G", "512M", "64k" (powers of two)."""
    from migsim.quantities import size

    kernel_suffix = {"k": "KiB", "K": "KiB", "m": "MiB", "M": "MiB", "g": "GiB", "G": "GiB", "t": "TiB", "T": "TiB"}
    try:
        return size(
            text[:-1] + kernel_suffix[text[-1]] if text[-1:] in kernel_suffix else int(text) if text.isdigit() else text
        )
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _slots(text: str) -> int:
    return -1 if text == "-1" else Bounded(2, SLOTS_MAX)(text)


def _kernel(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal() and len(text) < 16):
        raise argparse.ArgumentTypeError(f'"{text[:32]}": expected a release such as 5.12')
    return int(major), int(minor)
