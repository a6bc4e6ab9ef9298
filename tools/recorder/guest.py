"""The guest: its image with its orders, what it says of itself, and what is measured before the migration."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from pathlib import Path

from recorder.qemu import FIRST_PAGE, PAGE, Monitor, Refused, Side

IMAGE = Path(__file__).resolve().parents[1] / "guest" / "writer.rom"
ORDERS = {"sequential": 0, "uniform": 1, "hotcold": 2}
POLL_S = 0.1


def prepare(config: dict, folder: str) -> dict:
    """Build the guest, write its orders into a copy; the recording's `guest`."""
    if not IMAGE.exists():
        built = subprocess.run(["make", "-C", str(IMAGE.parent)], capture_output=True, text=True)
        if built.returncode:
            raise Refused(f"the guest does not build (gcc with -m32 is needed): {built.stderr.strip()[-200:]}")
    hertz = ticks_per_s()
    room = config["mem_mib"] * 256 - FIRST_PAGE
    working_set = min(config["ws_mib"] * 256, room)
    data = max(room * config["fill_pct"] // 100, working_set if config["rate"] else 0)
    blob = bytearray(IMAGE.read_bytes())
    struct.pack_into(
        "<4s7I2Q2I", blob, 0, b"MSG2", FIRST_PAGE, 0 if config["host_fill"] else data, working_set,
        ORDERS[config["pattern"]], config["write_bytes"], config["catch_up"], 1,
        int(hertz / config["rate"]) if config["rate"] else 0, int(config["lag_cap_ms"] * hertz / 1000),
        config["hot_pages_pct"], config["hot_writes_pct"],
    )  # fmt: skip
    Path(folder, "guest.rom").write_bytes(blob)
    if config["host_fill"]:
        with open(f"{folder}/fill", "wb") as out:
            for _ in range(data):
                out.write(os.urandom(PAGE))
    return {
        "fill_pages": data, "ws_pages": working_set if config["rate"] else 0,
        "zero_pages": config["mem_mib"] * 256 - data - 2, "tsc_hz": hertz,
    }  # fmt: skip


def ticks_per_s() -> float:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":")[1]) * 1e6
    raise Refused("/proc/cpuinfo has no cpu MHz")


def journal(monitor: Monitor, folder: str) -> dict | None:
    """What the guest says of itself, or None before it runs."""
    path = f"{folder}/page"
    monitor.ask("pmemsave", val=PAGE, size=64, filename=path)
    name, stage, writes, stumbles, lost, began, ended, last = struct.unpack("<4sI6Q", Path(path).read_bytes()[:56])
    os.unlink(path)
    if name != b"MSJ2":
        return None
    return {"stage": stage, "writes": writes, "drops": stumbles, "fill_ticks": ended - began, "at": time.monotonic()}


def rate(monitor: Monitor, folder: str, seconds: float) -> float:
    before = journal(monitor, folder)
    time.sleep(seconds)
    after = journal(monitor, folder)
    assert before and after
    return round((after["writes"] - before["writes"]) / (after["at"] - before["at"]), 1)


def dirty_rate(monitor: Monitor, seconds: int, mode: str, pages: int | None) -> dict:
    arguments = {"calc-time": seconds, "mode": mode} | ({"sample-pages": pages} if pages else {})
    monitor.ask("calc-dirty-rate", **arguments)
    while True:
        time.sleep(POLL_S)
        answer = monitor.ask("query-dirty-rate")
        if answer["status"] == "measured":
            return answer


def wait_for_guest(source: Side, folder: str) -> dict:
    end = time.monotonic() + 60
    while time.monotonic() < end and source.process.poll() is None:
        time.sleep(0.2)
        found = journal(source.monitor, folder)
        if found and found["stage"] == 2:
            return found
    raise Refused(f"the guest did not start: {' '.join(source.other)[:200]}")


def measure_before(config: dict, monitor: Monitor, folder: str) -> dict:
    time.sleep(0.5)
    pre: dict = {"writes_per_s": rate(monitor, folder, 1.0)}
    seconds = config["dirty_rate_time"]
    if seconds:  # QEMU 7.2 dies of dirty-bitmap mode under TCG
        for mode in ("page-sampling", "dirty-bitmap") if config["accel"] == "kvm" else ("page-sampling",):
            pages = 512 if mode == "page-sampling" else None
            pre[f"calc_dirty_rate_{mode.replace('-', '_')}"] = dirty_rate(monitor, seconds, mode, pages)
        pre["calc_dirty_rate_page_sampling_8192"] = dirty_rate(monitor, seconds, "page-sampling", 8192)
    return pre
