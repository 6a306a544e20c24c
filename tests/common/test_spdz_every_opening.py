"""Every element that any gate opens is checked: random circuits of every kind of gate, each opening wrong by one.

`test_wrong_by_one` runs the protocol; `test_coefficients_are_independent` shows more: no fixed errors, in however
many elements and steps of one check, cancel for all joint seeds (their matrix [seeds, openings] has full rank).
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence

import numpy as np
import pytest

from helpers_spdz import Builder, Cheat, CheatingCommittee, Committee, F, fixed, toy_spec
from sordino_common.ring.prg import Seed
from sordino_common.spdz import check
from sordino_common.spdz.circuit import Cat, Circuit
from sordino_common.spdz.errors import MacCheckError
from sordino_common.spdz.field import Mersenne127
from sordino_common.spdz.layout import layout_of

P127 = 2**127 - 1
KINDS = ("mul", "square", "reduce", "mm", "bmm", "mixed", "bare", "family", "view", "linear", "sum", "cat")
LIMIT = 1 << 40  # |z|
ROOM = 1 << 62
ROWS = 2


class Random:
    """A circuit, node by node; every wire with a bound on |x| and on |m|, |λ|."""

    def __init__(self, seed: int) -> None:
        self.rng, self.b = random.Random(seed), Builder()
        self.size: dict[int, int] = {}
        self.room: dict[int, int] = {}
        inputs = (("x", "x", (ROWS, 2)), ("y", "y", (ROWS, 2)), ("w", "param", (2, 3)), ("v", "param", (2,)))
        for name, role, shape in inputs:
            number = self.b.input(name, role, shape, 2.0)
            self.size[number], self.room[number] = 1 << 15, 1 << 49
        self.gates = 0

    def shape(self, wire: int) -> tuple[int, ...]:
        return self.b.wire(wire).shape

    def pick(self, shape: tuple[int, ...] | None = None, rank: int | None = None, most: int = 8) -> int | None:
        fit = [
            k for k in self.size
            if (shape is None or self.shape(k) == shape) and (rank is None or len(self.shape(k)) == rank)
            and self.b.wire(k).numel <= most
        ]  # fmt: skip
        return self.rng.choice(fit) if fit else None

    def k(self) -> int:
        return self.rng.choice((1, 1, 1, -1, 2, -3, 0, 1 << 9, -(1 << 14)))

    def put(self, number: int, size: int, room: int) -> int:
        self.size[number], self.room[number] = size, room
        return number

    def gate(self, products: Sequence[tuple], shape: tuple[int, ...], terms: bool = True) -> int | None:
        rng = self.rng
        made, bound = [], 0
        for kind, a, b, *reduce in products:
            k, dims = self.k(), reduce[0] if reduce else ()
            inner = int(np.prod([self.shape(a)[d] for d in dims])) if kind == "mul" else self.shape(a)[-1]
            if abs(k) * inner * self.size[a] * self.size[b] >= LIMIT // 4:
                k = rng.choice((1, -1))
            bound += abs(k) * inner * self.size[a] * self.size[b]
            made.append((kind, a, b, k, dims))
        added = []
        for _ in range(rng.randrange(3) if terms else 0):
            term, k = self.pick(shape), rng.choice((1, -1, 3, 1 << 14))
            if term is not None:
                added.append((term, k))
                bound += abs(k) * self.size[term]
        if not made and not added and terms:
            return None
        addend = rng.choice((0, 0, 5, -7, 1 << 30))
        bound += abs(addend)
        if bound >= LIMIT:
            return None
        shift = rng.choice((14, 14, 18, 20, 0))
        if not made and not added:  # a gate of nothing: the builder wants an operand for its round
            return None
        number = self.b.gate(made, added, shape=shape, shift=shift, addend=addend)
        self.gates += 1
        return self.put(number, (bound >> shift) + 1, 1 << (63 - shift))

    def step(self, kind: str) -> None:
        rng = self.rng
        if kind in ("mul", "square", "family", "bare"):
            a = self.pick()
            shape = self.shape(a)
            for _ in range(2 if kind == "family" else 1):
                pairs = [
                    ("mul", c, c if kind == "square" else self.pick(shape))
                    for c in (self.pick(shape) for _ in range(rng.randrange(1, 4)))
                ]
                self.gate([] if kind == "bare" else pairs, shape)
        elif kind == "reduce":
            a = self.pick()
            shape = self.shape(a)
            dims = tuple(sorted(rng.sample(range(len(shape)), rng.randrange(len(shape) + 1))))
            result = tuple(n for d, n in enumerate(shape) if d not in dims)
            products = [("mul", self.pick(shape), a, dims), ("mul", a, a, dims)]
            same = self.pick(result)
            if same is not None and rng.random() < 0.5:
                products.append(("mul", same, self.pick(result)))
            self.gate(products, result)
        elif kind in ("mm", "mixed", "bmm"):
            rank = 3 if kind == "bmm" else 2
            a = self.pick(rank=rank)
            fit = [
                k for k in self.size
                if a is not None and len(self.shape(k)) == rank and self.shape(k)[-2] == self.shape(a)[-1]
                and self.shape(k)[:-2] == self.shape(a)[:-2]
            ]  # fmt: skip
            if a is None or not fit:
                return
            b = rng.choice(fit)
            shape = (*self.shape(a)[:-1], self.shape(b)[-1])
            if np.prod(shape) > 8:
                return
            products = [("mm" if rank == 2 else "bmm", a, b)]
            same = self.pick(shape)
            if rng.random() < 0.4:
                products.append((products[0][0], a, b))
            if same is not None and (kind == "mixed" or rng.random() < 0.4):
                products += [("mul", same, self.pick(shape)), ("mul", same, same)]
                over = self.pick(rank=rank + 1)
                if over is not None and self.shape(over)[1:] == shape:
                    products.append(("mul", over, over, (0,)))
            self.gate(products, shape)
        elif kind == "view":
            a = self.pick()
            shape, n = self.shape(a), self.b.wire(a).numel
            what = rng.randrange(4)
            if what == 0 and len(shape) >= 2:
                dims = tuple(rng.sample(range(len(shape)), len(shape)))
                out = self.b.view("permute", a, dims, tuple(shape[d] for d in dims))
            elif what == 1:
                shapes = ((n,), (1, n), (n, 1), (1, 1, n), (2, n // 2), (n // 2, 1, 2))
                new = rng.choice([each for each in shapes if np.prod(each) == n])
                out = self.b.view("view", a, new, new)
            elif what == 2 and n <= 4:
                out = self.b.view("expand", a, (2, *shape), (2, *shape))
            else:
                new = rng.choice(((2, 2), (3,), (2, 3), (2, 1, 2)))
                out = self.b.view("gather", a, tuple(rng.randrange(n + 1) for _ in range(int(np.prod(new)))), new)
            self.put(out, self.size[a], self.room[a])
        elif kind == "linear":
            a = self.pick()
            terms = [(rng.choice((1, -1, 2, -3)), k) for k in (a, self.pick(self.shape(a)))]
            room = sum(abs(k) * self.room[wire] for k, wire in terms)
            if room <= ROOM:
                out = self.b.linear(*terms, constant=rng.choice((0, 9, -11)))
                self.put(out, sum(abs(k) * self.size[wire] for k, wire in terms) + 11, room + 11)
        elif kind == "sum":
            a = self.pick()
            shape = self.shape(a)
            if shape and shape[0] * self.room[a] <= ROOM:
                self.put(self.b.sum(a, (0,)), shape[0] * self.size[a], shape[0] * self.room[a])
        elif kind == "cat":
            a = self.pick(most=4)
            if a is None or not self.shape(a):
                return
            b = self.pick(self.shape(a))
            wire = self.b._same((2 * self.shape(a)[0], *self.shape(a)[1:]), a, b)
            out = self.b._put(Cat(operands=(a, b), dim=0, wire=wire), max(self.b._levels[a], self.b._levels[b]))
            self.put(out, max(self.size[a], self.size[b]), max(self.room[a], self.room[b]))

    def circuit(self) -> Circuit:
        last = max(self.size)
        made = self.b.circuit(out=("value", last))
        first = len(made.inputs)
        nodes = tuple(
            dataclasses.replace(node, wire=dataclasses.replace(node.wire, room=self.room[first + k]))
            for k, node in enumerate(made.nodes)
        )
        return dataclasses.replace(made, nodes=nodes)


def random_circuit(seed: int, gates: int = 7) -> Circuit:
    made = Random(seed)
    kinds = list(KINDS)
    for _ in range(200):
        if made.gates >= gates:
            break
        made.step(made.rng.choice(kinds))
    return made.circuit()


def committee(kind: type[Committee], circuit: Circuit, *, n: int, seed: int) -> Committee:
    spec = toy_spec(n, circuit=circuit, steps=2, check_every=2, owners=(("ada", 3),))
    rng = np.random.default_rng(seed)
    rows = {"ada": {entry.name: fixed(rng.uniform(-2, 2, (3, 2))) for entry in spec.row_inputs}}
    state = {entry.name: fixed(rng.uniform(-2, 2, entry.wire.shape)) for entry in spec.state_inputs}
    return kind(spec, rows, state, seed=seed)


# Small ones with much in them: [seed, gates]. SORDINO_EVERY=n adds n others.
MORE = int(os.environ.get("SORDINO_EVERY", "0"))
PICKED = [(88, 5), (60, 4), (207, 5), *((1000 + k, 6) for k in range(MORE))]


def twins() -> Circuit:
    """Two gates of every kind, of equal shapes: nothing but κ, χ and ψ of their own tells them apart."""
    b = Builder()
    x, y = (b.input(name, name, (2, 2)) for name in ("x", "y"))
    row, column = (b.view("gather", wire, (0, 3), shape) for wire, shape in ((x, (1, 2)), (y, (2, 1))))
    for _ in range(2):
        b.gate([("mm", column, row, 1)], shape=(2, 2), addend=3)
        b.gate([("mul", row, row, 1)], [(row, 2)], shape=(1, 2))
        b.gate([], [(row, 1 << F)], shape=(1, 2))
    return b.circuit(out=("value", max(range(len(b._levels)))))


@pytest.mark.parametrize(("seed", "gates"), PICKED)
def test_wrong_by_one(seed: int, gates: int) -> None:
    """Each opening in turn, in either step of a window; and without it, the check passes."""
    circuit, n = random_circuit(seed, gates), 2 + seed % 3
    honest = committee(Committee, circuit, n=n, seed=seed)
    honest.run()
    assert [party.checks for party in honest.parties] == [1] * n
    for place in range(circuit.gate_elements):
        cheating = committee(CheatingCommittee, circuit, n=n, seed=seed)
        assert isinstance(cheating, CheatingCommittee)
        cheating.cheat(Cheat(what="opening", party=place % n, step=place % 2, place=place, bit=0))
        with pytest.raises(MacCheckError):
            cheating.run()


def weights(circuit: Circuit, joint: Seed, steps: int) -> list[int]:
    """The coefficient of every opening of `steps` steps of one check, as a member's V has it."""
    spec = toy_spec(2, circuit=circuit, steps=steps, check_every=steps, owners=(("ada", 3),))
    layout, field = layout_of(circuit), Mersenne127()
    sums, scales = check.Sums(layout), check.kappas(spec, layout, joint, steps - 1)
    wires = [np.zeros(circuit.wire(k).shape, dtype=np.int64) for k in range(len(circuit.inputs) + len(circuit.nodes))]

    tags = np.zeros((2, layout.tagging.tags), dtype=np.uint64)
    numbers = [
        check.Numbers(
            values=wires, opened=np.zeros(layout.gate_elements, dtype=np.int64), kappas=scales, tags=tags,
            coefficients=check.coefficients(spec, layout, joint, step, 0),
        )
        for step in range(steps)
    ]  # fmt: skip

    def public() -> int:
        return sum(v for v, _ in sums.of(field, numbers))

    base, found = public(), []
    for one in numbers:
        for place in range(layout.gate_elements):
            one.opened[place] = 1
            found.append((base - public()) % P127)
            one.opened[place] = 0
    return found


