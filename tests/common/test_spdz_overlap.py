"""Checks travel with the openings of later steps: what is the same, what may not leave, what a cheater gets of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers_spdz import Cheat, CheatingCommittee, Committee, flip, toy_rows, toy_spec, toy_state
from sordino_common.errors import LocalError, SordinoError
from sordino_common.spdz import check
from sordino_common.spdz.arithmetic import Run
from sordino_common.spdz.effects import Broadcast, Checked, Effect
from sordino_common.spdz.errors import (
    CommitmentError,
    EquivocationError,
    MacCheckError,
    ProtocolError,
    SessionDead,
    UncheckedOpenings,
)
from sordino_common.spdz.party import Party
from sordino_common.spdz.spec import Security
from sordino_common.spdz.transcript import Transcript

STEPS = 4


class Ahead(CheatingCommittee):
    """Everything is fed before anything is delivered, so that parties run as far ahead as they may. While `holds` says
    so, messages of checks stay on their way."""

    def begin(self) -> None:
        self.log: list[list[tuple[str, int]]] = [[] for _ in self.parties]
        self.kept: list[tuple[int, int, Broadcast]] = []
        self.holds: Callable[[Broadcast], bool] = lambda message: False
        tamper = self.tamper

        def keep(sender: int, receiver: int, message: Broadcast) -> Broadcast | None:
            changed = tamper(sender, receiver, message)
            if changed is not None and self.holds(changed):
                self.kept.append((sender, receiver, changed))
                return None
            return changed

        self.tamper = keep
        self.start()
        for step in range(self.spec.steps):
            self.feed(step, 0)

    def _perform(self, k: int, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Broadcast):
                self.log[k].append((effect.kind, effect.step))
            elif isinstance(effect, Checked):
                self.log[k].append(("checked", effect.step))
        super()._perform(k, effects)

    def let_go(self) -> None:
        """What was kept arrives, and nothing is kept any more."""
        self.holds = lambda message: False
        self._queue.extend(self.kept)
        self.kept.clear()
        self._deliver()

    def restart(self, attempt: int) -> None:
        (step,) = {retry.step for retry in self._stopped.values()}
        assert len(self._stopped) == self.n
        self._stopped.clear()
        for k, party in enumerate(self.parties):
            self._perform(k, party.on_restart(step, attempt))
        self.dealer.rewind(step, attempt)
        for later in range(step, self.spec.steps):
            self.feed(later, attempt)
        self._deliver()


def ahead(n: int = 2, *, seed: int = 0, check_every: int = 1) -> Ahead:
    spec = dataclasses.replace(toy_spec(n, steps=STEPS), check_every=check_every)
    return Ahead(spec, toy_rows(spec), toy_state(spec), seed=seed)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("check_every", [1, 2])
def test_the_answer_is_the_same_and_every_check_passes(n: int, check_every: int) -> None:
    for seed in range(8):
        committee = ahead(n, seed=seed, check_every=check_every)
        committee.begin()
        committee._deliver()
        honest = Committee(committee.spec, committee.rows, committee.state, seed=seed)
        honest.run()
        for party, mine, theirs in zip(committee.parties, committee.checked, honest.checked, strict=True):
            assert party.checks == STEPS // check_every
            assert [found.step for found in mine] == [found.step for found in theirs]
            for a, b in zip(mine, theirs, strict=True):
                assert a.outputs.keys() == b.outputs.keys()
                assert all(np.array_equal(a.state[name], b.state[name]) for name in b.state)
                for step, outputs in b.outputs.items():
                    assert all(np.array_equal(a.outputs[step][name], m) for name, m in outputs.items())


def test_the_next_step_opens_while_the_check_is_under_way() -> None:
    committee = ahead()
    committee.begin()
    committee._deliver()
    for log in committee.log:
        for step in range(STEPS - 1):
            assert log.index(("check-1", step)) < log.index(("open", step + 1)) < log.index(("checked", step))
            assert log.index(("checked", step)) < log.index(("check-1", step + 1))
        assert log[-1] == ("checked", STEPS - 1)


@pytest.mark.parametrize("kind", ["check-1", "check-2", "check-3", "check-4"])
def test_nothing_leaves_and_no_second_check_begins_before_the_first_has_passed(kind: str) -> None:
    committee = ahead()
    committee.begin()
    committee.holds = lambda message: message.kind == kind
    committee._deliver()
    assert committee.checked == [[], []]
    for party, log in zip(committee.parties, committee.log, strict=True):
        assert {step for what, step in log if what == "open"} == {0, 1}
        assert {step for what, step in log if what != "open"} == {0}
        assert party.waiting_for == f"step 1: {kind} of party-{1 - party.index}"
        assert party._check_is_due
    committee.let_go()
    assert [[found.step for found in mine] for mine in committee.checked] == [list(range(STEPS))] * 2


def test_a_session_closed_over_a_check_under_way_says_so() -> None:
    committee = ahead(check_every=STEPS)
    committee.begin()
    committee.holds = lambda message: message.kind == "check-1"
    committee._deliver()
    with pytest.raises(SordinoError, match="not checked"):
        committee.parties[0].close()


@pytest.mark.parametrize("seed", range(6))
def test_a_step_runs_again_while_the_check_before_it_is_under_way(seed: int) -> None:
    """The check goes on under the attempt that it is of."""
    committee = ahead(3, seed=seed)
    committee.begin()
    committee.holds = lambda message: message.kind == f"check-{1 + seed % 4}"
    for party in committee.parties:
        meet_the_edge(party, step=1, round_=0)
    committee._deliver()
    assert len(committee._stopped) == 3
    assert committee.checked == [[], [], []]
    committee.restart(1)
    assert committee.checked == [[], [], []]
    committee.let_go()
    assert [[found.step for found in mine] for mine in committee.checked] == [list(range(STEPS))] * 3
    assert [party.retries for party in committee.parties] == [1, 1, 1]


@pytest.mark.parametrize("what", ["opening", "mac", "gamma", "false-sigma", "equivocation", "seed", "sigma"])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_cheat_is_found_by_the_check_of_its_step(what: str, step: int) -> None:
    """Whatever runs beside a check: steps before it leave, the step that was cheated in and later ones don't."""
    for n in (2, 3):
        party = step % n if what in ("mac", "gamma") else (step + 1) % n
        committee = ahead(n, seed=step)
        committee.cheat(Cheat(what=what, party=party, step=step, place=7 * step + 3, bit=5))
        committee.begin()
        with pytest.raises((MacCheckError, CommitmentError, EquivocationError)):
            committee._deliver()
        for k, mine in enumerate(committee.checked):
            assert k == party or all(found.step < step for found in mine)


