"""The two QEMUs: how they are started, their monitors, and the trace lines they write."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time

QEMU = os.environ.get("QEMU", "qemu-system-x86_64")
PAGE = 4096
FIRST_PAGE = 4096  # 16 MiB: data and working set start here
TRACED = (
    "migration_bitmap_sync_start", "migration_bitmap_sync_end", "migration_throttle", "migrate_set_state",
    "migrate_transferred", "migrate_pending", "migration_completion_vm_stop", "postcopy_start",
)  # fmt: skip
TRACE_LINE = re.compile(rb"^\d+@(\d+\.\d+):(\w+)\s?(.*)$")


class Refused(Exception):
    """The recording cannot be made; one sentence."""


class Monitor:
    """A QMP connection over a unix socket; collects events."""

    def __init__(self, path: str, process: subprocess.Popen, wait_s: float = 30.0) -> None:
        self.socket, self.rest, self.events = socket.socket(socket.AF_UNIX), b"", []
        end = time.monotonic() + wait_s
        while True:
            try:
                self.socket.connect(path)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise Refused("QEMU did not open its monitor") from None
                time.sleep(0.02)
        self._message()
        self.ask("qmp_capabilities")

    def _message(self) -> dict:
        while b"\n" not in self.rest:
            data = self.socket.recv(65536)
            if not data:
                raise Refused("QEMU closed its monitor")
            self.rest += data
        line, self.rest = self.rest.split(b"\n", 1)
        return json.loads(line)

    def ask(self, command: str, **arguments: object) -> object:
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self._message()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise Refused(f"{command}: {message['error']['desc']}")
            elif "return" in message:
                return message["return"]


class Side:
    """One QEMU process, its monitor and the trace lines it writes."""

    def __init__(self, name: str, config: dict, folder: str) -> None:
        self.trace: list[tuple[float, str, str]] = []
        self.other: list[str] = []
        monitor = f"{folder}/{name}.sock"
        command = [
            QEMU, "-name", f"record-{name},debug-threads=on", "-machine", f"pc,accel={config['accel']}", "-nodefaults",
            "-display", "none", "-no-user-config", "-msg", "timestamp=on", "-m", f"{config['mem_mib']}M",
            "-smp", str(config["vcpus"]), "-bios", f"{folder}/guest.rom", "-qmp", f"unix:{monitor},server=on,wait=off",
        ]  # fmt: skip
        self.shown = " ".join(command).replace(folder, "TMP")
        command += [word for event in TRACED for word in ("-trace", event)]
        command += ["-mem-prealloc"] if config["prealloc"] else []
        if config["host_fill"]:
            command += ["-device", f"loader,file={folder}/fill,addr={FIRST_PAGE * PAGE},force-raw=on"]
        command += ["-incoming", "defer"] if name == "dst" else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        try:
            self.monitor = Monitor(monitor, self.process)
        except Refused as error:
            self.end()
            reader.join(1)
            raise Refused(f"{error}: {' '.join(self.other)[:200]}") from None

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found = TRACE_LINE.match(line.rstrip())
            if found:
                self.trace.append((float(found[1]), found[2].decode(), found[3].decode()))
            else:
                self.other.append(line.decode(errors="replace").rstrip())

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
