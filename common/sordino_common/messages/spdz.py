"""SPDZ sessions: what server, dealer and agents say to one another.

    server -> agent    spdz-open  (public: the same for all)      answered by spdz-ready or refused
    dealer -> agent    spdz-setup (its seeds and MAC key)         once all are ready
    dealer -> agent    spdz-correction                            to the party whose turn it is, ahead of the steps
    server -> agent    spdz-confirm, spdz-restart, spdz-close     how far everybody is; a step runs again; the end
    agent -> server    spdz-checked (to a dealer of its own, too), spdz-retry, spdz-closed
    anybody            spdz-abort

    agent -> agent, in the endpoint context of the session only:
                       spdz-input (masked rows), spdz-state (masked parameters; or from the server, if they are its
                       own), spdz-shares, spdz-outputs

A message between agents names no session: the context that it comes in, whose keys both ends have derived from it,
does. Secrets travel in the encrypted session between dealer and receiver, and nowhere else; `repr` does not show them.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from sordino_common.errors import CodecError
from sordino_common.messages.array import Array
from sordino_common.messages.base import (
    Bytes,
    Count,
    Digest,
    Label,
    Message,
    Name,
    RunId,
    Text,
    encode_message,
    least_minor,
    register,
)
from sordino_common.messages.jobs import DataRef

SessionId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
SeedBytes = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
MacKeyBytes = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]  # little-endian, below 2^127 - 1
Step = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Attempt = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Round = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
Receiver = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9][a-z0-9-]{0,62}|\*owners)\Z")]  # or: who owns the rows
ShareKind = Literal["open", "check-1", "check-2", "check-3", "check-4"]

CORRECTION_PART_BYTES = 4 << 20  # of a correction in one message
SHARES_AT_ONCE = 16


class SpdzNumber(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One setting of the lowering: fraction bits, a range."""

    name: Label
    value: float


class SpdzRows(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`owner` inputs so many rows."""

    owner: Name
    rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class SpdzOutput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Output `name` opens to `receiver`: an agent or the server by name, or `*owners`: each row's result to its owner.

    `model` stands for all parameters after the last step (`every` = 0) or after every so many steps; any other name is
    an output of the Plan, and opens for every step."""

    name: Label
    receiver: Receiver
    every: Step = 0


class SpdzPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state after `step` of an earlier session, of which every party holds its masked values."""

    session: SessionId
    step: Step


class SpdzValues(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Named int64 tensors of one step: masked values m, or masks."""

    step: Step
    names: Annotated[tuple[Label, ...], msgspec.Meta(max_length=4096)]
    values: Annotated[tuple[Array, ...], msgspec.Meta(max_length=4096)]

    def __post_init__(self) -> None:
        require_named(self.names, self.values)


class SpdzShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One broadcast of a party (`sordino_common.spdz.effects.Broadcast`)."""

    kind: ShareKind
    step: Step
    attempt: Attempt
    round: Round
    payload: bytes

    def __repr__(self) -> str:
        return f"SpdzShare({self.kind}, step={self.step}, attempt={self.attempt}, round={self.round})"


class SpdzCounters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent counted in one session. `compute_s`: of its worker's processor; `wait_s`: between its tasks."""

    rounds: Count = 0
    checks: Count = 0
    retries: Count = 0
    opened_bytes: Bytes = 0
    compute_s: float = 0.0
    online_s: float = 0.0


Outputs = Annotated[tuple[SpdzValues, ...], msgspec.Meta(max_length=4096)]


@register("spdz-open")
class SpdzOpen(Message, frozen=True, kw_only=True):
    """Server: take part in this session, as a party if `parties` names you, as an owner if `rows` does.

    `circuit`, `digest`: SHA-256 of the lowered circuit and of the whole public specification; every agent lowers the
    Plan itself and compares. `data`: which columns an owner inputs. `dealer`: who deals. `state_from`: who provides
    the first state, null if `resume` says where it is; `model`: which of its models, if that is an agent. `ahead`:
    corrections and inputs come at most so many steps ahead of what is confirmed; `report_every`: steps between two
    `SpdzChecked`. `checkpoints`: after these numbers of steps, ascending, parties keep their masked state.
    `silence_s`: who hears nothing for so long gives up.

    `idle_s`: null, or the session is *stepwise*: nothing is scheduled; what goes into a step, what stays and what opens
    is said for each step (`messages.spdz_steps`), and between steps the session waits for so long."""

    run: RunId
    session: SessionId
    plan_id: Digest
    circuit: Digest
    digest: Digest
    settings: Annotated[tuple[SpdzNumber, ...], msgspec.Meta(max_length=8192)]
    parties: Annotated[tuple[Name, ...], msgspec.Meta(min_length=2, max_length=4)]
    dealer: Name
    security: Literal["active", "passive"]
    first_step: Step
    steps: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    check_every: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    retries: Annotated[int, msgspec.Meta(ge=0, le=1 << 10)]
    rows: Annotated[tuple[SpdzRows, ...], msgspec.Meta(max_length=10_000)]
    batch_rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    seed: Count
    order: Literal["shuffled", "by-owner"]
    outputs: Annotated[tuple[SpdzOutput, ...], msgspec.Meta(max_length=256)]
    data: DataRef | None
    model: Name | None = None
    state_from: Name | None
    resume: SpdzPoint | None
    checkpoints: Annotated[tuple[Step, ...], msgspec.Meta(max_length=1 << 16)]
    ahead: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    report_every: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    silence_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]
    idle_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)] | None = None

    def __post_init__(self) -> None:
        if self.idle_s is not None:
            scheduled = (self.rows, self.outputs, self.checkpoints, self.first_step)
            if any(scheduled) or (self.data, self.model, self.state_from, self.resume) != (None,) * 4:
                raise CodecError("a stepwise session schedules nothing: no rows, state, outputs or checkpoints")
            if self.check_every != 1:
                raise CodecError("a stepwise session checks every step")
        elif (self.state_from is None) == (self.resume is None):
            raise CodecError("expected either state_from or resume")
        elif not self.rows:
            raise CodecError("expected the owners of rows")
        if self.first_step >= self.steps:
            raise CodecError(f"first_step {self.first_step} is not one of {self.steps} steps")
        if len(set(self.parties)) != len(self.parties):
            raise CodecError("a party is named twice")
        owners = [entry.owner for entry in self.rows]
        if len(set(owners)) != len(owners):
            raise CodecError("an owner is named twice")


