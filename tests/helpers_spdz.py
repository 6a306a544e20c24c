"""Circuits, committees in one process, and a slow field for the tests of the protocol."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sordino_common.ring.prg import SEED_BYTES, Seed, expand_bytes
from sordino_common.spdz.circuit import (
    Circuit,
    CircuitInput,
    CircuitOutput,
    Gate,
    Linear,
    Node,
    Product,
    Sum,
    Term,
    View,
    Wire,
)
from sordino_common.spdz.dealing import Deal, Dealer
from sordino_common.spdz.effects import Broadcast, Checked, Done, Effect, Retry
from sordino_common.spdz.field import Field
from sordino_common.spdz.owner import InputOwner, mask_state
from sordino_common.spdz.party import Party
from sordino_common.spdz.spec import PADDING, Schedule, Security, SessionSpec

I64 = npt.NDArray[np.int64]
F = 14


class SlowField:
    """`Field` over F_p for any p < 2^127 by Python integers: the oracle, and the small field of the soundness test."""

    def __init__(self, prime: int) -> None:
        self.prime = prime

    def ints(self, a: Any) -> Any:
        low, high = a[0].astype(object), a[1].astype(object)
        return low + high * (1 << 64)

    def pack(self, values: Any) -> Any:
        values = np.asarray(values, dtype=object)
        flat = [int(value) % self.prime for value in values.reshape(-1)]
        out = np.zeros((2, len(flat)), dtype=np.uint64)
        out[0] = [value & (2**64 - 1) for value in flat]
        out[1] = [value >> 64 for value in flat]
        return out.reshape(2, *values.shape)

    def scale(self, scalar: int, v: I64) -> Any:
        return self.pack(np.asarray(v.astype(object) * scalar, dtype=object))

    def sub(self, a: Any, b: Any) -> Any:
        return self.pack(np.asarray(self.ints(a) - self.ints(b), dtype=object))

    def mul_int64(self, a: Any, v: I64) -> Any:
        return self.pack(np.asarray(self.ints(a) * v.astype(object), dtype=object))

    def mul_exact(self, a: I64, b: I64) -> Any:
        return self.pack(np.asarray(a.astype(object) * b.astype(object), dtype=object))

    def scale_fp(self, scalar: int, a: Any) -> Any:
        return self.pack(np.asarray(self.ints(a) * scalar, dtype=object))

    def integers(self, x: Any) -> Any:
        return self.ints(x) if x.dtype == np.uint64 else x.astype(object)

    def dots(self, left: Sequence[Any], right: Sequence[Any], pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
        sums = [(self.integers(left[i]) * self.integers(right[j])).sum(axis=-1) for i, j in pairs]
        return [[int(value) % self.prime for value in each] for each in sums]

    def vectors(self, v: I64) -> Any:
        return v.astype(object).reshape(1, -1, 1)

    def mat_vecs(self, jobs: Sequence[tuple[I64, Any]]) -> Any:
        return self.pack(np.concatenate([np.matmul(a.astype(object), v[0]).reshape(-1) for a, v in jobs]))

    def expand(self, seed: Seed, info: bytes, count: int) -> Any:
        raw = bytearray(32 * count)
        expand_bytes(seed, info, memoryview(raw))
        numbers = [int.from_bytes(raw[32 * k : 32 * k + 32], "little") % self.prime for k in range(count)]
        return self.pack(np.array(numbers, dtype=object)) if count else np.zeros((2, 0), dtype=np.uint64)


class Builder:
    """A circuit by hand. Every wire has `F` fraction bits; magnitudes are given."""

    def __init__(self) -> None:
        self.inputs: list[CircuitInput] = []
        self.nodes: list[Node] = []
        self.tables: list[tuple[int, ...]] = []
        self._levels: list[int] = []

    def input(self, name: str, role: str, shape: tuple[int, ...], magnitude: float = 8.0) -> int:
        bound_bits = math.ceil(math.log2(magnitude)) + 2 * F + 1
        wire = Wire(shape=shape, fraction_bits=F, magnitude=magnitude, room=1 << (63 - F))
        self.inputs.append(CircuitInput(name=name, role=role, wire=wire, shift=F, bound_bits=bound_bits))
        self._levels.append(0)
        return len(self._levels) - 1

    def wire(self, number: int) -> Wire:
        n = len(self.inputs)
        return self.inputs[number].wire if number < n else self.nodes[number - n].wire

    def _put(self, node: Node, level: int) -> int:
        self.nodes.append(node)
        self._levels.append(level)
        return len(self._levels) - 1

    def _same(self, shape: tuple[int, ...], *operands: int, room: int | None = None) -> Wire:
        rooms = sum(self.wire(number).room for number in operands)
        magnitude = sum(self.wire(number).magnitude for number in operands)
        return Wire(shape=shape, fraction_bits=F, magnitude=magnitude, room=room or rooms)

    def view(self, op: Any, operand: int, args: tuple[int, ...], shape: tuple[int, ...]) -> int:
        if op == "gather":
            self.tables.append(args)
            args = (len(self.tables) - 1,)
        wire = self._same(shape, operand)
        return self._put(View(op=op, operand=operand, args=args, wire=wire), self._levels[operand])

    def linear(self, *terms: tuple[int, int], constant: int = 0) -> int:
        operands = [wire for _, wire in terms]
        wire = self._same(self.wire(operands[0]).shape, *operands)
        node = Linear(terms=terms, constant=constant, table=None, wire=wire)
        return self._put(node, max(self._levels[k] for k in operands))

    def sum(self, operand: int, dims: tuple[int, ...]) -> int:
        shape = tuple(size for k, size in enumerate(self.wire(operand).shape) if k not in dims)
        wire = self._same(shape, operand)
        return self._put(Sum(operand=operand, dims=dims, keepdim=False, wire=wire), self._levels[operand])

    def gate(
        self,
        products: Sequence[tuple[Any, ...]] = (),
        terms: Sequence[tuple[int, int]] = (),
        *,
        shape: tuple[int, ...],
        shift: int = F,
        bound_bits: int = 40,
        addend: int = 0,
    ) -> int:
        """`products`: (kind, a, b, coefficient, reduce)."""
        made = tuple(
            Product(kind=p[0], a=p[1], b=p[2], coefficient=p[3], reduce=p[4] if len(p) > 4 else ()) for p in products
        )
        operands = [k for p in made for k in (p.a, p.b)] + [wire for wire, _ in terms]
        level = max(self._levels[k] for k in operands)
        wire = Wire(shape=shape, fraction_bits=F, magnitude=2.0 ** (bound_bits - 28), room=1 << (63 - shift))
        node = Gate(
            products=made,
            terms=tuple(Term(operand=k, coefficient=c) for k, c in terms),
            addend=addend,
            shift=shift,
            bound_bits=bound_bits,
            round=level,
            node=0,
            wire=wire,
        )
        return self._put(node, level + 1)

    def circuit(self, **outputs: tuple[str, int]) -> Circuit:
        """`outputs`: name=(role, wire)."""
        return Circuit(
            plan_id=bytes(32),
            inputs=tuple(self.inputs),
            nodes=tuple(self.nodes),
            outputs=tuple(CircuitOutput(name=name, role=role, wire=wire) for name, (role, wire) in outputs.items()),
            tables=tuple(self.tables),
            constants=(),
        )


def toy_circuit(rows: int = 4, features: int = 3) -> Circuit:
    """A step of least squares with a square on the way; gates of every kind: mm, mul, square, reduce, terms, bmm."""
    b = Builder()
    w = b.input("w", "param", (features, 2), 4.0)
    x = b.input("x", "x", (rows, features), 4.0)
    y = b.input("y", "y", (rows, 2), 4.0)
    z = b.gate([("mm", x, w, 1)], [(y, -(1 << F))], shape=(rows, 2))  # residual
    square = b.gate([("mul", z, z, 1)], shape=(rows, 2), addend=5)
    loss = b.gate([("mul", z, z, 3, (0, 1))], shape=(), shift=F + 2)
    mixed = b.gate([("mul", z, square, -2), ("mul", z, z, 1)], [(z, 7)], shape=(rows, 2), shift=F + 1)
    xt = b.view("permute", x, (1, 0), (features, rows))
    both = b.linear((1, z), (2, mixed), constant=9)
    change = b.gate([("mm", xt, z, 1)], [(w, 3)], shape=(features, 2), shift=F + 6)
    batched = b.gate(
        [("bmm", b.view("view", x, (rows, 1, features), (rows, 1, features)),
          b.view("expand", w, (rows, features, 2), (rows, features, 2)), 1)],
        shape=(rows, 1, 2),
    )  # fmt: skip
    picked = b.view("gather", x, (0, rows * features, 1, 2), (2, 2))
    gathered = b.gate([("mul", picked, picked, 1)], shape=(2, 2))
    sums = b.sum(both, (0,))
    total = b.gate([("mul", sums, sums, 1)], shape=(2,))
    after = b.linear((1, w), (-1, change))
    return b.circuit(
        w=("param", after), loss=("loss", loss), batched=("value", batched), gathered=("value", gathered),
        total=("value", total),
    )  # fmt: skip


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


def evaluate_node(circuit: Circuit, node: Node, values: list[Any]) -> Any:
    """One node over the integers, with Python integers: the oracle. A gate's z, before it is truncated."""
    match node:
        case View(op="gather"):
            flat = np.append(values[node.operand].reshape(-1), 0)
            return flat[list(circuit.tables[node.args[0]])].reshape(node.wire.shape)
        case View(op="view"):
            return values[node.operand].reshape(node.wire.shape)
        case View(op="permute"):
            return values[node.operand].transpose(node.args)
        case View():
            return np.broadcast_to(values[node.operand], node.wire.shape)
        case Linear():
            return sum(c * values[k] for c, k in node.terms) + node.constant
        case Sum():
            return np.asarray(values[node.operand].sum(axis=node.dims, keepdims=node.keepdim))
        case Gate():
            z = np.zeros(node.wire.shape, dtype=object) + node.addend
            for p in node.products:
                if p.kind == "mul":
                    part = values[p.a] * values[p.b]
                    part = part.sum(axis=p.reduce) if p.reduce else part
                else:
                    part = np.matmul(values[p.a], values[p.b])
                z = z + p.coefficient * part
            for term in node.terms:
                z = z + term.coefficient * values[term.operand]
            return np.asarray(z, dtype=object)
        case _:
            raise AssertionError(node)


