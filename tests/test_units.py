"""Text to SI and back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmoe import units
from simmoe.errors import SpecError


@pytest.mark.parametrize(
    ("written", "unit", "value"),
    [
        ("3.35 TB/s", "byte/second", 3.35e12),
        ("80 GB", "byte", 80e9),
        ("80 GiB", "byte", 85_899_345_920),
        ("81559 MiB", "byte", 81559 * 2**20),
        ("989 TFLOP/s", "FLOP/second", 989e12),
        ("5 us", "second", 5e-6),
        ("10 us", "second", 1e-5),
        ("700 W", "watt", 700.0),
        ("8 request/s", "1/second", 8.0),
        ("8 1/s", "1/second", 8.0),
        ("120 request/minute", "1/second", 2.0),
        ("1.5 USD/hour", "USD/hour", 1.5),
    ],
)
def test_text_becomes_the_nearest_float_in_si(written, unit, value):
    assert units.parse(written, unit) == value


def test_decimal_and_binary_prefixes_differ():
    assert units.parse("1 GiB", "byte") / units.parse("1 GB", "byte") == pytest.approx(1.073741824)


@pytest.mark.parametrize("written", ["3.35", "80 GW", "abc def", "", "3.35 TB", "TB/s/"])
def test_text_without_the_right_unit_is_refused_with_an_example(written):
    with pytest.raises(SpecError, match=r"write e\.g\."):
        units.parse(written, "byte/second")


@pytest.mark.parametrize("value", [True, None, [1], {}])
def test_what_is_neither_number_nor_text_is_refused(value):
    with pytest.raises(SpecError, match="not a quantity"):
        units.quantity(value, "byte", bare_numbers=True)


def test_bare_numbers_are_si_in_code_and_refused_in_files():
    assert units.quantity(3, "byte", bare_numbers=True) == 3.0
    with pytest.raises(SpecError, match="has no unit"):
        units.quantity(3, "byte", bare_numbers=False)


@given(st.floats(1e-8, 1e16))
def test_formatting_keeps_three_digits_and_a_readable_mantissa(value):
    number, unit = units.text(value, "B").split()
    scale = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}[unit[:-1]]
    assert float(number) * scale == pytest.approx(value, rel=6e-3)
    assert value < 1e-6 or 0.999 <= float(number) < 1000 or unit == "PB"
    assert math.copysign(1, float(number)) == 1


@given(st.floats(1e-8, 1e9))
def test_times_are_read_in_seconds_and_long_ones_in_minutes_hours_and_days(value):
    number, unit = units.text(value, "s").split()
    scale = {"d": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[unit]
    assert float(number) * scale == pytest.approx(value, rel=6e-3)
    assert (scale > 1) == (value >= 1000) or value == pytest.approx(1000, rel=1e-3)
    assert not scale > 1 or float(number) >= 2


def test_formatting_rounds_up_to_the_next_prefix():
    assert units.text(999.9e9, "B") == "1 TB"
    assert units.text(0.0231, "s") == "23.1 ms"
    assert units.text(0, "s") == "0 s"
