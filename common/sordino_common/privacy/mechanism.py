"""What was released, as a value: a Poisson-sampled discrete Gaussian mechanism, composed `count` times.

The code that draws the sample and the noise makes it; accountants and ledgers read it. So no figure of privacy rests
on a number that is written down twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from sordino_common.errors import LocalError

FULL_SAMPLING: Final = 1 << 32  # the threshold of q = 1
MAX_SIGMA_SQUARED: Final = 1 << 80  # what the sampler takes: σ <= 2^40
MAX_COUNT: Final = 1 << 40

Unit = Literal["record", "device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """`count` releases, each of f(S) + N_Z(0, σ² I), where S takes every unit with probability q independently.

    Neighbouring relation: one unit (`record` or `device`) added or removed. f is integer-valued with
    |f(D) - f(D')|₂² <= `sensitivity_squared` for neighbours, in units of the grid; σ² = `sigma_squared` in the same
    units; q = `sampling_threshold` / 2^32 is exactly the probability that the sampler used. Later releases may depend
    on earlier results (adaptive composition). Raises `LocalError` for values out of range."""

    unit: Unit
    sensitivity_squared: int
    sigma_squared: int
    sampling_threshold: int = FULL_SAMPLING
    count: int = 1

    def __post_init__(self) -> None:
        if self.unit not in ("record", "device"):
            raise LocalError(f"Mechanism: the unit is record or device, not {self.unit!r}")
        for name, least, most in (
            ("sensitivity_squared", 1, 1 << 120),
            ("sigma_squared", 1, MAX_SIGMA_SQUARED),
            ("sampling_threshold", 1, FULL_SAMPLING),
            ("count", 1, MAX_COUNT),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise LocalError(f"Mechanism: {name} is an int in [{least}, {most}], got {value!r}")

    @property
    def noise_multiplier(self) -> float:
        """σ / Δ, as it is called in the literature on DP-SGD."""
        return math.sqrt(self.sigma_squared / self.sensitivity_squared)

    @property
    def sampling_rate(self) -> float:
        """q; exact as a float."""
        return self.sampling_threshold / FULL_SAMPLING

    @property
    def sampled(self) -> bool:
        return self.sampling_threshold != FULL_SAMPLING


def threshold_of(sampling_rate: float) -> int:
    """The sampling threshold nearest to `sampling_rate` in (0, 1], at least 1. Raises `LocalError` outside."""
    if not 0.0 < sampling_rate <= 1.0:
        raise LocalError(f"a sampling rate lies in (0, 1], got {sampling_rate}")
    return max(1, round(sampling_rate * FULL_SAMPLING))
