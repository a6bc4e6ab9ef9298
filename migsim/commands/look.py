"""What is looked at before a run starts: can the result be written, does the guest's model fit in this machine."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from migsim import kernel_cache
from migsim.quantities import in_words
from migsim.scenario import Scenario, ScenarioError

__all__ = ["compile_notice", "free_memory", "refuse_unwritable", "require_memory"]

_CGROUP = Path("/sys/fs/cgroup")


def refuse_unwritable(path: str) -> None:
    """Raises ScenarioError unless a result can be put at `path`."""
    from migsim.result import check_writable

    try:
        check_writable(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ScenarioError("", f"the result cannot be written there: {reason}", file=path) from None


def require_memory(scenario: Scenario) -> None:
    """Raises ScenarioError if the model of this guest needs more memory than is free. Allocates nothing."""
    from migsim import simulation

    needed = simulation.memory_needed(scenario)
    free = free_memory()
    if needed > free:
        problem = f"this guest needs {in_words(needed, 'size')} of memory here, and {in_words(free, 'size')} are free"
        raise ScenarioError("guest.memory", problem, value=in_words(scenario.guest.memory, "size"))


def free_memory() -> int:
    """Bytes this process may still take: the machine's, its control group's or its address-space limit, the least."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = _group_room()
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free = min(free, max(0, limit - int(psutil.Process().memory_info().vms)))
    return free if group is None else min(free, group)


def compile_notice() -> str | None:
    """What to say before a run that must compile the kernels first, for some seconds; None where they are compiled."""
    if os.environ.get("NUMBA_DISABLE_JIT") == "1" or kernel_cache.filled():
        return None
    if kernel_cache.FOR_ONE_RUN in os.environ.get("NUMBA_CACHE_DIR", ""):
        return "compiling the kernels, for this run alone: no folder for them can be written; NUMBA_CACHE_DIR names one"
    return "compiling the kernels, once after an install ..."


def _group_room() -> int | None:
    """Bytes left in this process's memory control group (version 2), or None where there is no limit."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = _CGROUP / line[3:].lstrip("/")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, StopIteration, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)
