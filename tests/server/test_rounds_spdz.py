"""The server's conduct of one session on shares, fed by hand: what it opens, what it refuses, whom it names."""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers_agent import SERVER, data_ref
from helpers_channel import entry, roster
from helpers_shares import LOWERED, NAMES, fleet_roster, open_command
from sordino_common import messages as m
from sordino_common.errors import ConfigError, FleetUnavailable
from sordino_common.plan.arrays import from_numpy
from sordino_common.spdz.errors import EquivocationError, MacCheckError, ProtocolError, RetriesExhausted
from sordino_common.spdz.opening import spec_of
from sordino_server.dealer.desk import DealerDesk
from sordino_server.job_spdz import SpdzSpec
from sordino_server.rounds.committee import candidates, choose
from sordino_server.rounds.effects import Answers, Ask, Gone, Hear, Heard, Meter, Metered, Said, Tell
from sordino_server.rounds.spdz_dealing import Here
from sordino_server.rounds.spdz_session import Session, SessionAborted, SessionLost, SessionRefused

COMMAND = open_command(check_every=1, steps=4, checkpoints=(2, 4))
SESSION = COMMAND.session


class World:
    """Plays a generator: keeps what it tells, answers a `Hear` from `items`, and asks by `answers`."""

    def __init__(self, command: m.SpdzOpen = COMMAND, *, deal_first: bool = False, deadline_s: float = 10.0) -> None:
        self.command = command
        spec = spec_of(command, LOWERED.circuit, LOWERED.digest)
        desk = DealerDesk(command, spec, random=random.Random(1).randbytes, masks=None, stopwatch=lambda: 0.0)
        self.desk = desk
        self.session = Session(
            command, spec, Here(desk), server=SERVER, data=data_ref(), deadline_s=deadline_s, deal_first=deal_first
        )
        self.told: list[tuple[str, m.Message]] = []
        self.moments: list[float] = []  # of what was told
        self.asked: list[Ask] = []
        self.answers = Answers(replies=dict.fromkeys(NAMES, self.ready()), refusals={}, missing={})
        self.items: list[Said | Gone] = []
        self.now_s = 0.0
        self.under_way = 0
        self.waits: list[Hear] = []

    def ready(self) -> m.SpdzReady:
        return m.SpdzReady(session=SESSION, digest=self.command.digest, correction_bytes=1)

    def play(self, generator: Generator[Any, Any, Any]) -> Any:
        value: Any = None
        try:
            while True:
                effect = generator.send(value)
                value = None
                match effect:
                    case Ask():
                        self.asked.append(effect)
                        value = self.answers
                    case Tell():
                        self.told.append((effect.to, effect.message))
                        self.moments.append(self.now_s)
                    case Hear():
                        self.waits.append(effect)
                        if effect.delivered:
                            self.now_s += min(effect.wait_s, 4.0)
                            self.under_way = max(0, self.under_way - 1)
                        items, self.items = tuple(self.items), []
                        value = Heard(items=items)
                    case Meter():
                        value = Metered(bytes_up=0, bytes_down=0, now_s=self.now_s, under_way=self.under_way)
        except StopIteration as stop:
            return stop.value

    def say(self, name: str, message: m.Message) -> None:
        self.items.append(Said(name=name, message=message))

    def checked(self, name: str, step: int, *, lie: int = 0, outputs: bool = True, first: int = 0) -> None:
        values = tuple(
            m.SpdzValues(step=k, names=("loss",), values=(from_numpy(np.array(100 + k + lie, dtype=np.int64)),))
            for k in range(first, step)
        )
        self.say(name, m.SpdzChecked(session=SESSION, step=step, checkpoint=0, outputs=values if outputs else ()))

    def heard(self, kind: type[m.Message]) -> list[tuple[str, m.Message]]:
        return [(to, message) for to, message in self.told if isinstance(message, kind)]


VALUES = {entry.name: np.zeros(entry.wire.shape, np.int64) for entry in LOWERED.circuit.inputs if entry.role == "param"}


def opened(*, dealt: int = 4) -> World:
    """The session is open and `dealt` steps are dealt."""
    world = World()
    world.play(world.session.open(VALUES))
    for _ in range(dealt):
        world.desk.deal()
    return world


