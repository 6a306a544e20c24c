"""Fixed point: how many fraction bits the result of each gate has, and the scale and integers that a gate uses.

A wire of fraction bits s holds floor(value · 2^s). A gate forms z = Σ k A·B + Σ k L + addend at scale S and drops
t = S - s bits, so a coefficient c of a product of scale p becomes k = round(c 2^(S-p)): small coefficients (a learning
rate over a batch) want large S, the bound |z| < 2^40 wants a small one. Where they don't meet, an operand that a gate
makes gets fewer fraction bits, as many fewer as its rounding can have without passing the result's own: the product's
scale p falls with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sordino_common.spdz.circuit import BOUND_BITS_MAX, BOUND_BITS_TARGET, RING_BITS
from sordino_common.spdz.lowering.magnitudes import ceil_log2, inner
from sordino_common.spdz.lowering.sketch import Combined, Joined, Opened, Sketch, Summed, Viewed, operands

GOOD: Final = 2.0**-9  # a coefficient this exact needs no scale beyond the target
FAIR: Final = 2.0**-7  # one this exact is not worth more than a seldom retry
BAD: Final = 2.0**-6  # one less exact than this is refused
SLACK: Final = 1.02  # stated bounds hold of real values; fixed point may pass them by this factor
_EXACT_ENOUGH: Final = 2.0**-13
_ROOMY_SHIFT: Final = 20  # masks of truncated wires then stay below 2^43: room for sums of a million
_SELDOM: Final = 9  # bits: a gate with a bound beyond the target meets the edge in one step of 2^9
_QUIET_BITS: Final = 38  # a bound that is worth no smaller masks
_FEWEST: Final = 4
_WISH_BITS: Final = 9
_USUAL: Final = 1 / 4  # of its stated bound, the size that a value usually has
_MANY: Final = 64
LEEWAYS: Final = (0, 2, 4, 6, 8, 10)  # bits of rounding error that are borne before a coefficient is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One term of a gate: real coefficient, scale of the operands' product, bound on its integer size with k = 1."""

    coefficient: float
    scale: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`scale`: S. `integers`: k per part. |z| <= `size` < 2^`bits`. `error`: the largest relative error of a k."""

    scale: int
    integers: tuple[int, ...]
    addend: int
    size: int
    error: float

    @property
    def bits(self) -> int:
        return self.size.bit_length()


def choose(
    parts: Sequence[Part], constant: float, cap: float, fraction_bits: int, elements: int, *, worst: float = BAD
) -> Choice | None:
    """The scale and integers of a gate of so many elements; None if none keeps all coefficients within `worst` and z
    below 2^44. Beyond 2^40 goes what would be less exact than `GOOD`, as far as that is seldom a retry; what would be
    worse than `FAIR` goes as far as it must."""
    options = [
        option
        for scale in range(fraction_bits + 1, RING_BITS - 2)
        if (option := _at(parts, constant, cap, scale)).bits <= BOUND_BITS_MAX
    ]
    seldom = RING_BITS - 1 - _SELDOM - ceil_log2(float(max(elements, 1)))
    limits = (BOUND_BITS_TARGET, min(max(seldom, BOUND_BITS_TARGET), BOUND_BITS_MAX), BOUND_BITS_MAX)
    for most, wanted in zip(limits, (GOOD, FAIR, BAD), strict=True):
        usual = [option for option in options if option.bits <= most]
        best = min((option.error for option in usual), default=math.inf)
        if best <= min(wanted, worst):
            return _quietest(usual, fraction_bits, best, most)
    return None


def _quietest(options: Sequence[Choice], fraction_bits: int, best: float, most: int) -> Choice:
    """Among scales that are exact enough, one with small masks and a small bound."""
    enough = max(best, _EXACT_ENOUGH if most == BOUND_BITS_TARGET else GOOD / 2)
    fitting = [option for option in options if option.error <= enough]
    quiet = [option for option in fitting if option.bits <= _QUIET_BITS]
    roomy = [option for option in quiet if option.scale - fraction_bits >= _ROOMY_SHIFT]
    return roomy[0] if roomy else quiet[-1] if quiet else fitting[0]


def _at(parts: Sequence[Part], constant: float, cap: float, scale: int) -> Choice:
    integers = tuple(round(math.ldexp(part.coefficient, scale - part.scale)) for part in parts)
    addend = round(math.ldexp(constant, scale))
    size = sum(abs(k) * part.size for k, part in zip(integers, parts, strict=True)) + abs(addend)
    if cap < 2.0**60:
        size = min(size, int(math.ldexp(cap * SLACK, scale)) + 2)
    error = max(
        (
            abs(math.ldexp(float(k), part.scale - scale) / part.coefficient - 1.0)
            for k, part in zip(integers, parts, strict=True)
        ),
        default=0.0,
    )
    return Choice(scale=scale, integers=integers, addend=addend, size=size, error=error)


# --- fraction bits -----------------------------------------------------------------------------------------------


def fraction_bits(
    sketch: Sketch, order: Sequence[int], outputs: Sequence[int], found: dict[int, float], full: int, leeway: int
) -> dict[int, int]:
    """Gate -> fraction bits of its result: `full`, or fewer where the gates that use it want fewer and can bear it:
    where its rounding makes no more of their results than `leeway` bits beyond these results' own rounding."""
    want: dict[int, int] = {}
    limit: dict[int, int] = {}
    chosen: dict[int, int] = {}

    def keep(wires: Sequence[int]) -> None:
        for wire in wires:
            root, _ = _gate_behind(sketch, wire)
            if root is not None:
                limit[root] = 0

    keep(outputs)
    for wire in reversed(order):
        node = sketch.entries[wire].node
        if isinstance(node, Combined | Joined):
            keep(operands(node))
        if not isinstance(node, Opened):
            continue
        bits = full - max(0, min(want.get(wire, 0), limit.get(wire, 0), full - _FEWEST))
        chosen[wire] = bits
        top = BOUND_BITS_TARGET - ceil_log2(max(found[wire], 2.0**-full) * SLACK)
        for factor in node.products:
            excess = _excess(factor.coefficient, 2 * full, top)
            for own, other in ((factor.a, factor.b), (factor.b, factor.a))[: 1 if factor.a == factor.b else 2]:
                gain = abs(factor.coefficient) * found[other] * _USUAL * math.sqrt(inner(sketch, factor))
                excess -= _lend(sketch, own, gain, excess, full - bits + leeway, want, limit)
        for c, operand in node.terms:
            _lend(sketch, operand, abs(c), _excess(c, full, top), full - bits + leeway, want, limit)
    return chosen


