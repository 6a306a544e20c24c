"""One secure sum over the fleet: Σ_U x_i (+ noise), and of single devices nothing.

    choose     who contributes (the roll says), who helps: online, role helper, each in a zone of its own, not in ours
    ask        every contributor gets its command, with the terms in it
    relay      each contribution's boxes go to the helpers at once; its vector is added when all of them hold its seeds
    cut        when all have settled, or the straggler's time after the quorum is over, or at the deadline
    shares     one of each helper

A helper that refuses, is lost or says something else voids the sum: the next attempt takes another one, and a fresh
session, number and seeds. So does a sum of too few. Messages per attempt: one each way per contributor; per helper one
each way for up to 64 contributors, and one each way for the cut. Memory: `aggregate.leader`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from sordino_common.aggregate.leader import LeaderSum, NotTaken
from sordino_common.aggregate.masks import DrawNoise
from sordino_common.aggregate.terms import choose_bits, largest_sum
from sordino_common.channel.roster import Roster
from sordino_common.errors import BudgetRefused, ConfigError, FleetUnavailable, PolicyRefusal, RemoteError
from sordino_common.messages import (
    Cancel,
    Contribution,
    Message,
    Refused,
    SealedSeed,
    SumNoise,
    SumSeeds,
    SumSeedsChecked,
    SumShare,
    SumTerms,
)
from sordino_common.messages.sums import SEEDS_AT_ONCE
from sordino_common.privacy.discrete_gaussian import discrete_gaussian
from sordino_server.rounds.effects import (
    Effect,
    Gather,
    Gone,
    Hear,
    Result,
    Said,
    gather,
    hear,
    listen,
    look,
    meter,
    next_sum,
    report,
    tell,
)
from sordino_server.rounds.events import Answered, Note, Outcome, RoundStarted
from sordino_server.rounds.releases import Releases
from sordino_server.rounds.roll import Names, Roll, shortage
from sordino_server.rounds.spdz import World
from sordino_server.waits import printable

I64 = npt.NDArray[np.int64]
_MOST_SECONDS: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class SumRequest:
    """`command(terms)`: what contributors are asked. `bound`: no entry of a contribution is larger in size.

    `choose(names, attempt)`: whom to ask of those who are ready. `deadline_s`: of the whole sum, per attempt;
    `straggler_s`: after the quorum. `announce`: an attempt is an attempt at the round, for observers. `releases`: of a
    noised sum; an attempt is one of them, whatever comes of it. `remedy`: for an error that says that no words hold the
    sum."""

    purpose: str
    round: int
    command: Callable[[SumTerms], Message]
    length: int
    bound: int
    minimum: int
    helpers: int
    deadline_s: float
    straggler_s: float
    retries: int
    noise: SumNoise | None = None
    bits: int | None = None
    choose: Callable[[Names, int], Names] = lambda names, attempt: names
    announce: bool = False
    releases: Releases | None = None
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SumResult:
    """`vector`: int64[length], decoded. `terms`, `command`: of the attempt that succeeded. `excluded`: who was asked
    and is not in the sum, and why; `missing`: those of them who did not answer. `seconds`: the members' own time.
    `aggregators`: how many added the terms' noise."""

    vector: I64
    terms: SumTerms
    command: Message
    members: Names
    excluded: Mapping[str, str]
    missing: frozenset[str]
    seconds: Mapping[str, float]
    attempts: int

    @property
    def aggregators(self) -> int:
        return 0 if self.terms.noise is None else len(self.terms.helpers) + 1


class _Void(Exception):
    """An attempt came to nothing. `helper`: who is to blame, if one is."""

    def __init__(self, text: str, *, helper: str | None = None) -> None:
        super().__init__(text)
        self.helper = helper


