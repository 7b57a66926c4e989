"""Make a report to look at: one HTML file with tables, curves and pictures, which needs no other file."""

import base64
import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222 }
.runs { display: flex; gap: 3em; align-items: flex-start } .runs > section { flex: 1; min-width: 0 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left } small { color: #777 }
img, svg { max-width: 100%; display: block; margin: 1em 0 } figcaption { font-weight: 600 }
"""
ESTIMATES = ("mean", "value")
POINT = re.compile(r"(\D+) (-?\d+(?:\.\d+)?)")  # a key such as "guidance 3"
WIDTH, HEIGHT, EDGE = 360, 220, 44  # of a plot, and its margin, pixels
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bf8700", "#57606a")


def page(folders: Sequence[Path]) -> str:
    """One column for each folder: its report.json, and all PNG files in it and below.

    Raises ValueError for a folder without report.json.
    """
    columns = "".join(f"<section>{_column(folder)}</section>" for folder in folders)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{STYLE}</style>"
        "<h1>Evaluation</h1><p>Figures are followed by their standard errors.</p>"
        f"<div class=runs>{columns}</div></html>\n"
    )


def _column(folder: Path) -> str:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no report.json of an evaluation: run --mode=eval there first") from error
    parts = [f"<h2>{html.escape(str(report.get('weights', folder)))}</h2>"]
    for name, measure in report.items():
        if isinstance(measure, dict):
            parts += [f"<h3>{html.escape(name)}</h3>", _facts(measure), _table(measure), *_plots(measure)]
    parts += [_picture(file, folder) for file in sorted(folder.rglob("*.png"))]
    return "".join(parts)


def _is_estimate(value: Any) -> bool:
    return isinstance(value, dict) and "standard_error" in value


def _estimates(value: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Every figure with a standard error, and the keys that lead to it."""
    for key, part in value.items():
        if _is_estimate(part):
            yield (*path, key), part
        elif isinstance(part, dict):
            yield from _estimates(part, (*path, key))


def _facts(measure: dict) -> str:
    facts = (f"{name.replace('_', ' ')}: {part}" for name, part in measure.items() if not isinstance(part, dict))
    return f"<p><small>{html.escape('; '.join(facts))}</small></p>"


def _table(measure: dict) -> str:
    """A row for each path of keys but the last, which names the column."""
    figures = dict(_estimates(measure))
    columns = list(dict.fromkeys(path[-1] for path in figures))
    rows = list(dict.fromkeys(path[:-1] for path in figures))
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}" for name in ("", *columns))
    body = "".join(
        f"<tr><td>{html.escape(', '.join(row).replace('_', ' '))}"
        + "".join(f"<td>{_figure(figures.get((*row, column)))}" for column in columns)
        for row in rows
    )
    return f"<table><tr>{head}{body}</table>"


def _figure(estimate: dict | None) -> str:
    if estimate is None:
        return ""
    value, error = _value(estimate), estimate["standard_error"]
    return f"{_short(value)}" + (f" <small>± {_short(error)}</small>" if error is not None else "")


def _value(estimate: dict) -> float | None:
    return next(estimate[name] for name in ESTIMATES if name in estimate)


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _plots(measure: dict) -> Iterator[str]:
    """A plot of each figure over keys that differ in a number alone, such as "guidance 1" and "guidance 3"."""
    points = [(float(match[2]), match[1], key) for key in measure if (match := POINT.fullmatch(key))]
    if len(points) < 3:
        return
    series: dict[tuple[str, ...], dict[str, list[tuple[float, float]]]] = {}
    for x, _, key in sorted(points):
        for path, estimate in _estimates(measure[key]):
            if (y := _value(estimate)) is not None:
                series.setdefault(path[:-1], {}).setdefault(path[-1], []).append((x, y))
    for path, lines in series.items():
        yield _plot(", ".join(path).replace("_", " "), points[0][1], lines)


def _plot(title: str, x_label: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    x, y = zip(*(point for line in lines.values() for point in line), strict=True)
    low, high = min(*y, 0), max(*y, 1e-12)
    step = (WIDTH - 2 * EDGE) / (max(x) - min(x) or 1), (HEIGHT - 2 * EDGE) / (high - low)

    def place(point: tuple[float, float]) -> str:
        return f"{EDGE + (point[0] - min(x)) * step[0]:.1f},{HEIGHT - EDGE - (point[1] - low) * step[1]:.1f}"

    curves = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(map(place, line))}"/>'
        f'<text x="{WIDTH - EDGE + 4}" y="{place(line[-1]).split(",")[1]}" font-size="11" fill="{colour}">'
        f"{html.escape(name.replace('_', ' '))}</text>"
        for colour, (name, line) in zip(COLOURS * len(lines), lines.items(), strict=False)
    )
    bottom, right = HEIGHT - EDGE, WIDTH - EDGE
    axes = (
        f'<path d="M{EDGE} {EDGE}V{bottom}H{right}" fill="none" stroke="#999"/>'
        f'<g font-size="11" fill="#555"><text x="{EDGE}" y="{bottom + 16}">{_short(min(x))}</text>'
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{_short(max(x))}</text>'
        f'<text x="{WIDTH / 2}" y="{bottom + 32}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text x="{EDGE - 4}" y="{bottom}" text-anchor="end">{_short(low)}</text>'
        f'<text x="{EDGE - 4}" y="{EDGE + 4}" text-anchor="end">{_short(high)}</text></g>'
    )
    size = f'width="{WIDTH + 2 * EDGE}" height="{HEIGHT}" viewBox="0 0 {WIDTH + 2 * EDGE} {HEIGHT}"'
    return f"<figure><figcaption>{html.escape(title)}</figcaption><svg {size}>{axes}{curves}</svg></figure>"


def _picture(file: Path, folder: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    name = html.escape(str(file.relative_to(folder).with_suffix("")).replace("_", " "))
    return f'<figure><figcaption>{name}</figcaption><img src="data:image/png;base64,{data}" alt="{name}"></figure>'
