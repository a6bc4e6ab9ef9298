"""docs/evidence.md is what its command writes, and no prediction in it is off by more than the stated factor."""

from __future__ import annotations

from pathlib import Path

import pytest

from migsim.selftest.evidence import render
from migsim.selftest.figures import Figure
from migsim.selftest.published import tables

_FIGURES = [figure for table in tables() for figure in table.figures]


def test_the_document_is_what_the_command_writes() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
    assert document.read_text(encoding="utf-8") == render(), "run tools/evidence"


@pytest.mark.parametrize("figure", [f for f in _FIGURES if f.kind == "predicted"], ids=lambda f: f.what)
def test_a_prediction_is_within_the_factor(figure: Figure) -> None:
    assert figure.agrees, f"{figure.what}: {figure.migsim:.4g} against {figure.published:.4g}"


@pytest.mark.parametrize("figure", [f for f in _FIGURES if f.kind == "fitted"], ids=lambda f: f.what)
def test_a_fitted_figure_is_met(figure: Figure) -> None:
    assert figure.ratio == pytest.approx(1.0, abs=0.25)


def test_every_explained_figure_says_why() -> None:
    assert all(figure.note for figure in _FIGURES if figure.kind == "explained")