def test_everybody_gets_its_own_secrets_and_nothing_else() -> None:
    world = opened()
    (question,) = world.asked
    assert set(question.messages) == set(NAMES)
    setups = dict(world.heard(m.SpdzSetup))
    assert set(setups) == set(NAMES)
    seeds = {message.party_seed for message in setups.values() if isinstance(message, m.SpdzSetup)}
    assert len(seeds) == 3
    assert len(world.heard(m.SpdzState)) == 3
    assert len(world.heard(m.SpdzConfirm)) == 3


def test_preprocessing_that_is_dealt_first_has_arrived_before_anybody_can_begin() -> None:
    world = World(deal_first=True)
    world.under_way = 2
    world.play(world.session.open(VALUES))
    kinds = [type(message) for _, message in world.told]
    assert kinds[: COMMAND.ahead] == [m.SpdzCorrection] * COMMAND.ahead
    assert m.SpdzCorrection not in kinds[COMMAND.ahead :]
    assert kinds[COMMAND.ahead] is m.SpdzSetup
    dealing, arriving = world.waits[: COMMAND.ahead], world.waits[COMMAND.ahead :]
    assert all((wait.wait_s, wait.delivered) == (0.0, False) for wait in dealing)
    assert [(wait.purpose, wait.delivered) for wait in arriving] == [("preprocessing to arrive", True)] * 2
    for name in NAMES:
        world.checked(name, 1)
    assert set(world.play(world.session.advance(1)).outputs) == {0}


def test_members_hear_something_while_preprocessing_is_dealt_and_on_its_way() -> None:
    """Who gets none of it, like an owner of rows, would end the session after `silence_s` of waiting for its set-up."""
    world = World(open_command(check_every=1, steps=4, silence_s=12.0), deal_first=True, deadline_s=60.0)
    world.under_way = 10
    world.play(world.session.open(VALUES))
    for name in NAMES:
        moments = [now_s for now_s, (to, _) in zip(world.moments, world.told, strict=True) if to == name]
        assert moments[-1] >= 30.0
        assert max(np.diff([0.0, *moments])) < 12.0
    assert all(0 < wait.wait_s < 6.0 for wait in world.waits if wait.delivered)  # however long until the deadline
    before = world.told[: [type(message) for _, message in world.told].index(m.SpdzSetup)]
    assert {message.step for _, message in before if isinstance(message, m.SpdzConfirm)} == {0}


def test_preprocessing_that_does_not_arrive_ends_the_session_with_what_helps() -> None:
    world = World(deal_first=True)
    world.under_way = 100
    text = (
        "the preprocessing of 4 steps has not arrived after 10 s; raise train.round_deadline_s, lower "
        "spdz.ahead_bytes, or say spdz.preprocessing: beside"
    )
    with pytest.raises(SessionLost, match=text):
        world.play(world.session.open(VALUES))
    assert {to for to, _ in world.heard(m.SpdzAbort)} == set(NAMES)
    assert not world.heard(m.SpdzSetup)


def test_who_leaves_while_preprocessing_is_dealt_ends_the_session() -> None:
    world = World(deal_first=True)
    world.items.append(Gone(name="agent-01", why="offline for 10 s"))
    with pytest.raises(SessionLost, match="agent-01"):
        world.play(world.session.open(VALUES))
    assert len(world.heard(m.SpdzCorrection)) == 1


def test_corrections_run_ahead_as_far_as_agreed() -> None:
    world = opened(dealt=1)
    for name in NAMES:
        world.checked(name, 1)
    world.play(world.session.advance(1))
    steps = [message.step for _, message in world.heard(m.SpdzCorrection) if isinstance(message, m.SpdzCorrection)]
    assert steps == sorted(set(steps))
    assert max(steps) < COMMAND.ahead


def test_what_opens_is_m_minus_the_mask_once_all_parties_agree() -> None:
    world = opened()
    mask = int(world.desk.output_masks(0)["loss"])
    for name in NAMES:
        world.checked(name, 1)
    found = world.play(world.session.advance(1))
    assert int(found.outputs[0]["loss"]) == 100 - mask


