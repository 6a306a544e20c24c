"""Inner products that are computed together: every vector is cast to limbs once, however many it is multiplied by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sordino_common.spdz.field import Field, Fp

I64 = npt.NDArray[np.int64]
Name = int | tuple[str, int]


class InnerProducts:
    """Of batches of vectors, [rows, n] each. A product, times a public integer for each row, is added to some sum."""

    def __init__(self, sums: int, rows: int) -> None:
        self._found = [[0] * rows for _ in range(sums)]
        self._left: list[Fp | I64] = []
        self._right: list[Fp | I64] = []
        self._numbers: dict[Name, int] = {}
        self._pairs: list[tuple[int, int]] = []
        self._scales: list[tuple[int, Sequence[int]]] = []

    def left(self, vector: Fp | I64) -> int:
        """A vector that others are multiplied by; returns its number."""
        self._left.append(vector)
        return len(self._left) - 1

    def knows(self, name: Name) -> bool:
        return name in self._numbers

    def right(self, name: Name, vector: Fp | I64) -> None:
        self._numbers[name] = len(self._right)
        self._right.append(vector)

    def add(self, left: int, name: Name, *, to: int, scales: Sequence[int]) -> None:
        self._pairs.append((left, self._numbers[name]))
        self._scales.append((to, scales))

    def run(self, field: Field) -> list[list[int]]:
        """The sums of each row, not reduced mod p."""
        products = field.dots(self._left, self._right, self._pairs) if self._pairs else []
        for (to, scales), product in zip(self._scales, products, strict=True):
            self._found[to] = [s + k * each for s, k, each in zip(self._found[to], scales, product, strict=True)]
        return self._found


def total(drawn: I64) -> list[int]:
    """The sum of each row's coefficients, as integers."""
    high, low = (drawn >> np.int64(32)).sum(axis=1), (drawn & np.int64(0xFFFFFFFF)).sum(axis=1)
    return [(int(upper) << 32) + int(lower) for upper, lower in zip(high, low, strict=True)]
