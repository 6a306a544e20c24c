"""A sweep as people see it: progress while it runs, a table, and a page with utility against the swept setting."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, TextIO

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError
from sordino_server.charts import Spot, value_chart
from sordino_server.page import card, count, metric_text, page, table, tile, word
from sordino_server.progress import result_line
from sordino_server.rounds.events import Event, Note, RoundDone, RunStarted
from sordino_sim.sweep import Failure, Point, Swept, Trial, spread


class SweepView:
    """Progress of a sweep on stderr: two bars on a terminal (runs, rounds of this run), a line per run elsewhere.

    Use as a context manager; `observer(trial)` is for the run, `told` for what came of it."""

    def __init__(self, key: str, runs: int, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._key = key
        self._runs = runs
        self._done = 0
        self._quiet = quiet
        self._bar: Progress | None = None
        self._all = self._one = TaskID(0)

    def __enter__(self) -> SweepView:
        if self._console.is_terminal and not self._quiet:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=30))
            figures = (TextColumn("{task.completed:.0f}/{task.total:.0f}"), TextColumn("[cyan]{task.fields[result]}"))
            self._bar = Progress(*columns, *figures, TimeElapsedColumn(), console=self._console, transient=True)
            self._all = self._bar.add_task(f"sweep {self._key}", total=self._runs, result="")
            self._one = self._bar.add_task("round", total=1, result="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def observer(self, trial: Trial) -> _Watch:
        """For the run of `trial`."""
        about = f"{self._key}={trial.value}, seed {trial.seed}"
        if self._bar is not None:
            self._bar.update(self._all, result=about)
        return _Watch(self._print, self._bar, self._one, about)

    def told(self, trial: Trial, outcome: Mapping[str, Any] | Failure) -> None:
        """One run is over."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._all, completed=self._done)
        failed = isinstance(outcome, Failure)
        text = f"failed: {outcome.text}" if isinstance(outcome, Failure) else result_line(outcome)
        start = f"[{self._done}/{self._runs}] {self._key}={trial.value}, seed {trial.seed}: "
        self._print(start + text, "red" if failed else "")

    def _print(self, text: str, style: str) -> None:
        if not self._quiet:
            self._console.print(Text(text, style=style))


class _Watch:
    """The observer of one run: its rounds move the second bar, its warnings are lines."""

    def __init__(self, say: Any, bar: Progress | None, task: TaskID, about: str) -> None:
        self._say, self._bar, self._task, self._about = say, bar, task, about

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note) and event.level == "warning":
            self._say(f"warning: {self._about}: {event.text}", "yellow")
        elif self._bar is not None and isinstance(event, RunStarted):
            self._bar.update(self._task, total=event.rounds, completed=event.first_round - 1, result="")
        elif self._bar is not None and isinstance(event, RoundDone):
            figures = "  ".join(f"{word(k)} {metric_text(k, v)}" for k, v in event.record.metrics.items())
            self._bar.update(self._task, completed=event.record.round, result=figures)