def terms_of(command: SpdzOpen) -> bytes:
    """SHA-256 over all that the members of a session must have been told alike: the whole command, but for what only
    an owner is told (`data`, `model`). Owners send it along with what they mask, and the parties' check is bound to it:
    a server that tells one member of other receivers, outputs or dealers than another gets nothing."""
    told = msgspec.structs.replace(command, data=None, model=None)
    return hashlib.sha256(encode_message(told, minor=least_minor(told))).digest()


@register("spdz-ready")
class SpdzReady(Message, frozen=True, kw_only=True):
    """Agent: burnt, lowered, the digests agree. `correction_bytes`: of one step, as this agent reckons."""

    session: SessionId
    digest: Digest
    correction_bytes: Bytes


@register("spdz-setup")
class SpdzSetup(Message, frozen=True, kw_only=True):
    """Dealer: this agent's secrets for the session. Parties have a `party_seed`, and a `mac_key` if it is active."""

    session: SessionId
    party_seed: SeedBytes | None
    mac_key: MacKeyBytes | None
    owner_seed: SeedBytes | None
    state_seed: SeedBytes | None

    def __repr__(self) -> str:
        return f"SpdzSetup(session={self.session.hex()}, hidden)"


@register("spdz-correction")
class SpdzCorrection(Message, frozen=True, kw_only=True):
    """Dealer: part `part` of `parts` of the correction of one attempt, for the corrected party."""

    session: SessionId
    step: Step
    attempt: Attempt
    part: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    data: Annotated[bytes, msgspec.Meta(max_length=CORRECTION_PART_BYTES)]

    def __post_init__(self) -> None:
        if self.part >= self.parts:
            raise CodecError(f"part {self.part} of {self.parts}")

    def __repr__(self) -> str:
        return f"SpdzCorrection(step={self.step}, attempt={self.attempt}, part {self.part} of {self.parts}, hidden)"