def test_an_opening_of_the_next_step_cannot_be_chosen_to_mend_a_check() -> None:
    """Openings of step 1, sent when the seeds of check 0 are known, are of no account to it; check 1 finds them."""
    committee = ahead()
    committee.begin()
    committee.holds = lambda message: message.kind == "check-4" or (message.kind, message.step) == ("open", 1)
    committee._deliver()
    assert all(("check-2", 0) in log for log in committee.log)
    committee.kept = [
        (sender, receiver, msgspec.structs.replace(message, payload=flip(message.payload, 9)))
        if (sender, message.kind) == (1, "open")
        else (sender, receiver, message)
        for sender, receiver, message in committee.kept
    ]
    with pytest.raises((EquivocationError, MacCheckError)):
        committee.let_go()
    assert [found.step for found in committee.checked[0]] == [0]


def test_two_contents_for_one_place_of_a_check_are_refused_while_later_steps_run() -> None:
    committee = ahead()
    committee.begin()
    committee.holds = lambda message: message.kind == "check-2"
    committee._deliver()
    party = committee.parties[0]
    (theirs,) = [message.payload for sender, _, message in committee.kept if sender == 1]
    said = next(message.payload for who, message in committee.sent if (who, message.kind) == (1, "check-1"))
    assert party.on_message(1, "check-1", 0, 0, 0, said) == []  # again: no news
    with pytest.raises(ProtocolError, match="two different messages"):
        party.on_message(1, "check-1", 0, 0, 0, flip(said, 3))
    other = committee.parties[1]
    assert other.on_message(0, "check-4", 0, 0, 0, bytes(48)) == []  # early, and it waits
    with pytest.raises(ProtocolError, match="two different messages"):
        other.on_message(0, "check-4", 0, 0, 0, bytes(47) + b"1")
    assert len(theirs) == 32


