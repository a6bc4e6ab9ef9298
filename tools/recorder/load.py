"""How much else the host had to do: whether a recording can be trusted."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from recorder.qemu import Side

#: Thread: the share of its time that it may wait for a CPU before the run counts as disturbed.
WAITS = {"src.vcpu": 0.07, "src.live_migration": 0.10, "dst.main": 0.15}


class Load:
    """Counted from construction on. `look` now and then: a thread that has ended is gone from /proc."""

    def __init__(self, source: Side, destination: Side) -> None:
        self.sides = {"src": source.process.pid, "dst": destination.process.pid}
        self.began, self.cpus = time.monotonic(), cpu_times()
        self.threads: dict[tuple[str, str], list[list[int]]] = {}
        self.look()

    def look(self) -> None:
        """Time on a CPU and time waiting for one, ns, of every thread of both sides: first and last seen."""
        for side, pid in self.sides.items():
            for task in Path(f"/proc/{pid}/task").glob("*"):
                try:
                    name = _name(task.joinpath("comm").read_text().strip(), task.name == str(pid))
                    seen = [int(word) for word in task.joinpath("schedstat").read_text().split()[:2]]
                except (OSError, ValueError):
                    continue  # it has just ended, or the kernel keeps no such account
                self.threads.setdefault((f"{side}.{name}", task.name), [seen, seen])[1] = seen

    def as_json(self) -> dict:
        """The recording's `load`."""
        seconds = time.monotonic() - self.began
        spent = [b - a for a, b in zip(self.cpus, cpu_times())]
        busy = (sum(spent) - spent[3] - spent[4]) / os.sysconf("SC_CLK_TCK") / seconds  # less idle and iowait
        on, waits = ({}, {})
        for (name, _), (first, last) in self.threads.items():
            for share, at in ((on, 0), (waits, 1)):
                share[name] = share.get(name, 0.0) + (last[at] - first[at]) / 1e9 / seconds
        reasons = [
            f"{name} waited for a CPU {100 * waits[name]:.1f} % of the time"
            for name, most in WAITS.items() if waits.get(name, 0.0) > most
        ]  # fmt: skip
        return {
            "wall_s": round(seconds, 3), "cpus": os.cpu_count(), "busy_cpus": round(busy, 2),
            "qemu_threads_cpus": _rounded(on), "qemu_threads_wait": _rounded(waits),
            "other_cpus": round(max(0.0, busy - sum(on.values())), 2),
            "loadavg": [round(x, 2) for x in os.getloadavg()], "reliable": not reasons, "reasons": reasons,
        }  # fmt: skip


def _name(comm: str, main: bool) -> str:
    if re.match(r"CPU \d+", comm):
        return "vcpu"
    return "multifd" if comm.startswith("multifd") else "main" if main else comm


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(share, 3) for name, share in shares.items() if share >= 0.002}


def cpu_times() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
