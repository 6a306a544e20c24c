"""The leader's generator, fed by a script: counts of messages, order, time; up to 10,000 contributors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np
import pytest

from helpers_channel import entry, roster
from helpers_sums import Helper, contribution_of, names, noise_of, rounded_gaussian, seeded, vectors
from sordino_common import messages as m
from sordino_common.aggregate.contributor import mask
from sordino_common.aggregate.seeds import read_seed
from sordino_common.channel.roster import Roster
from sordino_common.errors import ConfigError, FleetUnavailable, RemoteError
from sordino_server.rounds.effects import (
    Effect,
    Gather,
    Gone,
    Hear,
    Heard,
    Listen,
    Look,
    Meter,
    Metered,
    NextSum,
    Numbered,
    Present,
    Report,
    Result,
    Said,
    Sent,
    Tell,
)
from sordino_server.rounds.events import Event, Note
from sordino_server.rounds.releases import Releases
from sordino_server.rounds.secure_sum import SumRequest, SumResult, largest_device, secure_sum
from sordino_server.rounds.spdz import World

HELPERS = ("helper-0", "helper-1", "helper-2")


def fleet(server_zone: str = "default") -> Roster:
    return roster(
        entries=[
            entry("hub", roles=("server",), zone=server_zone),
            *(entry(name, roles=("helper",), zone=f"zone-{k}") for k, name in enumerate(HELPERS)),
        ]
    )


@dataclass
class Team:
    """A roll whose members are always ready."""

    members: list[str]
    need: int
    forgotten: list[str] = field(default_factory=list)

    def assemble(self, round_: int) -> Generator[Effect, Result, tuple[tuple[str, ...], int]]:
        yield Meter()
        return tuple(self.members), self.need

    def forget(self, name: str) -> None:
        self.forgotten.append(name)


@dataclass(frozen=True)
class Ask:
    """A command without anything to learn."""

    terms: m.SumTerms


@dataclass
class Script:
    """Plays contributors and helpers. `batch`: how many answers are heard at a time. `mute`: who never answers;
    `slow_s`: who answers so much later. `lies`: who adds what to every entry. A second passes with every `Hear`."""

    x: dict[str, np.ndarray]
    batch: int = 50
    mute: frozenset[str] = frozenset()
    slow_s: dict[str, float] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    now_s: float = 0.0
    told: list[tuple[str, m.Message]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    listened: frozenset[str] = frozenset()
    queue: deque[tuple[float, Said | Gone]] = field(default_factory=deque)
    helpers: dict[tuple[bytes, str], Helper] = field(default_factory=dict)
    online: tuple[str, ...] = HELPERS
    server_zone: str = "default"
    lies: dict[str, int] = field(default_factory=dict)
    sums: int = 0

    def run(self, generator: Generator[Effect, Result, SumResult]) -> SumResult:
        result: Result = None
        while True:
            try:
                effect = generator.send(result)
            except StopIteration as stop:
                done: SumResult = stop.value
                return done
            result = self.perform(effect)

    def perform(self, effect: Effect) -> Result:
        match effect:
            case Look() | Gather():
                return Present(boots={}, members=frozenset(self.x), others=dict.fromkeys(self.online, 1))
            case Meter():
                return Metered(bytes_up=0, bytes_down=0, now_s=self.now_s)
            case NextSum():
                self.sums += 1
                return Numbered(index=self.sums)
            case Listen(names=listened):
                self.listened = listened
                self.queue.clear()
            case Tell(to=to, message=message):
                correlation = len(self.told).to_bytes(8, "big")
                self.told.append((to, message))
                self.answer(to, message, correlation)
                return Sent(correlation=correlation)
            case Hear(wait_s=wait_s):
                return self.hear(wait_s)
            case Report(event=event):
                self.events.append(event)
            case _:
                raise AssertionError(f"unexpected {effect}")
        return None

    def hear(self, wait_s: float) -> Heard:
        """What is due; if nothing is, time passes."""
        items = []
        while self.queue and self.queue[0][0] <= self.now_s and len(items) < self.batch:
            items.append(self.queue.popleft()[1])
        if not items:
            due_s = min((at_s for at_s, _ in self.queue), default=float("inf"))
            self.now_s = min(self.now_s + wait_s, due_s)
            self.queue = deque(sorted(self.queue, key=lambda item: item[0]))
            if due_s <= self.now_s:
                items.append(self.queue.popleft()[1])
        return Heard(items=tuple(items))

    def answer(self, to: str, message: m.Message | Ask, correlation: bytes) -> None:
        reply: m.Message | None = None
        match message:
            case Ask(terms=terms):
                masked = mask(self.x[to], terms, contributor=to, random=seeded(len(self.told)))
                words = masked.words + np.int64(self.lies.get(to, 0)).astype(masked.words.dtype)
                reply = contribution_of(terms, words, [seed.expose() for seed in masked.seeds])
            case m.SumSeeds(terms=terms, seeds=seeds):
                helper = self.helpers.setdefault(
                    (terms.session, to), Helper(to, terms, frozenset(self.x), draw=rounded_gaussian(int(to[-1]) + 10))
                )
                assert len(seeds) <= 64
                assert all(read_seed(one.box, terms.digest) is not None for one in seeds)
                reply = helper.check({one.name: one.box for one in seeds})
            case m.SumCut(session=session):
                reply = self.helpers[session, to].answer(message)
            case m.Cancel():
                pass
            case _:
                raise AssertionError(message.kind)
        assert to in self.listened
        at_s = self.now_s + self.slow_s.get(to, 0.0)
        if to in self.gone:
            self.queue.append((at_s, Gone(name=to, why=self.gone[to])))
        elif reply is not None and to not in self.mute:
            self.queue.append((at_s, Said(name=to, message=reply, correlation=correlation)))

    def notes(self) -> str:
        return "\n".join(event.text for event in self.events if isinstance(event, Note))


def world(known: Roster) -> World:
    return World(server="hub", roster=lambda: known, random=seeded(5), stopwatch=lambda: 0.0)


def request(**changes: object) -> SumRequest:
    fields: dict[str, object] = {
        "purpose": "a test", "round": 3, "command": Ask, "length": 5, "bound": 1000, "minimum": 3, "helpers": 2,
        "deadline_s": 100.0, "straggler_s": 10.0, "retries": 2,
    }  # fmt: skip
    return SumRequest(**{**fields, **changes})  # type: ignore[arg-type]


def play(
    script: Script, *, need: int = 3, draw: Callable[[int, int], np.ndarray] = rounded_gaussian(2), **changes: object
) -> SumResult:
    team, known = Team(sorted(script.x), need), world(fleet(script.server_zone))
    return script.run(secure_sum(team, request(**changes), run="toy-1", world=known, draw=draw))  # type: ignore[arg-type]


def data(count: int, length: int = 5, bound: int = 1000) -> dict[str, np.ndarray]:
    return dict(zip(names(count), vectors(count, length, bound=bound), strict=True))


@pytest.mark.parametrize("count", [10, 100, 1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_sum_is_exact_and_messages_are_counted(count: int) -> None:
    """With a third of the devices silent. Per device a command and an answer; per helper one message for up to 64."""
    x = data(count)
    silent = frozenset(name for k, name in enumerate(x) if k % 3 == 1)
    script = Script(x, mute=silent, batch=64)
    result = play(script, need=count // 2)
    assert result.vector.tolist() == sum(x[name] for name in x if name not in silent).tolist()
    assert result.members == tuple(sorted(x.keys() - silent))
    assert result.missing == silent
    assert set(result.excluded.values()) == {"no answer in time after the quorum"}
    kinds = [type(message) for _, message in script.told]
    answered = count - len(silent)
    assert kinds.count(Ask) == count
    assert kinds.count(m.SumCut) == 2
    assert 2 * -(-answered // 64) <= kinds.count(m.SumSeeds) <= 2 * (-(-answered // 64) + count // 64 + 2)
    assert kinds.count(m.Cancel) == len(silent)
    assert script.now_s == 10.0  # the straggler's time and no more


def test_all_noise_is_in_the_sum_and_said() -> None:
    x = data(6, length=4000)
    result = play(Script(x), length=4000, noise=m.SumNoise(sigma_squared=400), bound=1000)
    error = result.vector - sum(x.values())
    assert result.aggregators == 3
    assert result.terms.noise == m.SumNoise(sigma_squared=400)
    assert abs(error.var() / 1200 - 1) < 0.2  # its deviation is 2.2 %
    assert play(Script(x), length=4000).aggregators == 0


def test_without_a_quorum_it_waits_until_the_deadline() -> None:
    x = data(6)
    script = Script(x, mute=frozenset(names(4)))
    with pytest.raises(FleetUnavailable, match=r"no sum in 3 attempts; missing: agent-00000 \(no answer in time\)"):
        play(script)
    assert script.now_s == 300.0
    assert script.sums == 3
    sessions = {message.terms.session for _, message in script.told if isinstance(message, Ask)}
    assert len(sessions) == 3


def test_a_straggler_within_its_time_is_in() -> None:
    x = data(6)
    script = Script(x, slow_s={"agent-00005": 9.0})
    assert play(script).members == tuple(x)
    late = Script(x, slow_s={"agent-00005": 11.0})
    assert play(late).members == tuple(names(5))
    assert ("agent-00005", m.Cancel(run="toy-1", round=3)) in late.told


def test_helpers_are_chosen_from_different_zones_and_replaced_when_lost() -> None:
    x = data(6)
    script = Script(x, gone={"helper-1": "went offline"})
    result = play(script)
    assert result.terms.helpers == ("helper-0", "helper-2")
    assert (result.attempts, result.terms.index) == (2, 2)
    assert "helper helper-1 is lost: went offline; 2 attempts left" in script.notes()
    with pytest.raises(FleetUnavailable, match=r"wants 2 helpers.*helper-1 in zone-1 \(offline\)"):
        play(Script(x, online=("helper-0",)))


@pytest.mark.parametrize("size", [20_000, -(1 << 29)])
def test_a_sum_that_honest_devices_can_t_have_is_refused(size: int) -> None:
    """A device may mask any vector, within its own bound or not: what sticks out of the sum is seen, not who it was."""
    lying = Script(data(6), lies={"agent-00002": size})
    with pytest.raises(
        RemoteError, match=r"an entry of the sum is .*, and 6 honest contributions reach 6000 at most: a"
    ):
        play(lying)


def test_a_device_that_states_absurdly_many_rows_is_named_as_the_reason() -> None:
    """Its word widens the bound of everybody's entries: no configuration of ours is at fault."""
    with pytest.raises(
        ConfigError, match=r"a test: .* is that of a device with 1099511627776 rows.*rows_per_agent lea"
    ):
        play(Script(data(6)), bound=1 << 61, remedy=largest_device(1 << 40))


