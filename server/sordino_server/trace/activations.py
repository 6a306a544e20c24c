"""Polynomial sigmoid and tanh, as Ryffel et al. (2018, section 5) have them: what secret shares can compute.

    sigmoid(z) ~ 1/2 + c1 z + c3 z³ (+ c5 z⁵)        tanh(z) ~ c1 z + c3 z³ (+ c5 z⁵)

Least squares over |z| <= a, uniform weight. While `polynomial_activations` is open, torch.sigmoid, Tensor.tanh,
nn.Sigmoid and their like compute the polynomial, written with torch's own power: autograd gives the polynomial's own
derivative, and a trace, a baseline and an evaluation see the very same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sordino_common.errors import ConfigError, PlanError

DEGREES: Final = (3, 5)
_PANELS: Final = 20  # of [0, 1]: as wide as tanh's pole is far, at the largest interval (π / 128)
_NODES: Final = 20  # of Gauss and Legendre, in each panel: off by (1 + sqrt 2)^-40, which is rounding
_GRID: Final = 20_001


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """`coefficients`: c1, c3, ... of the odd powers; `constant`: c0. On |z| <= `interval`: `largest_error` in size,
    `rms_error` in the mean."""

    name: str
    constant: float
    coefficients: tuple[float, ...]
    interval: float
    largest_error: float
    rms_error: float

    def __call__(self, z: Tensor) -> Tensor:
        """p(z), elementwise."""
        total = z * self.coefficients[0]
        if self.constant:
            total = total + self.constant
        for k, c in enumerate(self.coefficients[1:], start=1):
            total = total + c * z ** (2 * k + 1)
        return total

    def integral(self, z: Tensor) -> Tensor:
        """∫ p from 0 to z, plus ln 2 for the sigmoid: then it stands for softplus(z) = ln(1 + e^z)."""
        total = self.constant * z
        for k, c in enumerate(self.coefficients):
            total = total + (c / (2 * k + 2)) * z ** (2 * k + 2)
        return total + math.log(2.0) if self.name == "sigmoid" else total

    @property
    def formula(self) -> str:
        """For people."""
        terms = [f"{self.constant:g}"] if self.constant else []
        terms += [f"{c:+.6g} z" + ("" if k == 0 else f"^{2 * k + 1}") for k, c in enumerate(self.coefficients)]
        return " ".join(terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """The fits of one job."""

    sigmoid: Fit
    tanh: Fit

    @property
    def interval(self) -> float:
        return self.sigmoid.interval


@lru_cache(maxsize=32)
def fitted(degree: int, interval: float) -> Activations:
    """Sigmoid and tanh by odd polynomials of that degree over |z| <= `interval`."""
    if degree not in DEGREES:
        raise ConfigError(f"activation: degree {degree} is not one of {', '.join(map(str, DEGREES))}")
    if not (math.isfinite(interval) and 0.0 < interval <= 64.0):
        raise ConfigError(f"activation: interval {interval:g} is not above 0 and at most 64")
    return Activations(
        sigmoid=_fit("sigmoid", lambda z: 1.0 / (1.0 + np.exp(-z)), 0.5, degree, interval),
        tanh=_fit("tanh", np.tanh, 0.0, degree, interval),
    )


def _fit(name: str, function: Callable[[Any], Any], constant: float, degree: int, interval: float) -> Fit:
    """min over c of the integral of (f - c0 - Σ c_k z^k)², in powers of z/a so that the system is well conditioned;
    over z > 0, since f - c0 is odd."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    u = ((np.arange(_PANELS)[:, None] + (nodes + 1.0) / 2.0) / _PANELS).reshape(-1)
    weight = np.tile(weights / (2 * _PANELS), _PANELS)
    powers = np.stack([u ** (2 * k + 1) for k in range((degree + 1) // 2)], axis=1)
    wanted = function(u * interval) - constant
    root = np.sqrt(weight)
    solution, *_ = np.linalg.lstsq(powers * root[:, None], wanted * root, rcond=None)
    # Ten digits: the same text, hence the same Plan, whatever the machine's linear algebra rounds.
    rounded = tuple(float(f"{c / interval ** (2 * k + 1):.9e}") for k, c in enumerate(solution))
    z = np.linspace(-interval, interval, _GRID)
    error = function(z) - constant - sum(c * z ** (2 * k + 1) for k, c in enumerate(rounded))
    return Fit(
        name=name,
        constant=constant,
        coefficients=rounded,
        interval=interval,
        largest_error=float(np.abs(error).max()),
        rms_error=float(np.sqrt((error**2).mean())),
    )


_SIGMOIDS: Final = (torch.sigmoid, Tensor.sigmoid, torch.special.expit)
_TANHS: Final = (torch.tanh, Tensor.tanh)
_IN_PLACE: Final = (torch.sigmoid_, Tensor.sigmoid_, torch.tanh_, Tensor.tanh_)


class _Polynomials(TorchFunctionMode):
    def __init__(self, fits: Activations) -> None:
        super().__init__()
        self._fits = fits
        self.used: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(func is known for known in (*_SIGMOIDS, *_TANHS)):
            if len(args) != 1 or kwargs:
                raise PlanError("torch.sigmoid and tanh take one tensor here; write the result to a new one")
            fit = self._fits.sigmoid if any(func is known for known in _SIGMOIDS) else self._fits.tanh
            self.used.add(fit.name)
            return fit(args[0])
        if any(func is known for known in _IN_PLACE):
            raise PlanError(f"{func.__name__} changes a tensor in place; use torch.{func.__name__.rstrip('_')}")
        return func(*args, **(kwargs or {}))


@contextmanager
def polynomial_activations(fits: Activations) -> Iterator[set[str]]:
    """While it is open, sigmoid and tanh are polynomials; yields the names of those that were called so far."""
    mode = _Polynomials(fits)
    with mode:
        yield mode.used
