"""Where a session's preprocessing comes from: this very process, or a dealer on another host.

`Here`: the desk is ours; the server knows every mask and no masked value. `There`: the dealer is a member like others:
it deals, it sends the masks of what opens to whom it opens (once all parties have told it that they have checked), it
keeps the masks of checkpoints. The server then sees masks of its own outputs only.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common import messages as m
from sordino_common.errors import LocalError
from sordino_common.plan.arrays import to_numpy
from sordino_common.spdz.errors import ProtocolError
from sordino_server.dealer.desk import DealerDesk
from sordino_server.rounds.effects import Effect, Result, tell

I64 = npt.NDArray[np.int64]
Masks = Mapping[str, I64]


class Here:
    """The server deals."""

    name: Final = None

    def __init__(self, desk: DealerDesk) -> None:
        self._desk = desk

    @property
    def nbytes(self) -> int:
        return self._desk.nbytes

    @property
    def seconds(self) -> float:
        return self._desk.seconds

    @property
    def ready(self) -> bool:
        """Whether the set-ups may be sent, and the seed of the first state is known."""
        return True

    @property
    def dealt(self) -> int:
        """How many steps a party may claim to have checked."""
        return self._desk.dealt

    @property
    def may_deal(self) -> bool:
        return self._desk.may_deal

    def wait_s(self, now_s: float) -> float | None:
        """How long until the next step is to be dealt; None if none may be."""
        return self._desk.wait_s(now_s)

    def checked(self, limit: int) -> int:
        """How many steps the dealer has done its part for."""
        return limit

    def begin(self, members: tuple[str, ...]) -> Generator[Effect, Result, None]:
        """Their secrets to all members."""
        setups = self._desk.setups()
        for name in members:
            yield from tell(name, setups[name])

    @property
    def state_seed(self) -> bytes | None:
        """For who provides the first state, if that is the server."""
        seeds = [setup.state_seed for setup in self._desk.setups().values() if setup.state_seed is not None]
        return seeds[0] if seeds else None

    def deal(self) -> Generator[Effect, Result, None]:
        """One step more."""
        name, corrections = self._desk.deal()
        for correction in corrections:
            yield from tell(name, correction)

    def take(self, name: str, message: m.Message) -> bool:
        """Whether the message was for the dealing."""
        return False

    def rewind(self, step: int, attempt: int) -> None:
        self._desk.rewind(step, attempt)

    def confirm(self, done: int) -> None:
        self._desk.confirm(done)

    def outputs(self, step: int, names: tuple[str, ...]) -> Masks:
        """λ of these outputs of a step."""
        masks = self._desk.output_masks(step)
        return {name: masks[name] for name in names}

    def model(self, done: int, names: tuple[str, ...]) -> Masks:
        """λ of these parameters after so many steps."""
        masks = self._desk.state(done)
        return {name: masks[name] for name in names}

    def state(self, done: int) -> Masks:
        """λ of a checkpoint, to be kept by the server."""
        return self._desk.state(done)

    def release(self, receiver: str, step: int, masks: Masks) -> Generator[Effect, Result, None]:
        """The masks to who may read the output."""
        yield from tell(receiver, self._desk.masks_for(step, masks))


class There:
    """Dealer `name` is a process of its own."""

    def __init__(self, name: str, command: m.SpdzOpen) -> None:
        self.name: Final = name
        self.nbytes = 0
        self.seconds = 0.0
        self._command = command
        self._checked = command.first_step
        self._seed: bytes | None = None
        self._masks: dict[tuple[int, tuple[str, ...]], Masks] = {}

    @property
    def ready(self) -> bool:
        return self._command.state_from is None or self._seed is not None

    @property
    def dealt(self) -> int:
        return self._command.steps  # the dealer knows better, and refuses

    @property
    def may_deal(self) -> bool:
        return False  # it does so by itself

    def wait_s(self, now_s: float) -> float | None:
        return None

    def checked(self, limit: int) -> int:
        return min(limit, self._checked)

    def begin(self, members: tuple[str, ...]) -> Generator[Effect, Result, None]:
        yield from ()  # the first confirmation tells it that all are ready

    @property
    def state_seed(self) -> bytes | None:
        return self._seed

    def deal(self) -> Generator[Effect, Result, None]:
        yield from ()
        raise LocalError("the dealer is another process")

    def take(self, name: str, message: m.Message) -> bool:
        if name != self.name:
            return False
        match message:
            case m.SpdzSetup():
                self._seed = message.state_seed
            case m.SpdzMasks():
                for value in message.outputs:
                    if len(self._masks) > 4 * self._command.ahead + 4:
                        raise ProtocolError(f"{name} sends the masks of too many steps")
                    self._masks[value.step, value.names] = {
                        key: to_numpy(array) for key, array in zip(value.names, value.values, strict=True)
                    }
            case m.SpdzChecked():
                self._checked = max(self._checked, message.step)
            case m.SpdzClosed():
                self.nbytes, self.seconds = message.counters.opened_bytes, message.counters.compute_s
            case _:
                return False
        return True

    def rewind(self, step: int, attempt: int) -> None:
        """It is told like everybody."""

    def confirm(self, done: int) -> None:
        """It is told like everybody."""

    def has(self, step: int, names: tuple[str, ...]) -> bool:
        """Whether the masks of an output that opens to the server are here."""
        return (step, names) in self._masks

    def outputs(self, step: int, names: tuple[str, ...]) -> Masks:
        return self._masks.pop((step, names))

    def model(self, done: int, names: tuple[str, ...]) -> Masks:
        return self._masks.pop((done, names))

    def state(self, done: int) -> Masks:
        return {}  # the dealer keeps them

    def release(self, receiver: str, step: int, masks: Masks) -> Generator[Effect, Result, None]:
        yield from ()  # the dealer has done so


Dealing = Here | There