def test_a_checkpoint_is_the_dealers_and_confirmed_only_when_settled() -> None:
    world = opened()
    for name in NAMES:
        world.checked(name, 2)
    found = world.play(world.session.advance(2))
    assert set(found.states) == {2}
    assert world.session.confirmed == 0
    world.play(world.session.settle(2))
    assert [message.step for _, message in world.heard(m.SpdzConfirm)][-3:] == [2, 2, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda w: w.checked("agent-02", 1, lie=1), EquivocationError, "agent-02 and agent-00 tell different outputs"),
        (lambda w: w.checked("agent-02", 1, outputs=False), ProtocolError, "agent-02 has checked step 0 but does not"),
        (lambda w: w.checked("agent-02", 5), ProtocolError, "agent-02 tells of 5 steps checked, which can't be"),
        (lambda w: w.items.append(Gone(name="agent-02", why="restarted")), SessionLost, "agent-02 is lost"),
        (
            lambda w: w.say("agent-02", m.SpdzAbort(session=SESSION, code="mac-check", reason="the MAC check failed")),
            MacCheckError,
            r"MacCheckError: agent-02: the MAC check failed \[mac-check\]",
        ),
        (
            lambda w: w.say("agent-02", m.SpdzAbort(session=SESSION, code="silence", reason="nothing came")),
            SessionLost,
            "agent-02: nothing came",
        ),
        (
            lambda w: w.say("agent-02", m.SpdzAbort(session=SESSION, code="os.system", reason="so there")),
            SessionAborted,
            r"agent-02: so there \[os.system\]",
        ),
    ],
)  # fmt: skip
def test_what_ends_a_session_and_who_is_named(spoil: Any, error: type[Exception], text: str) -> None:
    world = opened()
    for name in NAMES[:2]:
        world.checked(name, 1)
    spoil(world)
    with pytest.raises(error, match=text):
        world.play(world.session.advance(1))
    aborts = world.heard(m.SpdzAbort)
    assert {to for to, _ in aborts} == set(NAMES)  # everybody is told


def test_silence_names_who_is_behind() -> None:
    world = opened()
    for name in NAMES[:2]:
        world.checked(name, 1)
    with pytest.raises(SessionLost, match=r"step 0: nothing heard for 30 s from agent-02"):
        world.play(world.session.advance(1))


def test_words_of_another_session_are_not_heard() -> None:
    world = opened()
    other = m.SpdzAbort(session=bytes(16), code="mac-check", reason="old")
    world.say("agent-00", other)
    for name in NAMES:
        world.checked(name, 1)
    world.play(world.session.advance(1))


