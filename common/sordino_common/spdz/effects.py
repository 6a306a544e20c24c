"""What a `Party` asks its driver to do, or tells it: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
Kind = Literal["open", "check-1", "check-2", "check-3", "check-4"]
KINDS: tuple[Kind, ...] = ("open", "check-1", "check-2", "check-3", "check-4")


class Broadcast(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Send this to every other party, in the session's own channel. `round` is 0 for a check's messages. A Struct,
    which is made several times as fast as a frozen dataclass: one leaves in each round."""

    kind: Kind
    step: int
    attempt: int
    round: int
    payload: bytes

    def __repr__(self) -> str:
        place = f"step={self.step}, attempt={self.attempt}, round={self.round}"
        return f"Broadcast({self.kind}, {place}, {len(self.payload)} bytes)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """`MaskAtEdge`: this attempt is thrown away. Once all parties say so, call `on_restart` with the next attempt."""

    step: int
    attempt: int
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """All steps up to `step` are verified (`passive`: merely done). Only now may outputs leave: `outputs[k]` are the
    masked values m of step k's outputs, `state` those of the state after `step`."""

    step: int
    outputs: Mapping[int, Mapping[str, I64]]
    state: Mapping[str, I64]

    def __repr__(self) -> str:
        return f"Checked(step={self.step}, {len(self.outputs)} steps)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The last step is verified; the session's keys are forgotten."""


Effect = Broadcast | Retry | Checked | Done
