"""Elementwise ops of two and three operands: arithmetic, comparison, logic, `where`, `clamp`.

Operands broadcast; dtypes promote as in torch. Each operand is cast to the dtype in which the op computes, so float32
stays float32 whatever NumPy's own rules say about 0-dimensional arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.rules import (
    broadcast_operands,
    cast_bytes,
    check_scalar,
    float_of,
    need,
    result_dtype,
    scalar_of,
)
from sordino_common.plan.spec import FLOATS, TensorSpec

_Ufunc = Callable[..., Any]


def apply_in(dtype: str, ufunc: _Ufunc, *operands: Any) -> Kernel:
    """`ufunc` over the operands, each cast to `dtype`; scalars are bound now, tensors are the kernel's arguments."""
    same = [isinstance(operand, TensorSpec) and operand.dtype == dtype for operand in operands]
    if all(same):
        return ufunc
    if len(operands) == 2:
        x, y = operands
        if not isinstance(y, TensorSpec) and same[0]:
            right = scalar_of(y, dtype)
            return lambda a: ufunc(a, right)
        if not isinstance(x, TensorSpec) and same[1]:
            left = scalar_of(x, dtype)
            return lambda b: ufunc(left, b)
    bound = [None if isinstance(operand, TensorSpec) else scalar_of(operand, dtype) for operand in operands]

    def kernel(*arrays: Any) -> Any:
        given = iter(arrays)
        return ufunc(*[next(given).astype(dtype, copy=False) if entry is None else entry for entry in bound])

    return kernel


def _checked(dtype: str, *operands: Any) -> str:
    for operand in operands:
        if not isinstance(operand, TensorSpec):
            check_scalar(operand, dtype)
    return dtype


# --- arithmetic --------------------------------------------------------------------------------------------------


def _infer_same(x: Any, y: Any) -> Outs:
    return (TensorSpec(_checked(result_dtype(x, y), x, y), broadcast_operands(x, y)),)


def _infer_add(x: Any, y: Any, alpha: Any) -> Outs:
    (out,) = _infer_same(x, y)
    check_scalar(alpha, out.dtype)
    return (out,)


def _infer_sub(x: Any, y: Any, alpha: Any) -> Outs:
    (out,) = _infer_add(x, y, alpha)
    need(out.dtype != "bool", "bool has no subtraction")
    return (out,)


def _infer_div(x: Any, y: Any) -> Outs:
    return (TensorSpec(float_of(result_dtype(x, y)), broadcast_operands(x, y)),)


def _infer_pow(x: Any, y: Any) -> Outs:
    dtype = result_dtype(x, y)
    if dtype not in FLOATS:
        # An integer to a negative power is no integer; to keep that out of the data, the exponent is a constant.
        need(
            isinstance(y, int) and not isinstance(y, bool) and y >= 0 and dtype != "bool",
            "integers take a constant exponent >= 0",
        )
    return (TensorSpec(_checked(dtype, x, y), broadcast_operands(x, y)),)


def _scaled(ufunc: _Ufunc) -> Callable[..., Kernel]:
    """x ± alpha·y."""

    def kernel_of(outs: Outs, x: Any, y: Any, alpha: Any) -> Kernel:
        dtype = outs[0].dtype
        if alpha == 1:
            return apply_in(dtype, ufunc, x, y)
        factor = scalar_of(alpha, dtype)
        return apply_in(dtype, lambda a, b: ufunc(a, np.multiply(b, factor)), x, y)

    return kernel_of


def _binary(ufunc: _Ufunc) -> Callable[..., Kernel]:
    return lambda outs, x, y: apply_in(outs[0].dtype, ufunc, x, y)


def _pow_kernel(outs: Outs, x: Any, y: Any) -> Kernel:
    dtype = outs[0].dtype
    if isinstance(x, TensorSpec) and x.dtype == dtype and dtype in FLOATS and not isinstance(y, TensorSpec):
        # torch has the same short cuts, and np.power is far slower than they are.
        special: dict[float, Kernel] = {
            2.0: np.square,
            0.5: np.sqrt,
            -1.0: np.reciprocal,
            3.0: lambda a: np.multiply(np.square(a), a),
        }
        if y in special:
            return special[y]
    return apply_in(dtype, np.power, x, y)


def _cast_scratch(outs: Outs, *operands: Any) -> int:
    return cast_bytes(outs[0].dtype, *operands)


def _scaled_scratch(outs: Outs, x: Any, y: Any, alpha: Any) -> int:
    return cast_bytes(outs[0].dtype, x, y) + (0 if alpha == 1 else outs[0].nbytes)


register("add(Num self, Num other, Scalar alpha=1)", infer=_infer_add, kernel=_scaled(np.add), scratch=_scaled_scratch)
register(
    "sub(Num self, Num other, Scalar alpha=1)", infer=_infer_sub, kernel=_scaled(np.subtract), scratch=_scaled_scratch
)
register("mul(Num self, Num other)", infer=_infer_same, kernel=_binary(np.multiply), scratch=_cast_scratch)
register("div(Num self, Num other)", infer=_infer_div, kernel=_binary(np.true_divide), scratch=_cast_scratch)
register(
    "pow(Num self, Num exponent)",
    infer=_infer_pow,
    kernel=_pow_kernel,
    flops=lambda outs, *_: 20 * outs[0].numel,
    scratch=lambda outs, x, y: outs[0].nbytes + cast_bytes(outs[0].dtype, x, y),
)
register("maximum(Num self, Num other)", infer=_infer_same, kernel=_binary(np.maximum), scratch=_cast_scratch)
register("minimum(Num self, Num other)", infer=_infer_same, kernel=_binary(np.minimum), scratch=_cast_scratch)


# --- comparison and logic ----------------------------------------------------------------------------------------


