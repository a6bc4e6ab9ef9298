"""tools/accuracy FOLDER [--json F]."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from migsim.accuracy.prediction import replay
from migsim.accuracy.recordings import RecordingError
from migsim.accuracy.report import table

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 with one sentence for bad input."""
    parser = argparse.ArgumentParser(prog="accuracy", description="Replay recordings of real QEMU migrations.")
    parser.add_argument("folder", help="recordings (*.json), or one of them")
    parser.add_argument("--json", metavar="F", help="write id, measured and predicted there; - is stdout")
    options = parser.parse_args(argv)
    try:
        report = replay(options.folder)
        text = json.dumps(report, indent=1) + "\n"
        if options.json and options.json != "-":
            Path(options.json).write_text(text, encoding="utf-8")
    except (RecordingError, OSError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 2
    try:
        print(text if options.json == "-" else table(report), flush=True)
    except BrokenPipeError:  # `| head`: nothing more goes to stdout, not even the interpreter's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
