"""One party of a session, sans-IO: inputs, openings, checks. Everything that a compute agent does on shares.

    inputs (masked, from owners) + preprocessing  ->  round 0 .. R-1, one message per party and round  ->  next step
    every `check_every` steps, and after the last:    `verification`  ->  `Checked`: outputs may leave
                                                      (the next steps run meanwhile)
    `MaskAtEdge` in an input or opening:              `Retry`; the step runs again, and all later ones run, under the
                                                      next attempt

A step's openings are masked by fresh uniform r, so nothing of them depends on secrets, and steps may run ahead of the
check; what is thrown away at the edge was uniform too, and is in the transcript all the same. What leaves the committee
is always checked first.

So the check's four rounds travel with the openings of the next steps. It is of what was opened up to its own step:
records and the hash of the transcript are taken when it begins, and its coefficients' seeds are opened after that, so
later openings are none that it speaks of; they wait for the next check, which has seeds of its own. What a cheater
learns from a check while later steps run (the seeds of coefficients that are used up; σ shares of a sum that is 0, or
α from one that is not, with which no check can pass any more) says nothing of their masks. There is one check at a
time: a step at whose end one is due waits until the one before has passed, and behind the last step nothing runs.

What takes longest of a check is σ, and nobody waits for it but the check. So it is computed in portions, between
messages: whoever drives the party calls `work` when nothing has come, as long as it `has_work`.

What no message depends on is put off until the messages have left: the hash of what was opened, the next step's shares
from their seed. `catch_up` does it; otherwise it is done before whatever comes next.

An error that a method raises ends the session: whatever is called next raises `SessionDead`. Messages may come early
(they wait, bounded), twice (ignored if equal), or contradict one another (`ProtocolError`).

Per step and party: R messages of 8 bytes for every opened element; per check 4 messages of 64, 32, 32 and 48 bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, ParamSpec

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError, SordinoError
from sordino_common.ring.prg import SEED_BYTES, Seed, expand_ring
from sordino_common.spdz.arithmetic import Arithmetic, Run, at_edge
from sordino_common.spdz.check import Checker, Record, coefficient_seed
from sordino_common.spdz.effects import Broadcast, Checked, Done, Effect, Kind, Retry
from sordino_common.spdz.errors import (
    CorrectionError,
    ProtocolError,
    RetriesExhausted,
    SessionDead,
    UncheckedOpenings,
)
from sordino_common.spdz.field import Field, Mersenne127
from sordino_common.spdz.intake import Intake, require_names, require_room, require_shape
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.spec import ROW_ROLES, PartySetup, SessionSpec, stream
from sordino_common.spdz.transcript import Transcript
from sordino_common.spdz.verification import Verification

I64 = npt.NDArray[np.int64]
P = ParamSpec("P")
_RING: Final = np.dtype("<i8")
PREPARED_BYTES: Final = 1 << 20  # of shares: what is larger takes long to compute with, and little of it to expand


class Party:
    """Party `index` of `spec`. `random(n)`: n bytes of the cryptographic generator."""

    def __init__(
        self,
        spec: SessionSpec,
        index: int,
        setup: PartySetup,
        *,
        random: Callable[[int], bytes],
        field: Field | None = None,
    ) -> None:
        if not 0 <= index < len(spec.parties):
            raise LocalError(f"party {index} of {len(spec.parties)}")
        if spec.active != (setup.mac_key is not None):
            raise LocalError(f"a session with security {spec.security} and a setup that is not for it")
        self.spec: Final = spec
        self.index: Final = index
        self.checks = 0
        self.retries = 0
        self._seed = setup.seed
        self._random = random
        self._field: Field = field or Mersenne127()
        self._layout = layout_of(spec.circuit)
        self._arithmetic = Arithmetic(spec.circuit, self._layout, first=index == 0)
        self._transcript = Transcript(spec)
        self._checker = (
            Checker(spec, self._layout, self._field, seed=setup.seed, mac_key=setup.mac_key)
            if setup.mac_key is not None
            else None
        )
        self._dead = ""
        self._finished = False
        self._state: dict[str, I64] | None = None
        self._fed = -1  # the last step whose inputs are there, if the session is stepwise
        self._step = 0
        self._attempt = 0  # grows through the session, never falls back: see `dealing.Dealer.rewind`
        self._tries = 0  # of the current step
        self._stopped = False  # waiting for `on_restart`
        self._intake = Intake(spec, self._layout, index)
        self._intake.move(0, 0)
        self._run: Run | None = None
        self._records: list[Record] = []
        self._outputs: dict[int, dict[str, I64]] = {}
        self._check: _Pending | None = None  # the check that is under way
        self._check_is_due = False  # the step is done, and its check may not begin yet
        self._put_off: deque[Callable[[], None]] = deque()
        self._prepared: tuple[tuple[int, int], Run] | None = None  # a later step and attempt, its shares expanded
        self._said: tuple[Kind, bytes] | None = None  # what a portion of work came to, to be said
        self._ended = False  # the last step is done

    @property
    def waiting_for(self) -> str:
        """What has to come before anything goes on, for a person: names the missing."""
        if self._run is not None:
            return f"step {self._step}: open of {', '.join(self._intake.parties_missing('open', self._run.round))}"
        if self._dead or self._finished:
            return ""
        if self._stopped:
            return f"step {self._step}: everybody's consent to run it again"
        if self.spec.stepwise and self._fed != self._step and self._check is None:
            return f"step {self._step}: what is given to it"
        if self._state is None:
            return "the first parameters"
        if self._check is not None and (self._check_is_due or self._ended):
            if self.has_work:
                return f"step {self._step}: this party's own share of its check"
            kind = self._check.machine.awaits
            return f"step {self._step}: {kind} of {', '.join(self._intake.parties_missing(kind, 0))}"
        owners = self._intake.owners_missing()
        if owners:
            return f"step {self._step}: the rows of {', '.join(owners)}"
        return f"step {self._step}: the dealer's correction"

    @property
    def has_work(self) -> bool:
        """Whether there is something to do that nothing has to come for."""
        return self._check is not None and self._check.machine.has_work

    # --- what comes in ---------------------------------------------------------------------------------------------

    def on_state(self, masked: Mapping[str, I64]) -> list[Effect]:
        """The first state, masked by whoever provides it: input name -> D."""
        return self._guard(self._take_state, masked)

    def resume(self, step: int, state: Mapping[str, I64]) -> list[Effect]:
        """Begin at `step` with the m of a checkpoint. Every party must resume with the same: the first check tells."""
        return self._guard(self._resume, step, state)

    def feed(self, step: int, terms: bytes, kept: Mapping[str, I64], given: Mapping[str, I64]) -> list[Effect]:
        """All inputs of the next step of a stepwise session: m of what is kept, D of what is given to it.

        `terms`: a hash of all that was said of the step; parties that were told different things fail its check."""
        return self._guard(self._feed, step, terms, kept, given)

    def on_input(self, owner: str, step: int, attempt: int, masked: Mapping[str, I64]) -> list[Effect]:
        """`owner`'s rows of the step's batch: input name -> D, rows in the order of its `Slice`."""
        return self._guard(self._intake.on_input, owner, step, attempt, masked)

    def on_correction(self, step: int, attempt: int, data: bytes) -> list[Effect]:
        """The dealer's correction for this attempt, if this party is the corrected one."""
        return self._guard(self._intake.on_correction, step, attempt, data)

    def on_message(self, sender: int, kind: str, step: int, attempt: int, round: int, payload: bytes) -> list[Effect]:
        """A `Broadcast` of party `sender`, whose identity the channel has proved."""
        return self._guard(self._intake.on_message, sender, kind, step, attempt, round, payload)

    def on_restart(self, step: int, attempt: int) -> list[Effect]:
        """Everybody met the edge at `step`: it runs again under `attempt`."""
        return self._guard(self._restart, step, attempt)

    def work(self) -> list[Effect]:
        """Do a portion of what is to be done, if anything is: some of a check's σ."""
        return self._guard(self._work)

    def catch_up(self) -> None:
        """Do what was put off."""
        while self._put_off:
            self._put_off[0]()
            self._put_off.popleft()

    def close(self) -> None:
        """Forget everything. Raises `UncheckedOpenings` if openings were never checked, unless the session is dead."""
        unchecked = bool(self._records or self._run or self._check) and not self._dead
        self._die("closed")
        if unchecked:
            raise UncheckedOpenings(f"session closed at step {self._step} with openings that were not checked")

    def abandon(self) -> None:
        """Forget everything, openings that await their check too: the fleet is gone, nothing will be output."""
        self._die("abandoned")

    # --- guard -----------------------------------------------------------------------------------------------------

    def _guard(self, take: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> list[Effect]:
        if self._finished:
            return []  # a late duplicate
        if self._dead:
            raise SessionDead(f"the session has ended: {self._dead}")
        try:
            self.catch_up()
            take(*arguments, **named)
            return self._go_on()
        except LocalError:
            raise  # the caller's mistake, found before anything changed
        except SordinoError as error:
            self._die(f"{error.code}: {error}")
            raise

    def _die(self, why: str) -> None:
        self._dead = why
        self._checker = self._check = self._run = None
        self._state = self._prepared = None
        self._put_off.clear()
        self._arithmetic.forget()
        self._seed = Seed(bytes(SEED_BYTES))
        self._intake.clear()
        self._outputs.clear()
        self._records.clear()

    # --- taking ----------------------------------------------------------------------------------------------------

    def _take_state(self, masked: Mapping[str, I64]) -> None:
        if self._state is not None:
            raise ProtocolError("the first parameters came twice")
        entries = self.spec.state_inputs
        require_names({entry.name for entry in entries}, masked, "the first parameters")
        state = {}
        for entry in entries:
            opened = masked[entry.name]
            require_shape(opened, entry.wire.shape, entry)
            if at_edge(opened, entry.bound_bits):
                raise ProtocolError(f"{entry.name}: masked parameters at the edge; their owner must mask them anew")
            self._transcript.add("state", 0, 0, 0, entry.name, opened)
            state[entry.name] = np.asarray(opened >> np.int64(entry.shift))
        self._state = state

    def _resume(self, step: int, state: Mapping[str, I64]) -> None:
        if self._state is not None or not 0 <= step < self.spec.steps:
            raise LocalError(f"resume at step {step}: the session is under way, or has {self.spec.steps} steps only")
        entries = self.spec.state_inputs
        require_names({entry.name for entry in entries}, state, "the checkpoint")
        for entry in entries:
            require_shape(
                state[entry.name], entry.wire.shape, entry
            )  # trained elsewhere, it may be larger than the room
            self._transcript.add("resume", step, 0, 0, entry.name, state[entry.name])
        self._state = {entry.name: np.array(state[entry.name]) for entry in entries}
        self._step = step
        self._intake.move(step, 0)

    def _feed(self, step: int, terms: bytes, kept: Mapping[str, I64], given: Mapping[str, I64]) -> None:
        if not self.spec.stepwise or step != self._fed + 1 or step != self._step or set(kept) & set(given):
            raise LocalError(f"feed of step {step}: this party is at step {self._step}, fed up to {self._fed}")
        require_names({entry.name for entry in self.spec.state_inputs}, {**kept, **given}, f"the inputs of step {step}")
        self._transcript.add("step", step, 0, 0, "", np.frombuffer(terms, dtype="<i8"))
        state = {}
        for entry in self.spec.state_inputs:
            value = kept.get(entry.name, given.get(entry.name))
            assert value is not None
            require_shape(value, entry.wire.shape, entry)
            if entry.name in given:
                if at_edge(value, entry.bound_bits):
                    raise ProtocolError(f"{entry.name}: a masked value at the edge; its owner must mask it anew")
                value = np.asarray(value >> np.int64(entry.shift))
            else:
                require_room(value, entry)
            self._transcript.add("fed", step, 0, 0, entry.name, value)
            state[entry.name] = value
        self._state, self._fed = state, step

    def _restart(self, step: int, attempt: int) -> None:
        if not self._stopped or step != self._step or attempt != self._attempt + 1:
            raise ProtocolError(
                f"told to run step {step} again as attempt {attempt}, but this party is at step {self._step}, attempt "
                f"{self._attempt}"
            )
        if self._tries >= self.spec.retries:
            raise RetriesExhausted(
                f"step {step} met the edge of the ring {self._tries + 1} times, at most {self.spec.retries} are likely"
            )
        self._stopped = False
        self._attempt = attempt
        self._tries += 1
        self.retries += 1
        self._intake.move(step, attempt)

    def _work(self) -> None:
        if self._check is not None and self._check.machine.has_work:
            self._said = self._check.machine.work()

    # --- going on --------------------------------------------------------------------------------------------------

    def _go_on(self) -> list[Effect]:
        effects: list[Effect] = []
        if self._said is not None:
            self._say(effects, self._said)
            self._said = None
        while not self._finished and self._state is not None:
            if self._check is not None and self._go_on_checking(effects, self._check):
                continue
            if self._stopped or self._ended:
                break
            if self._check_is_due:
                moved = self._begin_check(effects)
            elif self._run is None:
                moved = self._begin(effects)
            else:
                moved = self._open(effects, self._run)
            if not moved:
                break
        return effects

    def _begin(self, effects: list[Effect]) -> bool:
        """Start the step, if inputs and preprocessing are there."""
        spec, at = self.spec, (self._step, self._attempt)
        given = self._intake.batches()
        corrected = spec.corrected(*at) == self.index
        if spec.stepwise and self._fed != self._step:
            return False
        if given is None or (corrected and not self._intake.has_correction):
            return False
        assert self._state is not None
        run, is_prepared = self._lend(at)
        self._run = run
        for array, entry in zip(run.inputs, spec.circuit.inputs, strict=True):
            if entry.role not in ROW_ROLES:
                array[...] = self._state[entry.name]
                continue
            for part in self._intake.slices:
                array[part.positions] = given[part.owner][entry.name]
            if self._checker is not None:
                self.catch_up()  # the transcript is in order: what was opened before comes before
                self._transcript.add("input", *at, 0, entry.name, array)
            if at_edge(array, entry.bound_bits):
                return self._retry(effects, run, f"input {entry.name}")
            np.right_shift(array, np.int64(entry.shift), out=array)
        self._intake.running = True
        if not is_prepared:
            run.tags = self._preprocessing(at, corrected, run.shares)
        self._arithmetic.begin(run)
        if run.rounds:
            self._send_round(effects)
        self._put_off.append(self._prepare)
        return True

    def _prepare(self) -> None:
        """Arrays for the next step, with this party's shares in them if a seed gives them and they are worth a second
        set of arrays."""
        at = self._step + 1, self._attempt
        small = self._layout.preprocessing_bytes(active=False) <= PREPARED_BYTES
        if small and at[0] < self.spec.steps and self.spec.corrected(*at) != self.index and self._prepared is None:
            run = self._arithmetic.lend()
            run.tags = self._preprocessing(at, False, run.shares)
            self._prepared = at, run

    def _lend(self, at: tuple[int, int]) -> tuple[Run, bool]:
        """Arrays for a step attempt; whether its shares are in them."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return self._arithmetic.lend(), False
        return prepared[1], prepared[0] == at

    def _preprocessing(self, at: tuple[int, int], corrected: bool, shares: I64) -> Any:
        """Write shares of λ and then of γ; returns those of the tags if this is the corrected party."""
        if not corrected:
            expand_ring(self._seed, stream(self.spec, "share", *at), shares.shape, shares)
            return None
        data = self._intake.take_correction()
        shares[...] = np.frombuffer(data, _RING, shares.size)
        if self._checker is None:
            return None
        tags = np.frombuffer(data, dtype="<u8", offset=shares.nbytes).reshape(2, -1)
        if int(tags[1].max()) >> 63:
            raise CorrectionError(f"the correction of step {at[0]} has shares of tags that are not in the field")
        return tags

    def _send_round(self, effects: list[Effect]) -> None:
        run = self._run
        assert run is not None
        payload = self._arithmetic.share(run).tobytes()
        effects.append(Broadcast(kind="open", step=self._step, attempt=self._attempt, round=run.round, payload=payload))

    def _open(self, effects: list[Effect], run: Run) -> bool:
        """Add up the shares of one round after the other, as far as all are there. Whether the step is done."""
        while run.round < len(run.rounds):
            came = self._intake.openings(run.round)
            if came is None:
                return False
            opened = run.rounds[run.round]  # our own shares stand there; the sum takes their place
            for payload in came.values():
                np.add(opened, np.frombuffer(payload, _RING), opened)
            if self._checker is not None:  # `opened` stays as it is until the step is checked
                place = ("open", self._step, self._attempt, run.round, "", opened)
                self._put_off.append(partial(self._transcript.add, *place))
            edge = self._arithmetic.accept(run)
            if edge:
                return self._retry(effects, run, f"{edge}, round {run.round}")
            if run.round < len(run.rounds):
                self._send_round(effects)
        self._end_step(effects)
        return True

    def _retry(self, effects: list[Effect], run: Run, where: str) -> bool:
        self.catch_up()  # what was opened is in the transcript, before its arrays are for another attempt
        self._arithmetic.take_back(run)
        self._run = None
        self._stopped = True
        effects.append(Retry(step=self._step, attempt=self._attempt, where=where))
        return False

    def _end_step(self, effects: list[Effect]) -> None:
        run, spec, step = self._run, self.spec, self._step
        assert run is not None
        # Copies: the run's arrays are for later steps, too.
        self._state = {name: np.array(run.values[wire]) for name, wire in spec.state_outputs.items()}
        self._outputs[step] = {name: np.array(run.values[wire]) for name, wire in spec.value_outputs.items()}
        if self._checker is not None:
            self._records.append(Record(step=step, attempt=self._attempt, run=run))
        else:
            self._arithmetic.take_back(run)
        self._run = None
        if not spec.check_due(step):
            self._next_step()
        elif self._checker is not None:
            self._check_is_due = True
        else:
            done = Checked(step=step, outputs=self._outputs, state=dict(self._state))
            self._outputs = {}
            self._next_step()
            self._release(effects, done)

    def _next_step(self) -> None:
        if self._step + 1 == self.spec.steps:
            self._ended = True
            return
        self._step, self._tries = self._step + 1, 0
        self._intake.move(self._step, self._attempt)

    # --- the check -------------------------------------------------------------------------------------------------

    def _begin_check(self, effects: list[Effect]) -> bool:
        """Check everything up to the step that is done, and go on to the next. Not while another check is under way."""
        if self._check is not None:
            return False
        assert self._checker is not None
        assert self._state is not None
        self.catch_up()
        machine = Verification(
            self.spec,
            self.index,
            self._step,
            checker=self._checker,
            records=self._records,
            transcript=self._transcript.digest(),
            seed=coefficient_seed(self.spec, self._seed, self._step),
            random=self._random,
        )
        done = Checked(step=self._step, outputs=self._outputs, state=dict(self._state))
        self._check = _Pending(machine, self._attempt, done, self._records)
        self._records, self._outputs, self._check_is_due = [], {}, False
        self._intake.begin_check()
        self._say(effects, machine.begin())
        self._next_step()
        return True

    def _go_on_checking(self, effects: list[Effect], check: _Pending) -> bool:
        if check.machine.has_work:
            return False
        came = self._intake.messages(check.machine.awaits)
        if came is None:
            return False
        said = check.machine.advance(came)
        if said is not None:
            self._say(effects, said)
        if not check.machine.passed:
            return True
        self._check = None
        for record in check.records:
            self._arithmetic.take_back(record.run)
        self._intake.end_check()
        self.checks += 1
        self._release(effects, check.done)
        return True

    def _say(self, effects: list[Effect], said: tuple[Kind, bytes]) -> None:
        assert self._check is not None
        kind, payload = said
        step, attempt = self._check.done.step, self._check.attempt
        effects.append(Broadcast(kind=kind, step=step, attempt=attempt, round=0, payload=payload))

    def _release(self, effects: list[Effect], done: Checked) -> None:
        effects.append(done)
        if done.step + 1 == self.spec.steps:
            self._finished = True
            self._die("finished")
            effects.append(Done())


class _Pending:
    """A check under way, of the attempt under which its last step ran; what may leave when it has passed; and whose
    arrays are free then."""

    __slots__ = ("attempt", "done", "machine", "records")

    def __init__(self, machine: Verification, attempt: int, done: Checked, records: list[Record]) -> None:
        self.machine = machine
        self.attempt = attempt
        self.done = done
        self.records = records
