"""The check's σ and the dealer's tags: the fast field against Python's integers, and circuits of unusual gates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers_spdz import Builder, Cheat, CheatingCommittee, Committee, SlowField, fixed, toy_rows, toy_spec, toy_state
from sordino_common.errors import LocalError
from sordino_common.ring.prg import Seed
from sordino_common.spdz import check
from sordino_common.spdz.circuit import Circuit, Gate, Term, Wire, gate_of
from sordino_common.spdz.errors import MacCheckError
from sordino_common.spdz.terms import add_terms, has_terms

P127 = 2**127 - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def odd_circuit() -> Circuit:
    """What training steps hardly have: both kinds of product in one gate, coefficients so large that k m is no int64,
    a product with padding on one side, two products of one kind, matrices of one row or column."""
    b = Builder()
    x = b.input("x", "x", (3, 3), 2.0**-4)
    y = b.input("y", "y", (3, 3), 2.0**-4)
    turned = b.view("permute", y, (1, 0), (3, 3))
    big, huge = 1 << 16, 1 << 19
    mixed = b.gate([("mm", x, turned, 3), ("mul", x, y, big), ("mul", y, y, 2)], [(x, -5)], shape=(3, 3), addend=77)
    outer = b.gate([("mul", x, turned, huge), ("mm", x, y, huge // 8), ("mm", y, y, -1)], shape=(3, 3), shift=18)
    padded = b.view("gather", x, (9, 0, 9, 1, 2, 3, 4, 5, 6), (3, 3))
    half = b.gate([("mul", padded, y, huge), ("mul", mixed, padded, 1)], [(y, huge)], shape=(3, 3), shift=18)
    row = b.view("gather", x, (0, 1, 9), (1, 3))
    column = b.view("gather", y, (2, 9, 4), (3, 1))
    single = b.gate([("mm", row, column, 1)], shape=(1, 1))
    table = b.gate([("mm", column, row, huge)], shape=(3, 3), shift=20)
    total = b.gate([("mul", padded, padded, huge, (0,))], shape=(3,), shift=18)
    outputs = {"mixed": mixed, "outer": outer, "half": half, "single": single, "table": table, "total": total}
    return b.circuit(**{name: ("value", wire) for name, wire in outputs.items()})


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


@pytest.mark.parametrize("odd", [False, True])
def test_sigma_is_what_the_integers_say_however_many_steps_go_together(
    odd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ_i of 3 steps: `ring.fp` and Python's integers give the same number; so do steps one by one."""
    if odd:
        committee = odd_committee(steps=4, check_every=4)
    else:
        toy = toy_spec(2, steps=4, check_every=4)
        committee = Committee(toy, toy_rows(toy), toy_state(toy))
    committee.start()
    for step in range(3):
        committee.play(step)
    joint = Seed(bytes(range(32)))
    sums = []
    for party in committee.parties:
        checker = party._checker
        assert checker is not None and len(party._records) == 3
        together = checker.sigma(party._records, joint)
        slow = check.Checker(committee.spec, party._layout, SlowField(P127), seed=party._seed, mac_key=checker._key)
        # The slow field expands seeds its own way; it is given the same shares.
        slow._macs = checker._macs  # type: ignore[method-assign]
        assert slow.sigma(party._records, joint) == together
        with monkeypatch.context() as patch:
            patch.setattr(check, "_TOGETHER", 1)
            assert checker.sigma(party._records, joint) == together
        assert checker.sigma(party._records, Seed(bytes(32))) != together
        sums.append(together)
    assert sum(sums) % P127 == 0


# --- the linear part of a gate -------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(INT64, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(-(1 << 46), 1 << 46), INT64), max_size=4),
    st.integers(-(1 << 100), 1 << 100) | st.integers(-5, 5),
)
def test_terms_are_two_words(low: list[int], terms: list[tuple[int, int]], addend: int) -> None:
    """low + 2^64 high is the integer, edges included."""
    addend = max(-(1 << 63), min((1 << 63) - 1, addend))
    array = np.array(low, dtype=np.int64)
    wires = [(k, np.full(len(low), w, dtype=np.int64)) for k, w in terms]
    with np.errstate(over="ignore"):
        high = add_terms(array, wires, addend)
    for k, (got, top) in enumerate(zip(array.tolist(), high.tolist(), strict=True)):
        assert got + (top << 64) == low[k] + sum(c * w for c, w in terms) + addend


def test_terms_that_float64_can_not_tell_apart_are_refused() -> None:
    b = Builder()
    x = b.input("x", "x", (1, 1))
    b.gate([("mul", x, x, 1)], [(x, 1)], shape=(1, 1))
    gate = gate_of(b.circuit(), 1)
    assert has_terms(gate)
    large = Gate(
        products=gate.products, terms=(Term(operand=x, coefficient=1 << 60),), addend=0, shift=14, bound_bits=40,
        round=0, node=9, wire=gate.wire,
    )  # fmt: skip
    with pytest.raises(LocalError, match=r"a gate of node 9: its terms are up to 124 bits long; with 1 terms, float64"):
        has_terms(large)


def test_a_wire_that_no_gate_makes_is_named() -> None:
    b = Builder()
    x = b.input("x", "x", (1, 1))
    b.view("view", x, (1,), (1,))
    with pytest.raises(LocalError, match="wire 1 is made by a View, not by a gate"):
        gate_of(b.circuit(), 1)
    assert isinstance(b.wire(1), Wire)
