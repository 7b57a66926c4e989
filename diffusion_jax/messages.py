"""Text of errors and reports, and progress bars."""

import json
import math
import time
from typing import Any

from tqdm import tqdm


def one_line(error: BaseException) -> str:
    """The whole message of an error on one line."""
    return " ".join(line.strip() for line in str(error).splitlines())


def first_line(error: Exception) -> str:
    """The first line of an error of another library."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= 0.1 * scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def as_json(report: Any, indent: int | None = None) -> str:
    """A report as JSON. Numbers that are not finite become null, because JSON cannot write them."""
    return json.dumps(_finite(report), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A progress bar that says "compiling" until the first update, and counts time and speed from there.

    name, unit: texts of the bar.
    total: number of units to do, None if it is not known.
    start: number of units that are already done.
    shown: False for no bar.
    on_screen: how many bars are drawn now, without an end of line. Other output must begin with an end of line.
    """

    on_screen = 0

    def __init__(self, name: str, total: int | None, unit: str, start: int = 0, shown: bool = True):
        self._name, self._compiling, self._shown = name, True, shown
        Progress.on_screen += shown
        self._bar = tqdm(
            desc=f"{name}, compiling",
            total=total,
            unit=unit,
            initial=start,
            disable=not shown,
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        Progress.on_screen -= self._shown
        self._shown = False
        self._bar.close()

    @property
    def done(self) -> int:
        return self._bar.n

    def update(self, count: int = 1, about: str = "") -> None:
        """Count what is done.

        count: number of units. The first ones must be finished on the device.
        about: text behind the bar.
        """
        if not self._compiling:
            self._bar.update(count)
        elif count:
            self._start_clock(self._bar.n + count)
        if about:
            self._bar.set_postfix_str(about)

    def _start_clock(self, done: int) -> None:
        self._compiling = False
        self._bar.start_t = self._bar.last_print_t = time.time()
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.set_description(self._name)
