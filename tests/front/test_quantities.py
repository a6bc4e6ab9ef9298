"""Text with units: exact, or refused with a sentence."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migsim import quantities
from migsim.quantities import PARSERS, bandwidth, duration, in_words, link_rate, milliseconds, percent, share, size
from migsim.quantities import write_rate as rate

EXACT = [
    (size, "12 TiB", 12 << 40),
    (size, "64MiB", 64 << 20),
    (size, "1.5 TiB", 3 << 39),
    (size, "40 GB", 40 * 10**9),
    (size, 4096, 4096),
    (size, "11776 GiB", 11776 << 30),
    (link_rate, "100 Gbit/s", 12_500_000_000),
    (link_rate, "12.5 GB/s", 12_500_000_000),
    (bandwidth, 134217728, 134217728),
    (bandwidth, "128 MiB/s", 128 << 20),
    (bandwidth, "1 GiB", 1 << 30),
    (rate, "25000 pages/s", 25_000 * 4096),
    (rate, "10 M pages/s", 10_000_000 * 4096),
    (rate, "1 page/s", 4096),
    (rate, "40 GB/s", 40 * 10**9),
    (duration, "300 ms", 300_000_000),
    (duration, "50 us", 50_000),
    (duration, "0.1 s", 100_000_000),
    (duration, "2 h", 7_200 * 10**9),
    (duration, 0, 0),
    (milliseconds, "1 s", 1000),
    (milliseconds, 300, 300),
    (percent, "30 %", 30),
    (percent, 30, 30),
    (share, "30 %", 0.3),
    (share, 0.3, 0.3),
    (share, 1, 1.0),
]


@pytest.mark.parametrize(("parse", "text", "value"), EXACT)
def test_a_quantity_is_exactly_what_its_text_says(parse, text, value):
    assert parse(text) == value


REFUSED = [
    (size, "12 TB/s"),
    (size, "-1 GiB"),
    (size, "1 GiB extra"),
    (size, "1.5 B"),
    (size, "1e9 B"),
    (size, "١٢ GiB"[::-1]),
    (size, True),
    (size, None),
    (size, []),
    (size, float("nan")),
    (size, float("inf")),
    (size, "9" * 20 + " TiB"),
    (size, "9" * 5000),
    (link_rate, 100),
    (link_rate, "100 Gbit"),
    (rate, "40 Gbit/s"),
    (rate, 25000),
    (duration, 300),
    (duration, "300"),
    (duration, "0.5 ns"),
    (milliseconds, "1 us"),
    (percent, "0.5 %"),
    (share, 1.01),
    (share, "101 %"),
    (share, -0.1),
]


@pytest.mark.parametrize(("parse", "text"), REFUSED)
def test_what_is_no_such_quantity_is_refused_with_what_is_allowed(parse, text):
    with pytest.raises(ValueError, match="expected"):
        parse(text)


@given(st.sampled_from(sorted(PARSERS)), st.text() | st.integers() | st.floats() | st.none() | st.lists(st.integers()))
def test_any_value_at_all_is_a_number_or_a_value_error(kind, raw):
    try:
        value = PARSERS[kind](raw)
    except ValueError as error:
        assert "\n" not in str(error) and "expected" in str(error)
    else:
        assert value >= 0


@given(st.integers(0, 9999), st.integers(0, 999), st.sampled_from(sorted(quantities._SIZES)))
def test_decimals_are_exact_or_refused_never_rounded(whole, thousandths, unit):
    exact = (Fraction(whole) + Fraction(thousandths, 1000)) * quantities._SIZES[unit]
    text = f"{whole}.{thousandths:03} {unit}"
    if exact.denominator == 1:
        assert size(text) == exact
    else:
        with pytest.raises(ValueError, match="smallest unit"):
            size(text)


@given(st.integers(0, 1 << 63), st.sampled_from(["size", "rate", "duration"]))
def test_in_words_is_within_one_in_a_thousand(value, kind):
    number, unit = in_words(value, kind).replace(",", "").split(" ")
    factor = dict(quantities._SAID[kind])[unit]
    assert float(number) * factor == pytest.approx(value, rel=1e-3)
