"""The conductor: what counts as an answer, when waiting ends, interruption, errors."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import pytest

from helpers_server import PROGRAMS, Agent, Fleet, job_spec
from sordino_common import messages as m
from sordino_common.clock import VirtualLoop
from sordino_common.errors import (
    BudgetRefused,
    ConfigError,
    FleetUnavailable,
    LimitExceeded,
    LocalError,
    PolicyRefusal,
    RemoteError,
)
from sordino_server import conductor
from sordino_server.conductor import Conductor, Interrupted
from sordino_server.rounds.effects import (
    Answers,
    Ask,
    Effect,
    Gather,
    Hear,
    Present,
    Result,
    ask,
    begin,
    gather,
    hear,
    listen,
    look,
    meter,
    tell,
)
from sordino_server.rounds.events import Note, Waiting
from sordino_server.rounds.fedavg import federated_averaging
from sordino_server.rounds.roll import shortage


def question(names: tuple[str, ...], **fields: object) -> Ask:
    settings: dict[str, object] = {
        "purpose": "health", "messages": dict.fromkeys(names, m.Describe()), "expects": m.Described, "quorum": 1,
        "deadline_s": 30.0, "straggler_s": 5.0,
    }  # fmt: skip
    return Ask(**{**settings, **fields})  # type: ignore[arg-type]


def run(fleet: Fleet, effect: Ask) -> Answers:
    fleet.conductor.start(ask(effect))
    fleet.finish(within_s=1000.0)
    answers = fleet.conductor.result()
    assert isinstance(answers, Answers)
    return answers


def test_answers_refusals_and_missing() -> None:
    def refuse(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        return m.Refused(command="describe", code="policy", reason="not today")

    def wrong(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        return m.PlanReady(plan_id=b"\0" * 32, peak_bytes=0, flops=0)

    fleet = Fleet(
        [Agent("a"), Agent("b", answer=refuse), Agent("c", answer=wrong), Agent("d", online=False), Agent("e")]
    )

    def check(name: str, reply: m.Message) -> None:
        if name == "e":
            raise RemoteError("I don't believe it")

    answers = run(fleet, question(("a", "b", "c", "d", "e"), check=check))
    assert set(answers.replies) == {"a"}
    assert answers.refusals == {
        "b": "policy: not today",
        "c": "answered with plan-ready, expected described",
        "e": "I don't believe it",
    }
    assert answers.missing == {"d": "offline"}
    assert fleet.loop.now_s() < 1.0  # nobody to wait for


def test_a_reply_to_another_question_does_not_count() -> None:
    fleet = Fleet([Agent("a", delay_s=3.0), Agent("b")])
    first = run(fleet, question(("a", "b"), straggler_s=1.0))
    assert first.missing == {"a": "no answer within 1 s of the quorum"}
    second = run(fleet, question(("a",), quorum=1, deadline_s=2.5))  # a's first answer arrives in here
    assert second.replies == {}
    assert second.missing == {"a": "no answer within 2.5 s"}


def test_what_was_told_is_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dealer tells as many corrections as a run has steps."""
    monkeypatch.setattr(conductor, "_TOLD_MOST", 3)

    def stream() -> Generator[Effect, Result, list[bytes]]:
        yield from listen(frozenset({"a"}))
        told = []
        for _ in range(10):
            told.append((yield from tell("a", m.Describe())))
            yield from hear(Hear(purpose="answers", wait_s=1.0))
        return told

    fleet = Fleet([Agent("a")])
    fleet.conductor.start(stream())
    fleet.finish(within_s=1000.0)
    assert list(fleet.conductor._told) == fleet.conductor.result()[-3:]


def test_a_wait_for_delivery_ends_when_all_that_was_told_has_arrived_or_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`a` takes 1 and 3 s, `b` can't be reached, `c` takes nothing at all."""
    fleet = Fleet([Agent("a"), Agent("b"), Agent("c")])
    send, delays = fleet.send, iter((1.0, 3.0))

    def slow(to: str, message: m.Message, **fields) -> bytes:  # type: ignore[no-untyped-def]
        if to == "c":
            raise LimitExceeded("too much waits for c")
        outcome, delay_s = fields["on_outcome"], next(delays) if to == "a" else 2.0
        fleet.at(delay_s, lambda: outcome(to == "a", "" if to == "a" else "no"))
        return send(to, message, **fields)

    monkeypatch.setattr(fleet, "send", slow)
    seen: list[tuple[float, int, tuple[str, ...]]] = []

    def wait(delivered: bool) -> Generator[Effect, Result, None]:
        items = yield from hear(Hear(purpose="arrival", wait_s=10.0, delivered=delivered))
        metered = yield from meter()
        seen.append((metered.now_s, metered.under_way, tuple(item.name for item in items)))

    def play() -> Generator[Effect, Result, None]:
        yield from listen(frozenset("b"))
        for name in "aabc":
            yield from tell(name, m.Health())
        assert (yield from meter()).under_way == 3
        for _ in range(3):
            yield from wait(True)
        yield from wait(False)

    fleet.conductor.start(play())
    fleet.finish(within_s=100.0)
    fleet.conductor.result()
    assert seen == [(2.0, 1, ("b",)), (3.0, 0, ()), (3.0, 0, ()), (13.0, 0, ())]


