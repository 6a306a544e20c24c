"""A line chart as an SVG file of its own: title, legend, and the colours that a report's page would give it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from sordino_common.errors import ConfigError
from sordino_server.charts import WIDTH, Line, line_chart

# The page's own two, and two that differ from them in hue and in lightness.
_COLOURS: Final = {"a": "#1f5fbf", "b": "#c9772b", "c": "#2f7d57", "d": "#8a4fa8"}
_DASHES: Final = {"a": "none", "b": "5 4", "c": "9 3", "d": "2 3"}
_TOP: Final = 34.0
_LEGEND_ROW: Final = 18.0
_HEIGHT: Final = 260.0

_STYLE: Final = (
    "text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }"
    ".title { font-size: 15px; font-weight: 600; fill: #1c1c1a; } .name { font-size: 12px; fill: #63635d; }"
    ".grid { stroke: #e3e3dd; stroke-width: 1; } .tick, .axis { fill: #63635d; font-size: 11px; }"
    ".line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dot { opacity: 0; } .hit { fill: transparent; }"
    + "".join(
        f".line.{style} {{ stroke: {colour}; stroke-dasharray: {_DASHES[style]}; }}"
        f".dot.{style}, .end.{style} {{ fill: {colour}; }}"
        for style, colour in _COLOURS.items()
    )
)


def line_chart_file(lines: Sequence[Line], *, title: str, x_label: str) -> str:
    """The text of an SVG file with these lines; styles `a` to `d`. Raises `ConfigError` for another style, or if there
    is no finite value to draw."""
    strange = sorted({line.style for line in lines} - _COLOURS.keys())
    if strange:
        raise ConfigError(f"a chart's lines have the styles {', '.join(_COLOURS)}; got {', '.join(strange)}")
    drawn = line_chart(lines, x_label=x_label, height=_HEIGHT)
    if not drawn.startswith("<svg "):
        raise ConfigError(f"{title}: there is nothing to draw")
    start = _TOP + _LEGEND_ROW * len(lines)
    legend = "".join(
        f'<path class="line {line.style}" d="M64,{y:g} L96,{y:g}"/>'
        f'<text class="name" x="104" y="{y + 4:g}">{escape(line.label)}</text>'
        for k, line in enumerate(lines)
        for y in (_TOP + _LEGEND_ROW * k,)
    )
    chart = drawn.replace("<svg ", f'<svg y="{start:g}" width="{WIDTH:g}" height="{_HEIGHT:g}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {start + _HEIGHT:g}" role="img" '
        f'aria-label="{escape(title)}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text class="title" x="64" y="20">{escape(title)}</text>{legend}{chart}</svg>\n'
    )