@register("spdz-state")
class SpdzState(Message, frozen=True, kw_only=True):
    """Whoever provides the first parameters, to every party: name -> D (int64). `terms`: as `terms_of` its command.

    In a stepwise session: what the sender gives to `step`, with `terms` as `terms_of_step`."""

    session: SessionId
    terms: Digest
    step: Step = 0
    names: Annotated[tuple[Label, ...], msgspec.Meta(max_length=4096)]
    values: Annotated[tuple[Array, ...], msgspec.Meta(max_length=4096)]

    def __post_init__(self) -> None:
        require_named(self.names, self.values)


@register("spdz-input")
class SpdzInput(Message, frozen=True, kw_only=True):
    """Owner to every party: its rows of the batches of some steps, masked (name -> D, int64).

    `terms`: as `terms_of` its command."""

    terms: Digest
    attempt: Attempt
    batches: Annotated[tuple[SpdzValues, ...], msgspec.Meta(min_length=1, max_length=1024)]


@register("spdz-shares")
class SpdzShares(Message, frozen=True, kw_only=True):
    """Party to every other party: what it broadcasts, everything that is ready in one message."""

    shares: Annotated[tuple[SpdzShare, ...], msgspec.Meta(min_length=1, max_length=SHARES_AT_ONCE)]


@register("spdz-outputs")
class SpdzOutputs(Message, frozen=True, kw_only=True):
    """Party to an agent that may read an output: m, checked. The masks come from the dealer (`SpdzMasks`)."""

    outputs: Outputs


@register("spdz-masks")
class SpdzMasks(Message, frozen=True, kw_only=True):
    """Dealer to an agent that may read an output: the masks, once all parties have checked."""

    session: SessionId
    outputs: Outputs

    def __repr__(self) -> str:
        return f"SpdzMasks(session={self.session.hex()}, hidden)"


@register("spdz-confirm")
class SpdzConfirm(Message, frozen=True, kw_only=True):
    """Server: all parties have checked the steps before `step`, and what had to be durable is. Inputs may run ahead."""

    session: SessionId
    step: Step


@register("spdz-checked")
class SpdzChecked(Message, frozen=True, kw_only=True):
    """Party to server: every step before `step` is checked. `outputs`: m of what opens to the server. To a dealer of
    its own: no outputs, and `terms` as `terms_of` its command, without which no mask leaves.

    `checkpoint`: number of steps after which the last state that is durable here stands; 0 if there is none."""

    session: SessionId
    step: Step
    checkpoint: Step
    outputs: Outputs
    terms: Digest | None = None


@register("spdz-retry")
class SpdzRetry(Message, frozen=True, kw_only=True):
    """Party to server: this attempt met the edge of the ring."""

    session: SessionId
    step: Step
    attempt: Attempt
    where: Label


@register("spdz-restart")
class SpdzRestart(Message, frozen=True, kw_only=True):
    """Server: from `step` on, everything runs under `attempt`, with fresh preprocessing and fresh input masks."""

    session: SessionId
    step: Step
    attempt: Attempt


@register("spdz-abort")
class SpdzAbort(Message, frozen=True, kw_only=True):
    """Anybody of the session: it is over. `code` is an error's stable name, `reason` for people. Never answered."""

    session: SessionId
    code: Label
    reason: Text


@register("spdz-close")
class SpdzClose(Message, frozen=True, kw_only=True):
    """Server: the last step is confirmed. Answered by `SpdzClosed`."""

    session: SessionId


@register("spdz-closed")
class SpdzClosed(Message, frozen=True, kw_only=True):
    """Agent: keys and shares are forgotten. `names`, `sums`: of what opened to it as an owner, over its `rows` rows."""

    session: SessionId
    counters: SpdzCounters
    rows: Count
    names: Annotated[tuple[Label, ...], msgspec.Meta(max_length=256)]
    sums: Annotated[tuple[float, ...], msgspec.Meta(max_length=256)]


def require_named(names: tuple[str, ...], values: tuple[Array, ...]) -> None:
    """Raise `CodecError` unless every value is int64 and has a name of its own."""
    if len(names) != len(values) or len(set(names)) != len(names):
        raise CodecError(f"{len(names)} names for {len(values)} values, or a name is there twice")
    for name, value in zip(names, values, strict=True):
        if value.dtype != "int64":
            raise CodecError(f"{name[:80]!r} is {value.dtype}, expected int64")
