"""Any combination of capabilities is refused in a sentence, or migrates its guest without losing a page or a byte."""

from __future__ import annotations

from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from migsim import simulation
from migsim.migration.capabilities import CAPABILITIES
from migsim.scenario import ScenarioError, build

NAMES = [name for name, _, _ in CAPABILITIES]
PHASES = ("precopy-bytes", "downtime-bytes", "postcopy-bytes", "multifd-bytes")

options = st.fixed_dictionaries(
    {},
    optional={
        "multifd-channels": st.integers(1, 4),
        "multifd-compression": st.sampled_from(["none", "zlib", "zstd"]),
        "tls-creds": st.just("tls0"),
        "zero-page-detection": st.sampled_from(["none", "legacy", "multifd"]),
        "direct-io": st.booleans(),
        "compress-threads": st.integers(1, 4),
        "compress-wait-thread": st.booleans(),
        "xbzrle-cache-size": st.sampled_from(["4 KiB", "16 MiB"]),
        "postcopy-after": st.sampled_from(["0 s", "150 ms"]),
        "uri": st.sampled_from(["file:guest", "unix:/guest"]),
        "max-bandwidth": st.sampled_from(["0 B/s", "200 MB/s"]),
        "downtime-limit": st.sampled_from(["20 ms", "300 ms"]),
        "cancel-after": st.sampled_from(["90 ms", "400 ms"]),
    },
)


@given(
    st.sampled_from(["7.2", "10.0"]), st.sets(st.sampled_from(NAMES), max_size=3), options,
    st.sampled_from(["4K", "2M"]), st.sampled_from([{}, {"fail-at": "200 ms"}, {"copies-zero-copy": True}]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_it_is_refused_in_a_sentence_or_ends_with_every_page_in_its_place(
    compat: str, capabilities: set[str], chosen: dict[str, Any], backing: str, link: dict[str, Any]
) -> None:
    stream = {"pattern": "uniform", "rate": "6000 pages/s", "working-set": "24 MiB"}
    try:
        scenario = build(
            {
                "guest": {"memory": "64 MiB", "vcpus": 2, "zero": "20 %", "backing": backing, "workload": [stream]},
                "migration": {"compat": compat, "capabilities": sorted(capabilities), "time-limit": "4 s", **chosen},
                "link": {"bandwidth": "2 Gbit/s", **link},
            }
        )
    except ScenarioError as refusal:
        assert "\n" not in str(refusal)
        event("refused")
        return
    result = simulation.run(scenario, threads=1)
    event(result.migration["status"])
    assert result.verify["lost-pages"] == 0
    if result.converged:
        ram = result.migration["ram"]
        rest = ram["transferred"] - sum(ram[name] for name in PHASES)
        assert rest == 0 if compat == "7.2" else rest > 0, "device state and framing are not RAM's"
        packed = result.migration.get("compression", {}).get("pages", 0)
        deltas = result.migration.get("xbzrle-cache", {}).get("pages", 0)
        assert ram["normal"] + ram["duplicate"] + packed + deltas >= 64 << 8, "every page went over at least once"
    else:
        assert result.exit_code == 1
