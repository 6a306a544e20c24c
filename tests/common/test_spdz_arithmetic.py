"""A party's arithmetic on arrays that stay: against Python's integers, again and again in the same arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers_spdz import Builder, Committee, evaluate_node, odd_circuit, toy_circuit, toy_rows, toy_spec, toy_state
from sordino_common.spdz.arithmetic import Arithmetic, Run, at_edge
from sordino_common.spdz.circuit import Circuit, Gate, View, gate_of
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.spec import Security

INT64 = np.iinfo(np.int64)


def views_circuit() -> Circuit:
    """Views of views that are no views of memory, sums, linear nodes with all kinds of coefficients; a number alone."""
    b = Builder()
    x, w = b.input("x", "x", (2, 3)), b.input("w", "param", ())
    turned = b.view("permute", x, (1, 0), (3, 2))
    flat = b.view("view", turned, (6,), (6,))
    picked = b.view("gather", flat, (5, 6, 0, 3), (2, 2))
    wide = b.view("expand", w, (2, 2), (2, 2))
    mixed = b.linear((1, picked), (1, wide), (-1, picked), (3, wide), constant=11)
    scaled = b.linear((-7, mixed), (1, picked))
    squares = b.gate([("mul", picked, wide, 5), ("mm", picked, picked, -1)], [(scaled, 1), (mixed, -1)], shape=(2, 2))
    rows = b.sum(squares, (0,))
    alone = b.sum(rows, (0,))
    number = b.gate([("mul", w, w, 3), ("mul", alone, w, -1)], [(alone, 9)], shape=(), addend=-5)
    total = b.gate([("mul", x, x, -2, (0, 1)), ("mul", x, x, 1, (0, 1))], shape=())
    bare = b.gate([], [(number, 1), (total, -3)], shape=())
    return b.circuit(mixed=("value", mixed), bare=("value", bare))


def draw(random: np.random.Generator, count: int) -> Any:
    """Of the whole ring, its ends more often than by chance."""
    drawn = random.integers(INT64.min, INT64.max, count, np.int64, endpoint=True)
    drawn[random.random(count) < 0.1] = INT64.min
    return drawn


def wrapped(integers: Any) -> Any:
    flat = np.asarray(integers, dtype=object)
    return np.array([(each + 2**63) % 2**64 - 2**63 for each in flat.ravel()], dtype=np.int64).reshape(flat.shape)


def share_of(
    circuit: Circuit, number: int, values: list[Any], masks: dict[int, Any], gamma: Any, *, first: bool
) -> Any:
    """z^i by its formula."""
    gate = gate_of(circuit, number)
    z = gamma.astype(object) + (evaluate_node(circuit, gate, values) if first else 0)
    for item in gate.products:
        for a, b in ((values[item.a], masks[item.b]), (masks[item.a], values[item.b])):
            part = a * b if item.kind == "mul" else np.matmul(a, b)
            z = z - item.coefficient * (part.sum(axis=item.reduce) if item.reduce else part)
    return wrapped(z)


def play(circuit: Circuit, arithmetic: Arithmetic, one: Run, random: np.random.Generator, *, first: bool) -> None:
    """A step with other parties' shares drawn at random: every share and every wire is as the integers say."""
    layout = layout_of(circuit)
    for array in (*one.inputs, one.shares):
        array[...] = draw(random, array.size).reshape(array.shape)
    gammas = one.gammas.copy()
    masks: dict[int, Any] = {
        number: one.shares[place].reshape(circuit.wire(number).shape).astype(object)
        for number, place in layout.roots.items()
    }
    for number, node in enumerate(circuit.nodes, start=len(circuit.inputs)):
        if isinstance(node, View) and node.operand in masks and number not in masks:
            operand = {**dict.fromkeys(range(number), None), **masks}
            masks[number] = evaluate_node(circuit, node, [operand[k] for k in range(number)])
    arithmetic.begin(one)
    for round_, opened in enumerate(circuit.rounds):
        values = [np.asarray(value).astype(object) for value in one.values]
        mine = arithmetic.share(one)
        assert mine is one.rounds[round_]
        for number in opened:
            place = layout.gates[number]
            expected = share_of(
                circuit, number, values, masks, gammas[place].reshape(circuit.wire(number).shape), first=first
            )
            assert np.array_equal(one.gammas[place].reshape(expected.shape), expected)
        mine += draw(random, mine.size) >> np.int64(3)
        while at_edge(mine, 60):  # not here
            mine >>= np.int64(1)
        assert arithmetic.accept(one) == ""
        for number in opened:
            m = one.gammas[layout.gates[number]] >> gate_of(circuit, number).shift
            assert np.array_equal(one.values[number].reshape(-1), m)
    actual = [np.asarray(value).astype(object) for value in one.values]
    for number, node in enumerate(circuit.nodes, start=len(circuit.inputs)):
        if not isinstance(node, Gate):
            assert np.array_equal(one.values[number], wrapped(evaluate_node(circuit, node, actual))), node


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [toy_circuit, odd_circuit, views_circuit])
def test_shares_and_wires_are_what_the_integers_say(make: Any, first: bool) -> None:
    """Of the whole ring, so that everything wraps; NumPy has nothing to warn of. Two steps' arrays at a time."""
    circuit, random = make(), np.random.default_rng(5)
    arithmetic = Arithmetic(circuit, layout_of(circuit), first=first)
    one, other = arithmetic.lend(), arithmetic.lend()
    assert one is not other
    for _ in range(3):
        for run in (one, other):
            play(circuit, arithmetic, run, random, first=first)
            arithmetic.take_back(run)
            assert arithmetic.lend() is run and run.round == 0 and run.tags is None


