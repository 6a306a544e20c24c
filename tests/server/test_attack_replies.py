"""Agents that answer with lies: each is excluded by name, and the run goes on with finite numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec.structs import replace

from helpers_server import PROGRAMS, Agent, Fleet, job_spec
from sordino_common import messages as m
from sordino_common.errors import CodecError
from sordino_common.plan.arrays import from_numpy
from sordino_server.rounds.effects import Checkpoint
from sordino_server.rounds.events import Note
from sordino_server.rounds.fedavg import federated_averaging

START = (np.zeros(2, np.float32),)
HUGE = (1 << 63) - 1


def played(spoiled: type[m.Message], **lies: object) -> tuple[list[Checkpoint], Fleet]:
    """Two rounds of five agents, two of which put `lies` into every answer of type `spoiled`."""

    def spoil(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        sign = -1.0 if agent.name == "agent-1" else 1.0
        told = {name: sign * lie if isinstance(lie, float) else lie for name, lie in lies.items()}
        return replace(reply, **told) if isinstance(reply, spoiled) else reply

    team = [Agent(f"agent-{k}", rows=10 + k) for k in range(5)]
    team[1].answer = team[2].answer = spoil
    fleet, saved = Fleet(team), list[Checkpoint]()
    spec = job_spec(rounds=2, quorum=2)
    fleet.conductor.start(
        federated_averaging(spec, run="toy-1", programs=PROGRAMS, params=START), run="toy-1", save=saved.append
    )
    fleet.finish()
    fleet.conductor.result()
    return saved, fleet


def finite(saved: list[Checkpoint]) -> None:
    for state in saved:
        record = state.record
        assert all(np.isfinite(param).all() for param in state.params)
        assert record.loss is not None and math.isfinite(record.loss)
        assert all(math.isfinite(value) for value in record.metrics.values())
        assert all(math.isfinite(value) for value in (*state.scaling.offset, *state.scaling.scale))
        assert all(math.isfinite(share.seconds) for share in record.shares.values())
        assert max(state.steps, record.test_rows, *(share.rows for share in record.shares.values())) < 1 << 63


@pytest.mark.parametrize(
    "lies",
    [
        {"rows": HUGE},
        {"steps": HUGE},
        {"loss_sum": 1.7e308, "rows": 1 << 39},
        {"seconds": math.nan},
        {"seconds": math.inf},
        {"update": (from_numpy(np.full(2, 3.4e38, np.float32)),)},
    ],
    ids=lambda lies: "-".join(lies),
)
def test_a_lying_update_is_excluded_by_name(lies: dict[str, object]) -> None:
    saved, fleet = played(m.Trained, **lies)
    finite(saved)
    if "update" not in lies:  # one that is finite on its own is poisoning: not ours to find, see SECURITY.md
        assert any("without agent-1" in note.text for note in fleet.told(Note))
        assert saved[0].record.shares["agent-1"].outcome == "refused"


@pytest.mark.parametrize("lies", [{"rows": HUGE}, {"sums": (1.7e308,)}])
def test_lying_evaluation_sums_are_excluded_by_name(lies: dict[str, object]) -> None:
    saved, fleet = played(m.Evaluated, **lies)
    finite(saved)
    assert any("evaluation without agent-1" in note.text for note in fleet.told(Note))


@pytest.mark.parametrize(
    "lies",
    [
        {"rows": HUGE},
        {"sums": from_numpy(np.full(1, 1.7e308)), "squares": from_numpy(np.full(1, 1.7e308))},
        {"sums": from_numpy(np.full(1, 1e200))},
        {"squares": from_numpy(np.full(1, 1.7e308))},
    ],
    ids=lambda lies: "-".join(lies),
)
def test_lying_moments_are_excluded_by_name(lies: dict[str, object]) -> None:
    finite(played(m.MomentsResult, **lies)[0])


def test_a_reason_cannot_write_on_the_terminal() -> None:
    saved, fleet = played(m.Trained, loss_sum=math.inf)
    finite(saved)

    def refuse(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        if isinstance(message, m.Train):
            return m.Refused(command="train", code="x\x1b[2J", reason="\x1b]0;owned\x07 line\r\nline\u202e")
        return reply

    team = [Agent(f"agent-{k}", rows=10 + k) for k in range(3)]
    team[1].answer = refuse
    fleet = Fleet(team)
    saved = []
    spec = job_spec(rounds=1, quorum=1)
    fleet.conductor.start(
        federated_averaging(spec, run="toy-1", programs=PROGRAMS, params=START), run="toy-1", save=saved.append
    )
    fleet.finish()
    note = saved[0].record.shares["agent-1"].note
    assert "owned" in note
    assert note.isprintable()
    assert all(told.text.isprintable() for told in fleet.told(Note))


@pytest.mark.parametrize("field", ["version", "executor"])
@pytest.mark.parametrize("text", ["[/red]", "[link=file:///etc]x", "\x1b[2J", "1.0\n", "<b>", ""])
def test_a_description_cannot_write_on_the_terminal(field: str, text: str) -> None:
    """These two go into tables whose printer takes [markup] for orders, and fails on what it can't parse."""
    honest = Agent("agent-0").reply(m.Describe())
    assert honest is not None
    assert m.decode_message(m.encode_message(honest)) == honest
    fields = {name: m.base.to_plain(getattr(honest, name)) for name in honest.__struct_fields__} | {field: text}
    with pytest.raises(CodecError, match=field):
        m.decode_message(m.encode(["described", fields]))


def test_refused_packets_cannot_flood_the_observer() -> None:
    """Anybody who reaches the broker can cause them."""
    fleet = Fleet([Agent("agent-0")])
    for _ in range(5000):
        fleet.conductor.on_refusal("agent-0", CodecError("made up"))
    assert len(warnings(fleet)) == 20
    fleet.loop.advance(61.0)
    fleet.conductor.on_refusal("agent-0", CodecError("made up"))
    assert any("4980 more" in text for text in warnings(fleet))
    assert len(warnings(fleet)) == 22


def warnings(fleet: Fleet) -> list[str]:
    return [note.text for note in fleet.told(Note) if note.level == "warning"]
