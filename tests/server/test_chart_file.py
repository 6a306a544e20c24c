"""A chart as a file of its own: well-formed, with title, legend and every line."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from sordino_common.errors import ConfigError
from sordino_server.chart_file import line_chart_file
from sordino_server.charts import Line


def test_a_file_has_title_legend_and_lines() -> None:
    lines = [
        Line(label=f"<{style}>", style=style, points=[(0, 3.0 + k), (1, 1.0 + k)]) for k, style in enumerate("abcd")
    ]
    text = line_chart_file(lines, title="MSE & more", x_label="round")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    words = [element.text for element in root.iter(f"{space}text")]
    assert {"MSE & more", "<a>", "<d>", "round"} <= set(words)
    drawn = [path.get("class") for path in root.iter(f"{space}path")]
    assert sorted(drawn) == sorted(f"line {style}" for style in "aabbccdd")  # in the legend, in the chart
    style = root.find(f"{space}style")
    assert style is not None
    assert "var(" not in (style.text or "")  # nothing of the page's is needed


def test_what_can_not_be_drawn_is_told() -> None:
    with pytest.raises(ConfigError, match="have the styles a, b, c, d; got z"):
        line_chart_file([Line(label="x", style="z", points=[(0, 1.0)])], title="t", x_label="round")
    with pytest.raises(ConfigError, match="t: there is nothing to draw"):
        line_chart_file([Line(label="x", style="a", points=[(0, float("nan"))])], title="t", x_label="round")