def _infer_compare(x: Any, y: Any) -> Outs:
    _checked(result_dtype(x, y), x, y)
    return (TensorSpec("bool", broadcast_operands(x, y)),)


def _compare(ufunc: _Ufunc) -> Callable[..., Kernel]:
    return lambda _outs, x, y: apply_in(result_dtype(x, y), ufunc, x, y)


def _compare_scratch(_outs: Outs, x: Any, y: Any) -> int:
    return cast_bytes(result_dtype(x, y), x, y)


def _infer_bitwise(x: Any, y: Any) -> Outs:
    (out,) = _infer_same(x, y)
    need(out.dtype not in FLOATS, "bitwise ops take bool and integers")
    return (out,)


_comparisons: tuple[tuple[str, _Ufunc], ...] = (
    ("eq", np.equal),
    ("ne", np.not_equal),
    ("lt", np.less),
    ("le", np.less_equal),
    ("gt", np.greater),
    ("ge", np.greater_equal),
    ("logical_and", np.logical_and),
    ("logical_or", np.logical_or),
)
for _name, _ufunc in _comparisons:
    register(f"{_name}(Num self, Num other)", infer=_infer_compare, kernel=_compare(_ufunc), scratch=_compare_scratch)
_bitwise: tuple[tuple[str, _Ufunc], ...] = (
    ("bitwise_and", np.bitwise_and),
    ("bitwise_or", np.bitwise_or),
    ("bitwise_xor", np.bitwise_xor),
)
for _name, _ufunc in _bitwise:
    register(f"{_name}(Num self, Num other)", infer=_infer_bitwise, kernel=_binary(_ufunc), scratch=_cast_scratch)


# --- choice ------------------------------------------------------------------------------------------------------


def _infer_where(condition: TensorSpec, x: Any, y: Any) -> Outs:
    need(condition.dtype == "bool", f"the condition is bool, got {condition.dtype}")
    return (TensorSpec(_checked(result_dtype_of_choice(x, y), x, y), broadcast_operands(condition, x, y)),)


def result_dtype_of_choice(x: Any, y: Any) -> str:
    """As `result_dtype`, and two scalars take their wider wrapped dtype."""
    if isinstance(x, TensorSpec) or isinstance(y, TensorSpec):
        return result_dtype(x, y)
    return "float32" if isinstance(x, float) or isinstance(y, float) else "bool" if x is True or y is True else "int64"


def _where_kernel(outs: Outs, _condition: TensorSpec, x: Any, y: Any) -> Kernel:
    dtype = outs[0].dtype
    if isinstance(x, TensorSpec) and isinstance(y, TensorSpec) and x.dtype == dtype == y.dtype:
        return np.where
    if _is_zero(x) and isinstance(y, TensorSpec) and y.dtype == dtype and dtype in _BITS:
        return _mask_out(_BITS[dtype], keep_where=False)
    if _is_zero(y) and isinstance(x, TensorSpec) and x.dtype == dtype and dtype in _BITS:
        return _mask_out(_BITS[dtype], keep_where=True)
    left = None if isinstance(x, TensorSpec) else scalar_of(x, dtype)
    right = None if isinstance(y, TensorSpec) else scalar_of(y, dtype)

    def kernel(condition: Any, *arrays: Any) -> Any:
        given = iter(arrays)
        a = next(given).astype(dtype, copy=False) if left is None else left
        b = next(given).astype(dtype, copy=False) if right is None else right
        return np.where(condition, a, b)

    return kernel


_BITS: Final[dict[str, np.dtype[Any]]] = {"float32": np.dtype(np.int32), "float64": np.dtype(np.int64)}


def _is_zero(x: Any) -> bool:
    return not isinstance(x, TensorSpec) and x == 0 and math.copysign(1, x) > 0


def _mask_out(bits: np.dtype[Any], *, keep_where: bool) -> Kernel:
    """x or 0, by masking x's bits (NaN and infinities too): the gradient of ReLU. np.where branches on every element,
    which costs ten times as much when the condition is random."""

    def kernel(condition: Any, x: Any) -> Any:
        mask = condition.astype(bits)
        mask = np.negative(mask) if keep_where else np.subtract(mask, 1)  # all ones where x stays
        return np.bitwise_and(mask, x.view(bits)).view(x.dtype)

    return kernel


def _infer_clamp(x: TensorSpec, low: Any, high: Any) -> Outs:
    bounds = [bound for bound in (low, high) if bound is not None]
    need(bool(bounds), "one of min and max must be given")
    need(x.dtype != "bool", "bool has no order to clamp by")
    return (TensorSpec(_checked(result_dtype(x, *bounds), *bounds), x.shape),)


def _clamp_kernel(outs: Outs, x: TensorSpec, low: Any, high: Any) -> Kernel:
    dtype = outs[0].dtype
    if high is None:
        return apply_in(dtype, np.maximum, x, low)
    if low is None:
        return apply_in(dtype, np.minimum, x, high)
    least, most = scalar_of(low, dtype), scalar_of(high, dtype)
    return apply_in(dtype, lambda a: np.minimum(np.maximum(a, least), most), x)


def _clamp_scratch(outs: Outs, x: TensorSpec, _low: Any, _high: Any) -> int:
    return cast_bytes(outs[0].dtype, x) + outs[0].nbytes


register(
    "where(Tensor condition, Num self, Num other)",
    infer=_infer_where,
    kernel=_where_kernel,
    scratch=lambda outs, _condition, x, y: cast_bytes(outs[0].dtype, x, y) + 2 * outs[0].nbytes,
)
register("clamp(Tensor self, Scalar? min=None, Scalar? max=None)", infer=_infer_clamp, kernel=_clamp_kernel,
         scratch=_clamp_scratch)  # fmt: skip
