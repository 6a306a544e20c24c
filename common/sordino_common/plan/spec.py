"""`TensorSpec`: dtype and shape of a value, known before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sordino_common.errors import PlanError

# dtype name -> bytes per element. Closed: nothing else can be written into a Plan.
ITEM_BYTES: Final[dict[str, int]] = {
    "float32": 4,
    "float64": 8,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "bool": 1,
}
FLOATS: Final = frozenset({"float32", "float64"})
INTS: Final = frozenset({"int32", "int64", "uint8"})

MAX_RANK: Final = 8  # as `messages.Array`
# Far above any limit on bytes, and small enough that no product of element count, item size and a small factor leaves
# an int64 in NumPy or torch. Dimensions of size 0 count as 1: a shape [0, 2**62] is as unwelcome as [1, 2**62].
MAX_ELEMENTS: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype (a key of `ITEM_BYTES`) and static shape. Raises `PlanError` on anything else."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in ITEM_BYTES:
            raise PlanError(f"dtype {str(self.dtype)[:40]!r} is not one of {', '.join(ITEM_BYTES)}")
        if not isinstance(self.shape, tuple) or len(self.shape) > MAX_RANK:
            raise PlanError(f"a shape has at most {MAX_RANK} dimensions, got {str(self.shape)[:80]}")
        bound = 1
        for dim in self.shape:
            if type(dim) is not int or dim < 0:
                raise PlanError(f"a dimension is a natural number, got {str(dim)[:40]} in {str(self.shape)[:80]}")
            bound *= max(dim, 1)
        if bound > MAX_ELEMENTS:
            raise PlanError(f"shape {str(list(self.shape))[:80]} is larger than 2^40 elements")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements: the product of the dimensions, 1 for the empty shape."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"
