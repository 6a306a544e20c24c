"""The field that MACs live in: F_p with p = 2^127 - 1, behind the few operations that dealing and checking need.

Arrays are of shape (2, *shape), as in `ring.fp`. The protocol takes the field as a value so that the tests can measure
the check's soundness in a small field, where it fails often enough to be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from sordino_common.ring import fp
from sordino_common.ring.backend import NumpyBackend, RingBackend
from sordino_common.ring.limbs import Workspace
from sordino_common.ring.prg import Seed

I64 = npt.NDArray[np.int64]
Fp = npt.NDArray[Any]
Planes = npt.NDArray[Any]


class Field(Protocol):
    """Vectors over F_p. `int64` arguments are signed integers; every result is canonical."""

    @property
    def prime(self) -> int: ...

    def from_int64(self, v: I64) -> Fp: ...
    def add(self, a: Fp, b: Fp) -> Fp: ...
    def sub(self, a: Fp, b: Fp) -> Fp: ...
    def sum(self, a: Fp, axes: tuple[int, ...]) -> Fp: ...
    def expand(self, seed: Seed, info: bytes, count: int) -> Fp: ...

    # dealing: integer products of masks mod p (of matrices mod 2^64 too), then times the MAC key
    def mul_exact(self, a: I64, b: I64) -> Fp: ...
    def matmul_exact(self, a: I64, b: I64) -> tuple[I64, Fp]: ...
    def scale(self, scalar: int, v: I64) -> Fp: ...
    def scale_fp(self, scalar: int, a: Fp) -> Fp: ...

    # checking: weights, and inner products (what `vectors` gives has n as its axis 1)
    def weighted(self, rho: I64, v: I64) -> Fp: ...
    def mul_int64(self, a: Fp, v: I64) -> Fp: ...
    def dots(self, w: Fp | I64, others: Sequence[Fp | I64]) -> list[int]: ...
    def vectors(self, v: I64) -> Planes: ...
    def mat_vecs(self, jobs: Sequence[tuple[Fp, I64, Planes]]) -> tuple[Fp, Fp]: ...


class Mersenne127:
    """`Field` by `ring.fp`; what is heavy in dealing runs on `backend`, by default NumPy's."""

    prime = fp.P
    from_int64 = staticmethod(fp.from_int64)
    add = staticmethod(fp.add)
    sub = staticmethod(fp.sub)
    mul_exact = staticmethod(fp.mul_exact)
    mul_int64 = staticmethod(fp.mul_int64)
    vectors = staticmethod(fp.vectors)

    def __init__(self, backend: RingBackend | None = None) -> None:
        self._backend: Final = backend or NumpyBackend()
        self._workspace: Final = Workspace()

    def dots(self, w: Fp | I64, others: Sequence[Fp | I64]) -> list[int]:
        return fp.dots(w, others, workspace=self._workspace)

    def mat_vecs(self, jobs: Sequence[tuple[Fp, I64, Planes]]) -> tuple[Fp, Fp]:
        return fp.mat_vecs(jobs, workspace=self._workspace)

    def matmul_exact(self, a: I64, b: I64) -> tuple[I64, Fp]:
        return self._backend.matmul_exact(a, b)

    def scale(self, scalar: int, v: I64) -> Fp:
        return self._backend.fp_scale(scalar, v)

    def scale_fp(self, scalar: int, a: Fp) -> Fp:
        return self._backend.fp_scale_fp(scalar, a)

    @staticmethod
    def weighted(rho: I64, v: I64) -> Fp:
        return fp.weighted(rho.view(np.uint64), v)

    @staticmethod
    def sum(a: Fp, axes: tuple[int, ...]) -> Fp:
        return fp.sum_(a, axes)

    @staticmethod
    def expand(seed: Seed, info: bytes, count: int) -> Fp:
        return fp.expand_fp(seed, info, (count,))
