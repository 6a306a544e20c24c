"""Tasks: what the daemon asks of whoever computes (a worker process, or this process in the simulator).

All are frozen values without NumPy, so that they pass through a pipe, in a registry of their own: no peer can send one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, TypeVar

import msgspec

from sordino_agent.aggregate.tasks import (
    ShareFacts,
    ShareTask,
    SumFacts,
    SumGradientTask,
    SumMetricsTask,
    SumStatisticsTask,
    SumUpdateTask,
)
from sordino_agent.errors import DatasetError
from sordino_agent.spdz.tasks import SpdzEndTask, SpdzFacts, SpdzOpenFacts, SpdzOpenTask, SpdzTask
from sordino_common.errors import CodecError, LimitExceeded, LocalError, SordinoError
from sordino_common.messages import (
    Array,
    DatasetInfo,
    Evaluate,
    Moments,
    MomentsResult,
    TensorLoad,
    Train,
)
from sordino_common.privacy.mechanism import Mechanism


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: ClassVar[str]


# --- what is asked -----------------------------------------------------------------------------------------------


class DescribeTask(_Value, frozen=True, kw_only=True):
    """Read every dataset once and say what it is."""

    kind = "describe"


class PlanTask(_Value, frozen=True, kw_only=True):
    """Validate a Plan and compute what it costs."""

    kind = "plan"
    plan: bytes


class MomentsTask(_Value, frozen=True, kw_only=True):
    """Sums and sums of squares of columns, over at least `min_rows` rows."""

    kind = "moments"
    command: Moments
    min_rows: int


class TrainTask(_Value, frozen=True, kw_only=True):
    """Local training: `agent` is the name that enters the seed of the row stream. `apply`: the second Plan of private
    training."""

    kind = "train"
    command: Train
    plan: bytes
    agent: str
    min_rows: int
    apply: bytes | None = None


class EvaluateTask(_Value, frozen=True, kw_only=True):
    """Sums of a Plan's row outputs, over at least `min_rows` rows."""

    kind = "evaluate"
    command: Evaluate
    plan: bytes
    min_rows: int


class RunTask(_Value, frozen=True, kw_only=True):
    """A Plan on tensors that the server put, that earlier Plans made, or that were loaded."""

    kind = "tensors"
    plan: bytes
    inputs: tuple[Array, ...]


class LoadTask(_Value, frozen=True, kw_only=True):
    """Columns of a dataset, to be kept on the device. Gives `RunFacts` with one output."""

    kind = "load"
    command: TensorLoad
    min_rows: int


# --- what comes back ---------------------------------------------------------------------------------------------


class DatasetProblem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dataset that can't be read, and why: for the device's owner only."""

    dataset: str
    detail: str


class DatasetList(_Value, frozen=True, kw_only=True):
    """The readable datasets, and what is wrong with the others."""

    kind = "dataset-list"
    datasets: tuple[DatasetInfo, ...]
    problems: tuple[DatasetProblem, ...] = ()


class PlanFacts(_Value, frozen=True, kw_only=True):
    """A valid Plan's SHA-256, peak memory in bytes, and floating-point operations per run."""

    kind = "plan-facts"
    plan_id: bytes
    peak_bytes: int
    flops: int


class MomentsFacts(_Value, frozen=True, kw_only=True):
    kind = "moments-facts"
    result: MomentsResult


class TrainFacts(_Value, frozen=True, kw_only=True):
    """`update[k]` = parameters after minus before; `loss_sum` over `steps` steps; `rows` train rows were there.
    `mechanism`: what telling it costs; None: it has no noise."""

    kind = "train-facts"
    rows: int
    steps: int
    update: tuple[Array, ...]
    loss_sum: float
    mechanism: Mechanism | None = None


class EvaluateFacts(_Value, frozen=True, kw_only=True):
    """For every row output of the Plan: name and float64 sum over `rows` rows."""

    kind = "evaluate-facts"
    rows: int
    names: tuple[str, ...]
    sums: tuple[float, ...]


class RunFacts(_Value, frozen=True, kw_only=True):
    kind = "run-facts"
    outputs: tuple[Array, ...]


class Done(_Value, frozen=True, kw_only=True):
    """A task's result and the seconds it took on this device (in the simulator: the modelled device's)."""

    kind = "done"
    result: (
        DatasetList
        | PlanFacts
        | MomentsFacts
        | TrainFacts
        | EvaluateFacts
        | RunFacts
        | SpdzOpenFacts
        | SpdzFacts
        | SumFacts
        | ShareFacts
    )
    seconds: float


class Failure(_Value, frozen=True, kw_only=True):
    """A task that has no result. `reason` may be told to the server; `detail` is for this device's log only. `began`:
    false if it is known that nothing was computed, so that the failure tells nothing of a sample or a row."""

    kind = "failure"
    began: bool = True
    code: Annotated[str, msgspec.Meta(max_length=80)]
    reason: Annotated[str, msgspec.Meta(max_length=4000)]
    detail: Annotated[str, msgspec.Meta(max_length=4000)] = ""


