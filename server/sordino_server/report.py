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
from sordino_server.page import card, count, metric_text, page, table, tile, word
from sordino_server.progress import number, size
from sordino_server.report_privacy import privacy_card, privacy_tile
from sordino_server.report_statistics import statistics_cards
from sordino_server.rounds.events import RoundRecord, Share
from sordino_server.run import RunResult

_GRID_AGENTS: Final = 60  # more rows than this nobody reads one by one


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
        sections.append(card(word(metric), _metric_chart(result, metric), _metric_legend(result)))
    privacy = summary["privacy"]
    if privacy is not None:
        sections.append(privacy_card(privacy))
    sections += statistics_cards(summary.get("statistics") or {})
    losses = [(float(r.round), r.loss) for r in records if r.loss is not None]
    loss_line = Line(label="training loss", style="a", points=losses)
    loss_note = "mean over the agents' local steps, weighted by rows; in the scaled target's unit"
    if summary["mode"] != "statistics" and (losses or privacy is None):  # under privacy no loss of train rows is told
        sections.append(card("Training loss", line_chart([loss_line], x_label="round"), loss_note))
    sections.append(card("Who took part", *_participation(records)))
    sections.append('<div class="two">' + _bytes_card(records) + _time_card(records) + "</div>")
    sections.append(card("Agents", _agent_table(records), "over all rounds"))
    sections.append(card("Job", _job_table(result, summary), ""))
    title = f"{summary['job']}: Sordino"
    return page(title, sections)


# --- parts ---------------------------------------------------------------------------------------------------------


def _head(result: RunResult, summary: Mapping[str, Any], metric: str | None) -> str:
    tiles = []
    baseline = summary.get("baseline")
    if metric is not None:
        value = summary["metrics"][metric]
        below = ""
        if baseline:
            theirs = baseline[metric]
            below = f"plain PyTorch {metric_text(metric, theirs)} ({_difference(metric, value, theirs)})"
        tiles.append(tile(word(metric), metric_text(metric, value), below, "hero"))
    asked = {name for record in result.records for name in record.shares}
    if summary["privacy"] is not None:
        tiles.append(privacy_tile(summary["privacy"]))
    drops = summary["dropouts"]
    tiles.append(tile("agents", str(summary["agents"]), f"of {len(asked)} asked; {count(drops, 'answer')} missing"))
    tiles.append(tile("rounds", str(summary["rounds"]), f"{summary['steps']:,} local steps".replace(",", " ")))
    traffic = f"↑ {size(summary['bytes_up'])} to the server, ↓ {size(summary['bytes_down'])} to the agents"
    tiles.append(tile("traffic", size(summary["bytes_up"] + summary["bytes_down"]), traffic))
    overhead = summary.get("overhead_vs_torch")
    note = f"{overhead:.1f} times plain PyTorch" if overhead is not None else ""
    tiles.append(tile("time", f"{summary['seconds']:.1f} s", note))
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
    "local-noise": "the server sees each device's update, noised on the device",
    "plain": "baseline: the server sees each agent's update",
    "secure-aggregation": "secure aggregation: the server sees sums over many devices, and no single update",
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
    if result.job.spec.privacy is not None:
        ours += " (exact sums over these rows: not covered by epsilon)"
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
        drawn = line_chart([line], x_label="round", unit=" %", within=(0.0, 100.0))
        return drawn, f"answered, in % of those asked; {len(names)} agents"
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
    return card("Bytes per round", chart, legend)


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
    return card("Seconds per round", chart, legend)


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
    return table(("agent", "rows", "rounds answered", "last loss", "seconds a round", "what went wrong"), rows)


def _job_table(result: RunResult, summary: Mapping[str, Any]) -> str:
    spec = result.job.spec
    optimizer = msgspec.to_builtins(spec.optimizer)
    local = f"{spec.train.local_epochs:g} epochs" if spec.train.local_epochs else f"{spec.train.local_steps} steps"
    size_of_model = sum(tensor.size for tensor in result.tensors.values())
    if summary["mode"] == "statistics":
        rows = [
            (
                "data",
                f"{escape(spec.data.dataset)}: {len(spec.data.features)} features, target {escape(spec.data.target)}",
            ),
            ("one secure sum", f"quorum {spec.train.quorum}, deadline {spec.train.round_deadline_s:g} s"),
            ("seed", str(spec.train.seed)),
        ]
        return table(("", ""), rows, header=False)
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
    return table(("", ""), rows, header=False)


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


def _difference(metric: str, ours: float, theirs: float) -> str:
    if metric == "test_accuracy":
        return f"{100.0 * (ours - theirs):+.1f} points"
    return f"{100.0 * (ours / theirs - 1.0):+.1f} %" if theirs else ""