def test_what_was_told_before_listening_began_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last words of a session to who has left it are under way for minutes; the next session begins without it."""
    fleet = Fleet([Agent("a"), Agent("b")])
    send = fleet.send

    def slow(to: str, message: m.Message, **fields) -> bytes:  # type: ignore[no-untyped-def]
        outcome, is_there = fields["on_outcome"], to == "a"
        fleet.at(1.0 if is_there else 2.0, lambda: outcome(is_there, "" if is_there else "expired"))
        return send(to, message, **fields)

    monkeypatch.setattr(fleet, "send", slow)
    seen: list[tuple[float, int]] = []

    def play() -> Generator[Effect, Result, None]:
        yield from listen(frozenset("b"))
        yield from tell("b", m.Health())
        yield from listen(frozenset("a"))
        yield from tell("a", m.Health())
        for wait_s in (100.0, 5.0):
            yield from hear(Hear(purpose="arrival", wait_s=wait_s, delivered=wait_s == 100.0))
            metered = yield from meter()
            seen.append((metered.now_s, metered.under_way))

    fleet.conductor.start(play())
    fleet.finish(within_s=200.0)
    fleet.conductor.result()
    assert seen == [(1.0, 0), (6.0, 0)]  # what is given up later counts for nothing


def test_a_command_that_could_not_be_delivered_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet([Agent("a"), Agent("b"), Agent("c")])
    outcomes: dict[str, Callable[[bool, str], None]] = {}
    send = fleet.send

    def failing(to: str, message: m.Message, **fields) -> bytes:  # type: ignore[no-untyped-def]
        if to == "c":
            raise LimitExceeded("1 MB, the link takes 64 kB")
        outcomes[to] = fields["on_outcome"]
        return send(to, message, **fields) if to == "a" else b"\1" * 16

    monkeypatch.setattr(fleet, "send", failing)
    fleet.conductor.attach(fleet, members=lambda: ("a", "b", "c"), traffic=lambda: (0, 0))
    fleet.at(0.05, lambda: outcomes["b"](False, "b refused it: too large"))
    answers = run(fleet, question(("a", "b", "c")))
    assert set(answers.replies) == {"a"}
    assert answers.missing == {"b": "b refused it: too large", "c": "1 MB, the link takes 64 kB"}
    outcomes["b"](False, "again")  # of no question now
    outcomes["a"](True, "")


def test_what_goes_behind_a_question_is_sent_with_it_and_waited_for() -> None:
    def refuse(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        return m.Refused(command="describe", code="policy", reason="no") if isinstance(message, m.Describe) else reply

    def late(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        agent.delay_s = 2.0 if isinstance(message, m.Describe) else 1.0  # what is behind is answered first
        return reply

    agents = [Agent("a"), Agent("b", answer=refuse), Agent("c", answer=late), Agent("d"), Agent("e", online=False)]
    fleet, behind = Fleet(agents), m.PlanPut(plan=b"train")
    answers = run(fleet, question(("a", "b", "c", "d", "e"), quorum=5, behind=dict.fromkeys("abce", behind)))
    assert list(answers.replies) == ["a", "c", "d"]
    assert (answers.refusals, answers.missing) == ({"b": "policy: no"}, {"e": "offline"})
    assert {name: reply.kind for name, reply in answers.behind.items()} == dict.fromkeys("abc", "plan-ready")
    assert 2.0 <= fleet.loop.now_s() < 3.0
    assert [agent.seen for agent in agents[:4]] == [*[[m.Describe(), behind]] * 3, [m.Describe()]]


def test_something_may_go_behind_a_question_that_is_asked_already() -> None:
    def deaf(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        agent.delay_s = 1.0
        return reply

    agents = [Agent("a", answer=deaf), Agent("b", answer=deaf), Agent("c")]
    fleet, behind = Fleet(agents), m.PlanPut(plan=b"train")
    sent: list[bool] = []

    def later() -> None:
        sent.extend(fleet.conductor.also(name, behind) for name in ("a", "a", "c", "stranger"))

    fleet.at(0.5, later)
    assert not fleet.conductor.also("a", behind)  # nobody asks
    answers = run(fleet, question(("a", "b", "c"), quorum=3))
    assert sent == [True, False, False, False]  # one is enough; c has answered
    assert list(answers.replies) == ["a", "b", "c"]
    assert {name: reply.kind for name, reply in answers.behind.items()} == {"a": "plan-ready"}
    assert [len(agent.seen) for agent in agents] == [2, 1, 1]
    assert not fleet.conductor.also("b", behind)


def test_an_answer_counts_if_what_is_behind_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet([Agent("a", mute=(m.PlanPut,)), Agent("b", mute=(m.PlanPut,)), Agent("c", mute=(m.Describe,))])
    send = fleet.send

    def failing(to: str, message: m.Message, **fields) -> bytes:  # type: ignore[no-untyped-def]
        if to == "b" and isinstance(message, m.PlanPut):
            raise LimitExceeded("too much waits for b")
        return send(to, message, **fields)

    monkeypatch.setattr(fleet, "send", failing)
    fleet.at(1.0, lambda: fleet.die("a"))
    behind = dict.fromkeys("abc", m.PlanPut(plan=b"train"))
    answers = run(fleet, question(("a", "b", "c"), quorum=3, deadline_s=20.0, straggler_s=20.0, behind=behind))
    assert list(answers.replies) == ["a", "b"]
    assert answers.missing == {"c": "no answer within 20 s"}
    assert list(answers.behind) == ["c"]


def test_while_the_broker_is_away_nobody_counts_as_gone() -> None:
    fleet = Fleet([Agent("a"), Agent("b", delay_s=8.0)])
    fleet.at(0.5, lambda: fleet.conductor.on_connection(False, "connection reset"))
    fleet.at(0.6, lambda: fleet.conductor.on_presence("b", False, 1))
    fleet.at(7.0, lambda: fleet.conductor.on_connection(True, ""))
    fleet.at(7.1, lambda: fleet.conductor.on_presence("b", True, 1))
    answers = run(fleet, question(("a", "b"), quorum=2))
    assert set(answers.replies) == {"a", "b"}
    notes = [note.text for note in fleet.told(Note)]
    assert [note for note in notes if "broker" in note] == [
        "the broker is away: connection reset",
        "the broker is back",
    ]


def test_waiting_is_never_silent() -> None:
    fleet = Fleet([Agent("a"), Agent("b", mute=(m.Describe,))])
    run(fleet, question(("a", "b"), quorum=2, deadline_s=22.0))
    waits = fleet.told(Waiting)
    assert [round(event.waited_s) for event in waits] == [5, 10, 15, 20]
    assert all((event.names, event.have, event.quorum) == (("b",), 1, 2) for event in waits)


def test_gather_takes_the_quorum_after_the_join_time() -> None:
    fleet = Fleet([Agent("a"), Agent("b"), Agent("c", online=False)])

    def wait(quorum: int) -> tuple[Present, float]:
        effect = Gather(purpose="x", without=frozenset(), quorum=quorum, join_s=4.0, deadline_s=9.0)
        began_s = fleet.loop.now_s()
        fleet.conductor.start(gather(effect))
        fleet.finish(within_s=1000.0)
        return fleet.conductor.result(), fleet.loop.now_s() - began_s

    present, took_s = wait(2)
    assert (sorted(present.boots), took_s) == (["a", "b"], 4.0)
    assert wait(3)[1] == 9.0
    fleet.at(fleet.loop.now_s() + 1.0, lambda: fleet.come_back("c"))
    present, took_s = wait(3)
    assert (present.boots["c"], took_s) == (2, 1.0)


def test_late_deaths_of_older_boots_do_not_matter() -> None:
    fleet = Fleet([Agent("a")])
    fleet.conductor.on_presence("a", True, 5)
    fleet.conductor.on_presence("a", False, 4)
    assert fleet.conductor.online == {"a": 5}
    fleet.conductor.on_presence("stranger", True, 1)
    assert "stranger" not in fleet.conductor.online


def test_interruption_cancels_and_ends_in_order() -> None:
    fleet = Fleet([Agent("a", delay_s=5.0), Agent("b", delay_s=5.0)])
    closed = []

    def generator() -> Generator[Effect, Result, None]:
        try:
            yield from ask(question(("a", "b")))
        finally:
            closed.append(True)

    fleet.conductor.start(generator(), run="toy-1")
    fleet.loop.advance(1.0)
    fleet.conductor.interrupt("stopped by SIGINT")
    fleet.conductor.interrupt("again")
    assert fleet.conductor.done
    assert closed == [True]
    with pytest.raises(Interrupted, match="stopped by SIGINT; go on with --resume toy-1") as caught:
        fleet.conductor.result()
    assert caught.value.exit_code == 130
    fleet.loop.advance(20.0)
    for agent in fleet.agents.values():
        assert agent.seen[-1] == m.Cancel(run="toy-1", round=None)


def test_interrupted_training_keeps_its_last_round() -> None:
    fleet = Fleet([Agent("a"), Agent("b")])
    saved = []
    generator = federated_averaging(
        job_spec(rounds=50), run="toy-1", programs=PROGRAMS, params=(np.zeros(2, np.float32),)
    )
    fleet.conductor.start(generator, run="toy-1", save=saved.append)
    fleet.loop.run_until(lambda: len(saved) == 3, deadline_s=100.0)
    fleet.conductor.interrupt("stop")
    fleet.loop.advance(100.0)
    assert len(saved) == 3


def test_the_generators_error_is_the_result() -> None:
    fleet = Fleet([Agent("a")])

    def generator() -> Generator[Effect, Result, None]:
        yield from look()
        raise ConfigError("no")

    fleet.conductor.start(generator())
    fleet.finish()
    with pytest.raises(ConfigError, match="no"):
        fleet.conductor.result()
    fleet.conductor.start(meter())  # the conductor takes the next one
    fleet.finish()
    assert fleet.conductor.result().bytes_up == 0


def test_contract_of_the_conductor() -> None:
    conductor = Conductor(loop=VirtualLoop())
    with pytest.raises(LocalError, match="before attach"):
        conductor.start(look())
    fleet = Fleet([Agent("a", delay_s=5.0)])
    fleet.conductor.start(ask(question(("a",))))
    with pytest.raises(LocalError, match="another generator"):
        fleet.conductor.start(look())
    with pytest.raises(LocalError, match="before the end"):
        fleet.conductor.result()


def test_who_can_not_afford_it_is_told_apart() -> None:
    def refuse(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        return m.Refused(command="describe", code="budget", reason="epsilon 0.7 of 1.0 is spent, this costs 0.4")

    answers = run(Fleet([Agent("a"), Agent("b", answer=refuse)]), question(("a", "b")))
    assert answers.unaffordable == {"b"} and answers.forbidden == frozenset()


@pytest.mark.parametrize(
    ("missing", "forbidden", "unaffordable", "lacking", "kind"),
    [
        ("abc", "", "ab", 2, BudgetRefused),  # they would have been enough
        ("abc", "", "a", 2, FleetUnavailable),  # c is missing as well
        ("abc", "bc", "a", 2, BudgetRefused),  # nobody is missing for another reason
        ("bc", "bc", "", 2, PolicyRefusal),
        ("bc", "bc", "a", 1, PolicyRefusal),  # a has answered in the end
        ("bc", "b", "", 1, FleetUnavailable),
        ("", "", "", 1, FleetUnavailable),
    ],
)
def test_what_a_shortage_is_a_matter_of(
    missing: str, forbidden: str, unaffordable: str, lacking: int, kind: type[Exception]
) -> None:
    error = shortage("too few.", missing=set(missing), forbidden=set(forbidden), unaffordable=set(unaffordable),
                     lacking=lacking)  # fmt: skip
    assert type(error) is kind
    if kind is BudgetRefused:
        names = ", ".join(sorted(set(unaffordable)))
        assert str(error) == f"too few. The privacy budget of {names} can't pay for it."
        assert error.exit_code == 5


def test_releases_are_counted_before_the_generator_goes_on() -> None:
    fleet, seen = Fleet([Agent("a")]), []

    def generator() -> Generator[Effect, Result, str]:
        yield from begin(3)
        return f"begun: {seen}"

    fleet.conductor.start(generator(), begin=seen.append)
    fleet.finish()
    assert fleet.conductor.result() == "begun: [3]"
    fleet.conductor.start(generator())
    fleet.finish()
    with pytest.raises(LocalError, match="without a store for the count"):
        fleet.conductor.result()