def secure_sum(
    roll: Roll, request: SumRequest, *, run: str, world: World, draw: DrawNoise | None = None
) -> Generator[Effect, Result, SumResult]:
    """The sum. Raises `shortage` if there was none after `retries` repetitions, `ConfigError` for a bound that no words
    hold. `draw`: the server's own noise; by default the exact discrete Gaussian from `world.random`."""
    drawn = draw or (lambda sigma_squared, count: discrete_gaussian(sigma_squared, count, world.random))
    lost: dict[str, str] = {}
    last: _Attempt | None = None
    for attempt in range(request.retries + 1):
        names, need = yield from roll.assemble(request.round)
        names = request.choose(names, attempt)
        if len(names) < request.minimum:
            raise FleetUnavailable(
                f"{request.purpose}: {len(names)} agents can contribute, a sum takes at least {request.minimum}"
            )
        helpers = yield from _helpers(request, world.roster(), lost)
        terms = SumTerms(
            session=world.random(16),
            run=run,
            index=(yield from next_sum()),
            purpose=request.purpose,
            bits=_bits(request, most=len(names), helpers=len(helpers)),
            length=request.length,
            bound=request.bound,
            helpers=helpers,
            minimum=request.minimum,
            most=len(names),
            noise=request.noise,
        )
        if request.announce:
            yield from report(RoundStarted(round=request.round, attempt=attempt, asked=names))
        quorum = min(len(names), max(need, request.minimum))
        last = _Attempt(request=request, terms=terms, names=names, quorum=quorum, command=request.command(terms))
        try:
            yield from last.play(run)
        except _Void as void:
            yield from listen(frozenset())
            if void.helper is not None:
                lost[void.helper] = str(void)
            for name in last.refused:
                roll.forget(name)  # describe and prepare it anew before it is asked again
            left = f"{request.retries - attempt} attempts left" if attempt < request.retries else "no attempt left"
            yield from report(Note(text=f"{request.purpose}: {void}; {left}{_paid(request, last)}", level="warning"))
        else:
            yield from listen(frozenset())
            return (yield from _done(roll, request, last, attempt + 1, drawn))
    assert last is not None
    raise _no_sum(request, last, lost)


def _bits(request: SumRequest, *, most: int, helpers: int) -> Literal[32, 64]:
    """Raises `ConfigError` with the request's remedy."""
    try:
        return choose_bits(
            bound=request.bound,
            most=most,
            length=request.length,
            helpers=helpers,
            noise=request.noise,
            bits=request.bits,
        )
    except ConfigError as error:
        raise ConfigError(f"{request.purpose}: {error}{request.remedy}") from None


def largest_device(most_rows: int) -> str:
    """The remedy where the bound grows with the rows that a device states."""
    return (
        f". The bound is that of a device with {most_rows} rows, the most that any of them states: "
        "limits.rows_per_agent leaves larger ones out"
    )


def _done(
    roll: Roll, request: SumRequest, attempt: _Attempt, attempts: int, draw: DrawNoise
) -> Generator[Effect, Result, SumResult]:
    leader = attempt.leader
    vector = leader.result(draw)
    _require_possible(vector, attempt.terms, len(leader.members))
    excluded = dict(sorted(leader.excluded.items()))
    for name, why in excluded.items():
        if name in attempt.refused:
            roll.forget(name)
        yield from report(Note(text=f"{request.purpose}: without {name}: {why}", level="warning"))
    return SumResult(
        vector=vector,
        terms=attempt.terms,
        command=attempt.command,
        members=leader.members,
        excluded=excluded,
        missing=frozenset(excluded.keys() & attempt.absent),
        seconds={name: attempt.seconds[name] for name in leader.members},
        attempts=attempts,
    )


def _require_possible(vector: I64, terms: SumTerms, members: int) -> None:
    """Raise `RemoteError` for a sum that is not one of honest contributions and shares: beyond what so many of them can
    reach, noise included, but for a chance below 2^-60."""
    most = largest_sum(
        bound=terms.bound, most=members, length=terms.length, helpers=len(terms.helpers), noise=terms.noise
    )
    found = int(max(int(vector.max()), -int(vector.min())))
    if found > most:
        raise RemoteError(
            f"{terms.purpose}: an entry of the sum is {found}, and {members} honest contributions reach {most} at "
            "most: a device or a helper lies, and a sum can't tell who. The last checkpoint is kept."
        )


def _paid(request: SumRequest, last: _Attempt) -> str:
    """What an attempt at a noised sum has cost, although nothing came of it."""
    if request.releases is None:
        return ""
    gave = len(last.seconds)
    return (
        f"; it is paid for all the same: {request.releases.told}, and the budgets of the {gave} "
        f"device{'s' if gave != 1 else ''} that contributed are charged"
    )


def _no_sum(
    request: SumRequest, last: _Attempt, lost: Mapping[str, str]
) -> RemoteError | FleetUnavailable | BudgetRefused:
    reasons = {**last.leader.excluded, **{f"helper {name}": why for name, why in lost.items()}}
    detail = ", ".join(f"{name} ({why})" for name, why in sorted(reasons.items())) or "nobody"
    tries = "1 attempt" if request.retries == 0 else f"{request.retries + 1} attempts"
    text = (
        f"{request.purpose}: no sum in {tries}; missing: {detail}{_paid(request, last)}. The last checkpoint is kept: "
        "go on with --resume."
    )
    return shortage(
        text,
        missing=last.leader.excluded.keys() | (set() if not lost else {"a helper"}),
        forbidden=last.forbidden,
        unaffordable=last.unaffordable,
        lacking=max(1, last.quorum - len(last.leader.added)),
    )


