"""One job at several values of one setting, each value with several seeds: utility against the setting.

Every value is a run of its own. The k-th repetition of each value has the same seed (the job's plus k, for training
and for the split of the rows), so values are compared on the same rows; noise of private training follows from the
seed in the simulator, too. What is wrong with the key or a value is found before anything runs; a run that
fails later is said to have failed and takes no other with it.

Whoever picks a setting by such a sweep on real data has used that data once more per run: the epsilon of one run does
not cover the choice (Papernot and Steinke 2022, "Hyperparameter tuning with Rényi differential privacy", section 1).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sordino_common.errors import ConfigError, SordinoError
from sordino_server.job import Job, load_job

MOST_VALUES: Final = 100
MOST_REPEATS: Final = 1000
_SEED_KEYS: Final = ("train.seed", "simulation.seed")
# What plain PyTorch, which has no privacy, does not depend on: its result is taken from the first value's run.
_PRIVATE_KEYS: Final = tuple(
    f"privacy.{key}" for key in ("epsilon", "delta", "noise_multiplier", "clip_norm", "accountant", "grid_bits")
)
_WORST_FIRST: Final = (1, 4, 5, 3, 2)  # exit codes: a security abort is worse than a refused budget, and so on


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """`key.path` and its values as they were written, each a YAML value."""

    key: str
    values: tuple[str, ...]
    repeat: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run has no result."""

    seed: int
    code: str
    exit_code: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run to do: the job at one value with one seed. `with_baseline`: compare with plain PyTorch as well."""

    value: str
    number: int
    seed: int
    job: Job
    with_baseline: bool


@dataclass(slots=True, kw_only=True)
class Point:
    """All that was found at one value. `summaries`: of the runs that ended well, as `sordino-sim run --json` says."""

    value: str
    summaries: list[Mapping[str, Any]] = field(default_factory=list)
    baselines: list[Mapping[str, float]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def measured(self, metric: str) -> list[float]:
        """The metric in each run that has it."""
        return [float(summary["metrics"][metric]) for summary in self.summaries if metric in summary["metrics"]]

    def baseline(self, metric: str) -> float | None:
        """Plain PyTorch's mean."""
        known = [float(entry[metric]) for entry in self.baselines if metric in entry]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """A sweep's result; a sweep that was interrupted has fewer runs."""

    job: str
    sweep: Sweep
    seeds: tuple[int, ...]
    points: tuple[Point, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that any run has, the job's main one first."""
        names: dict[str, None] = {}
        for point in self.points:
            for summary in point.summaries:
                names.update(dict.fromkeys(summary["metrics"]))
        return tuple(names)

    @property
    def exit_code(self) -> int:
        """0, or that of the worst failure."""
        codes = {failure.exit_code for point in self.points for failure in point.failures}
        return next((code for code in _WORST_FIRST if code in codes), 0)

    def to_json(self) -> dict[str, Any]:
        """`{sweep, job, seeds, metrics, points}`; a point is `{value, runs, failures, mean, spread, baseline}`.

        `spread`: standard deviation over the seeds (n - 1 in the divisor), null for a single run."""
        return {
            "sweep": self.sweep.key,
            "job": self.job,
            "seeds": list(self.seeds),
            "metrics": list(self.metrics),
            "points": [self._point(point) for point in self.points],
        }

    def _point(self, point: Point) -> dict[str, Any]:
        found = {metric: values for metric in self.metrics if (values := point.measured(metric))}
        return {
            "value": point.value,
            "mean": {metric: statistics.fmean(values) for metric, values in found.items()},
            "spread": {metric: spread(values) for metric, values in found.items()},
            "baseline": {m: value for m in self.metrics if (value := point.baseline(m)) is not None} or None,
            "runs": [dict(summary) for summary in point.summaries],
            "failures": [
                {"seed": f.seed, "code": f.code, "exit_code": f.exit_code, "text": f.text} for f in point.failures
            ],
        }


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def read_sweep(text: str, *, repeat: int = 1) -> Sweep:
    """`key.path=v1,v2,...`; commas inside brackets, braces and quotes do not part values. Raises `ConfigError`."""
    key, equals, rest = text.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"--sweep {text}: expected key.path=value,value,..., such as privacy.epsilon=0.5,1,2")
    values = _split(rest, f"--sweep {key}")
    if not all(values):
        raise ConfigError(f"--sweep {key}: a value between commas is empty; write null for no value")
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ConfigError(f"--sweep {key}: {twice[0]} is given twice; more seeds for each value: --repeat")
    if len(values) > MOST_VALUES:
        raise ConfigError(f"--sweep {key}: {len(values)} values, at most {MOST_VALUES}")
    if not 1 <= repeat <= MOST_REPEATS:
        raise ConfigError(f"--repeat {repeat}: expected 1 to {MOST_REPEATS} runs of each value")
    if key in _SEED_KEYS and repeat > 1:
        raise ConfigError(f"--sweep {key}: --repeat counts the seed up itself; sweep the seed or repeat, not both")
    return Sweep(key=key, values=tuple(values), repeat=repeat)


