"""Polynomial sigmoid and tanh, as shares compute them, for eager code: on plain tensors, pointers and shares alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sordino_server.tensors.shared.links import SharedTensor
from sordino_server.trace.activations import Activations, Fit, _Polynomials, fitted

DEGREE = 3
INTERVAL = 8.0


def sigmoid(z: Tensor, *, degree: int = DEGREE, interval: float = INTERVAL) -> Tensor:
    """1 / (1 + e^-z) by an odd polynomial of `degree` (3 or 5), by least squares on |z| <= interval.

    Outside the interval it means nothing: on shares what may leave it is refused, unless it was stated what never
    passes it (`Ranges(preactivations=...)`)."""
    return _apply(fitted(degree, interval).sigmoid, z)


def tanh(z: Tensor, *, degree: int = DEGREE, interval: float = INTERVAL) -> Tensor:
    """tanh z by an odd polynomial; see `sigmoid`."""
    return _apply(fitted(degree, interval).tanh, z)


@contextmanager
def polynomial_activations(*, degree: int = DEGREE, interval: float = INTERVAL) -> Iterator[None]:
    """While it is open, torch.sigmoid, torch.tanh, nn.Sigmoid and their like are these polynomials: for models that are
    not edited."""
    with _Noted(fitted(degree, interval)):
        yield


class _Noted(_Polynomials):
    """Tells committees which interval what they compute was fitted on."""

    def __init__(self, fits: Activations) -> None:
        super().__init__(fits)
        self._interval = fits.interval

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = set(self.used)
        self.used.clear()
        result = super().__torch_function__(func, types, args, kwargs)
        if self.used and isinstance(args[0], SharedTensor):
            args[0].owner.recorder.note_interval(self._interval)
        self.used |= before
        return result


def _apply(fit: Fit, z: Tensor) -> Tensor:
    if isinstance(z, SharedTensor):
        z.owner.recorder.note_interval(fit.interval)
    return fit(z)