def _helpers(
    request: SumRequest, roster: Roster, lost: Mapping[str, str]
) -> Generator[Effect, Result, tuple[str, ...]]:
    """So many that are online, each in a zone of its own and none in the server's, as contributors and helpers demand.
    Raises `FleetUnavailable`, naming who there is."""
    ours = roster.server.zone
    able = {e.name: e.zone for e in roster.entries if "helper" in e.roles and "server" not in e.roles}
    candidates = {name: zone for name, zone in sorted(able.items()) if name not in lost and zone != ours}
    present = yield from look()
    if len(_pick(candidates, present.everybody, request.helpers)) < request.helpers:
        present = yield from gather(
            Gather(
                purpose=f"{request.purpose}: helpers to be there",
                without=present.members,
                quorum=0,
                join_s=request.straggler_s,
                deadline_s=request.deadline_s,
                others=frozenset(candidates),
                quorum_others=min(request.helpers, len(candidates)),
            )
        )
    chosen = _pick(candidates, present.everybody, request.helpers)
    if len(chosen) < request.helpers:
        known = ", ".join(
            f"{name} in {zone} ({lost.get(name) or ('online' if name in present.everybody else present.absent(name))}"
            f"{', the zone of this server' if zone == ours else ''})"
            for name, zone in sorted(able.items())
        )
        raise FleetUnavailable(
            f"{request.purpose}: the job wants {request.helpers} helpers, each in a zone of its own and none in this "
            f"server's; the roster of epoch {roster.epoch} has {known or 'none'}. Give more agents the role helper and "
            "other zones (`sordino roster add --zone`, or roster.yaml and `sordino roster sign`), or lower "
            "secure_aggregation.helpers"
        )
    return chosen


def _pick(candidates: Mapping[str, str], online: Mapping[str, int], count: int) -> tuple[str, ...]:
    chosen: dict[str, str] = {}
    for name, zone in candidates.items():
        if name in online and zone not in chosen and len(chosen) < count:
            chosen[zone] = name
    return tuple(sorted(chosen.values()))


