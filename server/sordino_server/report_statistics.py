"""What a report says of statistics: the fitted line, moments, quantiles, and histograms to look at."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from sordino_server.charts import bar_chart
from sordino_server.page import card, table
from sordino_server.progress import number


def statistics_cards(found: Mapping[str, Any]) -> list[str]:
    """A card per kind of finding. All figures are estimates from noised sums; their errors are the noise's alone."""
    cards = []
    if "ridge" in found:
        line = found["ridge"]
        rows = [(escape(name), number(slope)) for name, slope in line["coefficients"].items()]
        rows += [("intercept", number(line["intercept"])), ("regularization", number(line["regularization"]))]
        legend = f"{line['target']} = sum of coefficient x column + intercept, in the columns' own units"
        cards.append(card("Ridge regression", table(("column", "coefficient"), rows), escape(legend)))
    moments = [
        (escape(name), number(one["mean"]), number(one["mean_error"]), number(one["deviation"]))
        for name, one in found.get("moments", {}).items()
    ]
    if moments:
        cards.append(card("Moments", table(("column", "mean", "its standard error", "deviation"), moments), ""))
    if "count" in found:
        one = found["count"]
        cards.append(card("Rows", f"<p>{number(one['rows'])}, standard error {number(one['error'])}</p>", ""))
    for name, values in found.get("quantiles", {}).items():
        rows = [(escape(probability), number(value)) for probability, value in values.items()]
        cards.append(card(f"Quantiles of {escape(name)}", table(("share of rows below", "value"), rows), ""))
    for name, one in found.get("histograms", {}).items():
        edges, counts = one["edges"], one["counts"]
        bars = [(f"{low:g} to {high:g}", value) for low, high, value in zip(edges, edges[1:], counts, strict=False)]
        legend = f"rows per bin, 95 % of the noise within {number(one['error'])}; what is below 0 is drawn as 0"
        cards.append(card(f"Histogram of {escape(name)}", _bars(bars), escape(legend)))
    return cards


def _bars(bars: list[tuple[str, float]]) -> str:
    heights = [[max(value, 0.0)] for _, value in bars]
    texts = [[f"{number(value)} ({label})"] for label, value in bars]
    return bar_chart(heights, ("rows",), first_x=1, show=texts, x_label="bin")
