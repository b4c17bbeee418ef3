"""Text with units to plain SI floats, and back for people. The only home of 1e9 and 2**30.

Inside simmoe every quantity is a float in seconds, bytes, FLOP/s, B/s, watt; `parse` turns
"3.35 TB/s" into 3.35e12 once, at the edge. GB is 10**9 bytes, GiB is 2**30.
"""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any

from simmoe.errors import SpecError

if TYPE_CHECKING:
    from pint import UnitRegistry

GIB = 2.0**30

_EXAMPLES = {
    "byte": "80 GB",
    "byte/second": "3.35 TB/s",
    "FLOP/second": "989 TFLOP/s",
    "second": "5 us",
    "watt": "700 W",
    "1/second": "8 request/s",
    "USD/hour": "2 USD/hour",
}


#: Of pint's own thousand units those that descriptions use, and four that it lacks: it reads these in no time.
_DEFINITIONS = """
pico- = 1e-12 = p-
nano- = 1e-9 = n-
micro- = 1e-6 = µ- = μ- = u-
milli- = 1e-3 = m-
kilo- = 1e3 = k-
mega- = 1e6 = M-
giga- = 1e9 = G-
tera- = 1e12 = T-
peta- = 1e15 = P-
exa- = 1e18 = E-
kibi- = 2**10 = Ki-
mebi- = 2**20 = Mi-
gibi- = 2**30 = Gi-
tebi- = 2**40 = Ti-
pebi- = 2**50 = Pi-
second = [time] = s = sec
minute = 60 * second = min
hour = 60 * minute = h = hr
day = 24 * hour = d
week = 7 * day
year = 365.25 * day = a = yr
month = year / 12
hertz = 1 / second = Hz
joule = [energy] = J
watt = joule / second = W
watt_hour = watt * hour = Wh
bit = []
byte = 8 * bit = B = octet
baud = bit / second = Bd = bps
percent = 0.01 = %
FLOP = []
request = 1
token = 1
USD = []
"""


@lru_cache(maxsize=1)
def _registry() -> UnitRegistry[Decimal]:
    import pint  # noqa: PLC0415  (a fifth of a second; only needed once a text is parsed)

    # decimals: "5 us" shall be 5e-6 to the last digit, which a product of floats misses
    return pint.UnitRegistry(_DEFINITIONS.splitlines(), case_sensitive=True, non_int_type=Decimal)


@lru_cache(maxsize=4096)
def parse(text: str, unit: str) -> float:
    """Return ``text`` ("3.35 TB/s") as a float in ``unit`` ("byte/second").

    Raises
    ------
    SpecError
        If the text has no unit, or one of another dimension.
    """
    example = _EXAMPLES.get(unit, f"1 {unit}")
    import pint  # noqa: PLC0415

    try:
        quantity = _registry().parse_expression(text)
    except Exception as problem:  # pint raises many kinds for malformed text
        raise SpecError(f'{text!r} is not a quantity; write e.g. "{example}"') from problem
    if not isinstance(quantity, pint.Quantity):
        raise SpecError(f'{text} has no unit; write e.g. "{example}"')
    try:
        return float(quantity.to(unit).magnitude)
    except pint.DimensionalityError as problem:
        if quantity.dimensionless:
            raise SpecError(f'{text!r} has no unit; write e.g. "{example}"') from problem
        raise SpecError(f'{text!r} is not in {unit}; write e.g. "{example}"') from problem


_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"))


#: Seconds beyond which nobody reads seconds, and what is read instead. [s]
_LONG_S = 1000.0
_LONG = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def text(value: float, unit: str, digits: int = 3) -> str:
    """Format an SI value for people: ``text(0.0231, "s")`` is "23.1 ms"; long times are in minutes, hours, days."""
    magnitude = abs(value)
    if unit == "s" and magnitude >= _LONG_S * (1 - 0.5 * 10.0**-digits):
        long, name = next((long, name) for long, name in _LONG if magnitude >= 2 * long)
        return f"{value / long:.{digits}g} {name}"
    if magnitude == 0:
        return f"0 {unit}"
    for scale, prefix in _PREFIXES:
        if magnitude >= scale * (1 - 0.5 * 10.0**-digits):
            return f"{value / scale:.{digits}g} {prefix}{unit}"
    return f"{value / 1e-9:.{digits}g} n{unit}"


def quantity(value: Any, unit: str, *, bare_numbers: bool) -> float:
    """Take a number (already SI) or a text with a unit; refuse bare numbers where they come from a file."""
    if isinstance(value, str):
        return parse(value.strip(), unit)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SpecError(f'{value!r} is not a quantity; write e.g. "{_EXAMPLES.get(unit, "1 " + unit)}"')
    if not bare_numbers:
        raise SpecError(f'{value} has no unit; write e.g. "{_EXAMPLES.get(unit, "1 " + unit)}"')
    return float(value)
