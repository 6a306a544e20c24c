"""How wide the words of a sum must be, and what contributors and helpers check of the terms that a leader writes.

A sum of n entries of size at most B, with noise of k aggregators on each of L entries, is decoded right if it lies in
[-2^(b-1), 2^(b-1)). Without noise: n B < 2^(b-1). The discrete Gaussian N_Z(0, σ²) is subgaussian with variance proxy
σ²: completing the square, E exp(t X) = exp(t² σ² / 2) θ(t σ²) / θ(0) with θ(c) = Σ_x exp(-(x - c)² / 2σ²), and θ is
largest at 0, since its Fourier coefficients are positive (Canonne, Kamath, Steinke, NeurIPS 2020, on tails). So a sum
of k independent ones passes t in size with a chance of at most 2 exp(-t² / 2kσ²), and any of L does with at most

    2 L exp(-t² / 2kσ²) < 2^-60     if     t² >= 2 k σ² (61 + log2 L) ln 2.
"""

from __future__ import annotations

from math import isqrt
from typing import Final, Literal

from sordino_common.errors import CodecError, ConfigError
from sordino_common.messages.sums import SumNoise, SumTerms

WRAP_BITS: Final = 60  # the chance that noise makes a sum wrap is below 2^-60
# ln 2 = 0.693147..., rounded up.
_LN2_NUMERATOR: Final = 693_148
_LN2_DENOMINATOR: Final = 1_000_000


def noise_tail(noise: SumNoise | None, *, aggregators: int, length: int) -> int:
    """t: no entry's noise is larger in size, but for a chance below 2^-60."""
    if noise is None:
        return 0
    logarithm = WRAP_BITS + 1 + length.bit_length()
    square = 2 * aggregators * noise.sigma_squared * logarithm * _LN2_NUMERATOR
    return isqrt(square // _LN2_DENOMINATOR + 1) + 1


def largest_sum(*, bound: int, most: int, length: int, helpers: int, noise: SumNoise | None) -> int:
    """The largest size of an entry of the noised sum, noise by every helper and the leader."""
    return bound * most + noise_tail(noise, aggregators=helpers + 1, length=length)


def choose_bits(
    *, bound: int, most: int, length: int, helpers: int, noise: SumNoise | None, bits: int | None = None
) -> Literal[32, 64]:
    """The fewest of 32 and 64 (or `bits`, if given) in which the sum can't wrap. Raises `ConfigError`, with the
    numbers, if it could."""
    needed = largest_sum(bound=bound, most=most, length=length, helpers=helpers, noise=noise)
    if bits in (None, 32) and needed < 1 << 31:
        return 32
    if bits in (None, 64) and needed < 1 << 63:
        return 64
    raise ConfigError(
        f"a sum of {most} contributions of entries up to {bound}"
        f"{'' if noise is None else f', with noise of variance {noise.sigma_squared} from {helpers + 1} aggregators,'} "
        f"can reach {needed}, and {bits or 64}-bit words hold less than {1 << ((bits or 64) - 1)}: lower fraction_bits "
        "or the bound, or take fewer contributors"
    )


def check_terms(terms: SumTerms) -> None:
    """What both a contributor and a helper check. Raises `CodecError`: a leader that writes such terms is at fault."""
    needed = largest_sum(
        bound=terms.bound, most=terms.most, length=terms.length, helpers=len(terms.helpers), noise=terms.noise
    )
    if needed >= 1 << (terms.bits - 1):
        raise CodecError(
            f"the terms of the sum let it wrap: it can reach {needed}, and {terms.bits}-bit words hold less than "
            f"{1 << (terms.bits - 1)}"
        )
