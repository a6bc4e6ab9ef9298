"""Scenarios: typed TOML in, frozen structs out, one sentence where that is not possible.

`load(path)` reads a file; `parse(text)` and `build(mapping)` take what is already in memory. Numbers are plain ints
in the unit the annotation names (bytes, bytes/s, ns; QMP's own members in QMP's units), shares are floats.
"""

from __future__ import annotations

from migsim.scenario.errors import ScenarioError
from migsim.scenario.guest import (
    BACKING_BYTES,
    VCPUS_MAX,
    Backing,
    Device,
    Extent,
    Guest,
    Pattern,
    Rom,
    Workload,
    WorkloadPhase,
)
from migsim.scenario.host import Expect, Host, Kvm, Link, LinkPhase
from migsim.scenario.load import build, load, parse
from migsim.scenario.migration import Compat, Migration
from migsim.scenario.root import Scenario
from migsim.scenario.schema import json_schema

__all__ = [
    "BACKING_BYTES", "Backing", "Compat", "Device", "Expect", "Extent", "Guest", "Host", "Kvm", "Link",
    "LinkPhase", "Migration", "Pattern", "Rom", "Scenario", "ScenarioError", "VCPUS_MAX", "Workload", "WorkloadPhase",
    "build", "json_schema", "load", "parse",
]  # fmt: skip