def _excess(coefficient: float, scale: int, top: int) -> int:
    """How many bits too many the product's scale has for a good k at scale `top`."""
    mantissa, exponent = math.frexp(abs(coefficient))
    whole = int(math.ldexp(mantissa, 53))
    odd_exponent = exponent - 53 + ((whole & -whole).bit_length() - 1)
    if scale - odd_exponent <= top:  # exact
        return 0
    return max(0, scale - (top + exponent - 1 - _WISH_BITS))


def _lend(
    sketch: Sketch,
    operand: int,
    gain: float,
    excess: int,
    spare: int,
    want: dict[int, int],
    limit: dict[int, int],
) -> int:
    """Ask the gate behind `operand` for `excess` fewer bits, and tell it how many fewer this use can bear, given how
    much an error of the operand is multiplied by (`gain`) and how many bits the result can spare."""
    root, spread = _gate_behind(sketch, operand)
    if root is None:
        return 0
    bearable = _MANY if gain == 0.0 else max(0, spare - ceil_log2(gain * spread))
    limit[root] = min(limit.get(root, _MANY), bearable)
    granted = min(excess, bearable)
    want[root] = max(want.get(root, 0), granted)
    return granted


def _gate_behind(sketch: Sketch, wire: int) -> tuple[int | None, float]:
    """The gate that `wire` is a view or sum of, and the square root of how many elements are summed."""
    spread = 1.0
    while True:
        node = sketch.entries[wire].node
        match node:
            case Opened():
                return wire, spread
            case Viewed(operand=operand):
                wire = operand
            case Summed(operand=operand, dims=dims):
                spread *= math.sqrt(math.prod(sketch.shape(operand)[dim] for dim in dims))
                wire = operand
            case _:
                return None, spread
