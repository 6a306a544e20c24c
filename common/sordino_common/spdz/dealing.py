"""Preprocessing: masks, products of masks, and MACs, dealt to the parties by somebody who never sees a masked value.

Per step and attempt the dealer draws r for every gate and follows the circuit with λ in place of m (constants are
public: they go to m alone). For every root w (the parties multiply with its masks) it shares λ_w, for every gate

    γ = Σ_j k_j λ_A·λ_B - Σ_l k_l λ_L + r

in Z_2^64, additively. Since then D = Σ k (m_A - λ_A)(m_B - λ_B) + Σ k (m_L - λ_L) + r, the parties' shares (see
`party`) sum to D. If the session is active, the dealer also shares the tags of the step in F_p (`tagging`): α times
combinations of masks as integers, with the coefficients of the step's check. It has all parties' seeds, so it knows
these. A few steps are dealt together: the calls of their tags cost little more than those of one.

All parties but one expand their shares from seeds; that one gets the difference, the `Deal.correction`. Who it is
rotates with the step. Bytes: `Layout.preprocessing_bytes`. Key of the MACs: α = Σ α_i mod p, uniform, one per session.

What a dishonest dealer can do is everything: this protocol assumes it honest about preprocessing, and not colluding
with a party.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.errors import LocalError
from sordino_common.ring.backend import NumpyBackend, RingBackend
from sordino_common.ring.prg import SEED_BYTES, Seed, expand_bytes, expand_ring, label
from sordino_common.spdz.check import (
    Numbers,
    Sums,
    coefficient_seed,
    coefficients,
    kappas,
    steps_together,
)
from sordino_common.spdz.circuit import Circuit, Product, gate_of
from sordino_common.spdz.field import Field, Fp, Mersenne127
from sordino_common.spdz.layout import Layout, Values, layout_of, local_functions
from sordino_common.spdz.owner import row_mask, state_mask
from sordino_common.spdz.spec import PartySetup, SessionSpec, stream
from sordino_common.spdz.transcript import joint_seed

I64 = npt.NDArray[np.int64]
_AHEAD: Final = 8  # steps dealt in one call at most: whoever waits for it waits no longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """One attempt's preprocessing. `correction` is party `corrected`'s secret: λ and γ shares (int64, little-endian),
    then, if active, the words of shares of the tags."""

    step: int
    attempt: int
    corrected: int
    correction: bytes

    def __repr__(self) -> str:
        return (
            f"Deal(step={self.step}, attempt={self.attempt}, corrected={self.corrected}, {len(self.correction)} bytes)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _GateAt:
    """What a gate's λ and γ are made of. Its addend is public: no mask has it. `place`: in the gates' flat array."""

    place: slice
    shape: tuple[int, ...]
    terms: tuple[tuple[int, np.int64], ...]  # operand, coefficient
    products: tuple[Product, ...]


@dataclass(slots=True)
class _Dealt:
    """What the dealer remembers of a step that is not confirmed: masks of the state after it, and of its outputs."""

    attempt: int
    before: dict[str, I64]
    after: dict[str, I64]
    outputs: dict[str, I64]


@dataclass(frozen=True, slots=True, repr=False)
class _Draft:
    """A step of which λ is known, and the tags, in the words of its correction: r is there yet in place of γ."""

    values: Values
    words: I64
    dealt: _Dealt


def derived_seed(root: Seed, *parts: str | int | bytes) -> Seed:
    """A seed of its own for each use of a root seed."""
    out = bytearray(SEED_BYTES)
    expand_bytes(root, label("sordino spdz seed v1", *parts), memoryview(out))
    return Seed(bytes(out))


class Dealer:
    """One session's dealer. Deterministic in (spec, root, state); `root` must be fresh for every session.

    `state`: masks of the state inputs, if the session goes on from a checkpoint; otherwise whoever masks the first
    state (`owner.mask_state`) does so with `state_seed`."""

    def __init__(
        self,
        spec: SessionSpec,
        root: Seed,
        *,
        state: Mapping[str, I64] | None = None,
        first_step: int = 0,
        field: Field | None = None,
        backend: RingBackend | None = None,
    ) -> None:
        self.spec: Final = spec
        self._root = root
        backend = backend or NumpyBackend()
        self._field: Field = field or Mersenne127(backend)
        self._matmul = backend.matmul
        self._layout: Layout = layout_of(spec.circuit)
        self._row_numbers = {n for n, entry in enumerate(spec.circuit.inputs) if entry in spec.row_inputs}
        locals_, first = local_functions(spec.circuit), len(spec.circuit.inputs)
        self._path = [
            locals_[number] if number in locals_ else _gate_at(spec.circuit, self._layout, number)
            for number in range(first, first + len(spec.circuit.nodes))
        ]
        self._gates = [gate for gate in self._path if isinstance(gate, _GateAt)]
        self._shifts = np.empty(self._layout.gate_elements, dtype=np.int64)
        for number, place in self._layout.gates.items():
            self._shifts[place] = gate_of(spec.circuit, number).shift
        self._scratch = np.empty(self._layout.root_elements + self._layout.gate_elements, dtype=np.int64)
        self._owner_seeds: dict[str, Seed] = {}
        self._seeds = [derived_seed(root, "party", index) for index in range(len(spec.parties))]
        self._keys = self._mac_keys() if spec.active else []
        self._alpha = sum(self._keys) % self._field.prime
        self._sums = Sums(self._layout) if spec.active else None
        self._joint: tuple[int, Seed, list[int]] | None = None  # of one check: the step after which it comes, and its κ
        self._next = first_step
        self._attempt = 0
        self._done: dict[int, _Dealt] = {}
        self._ahead: deque[_Draft] = deque()  # from the next step on
        self._fed = -1  # the last step whose state inputs are known, if the session is stepwise
        if spec.stepwise:
            self._state: dict[str, I64] = {}
        elif state is None:
            self._state = {
                entry.name: np.asarray(state_mask(spec, self.state_seed(), entry) >> np.int64(entry.shift))
                for entry in spec.state_inputs
            }
        else:
            self._state = {entry.name: np.array(state[entry.name]) for entry in spec.state_inputs}

    # --- secrets of the parties ------------------------------------------------------------------------------------

    def setup(self, index: int) -> PartySetup:
        """For party `index` alone."""
        return PartySetup(self._seeds[index], self._keys[index] if self.spec.active else None)

    def owner_seed(self, owner: str) -> Seed:
        """For `owner` alone."""
        if owner not in self._owner_seeds:
            self._owner_seeds[owner] = derived_seed(self._root, "owner", owner)
        return self._owner_seeds[owner]

    def state_seed(self) -> Seed:
        """For whoever provides the first state."""
        return derived_seed(self._root, "state")

    def _mac_keys(self) -> list[int]:
        keys = []
        for index in range(len(self.spec.parties)):
            out = bytearray(32)
            expand_bytes(self._root, label("sordino spdz mac key v1", index), memoryview(out))
            keys.append(int.from_bytes(out, "little") % self._field.prime)  # 2^-129 from uniform
        return keys

    # --- steps -----------------------------------------------------------------------------------------------------

    @property
    def next_step(self) -> int:
        """The step that `deal` deals next."""
        return self._next

    def feed(self, step: int, masks: Mapping[str, I64]) -> None:
        """λ of every input of the next step, in a stepwise session."""
        expected = {entry.name: entry.wire.shape for entry in self.spec.state_inputs}
        if not self.spec.stepwise or step != self._next or step <= self._fed:
            raise LocalError(f"dealer: no inputs are expected for step {step}")
        if {name: value.shape for name, value in masks.items()} != expected:
            raise LocalError(f"dealer: masks of {sorted(masks)} for the inputs {sorted(expected)}, or of other shapes")
        self._state, self._fed = {name: np.array(value) for name, value in masks.items()}, step

    def deal(self, step: int, attempt: int) -> Deal:
        """The next step's preprocessing. Raises `LocalError` if that is not (step, attempt)."""
        if self.spec.stepwise and step != self._fed:
            raise LocalError(f"dealer: the masks of the inputs of step {step} are not known")
        if (step, attempt) != (self._next, self._attempt):
            raise LocalError(
                f"dealer: step {self._next} attempt {self._attempt} comes next, not step {step} attempt {attempt}"
            )
        with np.errstate(over="ignore"):  # Z_2^64 wraps on purpose; NumPy warns of it for single numbers
            return self._deal(step, attempt)

    def _deal(self, step: int, attempt: int) -> Deal:
        if not self._ahead:
            self._deal_ahead(step, attempt)
        draft = self._ahead.popleft()
        correction = self._finish(draft, step, attempt)
        self._done[step] = draft.dealt
        self._state = draft.dealt.after
        self._next = step + 1
        return Deal(step=step, attempt=attempt, corrected=self.spec.corrected(step, attempt), correction=correction)

    def _deal_ahead(self, step: int, attempt: int) -> None:
        """Draft this step, and some more with it. What need not be done for all of them together is left for later, so
        that nobody waits for it now."""
        spec, layout, roots = self.spec, self._layout, self._layout.root_elements
        count = 1 if spec.stepwise or not spec.active else min(steps_together(layout), _AHEAD, spec.steps - step)
        state, drafts = self._state, []
        for number in range(step, step + count):
            words = np.empty(layout.preprocessing_bytes(active=spec.active) // 8, dtype=np.int64)
            shares = words[: len(self._scratch)]  # λ of the roots and r of the gates; what is behind: the tags
            expand_ring(self._root, stream(spec, "r", number, attempt), (layout.gate_elements,), shares[roots:])
            values = self._input_masks(number, attempt, state)
            self._follow(values, shares[roots:])
            after = {name: values[wire] for name, wire in spec.state_outputs.items()}
            outputs = {name: values[wire] for name, wire in spec.value_outputs.items()}
            drafts.append(_Draft(values, words, _Dealt(attempt, state, after, outputs)))
            state = after
        if self._sums is not None:
            numbers = [
                self._numbers(number, attempt, one.values, one.words[roots : len(self._scratch)], self._tags(one.words))
                for number, one in enumerate(drafts, start=step)
            ]
            self._sums.deal(self._field, numbers, self._alpha)
        self._ahead.extend(drafts)

    def _finish(self, draft: _Draft, step: int, attempt: int) -> bytes:
        """The correction."""
        values, words, layout = draft.values, draft.words, self._layout
        self._add_parts(values, words[layout.root_elements : len(self._scratch)])
        for wire, place in layout.roots.items():
            words[place] = values[wire].reshape(-1)
        self._correct(step, attempt, words)
        return words.astype("<i8", copy=False).tobytes()

    @property
    def next_attempt(self) -> int:
        """The attempt that `deal` deals next. It never falls back within a session."""
        return self._attempt

    def rewind(self, step: int, attempt: int) -> None:
        """Forget everything dealt from `step` on; from here on, `step` and all later steps are dealt as `attempt`.

        Later steps may have been dealt ahead. Dealt again under the same attempt, their streams would mask a state of
        other λ: the difference of two γ shares would be λ_x (λ_w - λ'_w), and give λ_x away. So attempts only grow."""
        dealt = self._done.get(step)
        if dealt is None or attempt <= self._attempt:
            raise LocalError(f"dealer: step {step} can't be rewound to attempt {attempt}")
        for later in [number for number in self._done if number >= step]:
            del self._done[later]
        self._ahead.clear()
        self._state = dealt.before
        self._next, self._attempt = step, attempt

    def confirm(self, step: int) -> None:
        """Steps up to `step` are checked: they will not be rewound. Their outputs' masks are forgotten."""
        for earlier in [number for number in self._done if number <= step]:
            del self._done[earlier]

    def output_masks(self, step: int) -> dict[str, I64]:
        """λ of the step's outputs, before `confirm`: for whoever may read them."""
        return dict(self._dealt(step).outputs)

    def state(self, step: int) -> dict[str, I64]:
        """λ of the state after `step`, before `confirm`: for the checkpoint, and for who may read the model."""
        return dict(self._dealt(step).after)

    def _dealt(self, step: int) -> _Dealt:
        if step not in self._done:
            raise LocalError(f"dealer: step {step} is not dealt, or confirmed already")
        return self._done[step]

    # --- masks -----------------------------------------------------------------------------------------------------

    def _input_masks(self, step: int, attempt: int, state: Mapping[str, I64]) -> Values:
        spec = self.spec
        values: Values = [None] * (len(spec.circuit.inputs) + len(spec.circuit.nodes))
        slices = spec.schedule.step(step) if spec.schedule is not None else ()
        for number, entry in enumerate(spec.circuit.inputs):
            if number in self._row_numbers:
                r = np.zeros(entry.wire.shape, dtype=np.int64)
                for part in slices:
                    seed = self.owner_seed(part.owner)
                    r[part.positions] = row_mask(spec, seed, entry, step, attempt, len(part.positions))
                values[number] = np.asarray(r >> np.int64(entry.shift))
            else:
                values[number] = state[entry.name]
        return values

    def _follow(self, values: Values, gate_r: I64) -> None:
        """λ of every wire."""
        masks = np.right_shift(gate_r, self._shifts)
        for number, node in enumerate(self._path, start=len(self.spec.circuit.inputs)):
            if isinstance(node, _GateAt):
                values[number] = masks[node.place].reshape(node.shape)
            else:
                values[number] = node(values)

    def _add_parts(self, values: Values, gammas: I64) -> None:
        """r of all gates becomes γ mod 2^64."""
        for gate in self._gates:
            whole = gammas[gate.place].reshape(gate.shape)
            for operand, coefficient in gate.terms:
                whole -= values[operand] * coefficient
            for product in gate.products:
                whole += self._product(product, values)

    def _numbers(self, step: int, attempt: int, values: Values, gate_r: I64, tags: Fp) -> Numbers:
        joint, scales = self._coefficients_of(self.spec.check_of(step))
        drawn = coefficients(self.spec, self._layout, joint, step, attempt)
        return Numbers(values=values, opened=gate_r, coefficients=drawn, kappas=scales, tags=tags)

    def _tags(self, words: I64) -> Fp:
        """Where they stand in the words of a correction."""
        return words[len(self._scratch) :].view(np.uint64).reshape(2, -1)

    def _coefficients_of(self, check: int) -> tuple[Seed, list[int]]:
        """The joint seed of the check after step `check`, and its κ: what members will find together."""
        if self._joint is None or self._joint[0] != check:
            joint = Seed(
                joint_seed(self.spec, check, [coefficient_seed(self.spec, each, check) for each in self._seeds])
            )
            self._joint = check, joint, kappas(self.spec, self._layout, joint, check)
        return self._joint[1], self._joint[2]

    def _product(self, product: Product, values: Values) -> I64:
        """k λ_A·λ_B mod 2^64."""
        a, b = values[product.a], values[product.b]
        full = a * b if product.kind == "mul" else self._matmul(a, b)
        if product.reduce:
            full = np.asarray(full.sum(axis=product.reduce, dtype=np.int64))
        return np.asarray(full if product.coefficient == 1 else full * np.int64(product.coefficient))

    # --- shares ----------------------------------------------------------------------------------------------------

    def _correct(self, step: int, attempt: int, words: I64) -> None:
        """Whole values become what is left for the corrected party when the others have expanded their seeds."""
        others = [seed for index, seed in enumerate(self._seeds) if index != self.spec.corrected(step, attempt)]
        shares = words[: len(self._scratch)]
        info = stream(self.spec, "share", step, attempt)
        for seed in others:
            np.subtract(shares, expand_ring(seed, info, shares.shape, self._scratch), out=shares)
        if not self.spec.active:
            return
        tags, info = self._tags(words), stream(self.spec, "tags", step, attempt)
        for seed in others:
            tags[...] = self._field.sub(tags, self._field.expand(seed, info, tags.shape[1]))


def _gate_at(circuit: Circuit, layout: Layout, number: int) -> _GateAt:
    gate = gate_of(circuit, number)
    return _GateAt(
        place=layout.gates[number],
        shape=gate.wire.shape,
        terms=tuple((term.operand, np.int64(term.coefficient)) for term in gate.terms),
        products=gate.products,
    )


def fresh_root() -> Seed:
    """A root seed from the operating system's generator."""
    return Seed(secrets.token_bytes(SEED_BYTES))
