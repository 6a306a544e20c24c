"""What all parties of a session agree on, and the order in which the owners' rows come."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.ring.prg import Seed, label
from sordino_common.spdz.circuit import Circuit, CircuitInput

I64 = npt.NDArray[np.int64]
Security = Literal["active", "passive"]
Order = Literal["shuffled", "by-owner"]

MIN_PARTIES: Final = 2
MAX_PARTIES: Final = 4
PADDING: Final = -1
ROW_ROLES: Final = frozenset({"x", "y"})
STATE_ROLES: Final = frozenset({"param", "state"})

# Batches that a schedule holds: as many as are dealt ahead, and some; of large ones fewer.
_HELD_STEPS_MOST: Final = 128
_HELD_STEPS: Final = 16
_HELD_ROWS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Slice:
    """`owner`'s rows (numbers among its own, or `PADDING`: a row of zeros) stand at `positions` of the batch."""

    owner: str
    rows: I64
    positions: I64


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Whose rows make up the batch of each step: a public function of row counts and seed.

    `shuffled`: passes over all owners' rows together, each pass in an order of its own; the rows left over by a pass
    begin the next batch. `by-owner`: every batch is of one owner, in order, the last one of each padded with zeros."""

    rows: tuple[tuple[str, int], ...]
    batch_rows: int
    seed: int
    order: Order = "shuffled"
    _held: dict[int, tuple[Slice, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.rows]
        if len(set(names)) != len(names) or not names:
            raise LocalError("schedule: owners must be named once each, and there must be one")
        if self.batch_rows < 1 or any(count < 1 for _, count in self.rows):
            raise LocalError("schedule: batch and row counts must be at least 1")

    @property
    def total(self) -> int:
        """Rows of all owners."""
        return sum(count for _, count in self.rows)

    @property
    def steps_per_pass(self) -> int:
        """Steps of one pass over all rows, rounded up."""
        if self.order == "shuffled":
            return -(-self.total // self.batch_rows)
        return sum(-(-count // self.batch_rows) for _, count in self.rows)

    def step(self, number: int) -> tuple[Slice, ...]:
        """The batch of step `number` (from 0), owners in their order; those without a row in it are left out."""
        held = self._held.get(number)
        if held is None:  # several ask for the same steps: who masks rows ahead, who takes them, who moves on
            held = self._by_owner(number) if self.order == "by-owner" else self._shuffled(number)
            if len(self._held) >= max(_HELD_STEPS, min(_HELD_STEPS_MOST, _HELD_ROWS // self.batch_rows)):
                del self._held[next(iter(self._held))]
            self._held[number] = held
        return held

    def _shuffled(self, number: int) -> tuple[Slice, ...]:
        start, total, left = number * self.batch_rows, self.total, self.batch_rows
        parts = []
        while left:
            part = _pass(self.rows, self.seed, start // total)[:, start % total : start % total + left]
            parts.append(part)
            start, left = start + part.shape[1], left - part.shape[1]
        owners, rows = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        slices = []
        for index, (name, _) in enumerate(self.rows):
            (positions,) = (owners == index).nonzero()
            if positions.size:
                slices.append(_slice(name, rows[positions], positions))
        return tuple(slices)

    def _by_owner(self, number: int) -> tuple[Slice, ...]:
        for name, count in self.rows:
            steps = -(-count // self.batch_rows)
            if number < steps:
                rows = np.arange(number * self.batch_rows, (number + 1) * self.batch_rows, dtype=np.int64)
                rows[rows >= count] = PADDING
                return (_slice(name, rows, np.arange(self.batch_rows, dtype=np.int64)),)
            number -= steps
        raise LocalError("schedule: there is no such step, all rows have been")


def _slice(owner: str, rows: I64, positions: I64) -> Slice:
    for array in (rows, positions):
        array.setflags(write=False)
    return Slice(owner, rows, positions)


@lru_cache(maxsize=8)
def _pass(rows: tuple[tuple[str, int], ...], seed: int, number: int) -> I64:
    """Pass `number` in its order, [2, total]: the owner of each row, and its number among the owner's. Public, so a
    statistical generator will do."""
    ends = np.cumsum([count for _, count in rows], dtype=np.int64)
    firsts = ends - [count for _, count in rows]
    order = np.random.Generator(np.random.PCG64([seed, number])).permutation(int(ends[-1])).astype(np.int64)
    owners = np.searchsorted(ends, order, side="right")
    return np.stack((owners, order - firsts[owners]))


@dataclass(frozen=True, kw_only=True)
class SessionSpec:
    """Public, and the same at every party: `digest` is in every key, commitment and hash of the session.

    `parties`: the compute agents in order; party i is `parties[i]`. `steps`: how many the session runs; `check_every`:
    the MAC check (and with it every output) comes after so many steps, and after the last. `retries`: how often one
    step may meet `MaskAtEdge`. `circuit_digest` identifies the circuit (a hash of its canonical encoding). `terms`: a
    hash of all else that the members were told (who deals, what opens to whom); no mask depends on it, but parties
    that were told different things fail the check. `stepwise`: the state inputs come anew for every step."""

    session: bytes
    circuit: Circuit
    circuit_digest: bytes
    parties: tuple[str, ...]
    security: Security
    steps: int
    check_every: int
    retries: int
    schedule: Schedule | None
    terms: bytes = b""
    stepwise: bool = False

    def __post_init__(self) -> None:
        if len(self.session) != 16:
            raise LocalError(f"session: an id has 16 bytes, got {len(self.session)}")
        if not MIN_PARTIES <= len(self.parties) <= MAX_PARTIES or len(set(self.parties)) != len(self.parties):
            raise LocalError(f"session: {MIN_PARTIES} to {MAX_PARTIES} different parties, got {list(self.parties)}")
        if self.steps < 1 or self.check_every < 1 or self.retries < 0:
            raise LocalError("session: steps and check_every are at least 1, retries at least 0")
        if self.row_inputs and self.schedule is None:
            raise LocalError("session: the circuit takes rows, so it needs a schedule")
        if self.stepwise and (self.schedule is not None or self.check_every != 1):
            raise LocalError("session: a stepwise one has no schedule, and checks every step")

    @property
    def active(self) -> bool:
        return self.security == "active"

    @cached_property
    def row_inputs(self) -> tuple[CircuitInput, ...]:
        """Inputs that the owners of rows provide, anew for every step."""
        return tuple(entry for entry in self.circuit.inputs if entry.role in ROW_ROLES)

    @cached_property
    def state_inputs(self) -> tuple[CircuitInput, ...]:
        """Inputs that one step hands to the next (or that stay: parameters of an inference)."""
        return tuple(entry for entry in self.circuit.inputs if entry.role in STATE_ROLES)

    @cached_property
    def state_outputs(self) -> Mapping[str, int]:
        """State input -> the wire whose value it has in the next step; itself if no output replaces it."""
        replaced = {(entry.role, entry.name): entry.wire for entry in self.circuit.outputs}
        own = {(entry.role, entry.name): number for number, entry in enumerate(self.circuit.inputs)}
        return {
            entry.name: replaced.get((entry.role, entry.name), own[(entry.role, entry.name)])
            for entry in self.state_inputs
        }

    @cached_property
    def value_outputs(self) -> Mapping[str, int]:
        """Outputs of a step that are no state: losses, predictions. Name -> wire."""
        return {entry.name: entry.wire for entry in self.circuit.outputs if entry.role not in STATE_ROLES}

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over everything above."""
        schedule: list[str | int | bytes] = ["stepwise"] if self.stepwise else []
        if self.schedule is not None:
            schedule = [self.schedule.batch_rows, self.schedule.seed, self.schedule.order]
            for name, count in self.schedule.rows:
                schedule += [name, count]
        return hashlib.sha256(
            label(
                "sordino spdz session v2", self.session, self.circuit_digest, len(self.parties), *self.parties,
                self.security, self.steps, self.check_every, self.retries, *schedule,
            )
        ).digest()  # fmt: skip

    @cached_property
    def stream_prefix(self) -> bytes:
        """What the `info` of every use of a seed in this session begins with (`stream`)."""
        return label("sordino spdz stream v1", self.digest)

    @cached_property
    def bound(self) -> bytes:
        """SHA-256 over `digest` and `terms`: what a check is bound to."""
        return hashlib.sha256(label("sordino spdz terms v1", self.digest, self.terms)).digest()

    def corrected(self, step: int, attempt: int) -> int:
        """The party that gets this attempt's correction; the others' shares are expanded from seeds. It rotates."""
        return (step + attempt) % len(self.parties)

    def check_due(self, step: int) -> bool:
        """Whether the check comes after step `step`."""
        return self.check_of(step) == step

    def check_of(self, step: int) -> int:
        """The step after which the check comes that step `step` is part of."""
        return min((step // self.check_every + 1) * self.check_every, self.steps) - 1


class PartySetup:
    """What the dealer tells one party once: the seed of its shares, and its share of the MAC key (None if passive)."""

    __slots__ = ("mac_key", "seed")

    def __init__(self, seed: Seed, mac_key: int | None) -> None:
        self.seed = seed
        self.mac_key = mac_key

    def __repr__(self) -> str:
        return "PartySetup(hidden)"


def origin_of(spec: SessionSpec, step: int, attempt: int, name: str) -> bytes:
    """The name of output `name` of one attempt of a step, wherever it is kept: its m here, its λ there."""
    return hashlib.sha256(label("sordino spdz kept v1", spec.bound, step, attempt, name)).digest()


def stream(spec: SessionSpec, kind: str, step: int, attempt: int, *more: str | int) -> bytes:
    """The `info` of one use of a seed in this session: no two uses have the same."""
    return spec.stream_prefix + label(kind, step, attempt, *more)
