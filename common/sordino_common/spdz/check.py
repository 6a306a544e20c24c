"""The MAC check: compute in the ring, verify over the integers, in F_p with p = 2^127 - 1.

Since nothing wraps, every element of every gate satisfies an identity over the integers, so modulo p too:

    Σ_j k_j m_A·m_B + E - Σ_j k_j (m_A·λ_B + λ_A·m_B) + γ = 0        E = Σ_l k_l m_L + c - D                      (*)

with γ = Σ k λ_A·λ_B - Σ k λ_L + r (`dealing`). Times a coefficient for each element, which the dealer knows when it
deals and nobody else before the openings are fixed, and times α, all elements of all gates summed:

    α V - Σ k (m_A·[α ρ λ_B] + [α ρ λ_A]·m_B) + [α Σ ρ γ] = 0        V = Σ ρ (Σ k m_A·m_B + E)

What stands in brackets is dealt in additive shares mod p: the *tags* (`tagging`). Party i computes

    σ_i = α_i V + W_i,    W_i = [α Σ ρ γ]_i - Σ k (m_A·[α ρ λ_B]_i + [α ρ λ_A]_i·m_B)

and the members accept iff Σ σ_i = 0. Since ρ is in the tags, γ needs one tag a step and not one an element, a product
of matrices two vectors as long as its inner dimension (ρ_bij = χ_bi ψ_j, as in Freivalds' check, IFIP 1977), and an
operand of elementwise products one tag an element, in however many gates of one shape it is used: ρ_gj = κ_g ρ_j.

Coefficients are 63 random bits each, expanded from a *joint seed* that all members' seeds of this check make
together. A member's seed is part of its preprocessing (`coefficient_seed`): it could be expanded by the member at any
time, but not by anybody else but the dealer, so all coefficients are unknown until an honest member opens its own, and
it does that when all members have said that they saw the same openings, and are bound to their own seeds
(`verification`).

Why a cheat is found. Let openings be wrong by e (false shares of λ or γ come down to that), the first ones that are by
0 < |e| < 2^65 < p, and σ shares, tags included, by δ in all. The sum is α P + δ with P = Σ ρ e: a polynomial of degree
2 at most (κ ρ or χ ψ) in coefficients that are uniform and independent of e. Each opened element has a monomial of its
own, so P is not the zero polynomial, and by the lemma of Schwartz and Zippel it is 0 mod p with a chance of at most
2/2^63. If it is not, the sum is 0 for one α only. α is uniform given all that n - 1 members hold, since their shares of
it and of the tags are, and δ is committed to whoever is to be deceived before that member shows its σ_i. At most 2/2^63
+ 2^-127 < 2^-61 in all.

A member that opens another seed than it was dealt, or different ones to different members, makes these compute with
coefficients ρ' that are not those in the tags. The sum is then α Q + δ, where Q is a polynomial of degree 2 in both,
which is not zero either, since γ is in it with ρ alone: the same bound.

A check that fails tells α to a cheater that hears the others' σ and withholds its own: too late, since α is of use only
in a check that can still pass, and the next one does not begin.

What the dealer learns: nothing, it sees no m. It deals α anyway, and is assumed honest about preprocessing and not to
collude with a member. A dealer that provides inputs, too (a server with its model), and knows ρ could choose values
that leave their range so that the wraps cancel: it harms its own result, which it may state freely.

κ are drawn for a check, all else for each step of it: a member sums inner products of several steps at once.

Later steps run while a check is under way (`party`). That changes nothing above: the openings that a check is of are
fixed when it begins, before anybody opens a seed, and later ones enter neither its sum nor its transcript, and have
coefficients from other seeds. Nor does it give a cheater more: every opening is masked by an r of its own, whatever was
opened before and whether that was right; σ_i of a sum that is 0 tell nothing of α (the others' σ and the sum determine
them), and after one that is not, the session is dead before another is opened, because a check begins only when the one
before has passed. It is what steps between two checks do anyway, with the last check four rounds longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sordino_common.ring.prg import SEED_BYTES, Seed, expand_bytes, expand_ring
from sordino_common.spdz.arithmetic import Run
from sordino_common.spdz.check_matrix import MatrixGates
from sordino_common.spdz.check_vector import BareGates, FamilyGates
from sordino_common.spdz.field import Field, Fp
from sordino_common.spdz.layout import Layout, Values
from sordino_common.spdz.spec import SessionSpec, stream
from sordino_common.spdz.tagging import COEFFICIENT_BITS

I64 = npt.NDArray[np.int64]
_TOGETHER: Final = 1 << 18  # elements of steps that are evaluated together: enough to hide the calls
_PORTION: Final = 1 << 17  # elements that a member reads in one go: of smaller portions the calls take their share
_MASK: Final = np.int64((1 << COEFFICIENT_BITS) - 1)


def coefficient_seed(spec: SessionSpec, seed: Seed, check: int) -> bytes:
    """A party's part of the joint seed of the check after step `check`, from the seed that the dealer gave it."""
    out = bytearray(SEED_BYTES)
    expand_bytes(seed, stream(spec, "coefficients", check, 0), memoryview(out))
    return bytes(out)


