"""Small charts as inline SVG: lines, stacked bars, a participation grid. Colours are the page's CSS variables.

A chart is drawn in a fixed coordinate system (`WIDTH` or `HALF` by its height) and scales with the page. Every mark
carries a `<title>`, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 720.0
HALF: Final = 400.0  # for charts that stand two in a row: their text must not shrink
_LEFT: Final = 64.0
_RIGHT: Final = 16.0
_TOP: Final = 12.0
_BOTTOM: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`points` (x, y); `style` is a CSS class: `a` ours, `b` the comparison (dashed)."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) that cover [low, high] in at most `most` + 1 steps."""
    if not high > low:
        high = low + max(1.0, abs(low))
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for m in (1.0, 2.0, 2.5, 5.0, 10.0) if (step := m * power) >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that cover [low, high]; only powers of ten over more than two decades."""
    steps = (1.0, 2.0, 5.0) if high / low < 100.0 else (1.0,)
    marks = [
        m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for m in steps
    ]
    below = [mark for mark in marks if mark <= low * 1.0001]
    above = [mark for mark in marks if mark >= high * 0.9999]
    return [mark for mark in marks if below[-1] <= mark <= above[0]]


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    unit: str = "",
    height: float = 260.0,
    width: float = WIDTH,
    label: str = "",
    within: tuple[float, float] | None = None,
) -> str:
    """Lines over a common x; a logarithmic y axis if the values are positive and span more than a factor of 20.
    `label`: the picture's name for those who don't see it. `within`: the y axis's ends, instead of the values' own."""
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    xs = [x for line in lines for x, _ in line.points]
    if not values:
        return '<p class="empty">nothing to draw</p>'
    low, high = within or (min(values), max(values))
    log = low > 0.0 and high / low > 20.0
    marks = log_ticks(low, high) if log else ticks(low, high)
    frame = _Frame(x=(min(xs), max(xs)), y=(marks[0], marks[-1]), height=height, log=log, width=width)
    parts = [frame.grid(marks, x_label)]
    for line in lines:
        points = [(frame.px(x), frame.py(y), x, y) for x, y in line.points if math.isfinite(y)]
        path = " ".join(f"{'L' if k else 'M'}{px:.1f},{py:.1f}" for k, (px, py, _, _) in enumerate(points))
        parts.append(f'<path class="line {line.style}" d="{path}"/>')
        small = len(points) <= 120
        for px, py, x, y in points:
            tip = f"<title>{escape(line.label)}, {x_label} {x:g}: {y:.4g}{unit}</title>"
            parts.append(f'<circle class="dot {line.style}" cx="{px:.1f}" cy="{py:.1f}" r="2.4">{tip}</circle>' if small
                         else f'<circle class="hit" cx="{px:.1f}" cy="{py:.1f}" r="4">{tip}</circle>')  # fmt: skip
        if points:
            px, py, _, y = points[-1]
            parts.append(f'<circle class="end {line.style}" cx="{px:.1f}" cy="{py:.1f}" r="4"/>')
    return frame.svg("".join(parts), label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """What was measured at one value of a swept setting: mean, and mean ± `spread` as a bar; `seeds`: each run."""

    label: str
    mean: float
    spread: float | None
    seeds: Sequence[float]


def value_chart(spots: Sequence[Spot], reference: Sequence[float | None], *, x_label: str, name: str) -> str:
    """Measurements against a setting's values; `reference[k]` is drawn as a dashed line through value k.

    The x axis is to scale if all labels are numbers (logarithmic if they are positive and span a factor of 8), and has
    equal steps otherwise."""
    heights = [y for spot in spots for y in (*spot.seeds, spot.mean - (spot.spread or 0.0),
                                             spot.mean + (spot.spread or 0.0))]  # fmt: skip
    heights += [y for y in reference if y is not None]
    heights = [y for y in heights if math.isfinite(y)]
    if not heights:
        return '<p class="empty">nothing to draw</p>'
    places, scaled = _places([spot.label for spot in spots])
    marks = ticks(min(heights), max(heights))
    margin = 0.06 * ((max(places) - min(places)) or 1.0)
    frame = _Frame(x=(min(places) - margin, max(places) + margin), y=(marks[0], marks[-1]), height=280.0, log=False)
    parts = [frame.grid(marks, x_label, at=[(place, spot.label) for place, spot in zip(places, spots, strict=True)])]
    base = [(frame.px(x), frame.py(y)) for x, y in zip(places, reference, strict=True) if y is not None]
    if len(base) == 1:
        base = [(frame.px(frame.x[0]), base[0][1]), (frame.px(frame.x[1]), base[0][1])]
    if base:
        parts.append(_path(base, "b", "plain PyTorch"))
    good = [(x, spot) for x, spot in zip(places, spots, strict=True) if math.isfinite(spot.mean)]
    if scaled and len(good) > 1:
        parts.append(_path([(frame.px(x), frame.py(spot.mean)) for x, spot in good], "a", name))
    for place, spot in good:
        x = frame.px(place)
        if spot.spread:
            top, bottom = frame.py(spot.mean + spot.spread), frame.py(spot.mean - spot.spread)
            parts.append(f'<line class="error" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        for y in spot.seeds if len(spot.seeds) > 1 else ():
            tip = f"<title>{escape(f'{x_label} {spot.label}, one seed: {y:.4g}')}</title>"
            parts.append(f'<circle class="seed" cx="{x:.1f}" cy="{frame.py(y):.1f}" r="2.6">{tip}</circle>')
        about = f"{name}, {x_label} {spot.label}: {spot.mean:.4g}" + (f" ± {spot.spread:.2g}" if spot.spread else "")
        tip = f"<title>{escape(about)}</title>"
        parts.append(f'<circle class="mark a" cx="{x:.1f}" cy="{frame.py(spot.mean):.1f}" r="4.5">{tip}</circle>')
    return frame.svg("".join(parts))


def _places(labels: Sequence[str]) -> tuple[list[float], bool]:
    """Where each label stands on the x axis, and whether that is to scale."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return [float(k) for k in range(len(labels))], False
    if not all(math.isfinite(x) for x in numbers):
        return [float(k) for k in range(len(labels))], False
    if min(numbers) > 0.0 and max(numbers) / min(numbers) >= 8.0:
        return [math.log10(x) for x in numbers], True
    return numbers, True


