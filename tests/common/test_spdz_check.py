"""The check's σ and the dealer's tags: the fast field against Python's integers, and circuits of unusual gates."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers_spdz import (
    Builder,
    Cheat,
    CheatingCommittee,
    Committee,
    SlowField,
    fixed,
    odd_circuit,
    toy_rows,
    toy_spec,
    toy_state,
)
from sordino_common.errors import LocalError
from sordino_common.ring.prg import Seed
from sordino_common.spdz import check
from sordino_common.spdz.circuit import Wire, gate_of
from sordino_common.spdz.effects import Broadcast, Effect
from sordino_common.spdz.errors import MacCheckError
from sordino_common.spdz.party import Party
from sordino_common.spdz.transcript import joint_seed

P127 = 2**127 - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def odd_committee(
    kind: type[Committee] = Committee, *, steps: int = 2, check_every: int = 1, field: SlowField | None = None
) -> Committee:
    owners = (("ada", 3), ("bob", 3))
    spec = toy_spec(2, circuit=odd_circuit(), steps=steps, check_every=check_every, owners=owners)
    rng = np.random.default_rng(7)
    rows = {
        name: {entry: fixed(rng.uniform(-1 / 16, 1 / 16, (count, 3))) for entry in ("x", "y")} for name, count in owners
    }
    return kind(spec, rows, {}, field=field)


@pytest.mark.parametrize("slow", [False, True])
def test_unusual_gates_are_dealt_and_checked(slow: bool) -> None:
    committee = odd_committee(field=SlowField(P127) if slow else None)
    committee.run()
    assert [party.checks for party in committee.parties] == [committee.spec.steps] * 2


@pytest.mark.parametrize("gate", range(6))
def test_a_wrong_opening_of_an_unusual_gate_is_found(gate: int) -> None:
    committee = odd_committee(CheatingCommittee)
    assert isinstance(committee, CheatingCommittee)
    place = list(committee.parties[0]._layout.gates.values())[gate]
    committee.cheat(Cheat(what="opening", party=1, step=0, place=place.stop - 1, bit=gate))
    with pytest.raises(MacCheckError):
        committee.run()


def sigma_of(checker: check.Checker, party: Party, joint: Seed) -> int:
    """All portions, the last one of which is σ_i."""
    *others, sigma = checker.sigma(party._records, joint)
    assert others and set(others) == {None}
    assert sigma is not None
    return sigma


@given(steps=st.integers(1, 80), sizes=st.lists(st.integers(0, 2 * check._PORTION), max_size=3))
def test_portions_are_as_many_as_was_said_and_every_step_is_in_one_of_each_kind(steps: int, sizes: list[int]) -> None:
    """Fewer, and σ would never come; more, and it would come without the last ones. None is larger than it may be."""
    sums = check.Sums.__new__(check.Sums)
    numbers = [SimpleNamespace(number=k, tags=np.zeros((2, 1), dtype=np.uint64)) for k in range(steps)]
    seen: list[list[int]] = [[] for _ in sizes]

    def gates(index: int, elements: int) -> SimpleNamespace:
        def summed(field: object, some: list[SimpleNamespace]) -> tuple[int, int]:
            assert len(some) == 1 or len(some) * elements <= check._PORTION
            seen[index] += [one.number for one in some]
            return len(some), 0

        return SimpleNamespace(elements=elements, sums=summed)

    sums._bare = SimpleNamespace(sums=lambda *_, addends: [0])  # type: ignore[assignment]
    sums._large = [gates(index, elements) for index, elements in enumerate(sizes)]  # type: ignore[misc]
    found = list(sums.of(SlowField(P127), numbers))  # type: ignore[arg-type]
    assert len(found) == sums.portions(steps)
    assert seen == [list(range(steps))] * len(sizes)


@pytest.mark.parametrize("odd", [False, True])
def test_sigma_is_what_the_integers_say_however_many_steps_go_together(
    odd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ_i of 3 steps: `ring.fp` and Python's integers give the same number; so do steps one by one. They sum to 0 with
    the coefficients that the tags were dealt with, and with no others."""
    if odd:
        committee = odd_committee(steps=4, check_every=4)
    else:
        toy = toy_spec(2, steps=4, check_every=4)
        committee = Committee(toy, toy_rows(toy), toy_state(toy))
    committee.start()
    for step in range(3):
        committee.play(step)
    joint, _ = committee.dealer._coefficients_of(3)
    sums, others = [], []
    for party in committee.parties:
        checker = party._checker
        assert checker is not None and len(party._records) == 3
        together = sigma_of(checker, party, joint)
        slow = check.Checker(committee.spec, party._layout, SlowField(P127), seed=party._seed, mac_key=checker._key)
        # The slow field expands seeds its own way; it is given the same shares.
        slow._tags = checker._tags  # type: ignore[method-assign]
        assert sigma_of(slow, party, joint) == together
        with monkeypatch.context() as patch:
            patch.setattr(check, "_TOGETHER", 1)
            assert sigma_of(checker, party, joint) == together
        for size in (1, 300, 1 << 40):
            with monkeypatch.context() as patch:
                patch.setattr(check, "_PORTION", size)
                assert sigma_of(checker, party, joint) == together
        sums.append(together)
        others.append(sigma_of(checker, party, Seed(bytes(range(32)))))
    assert sum(sums) % P127 == 0
    assert sum(others) % P127 != 0