def test_a_void_noised_sum_says_what_it_has_cost() -> None:
    releases = Releases(planned=5, begun=2)
    script = Script(data(6), gone={"helper-1": "went offline"})
    play(script, releases=releases, noise=noise_of(4))
    paid = "it is paid for all the same: 2 of the 5 noised releases that epsilon is planned for have begun, and the bud"
    assert f"2 attempts left; {paid}gets of the 6 devices that contributed are charged" in script.notes()
    with pytest.raises(FleetUnavailable, match=r"no sum in 1 attempt; missing: .*; it is paid for all .* 2 of the 5"):
        play(Script(data(6), mute=frozenset(names(4))), releases=releases, noise=noise_of(4), retries=0)
    script = Script(data(6), gone={"helper-1": "went offline"})
    play(script)
    assert "paid" not in script.notes(), "an exact sum costs nothing"


def test_no_helper_is_chosen_from_the_servers_zone() -> None:
    script = Script(data(6), server_zone="zone-0")
    assert play(script).terms.helpers == ("helper-1", "helper-2")
    with pytest.raises(FleetUnavailable, match=r"helper-0 in zone-0 \(online, the zone of this server\), helper-1 in"):
        play(Script(data(6), server_zone="zone-0", online=("helper-0", "helper-1")))


def test_a_device_that_is_gone_is_not_waited_for() -> None:
    script = Script(data(6), gone={"agent-00001": "restarted"})
    result = play(script)
    assert result.excluded == {"agent-00001": "restarted"}
    assert script.now_s == 0.0
