"""Rules that many ops share: torch's type promotion and broadcasting, dimensions, scalars that must fit."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from sordino_common.errors import PlanError
from sordino_common.plan.spec import FLOATS, INTS, ITEM_BYTES, TensorSpec

_ORDER: Final = ("bool", "uint8", "int32", "int64", "float32", "float64")  # within our dtypes promotion is a chain
_INT_RANGE: Final = {
    "uint8": (0, 255),
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
}


def _category(dtype: str) -> int:
    return 2 if dtype in FLOATS else 0 if dtype == "bool" else 1


def _wider(left: str | None, right: str | None) -> str | None:
    if left is None or right is None:
        return left or right
    return max(left, right, key=_ORDER.index)


def _combine(higher: str | None, lower: str | None) -> str | None:
    """A lower-priority operand counts only if its category (bool < integer < float) is above the higher one's."""
    if higher is None or lower is None:
        return higher or lower
    return lower if _category(lower) > _category(higher) else higher


def result_dtype(*operands: Any) -> str:
    """torch.result_type: tensors with dimensions before tensors without before scalars (an int is int64, a float is
    float32, as the default dtype)."""
    dims: str | None = None
    zeros: str | None = None
    scalars: str | None = None
    for operand in operands:
        if isinstance(operand, TensorSpec):
            if operand.rank:
                dims = _wider(dims, operand.dtype)
            else:
                zeros = _wider(zeros, operand.dtype)
        elif isinstance(operand, bool):
            scalars = _wider(scalars, "bool")
        else:
            scalars = _wider(scalars, "int64" if isinstance(operand, int) else "float32")
    result = _combine(_combine(dims, zeros), scalars)
    if result is None:
        raise PlanError("at least one operand must be a tensor")
    return result


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape, as NumPy and torch agree on it."""
    rank = max(map(len, shapes), default=0)
    result = []
    for position in range(-rank, 0):
        dims = {shape[position] for shape in shapes if len(shape) >= -position} - {1}
        if len(dims) > 1:
            raise PlanError(f"shapes {', '.join(str(list(shape)) for shape in shapes)} don't broadcast")
        result.append(dims.pop() if dims else 1)
    return tuple(result)


def broadcast_operands(*operands: Any) -> tuple[int, ...]:
    """The common shape of those operands that are tensors; there must be one."""
    shapes = [operand.shape for operand in operands if isinstance(operand, TensorSpec)]
    if not shapes:
        raise PlanError("at least one operand must be a tensor")
    return broadcast(*shapes)


def check_scalar(value: float | bool, dtype: str) -> None:
    """`PlanError` if the scalar has no place in `dtype`. What overflows float32 becomes infinite, as in torch."""
    if dtype in _INT_RANGE:
        low, high = _INT_RANGE[dtype]
        if isinstance(value, float) and not value.is_integer():
            raise PlanError(f"scalar {value} is not an integer, as {dtype} needs")
        if not low <= value <= high:
            raise PlanError(f"scalar {value} does not fit into {dtype}")
    if dtype == "bool" and value not in (0, 1):
        raise PlanError(f"scalar {value} is no bool")


def scalar_of(value: float | bool, dtype: str) -> Any:
    """The scalar as a NumPy scalar of `dtype`."""
    with np.errstate(over="ignore"):
        return np.dtype(dtype).type(value)


def dim_of(dim: int, rank: int) -> int:
    """A dimension counted from the front. A tensor of rank 0 has, as in torch, a dimension 0."""
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise PlanError(f"dimension {dim} is not one of a tensor of rank {rank}")
    return dim % max(rank, 1)


def dims_of(dims: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Dimensions counted from the front, sorted; the empty list means all. Those that rank 0 has are none."""
    found = sorted(dim_of(dim, rank) for dim in dims)
    if len(set(found)) != len(found):
        raise PlanError(f"dimensions {list(dims)} name one twice")
    if rank == 0:
        return ()
    return tuple(found) if dims else tuple(range(rank))


def need(condition: bool, text: str) -> None:
    """Raise `PlanError(text)` unless `condition`."""
    if not condition:
        raise PlanError(text)


def need_float(*specs: TensorSpec | None) -> None:
    """All of them of one floating dtype."""
    dtypes = {spec.dtype for spec in specs if spec is not None}
    if len(dtypes) != 1 or not dtypes <= FLOATS:
        raise PlanError(f"expected one floating dtype, got {', '.join(sorted(dtypes))}")


def need_index(spec: TensorSpec) -> None:
    need(spec.dtype in ("int64", "int32"), f"an index is int64 or int32, got {spec.dtype}")


def float_of(dtype: str) -> str:
    """The dtype itself if it is floating, else torch's default."""
    return dtype if dtype in FLOATS else "float32"


def cast_bytes(dtype: str, *operands: Any) -> int:
    """Memory of the operands' casts to `dtype`."""
    return sum(
        operand.numel * ITEM_BYTES[dtype]
        for operand in operands
        if isinstance(operand, TensorSpec) and operand.dtype != dtype
    )


def is_integer(dtype: str) -> bool:
    return dtype in INTS


def check_indices(index: Any, size: int, what: str) -> None:
    """Every entry of `index` in [0, size), else `PlanError`: torch and NumPy differ on negative ones, and we run
    Plans of others. One pass: a negative int64 is a huge uint64."""
    if index.size and int(index.view(np.uint64 if index.itemsize == 8 else np.uint32).max()) >= size:
        raise PlanError(f"{what}: an index is outside [0, {size})")
