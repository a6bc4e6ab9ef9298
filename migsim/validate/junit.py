"""Outcomes as JUnit XML: what CI servers show as a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from xml.etree import ElementTree

from migsim.validate.verdicts import Outcome


def junit(outcomes: Sequence[Outcome]) -> str:
    """One testsuite a backend and suite; times in seconds; a failure's text ends with the command that repeats it."""
    root = ElementTree.Element("testsuites", _totals(outcomes), name="migsim check")
    for key, group in groupby(outcomes, key=lambda o: f"{o.backend}/{o.suite}"):
        members = list(group)
        suite = ElementTree.SubElement(root, "testsuite", _totals(members), name=key)
        for outcome in members:
            _add(suite, key, outcome)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _totals(outcomes: Sequence[Outcome]) -> dict[str, str]:
    count = {status: sum(o.status == status for o in outcomes) for status in ("failed", "skipped")}
    return {
        "tests": str(len(outcomes)),
        "failures": str(count["failed"]),
        "errors": "0",
        "skipped": str(count["skipped"]),
        "time": f"{sum(o.seconds for o in outcomes):.3f}",
    }


def _add(suite: ElementTree.Element, key: str, outcome: Outcome) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=key.replace("/", "."), name=outcome.case, time=f"{outcome.seconds:.3f}"
    )
    if outcome.status == "failed":
        failure = ElementTree.SubElement(case, "failure", message=outcome.reason)
        failure.text = f"{outcome.reason}\nrepeat: {outcome.repro}"
    elif outcome.status == "skipped":
        ElementTree.SubElement(case, "skipped", message=outcome.reason)
    properties = ElementTree.SubElement(case, "properties")
    for name, value in (("bits-verified", outcome.bits), ("operations", outcome.ops)):
        ElementTree.SubElement(properties, "property", name=name, value=str(value))
