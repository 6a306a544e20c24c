"""`lower`: Plan -> circuit. Deterministic: everyone who lowers a Plan under the same settings gets the same digest."""

from __future__ import annotations

from typing import Final

from sordino_common.errors import LocalError
from sordino_common.plan.interpreter import UNBOUNDED
from sordino_common.plan.validation import validate_plan
from sordino_common.plan.values import Plan
from sordino_common.spdz.lowering.codec import circuit_digest
from sordino_common.spdz.lowering.emit import Emitter
from sordino_common.spdz.lowering.magnitudes import check_interval, magnitudes, needed
from sordino_common.spdz.lowering.scales import LEEWAYS, fraction_bits
from sordino_common.spdz.lowering.settings import CoefficientRefused, Lowered, LoweringError, Settings
from sordino_common.spdz.lowering.walk import Drawn, draw

_TRIES: Final = 4


def lower(plan: Plan, *, plan_id: bytes, settings: Settings) -> Lowered:
    """The circuit of a Plan whose inputs are all secret.

    Raises `PlanError` if the Plan is not valid, and its kind `LoweringError` naming the node that can't be lowered,
    what it would take, and what to change."""
    validate_plan(plan, UNBOUNDED)
    drawn = draw(plan, settings)
    order = needed(drawn.sketch, drawn.outputs)
    found = magnitudes(plan, drawn.sketch, order, settings)
    check_interval(drawn.sketch, found, drawn.powers, settings, [node.op for node in plan.nodes])
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
    """The circuit, once the growth of the carried wires' room is known: it is what the outputs' room shows."""
    growth: dict[tuple[str, str], int] = {}
    fresh: frozenset[tuple[str, str]] = frozenset()
    for attempt in range(_TRIES):
        emitter = Emitter(plan=plan, drawn=drawn, settings=settings, found=found, bits=bits, growth=growth, fresh=fresh)
        circuit, grown = emitter.emit(order, plan_id)
        if all(grown[key] <= growth.get(key, 0) for key in grown):
            return Lowered(
                circuit=circuit,
                digest=circuit_digest(circuit),
                notes=tuple(emitter.notes),
                max_steps=emitter.max_steps,
            )
        if attempt:  # what one parameter gains depends on what others have gained: fresh masks for these
            fresh |= {key for key in grown if grown[key] > growth.get(key, 0)}
        growth = {key: max(grown[key], growth.get(key, 0)) for key in grown}
    raise LoweringError(f"{plan.name}: the masks of the parameters grow without bound from step to step")
