"""`lower`: Plan -> circuit. Deterministic: everyone who lowers a Plan under the same settings gets the same digest."""

from __future__ import annotations

from typing import Final

from sordino_common.errors import LocalError
from sordino_common.plan.interpreter import UNBOUNDED
from sordino_common.plan.validation import validate_plan
from sordino_common.plan.values import Plan
from sordino_common.spdz.lowering.codec import circuit_digest
from sordino_common.spdz.lowering.emit import Emitter, Key, Room
from sordino_common.spdz.lowering.magnitudes import check_interval, magnitudes, needed
from sordino_common.spdz.lowering.scales import LEEWAYS, fraction_bits
from sordino_common.spdz.lowering.settings import CoefficientRefused, Lowered, LoweringError, Settings
from sordino_common.spdz.lowering.walk import Drawn, draw

_TRIES: Final = 8


def lower(plan: Plan, *, plan_id: bytes, settings: Settings) -> Lowered:
    """The circuit of a Plan whose inputs are all secret.

    Raises `PlanError` if the Plan is not valid, and its kind `LoweringError` naming the node that can't be lowered,
    what it would take, and what to change."""
    validate_plan(plan, UNBOUNDED)
    apart: frozenset[str] = frozenset()
    while True:
        try:
            return _lowered(plan, plan_id, settings, apart)
        except CoefficientRefused as error:
            if not error.output or error.output in apart:
                raise
            apart |= {error.output}


def _lowered(plan: Plan, plan_id: bytes, settings: Settings, apart: frozenset[str]) -> Lowered:
    drawn = draw(plan, settings, apart)
    order = needed(drawn.sketch, drawn.outputs)
    found = magnitudes(plan, drawn.sketch, order, settings)
    check_interval(found, drawn.powers, settings, [node.op for node in plan.nodes])
    for leeway in LEEWAYS:
        bits = fraction_bits(drawn.sketch, order, drawn.outputs, found, settings.fraction_bits, leeway)
        try:
            return _emitted(plan, plan_id, settings, drawn, order, found, bits)
        except CoefficientRefused:
            if leeway == LEEWAYS[-1]:
                raise
    raise LocalError("no leeway was tried")


def _emitted(
    plan: Plan,
    plan_id: bytes,
    settings: Settings,
    drawn: Drawn,
    order: list[int],
    found: dict[int, float],
    bits: dict[int, int],
) -> Lowered:
    """The circuit, once the room of the carried inputs is known: it is what their outputs want it to be."""
    rooms: dict[Key, Room] = {}
    fresh: frozenset[Key] = frozenset()
    for attempt in range(_TRIES):
        emitter = Emitter(plan=plan, drawn=drawn, settings=settings, found=found, bits=bits, rooms=rooms, fresh=fresh)
        circuit, wanted = emitter.emit(order, plan_id)
        if attempt and wanted == rooms:
            return Lowered(
                circuit=circuit,
                digest=circuit_digest(circuit),
                notes=tuple(emitter.notes),
                max_steps=emitter.max_steps,
            )
        if attempt >= _TRIES // 2:  # what one gains depends on what others have gained: fresh masks for these
            fresh |= {key for key in wanted if wanted[key] != rooms.get(key)}
        rooms = wanted
    raise LoweringError(f"{plan.name}: the masks of the parameters grow without bound from step to step")
