"""A committee as a user's tensors see it: an owner of shared tensors, that records, computes and opens.

A flush is one step of one session: everything that was recorded and is still needed becomes one circuit, its results
are kept by the members (m) and here (λ). Sharing is a step without gates, opening too. Nothing here computes with
shares, and no value is here but what opened to us.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sordino_common import messages as m
from sordino_common.errors import FleetUnavailable, PlanError, RemoteError
from sordino_common.plan.spec import TensorSpec
from sordino_common.ring.fixed import decode_fixed
from sordino_common.spdz.errors import OutOfRange
from sordino_common.spdz.lowering import Ranges
from sordino_common.spdz.opening import numbers_of, spec_of
from sordino_server.dealer.desk import DealerDesk
from sordino_server.rounds.spdz import World, with_digest_of
from sordino_server.rounds.spdz_session import SessionLost, SessionRefused
from sordino_server.tensors.compile import Compiler, Structure
from sordino_server.tensors.errors import AgentAway, RemoteFailure, SharesLost
from sordino_server.tensors.pointer import PointerTensor
from sordino_server.tensors.recorder import Scope
from sordino_server.tensors.shared.kept import Kept, merged, rounded_up
from sordino_server.tensors.shared.links import SharedTensor
from sordino_server.tensors.shared.local import LocalFixed
from sordino_server.tensors.shared.pool import SessionPool
from sordino_server.tensors.shared.program import Program, Programs, Task
from sordino_server.tensors.shared.recorder import SharedRecorder, SharedRequest
from sordino_server.tensors.shared.session import StepDone, StepRefused, StepwiseSession
from sordino_server.tensors.values import TORCH_DTYPES, Value

if TYPE_CHECKING:
    from sordino_server.tensors.fleet import PointerFleet, RemoteAgent

I64 = npt.NDArray[np.int64]
Security = Literal["active", "passive"]
Moved = Callable[..., m.SpdzMoved]  # of an output's name
STEPS_MOST: Final = 1 << 20
RETRIES: Final = 10
SILENCE_S: Final = 60.0
_TRIES: Final = 3
_DROP_MOST: Final = 4096  # as messages.TensorIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something that is to be shared: by the agent `owner`, its tensor `tensor_id`; or by us, if that is None:
    `integers`, fixed point. |real value| <= `limit`."""

    spec: TensorSpec
    limit: float
    ranges: Ranges
    parameter: bool = False
    owner: str | None = None
    tensor_id: bytes | None = None
    integers: I64 | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One step to be run. `kept`: ids of the program's inputs, `given`: sources, one or the other for each input.
    `keep`: new ids of outputs by name. `opened`: names of outputs that open to us. `moved`: what opens to a member."""

    program: Program
    kept: Mapping[str, bytes]
    given: Mapping[str, Source]
    keep: Mapping[str, bytes]
    opened: tuple[str, ...]
    lines: tuple[str, ...]
    moved: tuple[m.SpdzMoved, ...] = ()


class Committee:
    """`agents` in order. An `Owner` of shared tensors."""

    def __init__(
        self,
        fleet: PointerFleet,
        agents: Sequence[RemoteAgent],
        *,
        security: Security,
        fraction_bits: int,
        world: World,
        pool: SessionPool,
        programs: Programs,
    ) -> None:
        self.parties: Final = tuple(agent.name for agent in agents)
        self.security: Final = security
        self.fraction_bits: Final = fraction_bits
        self.fleet = fleet
        self.name = f"the committee of {', '.join(self.parties)}"
        links = ", ".join(f"PointerTensor({name}:…)" for name in self.parties)
        chain = f"FixedPrecisionTensor(f={fraction_bits}) > MPCTensor[{len(agents)}, {security}] > {links}"
        self.recorder = SharedRecorder(self.name, chain, Compiler())
        self.lost: str = ""  # why nothing can be computed here any more
        self._agents = tuple(agents)
        self._world = world
        self._pool = pool
        self._programs = programs
        self._kept: dict[bytes, Kept] = {}
        self.steps = 0

    def __repr__(self) -> str:
        return f"Committee({', '.join(self.parties)}; {self.security}, f={self.fraction_bits})"

    @property
    def link(self) -> type[SharedTensor]:
        """See `Owner`."""
        return SharedTensor

    @property
    def bring(self) -> str:
        """See `Owner`."""
        return f"fleet.share(tensor, {', '.join(self.parties)})"

    def send(self, tensor: Tensor) -> SharedTensor:
        (shared,) = self.fleet.committees.share((tensor,), self, ranges=None)
        return shared

    # --- sharing -------------------------------------------------------------------------------------------------

    def share(self, sources: Sequence[Source], line: str) -> list[SharedTensor]:
        """All of them in one step: each giver masks what it gives."""
        task = Task(
            structure=Structure(
                inputs=tuple(source.spec for source in sources),
                steps=(),
                outputs=tuple((-1, k) for k in range(len(sources))),
            ),
            numbers=(),
            carried=(-1,) * len(sources),
            limits=tuple(source.limit for source in sources),
            ranges=Ranges(),
            fraction_bits=self.fraction_bits,
            interval=None,
        )
        program = self._programs.program(task, (), (None,) * len(sources), ())
        ids = self._new_ids(len(sources))
        done = self._run(
            Run(
                program=program,
                kept={},
                given={f"i{k}": source for k, source in enumerate(sources)},
                keep=dict(zip(program.outputs, ids, strict=True)),
                opened=(),
                lines=(line,),
            )
        )
        shared: list[SharedTensor] = []
        for k, source in enumerate(sources):
            room = program.circuit.inputs[k].wire.room
            value = self._store(ids[k], done, program.outputs[k], source.spec, source.limit, room, source.ranges)
            cell = self.recorder.cell(value)
            cell.limit = source.limit
            shared.append(SharedTensor(self, cell, cell.value.spec))
        return shared

    # --- computing -----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Compute everything that was recorded and is needed, in one step. Raises as `fetch`."""
        self._compute("all")

    def end_step(self) -> None:
        """The same, but for the beginning of the next step of a loop, and gradients that have been used."""
        self._compute("step")

    def _compute(self, scope: Scope, asked: Value | None = None, moved: Moved | None = None) -> I64 | None:
        """Everything that is due; what `asked` has opened as, if it is given and not `moved` to a member.

        Raises `RemoteFailure` with a member's reason and the user's line, `AgentAway`, and errors of exit code 4."""
        request = self.recorder.shared_request(scope, asked)
        if request is None:
            if scope != "asked":
                self.recorder.nothing_due()
            return None
        self._require_alive()
        self._renew()
        try:
            program, limits, ranges, rooms = self._compiled(request)
        except PlanError as error:
            self._fail_what_cannot(request, error)
            raise
        ids = self._new_ids(len(request.outputs))
        wanted = tuple(name for name, value in zip(program.outputs, request.outputs, strict=True) if value is asked)
        opened = wanted if moved is None else ()
        try:
            done = self._run(
                Run(
                    program=program,
                    kept={f"i{k}": _id(value) for k, value in enumerate(request.inputs)},
                    given={},
                    keep=dict(zip(program.outputs, ids, strict=True)),
                    opened=opened,
                    moved=() if moved is None else tuple(moved(name=name) for name in wanted),
                    lines=tuple(dict.fromkeys(map(str, request.lines))),
                )
            )
        except RemoteFailure as failure:
            self.recorder.gave_up(request, failure)
            raise
        after, magnitudes = program.rooms_after(rooms), program.magnitudes()
        self.recorder.kept(request, ids, self.fleet.now_s())
        for k, name in enumerate(program.outputs):
            source = request.carried[k]
            limit = rounded_up(min(magnitudes[k], ranges.values)) if source < 0 else limits[source]
            self._kept[ids[k]] = Kept(
                origin=done.origins[name], masks=done.masks[name], limit=limit, room=after[k], ranges=ranges
            )
        return done.opened[opened[0]] if opened else None

    def _fail_what_cannot(self, request: SharedRequest, error: PlanError) -> None:
        """Of a program that has no circuit, the results that have none alone can never be computed; the others wait for
        the next flush, without them."""
        failed = 0
        for value in request.outputs if len(request.outputs) > 1 else ():
            alone = self.recorder.shared_request(only=value)
            try:
                if alone is not None:
                    self._compiled(alone)
            except PlanError as why:
                value.failure = RemoteFailure(str(why), agent=self.name, reason=str(why))
                failed += 1
        for value in request.outputs if not failed else ():
            value.failure = RemoteFailure(str(error), agent=self.name, reason=str(error))

    def _compiled(self, request: SharedRequest) -> tuple[Program, tuple[float, ...], Ranges, tuple[int, ...]]:
        inputs = [self._kept[_id(value)] for value in request.inputs]
        ranges = merged(kept.ranges for kept in inputs)
        limits = []
        for k, kept in enumerate(inputs):
            cell = request.written.get(k)
            if cell is None:
                limits.append(kept.limit)
            else:
                limits.append(ranges.state if cell.limit is None else cell.limit)
        task = Task(
            structure=request.structure,
            numbers=tuple(map(repr, request.numbers)),
            carried=request.carried,
            limits=tuple(limits),
            ranges=ranges,
            fraction_bits=self.fraction_bits,
            interval=request.interval,
        )
        rooms = tuple(kept.room for kept in inputs)
        program = self._programs.program(task, request.numbers, rooms, request.lines)
        return program, tuple(limits), ranges, rooms

    # --- opening -------------------------------------------------------------------------------------------------

    def fetch(self, value: Value) -> Tensor:
        """The real values, once all members have checked and if each lets them open.

        Raises `RemoteFailure` with a member's reason and the user's line, `AgentAway`, errors of exit code 4."""
        return self._floats(self._open((value,))[0], value.spec)

    def fetch_fixed(self, value: Value) -> LocalFixed:
        integers = torch.from_numpy(np.array(self._open((value,))[0]))
        return LocalFixed(integers, self.fraction_bits, TORCH_DTYPES[value.spec.dtype])

    def fetch_all(self, values: Sequence[Value]) -> list[Tensor]:
        """Several at once, in one step."""
        opened = self._open(values)
        return [self._floats(x, value.spec) for x, value in zip(opened, values, strict=True)]

    def move(self, value: Value, to: RemoteAgent) -> PointerTensor:
        """The real values at a member, which stores them like a tensor that was sent to it; nothing opens here. Raises
        as `fetch`."""
        self.fleet.require_open()
        tensor_id = self.fleet.random(16)
        dtype = cast(Literal["float32", "float64"], value.spec.dtype)  # on shares there is nothing else
        try:
            self._open((value,), partial(m.SpdzMoved, to=to.name, tensor_id=tensor_id, dtype=dtype))
        except BaseException:
            to.recorder.forgotten.append(tensor_id)  # it may have come to be
            raise
        there = Value(value.spec)
        to.recorder.store(there, tensor_id, self.fleet.now_s())
        return PointerTensor(to, to.recorder.cell(there), there.spec)

    def _floats(self, x: I64, spec: TensorSpec) -> Tensor:
        return torch.from_numpy(np.array(decode_fixed(x, self.fraction_bits))).to(TORCH_DTYPES[spec.dtype])

    def _open(self, values: Sequence[Value], moved: Moved | None = None) -> list[I64]:
        """x of each, opened to us; or none, if it is one that is `moved` to a member."""
        for value in values:
            if value.failure is not None:
                raise value.failure
        if len(values) == 1 and values[0].tensor_id is None:
            cell = self.recorder.cell(values[0])  # a view is not computed for its own sake
            opened = self._compute("asked", values[0], moved)
            del cell
            if values[0].failure is not None:
                raise values[0].failure
            return [] if opened is None else [opened]
        cells = [self.recorder.cell(value) for value in values if value.tensor_id is None]
        if cells:
            self.flush()
        self._require_alive()
        kept = [self._kept[_id(value)] for value in values]
        task = Task(
            structure=Structure(
                inputs=tuple(value.spec for value in values),
                steps=(),
                outputs=tuple((-1, k) for k in range(len(values))),
            ),
            numbers=(),
            carried=(-1,) * len(values),
            limits=tuple(one.limit for one in kept),
            ranges=Ranges(),
            fraction_bits=self.fraction_bits,
            interval=None,
        )
        program = self._programs.program(task, (), tuple(one.room for one in kept), ())
        done = self._run(
            Run(
                program=program,
                kept={f"i{k}": _id(value) for k, value in enumerate(values)},
                given={},
                keep={},
                opened=program.outputs if moved is None else (),
                moved=() if moved is None else tuple(moved(name=name) for name in program.outputs),
                lines=(),
            )
        )
        return [done.opened[name] for name in program.outputs] if moved is None else []

    # --- one step ------------------------------------------------------------------------------------------------

    def _run(self, run: Run) -> StepDone:
        """Run the step in the circuit's session; in another, if that one is lost before anybody has checked it."""
        self._require_alive()
        drops = _taken(self.recorder.forgotten)
        for tensor_id in drops:
            self._kept.pop(tensor_id, None)  # nobody here has it any more
        try:
            for left in range(_TRIES - 1, -1, -1):
                try:
                    return self._attempt(run, drops)
                except SessionLost as lost:
                    if "unknown-plan" in str(lost):  # a device that has restarted, or has many Plans
                        for agent in self._agents:
                            agent.plans.discard(run.program.traced.plan_id)
                    if not left:
                        raise AgentAway(
                            f"computing on {self.name}{_at(run.lines)}: {lost}; what is recorded is kept, and goes "
                            "with the next attempt"
                        ) from lost
            raise AssertionError
        except BaseException as error:
            # Nobody knows what was carried out; unknown ids are no error when they are dropped.
            self.recorder.forgotten.extend((*drops, *run.keep.values()))
            self._judge(error, run)
            raise

    def _judge(self, error: BaseException, run: Run) -> None:
        """Raise what the user is told in place of `error`, if that is something else."""
        place = _at(run.lines)
        match error:
            case StepRefused(agent=agent, reason=reason):
                raise RemoteFailure(
                    f"computing on {self.name}{place}: {agent} refuses: {reason}", agent=agent, reason=reason,
                    lines=run.lines,
                ) from error  # fmt: skip
            case SessionRefused():
                agent, _, reason = str(error).partition(" refuses the session: ")
                raise RemoteFailure(
                    f"computing on {self.name}{place}: {error}", agent=agent, reason=reason, lines=run.lines
                ) from error
            case OutOfRange():
                agent = str(error).split(": ")[1]  # see `spdz_session._error_of`
                reason = (
                    "a value is beyond what is stated for it; state what no value passes with ranges=..., or scale or "
                    "clip it there first"
                )
                raise RemoteFailure(
                    f"sharing with {self.name}{place}: {agent}: {reason}", agent=agent, reason=reason, lines=run.lines
                ) from error
            case RemoteError() if not isinstance(error, FleetUnavailable):
                self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, why: str) -> None:
        """A member cheats, or a value left its range: nothing that this committee keeps is of use any more."""
        self.lost = why
        self._pool.drop_of(self.parties, SessionLost(why))
        self._kept.clear()
        self.recorder.forgotten.extend(self.recorder.held())

    def _attempt(self, run: Run, drops: tuple[bytes, ...]) -> StepDone:
        key = (self.parties, self.security, run.program.traced.plan_id, numbers_of(run.program.settings))
        session = self._pool.find(key) or self._opened(key, run)
        step = m.SpdzStep(
            session=session.command.session,
            step=session.next_step,
            kept=tuple(
                m.SpdzKept(name=name, tensor_id=tensor_id, origin=self._kept[tensor_id].origin)
                for name, tensor_id in run.kept.items()
            ),
            given=tuple(
                m.SpdzGiven(name=name, owner=source.owner or self._world.server, tensor_id=source.tensor_id)
                for name, source in run.given.items()
            ),
            keep=tuple(m.SpdzKeep(name=name, tensor_id=tensor_id) for name, tensor_id in run.keep.items()),
            opened=run.opened,
            moved=run.moved,
            drops=drops,
            lease_s=self.fleet.lease_s,
        )
        given = {name: source.integers for name, source in run.given.items() if source.integers is not None}
        masks = {name: self._kept[tensor_id].masks for name, tensor_id in run.kept.items()}
        self.fleet.note_step(self.name, run.program.traced, len(run.keep), run.lines)
        try:
            done: StepDone = self.fleet.drive(session.step(step, given=given, masks=masks))
        except BaseException as error:
            self._pool.drop(key, error)
            raise
        self.steps += 1
        return done

    def _opened(self, key: tuple[object, ...], run: Run) -> StepwiseSession:
        self._pool.make_room()
        program, world = run.program, self._world
        session_id = self.fleet.random(16)
        command = with_digest_of(
            m.SpdzOpen(
                run=f"tensors-{session_id.hex()}",
                session=session_id,
                plan_id=program.traced.plan_id,
                circuit=program.lowered.digest,
                digest=bytes(32),
                settings=numbers_of(program.settings),
                parties=self.parties,
                dealer=world.server,
                security=self.security,
                first_step=0,
                steps=STEPS_MOST,
                check_every=1,
                retries=RETRIES,
                rows=(),
                batch_rows=1,
                seed=0,
                order="shuffled",
                outputs=(),
                data=None,
                state_from=None,
                resume=None,
                checkpoints=(),
                ahead=1,
                report_every=1,
                silence_s=SILENCE_S,
                idle_s=self.fleet.lease_s,
            ),
            program.circuit,
        )
        spec = spec_of(command, program.circuit, program.lowered.digest)
        desk = DealerDesk(command, spec, random=world.random, masks=None, stopwatch=world.stopwatch, **world.dealing)
        session = StepwiseSession(command, spec, desk, server=world.server, deadline_s=self.fleet.deadline_s)
        self.fleet.give_plan(self._agents, program.traced)
        try:
            self.fleet.drive(session.begin())
        except BaseException as error:
            self._pool.abort(session, error)
            raise
        self._pool.put(key, session)
        return session

    # --- small things --------------------------------------------------------------------------------------------

    def _store(
        self, tensor_id: bytes, done: StepDone, name: str, spec: TensorSpec, limit: float, room: int, ranges: Ranges
    ) -> Value:
        value = Value(spec)
        self.recorder.store(value, tensor_id, self.fleet.now_s())
        self._kept[tensor_id] = Kept(
            origin=done.origins[name], masks=done.masks[name], limit=limit, room=room, ranges=ranges
        )
        return value

    def _new_ids(self, count: int) -> list[bytes]:
        return [self.fleet.random(16) for _ in range(count)]

    def _renew(self) -> None:
        ids = self.recorder.due(self.fleet.now_s(), self.fleet.lease_s)
        for agent in self._agents if ids else ():
            self.fleet.renew(agent, ids)

    def _require_alive(self) -> None:
        self.fleet.require_open()
        if self.lost:
            raise SharesLost(
                f"{self.name} has lost its shares ({self.lost}); nothing was opened. Share again, with other members "
                "if one of them is not to be trusted"
            )

    def forget_all(self) -> None:
        """Everything that is kept is to be dropped by the members, by each when it is next told."""
        ids = (*self.recorder.forgotten, *self.recorder.held())
        self.recorder.forgotten.clear()
        self._kept.clear()
        for agent in self._agents:
            agent.recorder.forgotten.extend(ids)


def _id(value: Value) -> bytes:
    assert value.tensor_id is not None
    return value.tensor_id


def _at(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f" (recorded at {lines[0]})" if len(lines) == 1 else f" (recorded from {lines[0]} to {lines[-1]})"


def _taken(ids: deque[bytes]) -> tuple[bytes, ...]:
    taken: list[bytes] = []
    while ids and len(taken) < _DROP_MOST:
        taken.append(ids.popleft())
    return tuple(taken)
