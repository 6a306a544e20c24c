"""Whatever one member changes, the others end with a named error or with the right answer: never with a wrong one."""

from __future__ import annotations

import math
import os
import random
from collections import Counter

import numpy as np
import pytest

from helpers_spdz import (
    CHEATS,
    Builder,
    Cheat,
    CheatingCommittee,
    Committee,
    SlowField,
    toy_rows,
    toy_spec,
    toy_state,
)
from sordino_common.spdz.circuit import Circuit
from sordino_common.spdz.effects import Broadcast
from sordino_common.spdz.errors import CommitmentError, EquivocationError, MacCheckError, ProtocolError, SessionDead
from sordino_common.spdz.layout import layout_of

SOAK = bool(os.environ.get("SORDINO_SOAK"))
NAMED = {
    "opening": {"mac-check"},
    "mac": {"mac-check", "correction"},
    "lambda": {"mac-check"},
    "gamma": {"mac-check"},
    "seed": {"commitment"},
    "sigma": {"commitment"},
    "false-seed": {"mac-check"},
    "false-sigma": {"mac-check"},
    "seed-commitment": {"commitment"},
    "sigma-commitment": {"commitment"},
    "equivocation": {"equivocation"},
}


def attempt(cheat: Cheat, n: int, seed: int) -> str:
    """The error that the honest members end with, or "right" if all outputs are right. Fails if something is wrong."""
    spec = toy_spec(n, steps=2)
    rows, state = toy_rows(spec, seed=seed % 5), toy_state(spec)
    committee = CheatingCommittee(spec, rows, state, seed=seed)
    committee.cheat(cheat)
    try:
        committee.run()
    except (MacCheckError, CommitmentError, EquivocationError, ProtocolError) as error:
        for k, checked in enumerate(committee.checked):  # nothing of the step that was cheated in has left
            assert k == cheat.party or all(found.step < cheat.step for found in checked), cheat
        return error.code
    except AssertionError:
        # One member met the edge of the ring and the others did not: they would wait for it until the deadline.
        assert cheat.what == "equivocation", cheat
        return "equivocation"
    honest = Committee(spec, rows, state, seed=seed)
    honest.run()
    for mine, theirs in zip(committee.checked[0], honest.checked[0], strict=True):
        for step, outputs in mine.outputs.items():
            for name, m in outputs.items():
                assert np.array_equal(m, theirs.outputs[step][name]), cheat
        for name, m in mine.state.items():
            assert np.array_equal(m, theirs.state[name]), cheat
    return "right"


def pads(place: int) -> bool:
    """Whether that word of the toy's tags belongs to a zero that a gather has put in."""
    circuit = toy_spec(2).circuit
    layout = layout_of(circuit)
    tags = layout.tagging
    idle = {
        factor.tags.start + k
        for family in tags.families
        for group in family.groups
        for factor in group.factors
        if factor.wire not in layout.roots
        for k, source in enumerate(circuit.tables[0])
        if source == circuit.inputs[1].wire.numel
    }
    assert len(idle) == 1
    return place % (2 * tags.tags) % tags.tags in idle


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_random_tamperings_are_named() -> None:
    """{what} x {party} x {step} x {element} x {bit}. A share of λ that is wrong by 2^b times an m that ends in 64 - b
    zeros changes nothing, nor does the tag of a zero that pads (it is multiplied by that zero): these, and nothing
    else, may end well."""
    rng = random.Random(20240501)
    ends: Counter[tuple[str, str]] = Counter()
    for trial in range(10_000 if SOAK else 250):
        n = 2 + trial % 3
        step = rng.randrange(2)
        what = CHEATS[trial % len(CHEATS)]
        party = step % n if what in ("mac", "lambda", "gamma") else rng.randrange(n)
        cheat = Cheat(what=what, party=party, step=step, place=rng.randrange(10_000), bit=rng.randrange(64))
        end = attempt(cheat, n, seed=trial)
        ends[(what, end)] += 1
        harmless = (what == "lambda" and cheat.bit > 40) or (what == "mac" and pads(cheat.place))
        assert end in NAMED[what] or (end == "right" and harmless), (cheat, end)
    print(dict(sorted(ends.items())))


@pytest.mark.parametrize("gate", range(8))
def test_every_kind_of_gate_is_checked(gate: int) -> None:
    """The lowest and the highest bit of an opening of each gate of the toy circuit."""
    spec = toy_spec(2)
    circuit = spec.circuit
    party = Committee(spec, toy_rows(spec), toy_state(spec)).parties[0]
    places = list(party._layout.gates.values())
    for bit in (0, 63):
        cheat = Cheat(what="opening", party=1, step=0, place=places[gate].start, bit=bit)
        assert attempt(cheat, 2, seed=gate) == "mac-check"
    assert len(places) == len(circuit.gates) == 8


