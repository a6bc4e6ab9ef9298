"""A script as a file somebody can run: Python against both backends, or C against ``linux/kvm.h`` alone.

Both carry the answers that the real kernel (or the table) gives, so the file judges by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from migsim.host_kvm.guest_code import assemble
from migsim.host_kvm.vcpu import CODE_BYTES
from migsim.host_kvm.vm import CONTROL_GPA
from migsim.kvm import uapi
from migsim.validate.c_runtime import FOOTER, HEADER
from migsim.validate.inside import Inside, Race
from migsim.validate.script import (
    RAW,
    Answer,
    Cap,
    Clear,
    CreateVcpu,
    Extension,
    Get,
    Harvest,
    HostRead,
    HostWrite,
    Region,
    Reset,
    Run,
    Step,
)


def write_scripts(directory: Path, name: str, steps: Sequence[Step]) -> list[Path]:
    """``name``.py and ``name``.c in ``directory``; the C program expects what the emulator, played alone, answers."""
    from migsim.validate.replay import answers_as_host

    directory.mkdir(parents=True, exist_ok=True)
    stem = "".join(c if c.isalnum() else "-" for c in name).strip("-")
    written = []
    for suffix, text in ((".py", as_python(steps, name)), (".c", as_c(steps, answers_as_host(steps), name))):
        path = directory / (stem + suffix)
        path.write_text(text)
        written.append(path)
    return written


def as_python(steps: Sequence[Step], title: str) -> str:
    """A Python file that plays ``steps`` on the emulator and on ``/dev/kvm`` if it can; exit 1 if they differ."""
    body = "".join(f"    {step!r},\n" for step in steps)
    return (
        f'"""{title}"""\n\n'
        "import sys\n\n"
        "from migsim.validate.replay import replay\n"
        "from migsim.validate.script import *  # noqa: F403\n\n"
        f"STEPS = [\n{body}]\n\n"
        'if __name__ == "__main__":\n'
        "    sys.exit(replay(STEPS))\n"
    )


def as_c(steps: Sequence[Step], answers: Sequence[Answer], title: str) -> str:
    """A C program that plays ``steps`` on ``/dev/kvm`` and exits 1 at the first answer other than ``answers``."""
    lines = [f"/* {title} */", HEADER]
    for index, (step, answer) in enumerate(zip(steps, answers, strict=True)):
        lines.append(f"    /* {index}: {_one_line(step)} */")
        lines.extend("    " + line for line in _c_step(step, answer))
    return "\n".join([*lines, FOOTER])


def _one_line(step: Step) -> str:
    text = repr(step)
    return text if len(text) <= 160 else text[:157] + "..."


def _c_step(step: Step, answer: Answer) -> Iterable[str]:
    error = answer.error or "0"
    match step:
        case Region(slot, flags, gpa, size, hva):
            address = f"{hva - RAW:#x}ull" if hva >= RAW else f"arena + {hva:#x}ull"
            yield f"expect(region({slot}u, {flags}u, {gpa:#x}ull, {size:#x}ull, {address}), {error});"
        case Get(slot, pages):
            yield f"expect(get({slot}u, {0 if pages is None else 1}), {error});"
            if answer.error is None and isinstance(answer.value, tuple):
                yield from _c_words(answer.value)
        case Clear(slot, first, pages, words):
            mask = "bad_pointer" if words is None else f"(__u64[]){{{_c_list(words)}}}"
            yield f"expect(clear({slot}u, {first:#x}ull, {pages}u, {mask}), {error});"
        case Reset():
            yield from _c_value("ioctl(vm, KVM_RESET_DIRTY_RINGS, 0)", answer)
        case CreateVcpu(id):
            yield f"expect(create_vcpu({id}), {error});"
        case Cap(cap, flags, args):
            yield f"expect(enable_cap({cap}, {flags}, (__u64[4]){{{_c_list(args)}}}), {error});"
        case Extension(cap):
            yield from _c_value(f"ioctl(vm, KVM_CHECK_EXTENSION, {cap})", answer)
        case Run(vcpu, ops):
            yield from _c_run(vcpu, ops, answer)
        case Harvest(vcpu):
            yield from _c_harvest(vcpu, answer)
        case HostWrite(hva, value):
            yield f"*(__u32 *)(arena + {hva:#x}ull) = {value:#x}u;"
        case HostRead(hva):
            yield f"expect_value(*(__u32 *)(arena + {hva:#x}ull), {answer.value}ll);"
        case Inside() | Race():
            yield "/* only the emulator can do this */"


def _c_value(call: str, answer: Answer) -> Iterable[str]:
    yield "{"
    yield f"    long result = {call};"
    if answer.error is not None:
        yield f"    expect(result, {answer.error});"
    else:
        yield f"    expect_value(result, {answer.value}ll);"
    yield "}"


def _c_list(values: Iterable[int]) -> str:
    return ", ".join(f"{value:#x}ull" for value in values)


def _c_words(words: tuple[int, ...]) -> Iterable[str]:
    for index, word in enumerate(words):
        yield f"expect_value(bitmap[{index}], {word:#x}ull);"


def _c_run(vcpu: int, ops: Sequence[tuple[str, int, int]], answer: Answer) -> Iterable[str]:
    """The machine code goes into the control slot; KVM is entered for each operation, as a ring's soft limit asks."""
    base = CONTROL_GPA
    yield "{"
    for op in ops or (None,):
        program = assemble([op] if op is not None else [], base + CODE_BYTES)
        code = ", ".join(f"0x{byte:02x}" for byte in program.code)
        yield f"    run_code({vcpu}, (unsigned char[]){{{code}}}, {len(program.code)});"
    if answer.error is None and isinstance(answer.value, tuple):
        reason, done, data = answer.value
        yield f"    expect_value(exit_reason, {reason});"
        yield f"    expect_value(ops_done, {done if ops else 1 if reason == uapi.KVM_EXIT_HLT else 0});"
        for index, value in enumerate(data):
            yield f"    expect_value(loaded[{index}], {value:#x}u);"
        yield "    end_run();"
    yield "}"


def _c_harvest(vcpu: int, answer: Answer) -> Iterable[str]:
    assert isinstance(answer.value, tuple)
    for slot, offset in answer.value:
        yield f"expect_harvest({vcpu}, {slot:#x}u, {offset:#x}ull);"
    yield f"expect_no_harvest({vcpu});"