def test_openings_do_not_wait_for_a_check_value_that_is_computed_in_portions() -> None:
    """A party whose σ is not computed answers every opening, and says nothing more of the check."""
    committee = ahead()
    committee.begin()
    idle = committee.parties[1]
    committee.works = lambda k: k != 1  # its driver never finds the time
    committee._deliver()
    log = committee.log[1]
    assert {step for what, step in log if what == "open"} == {0, 1}
    assert [what for what, step in log if what != "open"] == ["check-1", "check-2"]
    assert committee.log[0][-1] != ("checked", 0)
    committee.works = lambda k: True
    assert idle.has_work
    assert idle.waiting_for == "step 1: this party's own share of its check"
    committee._deliver()
    assert [[found.step for found in mine] for mine in committee.checked] == [list(range(STEPS))] * 2


def test_a_check_value_takes_a_portion_for_each_family_of_gates() -> None:
    committee = ahead()
    committee.begin()
    portions = [0, 0]
    for party in committee.parties:
        real = party._work

        def work(party: object = party, real: Callable[[], None] = real) -> None:
            portions[party.index] += 1  # type: ignore[attr-defined]
            real()

        party._work = work  # type: ignore[method-assign]
    committee._deliver()
    each = check.Sums(committee.parties[0]._layout).portions(1)
    assert each == 2 + len(committee.parties[0]._layout.tagging.families)
    assert portions == [STEPS * each] * 2


def test_work_that_is_not_there_is_no_work_and_after_the_end_it_is_refused() -> None:
    committee = ahead()
    committee.begin()
    party = committee.parties[0]
    assert not party.has_work
    assert party.work() == []
    committee._deliver()
    assert party.work() == []  # all is done
    other = ahead()
    other.begin()
    other.parties[0].abandon()
    with pytest.raises(SessionDead, match="abandoned"):
        other.parties[0].work()


def test_the_next_word_of_a_check_is_not_taken_before_the_own_value_is_computed() -> None:
    """What the machine says, it says with its own σ: whoever drives it past that is told."""
    committee = ahead()
    committee.begin()
    committee.holds = lambda message: message.kind == "check-2"
    committee._deliver()
    party = committee.parties[0]
    (seed,) = [message.payload for sender, _, message in committee.kept if sender == 1]
    assert party._check is not None
    machine = party._check.machine
    with pytest.raises(LocalError, match="no σ is to be computed"):
        machine.work()
    assert machine.advance({1: seed}) is None
    assert machine.has_work
    with pytest.raises(LocalError, match="σ is not computed yet"):
        machine.advance({1: bytes(32)})
    assert not machine.passed


@pytest.mark.parametrize("security", ["active", "passive"])
@pytest.mark.parametrize("retries", [False, True])
def test_whether_a_party_finds_the_time_to_catch_up_changes_no_bit(security: Security, retries: bool) -> None:
    """Every message, transcripts included, whoever caught up when; also if a step runs again that is prepared."""
    said, prepared = [], []
    for leisure in (0.0, 0.5, 1.0):
        spec = toy_spec(3, security=security, steps=STEPS, check_every=2)
        committee = Committee(spec, toy_rows(spec), toy_state(spec), seed=4)
        committee.leisure = leisure
        party = committee.parties[0]
        lend, found = party._lend, []

        def lent(at: tuple[int, int], lend: Any = lend, found: list[bool] = found) -> tuple[Run, bool]:
            run, ready = lend(at)
            found.append(ready)
            return run, ready

        party._lend = lent  # type: ignore[method-assign]
        if retries:
            for each in committee.parties:
                meet_the_edge(each, step=1, round_=1)
        committee.run()
        assert committee.retries == retries
        prepared.append(sum(found))
        said.append(sorted((who, m.kind, m.step, m.attempt, m.round, m.payload) for who, m in committee.sent))
    assert said[0] == said[1] == said[2]
    assert prepared[2] > 0