def failure_of(error: Exception, task_kind: str, *, began: bool = True) -> Failure:
    """What an error says to the server and to the log. An error that nobody raised on purpose is named by its type
    only: its text may quote data."""
    detail = ""
    if isinstance(error, DatasetError):
        code, reason, detail = error.code, error.public, str(error)[:4000]
    elif isinstance(error, SordinoError):
        code, reason = error.code, str(error)[:4000]
    elif isinstance(error, MemoryError):
        code, reason = LimitExceeded.code, f"{task_kind}: out of memory (limits.memory_bytes on the device)"
    else:
        code = LocalError.code
        reason = f"{task_kind}: a bug in the agent ({type(error).__name__}); its log has the trace"
    return Failure(code=code, reason=reason, detail=detail, began=began)


SpdzWork = SpdzOpenTask | SpdzTask | SpdzEndTask
SumWork = SumUpdateTask | SumGradientTask | SumMetricsTask | SumStatisticsTask | ShareTask
Task = DescribeTask | PlanTask | MomentsTask | TrainTask | EvaluateTask | RunTask | LoadTask | SpdzWork | SumWork
SumResults = SumFacts | ShareFacts
Facts = (
    DatasetList
    | PlanFacts
    | MomentsFacts
    | TrainFacts
    | EvaluateFacts
    | RunFacts
    | SpdzOpenFacts
    | SpdzFacts
    | SumResults
)
Outcome = Done | Failure


class TaskCost(msgspec.Struct, frozen=True, kw_only=True):
    """How much work a task is, known before it runs: a Plan of `nodes` nodes and `flops` operations, `runs` times."""

    kind: str
    nodes: int = 0
    flops: int = 0
    runs: int = 0


# --- through the pipe --------------------------------------------------------------------------------------------

_TASKS: Final[dict[str, type[Task]]] = {
    cls.kind: cls
    for cls in (
        *(DescribeTask, PlanTask, MomentsTask, TrainTask, EvaluateTask, RunTask, LoadTask),
        *(SpdzOpenTask, SpdzTask, SpdzEndTask),
        *(SumUpdateTask, SumGradientTask, SumMetricsTask, SumStatisticsTask, ShareTask),
    )
}
_FACTS: Final[dict[str, type[Facts]]] = {
    cls.kind: cls
    for cls in (
        *(DatasetList, PlanFacts, MomentsFacts, TrainFacts, EvaluateFacts, RunFacts),
        *(SpdzOpenFacts, SpdzFacts),
        *(SumFacts, ShareFacts),
    )
}
# Our own process is at the other end; the bounds that matter were checked where a peer's bytes came in.
_SEPARATOR: Final = b"\n"
Frame = bytes | bytearray | memoryview
_KINDS: Final = {kind: kind.encode() + _SEPARATOR for kind in (*_TASKS, *_FACTS, Failure.kind)}


def encode_task(task: Task) -> bytearray:
    frame = bytearray(_KINDS[task.kind])
    _ENCODER.encode_into(task, frame, len(frame))  # behind it: an array in a frame is copied once
    return frame


def decode_task(data: Frame) -> Task:
    """Raises `CodecError`."""
    return _unpack(data, _TASK_DECODERS, "task")


def encode_outcome(outcome: Outcome) -> bytearray:
    kind: str = outcome.kind
    value: object = outcome
    if isinstance(outcome, Done):
        kind, value = outcome.result.kind, (outcome.seconds, outcome.result)
    frame = bytearray(_KINDS[kind])
    _ENCODER.encode_into(value, frame, len(frame))
    return frame


def decode_outcome(data: Frame) -> Outcome:
    """Raises `CodecError`."""
    outcome = _unpack(data, _OUTCOME_DECODERS, "outcome")
    if isinstance(outcome, Failure):
        return outcome
    seconds, facts = outcome
    return Done(result=facts, seconds=seconds)


def _pack_array(value: object) -> tuple[str, tuple[int, ...], bytes]:
    if isinstance(value, Array):
        return value.dtype, value.shape, value.data
    raise LocalError(f"pipe: {type(value).__name__} has no place there")


# MessagePack by msgspec, typed: a round of a session crosses the pipe twice, and this takes a fiftieth of the time of
# our CBOR.
_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_pack_array)


def _unpack_array(expected: type, value: object) -> object:
    if expected is Array and isinstance(value, list) and len(value) == 3:
        dtype, shape, data = value
        return Array(dtype, tuple(shape), data)
    raise TypeError(f"Expected `{expected.__name__}`")


T = TypeVar("T")


def _unpack(data: Frame, decoders: Mapping[bytes, msgspec.msgpack.Decoder[T]], what: str) -> T:
    kind, found, _ = bytes(data[:64]).partition(_SEPARATOR)
    if not found:
        raise CodecError("pipe: expected a kind and a value")
    decoder = decoders.get(kind)
    if decoder is None:
        raise CodecError(f"pipe: unknown {what} {kind.decode('ascii', 'replace')!r}")
    try:
        return decoder.decode(memoryview(data)[len(kind) + 1 :])
    except (msgspec.DecodeError, LocalError) as error:
        raise CodecError(f"pipe: {error}") from None


_TASK_DECODERS: Final = {
    kind.encode(): msgspec.msgpack.Decoder(cls, dec_hook=_unpack_array) for kind, cls in _TASKS.items()
}
_OUTCOME_DECODERS: Final[dict[bytes, msgspec.msgpack.Decoder[Failure | tuple[float, Facts]]]] = {
    Failure.kind.encode(): msgspec.msgpack.Decoder(Failure),
    **{
        kind.encode(): msgspec.msgpack.Decoder(tuple[float, cls], dec_hook=_unpack_array)  # type: ignore[valid-type]
        for kind, cls in _FACTS.items()
    },
}