def test_a_wire_that_no_gate_makes_is_named() -> None:
    b = Builder()
    x = b.input("x", "x", (1, 1))
    b.view("view", x, (1,), (1,))
    with pytest.raises(LocalError, match="wire 1 is made by a View, not by a gate"):
        gate_of(b.circuit(), 1)
    assert isinstance(b.wire(1), Wire)


# --- coefficients --------------------------------------------------------------------------------------------------


def test_coefficients_are_unknown_while_one_seed_is() -> None:
    """The joint seed changes with each member's; every check, step and attempt has coefficients of its own."""
    committee = Committee(spec := toy_spec(3, steps=4, check_every=2), toy_rows(spec), toy_state(spec))
    layout, seeds = committee.parties[0]._layout, [party._seed for party in committee.parties]
    parts = [check.coefficient_seed(spec, seed, 1) for seed in seeds]
    joint = joint_seed(spec, 1, parts)
    assert committee.dealer._coefficients_of(1)[0].expose() == joint
    for k in range(3):
        others = [bytes(32) if k == j else part for j, part in enumerate(parts)]
        assert joint_seed(spec, 1, others) != joint
    drawn = [
        check.coefficients(spec, layout, Seed(joint), step, attempt).tobytes()
        for step, attempt in ((0, 0), (1, 0), (1, 1))
    ]
    assert len(set(drawn)) == 3
    assert check.coefficient_seed(spec, seeds[0], 3) != parts[0]
    assert spec.check_of(0) == spec.check_of(1) == 1 and spec.check_of(2) == 3


def test_kappas_make_errors_in_two_gates_of_a_family_independent() -> None:
    """The same error in one element of two gates, with opposite signs: without a κ for each gate they would cancel."""
    b = Builder()
    x = b.input("x", "x", (1, 2), 4.0)
    first, second = (b.gate([("mul", x, x, 1)], shape=(1, 2)) for _ in range(2))
    circuit = b.circuit(first=("value", first), second=("value", second))
    spec = toy_spec(2, circuit=circuit, steps=1, owners=(("ada", 1),))
    committee = CheatingCommittee(spec, toy_rows(spec), {})
    (family,) = committee.parties[0]._layout.tagging.families
    assert family.gates == (first, second)
    party = committee.parties[1]
    send = party._send_round

    def lie(effects: list[Effect]) -> None:
        send(effects)
        honest, run = effects.pop(), party._run
        assert isinstance(honest, Broadcast)
        assert run is not None
        run.gammas[0] += 1
        run.gammas[2] -= 1
        effects.append(msgspec.structs.replace(honest, payload=run.gammas.tobytes()))

    party._send_round = lie  # type: ignore[method-assign]
    with pytest.raises(MacCheckError):
        committee.run()