@dataclass(slots=True, kw_only=True)
class _Attempt:
    request: SumRequest
    terms: SumTerms
    names: Names
    quorum: int
    command: Message
    leader: LeaderSum = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    forbidden: set[str] = field(default_factory=set)
    unaffordable: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    _asked: dict[bytes, str] = field(default_factory=dict)  # correlation -> who is to answer it
    _awaited: dict[str, None] = field(default_factory=dict)  # contributors
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.leader = LeaderSum(self.terms, asked=self.names)

    def play(self, run: str) -> Generator[Effect, Result, None]:
        """Up to the last share. Raises `_Void`."""
        yield from listen(frozenset(self.names) | frozenset(self.terms.helpers))
        self._awaited = dict.fromkeys(self.names)
        for name in self.names:
            yield from self._ask(name, self.command)
        yield from self._collect()
        for name in tuple(self._awaited):
            yield from tell(name, Cancel(run=run, round=self.request.round))
        if len(self.leader.added) < self.quorum:
            slow = self.leader.unconfirmed
            waits = f"; {len(self.leader.waiting)} wait for helper {', '.join(slow)}" if slow else ""
            text = f"{len(self.leader.added)} contributions, {self.quorum} are needed{waits}"
            raise _Void(text, helper=slow[0] if slow else None)
        cut = self.leader.cut()
        for helper in self.terms.helpers:
            yield from self._ask(helper, cut)
        yield from self._shares()

    def _ask(self, name: str, message: Message) -> Generator[Effect, Result, None]:
        correlation = yield from tell(name, message)
        if correlation:  # else its receiver is gone, and that will be heard
            self._asked[correlation] = name

    # --- contributions ---------------------------------------------------------------------------------------------

    def _collect(self) -> Generator[Effect, Result, None]:
        """Until everybody has settled, or it is time for the cut."""
        began_s = (yield from meter()).now_s
        due_s, quorum_due_s = began_s + self.request.deadline_s, None
        while self._awaited or self.leader.waiting:
            now_s = (yield from meter()).now_s
            if quorum_due_s is None and len(self.leader.added) >= self.quorum:
                quorum_due_s = now_s + self.request.straggler_s
            until_s = due_s if quorum_due_s is None else min(due_s, quorum_due_s)
            if now_s >= until_s:
                late = "no answer in time" if quorum_due_s is None else "no answer in time after the quorum"
                for name in self._awaited:
                    self.leader.exclude(name, late)
                    self.absent.add(name)
                return
            waits_for = (*self._awaited, *(() if self._awaited else self.terms.helpers))
            heard = yield from hear(Hear(purpose=self.request.purpose, wait_s=until_s - now_s, missing=waits_for))
            boxes: dict[str, list[SealedSeed]] = {}
            for item in heard:
                match item:
                    case Gone(name=name, why=why):
                        yield from self._gone(name, why)
                    case Said():
                        yield from self._hear(item, boxes)
            for helper, seeds in boxes.items():
                for start in range(0, len(seeds), SEEDS_AT_ONCE):
                    message = SumSeeds(terms=self.terms, seeds=tuple(seeds[start : start + SEEDS_AT_ONCE]))
                    yield from self._ask(helper, message)

    def _hear(self, said: Said, boxes: dict[str, list[SealedSeed]]) -> Generator[Effect, Result, None]:
        name, message = said.name, said.message
        if self._asked.get(said.correlation) != name:
            return  # late, from an earlier sum; or an answer to nothing
        match message:
            case Refused() if name in self.terms.helpers and message.command in ("sum-seeds", "sum-cut"):
                raise _Void(f"helper {name} refuses: {printable(f'{message.code}: {message.reason}')}", helper=name)
            case Refused():
                yield from self._refuse(name, message)
            case Contribution():
                try:
                    if not 0.0 <= message.seconds <= _MOST_SECONDS:
                        self.leader.exclude(name, why := f"claims to have taken {message.seconds:.4g} seconds")
                        raise NotTaken(why)
                    for helper, box in self.leader.contribute(name, message).items():
                        boxes.setdefault(helper, []).append(SealedSeed(name=name, box=box))
                    self.seconds[name] = message.seconds
                except NotTaken as error:
                    yield from self._settle(name, "refused", printable(str(error)))
                else:
                    yield from self._settle(name, "answered", "")
            case SumSeedsChecked():
                try:
                    self.leader.checked(name, message)
                except RemoteError as error:
                    raise _Void(f"helper {name}: {error}", helper=name) from None
            case _ if name in self.terms.helpers and name not in self.names:
                raise _Void(f"helper {name} answers with {message.kind}", helper=name)
            case _:
                self.leader.exclude(name, f"answered with {message.kind}")
                yield from self._settle(name, "refused", f"answered with {message.kind}")

    def _refuse(self, name: str, message: Refused) -> Generator[Effect, Result, None]:
        why = printable(f"{message.code}: {message.reason}")
        self.leader.exclude(name, why)
        if message.code == PolicyRefusal.code:
            self.forbidden.add(name)
        if message.code == BudgetRefused.code:
            self.unaffordable.add(name)
        yield from self._settle(name, "refused", why)

    def _gone(self, name: str, why: str) -> Generator[Effect, Result, None]:
        """A contributor whose vector is here is not needed any more; a helper is."""
        if name in self.terms.helpers:
            raise _Void(f"helper {name} is lost: {why}", helper=name)
        if name in self._awaited:
            self.leader.exclude(name, why)
            self.absent.add(name)
            yield from self._settle(name, "missing", why)

    def _settle(self, name: str, outcome: Outcome, note: str) -> Generator[Effect, Result, None]:
        self._awaited.pop(name, None)
        if outcome == "refused":
            self.refused.add(name)
        if name in self._told:
            return
        self._told.add(name)
        metered = yield from meter()
        yield from report(
            Answered(
                purpose=self.request.purpose,
                name=name,
                outcome=outcome,
                note=note,
                have=len(self.leader.added) + len(self.leader.waiting),
                asked=len(self.names),
                bytes_up=metered.bytes_up,
                bytes_down=metered.bytes_down,
            )
        )

    # --- shares ------------------------------------------------------------------------------------------------------

    def _shares(self) -> Generator[Effect, Result, None]:
        due_s = (yield from meter()).now_s + self.request.deadline_s
        while self.leader.missing_shares:
            now_s = (yield from meter()).now_s
            missing = self.leader.missing_shares
            if now_s >= due_s:
                raise _Void(f"no share of helper {', '.join(missing)} in time", helper=missing[0])
            heard = yield from hear(
                Hear(purpose=f"{self.request.purpose}: shares", wait_s=due_s - now_s, missing=missing)
            )
            for item in heard:
                match item:
                    case Gone(name=name, why=why) if name in missing:
                        raise _Void(f"helper {name} is lost: {why}", helper=name)
                    case Said(name=name, message=message) if name in missing:
                        if self._asked.get(item.correlation) == name:
                            self._share(name, message)
                    case _:
                        pass  # a contributor: late, or no longer needed

    def _share(self, name: str, message: Message) -> None:
        match message:
            case SumShare():
                try:
                    self.leader.share(name, message)
                except NotTaken as error:
                    raise _Void(f"helper {name}: {printable(str(error))}", helper=name) from None
            case Refused() if message.command == "sum-cut":
                raise _Void(f"helper {name} refuses: {printable(f'{message.code}: {message.reason}')}", helper=name)
            case _:
                pass  # an answer to seeds, or a contributor's of its own
