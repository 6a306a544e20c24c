"""A run as one HTML file: no script, nothing fetched, light and dark. And `summary.json` beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

import msgspec

from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError
from sordino_server.charts import Line, bar_chart, line_chart, participation
from sordino_server.progress import number, size
from sordino_server.rounds.events import RoundRecord, Share
from sordino_server.run import RunResult

_GRID_AGENTS: Final = 60  # more rows than this nobody reads one by one
_WORDS: Final = {
    "test_mse": "test MSE",
    "test_rmse": "test RMSE",
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
}


def write_report(result: RunResult, folder: Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """`report.html` and `summary.json` in `folder`. `extra`: more fields for the summary (the simulator's)."""
    summary = {**result.summary, **(extra or {})}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
        write_atomically(folder / "report.html", report_html(result, summary).encode())
    except OSError as error:
        raise ConfigError(f"{folder}: the report can't be written: {error.strerror}") from None


def report_html(result: RunResult, summary: Mapping[str, Any]) -> str:
    records = result.records
    metric = next(iter(summary["metrics"]), None)
    sections = [_head(result, summary, metric)]
    if metric is not None:
        sections.append(_card(_word(metric), _metric_chart(result, metric), _metric_legend(result)))
    losses = [(float(r.round), r.loss) for r in records if r.loss is not None]
    loss_line = Line(label="training loss", style="a", points=losses)
    loss_note = "mean over the agents' local steps, weighted by rows; in the scaled target's unit"
    sections.append(_card("Training loss", line_chart([loss_line], x_label="round"), loss_note))
    sections.append(_card("Who took part", *_participation(records)))
    sections.append('<div class="two">' + _bytes_card(records) + _time_card(records) + "</div>")
    sections.append(_card("Agents", _agent_table(records), "over all rounds"))
    sections.append(_card("Job", _job_table(result, summary), ""))
    title = f"{escape(str(summary['job']))}: Sordino"
    return _PAGE.replace("{title}", title).replace("{style}", _STYLE).replace("{body}", "\n".join(sections))


# --- parts ---------------------------------------------------------------------------------------------------------


def _head(result: RunResult, summary: Mapping[str, Any], metric: str | None) -> str:
    tiles = []
    baseline = summary.get("baseline")
    if metric is not None:
        value = summary["metrics"][metric]
        below = ""
        if baseline:
            theirs = baseline[metric]
            below = f"plain PyTorch {_metric(metric, theirs)} ({_difference(metric, value, theirs)})"
        tiles.append(_tile(_word(metric), _metric(metric, value), below, "hero"))
    asked = {name for record in result.records for name in record.shares}
    drops = summary["dropouts"]
    tiles.append(_tile("agents", str(summary["agents"]), f"of {len(asked)} asked; {_count(drops, 'answer')} missing"))
    tiles.append(_tile("rounds", str(summary["rounds"]), f"{summary['steps']:,} local steps".replace(",", " ")))
    traffic = f"↑ {size(summary['bytes_up'])} to the server, ↓ {size(summary['bytes_down'])} to the agents"
    tiles.append(_tile("traffic", size(summary["bytes_up"] + summary["bytes_down"]), traffic))
    overhead = summary.get("overhead_vs_torch")
    note = f"{overhead:.1f} times plain PyTorch" if overhead is not None else ""
    tiles.append(_tile("time", f"{summary['seconds']:.1f} s", note))
    security = str(summary["security"])
    sees = _SEES.get(security, security)
    how = "on secret shares" if summary["mode"] == "spdz" else f"{summary['mode']} averaging"
    return (
        f'<header><p class="brand">sordino</p><h1>{escape(str(summary["job"]))}</h1>'
        f'<p class="sub">{escape(how)} · <span class="tag">{escape(sees)}</span> · '
        f"run {escape(result.run)}</p></header>"
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


_SEES: Final = {
    "plain": "baseline: the server sees each agent's update",
    "active": "active security: nobody sees rows or gradients, and cheating is detected",
    "passive": "SECURITY PASSIVE: a single cheating compute agent could have falsified this result, or learned rows",
}


def _metric_chart(result: RunResult, metric: str) -> str:
    ours = [(float(r.round), r.metrics[metric]) for r in result.records if metric in r.metrics]
    lines = []
    if result.baseline is not None:
        theirs = [(float(k + 1), point[metric]) for k, point in enumerate(result.baseline.curve)]
        lines.append(Line(label="plain PyTorch", style="b", points=theirs))
    lines.append(Line(label="federated", style="a", points=ours))
    return line_chart(lines, x_label="round")


def _metric_legend(result: RunResult) -> str:
    ours = '<span class="key a"></span>the fleet, on the agents\' held-out rows'
    counts = [record.test_rows for record in result.records if record.metrics]
    if counts and counts[-1] < max(counts):
        ours += f" (at the end {counts[-1]} of {max(counts)}: agents that are gone took theirs along)"
    if result.baseline is None:
        return ours
    return f'{ours} &nbsp; <span class="key b"></span>plain PyTorch, rows pooled, the same epochs'


def _participation(records: Sequence[RoundRecord]) -> tuple[str, str]:
    names = sorted({name for record in records for name in record.shares})
    legend = (
        '<span class="swatch answered"></span>answered &nbsp; <span class="swatch missing"></span>missing &nbsp; '
        '<span class="swatch refused"></span>refused or excluded'
    )
    if len(names) > _GRID_AGENTS:
        share = [(float(r.round), 100.0 * (1.0 - r.dropouts / max(1, len(r.shares)))) for r in records]
        line = Line(label="answered", style="a", points=share)
        return line_chart([line], x_label="round", unit=" %"), f"answered, in % of those asked; {len(names)} agents"
    cells = [
        [
            (record.shares[name].outcome, _cell_title(name, record.round, record.shares[name]))
            if name in record.shares
            else ("", "")
            for record in records
        ]
        for name in names
    ]
    return participation(names, [record.round for record in records], cells), legend


def _cell_title(name: str, round_: int, share: Share) -> str:
    if share.outcome == "answered":
        return f"{name}, round {round_}: {share.rows} rows, {share.steps} steps, {share.seconds:.3g} s"
    return f"{name}, round {round_}: {share.outcome}: {share.note}"


def _bytes_card(records: Sequence[RoundRecord]) -> str:
    stacks = [(float(r.bytes_up), float(r.bytes_down)) for r in records]
    texts = [(size(r.bytes_up), size(r.bytes_down)) for r in records]
    first = records[0].round if records else 1
    chart = bar_chart(stacks, ("to the server", "to the agents"), first_x=first, show=texts)
    legend = '<span class="swatch a"></span>to the server &nbsp; <span class="swatch b"></span>to the agents'
    return _card("Bytes per round", chart, legend)


def _time_card(records: Sequence[RoundRecord]) -> str:
    """A round's time: the slowest answering device's computing, and the rest (wire, server, waiting)."""
    stacks, texts = [], []
    for record in records:
        compute = max((s.seconds for s in record.shares.values() if s.outcome == "answered"), default=0.0)
        compute = min(compute, record.seconds)
        stacks.append((compute, record.seconds - compute))
        texts.append((f"{compute:.3g} s", f"{record.seconds - compute:.3g} s"))
    first = records[0].round if records else 1
    chart = bar_chart(stacks, ("slowest device", "wire, server, waiting"), first_x=first, show=texts)
    legend = '<span class="swatch a"></span>slowest device &nbsp; <span class="swatch b"></span>wire, server, waiting'
    return _card("Seconds per round", chart, legend)


def _agent_table(records: Sequence[RoundRecord]) -> str:
    shares: dict[str, list[Share]] = {}
    for record in records:
        for name, share in record.shares.items():
            shares.setdefault(name, []).append(share)
    rows = []
    for name in sorted(shares)[:200]:
        good = [share for share in shares[name] if share.outcome == "answered"]
        notes = sorted({share.note for share in shares[name] if share.note})
        seconds = sum(share.seconds for share in good) / len(good) if good else None
        loss = good[-1].loss if good else None
        rows.append(
            (
                escape(name),
                f"{good[-1].rows}" if good else "",
                f"{len(good)}/{len(shares[name])}",
                "" if loss is None else number(loss),
                "" if seconds is None else f"{seconds:.3g}",
                escape("; ".join(notes)),
            )
        )
    return _table(("agent", "rows", "rounds answered", "last loss", "seconds a round", "what went wrong"), rows)


def _job_table(result: RunResult, summary: Mapping[str, Any]) -> str:
    spec = result.job.spec
    optimizer = msgspec.to_builtins(spec.optimizer)
    local = f"{spec.train.local_epochs:g} epochs" if spec.train.local_epochs else f"{spec.train.local_steps} steps"
    size_of_model = sum(tensor.size for tensor in result.tensors.values())
    rows = [
        ("model", f"{escape(spec.model.file)}, {escape(spec.model.factory)}; {size_of_model or 'unopened'} parameters"),
        ("data", f"{escape(spec.data.dataset)}: {len(spec.data.features)} features, target {escape(spec.data.target)}"),
        ("loss", escape(spec.loss)),
        ("optimizer", escape(", ".join(f"{key} {value}" for key, value in optimizer.items() if value))),
        ("a round", f"{local} per agent, batches of {spec.train.batch_rows} rows"),
        ("quorum", f"{spec.train.quorum}, deadline {spec.train.round_deadline_s:g} s"),
        ("seed", str(spec.train.seed)),
    ]
    if summary["mode"] == "spdz":
        rows += _share_rows(summary)
    baseline = summary.get("baseline")
    if baseline:
        rows.append(("plain PyTorch", f"{baseline['epochs']:g} epochs in {baseline['seconds']:.2f} s"))
    return _table(("", ""), rows, header=False)


def _share_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    opened = ", ".join(f"{what} to {to}" for what, to in summary["opened"].items()) or "nothing"
    rounds, nbytes = summary["online_rounds_per_step"], summary["opened_bytes_per_step_per_party"]
    return [
        ("committee", f"{summary['compute_agents']} compute agents; opened: {escape(opened)}"),
        (
            "a step",
            f"{rounds} rounds, {size(nbytes)} from each party, {size(summary['preprocessing_bytes_per_step'])} dealt",
        ),
        ("checks", f"{summary['mac_checks']} MAC checks, {summary['mask_at_edge_retries']} steps run again"),
        ("seconds", f"{summary['online_seconds']:.2f} online, {summary['dealer_seconds']:.2f} dealing"),
    ]


def _card(title: str, body: str, legend: str) -> str:
    note = f'<p class="legend">{legend}</p>' if legend else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{note}{body}</section>'


def _tile(label: str, value: str, note: str, style: str = "") -> str:
    return (
        f'<div class="tile {style}"><p class="label">{escape(label)}</p><p class="value">{escape(value)}</p>'
        f'<p class="note">{escape(note)}</p></div>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, header: bool = True) -> str:
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead>{top}</thead><tbody>{body}</tbody></table></div>'


def _word(metric: str) -> str:
    return _WORDS.get(metric, metric)


def _metric(metric: str, value: float) -> str:
    return f"{100.0 * value:.1f} %" if metric == "test_accuracy" else number(value)


def _difference(metric: str, ours: float, theirs: float) -> str:
    if metric == "test_accuracy":
        return f"{100.0 * (ours - theirs):+.1f} points"
    return f"{100.0 * (ours / theirs - 1.0):+.1f} %" if theirs else ""


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
<footer>Written by sordino. One file, no scripts, nothing fetched.</footer>
</main></body>
</html>
"""

_STYLE: Final = """
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
