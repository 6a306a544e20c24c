"""Elementwise ops of one operand: sign, rounding, exponentials, activations, casts.

Transcendental ops turn integers and bool into float32 first, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sordino_common.errors import PlanError
from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.elementwise import apply_in
from sordino_common.plan.ops.erf import erf
from sordino_common.plan.ops.rules import cast_bytes, check_scalar, float_of, need, need_float, scalar_of
from sordino_common.plan.spec import FLOATS, TensorSpec


def _infer_float(x: TensorSpec) -> Outs:
    return (TensorSpec(float_of(x.dtype), x.shape),)


def _infer_number(x: TensorSpec) -> Outs:
    need(x.dtype != "bool", "bool is no number")
    return (x,)


def _infer_only_float(x: TensorSpec) -> Outs:
    need_float(x)
    return (x,)


def _infer_bits(x: TensorSpec) -> Outs:
    need(x.dtype not in FLOATS, "bitwise ops take bool and integers")
    return (x,)


def _same(function: Callable[..., Any]) -> Callable[..., Kernel]:
    return lambda outs, x: apply_in(outs[0].dtype, function, x)


def _scratch(temporaries: int) -> Callable[..., int]:
    """Casts of the operand, and that many arrays of the result's size beside it."""
    return lambda outs, x, *_: cast_bytes(outs[0].dtype, x) + temporaries * outs[0].nbytes


