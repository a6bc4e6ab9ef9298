"""`migsim selftest NAME`: the kernel tests' own options, short ones included. Heavy modules load when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from migsim.commands.bounded import Bounded
from migsim.commands.look import refuse_unwritable
from migsim.commands.output import destination, printing, say
from migsim.scenario import ScenarioError

if TYPE_CHECKING:
    from migsim.perf.memstress import Memstress
    from migsim.perf.profile import HostProfile
    from migsim.selftest.outcome import Outcome

__all__ = ["NAMES", "add_arguments", "run_selftest"]

NAMES = ("access_tracking_perf_test", "demand_paging_test", "dirty_log_perf_test", "memslot_perf_test")
VCPUS_MAX = 4096  # KVM_MAX_VCPUS at most (Linux 6.7)
ADDRESS_BITS = 52  # of a guest's physical addresses at most
ITERATIONS_MAX = 10_000  # a second of work here; the phases of each are printed
SECONDS_MAX = 86_400
DELAY_MAX_US = 60_000_000
_SLOTS_MAX = 32763  # selftest.memslot_perf.SLOTS_MAX, KVM's 32764 user slots less the test's own
_BACKINGS = ("anonymous", "anonymous_thp", "anonymous_hugetlb_2mb", "anonymous_hugetlb_1gb", "shmem", "shared_hugetlb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options; one that does not concern the chosen test is refused when it runs."""
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--mmu", choices=("shadow", "tdp-5.10", "tdp"), default="tdp", help="which MMU (default: tdp)")
    parser.add_argument(
        "--kernel", type=_kernel, metavar="X.Y", help="rules of that release (default: 5.10 or today's)"
    )
    parser.add_argument("--host", default="default", metavar="PROFILE", help="host profile, by name or .toml file")
    guest = parser.add_argument_group("guest (memstress)")
    guest.add_argument("-v", "--vcpus", type=Bounded(1, VCPUS_MAX), default=1, metavar="N", help="vCPUs (default: 1)")
    guest.add_argument(
        "-b", "--memory-per-vcpu", type=_size, default=1 << 30, metavar="SIZE", help="such as 4GiB, 3G (default: 1GiB)"
    )
    guest.add_argument("-s", "--backing", choices=_BACKINGS, default="anonymous", help="backing source type")
    guest.add_argument("-o", "--overlap", action="store_true", help="all vCPUs touch the same memory")
    slots = Bounded(1, _SLOTS_MAX)
    guest.add_argument("-x", "--slots", type=slots, default=1, metavar="N", help="memslots the guest is split over")
    guest.add_argument("--no-pml", action="store_true", help="without page-modification logging")
    guest.add_argument("--no-ad-bits", action="store_true", help="without hardware accessed and dirty bits")
    guest.add_argument("--no-eager-page-split", action="store_true", help="the module parameter off")
    _add_test_options(parser)
    parser.add_argument("--json", type=destination, metavar="FILE", help="the result as JSON; - for stdout")


def _add_test_options(parser: argparse.ArgumentParser) -> None:
    dirty = parser.add_argument_group("dirty_log_perf_test")
    rounds = Bounded(2, ITERATIONS_MAX)
    dirty.add_argument("-i", "--iterations", type=rounds, metavar="N", help="dirty rounds (default: 2)")
    percent = "pages written, per cent (default: 100)"
    dirty.add_argument("-w", "--write-percent", type=Bounded(0, 100), metavar="P", help=percent)
    dirty.add_argument("-g", "--no-manual-caps", action="store_true", help="without manual protection")
    dirty.add_argument("--no-initially-set", action="store_true", help="manual protection without INITIALLY_SET")
    paging = parser.add_argument_group("demand_paging_test")
    paging.add_argument("-u", "--uffd", choices=("MISSING", "MINOR"), help="userfaultfd mode")
    delay = "the handler's delay per fault, us"
    paging.add_argument("-d", "--uffd-delay", type=Bounded(0, DELAY_MAX_US), metavar="US", help=delay)
    slots = parser.add_argument_group("memslot_perf_test")
    slots.add_argument("-n", "--nslots", type=Bounded(1, _SLOTS_MAX), metavar="N", help="memslots (default: 32763)")
    length = Bounded(1, SECONDS_MAX)
    slots.add_argument("-l", "--length", type=length, metavar="S", help="seconds per test (default: 5)")
    slots.add_argument("-q", "--no-zap-all-quirk", action="store_true", help="KVM_X86_QUIRK_SLOT_ZAP_ALL off")