def sweep_table(swept: Swept) -> Table:
    """A row per value: every metric as mean ± standard deviation over the seeds, plain PyTorch's, what failed."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    made.add_column(swept.sweep.key)
    for metric in swept.metrics:
        made.add_column(word(metric), justify="right")
    main = next(iter(swept.metrics), None)
    plain = main is not None and any(point.baselines for point in swept.points)
    if plain:
        made.add_column("plain PyTorch", justify="right")
    noise = any(_privacy(point) for point in swept.points)
    if noise:
        made.add_column("epsilon", justify="right")
        made.add_column("noise multiplier", justify="right")
    made.add_column("runs", justify="right")
    bad = any(point.failures for point in swept.points)
    if bad:
        made.add_column("failed", overflow="fold")
    for point in swept.points:
        row = [point.value, *(_cell(point, metric) for metric in swept.metrics)]
        if plain and main is not None:
            theirs = point.baseline(main)
            row.append("" if theirs is None else metric_text(main, theirs))
        if noise:
            row += _noise(point)
        row.append(f"{len(point.summaries)}")
        if bad:
            row.append(_failed(point))
        made.add_row(*(Text(cell) for cell in row))
    return made


def write_sweep(swept: Swept, folder: Path) -> None:
    """`sweep.html` and `sweep.json` in `folder`. Raises `ConfigError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        encoded = msgspec.json.format(msgspec.json.encode(swept.to_json()), indent=2) + b"\n"
        write_atomically(folder / "sweep.json", encoded)
        write_atomically(folder / "sweep.html", sweep_html(swept).encode())
    except OSError as error:
        raise ConfigError(f"{folder}: the report can't be written: {error.strerror}") from None


def sweep_html(swept: Swept) -> str:
    """The page: the best value, a plot for every metric, all figures as a table."""
    key, runs = swept.sweep.key, sum(len(point.summaries) for point in swept.points)
    failed = sum(len(point.failures) for point in swept.points)
    seeds = f"seed {swept.seeds[0]}" if len(swept.seeds) == 1 else f"seeds {swept.seeds[0]} to {swept.seeds[-1]}"
    tiles = [tile("values", str(len(swept.points)), f"of {key}"), tile("runs", str(runs), seeds)]
    if failed:
        tiles.append(tile("failed", str(failed), "see the table"))
    about = [_privacy(point) for point in swept.points]
    first = next((entry for entry in about if entry), None)
    against = f" · {escape(str(first['unit']))}-level differential privacy" if first else ""
    head = (
        f'<header><p class="brand">sordino</p><h1>{escape(swept.job)}</h1>'
        f'<p class="sub">sweep of {escape(key)}{against}</p></header><div class="tiles">{"".join(tiles)}</div>'
    )
    sections = [head]
    for metric in swept.metrics:
        points = [point for point in swept.points if point.measured(metric)]
        spots = [_spot(point, metric) for point in points]
        chart = value_chart(spots, [point.baseline(metric) for point in points], x_label=key, name=word(metric))
        sections.append(card(f"{word(metric)} against {key}", chart, _legend(swept, points)))
    if not swept.metrics:
        sections.append(card("Nothing to draw", '<p class="empty">no run has ended with a metric</p>', ""))
    sections.append(card("All figures", _figures(swept), "mean ± standard deviation over the seeds"))
    return page(f"{swept.job}, {key}: Sordino", sections)


def _legend(swept: Swept, points: list[Point]) -> str:
    spread_of = "mean ± standard deviation over the seeds, faint: each seed" if len(swept.seeds) > 1 else "one seed"
    ours = f'<span class="key a"></span>the fleet ({spread_of})'
    if not any(point.baselines for point in points):
        return ours
    return f'{ours} &nbsp; <span class="key b"></span>plain PyTorch, rows pooled, not private'


def _figures(swept: Swept) -> str:
    head = [swept.sweep.key, *(word(metric) for metric in swept.metrics)]
    head += [f"plain PyTorch, {word(metric)}" for metric in swept.metrics]
    head += ["epsilon", "noise multiplier", "runs", "failed"]
    rows = []
    for point in swept.points:
        row = [point.value, *(_cell(point, metric) for metric in swept.metrics)]
        plain = [(metric, point.baseline(metric)) for metric in swept.metrics]
        row += ["" if value is None else metric_text(metric, value) for metric, value in plain]
        rows.append([escape(cell) for cell in (*row, *_noise(point), str(len(point.summaries)), _failed(point))])
    return table(head, rows)


def _spot(point: Point, metric: str) -> Spot:
    values = point.measured(metric)
    return Spot(label=point.value, mean=statistics.fmean(values), spread=spread(values), seeds=values)


def _cell(point: Point, metric: str) -> str:
    values = point.measured(metric)
    if not values:
        return ""
    text, wide = metric_text(metric, statistics.fmean(values)), spread(values)
    if wide is None:
        return text
    return f"{text} ± {100.0 * wide:.1f}" if metric == "test_accuracy" else f"{text} ± {wide:.2g}"


def _privacy(point: Point) -> Mapping[str, Any] | None:
    found = point.summaries[0].get("privacy") if point.summaries else None
    return found if isinstance(found, Mapping) else None


def _noise(point: Point) -> list[str]:
    found = _privacy(point)
    return ["", ""] if found is None else [f"{found['epsilon']:.4g}", f"{found['noise_multiplier']:.4g}"]


def _failed(point: Point) -> str:
    texts = list(dict.fromkeys(failure.text for failure in point.failures))
    return "" if not texts else f"{count(len(point.failures), 'run')}: " + "; ".join(texts)
