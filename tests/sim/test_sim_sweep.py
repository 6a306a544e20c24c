"""Sweeps: what is refused, what is run, what a failure costs, what is shown."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from helpers_sim import EXAMPLES, QUICK, write_faults
from sordino_common.errors import ConfigError, FleetUnavailable, PolicyRefusal
from sordino_server.charts import Spot, value_chart
from sordino_server.cli import run_cli
from sordino_sim.cli import app
from sordino_sim.sweep import Failure, Sweep, Swept, Trial, plan_trials, read_sweep, run_trials, spread
from sordino_sim.sweep_view import SweepView, sweep_html, sweep_table

JOB = EXAMPLES / "boston-fedavg.yaml"
TINY = ("train.rounds=2", "model.args.hidden=[4]", "simulation.agents=3")
SETTINGS = [part for item in (*QUICK, *TINY) for part in ("--set", item)]


def sim(*arguments: str) -> int:
    return run_cli(app, list(arguments), program="sordino-sim")


# --- what is asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.lr=0.1,0.2", ("0.1", "0.2")),
        ("model.args.hidden=[8],[8, 4],[]", ("[8]", "[8, 4]", "[]")),
        ("model.args={a: 1, b: 2},null", ("{a: 1, b: 2}", "null")),
        ("a.b='x,y',\"z,\"", ("'x,y'", '"z,"')),
        ("train.rounds=3", ("3",)),
    ],
)
def test_values_are_parted_at_outer_commas(text: str, values: tuple[str, ...]) -> None:
    assert read_sweep(text).values == values


@pytest.mark.parametrize(
    ("text", "repeat", "words"),
    [
        ("optimizer.lr", 1, "expected key.path=value,value"),
        ("=1,2", 1, "expected key.path=value,value"),
        ("a..b=1", 1, "expected key.path=value,value"),
        ("optimizer.lr=", 1, "a value between commas is empty"),
        ("optimizer.lr=0.1,,0.2", 1, "a value between commas is empty; write null"),
        ("optimizer.lr=0.1,0.1", 1, "0.1 is given twice; more seeds for each value: --repeat"),
        ("model.args.hidden=[8,[4]", 1, "are not closed"),
        ("a=" + ",".join(map(str, range(101))), 1, "101 values, at most 100"),
        ("optimizer.lr=0.1", 0, "--repeat 0: expected 1 to 1000"),
        ("train.seed=1,2", 3, "sweep the seed or repeat, not both"),
    ],
)
def test_what_is_no_sweep_is_refused(text: str, repeat: int, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_sweep(text, repeat=repeat)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("optimizer.rate=1,2", "--sweep optimizer.rate, value 1: --set optimizer.rate: optimizer.rate: "),
        ("optimizer.lr=0.1,fast", "--sweep optimizer.lr, value fast: --set optimizer.lr: optimizer.lr: "),
        ("train.rounds=1,0", "--sweep train.rounds, value 0: --set train.rounds: at least 1;"),
    ],
)
def test_a_bad_key_or_value_is_found_before_anything_runs(sweep: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan_trials(JOB, read_sweep(sweep), overrides=QUICK)


def test_every_value_runs_with_the_same_seeds() -> None:
    trials = plan_trials(JOB, read_sweep("optimizer.lr=0.1,0.2", repeat=2), overrides=["simulation.seed=40"])
    assert [(t.value, t.seed) for t in trials] == [("0.1", 1), ("0.1", 2), ("0.2", 1), ("0.2", 2)]
    assert [t.job.spec.simulation.seed for t in trials] == [40, 41, 40, 41]
    assert [t.job.spec.train.seed for t in trials] == [1, 2, 1, 2]
    alone = plan_trials(JOB, read_sweep("optimizer.lr=0.1", repeat=2), overrides=())
    assert [t.job.spec.simulation.seed for t in alone] == [None, None], "the split follows train.seed"


# --- what is run ---------------------------------------------------------------------------------------------------


def summary(mse: float, *, plain: float | None = 10.0, epsilon: float | None = None) -> dict[str, Any]:
    noise = {"unit": "record", "epsilon": epsilon, "noise_multiplier": 31.5}
    return {
        "metrics": {"test_mse": mse},
        "baseline": None if plain is None else {"test_mse": plain, "seconds": 0.1},
        "privacy": None if epsilon is None else noise,
        "seconds": 0.5,
    }


def trials_of(sweep: Sweep) -> list[Trial]:
    return plan_trials(JOB, sweep, overrides=QUICK)


def made(key: str = "optimizer.lr=0.1,0.2,0.4", *, repeat: int = 2, epsilon: float | None = None) -> Swept:
    sweep = read_sweep(key, repeat=repeat)
    value = {trial.value: 10.0 * (k + 1) for k, trial in enumerate(trials_of(sweep))}
    swept, _ = run_trials(sweep, trials_of(sweep), lambda t: summary(value[t.value] + t.number, epsilon=epsilon))
    return swept


def test_means_and_spread_over_seeds() -> None:
    swept = made()
    (first, *_) = swept.to_json()["points"]
    assert first["mean"] == {"test_mse": 20.5} and first["spread"]["test_mse"] == pytest.approx(0.5**0.5)
    assert first["baseline"] == {"test_mse": 10.0} and len(first["runs"]) == 2
    assert spread([3.0]) is None
    json.dumps(swept.to_json())


def test_a_run_that_fails_takes_no_other_with_it() -> None:
    sweep = read_sweep("optimizer.lr=0.1,0.2,0.4")

    def perform(trial: Trial) -> Mapping[str, Any]:
        if trial.value == "0.1":
            raise FleetUnavailable("quorum missed; missing: agent-01\nand more")
        if trial.value == "0.2":
            raise PolicyRefusal("not allowed")
        return summary(7.0)

    told: list[object] = []
    swept, stopped = run_trials(sweep, trials_of(sweep), perform, told=lambda _, outcome: told.append(outcome))
    assert stopped is None and swept.exit_code == 4, "a security abort is the worst of them"
    assert [len(point.summaries) for point in swept.points] == [0, 0, 1]
    assert swept.points[0].failures[0].text == "quorum missed; missing: agent-01 and more"
    assert [isinstance(outcome, Failure) for outcome in told] == [True, True, False]
    assert swept.points[2].measured("test_mse") == [7.0]


def test_our_own_bugs_are_not_results() -> None:
    sweep = read_sweep("optimizer.lr=0.1,0.2")

    def perform(_: Trial) -> Mapping[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_trials(sweep, trials_of(sweep), perform)


def test_an_interrupted_sweep_keeps_what_it_has() -> None:
    sweep = read_sweep("optimizer.lr=0.1,0.2,0.4")

    def perform(trial: Trial) -> Mapping[str, Any]:
        if trial.value == "0.2":
            raise KeyboardInterrupt
        return summary(7.0)

    swept, stopped = run_trials(sweep, trials_of(sweep), perform)
    assert isinstance(stopped, KeyboardInterrupt)
    assert [len(point.summaries) for point in swept.points] == [1, 0, 0]


def test_plain_pytorch_runs_once_per_seed_where_the_setting_does_not_matter_to_it() -> None:
    asked: list[tuple[str, bool]] = []

    def run(key: str) -> Swept:
        asked.clear()
        sweep = Sweep(key=key, values=("0.1", "0.2"), repeat=2)
        trials = [
            Trial(value=value, number=k, seed=k, job=made_job, with_baseline=True)
            for value in sweep.values
            for k in range(2)
        ]

        def perform(trial: Trial) -> Mapping[str, Any]:
            asked.append((trial.value, trial.with_baseline))
            return summary(5.0, plain=9.0 if trial.with_baseline else None)

        return run_trials(sweep, trials, perform)[0]

    made_job = trials_of(read_sweep("optimizer.lr=0.1"))[0].job
    swept = run("privacy.epsilon")
    assert asked == [("0.1", True), ("0.1", True), ("0.2", False), ("0.2", False)]
    assert [point.baseline("test_mse") for point in swept.points] == [9.0, 9.0]
    run("privacy.sampling_rate")
    assert all(wanted for _, wanted in asked)


# --- what is shown -------------------------------------------------------------------------------------------------

VOID = {"meta", "line", "circle", "path"}


class WellFormed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("key", ["optimizer.lr=0.5", "optimizer.lr=0.5,1,2,4,8", "model.args.hidden=[4],[8],[8, 8]"])
def test_the_page_is_well_formed_and_fetches_nothing(key: str, repeat: int) -> None:
    text = sweep_html(made(key, repeat=repeat, epsilon=0.5))
    parser = WellFormed()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and not parser.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?://|@import|url\(|NaN|nan<", text)
    assert "plain PyTorch" in text and "record-level differential privacy" in text
    assert text.count('class="mark a"') == len(read_sweep(key).values)
    assert text.count('class="seed"') == (0 if repeat == 1 else repeat * len(read_sweep(key).values))


def test_failures_stand_in_table_and_page() -> None:
    sweep = read_sweep("optimizer.lr=0.1,0.2")

    def perform(trial: Trial) -> Mapping[str, Any]:
        raise FleetUnavailable(f"<{trial.value}> is missing")

    swept, _ = run_trials(sweep, trials_of(sweep), perform)
    assert swept.exit_code == 3
    assert "&lt;0.1&gt; is missing" in sweep_html(swept) and "no run has ended with a metric" in sweep_html(swept)
    assert [column.header for column in sweep_table(swept).columns] == ["optimizer.lr", "runs", "failed"]


def test_the_axis_is_to_scale_for_numbers_and_logarithmic_over_a_factor_of_eight() -> None:
    def places(*labels: str) -> list[float]:
        spots = [Spot(label=label, mean=1.0 + k, spread=None, seeds=(1.0 + k,)) for k, label in enumerate(labels)]
        drawn = value_chart(spots, [None] * len(spots), x_label="x", name="y")
        return [float(x) for x in re.findall(r'class="mark a" cx="([0-9.]+)"', drawn)]

    a, b, c = places("0.5", "2", "8")
    assert b - a == pytest.approx(c - b, abs=0.3), "equal factors are equal distances"
    a, b, c = places("1", "2", "4")
    assert 2 * (b - a) == pytest.approx(c - b, abs=0.3)
    a, b, c = places("relu", "tanh", "1")
    assert b - a == pytest.approx(c - b, abs=0.3)
    assert value_chart([], [], x_label="x", name="y").startswith("<p")


def test_progress_elsewhere_than_on_a_terminal_is_a_line_per_run() -> None:
    stream = io.StringIO()
    sweep = read_sweep("optimizer.lr=0.1,0.2")
    trials = trials_of(sweep)
    with SweepView(sweep.key, len(trials), stream) as view:
        view.told(trials[0], summary(5.0))
        view.told(trials[1], Failure(seed=1, code="x", exit_code=3, text="gone"))
    assert stream.getvalue().splitlines() == [
        "[1/2] optimizer.lr=0.1, seed 1: test_mse 5.000 (plain PyTorch 10.00), 0.5 s",
        "[2/2] optimizer.lr=0.2, seed 1: failed: gone",
    ]


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_sweep_prints_json_and_writes_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sweep", "optimizer.lr=0.02,0.1", "--repeat", "2", "--report", str(tmp_path / "out"), "--json"]
    assert sim("run", str(JOB), *SETTINGS, *arguments, "--store", str(tmp_path / "runs")) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["seeds"] == [1, 2] and [point["value"] for point in found["points"]] == ["0.02", "0.1"]
    for point in found["points"]:
        assert {run["seed"] for run in point["runs"]} == {1, 2} and point["baseline"]["test_mse"] > 0.0
    assert "[4/4] optimizer.lr=0.1, seed 2: test_mse" in said.err
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == found
    assert "test MSE against optimizer.lr" in (tmp_path / "out" / "sweep.html").read_text()
    assert len(list((tmp_path / "runs").iterdir())) == 4


def test_a_sweep_is_a_table_for_people_and_ends_with_the_worst_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = write_faults(tmp_path, "round: 2, after_s: 0.005, do: die, agents: [agent-00, agent-01]")
    arguments = ["--sweep", "train.quorum=1,3", "--faults", str(faults), "--no-baseline", "--quiet"]
    assert sim("run", str(JOB), *SETTINGS, "--set", "train.retries=0", *arguments) == 3
    said = capsys.readouterr()
    head, first, second = said.out.splitlines()
    assert head.split() == ["train.quorum", "test", "MSE", "runs", "failed"]
    assert first.split()[0] == "1" and first.split()[-1] == "1"
    assert "agent-00" in second and "quorum missed" in second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep", "optimizer.lr=0.1,fast"], "--sweep optimizer.lr, value fast"),
        (["--repeat", "3"], "--repeat needs --sweep"),
        (["--sweep", "optimizer.lr=0.1", "--tamper", "agent=1"], "--tamper and --chaos are for one run"),
    ],
)
def test_what_makes_no_sense_is_exit_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("run", str(JOB), *SETTINGS, *arguments) == 2
    said = capsys.readouterr()
    assert words in said.err and said.out == ""