def rank(rows: list[list[int]]) -> int:
    done = 0
    for column in range(len(rows[0])):
        at = next((k for k in range(done, len(rows)) if rows[k][column]), None)
        if at is None:
            continue
        rows[done], rows[at] = rows[at], rows[done]
        inverse = pow(rows[done][column], -1, P127)
        pivot = [value * inverse % P127 for value in rows[done]]
        for k in range(done + 1, len(rows)):
            factor = rows[k][column]
            if factor:
                rows[k] = [(a - factor * b) % P127 for a, b in zip(rows[k], pivot, strict=True)]
        done += 1
    return done


@pytest.mark.parametrize(
    ("circuit", "steps"),
    [(twins(), 2), *((random_circuit(seed, gates), 1) for seed, gates in ((88, 5), (107, 4), (60, 5)))],
    ids=["twins", "88", "107", "60"],
)
def test_coefficients_are_independent(circuit: Circuit, steps: int) -> None:
    count = steps * circuit.gate_elements
    rng = random.Random(count)
    rows = [weights(circuit, Seed(rng.randbytes(32)), steps) for _ in range(count)]
    assert all(all(row) for row in rows)
    assert rank(rows) == count


def test_every_bit_of_a_coefficient_is_drawn() -> None:
    """63 bits, none of them always 0: soundness is counted in them."""
    circuit = twins()
    spec, layout = toy_spec(2, circuit=circuit, steps=1, owners=(("ada", 3),)), layout_of(circuit)
    seeds = [Seed(random.Random(k).randbytes(32)) for k in range(60)]  # missed by chance: 63 · 2^-120
    of_gates = [each for seed in seeds for each in check.kappas(spec, layout, seed, 0)]
    of_elements = [int(each) for seed in seeds for each in check.coefficients(spec, layout, seed, 0, 0)]
    for drawn in (of_gates, of_elements):
        assert len(set(drawn)) == len(drawn)
        assert min(drawn) >= 0
        assert max(drawn) < 1 << 63
        assert np.bitwise_or.reduce(np.array(drawn)) == (1 << 63) - 1
