"""One party of a session cheats: what `sordino-sim run JOB --tamper agent=1,step=3,gate=2,bit=17` does.

    what=opening       its share of the gate is wrong, to itself and to all others            -> MacCheckError
         mac           its share of a tag that the gate is checked with is wrong              -> MacCheckError
         correction    the correction that it works with was changed on the way               -> MacCheckError
         equivocation  the others are told another share than the one it counts with          -> EquivocationError
         commitment    it commits to another seed than the one it opens                       -> CommitmentError
         seed          it opens another seed than the one it committed to                     -> CommitmentError

A cheater is a `Party` like any other, but for one bit at one place: it keeps to the protocol in all else, so that what
finds it is the check and not its clumsiness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from sordino_agent.spdz.seat import MakeParty
from sordino_common.errors import ConfigError
from sordino_common.ring.prg import Seed
from sordino_common.spdz.effects import Broadcast, Effect
from sordino_common.spdz.party import Party
from sordino_common.spdz.spec import PartySetup, SessionSpec, stream

I64 = npt.NDArray[np.int64]
What = Literal["opening", "mac", "seed", "commitment", "correction", "equivocation"]
_HASH_BYTES: Final = 32
_WORD_BITS: Final = 64


@dataclass(slots=True, kw_only=True)
class Tamper:
    """`agent`: which party of the committee, from 0. `step`: from 0. `gate`: which of the circuit's gates, in order of
    rounds. `bit`: of an element, or of what is sent."""

    agent: int
    step: int
    gate: int = 0
    bit: int = 0
    what: What = "opening"
    happened: bool = field(default=False)

    def make_party(self) -> MakeParty:
        """A constructor of parties: honest ones, but for the cheater."""

        def make(spec: SessionSpec, index: int, setup: PartySetup, *, random: Callable[[int], bytes]) -> Party:
            if index != self.agent:
                return Party(spec, index, setup, random=random)
            return Cheater(spec, index, setup, random=random, tamper=self)

        return make


def read_tamper(text: str) -> Tamper:
    """`key=value,key=value`. Raises `ConfigError`."""
    known = {entry.name for entry in fields(Tamper)} - {"happened"}
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in known:
            raise ConfigError(f"--tamper {text}: expected key=value with keys {', '.join(sorted(known))}; got {part!r}")
        if key == "what":
            if value not in get_args(What):
                raise ConfigError(f"--tamper {text}: what is one of {', '.join(get_args(What))}; got {value!r}")
            values[key] = value
        elif not value.isdigit():
            raise ConfigError(f"--tamper {text}: {key} is a number from 0; got {value!r}")
        else:
            values[key] = int(value)
    if not {"agent", "step"} <= values.keys():
        raise ConfigError(f"--tamper {text}: agent and step are needed")
    return Tamper(**values)


class Cheater(Party):
    """See the module's text. One bit, once."""

    def __init__(
        self,
        spec: SessionSpec,
        index: int,
        setup: PartySetup,
        *,
        random: Callable[[int], bytes],
        tamper: Tamper,
    ) -> None:
        super().__init__(spec, index, setup, random=random)
        self._tamper = tamper
        self._shares_seed: Seed = setup.seed

    def on_correction(self, step: int, attempt: int, data: bytes) -> list[Effect]:
        if self._due("correction", step):
            data = _flipped(data, self._tamper.bit % (8 * len(data)))
        return super().on_correction(step, attempt, data)

    def _preprocessing(self, at: tuple[int, int], corrected: bool, shares: I64) -> Any:
        tags = super()._preprocessing(at, corrected, shares)
        if not self._layout.gates:
            return tags
        place = self._layout.root_elements + self._place()
        if self._due("opening", at[0]):
            shares.view(np.uint64)[place] ^= np.uint64(1 << self._tamper.bit % _WORD_BITS)
        elif self.spec.active and self._due("mac", at[0]):
            tags = self._expanded(at) if tags is None else np.array(tags)
            tags[0, self._tag()] ^= np.uint64(1 << self._tamper.bit % _WORD_BITS)
        return tags

    def _prepare(self) -> None:
        """Nothing ahead of time: a step that is prepared and then runs again would not be cheated in."""

    def _go_on(self) -> list[Effect]:
        return [self._bent(effect) for effect in super()._go_on()]

    def _bent(self, effect: Effect) -> Effect:
        if not isinstance(effect, Broadcast):
            return effect
        bit = self._tamper.bit
        if effect.kind == "open" and effect.round == self._round() and self._due("equivocation", effect.step):
            offset = self._place() - self._layout.rounds[effect.round].start
            return _with(effect, _flipped(effect.payload, 64 * offset + bit % _WORD_BITS))
        if effect.kind == "check-1" and self._due("commitment", effect.step):
            return _with(effect, _flipped(effect.payload, 8 * _HASH_BYTES + bit % (8 * _HASH_BYTES)))
        if effect.kind == "check-2" and self._due("seed", effect.step):
            return _with(effect, _flipped(effect.payload, bit % (8 * len(effect.payload))))
        return effect

    def _due(self, what: What, step: int) -> bool:
        """Whether it is time. A check comes after several steps, a correction every few: then the first from there."""
        tamper = self._tamper
        later = what in ("seed", "commitment", "correction")
        if tamper.happened or tamper.what != what or (step < tamper.step if later else step != tamper.step):
            return False
        if not self._layout.gates:  # nothing is opened: a session in which tensors are shared
            return False
        tamper.happened = True
        return True

    def _round(self) -> int:
        place = self._place()
        return next(k for k, span in enumerate(self._layout.rounds) if span.start <= place < span.stop)

    def _gate(self) -> int:
        numbers = list(self._layout.gates)
        return numbers[self._tamper.gate % len(numbers)]

    def _place(self) -> int:
        """The gate's first element among all that a step opens."""
        place: int = self._layout.gates[self._gate()].start
        return place

    def _tag(self) -> int:
        """The first tag that the gate is checked with; that of all γ if it has no products."""
        tagging, gate = self._layout.tagging, self._gate()
        places = [one.left.start for one in tagging.products if one.gate.gate == gate]
        places += [
            factor.tags.start
            for family in tagging.families
            for group in family.groups
            for factor in group.factors
            if any(family.gates[partner.gate] == gate for partner in factor.partners)
        ]
        return next(iter(places), tagging.tags - 1)

    def _expanded(self, at: tuple[int, int]) -> Any:
        return self._field.expand(self._shares_seed, stream(self.spec, "tags", *at), self._layout.tagging.tags)


def _flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def _with(effect: Broadcast, payload: bytes) -> Broadcast:
    return Broadcast(kind=effect.kind, step=effect.step, attempt=effect.attempt, round=effect.round, payload=payload)