def coefficients(spec: SessionSpec, layout: Layout, joint: Seed, step: int, attempt: int) -> I64:
    """Of one attempt of a step, as `Tagging` lays them out: [n], 0 <= c < 2^63."""
    drawn = expand_ring(joint, stream(spec, "check", step, attempt), (layout.tagging.coefficients,))
    drawn &= _MASK
    return drawn


def kappas(spec: SessionSpec, layout: Layout, joint: Seed, check: int) -> list[int]:
    """κ of the gates that have one."""
    drawn = expand_ring(joint, stream(spec, "check gates", check, 0), (len(layout.tagging.kappas),))
    return [int(each) for each in drawn & _MASK]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What a step's sums are made of: m of every wire and D of every gate (flat); at the dealer λ, and r. `kappas`: one
    for each gate in a family; `tags`: [2, tags]."""

    values: Values
    opened: I64
    coefficients: I64
    kappas: Sequence[int]
    tags: Fp

    def __repr__(self) -> str:
        return "Numbers(hidden)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One step attempt that awaits its check, with m of every wire, D of every gate (flat), and this party's shares of
    the tags (None: to be expanded from its seed)."""

    step: int
    attempt: int
    run: Run

    def __repr__(self) -> str:
        return f"Record(step={self.step}, attempt={self.attempt}, hidden)"


class Sums:
    """Sums over all gates of a circuit, for members and dealer."""

    def __init__(self, layout: Layout) -> None:
        self._families = [FamilyGates(layout, family) for family in layout.tagging.families]
        self._bare = BareGates(layout)
        self._matrix = MatrixGates(layout)
        self._large: list[MatrixGates | FamilyGates] = [*self._families]
        if layout.tagging.matrix_gates:
            self._large.append(self._matrix)

    def portions(self, steps: int) -> int:
        """How many portions `of` gives, of so many steps."""
        return 1 + sum(_portions(gates, steps) for gates in self._large)

    def of(self, field: Field, steps: Sequence[Numbers]) -> Iterator[tuple[int, int]]:
        """(V, W_i) of several steps of one check, not reduced mod p, in portions that add up to them."""
        yield self._bare.sums(field, steps, 1, addends=True)[0], sum(_total_tag(step) for step in steps)
        for gates in self._large:
            together = -(-len(steps) // _portions(gates, len(steps)))
            for first in range(0, len(steps), together):
                yield gates.sums(field, steps[first : first + together])

    def deal(self, field: Field, steps: Sequence[Numbers], alpha: int) -> None:
        """Write all tags of the steps."""
        totals = self._matrix.deal(field, steps, alpha)
        bare = self._bare.sums(field, steps, len(steps), addends=False)
        parts = [[-alpha * each for each in bare]]
        parts += [gates.deal(field, steps, alpha) for gates in self._families]
        for step, *found in zip(steps, totals, *parts, strict=True):
            total = sum(found) % field.prime
            step.tags[:, -1] = total & ((1 << 64) - 1), total >> 64


class Checker:
    """Computes σ_i. One per party and session."""

    def __init__(self, spec: SessionSpec, layout: Layout, field: Field, *, seed: Seed, mac_key: int) -> None:
        self._spec = spec
        self._layout = layout
        self._field = field
        self._seed = seed
        self._key = mac_key
        self._sums = Sums(layout)

    @property
    def prime(self) -> int:
        """p: shares of σ are taken modulo it."""
        return self._field.prime

    def sigma(self, records: Sequence[Record], joint: Seed) -> Iterator[int | None]:
        """σ_i over all gates of `records`, with the coefficients that `joint` gives, in portions: None after each, and
        σ_i after the last."""
        public, private = 0, 0
        scales = kappas(self._spec, self._layout, joint, self._spec.check_of(records[-1].step))
        together = steps_together(self._layout)
        batches = [records[first : first + together] for first in range(0, len(records), together)]
        left = sum(self._sums.portions(len(batch)) for batch in batches)
        for batch in batches:
            steps = [self._numbers(record, joint, scales) for record in batch]
            for v, w in self._sums.of(self._field, steps):
                public += v
                private += w
                left -= 1
                yield (self._key * public + private) % self._field.prime if not left else None

    def _numbers(self, record: Record, joint: Seed, scales: Sequence[int]) -> Numbers:
        return Numbers(
            values=record.run.values,
            opened=record.run.gammas,
            coefficients=coefficients(self._spec, self._layout, joint, record.step, record.attempt),
            kappas=scales,
            tags=self._tags(record),
        )

    def _tags(self, record: Record) -> Fp:
        tags: Fp | None = record.run.tags
        if tags is not None:
            return tags
        info = stream(self._spec, "tags", record.step, record.attempt)
        return self._field.expand(self._seed, info, self._layout.tagging.tags)


def _portions(gates: MatrixGates | FamilyGates, steps: int) -> int:
    """How many portions so many steps of these gates are."""
    return -(-steps // max(1, _PORTION // max(1, gates.elements)))


def _total_tag(step: Numbers) -> int:
    """This party's share of α Σ ρ γ over all gates of the step."""
    low, high = step.tags[:, -1].tolist()
    return int(low) + (int(high) << 64)


def steps_together(layout: Layout) -> int:
    """How many steps are evaluated at once."""
    return max(1, _TOGETHER // max(1, layout.gate_elements + layout.tagging.tags))
