"""What can go wrong on a device, by the stable names (`code`) that reach the server in `Refused`.

Besides these, a refusal carries the codes of `sordino_common.errors`: `policy`, `limit`, `plan`, `codec`.
"""

from __future__ import annotations

from typing import ClassVar

from sordino_common.errors import RemoteError, SordinoError


class DatasetError(SordinoError):
    """A dataset of this device can't be used. The text is for the device's owner: it may name files and lines.

    `public` is what the server is told: no path, no cell."""

    exit_code: ClassVar[int] = 2
    code = "dataset"

    def __init__(self, text: str, *, dataset: str = "") -> None:
        super().__init__(text)
        name = f" {dataset!r}" if dataset else ""
        self.public = f"dataset{name} can't be read on this device; `sordino-agent check` there says why"


class UnknownData(RemoteError):
    """A command names a dataset or column that this device does not offer, or uses it in a shape that it lacks."""

    code = "unknown-data"


class ModelFileError(DatasetError):
    """A model's file on this device can't be used. `public`: without its path."""

    code = "model-file"

    def __init__(self, text: str, *, model: str) -> None:
        super().__init__(text)
        self.public = f"model {model!r} can't be read on this device; `sordino-agent check` there says why"


class UnknownModel(RemoteError):
    """A session asks for a model that this device does not have."""

    code = "unknown-model"


class ModelMismatch(RemoteError):
    """The model that a session asks for is not the one that its Plan takes. Says which tensor, never a value."""

    code = "model"


class BadCommand(RemoteError):
    """The parts of a command do not fit together: parameters, rows and Plan differ in shape, dtype or role."""

    code = "command"


class UnknownPlan(RemoteError):
    """A command names a Plan that is not here: never put, or dropped for room. Put it (again), then repeat."""

    code = "unknown-plan"


class UnknownTensor(RemoteError):
    """A command names a tensor that is not here: never put, dropped, or its lease is over."""

    code = "unknown-tensor"


class Conflict(RemoteError):
    """A command repeats (run, round, attempt), or a tensor id, of an earlier one with other contents."""

    code = "conflict"


class Diverged(SordinoError):
    """Training produced NaN or infinity; there is no update that could be averaged."""

    exit_code: ClassVar[int] = 3
    code = "diverged"


class Busy(SordinoError):
    """The device's queue of tasks is full. Ask again later."""

    exit_code: ClassVar[int] = 3
    code = "busy"


class Draining(SordinoError):
    """The agent is about to stop and takes no new work."""

    exit_code: ClassVar[int] = 3
    code = "draining"


class Cancelled(SordinoError):
    """The task was stopped because the server asked for it, or because the agent stops."""

    exit_code: ClassVar[int] = 3
    code = "cancelled"


class WorkerDied(SordinoError):
    """The process that computes ended in mid-task. The next task gets a fresh one."""

    exit_code: ClassVar[int] = 3
    code = "worker"


class SessionReused(RemoteError):
    """A session id comes a second time. A session's preprocessing is used once, whatever happened to it."""

    code = "session-reused"


class UnknownSession(RemoteError):
    """A message for a session that is not open here."""

    code = "unknown-session"


class UnknownCheckpoint(RemoteError):
    """A session is to go on from a state that this device does not hold."""

    code = "unknown-checkpoint"


class CircuitDiffers(RemoteError):
    """This device lowers the Plan to another circuit than the server says: other software, or a lie."""

    code = "circuit"


class Silence(SordinoError):
    """Nothing came for a session for as long as it says. The text names who is missing."""

    exit_code: ClassVar[int] = 3
    code = "silence"


class JournalError(SordinoError):
    """The burn journal can't be read or written. Nothing is used that can't be burnt first."""

    exit_code: ClassVar[int] = 3
    code = "journal"


class LedgerError(SordinoError):
    """The privacy ledger is missing, is not the one that was here, or can't be written. Nothing is released that can't
    be charged first."""

    exit_code: ClassVar[int] = 2
    code = "ledger"