def test_each_gate_has_an_edge_of_its_own() -> None:
    """A round is looked at with the bound of its loosest gate; what is at the edge of none is taken."""
    b = Builder()
    x = b.input("x", "x", (1, 2), 1.0)
    tight, loose = (b.gate([("mul", x, x, 1)], shape=(1, 2), bound_bits=bits) for bits in (34, 40))
    circuit = b.circuit(tight=("value", tight), loose=("value", loose))
    bounds = [gate_of(circuit, number).bound_bits for number in (tight, loose)]
    assert circuit.rounds == ((tight, loose),) and bounds[0] < bounds[1]
    arithmetic = Arithmetic(circuit, layout_of(circuit), first=True)
    edges = [(1 << 63) - (1 << bits) for bits in bounds]
    for sign in (1, -1):
        for place, gate, least in (
            (0, tight, edges[0]),
            (1, tight, edges[0]),
            (2, loose, edges[1]),
            (3, loose, edges[1]),
        ):
            one = arithmetic.lend()
            one.gammas[...] = 0
            one.gammas[place] = sign * (least - 1)
            assert arithmetic.accept(one) == ""
            one = arithmetic.lend()
            one.gammas[...] = 0
            one.gammas[place] = sign * least
            assert arithmetic.accept(one) == f"gate {gate}"
            assert one.round == 0


@pytest.mark.parametrize(("security", "most"), [("passive", 2), ("active", 6)])
def test_arrays_are_lent_again_and_forgotten_at_the_end(
    security: Security, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a passive session two sets, one for the step that is prepared; of an active one as many more as steps await
    their check, that which is under way included. None is left when the session has ended."""
    made: dict[int, int] = {}
    lay_out = Arithmetic._lay_out

    def counted(self: Arithmetic) -> Run:
        made[id(self)] = made.get(id(self), 0) + 1
        return lay_out(self)

    monkeypatch.setattr(Arithmetic, "_lay_out", counted)
    spec = toy_spec(2, security=security, steps=12, check_every=2)
    committee = Committee(spec, toy_rows(spec), toy_state(spec))
    committee.run()
    assert len(made) == 2 and all(1 <= count <= most for count in made.values())
    assert all(not party._arithmetic._free for party in committee.parties)
