"""Checks of the values of config fields."""

import math
import numbers
import re
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str]  # a value -> what it must be, such as "at least 1"; "" for a valid value


def whole(low: int | float = -math.inf, high: int | float = math.inf) -> Check:
    """A whole number from low to high, both included."""

    def check(value: Any) -> str:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            return "a whole number"
        return _within(value, low, high)

    return check


def number(low: int | float = -math.inf, high: int | float = math.inf) -> Check:
    """A finite number from low to high, both included."""
    return lambda value: _finite(value) or _within(value, low, high)


def positive(value: Any) -> str:
    """A finite number above 0."""
    return _finite(value) or ("" if value > 0 else "above 0")


def fraction(value: Any) -> str:
    """A number from 0 up to, but not including, 1."""
    return _finite(value) or ("" if 0 <= value < 1 else "in [0, 1)")


def _finite(value: Any) -> str:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return "" if number and math.isfinite(value) else "a finite number"


def _within(value: int | float, low: int | float, high: int | float) -> str:
    bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
    return "" if low <= value <= high else bounds


def flag(value: Any) -> str:
    """True or False."""
    return "" if isinstance(value, bool) else "True or False"


def text(value: Any) -> str:
    """A text that UTF-8 can encode. Other bytes on the command line arrive as lone surrogates."""
    if not isinstance(value, str):
        return "a text"
    return "text that UTF-8 can encode" if any("\ud800" <= letter <= "\udfff" for letter in value) else ""


def pattern(value: Any) -> str:
    """A regular expression."""
    try:
        return text(value) or (re.compile(value) and "")
    except re.error as error:
        return f"a regular expression ({error})"


def optional(check: Check) -> Check:
    """None, or a value that passes `check`."""
    return lambda value: "" if value is None else check(value)


def zero_or(check: Check) -> Check:
    """0, or a value that passes `check`."""
    return lambda value: check(value) and whole(0, 0)(value) and f"0 or {check(value)}"


def each(check: Check, count: int | None = None) -> Check:
    """A tuple of values that pass `check`. count: its length, None for any."""

    def of_all(value: Any) -> str:
        if not isinstance(value, tuple | list) or count not in (None, len(value)):
            return "a tuple" if count is None else f"a tuple of {count}"
        wrong = next(filter(None, map(check, value)), "")
        return wrong and f"a tuple, each {wrong}"

    return of_all


def levels(check: Check) -> Check:
    """One value that passes `check` for all levels of a network, or a tuple with one for each level."""

    def one_or_each(value: Any) -> str:
        if not isinstance(value, tuple | list):
            return check(value)
        return each(check)(value) if value else "a tuple with an entry for each level"

    return one_or_each
