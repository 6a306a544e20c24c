"""A job: one YAML file that says what to learn, from which columns, with whom, for how long.

`load_job` validates everything that can be known without the fleet; its errors name file, line and column. Paths are
relative to the job file. The model file is the user's own Python on the user's own machine (`model.py`); nothing of it
but the traced Plan ever travels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sordino_common.config import Marks, error_at, load_config_with_marks
from sordino_common.errors import ConfigError
from sordino_common.messages.base import NAME_PATTERN, Label
from sordino_server.job_aggregate import SecureSpec, check_secure
from sordino_server.job_privacy import DataRangesSpec, PrivacySpec, check_privacy
from sordino_server.job_spdz import SpdzSpec, check_spdz
from sordino_server.job_statistics import MODEL_FILE, StatisticsSpec, check_statistics, columns_of

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Positive = Annotated[float, Meta(gt=0.0)]
NotNegative = Annotated[float, Meta(ge=0.0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Whole = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Seconds = Annotated[float, Meta(gt=0.0, le=7 * 86_400.0)]
Dimension = Annotated[int, Meta(ge=1, le=1 << 20)]
Seed = Annotated[int, Meta(ge=0, lt=1 << 31)]

_MODES: Final = ("federated", "statistics", "spdz")


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ModelSpec(_Strict, frozen=True, kw_only=True):
    """`factory(**args)` in the Python file `file` returns an `nn.Module`."""

    file: Annotated[str, Meta(min_length=1, max_length=4096)]
    factory: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z", max_length=200)] = "make_model"
    args: dict[str, Any] = {}


class DataSpec(_Strict, frozen=True, kw_only=True):
    """Which columns of which dataset feed the model, and how they are scaled: x = (x - offset) / scale.

    `fleet`: mean and standard deviation over the train rows of the whole fleet, from sums that the agents send.
    `shape`: that of one row's x; by default [number of features]. Another shape needs a single tensor-valued column.
    With such a column `offset` and `scale` have one entry, for all its elements. `classes`: how many, if class numbers
    become one-hot floats (mode spdz, task multiclass); made on the device."""

    dataset: Name
    features: Annotated[tuple[Label, ...], Meta(min_length=1, max_length=4095)]
    target: Label
    task: Literal["regression", "binary", "multiclass"]
    shape: Annotated[tuple[Dimension, ...], Meta(min_length=1, max_length=7)] | None = None
    standardize: Literal["fleet", "none", "given"] = "fleet"
    offset: tuple[float, ...] = ()
    scale: tuple[Positive, ...] = ()
    target_standardize: Literal["fleet", "none", "given"] = "none"
    target_offset: float = 0.0
    target_scale: Positive = 1.0
    classes: Annotated[int, Meta(ge=2, le=1000)] | None = None
    ranges: DataRangesSpec | None = None

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.shape or (len(self.features),)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return () if self.classes is None else (self.classes,)


class SgdSpec(_Strict, frozen=True, kw_only=True, tag_field="name", tag="sgd"):
    lr: Positive
    momentum: NotNegative = 0.0
    nesterov: bool = False
    weight_decay: NotNegative = 0.0


class AdamSpec(_Strict, frozen=True, kw_only=True, tag_field="name", tag="adam"):
    lr: Positive
    beta1: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0


class TrainSpec(_Strict, frozen=True, kw_only=True):
    """How long, with whom, and how long a round may take.

    A round asks `agents` ("all", or so many drawn anew each round) and ends when all have answered, or `straggler_s`
    after the quorum has (the late ones are told to stop), or at `round_deadline_s`. `quorum` is a count, or a fraction
    of those who are to be asked; a round that misses it is asked again, `retries` times, from those who are missing.
    `join_s`: how long the start of a run waits for agents beyond the quorum to come online, and a round for newcomers
    to describe themselves and take the Plans.
    `max_steps`: end with the round in which the agents' optimizer steps together pass this number."""

    rounds: Annotated[int, Meta(ge=0, le=1_000_000_000)]  # 0: inference only, with mode spdz
    batch_rows: Annotated[int, Meta(ge=1, le=1 << 20)]
    local_epochs: Annotated[float, Meta(gt=0.0, le=1e4)] | None = None
    local_steps: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    seed: Seed = 0
    agents: Literal["all"] | Whole = "all"
    quorum: Annotated[int, Meta(ge=1)] | Annotated[float, Meta(gt=0.0, le=1.0)] = 0.5
    round_deadline_s: Seconds = 120.0
    straggler_s: Seconds = 30.0
    join_s: Seconds = 10.0
    retries: Annotated[int, Meta(ge=0, le=100)] = 2
    evaluate_every: Annotated[int, Meta(ge=0)] = 1  # 0: only after the last round
    max_steps: Whole | None = None


