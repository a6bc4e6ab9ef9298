"""tools/record_qemu: a recording made here, now, is one that tools/accuracy reads and predicts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from migsim import accuracy

TOOL = Path(__file__).parents[2] / "tools" / "record_qemu"


def record(config: dict[str, Any], out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(TOOL), json.dumps(config), str(out)], capture_output=True, text=True, check=False)


def test_an_idle_guest_recorded_now_is_predicted_to_the_byte(tmp_path: Path, qemu: object) -> None:
    """Bytes, pages and syncs of an idle guest are the same however busy the host is; its times are not compared."""
    out = tmp_path / "idle.json"
    done = record({"mem_mib": 64, "dirty_rate_time": 0, "params": {"max-bandwidth": 50000000}}, out)
    assert done.returncode == 0, done.stderr
    (entry,) = accuracy.replay(out)
    same = ("status", "rounds", "normal", "duplicate")
    assert {key: entry["predicted"][key] for key in same} == {key: entry["measured"][key] for key in same}
    sent = entry["predicted"]["transferred"] - entry["measured"]["transferred"]
    assert abs(sent) <= 80  # a section more or less is its end marker
    load = json.loads(out.read_text())["load"]
    assert load["wall_s"] > 0.5 and load["qemu_threads_cpus"].keys() & {"src.main", "dst.main"}
    assert load["reliable"] == (not load["reasons"])


def test_a_member_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    done = record({"memory": 64}, tmp_path / "no.json")
    assert done.returncode == 2 and done.stderr.startswith("record_qemu: memory: not a member of CONFIG")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
