"""The steps of a stepwise session at one party, in the worker: what goes into the next one, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sordino_agent.errors import BadCommand
from sordino_agent.spdz.tasks import SpdzEffect
from sordino_common.errors import LocalError
from sordino_common.messages import SpdzOpen, SpdzStep, decode_message, terms_of_step
from sordino_common.plan.arrays import from_numpy
from sordino_common.ring.prg import Seed
from sordino_common.spdz.circuit import CircuitInput
from sordino_common.spdz.effects import Checked
from sordino_common.spdz.errors import OutOfRange, ProtocolError
from sordino_common.spdz.owner import mask_given
from sordino_common.spdz.spec import SessionSpec, origin_of

I64 = npt.NDArray[np.int64]
Named = Mapping[str, I64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """All inputs of a step, as `Party.feed` takes them."""

    step: int
    terms: bytes
    kept: Named
    given: Named


class Steps:
    """Of `agent`'s seat. A step is told once; what others give to it comes before or after that."""

    def __init__(self, spec: SessionSpec, agent: str) -> None:
        self._spec = spec
        self._agent = agent
        self._seed: Seed | None = None
        self._entries = {entry.name: entry for entry in spec.state_inputs}
        self._step: SpdzStep | None = None
        self._kept: dict[str, I64] = {}
        self._given: dict[str, I64] = {}
        self._moved: dict[str, I64] = {}  # m of what opens to this agent, until the masks are there
        self._waits = False

    def begin(self, seed: Seed) -> None:
        """The seed that this agent's masks come from."""
        self._seed = seed

    def tell(self, number: int, said: bytes, values: Mapping[str, Any]) -> dict[str, I64]:
        """The step's command, with m of what is kept and plain values of what we give. Returns what we give, masked,
        for every party."""
        step = decode_message(said)
        if not isinstance(step, SpdzStep) or step.step != number or self._waits or self._seed is None:
            raise LocalError(f"step {number} was told before the last one was complete, or without a set-up")
        ours = {entry.name for entry in step.given if entry.owner == self._agent}
        plain = {name: encoded(values[name], self._entries[name]) for name in sorted(ours)}
        masked = mask_given(self._spec, self._seed, number, plain)
        self._step, self._waits, self._moved = step, True, {}
        self._kept = {entry.name: values[entry.name] for entry in step.kept}
        self._given = dict(masked)
        return masked

    def give(self, sender: str, number: int, values: Named) -> None:
        """What `sender` gives to the step. Raises `ProtocolError` if that is not what it was to give."""
        step = self._step
        if step is None or step.step != number or not self._waits:
            raise ProtocolError(f"{sender} gives something to step {number}, which is not the one that waits for it")
        wanted = {entry.name for entry in step.given if entry.owner == sender}
        if set(values) != wanted or wanted & self._given.keys():
            raise ProtocolError(f"{sender} gives {sorted(values)[:8]} to step {number}, expected {sorted(wanted)[:8]}")
        self._given.update(values)

    def complete(self, command: SpdzOpen) -> Fed | None:
        """Everything, once it is there; then no more is expected."""
        step = self._step
        if step is None or not self._waits or any(entry.name not in self._given for entry in step.given):
            return None
        self._waits = False
        fed = Fed(step=step.step, terms=terms_of_step(command, step), kept=self._kept, given=self._given)
        self._kept, self._given = {}, {}
        return fed

    def release(self, checked: Checked, *, attempt: int) -> Iterator[SpdzEffect]:
        """What leaves, and what stays, now that the step is checked."""
        step = self._step
        if step is None or step.step != checked.step:
            raise LocalError(f"step {checked.step} was checked without having been told")
        values = {**checked.state, **checked.outputs[checked.step]}
        self._moved = {entry.name: values[entry.name] for entry in step.moved if entry.to == self._agent}
        if step.keep:
            names = tuple(entry.name for entry in step.keep)
            yield SpdzEffect(
                what="keep",
                step=step.step,
                names=names,
                values=tuple(from_numpy(np.asarray(values[name], order="C")) for name in names),
                data=b"".join(origin_of(self._spec, step.step, attempt, name) for name in names),
            )
        if step.opened:
            yield SpdzEffect(
                what="output",  # to the server
                step=step.step,
                names=step.opened,
                values=tuple(from_numpy(np.asarray(values[name], order="C")) for name in step.opened),
            )

    def read(self, number: int, masks: Named) -> SpdzEffect:
        """The dealer's masks of what opens to this agent: x = m - λ, of our own m, as real numbers.

        Raises `ProtocolError` for masks of anything else, or a second time."""
        step, held = self._step, self._moved
        shapes = {name: value.shape for name, value in held.items()}
        if (
            step is None
            or not held
            or step.step != number
            or {name: value.shape for name, value in masks.items()} != shapes
        ):
            raise ProtocolError(
                f"masks of {sorted(masks)[:8]} of step {number}, but what opens to this device and waits for them is "
                f"{sorted(held)[:8] or 'nothing'}"
            )
        self._moved = {}
        dtypes = {entry.name: entry.dtype for entry in step.moved}
        wires = {entry.name: self._spec.circuit.wire(entry.wire) for entry in self._spec.circuit.outputs}
        floats = {
            name: np.ldexp(np.subtract(held[name], mask).astype(np.float64), -wires[name].fraction_bits)
            for name, mask in masks.items()
        }
        return SpdzEffect(
            what="moved",
            step=number,
            names=tuple(floats),
            values=tuple(from_numpy(np.asarray(value, dtype=dtypes[name])) for name, value in floats.items()),
        )


def encoded(value: npt.NDArray[Any], entry: CircuitInput) -> I64:
    """A stored tensor as fixed point. Raises `BadCommand` for one that is not the circuit's, `OutOfRange`."""
    if value.dtype.kind != "f" or value.shape != entry.wire.shape:
        raise BadCommand(
            f"{entry.name}: the circuit takes floats of shape {list(entry.wire.shape)}, the tensor is "
            f"{value.dtype}{list(value.shape)}"
        )
    # Beyond this the cast would wrap; what is beyond the stated range is refused when it is masked.
    scaled = np.rint(np.ldexp(value.astype(np.float64), entry.wire.fraction_bits))
    if not bool(np.isfinite(scaled).all()):
        raise OutOfRange(f"input {entry.name}: NaN or infinite")
    return np.clip(scaled, -(2.0**62), 2.0**62).astype(np.int64)