class EvaluateSpec(_Strict, frozen=True, kw_only=True):
    """Metrics over the agents' held-out rows, from sums. By default those that fit the task."""

    metrics: tuple[Literal["mse", "rmse", "loss", "accuracy"], ...] = ()
    batch_rows: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None


class LimitsSpec(_Strict, frozen=True, kw_only=True):
    """What the server refuses of an agent, by name: an update of a larger L2 norm; weights above a number of rows."""

    update_norm: Positive | None = None
    rows_per_agent: Whole | None = None


class NetworkSpec(_Strict, frozen=True, kw_only=True):
    """The simulator's links, where they differ from the device profile's: each way, per agent."""

    latency_s: NotNegative | None = None
    jitter_s: NotNegative | None = None
    bandwidth_bytes_s: Positive | None = None
    loss: Fraction | None = None
    duplication: Fraction | None = None
    reordering: Fraction | None = None


class SimulatedBudgetSpec(_Strict, frozen=True, kw_only=True):
    """A privacy budget that simulated owners set for their rows: `epsilon` or `rho`, with `delta`. `agents`: only the
    first so many, by name, have one; the others' rows are counted, but nothing is refused."""

    delta: Annotated[float, Meta(gt=0.0, lt=0.5)]
    epsilon: Annotated[float, Meta(gt=0.0, le=1e6)] | None = None
    rho: Annotated[float, Meta(gt=0.0, le=1e6)] | None = None
    agents: Annotated[int, Meta(ge=1, le=100_000)] | None = None

    def __post_init__(self) -> None:
        # A ValueError here becomes a validation error with the entry's file, line and column.
        if (self.epsilon is None) == (self.rho is None):
            raise ValueError("give either epsilon or rho, with delta")


class SimulationSpec(_Strict, frozen=True, kw_only=True):
    """For `sordino-sim`; of this, `sordino train` uses only `data`, `test_fraction` and `seed`, for its baseline."""

    agents: Annotated[int, Meta(ge=1, le=100_000)] = 10
    data: Name | None = None  # a public source (public_data.py)
    seed: Seed | None = None  # of split and partition; by default train.seed
    test_fraction: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.2
    partition: Literal["iid", "dirichlet"] = "iid"
    alpha: Positive = 0.5  # Dirichlet concentration: small means skewed labels
    profile: Label | None = None
    network: NetworkSpec = NetworkSpec()
    faults: str | None = None  # path of a fault schedule
    budget: SimulatedBudgetSpec | None = None
    model: str | None = None  # path of the .npz that the agent spdz.model_from provides; default: the job's own model


# A job of mode statistics names none of these; in the other modes each must be given.
_NO_MODEL: Final = ModelSpec(file=str(MODEL_FILE), factory="make_linear")
_NO_OPTIMIZER: Final = SgdSpec(lr=1.0)
_NO_TRAIN: Final = TrainSpec(rounds=1, batch_rows=64, local_steps=1)


class JobSpec(_Strict, frozen=True, kw_only=True):
    """The whole job file. Field docs: the structs above."""

    job: Name
    mode: str
    security: str | None = None
    model: ModelSpec = _NO_MODEL
    data: DataSpec
    loss: Literal["mse", "bce_with_logits", "cross_entropy"] = "mse"
    optimizer: SgdSpec | AdamSpec = _NO_OPTIMIZER
    train: TrainSpec = _NO_TRAIN
    evaluate: EvaluateSpec = EvaluateSpec()
    limits: LimitsSpec = LimitsSpec()
    simulation: SimulationSpec = SimulationSpec()
    spdz: SpdzSpec | UnsetType = UNSET
    statistics: StatisticsSpec = StatisticsSpec()
    privacy: PrivacySpec | None = None
    secure_aggregation: bool | SecureSpec = False
    # Named in the design, built later. Given, it is refused: see job_privacy.
    validate: Literal["norm"] | None = None

    @property
    def shares(self) -> SpdzSpec:
        """The block `spdz`, or its defaults."""
        return SpdzSpec() if isinstance(self.spdz, UnsetType) else self.spdz

    @property
    def secure(self) -> SecureSpec | None:
        """The block `secure_aggregation`, or its defaults; None without it."""
        if isinstance(self.secure_aggregation, bool):
            return SecureSpec() if self.secure_aggregation else None
        return self.secure_aggregation

    @property
    def needs_world(self) -> bool:
        """Whether the server needs keys, randomness and the roster for the rounds themselves."""
        return self.on_shares or self.secure is not None

    @property
    def on_shares(self) -> bool:
        return self.mode == "spdz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A valid job, where it came from, and where each key stands."""

    spec: JobSpec
    path: Path
    marks: Marks = field(repr=False)
    overridden: frozenset[str] = frozenset()  # keys given by --set: no line of the file is to blame for them

    @property
    def model_file(self) -> Path:
        return (self.path.parent / self.spec.model.file).resolve()

    def gives(self, key: str) -> bool:
        """Whether the file or a `--set` has this key (dotted), or something under it."""
        path = tuple(key.split("."))
        return path in self.marks or any(k == key or k.startswith(key + ".") for k in self.overridden)

    def error(self, key: str, text: str) -> ConfigError:
        """A `ConfigError` at the line and column of `key` (dotted), or at the `--set` that gave it."""
        if any(key == given or key.startswith(given + ".") for given in self.overridden):
            return ConfigError(f"--set {key}: {text}")
        path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        return error_at(str(self.path), self.marks, path, f"{key}: {text}")


