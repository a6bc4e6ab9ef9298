"""A child process that runs scenarios for the bench, so that times and memory are those of runs alone.

`python -m migsim.bench.worker` reads requests, one JSON object a line: {"text", "settings", "verify"}; it answers each
with {"wall-s", "cpu-s", "simulated-s", "rounds", "lost-pages", "peak-rss-bytes", "idle-rss-bytes"}, or {"error"}.
`Worker` is the other end.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from threading import Timer
from time import perf_counter, process_time
from types import TracebackType
from typing import Any, Final

from migsim.bench.shape import Shape
from migsim.bench.table import Missing
from migsim.units import NS_PER_S

__all__ = ["Worker"]

RUN_S_MAX: Final = 90.0
_STATUS: Final = Path("/proc/self/status")


class Worker:
    """`with Worker() as worker: worker.run(shape)`. Raises Missing for a run that failed, with its last words."""

    def __enter__(self) -> Worker:
        command = [sys.executable, "-m", "migsim.bench.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()

    def run(self, shape: Shape, *, verify: bool = True) -> dict[str, Any]:
        """The worker's answer for one run."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"text": shape.text, "settings": shape.settings, "verify": verify}
        alarm = Timer(RUN_S_MAX, self._process.kill)
        alarm.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if not line:
            raise Missing(f"a run ended with status {self._process.wait()}; it may take {RUN_S_MAX:g} s at most")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Missing(answer["error"])
        return answer


def serve() -> None:
    """Answers requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _run(Shape(request["text"], tuple(request["settings"])), request["verify"])
        except (ValueError, MemoryError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()  # a guest is full of cycles: what it held goes back now, not in the middle of some later run
        print(json.dumps(answer), flush=True)


def _run(shape: Shape, verify: bool) -> dict[str, Any]:
    from migsim import simulation

    scenario, idle = shape.scenario(), _status_bytes("VmRSS")
    wall, cpu = perf_counter(), process_time()
    result = simulation.run(scenario, verify=verify)
    wall, cpu = perf_counter() - wall, process_time() - cpu
    return {
        "wall-s": wall,
        "cpu-s": cpu,
        "simulated-s": result.migration["total-time"] / 1000 if result.converged else _last_ns(result) / NS_PER_S,
        "rounds": len(result.rounds),
        "lost-pages": result.verify.get("lost-pages", 0),
        "peak-rss-bytes": _status_bytes("VmHWM"),
        "idle-rss-bytes": idle,
    }


def _last_ns(result: Any) -> int:
    return max((row.start_ns + row.duration_ns for row in result.rounds), default=0)


def _status_bytes(name: str) -> int:
    """VmHWM (peak) or VmRSS of this process. Not getrusage: its maximum is inherited from the parent across exec."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"{_STATUS} has no {name}")


if __name__ == "__main__":
    serve()
