"""`migsim selftest NAME`: run a kernel test on the model and print what it prints. Heavy modules load when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migsim.commands.look import refuse_unwritable
from migsim.commands.output import printing, say
from migsim.scenario import ScenarioError
from migsim.selftest.options import NAMES, add_arguments

if TYPE_CHECKING:
    from migsim.perf.memstress import Memstress
    from migsim.perf.profile import HostProfile
    from migsim.selftest.outcome import Outcome

__all__ = ["NAMES", "add_arguments", "run_selftest"]


def run_selftest(args: argparse.Namespace) -> int:
    """Run the test and print it. 0 when it ran, 2 for bad input (one sentence on stderr)."""
    from migsim.perf.profile import ProfileError, load_profile

    if args.json not in (None, "-"):
        refuse_unwritable(args.json)
    try:
        outcome = _RUNNERS[args.name](args, load_profile(args.host))
    except (ProfileError, ValueError) as error:
        say(f"migsim selftest {args.name}: {error}")
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


def _vm(args: argparse.Namespace, **more: Any) -> Memstress:
    from migsim.perf.memstress import Memstress

    return Memstress(
        vcpus=args.vcpus,
        memory_per_vcpu=args.memory_per_vcpu,
        mmu=args.mmu,
        kernel=args.kernel,
        backing=args.backing,
        overlap=args.overlap,
        pml=not args.no_pml,
        ad_bits=not args.no_ad_bits,
        eager_page_split=not args.no_eager_page_split,
        **more,
    )


def _demand_paging(args: argparse.Namespace, host: HostProfile) -> Outcome:
    from migsim.selftest.demand_paging import demand_paging_test

    return demand_paging_test(
        _vm(args),
        host,
        uffd=args.uffd or "none",
        uffd_delay_us=args.uffd_delay,
        single_uffd=args.single_uffd,
        readers=args.readers,
    )


def _dirty_log_perf(args: argparse.Namespace, host: HostProfile) -> Outcome:
    from migsim.selftest.dirty_log_perf import dirty_log_perf_test

    manual = 0 if args.no_manual_caps else 1 if args.no_initially_set else 3
    vm = _vm(args, manual=manual, write_percent=args.write_percent, slots=args.slots, random_access=args.random_access)
    return dirty_log_perf_test(vm, host, iterations=args.iterations, seed=args.random_seed)


def _access_tracking(args: argparse.Namespace, host: HostProfile) -> Outcome:
    from migsim.selftest.access_tracking_perf import access_tracking_perf_test

    return access_tracking_perf_test(_vm(args), host)


def _memslot_perf(args: argparse.Namespace, host: HostProfile) -> Outcome:
    from migsim.selftest.memslot_perf import Machine, memslot_perf_test

    return memslot_perf_test(
        Machine(args.mmu, args.kernel, zap_all_quirk=not args.no_zap_all_quirk),
        host,
        slots=args.slots,
        first=args.first,
        last=args.last,
        seconds_per_test=args.length,
        runs=args.runs,
        verbose=args.verbose,
    )


_RUNNERS: dict[str, Callable[[argparse.Namespace, HostProfile], Outcome]] = {
    "demand_paging_test": _demand_paging,
    "dirty_log_perf_test": _dirty_log_perf,
    "access_tracking_perf_test": _access_tracking,
    "memslot_perf_test": _memslot_perf,
}