def _cost(per_element: int) -> Callable[..., int]:
    return lambda outs, *_: per_element * outs[0].numel


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x): e^-x may be infinite, and the result then 0."""
    out = np.empty_like(x)
    np.negative(x, out=out)
    np.exp(out, out=out)
    np.add(out, 1, out=out)
    return np.reciprocal(out, out=out)


def relu(x: Any) -> Any:
    return np.maximum(x, 0)


def _sign(x: Any) -> Any:
    """-1, 0 or 1; of NaN 0, as in torch (np.sign has NaN)."""
    return np.subtract(np.greater(x, 0), np.less(x, 0), dtype=x.dtype)


def _rsqrt(x: Any) -> Any:
    return np.reciprocal(np.sqrt(x))


_transcendental: tuple[tuple[str, Callable[..., Any], int], ...] = (
    ("exp", np.exp, 10),
    ("expm1", np.expm1, 10),
    ("log", np.log, 10),
    ("log1p", np.log1p, 10),
    ("sqrt", np.sqrt, 4),
    ("reciprocal", np.reciprocal, 4),
    ("sin", np.sin, 10),
    ("cos", np.cos, 10),
    ("tanh", np.tanh, 15),
    ("sigmoid", sigmoid, 15),
)
for _name, _function, _flops in _transcendental:
    register(f"{_name}(Tensor self)", infer=_infer_float, kernel=_same(_function), flops=_cost(_flops),
             scratch=_scratch(0))  # fmt: skip
register("rsqrt(Tensor self)", infer=_infer_float, kernel=_same(_rsqrt), flops=_cost(6), scratch=_scratch(1))
# `erf` computes in float64, blockwise (see there): its memory is a constant.
register("erf(Tensor self)", infer=_infer_float, kernel=_same(erf), flops=_cost(40), scratch=_scratch(0))
_signs: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("neg", np.negative),
    ("abs", np.absolute),
    ("sign", _sign),
)
for _name, _function in _signs:
    register(f"{_name}(Tensor self)", infer=_infer_number, kernel=_same(_function))
_roundings: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("floor", np.floor),
    ("ceil", np.ceil),
    ("round", np.rint),
    ("trunc", np.trunc),
)
for _name, _function in _roundings:
    register(f"{_name}(Tensor self)", infer=_infer_only_float, kernel=_same(_function))
register("relu(Tensor self)", infer=_infer_number, kernel=_same(relu))
register("bitwise_not(Tensor self)", infer=_infer_bits, kernel=lambda _outs, _x: np.invert)
register("logical_not(Tensor self)", infer=lambda x: (TensorSpec("bool", x.shape),),
         kernel=lambda _outs, _x: np.logical_not)  # fmt: skip


# --- activations that torch keeps whole --------------------------------------------------------------------------


def _infer_gelu(x: TensorSpec, approximate: str) -> Outs:
    need(approximate in ("none", "tanh"), f"approximate is none or tanh, got {approximate[:20]!r}")
    return _infer_only_float(x)


def _gelu_kernel(_outs: Outs, x: TensorSpec, approximate: str) -> Kernel:
    half, one = scalar_of(0.5, x.dtype), scalar_of(1, x.dtype)
    if approximate == "none":
        root = scalar_of(0.5**0.5, x.dtype)
        return lambda a: a * half * (one + erf(a * root))
    scale, cubic = scalar_of((2 / np.pi) ** 0.5, x.dtype), scalar_of(0.044715, x.dtype)
    return lambda a: a * half * (one + np.tanh(scale * (a + cubic * a * a * a)))


def _infer_slope(x: TensorSpec, *_scalars: Any) -> Outs:
    return _infer_only_float(x)


def _leaky_kernel(_outs: Outs, x: TensorSpec, slope: Any) -> Kernel:
    factor = scalar_of(slope, x.dtype)
    return lambda a: np.where(a > 0, a, a * factor)


def _elu_kernel(_outs: Outs, x: TensorSpec, alpha: Any, scale: Any, input_scale: Any) -> Kernel:
    negative, positive, inner = (
        scalar_of(alpha * scale, x.dtype),
        scalar_of(scale, x.dtype),
        scalar_of(input_scale, x.dtype),
    )
    return lambda a: np.where(a > 0, a * positive, np.expm1(a * inner) * negative)


def _infer_hardtanh(x: TensorSpec, low: Any, high: Any) -> Outs:
    if low > high:
        raise PlanError(f"min {low} is above max {high}")
    return _infer_only_float(x)


def _hardtanh_kernel(_outs: Outs, x: TensorSpec, low: Any, high: Any) -> Kernel:
    least, most = scalar_of(low, x.dtype), scalar_of(high, x.dtype)
    return lambda a: np.minimum(np.maximum(a, least), most)


register('gelu(Tensor self, str approximate=none)', infer=_infer_gelu, kernel=_gelu_kernel, flops=_cost(50),
         scratch=_scratch(3))  # fmt: skip
register("leaky_relu(Tensor self, Scalar negative_slope=0.01)", infer=_infer_slope, kernel=_leaky_kernel,
         flops=_cost(3), scratch=_scratch(2))  # fmt: skip
register("elu(Tensor self, Scalar alpha=1.0, Scalar scale=1.0, Scalar input_scale=1.0)", infer=_infer_slope,
         kernel=_elu_kernel, flops=_cost(15), scratch=_scratch(4))  # fmt: skip
register("hardtanh(Tensor self, Scalar min_val=-1.0, Scalar max_val=1.0)", infer=_infer_hardtanh,
         kernel=_hardtanh_kernel, flops=_cost(2), scratch=_scratch(1))  # fmt: skip


# --- casts, creation ---------------------------------------------------------------------------------------------


def _to_kernel(outs: Outs, _x: TensorSpec, _dtype: str) -> Kernel:
    dtype = np.dtype(outs[0].dtype)
    return lambda a: a.astype(dtype)


def _infer_full(size: tuple[int, ...], value: Any, dtype: str) -> Outs:
    check_scalar(value, dtype)
    return (TensorSpec(dtype, size),)


def _full_kernel(outs: Outs, _size: tuple[int, ...], value: Any, dtype: str) -> Kernel:
    # One element in memory, whatever the shape: values are never written to. Counted in full all the same, since a
    # `view` of it may have to copy.
    filled = np.broadcast_to(scalar_of(value, dtype), outs[0].shape)
    return lambda: filled


def _infer_arange(start: Any, end: Any, step: Any, dtype: str) -> Outs:
    need(dtype != "bool", "no range of bools")
    finite = all(isinstance(bound, int) or abs(bound) < 2**53 for bound in (start, end, step))
    need(finite and step != 0, "bounds are finite and the step is not 0")
    need(not any(isinstance(bound, bool) for bound in (start, end, step)), "a bool is no bound")
    need(start == end or (end > start) == (step > 0), "the bounds are not in the step's direction")
    if dtype not in FLOATS:
        need(all(isinstance(bound, int) for bound in (start, end, step)), "an integer range has integer bounds")
        for bound in (start, end):
            check_scalar(bound, dtype)
        count = -((start - end) // step)
    else:
        steps = (end - start) / step
        need(abs(steps) < 2**53, "too many steps")
        count = math.ceil(steps)
    return (TensorSpec(dtype, (max(count, 0),)),)


def _arange_kernel(outs: Outs, start: Any, _end: Any, step: Any, dtype: str) -> Kernel:
    (count,) = outs[0].shape
    wide = "float64" if dtype in FLOATS else "int64"
    first, by = scalar_of(start, wide), scalar_of(step, wide)
    return lambda: (np.arange(count, dtype=wide) * by + first).astype(dtype)


register("to(Tensor self, dtype dtype)", infer=lambda x, dtype: (TensorSpec(dtype, x.shape),), kernel=_to_kernel)
register("clone(Tensor self)", infer=lambda x: (x,), kernel=lambda _outs, _x: lambda a: a, view=True)
register("full(ints size, Scalar value, dtype dtype)", infer=_infer_full, kernel=_full_kernel)
register("arange(Scalar start, Scalar end, Scalar step, dtype dtype)", infer=_infer_arange, kernel=_arange_kernel,
         scratch=lambda outs, *_: 3 * 8 * outs[0].numel)  # fmt: skip
