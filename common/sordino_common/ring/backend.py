"""Where the heavy products run: the dealer multiplies whole tensors of masks, and a GPU may do that for it.

A `RingBackend` takes and returns NumPy arrays and is exact: every implementation gives the same bits, so which one ran
can't be seen in any result. `NumpyBackend` is the one that is always there; the server has one on torch.
"""

from __future__ import annotations

from typing import Protocol

from sordino_common.ring import fp
from sordino_common.ring.fp import Fp
from sordino_common.ring.limbs import I64, Workspace
from sordino_common.ring.matmul import Costs, matmul


class RingBackend(Protocol):
    """Products in Z_2^64 and F_p. Shapes and errors as in `ring.matmul` and `ring.fp`."""

    @property
    def name(self) -> str:
        """For logs and reports: what computes, and on which device."""
        ...

    def matmul(self, a: I64, b: I64) -> I64:
        """a b mod 2^64."""
        ...

    def fp_scale(self, alpha: int, v: I64) -> Fp:
        """alpha v mod p."""
        ...

    def fp_scale_fp(self, alpha: int, a: Fp) -> Fp:
        """alpha a mod p."""
        ...

    def fp_mul_int64(self, a: Fp, v: I64) -> Fp:
        """a v mod p, entry by entry."""
        ...


class NumpyBackend:
    """`ring.matmul` and `ring.fp`, with one workspace that is kept. Not for two threads at once."""

    def __init__(self, *, costs: Costs | None = None) -> None:
        self._costs = costs
        self._workspace = Workspace()

    @property
    def name(self) -> str:
        return "numpy"

    def matmul(self, a: I64, b: I64) -> I64:
        return matmul(a, b, workspace=self._workspace, costs=self._costs)

    def fp_scale(self, alpha: int, v: I64) -> Fp:
        return fp.scale(alpha, v)

    def fp_scale_fp(self, alpha: int, a: Fp) -> Fp:
        return fp.scale_fp(alpha, a)

    def fp_mul_int64(self, a: Fp, v: I64) -> Fp:
        return fp.mul_int64(a, v)
