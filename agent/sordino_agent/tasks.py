"""Tasks: what the daemon asks of whoever computes (a worker process, or this process in the simulator).

All are frozen values without NumPy, so that they pass through a pipe by the same strict CBOR codec as messages, in a
registry of their own: no peer can send one.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, TypeVar

import msgspec

from sordino_agent.errors import DatasetError
from sordino_agent.spdz.tasks import SpdzEndTask, SpdzFacts, SpdzOpenFacts, SpdzOpenTask, SpdzTask
from sordino_common.errors import CodecError, LimitExceeded, LocalError, SordinoError
from sordino_common.messages import (
    Array,
    DatasetInfo,
    Evaluate,
    Limits,
    Moments,
    MomentsResult,
    Train,
    decode,
    encode,
)
from sordino_common.messages.base import from_plain, to_plain


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
    """Local training: `agent` is the name that enters the seed of the row stream."""

    kind = "train"
    command: Train
    plan: bytes
    agent: str
    min_rows: int


class EvaluateTask(_Value, frozen=True, kw_only=True):
    """Sums of a Plan's row outputs, over at least `min_rows` rows."""

    kind = "evaluate"
    command: Evaluate
    plan: bytes
    min_rows: int


class RunTask(_Value, frozen=True, kw_only=True):
    """A Plan on tensors that the server put or that earlier Plans made. No dataset enters."""

    kind = "tensors"
    plan: bytes
    inputs: tuple[Array, ...]


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
    """`update[k]` = parameters after minus before; `loss_sum` over `steps` steps; `rows` train rows were there."""

    kind = "train-facts"
    rows: int
    steps: int
    update: tuple[Array, ...]
    loss_sum: float


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
    result: DatasetList | PlanFacts | MomentsFacts | TrainFacts | EvaluateFacts | RunFacts | SpdzOpenFacts | SpdzFacts
    seconds: float


class Failure(_Value, frozen=True, kw_only=True):
    """A task that has no result. `reason` may be told to the server; `detail` is for this device's log only."""

    kind = "failure"
    code: Annotated[str, msgspec.Meta(max_length=80)]
    reason: Annotated[str, msgspec.Meta(max_length=4000)]
    detail: Annotated[str, msgspec.Meta(max_length=4000)] = ""


def failure_of(error: Exception, task_kind: str) -> Failure:
    """What an error says to the server and to the log. An error that nobody raised on purpose is named by its type
    only: its text may quote data."""
    if isinstance(error, DatasetError):
        return Failure(code=error.code, reason=error.public, detail=str(error)[:4000])
    if isinstance(error, SordinoError):
        return Failure(code=error.code, reason=str(error)[:4000])
    if isinstance(error, MemoryError):
        return Failure(
            code=LimitExceeded.code, reason=f"{task_kind}: out of memory (limits.memory_bytes on the device)"
        )
    name = type(error).__name__
    return Failure(code=LocalError.code, reason=f"{task_kind}: a bug in the agent ({name}); its log has the trace")


SpdzWork = SpdzOpenTask | SpdzTask | SpdzEndTask
Task = DescribeTask | PlanTask | MomentsTask | TrainTask | EvaluateTask | RunTask | SpdzWork
Facts = DatasetList | PlanFacts | MomentsFacts | TrainFacts | EvaluateFacts | RunFacts | SpdzOpenFacts | SpdzFacts
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
        *(DescribeTask, PlanTask, MomentsTask, TrainTask, EvaluateTask, RunTask),
        *(SpdzOpenTask, SpdzTask, SpdzEndTask),
    )
}
_FACTS: Final[dict[str, type[Facts]]] = {
    cls.kind: cls
    for cls in (
        *(DatasetList, PlanFacts, MomentsFacts, TrainFacts, EvaluateFacts, RunFacts),
        *(SpdzOpenFacts, SpdzFacts),
    )
}
# Our own process is at the other end; the bounds that matter were checked where a peer's bytes came in.
_PIPE_LIMITS: Final = Limits(payload_bytes=1 << 40, depth=12, items=1 << 24, text_bytes=1 << 20)


def encode_task(task: Task) -> bytes:
    return encode([task.kind, to_plain(task)])


def decode_task(data: bytes) -> Task:
    """Raises `CodecError`."""
    kind, fields = _pair(data)
    if kind not in _TASKS:
        raise CodecError(f"pipe: unknown task {kind[:80]!r}")
    return _convert(fields, _TASKS[kind])


def encode_outcome(outcome: Outcome) -> bytes:
    if isinstance(outcome, Failure):
        return encode([outcome.kind, to_plain(outcome)])
    return encode([outcome.result.kind, [to_plain(outcome.result), outcome.seconds]])


def decode_outcome(data: bytes) -> Outcome:
    """Raises `CodecError`."""
    kind, fields = _pair(data)
    if kind == Failure.kind:
        return _convert(fields, Failure)
    if kind not in _FACTS or not isinstance(fields, list) or len(fields) != 2 or not isinstance(fields[1], float):
        raise CodecError(f"pipe: unknown outcome {kind[:80]!r}")
    return Done(result=_convert(fields[0], _FACTS[kind]), seconds=fields[1])


def _pair(data: bytes) -> tuple[str, object]:
    outer = decode(data, _PIPE_LIMITS)
    if not (isinstance(outer, list) and len(outer) == 2 and isinstance(outer[0], str)):
        raise CodecError("pipe: expected [kind, value]")
    return outer[0], outer[1]


S = TypeVar("S", bound=msgspec.Struct)


def _convert(fields: object, cls: type[S]) -> S:
    try:
        return from_plain(fields, cls)
    except msgspec.ValidationError as error:
        raise CodecError(f"pipe: {error}") from None
