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

    def expand(self, seed: Seed, info: bytes, count: int) -> Fp: ...
    def sub(self, a: Fp, b: Fp) -> Fp: ...

    # tags
    def scale(self, scalar: int, v: I64) -> Fp: ...
    def scale_fp(self, scalar: int, a: Fp) -> Fp: ...

    # weights (products below 2^127), and inner products (what `vectors` gives has n as its axis 1)
    def mul_exact(self, a: I64, b: I64) -> Fp: ...
    def mul_int64(self, a: Fp, v: I64) -> Fp: ...
    def dots(
        self, left: Sequence[Fp | I64], right: Sequence[Fp | I64], pairs: Sequence[tuple[int, int]]
    ) -> list[list[int]]: ...
    def vectors(self, v: I64) -> Planes: ...
    def mat_vecs(self, jobs: Sequence[tuple[I64, Planes]]) -> Fp: ...


class Mersenne127:
    """`Field` by `ring.fp`; what is heavy in dealing runs on `backend`, by default NumPy's."""

    prime = fp.P
    sub = staticmethod(fp.sub)
    mul_exact = staticmethod(fp.mul_exact)
    vectors = staticmethod(fp.vectors)

    def __init__(self, backend: RingBackend | None = None) -> None:
        self._backend: Final = backend or NumpyBackend()
        self._workspace: Final = Workspace()

    def dots(
        self, left: Sequence[Fp | I64], right: Sequence[Fp | I64], pairs: Sequence[tuple[int, int]]
    ) -> list[list[int]]:
        return fp.dots(left, right, pairs, workspace=self._workspace)

    def mat_vecs(self, jobs: Sequence[tuple[I64, Planes]]) -> Fp:
        return fp.mat_vecs(jobs, workspace=self._workspace)

    def scale(self, scalar: int, v: I64) -> Fp:
        return self._backend.fp_scale(scalar, v)

    def scale_fp(self, scalar: int, a: Fp) -> Fp:
        return self._backend.fp_scale_fp(scalar, a)

    def mul_int64(self, a: Fp, v: I64) -> Fp:
        return self._backend.fp_mul_int64(a, v)

    @staticmethod
    def expand(seed: Seed, info: bytes, count: int) -> Fp:
        return fp.expand_fp(seed, info, (count,))