def load_job(path: Path, *, overrides: Sequence[str] = ()) -> Job:
    """The job at `path`, `overrides` (`key.path=value`) applied. Raises `ConfigError`."""
    spec, marks = load_config_with_marks(path, JobSpec, overrides=overrides)
    given = frozenset(override.partition("=")[0] for override in overrides)
    job = Job(spec=spec, path=path, marks=marks, overridden=given)
    _check_mode(job)
    if spec.mode == "statistics":
        check_statistics(spec, job.error)
        job = replace(job, spec=_completed(spec))
    _check_data(job)
    _check_train(job)
    check_secure(job.spec, job.error)
    check_privacy(job.spec, job.error)
    if not job.model_file.is_file():
        raise job.error("model.file", f"there is no file {job.model_file}; the path is relative to the job file")
    return job


def job_from_json(text: str, path: Path) -> Job:
    """The job that `job_to_json` wrote, for `--resume`: the run's own copy, not today's file."""
    try:
        spec = msgspec.json.decode(text, type=JobSpec)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: the run was recorded by another version of sordino: {error}") from None
    return Job(spec=spec, path=path, marks={})


def job_to_json(job: Job) -> str:
    return msgspec.json.encode(job.spec).decode()


def metrics_of(spec: JobSpec) -> tuple[str, ...]:
    """The metrics to report, the job's main one first."""
    if spec.evaluate.metrics:
        return spec.evaluate.metrics
    return ("mse",) if spec.data.task == "regression" else ("accuracy", "loss")


def quorum_of(spec: TrainSpec, asked: int) -> int:
    """How many answers a round of `asked` agents needs: the count, or the fraction rounded up; at least one."""
    if isinstance(spec.quorum, int):
        return spec.quorum
    return max(1, math.ceil(spec.quorum * asked - 1e-9))


def _check_mode(job: Job) -> None:
    spec = job.spec
    if spec.mode not in _MODES:
        raise job.error("mode", f"there is no mode {spec.mode!r}; there are: {', '.join(_MODES)}")
    for key in ("model", "loss", "optimizer", "train"):
        if spec.mode != "statistics" and not job.gives(key):
            raise job.error(key, f"is missing; mode {spec.mode} needs it")
        if spec.mode == "statistics" and key != "train" and job.gives(key):
            raise job.error(key, "has no place in mode statistics, which learns a linear model from one sum")
    if spec.mode == "statistics":
        for key in ("data.standardize", "data.target_standardize"):
            if job.gives(key):
                raise job.error(key, "has no place in mode statistics: columns are scaled by data.ranges")
        if spec.train.rounds != 1:
            raise job.error("train.rounds", f"mode statistics has one round, not {spec.train.rounds}")
    elif job.gives("statistics"):
        raise job.error("statistics", "is only used with mode: statistics")
    if spec.on_shares:
        for key in ("secure_aggregation", "privacy"):
            if getattr(spec, key) not in (None, False):
                raise job.error(
                    key, "is not offered on secret shares: nobody sees updates, and the result opens without noise"
                )
        check_spdz(spec, job.error)
        return
    if spec.spdz is not UNSET:
        raise job.error("spdz", "is only used with mode: spdz")
    if spec.mode == "federated" and spec.security not in (None, "plain"):
        raise job.error(
            "security",
            f"{spec.security!r} is not offered by federated averaging, where the server sees each update; "
            "leave it out or say plain",
        )


