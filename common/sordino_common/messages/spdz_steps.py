"""Stepwise sessions on shares: one circuit that stays open, and for each step what goes in, what stays, what opens.

    server -> party    spdz-step       answered by spdz-taken, or refused by the party's own policy
    giver -> party     spdz-state      what an agent, or the server, puts into the step, masked
    party -> party     spdz-state      with nothing in it, in a passive session: which step it was told
    dealer, parties                    as in every session: correction, shares, check, spdz-checked
    dealer -> party    spdz-masks      λ of what opens to the party, once all have checked; answered by spdz-stored

A value that stays is kept by every party as m under a tensor's id, and by the dealer as the mask λ. Its `origin` says
which output of which step of which session it is: parties and dealer compute it for themselves, so that no m can meet
another value's λ.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from sordino_common.errors import CodecError
from sordino_common.messages.base import Digest, Label, Message, Name, encode_message, register
from sordino_common.messages.spdz import SessionId, SpdzOpen, Step, terms_of
from sordino_common.messages.store import TensorId, TensorIds


class SpdzKept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Input `name` is what every party keeps under `tensor_id`."""

    name: Label
    tensor_id: TensorId
    origin: Digest


class SpdzGiven(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Input `name` is masked by `owner`: a party's tensor `tensor_id`; or, if that is null, something of the
    server's."""

    name: Label
    owner: Name
    tensor_id: TensorId | None


class SpdzKeep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Output `name` is kept under `tensor_id` from now on."""

    name: Label
    tensor_id: TensorId


class SpdzMoved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Output `name` opens to party `to`, which keeps it under `tensor_id`: a tensor of its own, of real numbers."""

    name: Label
    to: Name
    tensor_id: TensorId
    dtype: Literal["float32", "float64"]


@register("spdz-step")
class SpdzStep(Message, frozen=True, kw_only=True):
    """Server: step `step` of a stepwise session; the next one, each is said once. Every input of the circuit is `kept`
    or `given`. `keep`: outputs that stay, for `lease_s` seconds. `opened`: outputs whose m goes to the server.
    `moved`: outputs that open to a party, and stay there for `lease_s` seconds.

    Once the step is checked, and before its outputs are kept, `drops` are forgotten; unknown ids are no error there."""

    session: SessionId
    step: Step
    kept: Annotated[tuple[SpdzKept, ...], msgspec.Meta(max_length=4096)]
    given: Annotated[tuple[SpdzGiven, ...], msgspec.Meta(max_length=4096)]
    keep: Annotated[tuple[SpdzKeep, ...], msgspec.Meta(max_length=4096)]
    opened: Annotated[tuple[Label, ...], msgspec.Meta(max_length=4096)]
    moved: Annotated[tuple[SpdzMoved, ...], msgspec.Meta(max_length=4096)]
    drops: TensorIds
    lease_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]

    def __post_init__(self) -> None:
        inputs = [*(entry.name for entry in self.kept), *(entry.name for entry in self.given)]
        outputs = [entry.name for entry in self.keep]
        moved = [entry.name for entry in self.moved]
        ids = [*(entry.tensor_id for entry in self.keep), *(entry.tensor_id for entry in self.moved)]
        for names in (inputs, outputs, list(self.opened), moved, ids):
            if len(set(names)) != len(names):
                raise CodecError("an input, an output or a new id is named twice")


@register("spdz-taken")
class SpdzTaken(Message, frozen=True, kw_only=True):
    """Party: the step is allowed here, its inputs are there, there is room for what stays."""

    session: SessionId
    step: Step


@register("spdz-stored")
class SpdzStored(Message, frozen=True, kw_only=True):
    """Party: what opened to it in the step is stored here."""

    session: SessionId
    step: Step


def terms_of_step(command: SpdzOpen, step: SpdzStep) -> bytes:
    """SHA-256 over all that the parties of a step must have been told alike; see `terms_of`."""
    return hashlib.sha256(terms_of(command) + encode_message(step)).digest()
