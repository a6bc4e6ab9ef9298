"""Every name behaviour counts under has a price, and the prices are a profile's."""

from __future__ import annotations

import re
from pathlib import Path

import migsim
from migsim.perf.costs import METERED, priced
from migsim.perf.profile import load_profile


def test_every_name_counted_anywhere_is_priced_and_no_other() -> None:
    counted = set()
    for path in Path(migsim.__file__).parent.rglob("*.py"):
        counted |= set(re.findall(r'meter\.count\(\s*"([a-z_0-9]+)"', path.read_text(encoding="utf-8")))
    assert counted - METERED.keys() == set(), "counted but not priced"
    assert METERED.keys() - counted == set(), "priced but never counted"


def test_a_price_is_the_profile_s_times_the_count() -> None:
    host = load_profile()
    prices = priced({"huge_page_split": 3, "remote_tlb_flush": 2}, host, 416)
    assert prices["huge_page_split"] == 3 * host.ns("split-table")
    assert prices["remote_tlb_flush"] == 2 * (host.ns("tlb-flush") + 416 * host.ns("tlb-flush-vcpu"))