def _path(points: Sequence[tuple[float, float]], style: str, about: str) -> str:
    steps = " ".join(f"{'L' if k else 'M'}{x:.1f},{y:.1f}" for k, (x, y) in enumerate(points))
    return f'<path class="line {style}" d="{steps}"><title>{escape(about)}</title></path>'


def bar_chart(
    stacks: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    first_x: int,
    show: Sequence[Sequence[str]],
    x_label: str = "round",
    label: str = "",
) -> str:
    """Stacked bars: `stacks[k]` are the k-th bar's parts from below, `labels` the parts' names, `show` their texts."""
    totals = [sum(stack) for stack in stacks]
    if not totals:
        return '<p class="empty">nothing to draw</p>'
    marks = ticks(0.0, max([*totals, 1e-9]))
    reach = (first_x - 0.5, first_x + len(stacks) - 0.5)
    frame = _Frame(x=reach, y=(0.0, marks[-1]), height=190.0, log=False, width=HALF)
    parts = [frame.grid(marks, x_label)]
    step = frame.px(first_x + 1.0) - frame.px(first_x)
    width = max(0.6, step - min(2.0, 0.25 * step))
    for k, stack in enumerate(stacks):
        bottom = 0.0
        for part, value in enumerate(stack):
            y0, y1 = frame.py(bottom), frame.py(bottom + value)
            bottom += value
            tip = f"{x_label} {first_x + k}, {labels[part]}: {show[k][part]}"
            parts.append(
                f'<rect class="bar {"ab"[part % 2]}" x="{frame.px(first_x + k) - width / 2:.1f}" y="{y1:.1f}" '
                f'width="{width:.1f}" height="{max(0.0, y0 - y1):.1f}"><title>{escape(tip)}</title></rect>'
            )
    return frame.svg("".join(parts), label)


def participation(names: Sequence[str], rounds: Sequence[int], cells: Sequence[Sequence[tuple[str, str]]]) -> str:
    """A row per agent, a column per round; `cells[agent][round]` is (CSS class, title), the class "" for not asked."""
    label = min(150.0, 8.0 + 7.2 * max((len(name) for name in names), default=0))
    step = min(18.0, (WIDTH - label - _RIGHT) / max(1, len(rounds)))
    row = 15.0
    height = row * len(names) + 24.0
    gap = 2.0 if step > 6.0 else 0.5
    parts = []
    for r, name in enumerate(names):
        y = r * row + 2.0
        parts.append(f'<text class="tick" x="{label - 8:.1f}" y="{y + 10:.1f}" text-anchor="end">{escape(name)}</text>')
        for c, (style, title) in enumerate(cells[r]):
            if style:
                parts.append(
                    f'<rect class="cell {style}" x="{label + c * step:.1f}" y="{y:.1f}" width="{step - gap:.1f}" '
                    f'height="{row - 3:.1f}" rx="2"><title>{escape(title)}</title></rect>'
                )
    every = max(1, math.ceil(len(rounds) / 12))
    for c, number in enumerate(rounds):
        if c % every == 0 or c == len(rounds) - 1:
            x = label + c * step + (step - gap) / 2
            parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 6:.1f}" text-anchor="middle">{number}</text>')
    return _svg(height, "".join(parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Where values lie in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: float
    log: bool
    width: float = WIDTH

    def px(self, x: float) -> float:
        low, high = self.x
        return _LEFT + (x - low) / ((high - low) or 1.0) * (self.width - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        low, high = self.y
        share = math.log(y / low) / math.log(high / low) if self.log else (y - low) / (high - low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def grid(self, marks: Sequence[float], x_label: str, *, at: Sequence[tuple[float, str]] | None = None) -> str:
        """Lines at `marks`, texts below: whole numbers, or `at` (x, text)."""
        parts = []
        for mark in marks:
            y = self.py(mark)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            text = short(mark)
            parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        low, high = self.x
        base = self.height - _BOTTOM
        most = 8 if self.width > HALF else 5
        if at is None:
            whole = [mark for mark in ticks(math.ceil(low), math.floor(high), most=most) if low <= mark <= high]
            at = [(mark, f"{mark:g}") for mark in whole if mark == int(mark)]
        for place, text in at:
            x, words = self.px(place), escape(text)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 16:.1f}" text-anchor="middle">{words}</text>')
        middle, words = (_LEFT + self.width - _RIGHT) / 2, escape(x_label)
        parts.append(f'<text class="axis" x="{middle:.1f}" y="{base + 28:.1f}" text-anchor="middle">{words}</text>')
        return "".join(parts)

    def svg(self, inner: str, label: str = "") -> str:
        return _svg(self.height, inner, width=self.width, label=label)


def short(value: float) -> str:
    """An axis label: 1200000 as 1.2M, small numbers as they are."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:g}"


def _svg(height: float, inner: str, *, width: float = WIDTH, label: str = "") -> str:
    name = f' aria-label="{escape(label)}"' if label else ""
    box = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {box} role="img"{name} preserveAspectRatio="xMinYMin meet">{inner}</svg>'
