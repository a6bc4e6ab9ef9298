"""Imports point down: what each part of migsim may import of the others, read off the source, not off a run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import migsim

ROOT = Path(migsim.__file__).parent

# Part -> what it may import of migsim besides itself. A part is a module or a folder below migsim/.
BOTTOM = {"units", "planes", "words", "jit"}
GUEST = BOTTOM | {"sim"}
TYPES = {"units", "quantities", "scenario", "result"}
KVM = GUEST | {"guest"}
ENGINE = KVM | {"kvm", "migration", "perf", "scenario", "result", "quantities"}
ASSEMBLY = {
    "fused", "fused_kernels", "fused_send", "fused_slots", "fused_views", "world", "qemu_costs", "qemu_options",
    "host_costs", "meters", "verdict", "expectation", "watch", "simulation", "dirty_rate", "ring_guest",
    "snapshot", "sides",
}  # fmt: skip
MAY: dict[str, set[str]] = {
    "units": set(),
    "quantities": {"units"},
    "planes": {"units"},
    "jit": set(),
    "words": {"units", "planes", "jit"},
    "sim": BOTTOM,
    "guest": GUEST,
    "kvm": KVM,
    "perf": GUEST,
    "migration": GUEST | {"guest"},
    "scenario": {"units", "quantities", "migration"},  # of migration only the tables of parameters and capabilities
    "result": TYPES,
    "libvirt": TYPES,
    "terminal": TYPES | {"expectation"},
    **dict.fromkeys(ASSEMBLY, ENGINE | ASSEMBLY),
    "host_kvm": KVM | {"kvm"},
}
USED_BY_THE_TOP_ONLY = {"validate", "commands", "cli", "host_kvm"}


def parts() -> dict[str, list[Path]]:
    out: dict[str, list[Path]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        top = path.relative_to(ROOT).parts[0]
        out.setdefault(top.removesuffix(".py"), []).append(path)
    return out


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(module below migsim, line) of every import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "migsim":
            names = [node.module] if node.module != "migsim" else [f"migsim.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "migsim"]
        else:
            continue
        for name in names:
            yield name, node.lineno


def test_every_part_imports_only_what_lies_below_it() -> None:
    wrong = []
    for part, paths in parts().items():
        for path in paths:
            for name, line in imported(path):
                below = name.split(".")[1] if "." in name else ""
                if part in MAY and below not in MAY[part] | {part}:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_migration_reaches_kvm_through_the_ioctls_alone() -> None:
    for path in (ROOT / "migration").rglob("*.py"):
        for name, line in imported(path):
            if name.startswith("migsim.kvm"):
                assert name.startswith("migsim.kvm.ioctl"), f"{path.name}:{line} {name}"


def test_a_scenario_knows_of_the_migration_only_its_parameters_and_capabilities() -> None:
    for path in (ROOT / "scenario").rglob("*.py"):
        for name, line in imported(path):
            if name.startswith("migsim.migration"):
                allowed = tuple(f"migsim.migration.{n}" for n in ("parameters", "capabilities", "dirty_rate_commands"))
                assert name.startswith(allowed), f"{path.name}:{line} {name}"


def test_nobody_but_the_command_line_imports_the_oracles_and_commands() -> None:
    top = {"commands", "cli", "validate", "bench", "host_bench", "selftest"}
    top |= {"pytest_plugin", "__main__", "compare", "accuracy"}
    for part, paths in parts().items():
        if part in top:
            continue
        for path in paths:
            for name, line in imported(path):
                below = name.split(".")[1] if "." in name else ""
                assert below not in USED_BY_THE_TOP_ONLY or part in {below, "perf"}, f"{path}:{line} imports {name}"


def test_the_commands_help_needs_no_numpy() -> None:
    """`migsim --help` answers at once: nothing heavy is imported to print it."""
    import subprocess
    import sys

    code = "import sys, migsim.cli; sys.exit(any(m in sys.modules for m in ('numpy', 'numba', 'msgspec')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
