"""From a `spdz-open` command to what every party builds for itself: lowering settings, and the `SessionSpec`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Final

from sordino_common.errors import ConfigError, LocalError
from sordino_common.messages import SpdzNumber, SpdzOpen, terms_of
from sordino_common.spdz.circuit import Circuit
from sordino_common.spdz.errors import ProtocolError
from sordino_common.spdz.lowering.settings import Ranges, Settings
from sordino_common.spdz.spec import Schedule, SessionSpec

MODEL: Final = "model"  # the output that stands for all parameters
OWNERS: Final = "*owners"  # the receiver that stands for who owns a row
_INPUT: Final = "input "  # a range of one input, by name
_ROOM: Final = "room "  # the room of one input, by name
_WHOLE: Final = ("fraction_bits", "steps")


def numbers_of(settings: Settings) -> tuple[SpdzNumber, ...]:
    """The settings as they travel: what is None is left out."""
    numbers: dict[str, float | None] = {
        "fraction_bits": settings.fraction_bits,
        "steps": settings.steps,
        "interval": settings.interval,
        "exactness": settings.exactness,
        **{entry.name: getattr(settings.ranges, entry.name) for entry in fields(Ranges)},
        **{_INPUT + name: bound for name, bound in settings.inputs.items()},
        **{_ROOM + name: bits for name, bits in settings.rooms.items()},
    }
    return tuple(SpdzNumber(name=name, value=float(value)) for name, value in numbers.items() if value is not None)


def settings_of(numbers: Sequence[SpdzNumber]) -> Settings:
    """What `numbers_of` took apart. Raises `ProtocolError` on anything else."""
    known = {entry.name for entry in fields(Ranges)}
    ranges: dict[str, float] = {}
    whole: dict[str, int] = {}
    inputs: dict[str, float] = {}
    rooms: dict[str, int] = {}
    interval: float | None = None
    exactness: float | None = None
    for number in numbers:
        name, value = number.name, number.value
        if math.isnan(value):
            raise ProtocolError(f"lowering setting {name!r} is not a number")
        if name in known:
            ranges[name] = value
        elif name in _WHOLE and value == int(min(max(value, 0.0), 2.0**40)):
            whole[name] = int(value)
        elif name == "interval":
            interval = value
        elif name == "exactness":
            exactness = value
        elif name.startswith(_INPUT):
            inputs[name.removeprefix(_INPUT)] = value
        elif name.startswith(_ROOM) and value == int(min(max(value, 0.0), 64.0)):
            rooms[name.removeprefix(_ROOM)] = int(value)
        else:
            raise ProtocolError(f"lowering setting {name!r} = {value:g} is not known to this version")
    try:
        return Settings(
            ranges=Ranges(**ranges), interval=interval, inputs=inputs, rooms=rooms, exactness=exactness, **whole
        )
    except ConfigError as error:
        raise ProtocolError(f"the session's lowering settings: {error}") from None


def spec_of(command: SpdzOpen, circuit: Circuit, circuit_digest: bytes) -> SessionSpec:
    """Raises `ProtocolError` if the command's numbers do not make a session of this circuit."""
    try:
        return SessionSpec(
            session=command.session,
            circuit=circuit,
            circuit_digest=circuit_digest,
            parties=command.parties,
            security=command.security,
            steps=command.steps,
            check_every=command.check_every,
            retries=command.retries,
            schedule=None
            if command.idle_s is not None
            else Schedule(
                rows=tuple((entry.owner, entry.rows) for entry in command.rows),
                batch_rows=command.batch_rows,
                seed=command.seed,
                order=command.order,
            ),
            terms=terms_of(command),
            stepwise=command.idle_s is not None,
        )
    except LocalError as error:  # these are a peer's numbers, not ours
        raise ProtocolError(f"the session makes no sense: {error}") from None
