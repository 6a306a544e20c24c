"""What has arrived for a session and waits for its turn, bounded; what does not belong is refused.

Everything is for a (step, attempt). Attempts never fall back, so what names an older step or attempt than the current
is late, and forgotten without a word; but for a check, which goes on while later steps run (`begin_check`). What names
a place that already has something must be the same: two contents are refused, the second copy of one is no news.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.circuit import CircuitInput
from sordino_common.spdz.effects import KINDS, Kind
from sordino_common.spdz.errors import CorrectionError, ProtocolError
from sordino_common.spdz.layout import Layout
from sordino_common.spdz.spec import SessionSpec, Slice
from sordino_common.spdz.verification import SIZES

I64 = npt.NDArray[np.int64]
Batch = Mapping[str, I64]
_Place = tuple[str, int, int, int]  # kind, step, attempt, round

AHEAD_STEPS: Final = 8  # rows of later steps than this are refused
AHEAD_CORRECTIONS: Final = 1024  # the driver's byte budget is the tighter bound
_NONE: Final[Mapping[int, bytes]] = {}


class Intake:
    """Of party `index`. `step`, `attempt`: where the party is; `running`: whether it has begun this attempt."""

    def __init__(self, spec: SessionSpec, layout: Layout, index: int) -> None:
        self._spec = spec
        self._index = index
        self._others = {k: name for k, name in enumerate(spec.parties) if k != index}
        self._row_names = frozenset(entry.name for entry in spec.row_inputs)
        self._sizes: dict[tuple[str, int], int] = {  # bytes of a message, by kind and round
            ("open", k): 8 * (place.stop - place.start) for k, place in enumerate(layout.rounds)
        }
        if spec.active:
            self._sizes.update({(kind, 0): size for kind, size in SIZES.items()})
        self._correction_bytes = layout.preprocessing_bytes(active=spec.active)
        self.step = 0
        self.attempt = 0
        self.running = False
        self.slices: tuple[Slice, ...] = ()
        self._checking: tuple[int, int] | None = None  # step and attempt of the check that is under way
        self._inputs: dict[tuple[int, int], dict[str, Batch]] = {}
        self._corrections: dict[tuple[int, int], bytes] = {}
        self._messages: dict[_Place, dict[int, bytes]] = {}

    def move(self, step: int, attempt: int) -> None:
        """The party is at this step and attempt now; what is older is dropped."""
        self.step, self.attempt = step, attempt
        self.running = False
        schedule = self._spec.schedule
        self.slices = schedule.step(step) if schedule is not None and step < self._spec.steps else ()
        for table in (self._inputs, self._corrections):
            for at in [at for at in table if at[0] < step or at[1] < attempt]:
                del table[at]
        for place in [place for place in self._messages if place[1] < step or place[2] < attempt]:
            if place[0] == "open" or place[1:3] != self._checking:
                del self._messages[place]

    def begin_check(self) -> None:
        """The check of everything up to the current step begins: its messages are taken until `end_check`."""
        self._checking = (self.step, self.attempt)

    def end_check(self) -> None:
        at, self._checking = self._checking, None
        for place in [place for place in self._messages if place[0] != "open" and place[1:3] == at]:
            del self._messages[place]

    def clear(self) -> None:
        self._inputs.clear()
        self._corrections.clear()
        self._messages.clear()

    # --- what is there ---------------------------------------------------------------------------------------------

    def batches(self) -> Mapping[str, Batch] | None:
        """Owner -> D of its rows of the current batch; None while somebody's are missing."""
        given = self._inputs.get((self.step, self.attempt), {})
        return given if len(given) == len(self.slices) or not self._row_names else None

    def owners_missing(self) -> list[str]:
        given = self._inputs.get((self.step, self.attempt), {})
        return [part.owner for part in self.slices if part.owner not in given] if self._spec.row_inputs else []

    @property
    def has_correction(self) -> bool:
        return (self.step, self.attempt) in self._corrections

    def take_correction(self) -> bytes:
        """The current attempt's correction; it is there once."""
        return self._corrections.pop((self.step, self.attempt))

    def openings(self, round_: int) -> Mapping[int, bytes] | None:
        """All other parties' messages of that round of the current attempt; None while one is missing."""
        came = self._messages.get(("open", self.step, self.attempt, round_), _NONE)
        return came if len(came) == len(self._others) else None

    def messages(self, kind: Kind) -> Mapping[int, bytes] | None:
        """All other parties' messages of that kind to the check that is under way; None while one is missing."""
        came = self._messages.get(self._place(kind, 0), _NONE)
        return came if len(came) == len(self._others) else None

    def parties_missing(self, kind: str, round_: int) -> list[str]:
        came = self._messages.get(self._place(kind, round_), _NONE)
        return [name for k, name in self._others.items() if k not in came]

    # --- what arrives ----------------------------------------------------------------------------------------------

    def on_input(self, owner: str, step: int, attempt: int, masked: Batch) -> None:
        if step < self.step or attempt < self.attempt:
            return
        if step > self.step + AHEAD_STEPS or attempt > self.attempt + 1 or step >= self._spec.steps:
            raise ProtocolError(f"rows of {owner} for step {step} attempt {attempt}, we are at step {self.step}")
        rows = self._rows_of(owner, step)
        if rows is None:
            raise ProtocolError(f"{owner} has no rows in the batch of step {step}")
        if masked.keys() != self._row_names:
            require_names(self._row_names, masked, f"rows of {owner}")
        for entry in self._spec.row_inputs:
            require_shape(masked[entry.name], (rows, *entry.wire.shape[1:]), entry)
        given = self._inputs.setdefault((step, attempt), {})
        if owner not in given:
            given[owner] = {name: np.array(value) for name, value in masked.items()}
        elif not all(np.array_equal(given[owner][name], masked[name]) for name in masked):
            raise ProtocolError(f"{owner} sent two different batches for step {step} attempt {attempt}")

    def on_correction(self, step: int, attempt: int, data: bytes) -> None:
        if step < self.step or attempt < self.attempt:
            return
        if self.running and step == self.step and attempt == self.attempt:
            return
        if self._spec.corrected(step, attempt) != self._index:
            raise CorrectionError(f"the correction of step {step} attempt {attempt} is another party's")
        expected = self._correction_bytes
        if len(data) != expected:
            raise CorrectionError(f"the correction of step {step} has {len(data)} bytes, the circuit needs {expected}")
        before = self._corrections.get((step, attempt))
        if before is not None and before != data:
            raise CorrectionError(f"two different corrections for step {step} attempt {attempt}")
        if before is None and len(self._corrections) >= AHEAD_CORRECTIONS:
            raise CorrectionError(f"more than {AHEAD_CORRECTIONS} corrections ahead of the steps")
        self._corrections[(step, attempt)] = data

    def on_message(self, sender: int, kind: str, step: int, attempt: int, round_: int, payload: bytes) -> None:
        if sender not in self._others:
            raise ProtocolError(f"there is no other party {sender}")
        if not (
            len(payload) == self._sizes.get((kind, round_))
            and 0 <= step <= self.step + 1
            and step < self._spec.steps
            and 0 <= attempt <= self.attempt + 1
        ):
            self._refuse(self._others[sender], kind, step, attempt, round_, len(payload))
        if (step < self.step or attempt < self.attempt) and (kind == "open" or (step, attempt) != self._checking):
            return  # it is late
        came = self._messages.setdefault((kind, step, attempt, round_), {})
        before = came.get(sender)
        if before is not None and before != payload:
            raise ProtocolError(
                f"{self._others[sender]} sent two different messages: {kind} of step {step} round {round_}"
            )
        came[sender] = payload

    def _refuse(self, name: str, kind: str, step: int, attempt: int, round_: int, size: int) -> NoReturn:
        """Say what is wrong with a message."""
        if kind not in KINDS:
            raise ProtocolError(f"{name} sent a message of unknown kind {kind[:20]!r}")
        if not (0 <= step <= self.step + 1 and step < self._spec.steps and 0 <= attempt <= self.attempt + 1):
            raise ProtocolError(f"{name} sent {kind} of step {step} attempt {attempt}, we are at step {self.step}")
        expected = self._sizes.get((kind, round_))
        if expected is not None:
            raise ProtocolError(f"{name} sent {size} bytes as {kind} of round {round_}, expected {expected}")
        if kind == "open":
            rounds = sum(known == "open" for known, _ in self._sizes)
            raise ProtocolError(f"{name} opened round {round_}, there are {rounds}")
        raise ProtocolError(f"{name} sent {kind} of round {round_} in a session that has no such message")

    def _rows_of(self, owner: str, step: int) -> int | None:
        """How many rows `owner` has in the batch of `step`."""
        schedule = self._spec.schedule
        slices = self.slices if step == self.step else schedule.step(step) if schedule is not None else ()
        for part in slices:
            if part.owner == owner:
                return len(part.positions)
        return None

    def _place(self, kind: str, round_: int) -> _Place:
        """Where messages of that kind stand that are wanted now."""
        step, attempt = (self.step, self.attempt) if kind == "open" or self._checking is None else self._checking
        return kind, step, attempt, round_


def require_names(expected: Set[str], given: Mapping[str, Any], what: str) -> None:
    """Raise `ProtocolError` unless exactly these names are there."""
    if set(given) != expected:
        raise ProtocolError(f"{what}: expected {sorted(expected)}, got {sorted(given)[:20]}")


def require_shape(value: I64, shape: tuple[int, ...], entry: CircuitInput) -> None:
    """Raise `ProtocolError` unless `value` is int64 of that shape."""
    if value.dtype != np.int64 or value.shape != shape:
        raise ProtocolError(f"{entry.name}: expected int64{list(shape)}, got {value.dtype}{list(value.shape)}")


def require_room(value: I64, entry: CircuitInput) -> None:
    """Raise `ProtocolError` unless |m| fits the room that the circuit has for it."""
    if value.size and max(int(value.max()), -int(value.min())) > entry.wire.room:
        raise ProtocolError(f"{entry.name}: a kept value that the circuit has no room for")
