"""Recordings of real QEMU migrations replayed through migsim's own loop, and the error of each prediction.

`tools/accuracy FOLDER` is the command. A prediction sees `config`, `guest`, `migrate_parameters`,
`migrate_capabilities_on` and `pre` of a recording: `given` cuts everything else away before the model is asked, and
`predict` takes nothing but that. One host profile serves all recordings. The format is that of `tools/record_qemu`.
"""

from __future__ import annotations

from migsim.accuracy.command import main
from migsim.accuracy.prediction import predict, replay
from migsim.accuracy.recordings import GIVEN, KEYS, Given, RecordingError, given, load, measured
from migsim.accuracy.replayed import scenario_of
from migsim.accuracy.report import Band, bands_of, errors_of, percentile, table

__all__ = [
    "GIVEN", "KEYS", "Band", "Given", "RecordingError", "bands_of", "errors_of", "given", "load", "main", "measured",
    "percentile", "predict", "replay", "scenario_of", "table",
]  # fmt: skip