def test_after_a_failed_check_the_session_is_dead_and_says_why() -> None:
    spec = toy_spec(2)
    committee = CheatingCommittee(spec, toy_rows(spec), toy_state(spec))
    committee.cheat(Cheat(what="opening", party=0, step=0, place=3, bit=17))
    with pytest.raises(
        MacCheckError, match=r"the MAC check after step 0 failed: a member or the preprocessing cheats, or"
    ):
        committee.run()
    dead = [party for party in committee.parties if party._dead]
    assert dead
    with pytest.raises(SessionDead, match=r"the session has ended: mac-check: the MAC check after step 0 failed"):
        dead[0].on_restart(0, 1)
    assert dead[0]._checker is None and dead[0]._state is None


def test_equivocation_and_false_commitments_name_the_member() -> None:
    spec = toy_spec(3)
    for what, error, text in (
        ("equivocation", EquivocationError, "has seen other openings than"),
        ("seed", CommitmentError, "party-2 opened a seed that it had not committed to"),
        ("sigma", CommitmentError, "party-2 opened a check value that it had not committed to"),
    ):
        committee = CheatingCommittee(spec, toy_rows(spec), toy_state(spec))
        committee.cheat(Cheat(what=what, party=2, step=0, place=0, bit=3))
        with pytest.raises(error, match=text):
            committee.run()


def test_an_owner_who_tells_members_different_things_is_found() -> None:
    spec = toy_spec(2)
    committee = Committee(spec, toy_rows(spec), toy_state(spec))
    take = committee.parties[1].on_input

    def other(owner: str, step: int, attempt: int, masked: object) -> object:
        changed = {name: value + np.int64(owner == "ada") for name, value in masked.items()}  # type: ignore[attr-defined]
        return take(owner, step, attempt, changed)

    committee.parties[1].on_input = other  # type: ignore[assignment, method-assign]
    with pytest.raises(EquivocationError):
        committee.run()


def test_parameters_that_differ_between_members_are_found() -> None:
    spec = toy_spec(2)
    committee = Committee(spec, toy_rows(spec), toy_state(spec))
    take = committee.parties[1].on_state
    committee.parties[1].on_state = lambda masked: take({k: v + 1 for k, v in masked.items()})  # type: ignore[method-assign]
    with pytest.raises(EquivocationError):
        committee.run()


def test_a_message_of_another_session_fits_nowhere() -> None:
    """Commitments, coefficients and shares are bound to the session: replayed, they are wrong."""
    first, second = (toy_spec(2, session=name) for name in (b"session-number-1", b"session-number-2"))
    before = Committee(first, toy_rows(first), toy_state(first), seed=5)
    before.run()
    old = {(k, m.kind, m.round): m for k, m in before.sent if m.step == 0}
    for kind, error in (("open", "equivocation"), ("check-1", "equivocation"), ("check-2", "commitment")):
        committee = Committee(second, toy_rows(second), toy_state(second), seed=6)

        def replay(sender: int, _receiver: int, m: Broadcast, kind: str = kind) -> Broadcast:
            return old[(sender, m.kind, m.round)] if sender == 1 and m.step == 0 and m.kind == kind else m

        committee.tamper = replay
        with pytest.raises((MacCheckError, EquivocationError, CommitmentError)) as caught:
            committee.run()
        assert caught.value.code == error


def tiny_circuit(matrix: bool) -> Circuit:
    b = Builder()
    x = b.input("x", "x", (1, 1), 4.0)
    product = b.gate([("mm" if matrix else "mul", x, x, 1)], shape=(1, 1))
    return b.circuit(out=("value", product))


@pytest.mark.soak
@pytest.mark.parametrize("matrix", [False, True])
def test_in_a_small_field_the_check_fails_as_often_as_computed(matrix: bool) -> None:
    """p = 31. An error e != 0 mod p passes iff α = 0 or the element's coefficient is 0 mod p, which is a product of two
    (κ ρ, or χ ψ for a matrix): chance 1 - (1 - 1/p)^3. Counted; false alarm below 10^-6 (5 standard errors)."""
    prime = 31
    spec = toy_spec(2, circuit=tiny_circuit(matrix), steps=1, owners=(("ada", 1),))
    rows = toy_rows(spec)
    trials = 20_000 if SOAK else 1_200
    passed = 0
    for trial in range(trials):
        committee = CheatingCommittee(spec, rows, {}, field=SlowField(prime), seed=trial)
        committee.cheat(Cheat(what="opening", party=1, step=0, place=0, bit=trial % 20))
        try:
            committee.run()
        except MacCheckError:
            continue
        passed += 1
    expected = 1 - (1 - 1 / prime) ** 3
    error = math.sqrt(expected * (1 - expected) / trials)
    print(f"p = {prime}: {passed}/{trials} passed, expected {expected * trials:.1f}")
    assert abs(passed / trials - expected) < 5 * error


def test_honest_runs_pass_in_a_small_field_too() -> None:
    spec = toy_spec(2, circuit=tiny_circuit(True), steps=1, owners=(("ada", 1),))
    for trial in range(200):
        Committee(spec, toy_rows(spec), {}, field=SlowField(31), seed=trial).run()