def retry(world: World, step: int, attempt: int, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        world.say(name, m.SpdzRetry(session=SESSION, step=step, attempt=attempt, where="gate 4"))


def test_a_retry_takes_everybody_and_deals_anew() -> None:
    world = opened()
    retry(world, 1, 0)
    for name in NAMES:
        world.checked(name, 1)
    world.play(world.session.advance(1))
    assert world.session.retries == 1
    restarts = world.heard(m.SpdzRestart)
    assert {to for to, _ in restarts} == set(NAMES)
    assert {(message.step, message.attempt) for _, message in restarts} == {(1, 1)}  # type: ignore[attr-defined]


def test_retries_are_capped() -> None:
    world = opened()
    for attempt in range(COMMAND.retries + 1):
        retry(world, 0, attempt)
    items, world.items = world.items, []

    def play_in_turns() -> None:
        generator = world.session.advance(1)
        value: Any = None
        while True:
            effect = generator.send(value)
            value = None
            if isinstance(effect, Hear):
                value = Heard(items=tuple(items[: len(NAMES)]))
                del items[: len(NAMES)]
            elif isinstance(effect, Meter):
                value = Metered(bytes_up=0, bytes_down=0, now_s=0.0)

    with pytest.raises(RetriesExhausted, match="step 0 met the edge of the ring 5 times, at most 4 are expected"):
        play_in_turns()


def test_what_a_report_allows_is_dealt_until_the_next_one_and_not_in_one_go() -> None:
    command = open_command(steps=40, ahead=8, checkpoints=(40,), outputs=(m.SpdzOutput(name="loss", receiver=SERVER),))
    world = World(command)
    world.play(world.session.open(VALUES))
    generator, value = world.session.advance(40), None
    times: dict[float, list[int]] = {}
    for reported_s, steps in ((1.0, 2), (1.4, 4), (1.8, 6), (2.2, 12), (2.6, 12)):
        while True:
            effect = generator.send(value)
            value = None
            if isinstance(effect, Meter):
                value = Metered(bytes_up=0, bytes_down=0, now_s=world.now_s)
            elif isinstance(effect, Tell) and isinstance(effect.message, m.SpdzCorrection):
                times.setdefault(round(world.now_s, 3), []).append(effect.message.step)
            elif isinstance(effect, Hear):
                if world.now_s + effect.wait_s >= reported_s:
                    break
                world.now_s += effect.wait_s
                value = Heard(items=())
        world.now_s = reported_s
        for name in NAMES:
            world.checked(name, steps, first=world.session.confirmed)
        value, world.items = Heard(items=tuple(world.items)), []
    assert list(times.items())[:5] == [(0.0, list(range(8))), (1.0, [8, 9]), (1.4, [10]), (1.55, [11]), (1.8, [12])]
    assert times[2.2] == [14, 15], "half of what may be dealt ahead was not there"
    assert [step for steps in times.values() for step in steps] == list(range(20))


def test_steps_that_were_not_dealt_can_not_be_checked() -> None:
    world = opened(dealt=1)
    world.checked("agent-00", 4)
    with pytest.raises(ProtocolError, match="agent-00 tells of 4 steps checked, which can't be"):
        world.play(world.session.advance(2))


def test_parties_that_meet_the_edge_at_different_places_are_found() -> None:
    world = opened()
    retry(world, 0, 0, NAMES[:2])
    retry(world, 1, 0, NAMES[2:])
    with pytest.raises(EquivocationError, match="the parties met the edge of the ring at different places"):
        world.play(world.session.advance(1))


@pytest.mark.parametrize(
    ("answers", "error", "text"),
    [
        (
            {"refusals": {"agent-01": "policy: a committee of 3 is too small"}},
            SessionRefused,
            "agent-01 refuses the session: policy: a committee of 3 is too small",
        ),
        ({"refusals": {"agent-01": "session-reused: it was used"}}, SessionRefused, "agent-01 refuses the session"),
        ({"refusals": {"agent-01": "busy: 4 sessions are open"}}, SessionLost, "agent-01 can't take part"),
        ({"missing": {"agent-01": "offline"}}, SessionLost, r"the session can't open; missing: agent-01 \(offline\)"),
    ],
)
def test_a_session_that_can_not_open_says_why(answers: dict[str, Any], error: type[Exception], text: str) -> None:
    world = World()
    world.answers = Answers(**{"replies": {}, "refusals": {}, "missing": {}, **answers})
    with pytest.raises(error, match=text) as caught:
        world.play(world.session.open(VALUES))
    assert getattr(caught.value, "exit_code", None) == (4 if error is SessionRefused else 3)
    assert world.heard(m.SpdzSetup) == []  # nobody has a secret
    assert len(world.heard(m.SpdzAbort)) == 3


def test_ready_for_another_session_is_no_answer() -> None:
    world = World()
    world.play(world.session.open(VALUES))
    check = world.asked[0].check
    assert check is not None
    with pytest.raises(Exception, match="is ready for another session"):
        check("agent-00", msgspec.structs.replace(world.ready(), digest=bytes(32)))


# --- the committee -------------------------------------------------------------------------------------------------


def test_the_committee_spans_zones_where_it_can() -> None:
    known = roster(
        entries=[
            entry(SERVER, roles=("server",)),
            *(entry(f"a-{k}", roles=("compute",), zone="north" if k < 3 else f"zone-{k}") for k in range(5)),
        ]
    )
    names = {f"a-{k}" for k in range(5)}
    assert choose(SpdzSpec(compute_agents=3, zones=3), known, names) == ("a-0", "a-3", "a-4")
    assert choose(SpdzSpec(compute_agents=2), known, {"a-1", "a-2"}) == ("a-1", "a-2")
    assert choose(SpdzSpec(compute_agents=3, zones=3), known, names - {"a-4"}) == ()  # wait for more
    assert choose(SpdzSpec(compute_agents=2), known, names, keep=("a-1", "a-2")) == ("a-1", "a-2")
    assert choose(SpdzSpec(compute_agents=2), known, names - {"a-2"}, keep=("a-1", "a-2")) == ()


def test_a_roster_that_can_not_give_the_committee_is_said_at_once() -> None:
    known = fleet_roster(zones=("a",))
    with pytest.raises(
        ConfigError, match="the job wants 4 compute agents in 1 zones; the roster of epoch 1 has 3 in 1"
    ):
        candidates(SpdzSpec(compute_agents=4), known)
    with pytest.raises(ConfigError, match="hub has not the role compute in the roster"):
        candidates(SpdzSpec(compute_agents=("agent-00", "hub")), known)
    assert FleetUnavailable.exit_code == 3