def run_selftest(args: argparse.Namespace) -> int:
    """Run the test and print it. 0 when it ran, 2 for bad input (one sentence on stderr)."""
    from migsim.perf.profile import ProfileError, load_profile

    if args.json not in (None, "-"):
        refuse_unwritable(args.json)
    try:
        _refuse_foreign_options(args)
        _refuse_too_much_memory(args)
        outcome = _RUNNERS[args.name](args, load_profile(args.host))
    except (ProfileError, ValueError) as error:
        say(f"migsim selftest: {error}")
        return 2
    _report(outcome, args.json)
    return 0


def _report(outcome: Outcome, target: str | None) -> None:
    """The JSON before anything is printed: a closed pipe cannot cost the result."""
    from migsim.result import write_whole

    text = json.dumps(outcome.as_json(), indent=2) + "\n"
    delivered = target not in (None, "-")
    if delivered:
        try:
            write_whole(text.encode(), str(target))
        except OSError as error:
            raise ScenarioError("", f"cannot write the result: {error.strerror}", file=str(target)) from None
    with printing(delivered=delivered):
        if target == "-":
            sys.stdout.write(text)
            return
        print("\n".join(outcome.lines))
        print(f"Total time: {outcome.total_time_ns / 1e9:.3f}s")
        print(f"Time waiting for mmu_lock: {100 * outcome.lock_waiting_share:.1f} % of the vCPUs' time")


_OWN: dict[str, dict[str, str]] = {
    "dirty_log_perf_test": {
        "iterations": "--iterations",
        "write_percent": "--write-percent",
        "no_manual_caps": "--no-manual-caps",
        "no_initially_set": "--no-initially-set",
    },
    "demand_paging_test": {"uffd": "--uffd", "uffd_delay": "--uffd-delay"},
    "memslot_perf_test": {"nslots": "--nslots", "length": "--length", "no_zap_all_quirk": "--no-zap-all-quirk"},
    "access_tracking_perf_test": {},
}


def _refuse_foreign_options(args: argparse.Namespace) -> None:
    for test, options in _OWN.items():
        for name, flag in options.items():
            if test != args.name and getattr(args, name) not in (None, False):
                raise ValueError(f"{flag} belongs to {test}, not to {args.name}")


def _refuse_too_much_memory(args: argparse.Namespace) -> None:
    memory = args.memory_per_vcpu * (1 if args.overlap else args.vcpus)
    if memory > 1 << ADDRESS_BITS:
        sizes = f"{args.vcpus} vCPUs of {args.memory_per_vcpu} bytes"
        raise ValueError(f"--memory-per-vcpu: {sizes} do not fit in physical addresses of {ADDRESS_BITS} bits")


def _vm(args: argparse.Namespace, **more: int) -> Memstress:
    from migsim.perf.memstress import Memstress

    return Memstress(
        vcpus=args.vcpus,
        memory_per_vcpu=args.memory_per_vcpu,
        mmu=args.mmu,
        kernel=args.kernel,
        backing=args.backing,
        overlap=args.overlap,
        slots=args.slots,
        pml=not args.no_pml,
        ad_bits=not args.no_ad_bits,
        eager_page_split=not args.no_eager_page_split,
        **more,
    )


def _demand_paging(args: argparse.Namespace, host: HostProfile) -> Outcome:
    from migsim.selftest.demand_paging import demand_paging_test

    return demand_paging_test(_vm(args), host, uffd=args.uffd or "none", uffd_delay_us=args.uffd_delay or 0)


def _dirty_log_perf(args: argparse.Namespace, host: HostProfile) -> Outcome:
    from migsim.selftest.dirty_log_perf import dirty_log_perf_test

    manual = 0 if args.no_manual_caps else 1 if args.no_initially_set else 3
    percent = 100 if args.write_percent is None else args.write_percent
    iterations = 2 if args.iterations is None else args.iterations
    return dirty_log_perf_test(_vm(args, manual=manual, write_percent=percent), host, iterations=iterations)


def _access_tracking(args: argparse.Namespace, host: HostProfile) -> Outcome:
    from migsim.selftest.access_tracking_perf import access_tracking_perf_test

    return access_tracking_perf_test(_vm(args), host)


def _memslot_perf(args: argparse.Namespace, host: HostProfile) -> Outcome:
    from migsim.selftest.memslot_perf import SLOTS_MAX, memslot_perf_test

    return memslot_perf_test(
        _vm(args),
        host,
        nslots=SLOTS_MAX if args.nslots is None else args.nslots,
        seconds_per_test=5 if args.length is None else args.length,
        zap_all_quirk=not args.no_zap_all_quirk,
    )


_RUNNERS: dict[str, Callable[[argparse.Namespace, HostProfile], Outcome]] = {
    "demand_paging_test": _demand_paging,
    "dirty_log_perf_test": _dirty_log_perf,
    "access_tracking_perf_test": _access_tracking,
    "memslot_perf_test": _memslot_perf,
}


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


def _kernel(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise argparse.ArgumentTypeError(f'"{text}": expected a release such as 5.12')
    return int(major), int(minor)
