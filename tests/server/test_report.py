"""The report: one well-formed file that fetches nothing, whatever is in it. And the progress lines."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sordino_server.baseline import Baseline
from sordino_server.charts import Line, bar_chart, line_chart, log_ticks, ticks
from sordino_server.job import load_job
from sordino_server.progress import ProgressView, line_of, number, size
from sordino_server.report import report_html, write_report
from sordino_server.rounds.events import (
    Answered,
    Note,
    RoundDone,
    RoundRecord,
    RoundStarted,
    RunDone,
    RunStarted,
    Share,
    Waiting,
)
from sordino_server.run import RunResult

EXAMPLES = Path(__file__).parents[2] / "examples"
VOID = {"meta", "br", "line", "circle", "rect", "path"}


class WellFormed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID or (self.get_starttag_text().endswith("/>") is False and tag not in {"meta", "br"}):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def record(number_: int, *, agents: int = 4, bad: int = 1) -> RoundRecord:
    shares = {
        f"agent-{k}": Share(outcome="answered", rows=40, steps=3, loss=0.5, seconds=0.1)
        if k >= bad
        else Share(outcome="missing", note='went <offline> & "gone"')
        for k in range(agents)
    }
    return RoundRecord(
        round=number_,
        loss=10.0 / number_,
        metrics={"test_mse": 100.0 / number_} if number_ % 2 else {},
        shares=shares,
        steps=9,
        attempts=1,
        bytes_up=1000 * number_,
        bytes_down=3000,
        seconds=0.4,
    )


def result(rounds: int = 7, *, agents: int = 4, baseline: bool = True) -> RunResult:
    job = load_job(EXAMPLES / "boston-fedavg.yaml")
    records = tuple(record(k, agents=agents) for k in range(1, rounds + 1))
    curve = tuple({"test_mse": 90.0 / (k + 1)} for k in range(rounds))
    plain = Baseline(metrics=curve[-1], curve=curve, epochs=14.0, seconds=0.5) if baseline else None
    summary = {
        "job": "boston-fedavg", "mode": "federated", "security": "plain", "agents": agents - 1, "compute_agents": None,
        "rounds": rounds, "steps": 63, "metrics": {"test_mse": 14.2857}, "seconds": 3.5, "bytes_up": 28000,
        "baseline": {"test_mse": 12.857, "seconds": 0.5, "epochs": 14.0} if baseline else None,
        "overhead_vs_torch": 7.0 if baseline else None, "bytes_down": 21000, "dropouts": rounds, "privacy": None,
    }  # fmt: skip
    tensors = {"w": np.zeros((3, 4), np.float32)}
    return RunResult(run="r-1", job=job, summary=summary, records=records, baseline=plain, tensors=tensors)


@pytest.mark.parametrize("rounds", [1, 2, 7, 200])
@pytest.mark.parametrize("agents", [1, 4, 90])
@pytest.mark.parametrize("baseline", [True, False])
def test_the_page_is_well_formed_and_fetches_nothing(rounds: int, agents: int, baseline: bool) -> None:
    value = result(rounds, agents=agents, baseline=baseline)
    page = report_html(value, value.summary)
    parser = WellFormed()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not {tag for tag, _ in parser.seen} & {"script", "link", "img", "iframe", "object", "image", "use"}
    for _, attributes in parser.seen:
        assert not attributes.keys() & {"src", "href", "onload", "onclick"}
    assert not re.search(r"https?://|@import|url\(", page)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S).lower().replace("finance", "")
    assert "prefers-color-scheme: dark" in page
    assert "<offline>" not in page
    assert ("plain PyTorch" in page) == baseline


def test_summary_and_page_are_written(tmp_path: Path) -> None:
    write_report(result(), tmp_path / "out", extra={"transport": "memory"})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["transport"] == "memory"
    assert summary["metrics"] == {"test_mse": 14.2857}
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_a_page_without_metrics_or_loss() -> None:
    value = result(2)
    bare = replace(
        value,
        summary={**value.summary, "metrics": {}, "baseline": None, "overhead_vs_torch": None},
        records=tuple(replace(r, loss=None, metrics={}) for r in value.records),
        baseline=None,
    )
    assert "nothing to draw" in report_html(bare, bare.summary)


PRIVACY = {
    "unit": "record", "epsilon": 0.49991, "delta": 1e-5, "accountant": "pld", "noise_multiplier": 38.5,
    "clip_norm": 1.0, "sampling_rate": 0.5, "adversary": "The server & one <helper> may be corrupt.",
    "moments_epsilon": 0.61, "rdp_epsilon": 0.52, "pld_epsilon": 0.49991, "rounds": 30, "target_epsilon": 0.5,
    "releases": 31, "noise_from": "each of 2 helpers and the server", "sigma_squared": 6.4e12,
    "sensitivity_squared": 4.3e9, "not_covered": ["held-out rows", "the choice of settings"], "device": None,
}  # fmt: skip


def private(value: RunResult, privacy: dict[str, object]) -> str:
    bare = replace(
        value,
        job=load_job(EXAMPLES / "boston-dp.yaml"),
        summary={**value.summary, "privacy": privacy, "security": "secure aggregation, 2 helpers"},
        records=tuple(replace(r, loss=None) for r in value.records),
    )
    page = report_html(bare, bare.summary)
    parser = WellFormed()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return page


def test_a_private_run_tells_its_guarantee_and_no_loss() -> None:
    page = private(result(), PRIVACY)
    for words in (
        "Differential privacy", "one row added or removed", "0.4999 at delta 1e-05; asked for: 0.5", "for one record",
        "PLD 0.4999, Rényi (RDP) 0.5200, moments 0.6100", "38.50 times the clip norm 1", "with probability 0.5",
        "The server &amp; one &lt;helper&gt; may be corrupt.", "held-out rows; the choice of settings",
        "not covered by epsilon", ">31<",
    ):  # fmt: skip
        assert words in page, words
    assert "Training loss" not in page


def test_both_units_are_told_with_their_figures() -> None:
    second = {**PRIVACY, "unit": "device", "epsilon": 4.0, "sampling_rate": None, "target_epsilon": None}
    page = private(result(), {**PRIVACY, "device": second})
    assert "one device, with all its rows, added or removed" in page and "4.000 at delta 1e-05<" in page


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 3.3), (0, 0), (-5, 12), (1e-9, 2e-9), (0, 123456)])
def test_ticks_cover_their_range(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-12
    assert marks[-1] >= high - 1e-12
    assert 2 <= len(marks) <= 8


@pytest.mark.parametrize(("low", "high"), [(1, 30), (0.013, 7.5), (1e-6, 1e4), (2, 50)])
def test_log_ticks_cover_their_range(low: float, high: float) -> None:
    marks = log_ticks(low, high)
    assert marks[0] <= low * 1.001
    assert marks[-1] >= high * 0.999
    assert 3 <= len(marks) <= 14


def test_charts_with_little_to_show() -> None:
    assert "nothing" in line_chart([], x_label="round")
    assert "nothing" in bar_chart([], ("a", "b"), first_x=1, show=[])
    flat = line_chart([Line(label="x", style="a", points=[(1.0, 5.0)])], x_label="round")
    assert "nan" not in flat
    assert flat.count("<svg") == 1
    assert "nan" not in bar_chart([(0.0, 0.0)], ("a", "b"), first_x=1, show=[("0", "0")])


# --- progress ------------------------------------------------------------------------------------------------------


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1234, 5_600_000, 7.8e9)] == ["0 B", "999 B", "1.2 kB", "5.6 MB", "7.8 GB"]
    assert [number(v) for v in (0.5, 12.3456, 1234.5)] == ["0.5000", "12.35", "1234"]


def test_lines_of_a_log() -> None:
    stream = io.StringIO()
    with ProgressView(stream) as view:
        view(RunStarted(run="r", job="j", mode="federated", security="plain", rounds=9, first_round=4, members=("a",)))
        view(RoundStarted(round=4, attempt=0, asked=("a", "b")))
        view(RoundStarted(round=4, attempt=1, asked=("b",)))
        view(Answered(purpose="p", name="a", outcome="answered", note="", have=1, asked=2, bytes_up=1, bytes_down=1))
        names = tuple(f"agent-{k}" for k in range(20))
        view(Waiting(purpose="round 4: training", names=names, have=1, quorum=2, waited_s=5.0, left_s=55.0))
        view(Note(text="a is offline"))
        view(Note(text="b lies [bold]", level="warning"))
        view(RoundDone(record=record(4)))
        view(RunDone(summary={"metrics": {"test_mse": 9.0}, "baseline": {"test_mse": 8.0}, "seconds": 1.0}))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("run r: federated (the server sees each agent's update), 9 rounds, going on at round 4")
    assert lines[1] == "round 4: attempt 2, asking b"
    assert "1 here, 2 needed, waiting for agent-0" in lines[2]
    assert "and 12 more (5 s; 55 s left)" in lines[2]
    assert lines[3:5] == ["a is offline", "warning: b lies [bold]"]
    assert lines[5] == "round 4/9: loss 2.500, agents 3/4, up 4.0 kB, down 3.0 kB, 0.40 s"
    assert lines[6] == "done: test_mse 9.000 (plain PyTorch 8.000), 1.0 s"
    assert len(lines) == 7
    assert line_of(RoundStarted(round=1, attempt=0, asked=()), rounds=1) is None
    assert line_of(RunDone(summary={"metrics": {"test_mse": 31.0}, "privacy": PRIVACY}), rounds=1) == (
        "done: epsilon 0.4999 at delta 1e-05 for one record, test_mse 31.00"
    )


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    with ProgressView(stream, quiet=True) as view:
        view(Note(text="x"))
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_live_view(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with ProgressView(stream) as view:
        view(RunStarted(run="r", job="j", mode="federated", security="plain", rounds=9, first_round=1, members=("a",)))
        view(RoundStarted(round=1, attempt=0, asked=("a",)))
        view(Answered(purpose="p", name="a", outcome="answered", note="", have=1, asked=1, bytes_up=1, bytes_down=1))
        view(Waiting(purpose="x", names=("b",), have=0, quorum=1, waited_s=1.0, left_s=1.0))
        view(RoundDone(record=record(1)))
        view(Note(text="remark"))
        view(RunDone(summary={"metrics": {}, "seconds": 1.0}))
    assert "remark" in stream.getvalue()