@dataclass
class Committee:
    """n parties, a dealer and owners in one process. `tamper` may change or drop what one party tells another."""

    spec: SessionSpec
    rows: Mapping[str, Mapping[str, I64]]  # owner -> input name -> fixed point [rows, ...]
    state: Mapping[str, I64]
    field: Field | None = None
    seed: int = 0
    tamper: Callable[[int, int, Broadcast], Broadcast | None] = lambda sender, receiver, message: message
    correct: Callable[[Deal], bytes] = lambda deal: deal.correction
    parties: list[Party] = dataclasses.field(default_factory=list)
    checked: list[list[Checked]] = dataclasses.field(default_factory=list)
    sent: list[tuple[int, Broadcast]] = dataclasses.field(default_factory=list)
    retries: int = 0
    attempts: dict[int, int] = dataclasses.field(default_factory=dict)
    masks: Mapping[str, I64] | None = None  # with `held` and `first_step`: go on from a checkpoint
    held: Mapping[str, I64] | None = None
    first_step: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        root = Seed(self.rng.randbytes(SEED_BYTES))
        self.dealer = Dealer(self.spec, root, field=self.field, state=self.masks, first_step=self.first_step)
        self.owners = {name: InputOwner(self.spec, name, self.dealer.owner_seed(name)) for name in self.rows}
        n = len(self.spec.parties)
        self.parties = [
            Party(self.spec, k, self.dealer.setup(k), random=self.rng.randbytes, field=self.field) for k in range(n)
        ]
        self.checked = [[] for _ in range(n)]
        self._queue: deque[tuple[int, int, Broadcast]] = deque()
        self._stopped: dict[int, Retry] = {}
        self.leisure = 0.3  # how often a party catches up between two messages
        self.works: Callable[[int], bool] = lambda k: True  # whether a party's driver finds the time

    @property
    def n(self) -> int:
        return len(self.parties)

    def run(self) -> None:
        """All steps, whatever order the messages come in."""
        self.start()
        for step in range(self.first_step, self.spec.steps):
            self.play(step)

    def start(self) -> None:
        masked = mask_state(self.spec, self.dealer.state_seed(), self.state) if self.held is None else {}
        for k, party in enumerate(self.parties):
            if self.held is None:
                self._perform(k, party.on_state(masked))
            else:
                self._perform(k, party.resume(self.first_step, self.held))

    def play(self, step: int) -> None:
        attempt = self.dealer.next_attempt
        self.feed(step, attempt)
        self._deliver()
        while self._stopped:
            assert len(self._stopped) == self.n
            stopped, self._stopped = self._stopped, {}
            assert len({(retry.step, retry.attempt, retry.where) for retry in stopped.values()}) == 1
            attempt += 1
            self.retries += 1
            for k, party in enumerate(self.parties):
                self._perform(k, party.on_restart(step, attempt))
            self.dealer.rewind(step, attempt)
            self.feed(step, attempt)
            self._deliver()
        self.attempts[step] = attempt

    def feed(self, step: int, attempt: int) -> None:
        deal = self.dealer.deal(step, attempt)
        self._perform(deal.corrected, self.parties[deal.corrected].on_correction(step, attempt, self.correct(deal)))
        if self.spec.schedule is None:
            return
        for part in self.spec.schedule.step(step):
            values = {name: rows_of(array, part.rows) for name, array in self.rows[part.owner].items()}
            masked = self.owners[part.owner].masked(step, attempt, values)
            for k, party in enumerate(self.parties):
                self._perform(k, party.on_input(part.owner, step, attempt, masked))

    def outputs(self, step: int) -> dict[str, I64]:
        """x = m - λ of a checked step's outputs."""
        masks = self.dealer.output_masks(step)
        (found,) = {id(c): c for c in self.checked[0] if step in c.outputs}.values()
        return {name: m - masks[name] for name, m in found.outputs[step].items()}

    def state_after(self, step: int) -> dict[str, I64]:
        """x = m - λ of the state after a step that a check ended with."""
        masks = self.dealer.state(step)
        (found,) = [checked for checked in self.checked[0] if checked.step == step]
        return {name: m - masks[name] for name, m in found.state.items()}

    def _perform(self, k: int, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Broadcast():
                    self.sent.append((k, effect))
                    for other in range(self.n):
                        if other != k:
                            changed = self.tamper(k, other, effect)
                            if changed is not None:
                                self._queue.append((k, other, changed))
                case Retry():
                    self._stopped[k] = effect
                case Checked():
                    self.checked[k].append(effect)
                case Done():
                    pass

    def _deliver(self) -> None:
        """Messages, and portions of the parties' own work, in any order. Some parties catch up between them, some don't
        find the time."""
        moments = random.Random(self.seed)
        while True:
            for party in self.parties:
                if moments.random() < self.leisure:
                    party.catch_up()
            working = [k for k, party in enumerate(self.parties) if party.has_work and self.works(k)]
            if not self._queue and not working:
                return
            place = self.rng.randrange(len(self._queue) + len(working))
            if place >= len(self._queue):
                k = working[place - len(self._queue)]
                self._perform(k, self.parties[k].work())
                continue
            self._queue.rotate(-place)
            sender, receiver, message = self._queue.popleft()
            party = self.parties[receiver]
            self._perform(
                receiver,
                party.on_message(sender, message.kind, message.step, message.attempt, message.round, message.payload),
            )


def rows_of(array: I64, rows: I64) -> I64:
    """The rows of `array`, zeros for `PADDING`."""
    taken = array[np.maximum(rows, 0)].copy()
    taken[rows == PADDING] = 0
    return taken


def toy_spec(
    n: int = 3,
    *,
    security: Security = "active",
    steps: int = 3,
    check_every: int = 1,
    retries: int = 3,
    circuit: Circuit | None = None,
    owners: Sequence[tuple[str, int]] = (("ada", 5), ("bob", 7)),
    session: bytes = b"session-of-tests",
) -> SessionSpec:
    circuit = circuit or toy_circuit()
    rows = next(entry.wire.shape[0] for entry in circuit.inputs if entry.role == "x")
    return SessionSpec(
        session=session,
        circuit=circuit,
        circuit_digest=bytes(32),
        parties=tuple(f"party-{k}" for k in range(n)),
        security=security,
        steps=steps,
        check_every=check_every,
        retries=retries,
        schedule=Schedule(rows=tuple(owners), batch_rows=rows, seed=7),
    )


def toy_rows(spec: SessionSpec, seed: int = 0) -> dict[str, dict[str, I64]]:
    rng = np.random.default_rng(seed)
    assert spec.schedule is not None
    return {
        name: {entry.name: fixed(rng.uniform(-2, 2, (count, *entry.wire.shape[1:]))) for entry in spec.row_inputs}
        for name, count in spec.schedule.rows
    }


def toy_state(spec: SessionSpec, seed: int = 1) -> dict[str, I64]:
    rng = np.random.default_rng(seed)
    return {entry.name: fixed(rng.uniform(-1, 1, entry.wire.shape)) for entry in spec.state_inputs}


def fixed(values: npt.NDArray[np.float64]) -> I64:
    return np.rint(values * 2**F).astype(np.int64)


def batches(spec: SessionSpec, rows: Mapping[str, Mapping[str, I64]]) -> Iterator[dict[str, I64]]:
    """Each step's inputs in the clear."""
    assert spec.schedule is not None
    for step in range(spec.steps):
        batch = {entry.name: np.zeros(entry.wire.shape, dtype=np.int64) for entry in spec.row_inputs}
        for part in spec.schedule.step(step):
            for name, array in rows[part.owner].items():
                batch[name][part.positions] = rows_of(array, part.rows)
        yield batch


@dataclass(frozen=True, kw_only=True)
class Cheat:
    """What one party does in one step. `opening`: it opens something else, consistently, to everybody. `mac`,
    `lambda`, `gamma`: the correction that it got is changed. `seed`, `sigma`: it opens another one than it committed
    to; `false-seed`, `false-sigma`: it commits to a wrong one. `seed-commitment`, `sigma-commitment`: these are
    changed. `equivocation`: one member gets another opening than the others."""

    what: str
    party: int
    step: int
    place: int  # which element, of all that fit
    bit: int


CHEATS = (
    "opening", "mac", "lambda", "gamma", "seed", "sigma", "false-seed", "false-sigma", "seed-commitment",
    "sigma-commitment", "equivocation",
)  # fmt: skip


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


class CheatingCommittee(Committee):
    """A committee in which one party cheats as told."""

    def cheat(self, cheat: Cheat) -> None:
        party = self.parties[cheat.party]
        if cheat.what == "opening":
            place = cheat.place % self.spec.circuit.gate_elements
            round_ = next(k for k, part in enumerate(party._layout.rounds) if place < part.stop)
            send = party._send_round

            def lie(effects: list[Effect]) -> None:
                run = party._run
                assert run is not None
                send(effects)
                if (party._step, run.round) == (cheat.step, round_):
                    run.gammas[place] ^= np.int64(-(2**63) if cheat.bit == 63 else 1 << cheat.bit)
                    honest = effects.pop()
                    assert isinstance(honest, Broadcast)
                    payload = run.gammas[party._layout.rounds[round_]].tobytes()
                    effects.append(msgspec.structs.replace(honest, payload=payload))

            party._send_round = lie  # type: ignore[method-assign]
        elif cheat.what in ("mac", "lambda", "gamma"):
            self.correct = lambda deal: self._spoil(deal, cheat)
        elif cheat.what == "false-seed":
            begin = party._begin_check

            def another(effects: list[Effect]) -> bool:
                dealt = party._seed
                if party._step == cheat.step:
                    party._seed = Seed(flip(dealt.expose(), cheat.bit))  # of its part of the joint seed
                begun = begin(effects)
                party._seed = dealt
                return begun

            party._begin_check = another  # type: ignore[method-assign]
        elif cheat.what == "false-sigma":
            checker = party._checker
            assert checker is not None
            sigma = checker.sigma

            def wrong(records: Any, joint: Seed) -> Iterator[int | None]:
                change = 1 << cheat.bit if records[-1].step == cheat.step else 0
                return (portion if portion is None else portion ^ change for portion in sigma(records, joint))

            checker.sigma = wrong  # type: ignore[method-assign]
        else:
            kind, first = {
                "seed": ("check-2", 0),
                "sigma": ("check-4", 0),
                "seed-commitment": ("check-1", 32),
                "sigma-commitment": ("check-3", 0),
                "equivocation": ("open", 0),
            }[cheat.what]
            victim = (cheat.party + 1 + cheat.place % (self.n - 1)) % self.n

            def change(sender: int, receiver: int, message: Broadcast) -> Broadcast:
                if (sender, message.kind, message.step) != (cheat.party, kind, cheat.step):
                    return message
                if kind == "open" and (
                    receiver != victim or message.round != cheat.place % len(self.spec.circuit.rounds)
                ):
                    return message
                tail = message.payload[first:]
                return msgspec.structs.replace(
                    message, payload=message.payload[:first] + flip(tail, 64 * cheat.place + cheat.bit)
                )

            self.tamper = change

    def _spoil(self, deal: Deal, cheat: Cheat) -> bytes:
        if deal.step != cheat.step:
            return deal.correction
        layout = self.parties[0]._layout
        roots, gates = layout.root_elements, layout.gate_elements
        start, count, size = {
            "lambda": (0, roots, 8),
            "gamma": (8 * roots, gates, 8),
            "mac": (8 * (roots + gates), 2 * layout.tagging.tags, 8),
        }[cheat.what]
        at = start + size * (cheat.place % count)
        data = bytearray(deal.correction)
        data[at : at + size] = flip(bytes(data[at : at + size]), cheat.bit % (63 if cheat.what == "mac" else 64))
        return bytes(data)
