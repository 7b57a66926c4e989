"""Text of errors and reports."""

import json
import math
from typing import Any


def one_line(error: BaseException) -> str:
    """The whole message of an error on one line."""
    return " ".join(line.strip() for line in str(error).splitlines())


def first_line(error: Exception) -> str:
    """The first line of an error of another library."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def as_json(report: Any, indent: int | None = None) -> str:
    """A report as JSON. Numbers that are not finite become null, because JSON cannot write them."""
    return json.dumps(_finite(report), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
