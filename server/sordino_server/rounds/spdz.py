"""Training on shares, from the first session to the last checkpoint.

    once            describe the owners, give everybody the Plan, measure the columns (as federated averaging does)
    every session   the committee and all owners open it; it runs until the last step, or until somebody is lost
    every checkpoint   the masks λ are on the server's disk before the parties are told to forget older ones
    a session lost  a new one, of the same committee and owners, goes on from the last checkpoint

Nobody sees rows, activations or parameters; what opens is what the job's `spdz.outputs` names and every agent's policy
allows. A round is what the job calls so: `local_epochs` passes over all owners' rows, or `local_steps` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from sordino_common import messages as m
from sordino_common.channel.roster import Roster
from sordino_common.errors import FleetUnavailable
from sordino_common.ring.fixed import decode_fixed
from sordino_common.spdz.circuit import Circuit
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.lowering.settings import Settings
from sordino_common.spdz.opening import MODEL, numbers_of, spec_of
from sordino_server.dealer.desk import DealerDesk
from sordino_server.job import JobSpec
from sordino_server.job_spdz import NOBODY, SERVER, SpdzSpec
from sordino_server.rounds.committee import candidates, choose, provider, require_readers
from sordino_server.rounds.effects import (
    Ask,
    Checkpoint,
    Effect,
    Gather,
    Hear,
    Metered,
    Params,
    Result,
    SharedState,
    ask,
    gather,
    hear,
    look,
    meter,
    report,
    save,
)
from sordino_server.rounds.events import Note, RoundDone, RoundRecord, RoundStarted, Share
from sordino_server.rounds.fedavg import data_ref
from sordino_server.rounds.roll import Program, Roll
from sordino_server.rounds.scaling import measure
from sordino_server.rounds.spdz_dealing import Dealing, Here, There
from sordino_server.rounds.spdz_session import Opened, Session, SessionLost

I64 = npt.NDArray[np.int64]
REPORTS_AHEAD: Final = 4  # reports of the parties within the window of what is dealt ahead
AHEAD_MOST: Final = 64  # steps
_POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Circuitry:
    """A Plan and the circuit that it lowers to."""

    program: Program
    circuit: Circuit
    digest: bytes
    settings: Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a run on shares needs of the world. `server`: our name. `random`: the cryptographic generator. `stopwatch`:
    real time. `dealing`: further arguments of `DealerDesk`, such as how it multiplies masks."""

    server: str
    roster: Callable[[], Roster]
    random: Callable[[int], bytes]
    stopwatch: Callable[[], float]
    dealing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """What the summary tells of all sessions so far."""

    sessions: int = 0
    retries: int = 0
    checks: int = 0
    rounds: int = 0
    opened_bytes: int = 0
    preprocessing_bytes: int = 0
    dealer_s: float = 0.0
    online_s: float = 0.0
    compute_s: float = 0.0

    def count(self, session: Session) -> None:
        self.retries += session.retries
        self.preprocessing_bytes += session.dealing.nbytes
        self.dealer_s += session.dealing.seconds

    def count_online(self, counters: Sequence[m.SpdzCounters]) -> None:
        """Of the parties of one session: what the slowest took."""
        if counters:
            self.checks += max(one.checks for one in counters)
            self.rounds += max(one.rounds for one in counters)
            self.opened_bytes += max(one.opened_bytes for one in counters)
            self.online_s += max(one.online_s for one in counters)
            self.compute_s += max(one.compute_s for one in counters)

    def as_numbers(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> Tally:
        tally = cls()
        for name, value in numbers.items():
            if name in cls.__slots__:
                setattr(tally, name, type(getattr(tally, name))(value))
        return tally


class TrainingOnShares:
    """`circuitry`: the training step lowered for so many steps. `values`: the first state, fixed point. `lengths`:
    steps of each round, given the fleet's rows. `programs`: Plans for the data agents, the training step first."""

    def __init__(
        self,
        spec: JobSpec,
        *,
        run: str,
        circuitry: Callable[[int], Circuitry],
        values: Mapping[str, I64],
        lengths: Callable[[int], tuple[int, ...]],
        world: World,
        programs: Sequence[Program],
    ) -> None:
        self.spec: Final = spec
        self.run: Final = run
        self.world: Final = world
        self.roll: Final = Roll(data=spec.data, train=spec.train, programs=tuple(programs))
        self.tally = Tally()
        self.ends: tuple[int, ...] = ()  # after how many steps each round ends, where a check comes
        self._lower = circuitry
        self._lengths = lengths
        self._values = values
        self._counted = Metered(bytes_up=0, bytes_down=0, now_s=0.0)
        self._began_s = 0.0
        self._took_part: dict[str, None] = {}

    def first_values(self, program: Circuitry) -> dict[str, I64]:
        """The first state of `program`, if it is the server's to give."""
        return {entry.name: self._values[entry.name] for entry in program.circuit.inputs if entry.name in self._values}

    def play(self, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        """Train to the last step; the last checkpoint, with the parameters if they open to the server. Raises
        `FleetUnavailable`, and errors of exit code 4 by name."""
        spec = self.spec
        self._counted = yield from meter()
        candidates(spec.shares, self.world.roster())
        provider(spec.shares, self.world.roster())
        require_readers(spec.shares, self.world.roster())  # before anybody is waited for
        if resumed is None:
            state = yield from self._begin()
        else:
            state = resumed
        assert state.shared is not None
        if resumed is not None:
            self.tally = Tally.of(state.shared.counters)
        self._count_rounds(sum(count for _, count in state.shared.rows))
        lost = 0
        while state.steps < self.ends[-1]:
            before = state.steps
            try:
                state = yield from self._session(state)
            except SessionLost as error:
                state = self._last
                lost = lost + 1 if state.steps == before else 1
                if lost > spec.train.retries:
                    raise FleetUnavailable(
                        f"{error}; {lost} sessions were lost without a step forward. The last checkpoint is kept: go "
                        "on with --resume."
                    ) from error
                yield from report(Note(text=f"{error}; a new session goes on from step {state.steps}", level="warning"))
        return state

    # --- the beginning ---------------------------------------------------------------------------------------------

    def _begin(self) -> Generator[Effect, Result, Checkpoint]:
        """Nothing is trained yet: who owns how many rows, and how the columns are scaled."""
        yield from self._gather(frozenset())
        names, _ = yield from self.roll.assemble(1)
        rows = tuple((name, self.roll.able[name].data.train_rows) for name in names)
        scaling = yield from measure(self.spec.data, self.spec.train, self.roll, 1)
        record = RoundRecord(
            round=0, loss=None, metrics={}, shares={}, steps=0, attempts=0, bytes_up=0, bytes_down=0, seconds=0.0
        )
        shared = SharedState(session=b"", steps=0, masks={}, parties=(), rows=rows)
        return Checkpoint(params=(), scaling=scaling, steps=0, record=record, shared=shared)

    def _gather(self, parties: frozenset[str]) -> Generator[Effect, Result, None]:
        """Wait for compute agents that hold no data: owners are waited for by the roll."""
        present = yield from look()
        names = parties or frozenset(candidates(self.spec.shares, self.world.roster()))
        others = names - present.members
        spare = len(names) - len(others)
        yield from gather(
            Gather(
                purpose="compute agents",
                without=present.members,
                quorum=0,
                join_s=self.spec.train.join_s,
                deadline_s=self.spec.train.round_deadline_s,
                others=others,
                quorum_others=max(0, self.spec.shares.committee - spare),
            )
        )

    def _count_rounds(self, rows: int) -> None:
        """A round ends where a check comes: the first one at or after its last step."""
        every = self.spec.shares.check_every
        ends = list(accumulate(self._lengths(rows)))
        if not ends:  # inference only
            self.ends = (0,)
            return
        total = ends[-1]
        self.program = self._lower(total)
        self.ends = tuple(dict.fromkeys(min(total, -(-end // every) * every) for end in ends))

    def _round_of(self, steps: int) -> int:
        """The number of the round that is over, or under way, after so many steps."""
        return next(number for number, end in enumerate(self.ends, start=1) if steps <= end)

    # --- one session -----------------------------------------------------------------------------------------------

    def _session(self, state: Checkpoint) -> Generator[Effect, Result, Checkpoint]:
        self._last = state
        receiver = self.spec.shares.outputs.model
        readers = () if receiver in (SERVER, NOBODY) else (receiver,)
        parties = yield from self.assemble(state, self.program, readers=readers)
        command = self._command(state, parties)
        session = self.new_session(command, self.program, state, split="train")
        self._began_s = (yield from meter()).now_s
        yield from report(RoundStarted(round=self._round_of(state.steps + 1), attempt=0, asked=session.members))
        try:
            yield from session.open(None if state.steps else self.first_values(self.program))
            for until in command.checkpoints:
                opened = yield from session.advance(until)
                state = yield from self._settle(state, until, opened, session)
                self._last = state
            closed = yield from session.close()
        finally:
            self.tally.count(session)
        self.tally.count_online([closed[name].counters for name in parties if name in closed])
        return self._last

    def new_session(
        self, command: m.SpdzOpen, program: Circuitry, state: Checkpoint, *, split: Literal["train", "test"]
    ) -> Session:
        """With a dealer of its own, who goes on from the masks of `state` if the session does."""
        assert state.shared is not None
        spec = spec_of(command, program.circuit, program.digest)
        dealing: Dealing
        if command.dealer != self.world.server:
            dealing = There(command.dealer, command)
        else:
            dealing = Here(
                DealerDesk(
                    command,
                    spec,
                    random=self.world.random,
                    masks=None if command.resume is None else state.shared.masks,
                    stopwatch=self.world.stopwatch,
                    **self.world.dealing,
                )
            )
        self.tally.sessions += 1
        session = Session(
            command,
            spec,
            dealing,
            server=self.world.server,
            data=data_ref(self.spec, state.scaling, split),
            model=self.spec.shares.model or self.spec.job,
            deadline_s=self.spec.train.round_deadline_s,
            deal_first=self.spec.shares.preprocessing == "first",
        )
        self._took_part |= dict.fromkeys(session.members)
        return session

    def assemble(
        self, state: Checkpoint, program: Circuitry, *, readers: tuple[str, ...] = ()
    ) -> Generator[Effect, Result, tuple[str, ...]]:
        """The committee; returns when it, all owners and `readers` are there, with the Plan. Raises
        `FleetUnavailable`, naming who is missing."""
        assert state.shared is not None
        shares, train = self.spec.shares, self.spec.train
        owners = frozenset(name for name, _ in state.shared.rows)
        others = [] if shares.dealer is None else [shares.dealer]
        others += [name for name in readers if name not in owners]
        if shares.model_from != SERVER and not state.shared.session and shares.model_from not in owners:
            others.append(shares.model_from)
        deadline_s = (yield from meter()).now_s + train.round_deadline_s
        while True:
            yield from self.roll.assemble(1)
            present = yield from look()
            ready = {name for name, boot in present.boots.items() if name in self.roll.able
                     and self.roll.able[name].boot == boot}  # fmt: skip
            parties = choose(shares, self.world.roster(), present.everybody.keys(), keep=state.shared.parties)
            missing = sorted(owners - ready)
            missing += [name for name in others if name not in present.everybody]
            if not missing and parties:
                known = ready if program.program in self.roll.programs else set()
                yield from self._give_plan(program, sorted({*parties, *owners, *others} - known))
                return parties
            if not parties:
                wanted = state.shared.parties or candidates(shares, self.world.roster())
                missing += [name for name in wanted if name not in present.everybody and name not in missing]
            now_s = (yield from meter()).now_s
            if now_s >= deadline_s:
                raise FleetUnavailable(
                    f"step {state.steps}: a session can't open; missing: {', '.join(missing)}. The last checkpoint is "
                    "kept: go on with --resume."
                )
            yield from hear(Hear(purpose="members of the session", wait_s=_POLL_S, missing=tuple(missing)))

    def _give_plan(self, program: Circuitry, names: Sequence[str]) -> Generator[Effect, Result, None]:
        """To members that the roll has not given it: compute agents without rows."""
        if not names:
            return
        answers = yield from ask(
            Ask(
                purpose="members of the session to take the Plan",
                messages=dict.fromkeys(names, m.PlanPut(plan=program.program.plan)),
                expects=m.PlanReady,
                quorum=len(names),
                deadline_s=self.spec.train.round_deadline_s,
                straggler_s=self.spec.train.round_deadline_s,
            )
        )
        without = {**answers.refusals, **answers.missing}
        if without:
            raise FleetUnavailable(
                "members of the session don't take the Plan: "
                + ", ".join(f"{name} ({why})" for name, why in without.items())
            )

    def _command(self, state: Checkpoint, parties: tuple[str, ...]) -> m.SpdzOpen:
        spec, shares, shared = self.spec, self.spec.shares, state.shared
        assert shared is not None
        total = self.ends[-1]
        ahead = steps_ahead(shares, self.program.circuit, check_every=shares.check_every)
        outputs = [m.SpdzOutput(name="loss", receiver=self.world.server)] if shares.outputs.loss == SERVER else []
        if shares.outputs.model != NOBODY:
            receiver = self.world.server if shares.outputs.model == SERVER else shares.outputs.model
            outputs.append(m.SpdzOutput(name=MODEL, receiver=receiver))
        command = m.SpdzOpen(
            run=self.run,
            session=self.world.random(16),
            plan_id=self.program.program.plan_id,
            circuit=self.program.digest,
            digest=bytes(32),
            settings=numbers_of(self.program.settings),
            parties=parties,
            dealer=shares.dealer or self.world.server,
            security=shares.security,
            first_step=state.steps,
            steps=total,
            check_every=shares.check_every,
            retries=shares.retries,
            rows=tuple(m.SpdzRows(owner=name, rows=count) for name, count in shared.rows),
            batch_rows=spec.train.batch_rows,
            seed=spec.train.seed,
            order="shuffled",
            outputs=tuple(outputs),
            data=None,
            state_from=None if state.steps else provider(shares, self.world.roster()),
            resume=m.SpdzPoint(session=shared.session, step=state.steps) if state.steps else None,
            checkpoints=self._checkpoints(state.steps),
            ahead=ahead,
            report_every=max(1, ahead // REPORTS_AHEAD),
            silence_s=shares.silence_s,
        )
        return with_digest(command, self.program)

    def _checkpoints(self, first: int) -> tuple[int, ...]:
        """After which steps the state is kept: at the end of every round, and every so often in a long one; where the
        check comes."""
        every, total = self.spec.shares.checkpoint_steps, self.ends[-1]
        return tuple(sorted(step for step in {*self.ends, *range(every, total, every)} if step > first))

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _settle(
        self, state: Checkpoint, until: int, opened: Opened, session: Session
    ) -> Generator[Effect, Result, Checkpoint]:
        """`until` steps are checked: the record, the checkpoint on disk, and then the parties are told."""
        assert state.shared is not None
        number = self._round_of(until)
        end = yield from meter()
        record = self._record(state, number, until, opened, session, end)
        shared = replace(
            state.shared,
            session=session.command.session,
            steps=until,
            masks={name: np.array(value) for name, value in opened.states[until].items()},
            parties=session.command.parties,
        )
        params = self._params(opened.model[until]) if until in opened.model else ()
        state = self.with_tally(replace(state, params=params, steps=until, record=record, shared=shared))
        yield from save(state)
        yield from session.settle(until)
        self._began_s = end.now_s
        if until in self.ends and until != self.ends[-1]:  # the last one is evaluated first
            yield from report(RoundDone(record=record))
            yield from report(RoundStarted(round=number + 1, attempt=0, asked=session.members))
        return state

    def _record(
        self, state: Checkpoint, number: int, until: int, opened: Opened, session: Session, end: Metered
    ) -> RoundRecord:
        """Of the round so far: a checkpoint in mid-round is gone on with."""
        before = state.record if state.record.round == number else None
        steps = until - state.steps
        losses = self._losses([values["loss"] for values in opened.outputs.values() if "loss" in values])
        total_steps = steps + (before.steps if before else 0)
        loss = None
        if losses:
            earlier = before.loss * before.steps if before and before.loss is not None else 0.0
            loss = (math.fsum(losses) + earlier) / total_steps
        rows = dict(state.shared.rows) if state.shared is not None else {}
        record = RoundRecord(
            round=number,
            loss=loss,
            metrics={},
            shares={
                name: Share(outcome="answered", rows=rows.get(name, 0), steps=total_steps) for name in session.members
            },
            steps=total_steps,
            attempts=1,
            bytes_up=end.bytes_up - self._counted.bytes_up + (before.bytes_up if before else 0),
            bytes_down=end.bytes_down - self._counted.bytes_down + (before.bytes_down if before else 0),
            seconds=end.now_s - self._began_s + (before.seconds if before else 0.0),
        )
        self._counted = end
        return record

    def inferred(self, state: Checkpoint) -> Generator[Effect, Result, Checkpoint]:
        """With the record of a run that trains nothing: who took part, and what it cost."""
        assert state.shared is not None
        end, rows = (yield from meter()), dict(state.shared.rows)
        record = replace(
            state.record,
            shares={name: Share(outcome="answered", rows=rows.get(name, 0), steps=0) for name in self._took_part},
            bytes_up=end.bytes_up - self._counted.bytes_up,
            bytes_down=end.bytes_down - self._counted.bytes_down,
            seconds=end.now_s - self._counted.now_s,
        )
        return replace(state, record=record)

    def _losses(self, values: Sequence[I64]) -> list[float]:
        if not values:
            return []
        (wire,) = [entry.wire for entry in self.program.circuit.outputs if entry.name == "loss"]
        found: list[float] = decode_fixed(np.stack(values), self.program.circuit.wire(wire).fraction_bits).tolist()
        return found

    def _params(self, opened: Mapping[str, I64]) -> Params:
        """The parameters in the Plan's order, as float32."""
        return tuple(
            decode_fixed(opened[entry.name], entry.wire.fraction_bits).astype(np.float32)
            for entry in self.program.circuit.inputs
            if entry.role == "param"
        )

    def with_tally(self, state: Checkpoint) -> Checkpoint:
        assert state.shared is not None
        return replace(state, shared=replace(state.shared, counters=self.tally.as_numbers()))


def steps_ahead(shares: SpdzSpec, circuit: Circuit, *, check_every: int) -> int:
    """How many steps may be dealt ahead within the job's budget; enough for two checks, or nothing would move."""
    step_bytes = layout_of(circuit).preprocessing_bytes(active=shares.security == "active")
    return min(AHEAD_MOST, max(shares.ahead_bytes // max(1, step_bytes), 2 * check_every + 2))


def with_digest(command: m.SpdzOpen, program: Circuitry) -> m.SpdzOpen:
    """The command with the digest of its own session in it."""
    return with_digest_of(command, program.circuit)


def with_digest_of(command: m.SpdzOpen, circuit: Circuit) -> m.SpdzOpen:
    """As `with_digest`; `command.circuit` is the circuit's own digest."""
    return msgspec.structs.replace(command, digest=spec_of(command, circuit, command.circuit).digest)
