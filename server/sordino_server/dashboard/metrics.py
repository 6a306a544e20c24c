"""A `View` for Prometheus (`sordino web`, /metrics). docs/metrics.md has the table of all names.

Labels are bounded: states, outcomes, directions; jobs only while they are trained; datasets of this server's runs. No
agent, no run and no error text is a label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from sordino_server.dashboard.view import STATES, View

_MOST_SERIES: Final = 100
STATUSES: Final = ("running", "comparing", "stopped", "interrupted", "failed", "done")
OUTCOMES: Final = ("answered", "refused", "missing")

Kind = Literal["gauge", "counter", "summary"]
# name -> (kind, help, labels). What is exported, and nothing else.
METRICS: Final[dict[str, tuple[Kind, str, tuple[str, ...]]]] = {
    "sordino_build_info": ("gauge", "1; the software that looks.", ("version",)),
    "sordino_agents": ("gauge", "Agents of the roster, by what is known of them.", ("state",)),
    "sordino_roster_epoch": ("gauge", "Epoch of the signed roster; absent without one.", ()),
    "sordino_roster_expiry_timestamp_seconds": ("gauge", "When the roster expires, in seconds since 1970.", ()),
    "sordino_broker_connected": ("gauge", "1 while sordino web hears the broker; absent without --connect.", ()),
    "sordino_runs": ("gauge", "Runs on record, by status.", ("status",)),
    "sordino_rounds_total": ("counter", "Finished rounds of all runs.", ()),
    "sordino_round_seconds": ("summary", "How long finished rounds took.", ()),
    "sordino_round_answers_total": ("counter", "Agents asked in finished rounds, by what they did.", ("outcome",)),
    "sordino_round_bytes_total": ("counter", "Payload bytes of finished rounds, to the server: up.", ("direction",)),
    "sordino_run_round": ("gauge", "The round that a job is in, while it is trained.", ("job",)),
    "sordino_run_rounds": ("gauge", "How many rounds it will have.", ("job",)),
    "sordino_run_awaited_agents": ("gauge", "Agents that are awaited at this moment.", ("job",)),
    "sordino_run_broker_connected": ("gauge", "1 while the training process has the broker.", ("job",)),
    "sordino_run_silent_seconds": ("gauge", "0, or for how long a training process has not been heard of.", ("job",)),
    "sordino_run_warnings_total": ("counter", "Warnings of the training process since it started.", ("job",)),
    "sordino_run_loss": ("gauge", "The last training loss.", ("job",)),
    "sordino_run_metric": ("gauge", "The last value of an evaluated metric.", ("job", "metric")),
    "sordino_privacy_epsilon_spent": ("gauge", "Epsilon of all runs added up: an upper bound.", ("dataset", "unit")),
    "sordino_privacy_releases_total": ("counter", "Noised releases that have begun.", ("dataset", "unit")),
    "sordino_privacy_uncounted_runs": ("gauge", "Runs that have released something at an unknown price.", ("dataset",)),
}  # fmt: skip

Sample = tuple[str, tuple[str, ...], float]


def exposition(view: View) -> bytes:
    """Prometheus' text format 0.0.4."""
    registry = CollectorRegistry()
    registry.register(_Collector(view))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        found: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for name, labels, value in _samples(self._view):
            found.setdefault(name, []).append((labels, value))
        for name, (kind, text, labels) in METRICS.items():
            if name == "sordino_round_seconds":
                totals = self._view.totals
                yield SummaryMetricFamily(name, text, count_value=totals.rounds, sum_value=totals.seconds)
            elif name in found:
                family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, text, labels=labels)
                for values, value in found[name][:_MOST_SERIES]:
                    family.add_metric(values, value)
                yield family


def _samples(view: View) -> Iterator[Sample]:
    yield "sordino_build_info", (view.version,), 1.0
    for state in STATES:
        yield "sordino_agents", (state,), view.count(state)
    if view.roster_epoch is not None and view.roster_expires_s is not None:
        yield "sordino_roster_epoch", (), view.roster_epoch
        yield "sordino_roster_expiry_timestamp_seconds", (), view.roster_expires_s
    if view.births:
        yield "sordino_broker_connected", (), float(view.births == "connected")
    comparing = sum(run.status == "comparing" for run in view.runs)
    for status in STATUSES:
        many = view.runs_by_status.get(status, 0)
        yield (
            "sordino_runs",
            (status,),
            comparing if status == "comparing" else many - comparing * (status == "running"),
        )
    totals = view.totals
    yield "sordino_rounds_total", (), totals.rounds
    for outcome in OUTCOMES:
        yield "sordino_round_answers_total", (outcome,), totals.answers.get(outcome, 0)
    yield "sordino_round_bytes_total", ("up",), totals.bytes_up
    yield "sordino_round_bytes_total", ("down",), totals.bytes_down
    yield from _runs(view)
    uncounted = {entry.dataset: entry.uncounted for entry in view.datasets}
    for entry in view.datasets:
        if entry.runs:
            yield "sordino_privacy_epsilon_spent", (entry.dataset, entry.unit), entry.epsilon
            yield "sordino_privacy_releases_total", (entry.dataset, entry.unit), entry.releases
    for dataset, many in uncounted.items():
        yield "sordino_privacy_uncounted_runs", (dataset,), many


def _runs(view: View) -> Iterator[Sample]:
    """Of the runs that are trained now; two of one job would be one series, so the newest speaks for both."""
    jobs = {run.job: run for run in reversed(view.runs) if run.active}
    for job, run in jobs.items():
        label = (job,)
        yield "sordino_run_round", label, run.round
        if run.rounds is not None:
            yield "sordino_run_rounds", label, run.rounds
        yield "sordino_run_awaited_agents", label, 0 if run.wait is None else len(run.wait.names)
        yield "sordino_run_broker_connected", label, float(run.connected)
        yield "sordino_run_silent_seconds", label, run.silent_s or 0.0
        yield "sordino_run_warnings_total", label, run.warnings
        if run.loss is not None:
            yield "sordino_run_loss", label, run.loss
        for metric, value in run.metrics.items():
            yield "sordino_run_metric", (job, metric), value
