"""The page that reports are written on: one HTML file, no script, nothing fetched, light and dark; and its parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Final

from sordino_server.progress import number

_WORDS: Final = {
    "test_mse": "test MSE",
    "test_rmse": "test RMSE",
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
}


def page(title: str, sections: Sequence[str]) -> str:
    """A whole file that needs nothing else. `title` is text, the sections are HTML."""
    return document(title, sections, head=f"<style>{STYLE}</style>", footer=_FOOTER)


def document(title: str, sections: Sequence[str], *, head: str, footer: str) -> str:
    """A whole file. `title` is text; what stands in its head and foot, and the sections, are HTML."""
    parts = {"title": escape(title), "head": head, "footer": footer, "body": "\n".join(sections)}
    return _PLACE.sub(lambda place: parts[place[1]], _PAGE)  # once: a part may look like a place


def card(title: str, body: str, legend: str) -> str:
    """A titled box. `title` is text; `body` and `legend` are HTML."""
    note = f'<p class="legend">{legend}</p>' if legend else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{note}{body}</section>'


def tile(label: str, value: str, note: str, style: str = "") -> str:
    """A figure to see at a glance; all three are text."""
    return (
        f'<div class="tile {style}"><p class="label">{escape(label)}</p><p class="value">{escape(value)}</p>'
        f'<p class="note">{escape(note)}</p></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, header: bool = True) -> str:
    """`head` is text, the cells of `rows` are HTML."""
    top = "<tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head) + "</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead>{top}</thead><tbody>{body}</tbody></table></div>'


def word(metric: str) -> str:
    """A metric's name for people."""
    return _WORDS.get(metric, metric)


def metric_text(metric: str, value: float) -> str:
    """A metric's value for people: accuracies in percent."""
    return f"{100.0 * value:.1f} %" if metric == "test_accuracy" else number(value)


def count(many: int, noun: str) -> str:
    """1 answer, 2 answers."""
    return f"{many} {noun}" + ("" if many == 1 else "s")


_PLACE: Final = re.compile(r"\{(title|head|footer|body)\}")
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
{head}
</head>
<body><main>
{body}
<footer>{footer}</footer>
</main></body>
</html>
"""

_FOOTER: Final = "Written by sordino. One file, no scripts, nothing fetched."

STYLE: Final = """
:root { --page: #f6f6f3; --card: #ffffff; --ink: #1c1c1a; --soft: #63635d; --rule: #e3e3dd; --a: #1f5fbf;
  --b: #c9772b; --good: #7fa9dd; --miss: #e2a33b; --bad: #c2413a; --shadow: 0 1px 2px rgba(0,0,0,.06); }
@media (prefers-color-scheme: dark) { :root { --page: #151614; --card: #1f201e; --ink: #ecece6; --soft: #a3a39a;
  --rule: #34352f; --a: #7fb0f5; --b: #eba35c; --good: #3f6ba6; --miss: #d39a37; --bad: #e0645c; --shadow: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 32px 20px 48px; }
header { margin-bottom: 20px; }
.brand { margin: 0; color: var(--soft); font-style: italic; font-family: Georgia, "Times New Roman", serif; }
h1 { margin: 2px 0 4px; font-size: 28px; letter-spacing: -.01em; }
h2 { margin: 0 0 2px; font-size: 16px; }
.sub { margin: 0; color: var(--soft); }
.tag { border: 1px solid var(--rule); border-radius: 99px; padding: 1px 9px; background: var(--card); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; box-shadow: var(--shadow); }
.tile { padding: 12px 14px; }
.tile p { margin: 0; }
.tile .label { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 25px; font-weight: 600; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tile .note { color: var(--soft); font-size: 12.5px; line-height: 1.35; }
.tile.hero .value { color: var(--a); }
.card { padding: 16px 18px; margin-bottom: 16px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 0 16px; }
.legend { margin: 0 0 8px; color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.axis { fill: var(--soft); font-size: 11px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); stroke-width: 1.6; stroke-dasharray: 5 4; }
.dot { opacity: 0; } .dot:hover { opacity: 1; } .dot.a, .end.a { fill: var(--a); } .dot.b, .end.b { fill: var(--b); }
.hit { fill: transparent; }
.mark.a { fill: var(--a); } .error { stroke: var(--a); stroke-width: 1.5; } .seed { fill: var(--a); opacity: .3; }
.bar.a, .swatch.a { fill: var(--a); background: var(--a); } .bar.b, .swatch.b { fill: var(--b); background: var(--b); }
.bar:hover, .cell:hover { opacity: .75; }
.cell.answered, .swatch.answered { fill: var(--good); background: var(--good); }
.cell.missing, .swatch.missing { fill: var(--miss); background: var(--miss); }
.cell.refused, .swatch.refused { fill: var(--bad); background: var(--bad); }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.key { display: inline-block; width: 18px; height: 0; border-top: 2px solid var(--a); margin: 0 6px 4px 0; }
.key.b { border-top: 2px dashed var(--b); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.empty { color: var(--soft); }
footer { color: var(--soft); font-size: 12.5px; margin-top: 8px; }
"""
