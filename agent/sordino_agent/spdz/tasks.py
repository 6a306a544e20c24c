"""What passes between the daemon and whoever computes, for one session on shares. Without NumPy.

Events go in, effects come out, several at a time: one crossing of the pipe each way per round.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from sordino_common.messages import Array, SpdzOpen, SpdzSetup, SpdzShare

EventKind = Literal[
    "state", "resume", "input", "correction", "share", "restart", "mask", "provide", "step", "outputs", "masks"
]
EffectKind = Literal[
    "input", "state", "retry", "checked", "output", "checkpoint", "keep", "moved", "sums", "model", "done"
]


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: ClassVar[str]


class SpdzEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that came for a session. Which fields count depends on `what`:

    state        sender, names, values: D of the first state, or of what is given to `step`
    resume       step, names, values: m of a checkpoint
    step         step, data: the encoded `SpdzStep`; names, values: m of what is kept, plain values of what we give
    input        sender, step, attempt, names, values: D      correction  step, attempt, data
    share        sender, kind, step, attempt, round, data     restart     step, attempt
    mask         step, until, attempt: own rows of the batches of these steps are to be masked
    provide      the first state is to be masked, if this agent provides it
    outputs      sender, step, names, values: m               masks       step, names, values: λ"""

    what: EventKind
    sender: str = ""
    kind: str = ""
    step: int = 0
    until: int = 0
    attempt: int = 0
    round: int = 0
    data: bytes = b""
    names: tuple[str, ...] = ()
    values: tuple[Array, ...] = ()

    def __repr__(self) -> str:
        return f"SpdzEvent({self.what}, step={self.step}, attempt={self.attempt}, hidden)"


class SpdzEffect(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that a session wants done, in this order:

    input        step, attempt, names, values: to every other party
    state        names, values: D of the first state, or of what we give to `step`, to every other party
    retry        step, attempt, kind: where
    checkpoint   step (how many are done), names, values: m to be kept
    keep         step, names, values: m of what stays; data: the origin of each, 32 bytes
    moved        step, names, values: what opened to this device in the step, floats
    output       to (empty: the server), step, names, values: m, checked
    checked      step: how many are done and checked
    sums         what this agent may read of its own rows: names and sums over `round` rows
    model        what this agent may read: a file in `data`; `kind`: model or predictions
    done         the last step is checked"""

    what: EffectKind
    to: str = ""
    kind: str = ""
    step: int = 0
    attempt: int = 0
    round: int = 0
    data: bytes = b""
    names: tuple[str, ...] = ()
    values: tuple[Array, ...] = ()
    sums: tuple[float, ...] = ()

    def __repr__(self) -> str:
        return f"SpdzEffect({self.what}, step={self.step}, attempt={self.attempt}, hidden)"


class SpdzOpenTask(_Value, frozen=True, kw_only=True):
    """Lower the Plan, read the rows, make ready. Nothing secret is there yet."""

    kind = "spdz-open"
    command: SpdzOpen
    plan: bytes
    agent: str
    min_rows: int
    held_bytes: int  # what corrections may take
    message_bytes: int  # what a message may carry, and what may come back of a task


class SpdzTask(_Value, frozen=True, kw_only=True):
    """`events` in order, after `setup` if it is there (once, first). Without either: a portion of the session's work,
    if it has any."""

    kind = "spdz"
    session: bytes
    setup: SpdzSetup | None
    events: tuple[SpdzEvent, ...]


class SpdzEndTask(_Value, frozen=True, kw_only=True):
    """Forget the session. `finished`: it is an error if openings were never checked."""

    kind = "spdz-end"
    session: bytes
    finished: bool


class SpdzOpenFacts(_Value, frozen=True, kw_only=True):
    """The digests as this agent computes them, the size of one step's correction, and of a whole batch's masked rows.

    Of a stepwise session: the names of the circuit's `inputs`, its `outputs` with their bytes, and which outputs are
    `copies` of which inputs."""

    kind = "spdz-open-facts"
    circuit: bytes
    digest: bytes
    correction_bytes: int
    batch_bytes: int
    opened_elements: int
    rounds: int
    inputs: tuple[str, ...] = ()
    outputs: tuple[tuple[str, int], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()


class SpdzFacts(_Value, frozen=True, kw_only=True):
    """What came of the events. `shares` go to every other party before anything is done about `effects`. `has_work`:
    something is left to do that nothing has to come for. `waiting_for`: what has to come next, for people."""

    kind = "spdz-facts"
    shares: tuple[SpdzShare, ...] = ()
    effects: tuple[SpdzEffect, ...]
    has_work: bool = False
    waiting_for: str = ""
