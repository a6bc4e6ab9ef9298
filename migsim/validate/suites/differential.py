"""``differential``: hypothesis plays random scripts on emulator and host at once; nothing may differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from migsim.validate.backends import Backend
from migsim.validate.case import Case, Context
from migsim.validate.verdicts import CheckFailed, Skipped

EXAMPLES_PER_BATCH = 100

NOT_SHOWN = (
    "SPTEs, TLB entries and page statistics: KVM shows none of them to user space",
    "huge pages, eager splitting, PML and fast page faults where KVM emulates every instruction",
    "address space 1 where KVM has no SMM",
    "slots of more than some MiB: a KVM without two-dimensional paging allocates 8 bytes of rmap for every page",
)
"""What this comparison cannot cover."""


def cases(subject: Backend, judge: Backend) -> Iterator[Case]:
    yield Case("differential", "random scripts", partial(random_scripts, subject=subject, judge=judge))


def random_scripts(context: Context, subject: Backend, judge: Backend) -> None:
    """At least ``context.ops`` operations, every answer and every ring entry compared after every step."""
    try:
        from migsim.validate.differential.machine import run_machine
    except ImportError:
        raise Skipped("hypothesis is not installed: pip install 'migsim[test]'") from None
    from migsim.validate.differential.pair import Pair, shortened

    config = machine_like(judge)

    def open_pair() -> Pair:
        return Pair(lambda: subject.make(config), lambda: judge.make({}), (subject.name, judge.name))

    batch = 0
    while context.done < context.ops:
        tally, failure = run_machine(open_pair, seed_value=context.seed + batch, examples=EXAMPLES_PER_BATCH)
        batch += 1
        context.done += tally.operations
        context.verified(tally.bits)
        if failure is not None:
            raise shortened(failure, lambda: subject.make(config), lambda: judge.make({}))
    context.notes.append(f"{context.done} operations compared, 0 mismatches")


def machine_like(judge: Backend) -> Mapping[str, Any]:
    """The emulator's configuration that equals the judge's machine, found by asking it."""
    from migsim.kvm import uapi
    from migsim.validate.script import Cap, CreateVcpu, Player, Region, Run, pages

    vm: Any = judge.make({})
    player = Player(vm)
    try:
        smm = vm.check_extension(uapi.KVM_CAP_MULTI_ADDRESS_SPACE) > 1
        bits = 52
        while bits > 36 and player.play(Region(9, 0, (1 << bits) - pages(1), pages(1))).error:
            bits -= 1
        player.play_all([Region(1, 0, pages(16), pages(1)), CreateVcpu(0), Run(0, (("w", pages(16), 1),))])
        emulates = player.vcpus[0].stats_read().get("insn_emulation", 0) > 0  # type: ignore[attr-defined]
    finally:
        player.close()
    second = Player(judge.make({}))
    try:
        pml = second.play(Cap(uapi.KVM_CAP_DIRTY_LOG_RING, 0, (4096,))).error is not None
    finally:
        second.close()
    if not emulates:
        raise CheckFailed(
            "this host runs guest stores on its CPU, where page faults decide what gets marked: only a KVM that "
            "emulates instructions can be compared step by step"
        )
    return {"smm": smm, "maxphyaddr": bits, "instruction_emulation": True, "pml": pml,
            "vendor": "intel" if pml else "amd"}  # fmt: skip