def _completed(spec: JobSpec) -> JobSpec:
    """A valid statistics job, completed: the linear model, and scaling by the middles and halves of the ranges."""
    columns = columns_of(spec)
    middles = tuple(column.high / 2 + column.low / 2 for column in columns)
    halves = tuple(column.high / 2 - column.low / 2 for column in columns)
    data = msgspec.structs.replace(
        spec.data,
        standardize="given",
        offset=middles[:-1],
        scale=halves[:-1],
        target_standardize="given",
        target_offset=middles[-1],
        target_scale=halves[-1],
    )
    model = msgspec.structs.replace(_NO_MODEL, args={"inputs": len(spec.data.features)})
    return msgspec.structs.replace(spec, data=data, model=model)


# What each task's loss is; on shares, classes are learned from one-hot floats.
_LOSSES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "federated": {"regression": ("mse",), "binary": ("bce_with_logits",), "multiclass": ("cross_entropy",)},
    "statistics": {"regression": ("mse",), "binary": (), "multiclass": ()},
    "spdz": {"regression": ("mse",), "binary": ("bce_with_logits",), "multiclass": ("mse", "bce_with_logits")},
}


def _check_data(job: Job) -> None:
    data, loss = job.spec.data, job.spec.loss
    fits = _LOSSES[job.spec.mode][data.task]
    if loss not in fits:
        raise job.error(
            "loss", f"{loss} does not fit task {data.task} in mode {job.spec.mode}, which takes {' or '.join(fits)}"
        )
    one_hot = job.spec.on_shares and data.task == "multiclass"
    if one_hot and data.classes is None:
        raise job.error("data", "on secret shares task multiclass needs data.classes, the number of classes")
    if data.classes is not None and not one_hot:
        raise job.error("data.classes", "is only used with mode: spdz and task: multiclass")
    if len(set(data.features)) != len(data.features):
        raise job.error("data.features", "a column is named twice")
    if data.target in data.features:
        raise job.error("data.target", f"{data.target} is also a feature: the model would be told the answer")
    if data.shape is not None and len(data.features) != 1 and data.shape != (len(data.features),):
        raise job.error("data.shape", f"shape {list(data.shape)} needs one tensor-valued feature column")
    if data.standardize != "none" and math.prod(data.x_shape) > 4096:
        raise job.error(
            "data.standardize",
            f"{math.prod(data.x_shape)} numbers a row; at most 4096 can be scaled: scale in the model",
        )
    entries = len(data.features)
    for key in ("offset", "scale"):
        given = len(getattr(data, key))
        if data.standardize == "given" and given != entries:
            raise job.error(f"data.{key}", f"standardize: given needs {entries} entries, one per feature; got {given}")
        if data.standardize != "given" and given:
            raise job.error(f"data.{key}", f"is only used with standardize: given, not with {data.standardize}")
    if data.task != "regression" and data.target_standardize != "none":
        raise job.error("data.target_standardize", f"class labels are not scaled; task {data.task} needs none")
    if data.target_standardize != "given" and (data.target_offset, data.target_scale) != (0.0, 1.0):
        raise job.error("data.target_standardize", "target_offset and target_scale are only used with given")
    for metric in job.spec.evaluate.metrics:
        if (metric == "accuracy") == (data.task == "regression") and metric != "loss":
            raise job.error("evaluate.metrics", f"{metric} is no metric of task {data.task}")
        if metric in ("mse", "rmse") and data.task != "regression":
            raise job.error("evaluate.metrics", f"{metric} is no metric of task {data.task}")


def _check_train(job: Job) -> None:
    train = job.spec.train
    if train.rounds == 0:
        if not job.spec.on_shares:
            raise job.error("train.rounds", "at least 1; 0, for inference only, is offered by mode spdz")
    elif (train.local_epochs is None) == (train.local_steps is None):
        raise job.error("train", "give either local_epochs or local_steps")
    if isinstance(train.agents, int) and isinstance(train.quorum, int) and train.quorum > train.agents:
        raise job.error("train.quorum", f"a quorum of {train.quorum} can't be reached by {train.agents} agents")
    if job.spec.optimizer.__class__ is SgdSpec:
        sgd = job.spec.optimizer
        assert isinstance(sgd, SgdSpec)
        if sgd.nesterov and sgd.momentum == 0.0:
            raise job.error("optimizer.nesterov", "needs a momentum above 0")
