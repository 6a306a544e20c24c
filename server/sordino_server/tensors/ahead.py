"""A step that leaves before it is recorded to its end, because it goes as the last ones did.

Recording a step costs this process about as long as computing it costs an agent, and one would wait for the other. So
when a backward pass begins in a loop whose last flushes were one and the same, and what this flush reads is known, its
run is sent at once. The steps are recorded all the same, and decide: if the flush turns out to be that run,
to the last input and number, its results are the run's. If it does not, the run is called off as after Ctrl-C, its
results are freed, and nothing of them has been seen: what is sent ahead is never asked for.

A run that was for nothing costs an agent a step, so they must be rare: after each one twice as many equal flushes are
asked for before the next, and one less for each that was right.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sordino_server.tensors.script import Flush, Script

if TYPE_CHECKING:
    from sordino_server.tensors.compile import Compiled
    from sordino_server.tensors.messages import Run
    from sordino_server.tensors.recorder import Request
    from sordino_server.tensors.values import Value

SURE: Final = 3  # flushes that were the same again, numbers included, before a run is sent ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """A flush to come. `outputs`: how many it will have."""

    compiled: Compiled
    inputs: tuple[Value, ...]
    numbers: tuple[float, ...]
    outputs: int


class Foresight:
    """What the next flush of a recorder will be, if it will be anything that is known."""

    def __init__(self) -> None:
        self._flush: Flush | None = None
        self._compiled: Compiled | None = None
        self._numbers: tuple[float, ...] = ()
        self._again = 0
        self._wanted = SURE
        self._reads_late = False
        self._outputs: list[weakref.ref[Value]] = []
        self._origins: list[int] = []  # of the inputs: which output of the flush before each was, -1 for none

    def sent(self, request: Request) -> None:
        """What has been carried out: a flush that was the last one again, or another one."""
        flush, compiled, numbers = request.known, request.compiled, request.numbers
        again = flush is self._flush and compiled is self._compiled and numbers == self._numbers
        if self._reads_late:
            places = {id(output()): k for k, output in enumerate(self._outputs)}
            origins = [places.get(id(value), -1) for value in request.inputs]
            again = again and origins == self._origins
            self._origins, self._outputs = origins, [weakref.ref(value) for value in request.outputs]
        if again:
            self._again += 1
        else:
            self._flush, self._compiled, self._numbers, self._again = flush, compiled, numbers, 0

    def right(self) -> None:
        """A run that was sent ahead was the flush."""
        self._wanted = max(SURE, self._wanted - 1)

    def wrong(self) -> None:
        """A run was sent ahead for nothing."""
        self._again = 0
        self._wanted *= 2

    def next(self, script: Script) -> Foreseen | None:
        """What this window will end with; None if it goes another way, or that is not sure.

        What has not been read by now (momentum, by the optimizer) is what the last flush has left at that place."""
        flush, compiled = self._flush, self._compiled
        if flush is None or compiled is None or self._again < self._wanted:
            return None
        inputs = script.foreseen(flush)
        if inputs is None:
            return None
        if None in inputs and not self._reads_late:
            self._reads_late, self._again = True, 0  # from now on it is followed where inputs come from
            return None
        there = [self._left(k) if value is None else value for k, value in enumerate(inputs)]
        if None in there:
            return None
        return Foreseen(
            compiled=compiled,
            inputs=tuple([value for value in there if value is not None]),
            numbers=self._numbers,
            outputs=len(flush.due),
        )

    def _left(self, place: int) -> Value | None:
        """The output of the last flush that will be the input at `place`, if it is one."""
        origin = self._origins[place]
        value = self._outputs[origin]() if origin >= 0 else None
        return None if value is None or value.stored is None else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """A run that is under way on `agent`. Its request is what was foreseen: it has no outputs and lines yet."""

    agent: str
    run: Run

    def is_that_of(self, agent: str, request: Request) -> bool:
        """Whether this request, which has been recorded, is what was sent."""
        sent = self.run.request
        return (
            agent == self.agent
            and request.compiled is sent.compiled
            and request.inputs == sent.inputs  # the same objects: values have no other equality
            and [repr(request.numbers[k]) for k, _ in sent.compiled.lifted]
            == [repr(sent.numbers[k]) for k, _ in sent.compiled.lifted]
        )
