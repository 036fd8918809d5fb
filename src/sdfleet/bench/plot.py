"""The curve of a report as a picture: milliseconds per picture and step over the pictures that step together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from sdfleet.bench.measure import Report, Timing
from sdfleet.errors import InvalidValue, OutputNotWritable

_WIDTH_PX, _HEIGHT_PX = 720, 440
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 80, 24, 56, 64
# Told apart also by who sees few colours (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GRID, _INK = "#dddddd", "#222222"


@dataclass(frozen=True, slots=True)
class _Line:
    points: tuple[tuple[float, float], ...]
    colour: str
    width_px: int


@dataclass(frozen=True, slots=True)
class _Text:
    at: tuple[float, float]
    words: str
    anchor: str
    colour: str = _INK


def save_plot(report: Report, path: Path) -> None:
    """Write the curve as `.svg` or `.png`. Raises InvalidValue for another ending, OutputNotWritable."""
    kind = check_plot_name(path)
    shapes = _shapes(report)
    try:
        if kind == ".svg":
            path.write_text(_svg(shapes), encoding="utf-8")
        else:
            _save_png(shapes, path)
    except OSError as exc:
        raise OutputNotWritable(f"{path} cannot be written: {exc.strerror or exc}", hint="choose another file") from exc


def check_plot_name(path: Path) -> str:
    """`.svg` or `.png`: to be asked before the first minute is spent. Raises InvalidValue."""
    if path.suffix.lower() not in {".svg", ".png"}:
        raise InvalidValue("plot", f"{path.name!r} is neither .svg nor .png", hint="for example curve.svg")
    return path.suffix.lower()


def _shapes(report: Report) -> list[_Line | _Text]:
    curves = _curves(report.timings)
    most_ms = max(ms for points in curves.values() for _, ms in points) or 1.0
    top_ms, every_ms = _scale(most_ms)
    most_rows = max(n for points in curves.values() for n, _ in points)

    def place(n_rows: float, ms: float) -> tuple[float, float]:
        # Rows double from case to case, so their axis is logarithmic.
        across = math.log2(n_rows) / math.log2(most_rows) if most_rows > 1 else 0.5
        x = _LEFT_PX + across * (_WIDTH_PX - _LEFT_PX - _RIGHT_PX)
        return x, _HEIGHT_PX - _BOTTOM_PX - ms / top_ms * (_HEIGHT_PX - _TOP_PX - _BOTTOM_PX)

    weights = " on random weights" if report.weights == "random" else ""
    title = f"{report.model}{weights}, {report.device}, {report.dtype}: ms per picture and step"
    shapes: list[_Line | _Text] = [_Text((_LEFT_PX, 24), title, "start")]
    for i in range(round(top_ms / every_ms) + 1):
        y = place(1, i * every_ms)[1]
        shapes.append(_Line(((_LEFT_PX, y), (_WIDTH_PX - _RIGHT_PX, y)), _GRID, 1))
        shapes.append(_Text((_LEFT_PX - 8, y + 4), f"{i * every_ms:g}", "end"))
    shapes += [
        _Text((place(n_rows, 0)[0], _HEIGHT_PX - _BOTTOM_PX + 20), str(n_rows), "middle")
        for n_rows in sorted({n for points in curves.values() for n, _ in points})
    ]
    shapes.append(_Text((_WIDTH_PX / 2, _HEIGHT_PX - 16), "pictures that step together", "middle"))
    for i, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        places = tuple(place(*point) for point in points)
        shapes.append(_Line(places, colour, 2))
        for x, y in places:
            shapes.append(_Line(((x - 4, y), (x + 4, y)), colour, 8))
        shapes.append(_Text((_WIDTH_PX - _RIGHT_PX, _TOP_PX - 8 + 16 * i), name, "end", colour))
    return shapes


def _curves(timings: Sequence[Timing]) -> dict[str, list[tuple[int, float]]]:
    """Points (pictures, ms) by size and steps, from few pictures to many."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for timing in sorted(timings, key=lambda timing: timing.case.n_images):
        case = timing.case
        name = f"{case.width_px}x{case.height_px}, {case.steps} step{'s' if case.steps > 1 else ''}"
        curves.setdefault(name, []).append((case.n_images, 1000 * timing.step_s / case.n_images))
    return curves


def _scale(most: float) -> tuple[float, float]:
    """(the axis's end, a round distance between its lines), for values up to `most`.

    >>> _scale(43.0)
    (50.0, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(most))
    every = next(step * power for step in (0.2, 0.5, 1.0, 2.0) if most / (step * power) <= 6)
    return math.ceil(most / every) * every, every


def _svg(shapes: Sequence[_Line | _Text]) -> str:
    side = f'width="{_WIDTH_PX}" height="{_HEIGHT_PX}"'
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {side} font-family="sans-serif" font-size="13">',
        f'<rect {side} fill="white"/>',
    ]
    for shape in shapes:
        match shape:
            case _Line(points, colour, width_px):
                places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                drawn.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width_px}"/>')
            case _Text((x, y), words, anchor, colour):
                place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
                drawn.append(f'<text {place} fill="{colour}">{escape(words)}</text>')
    return "\n".join([*drawn, "</svg>\n"])


def _save_png(shapes: Sequence[_Line | _Text], path: Path) -> None:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_WIDTH_PX, _HEIGHT_PX), "white")
    pen = ImageDraw.Draw(image)
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for shape in shapes:
        match shape:
            case _Line(points, colour, width_px):
                pen.line(list(points), fill=colour, width=width_px)
            case _Text(at, words, anchor, colour):
                pen.text(at, words, fill=colour, anchor=anchors[anchor], font_size=13)
    image.save(path)