def meet_the_edge(party: Party, *, step: int, round_: int) -> None:
    """In its first attempt of that step, in that round, as everybody sees the same."""
    real = party._arithmetic.accept

    def accept(run: Run) -> str:
        if (party._step, party._attempt, run.round) == (step, 0, round_):
            return "a value"
        return real(run)

    party._arithmetic.accept = accept  # type: ignore[method-assign]


def test_a_batch_that_meets_the_edge_is_in_the_transcript_where_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the openings of the step before, whoever has hashed these by then."""
    said = []
    for leisure in (0.0, 0.5, 1.0):
        spec = toy_spec(3, steps=STEPS, check_every=2)
        committee = Committee(spec, toy_rows(spec), toy_state(spec), seed=4)
        committee.leisure = leisure
        now: list[tuple[int, int]] = []
        for party in committee.parties:

            def begin(effects: list[Effect], party: Party = party, real: Any = party._begin, now: Any = now) -> bool:
                now[:] = [(party._step, party._attempt)]
                return bool(real(effects))

            party._begin = begin  # type: ignore[method-assign]
        with monkeypatch.context() as patch:
            patch.setattr("sordino_common.spdz.party.at_edge", lambda *_, now=now: now == [(1, 0)])
            committee.run()
        assert committee.retries == 1
        assert [party.checks for party in committee.parties] == [2] * 3
        said.append(sorted((who, m.kind, m.step, m.attempt, m.round, m.payload) for who, m in committee.sent))
    assert said[0] == said[1] == said[2]


def test_a_commitment_to_a_check_value_has_a_nonce_of_its_own() -> None:
    committee = ahead()
    drawn: list[bytes] = []
    for party in committee.parties:
        real = party._random

        def random(size: int, real: Callable[[int], bytes] = real) -> bytes:
            drawn.append(real(size))
            return drawn[-1]

        party._random = random  # type: ignore[misc]
    committee.begin()
    committee._deliver()
    nonces = {message.payload[16:] for _, message in committee.sent if message.kind == "check-4"}
    assert len(nonces) == 2 * STEPS
    assert nonces <= set(drawn)
    assert {len(nonce) for nonce in nonces} == {32}


def test_what_was_put_off_is_told_by_whoever_needs_it() -> None:
    """An error on the way is no error of the one who had the time, and is there again when it matters."""
    committee = ahead()
    committee.begin()
    party = committee.parties[0]

    def broken() -> None:
        raise ProtocolError("something is wrong here")

    party._put_off.append(broken)
    for _ in range(2):
        with pytest.raises(ProtocolError, match="something is wrong"):
            party.catch_up()
    with pytest.raises(ProtocolError, match="something is wrong"):
        party.on_message(1, "open", 0, 0, 0, committee.sent[-1][1].payload)
    with pytest.raises(SessionDead):
        party.work()
    party.catch_up()  # nothing is left of a session that is over


def test_of_shares_that_were_prepared_nothing_is_left_when_a_session_ends() -> None:
    for end in (Party.abandon, Party.close):
        committee = ahead()
        committee.leisure = 1.0
        committee.works = lambda k: False
        committee.begin()
        committee._deliver()  # up to a check that is not computed
        (party,) = [party for party in committee.parties if party._prepared is not None]
        with contextlib.suppress(UncheckedOpenings):
            end(party)
        assert party._prepared is None


def test_an_entry_of_the_transcript_is_in_it_whole_or_not_at_all() -> None:
    """What failed and is tried again would be in it twice, and an honest party a liar."""
    spec = toy_spec(2)
    tried, other = Transcript(spec), Transcript(spec)
    with pytest.raises(ValueError, match="invalid literal"):
        tried.add("open", 0, 0, 0, "", np.array(["no number"]))
    for each in (tried, other):
        each.add("open", 0, 0, 0, "", np.arange(3))
    assert tried.digest() == other.digest()


def test_shares_that_are_many_are_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sordino_common.spdz.party.PREPARED_BYTES", 8)
    committee = ahead()
    committee.leisure = 1.0
    committee.begin()
    committee._deliver()
    assert [party._prepared for party in committee.parties] == [None, None]
    assert [party.checks for party in committee.parties] == [STEPS, STEPS]