def plan_trials(path: Path, sweep: Sweep, *, overrides: Sequence[str], with_baseline: bool = True) -> list[Trial]:
    """Every run of the sweep, value by value. Raises `ConfigError` if any of the jobs is not valid."""
    trials: list[Trial] = []
    for value in sweep.values:
        changes = [*overrides, f"{sweep.key}={value}"]
        try:
            first = load_job(path, overrides=changes)
        except ConfigError as error:
            raise ConfigError(f"--sweep {sweep.key}, value {value}: {error}") from None
        seed, split = first.spec.train.seed, first.spec.simulation.seed
        for number in range(sweep.repeat):
            again = [f"train.seed={seed + number}", *([] if split is None else [f"simulation.seed={split + number}"])]
            job = first if number == 0 else load_job(path, overrides=[*changes, *again])
            trials.append(Trial(value=value, number=number, seed=seed + number, job=job, with_baseline=with_baseline))
    return trials


def run_trials(
    sweep: Sweep,
    trials: Sequence[Trial],
    perform: Callable[[Trial], Mapping[str, Any]],
    *,
    told: Callable[[Trial, Mapping[str, Any] | Failure], None] = lambda trial, outcome: None,
) -> tuple[Swept, KeyboardInterrupt | None]:
    """Do all runs in order; `perform` gives a summary. A run that raises a `SordinoError` has failed, the next one
    goes on. Ctrl-C ends the sweep: what is there by then comes back, with the interruption."""
    points = {value: Point(value=value) for value in sweep.values}
    plain: dict[int, Mapping[str, float]] = {}
    stopped: KeyboardInterrupt | None = None
    for trial in trials:
        point = points[trial.value]
        shared = sweep.key in _PRIVATE_KEYS
        wanted = trial.with_baseline and not (shared and trial.number in plain)
        try:
            summary = perform(
                Trial(value=trial.value, number=trial.number, seed=trial.seed, job=trial.job, with_baseline=wanted)
            )
        except SordinoError as error:
            failure = Failure(
                seed=trial.seed, code=error.code, exit_code=error.exit_code, text=" ".join(str(error).split())
            )
            point.failures.append(failure)
            told(trial, failure)
            continue
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
            break
        point.summaries.append(summary)
        theirs = summary.get("baseline")
        if isinstance(theirs, Mapping):
            plain[trial.number] = theirs
            point.baselines.append(theirs)
        elif shared and trial.number in plain:
            point.baselines.append(plain[trial.number])
        told(trial, summary)
    seeds = tuple(dict.fromkeys(trial.seed for trial in trials))
    job = trials[0].job.spec.job if trials else ""
    return Swept(job=job, sweep=sweep, seeds=seeds, points=tuple(points.values())), stopped


def _split(text: str, where: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    if depth or quote:
        raise ConfigError(f"{where}: brackets or quotes in {text} are not closed")
    return [part.strip() for part in parts]
