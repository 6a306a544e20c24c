"""Sums, means, extrema, norms over dimensions. An empty list of dimensions means all of them, as in torch.

bool and integers sum to int64. The maximum of nothing is refused when the Plan is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.rules import dim_of, dims_of, need, need_float, scalar_of
from sordino_common.plan.spec import FLOATS, TensorSpec

# NumPy's stubs type `reduce` by the literal value of `keepdims`; ours is a variable.
_add: Callable[..., Any] = np.add.reduce  # type: ignore[assignment,unused-ignore]


def _reduced(x: TensorSpec, dims: tuple[int, ...], keepdim: bool, dtype: str) -> TensorSpec:
    gone = set(dims_of(dims, x.rank))
    if keepdim:
        return TensorSpec(dtype, tuple(1 if d in gone else size for d, size in enumerate(x.shape)))
    return TensorSpec(dtype, tuple(size for d, size in enumerate(x.shape) if d not in gone))


def _count(x: TensorSpec, dims: tuple[int, ...]) -> int:
    return math.prod(x.shape[d] for d in dims_of(dims, x.rank))


def _infer_sum(x: TensorSpec, dims: tuple[int, ...], keepdim: bool) -> Outs:
    return (_reduced(x, dims, keepdim, x.dtype if x.dtype in FLOATS else "int64"),)


def _infer_mean(x: TensorSpec, dims: tuple[int, ...], keepdim: bool) -> Outs:
    need_float(x)
    return (_reduced(x, dims, keepdim, x.dtype),)


def _infer_extremum(x: TensorSpec, dims: tuple[int, ...], keepdim: bool) -> Outs:
    need(_count(x, dims) > 0, "an empty set has no extremum")
    return (_reduced(x, dims, keepdim, x.dtype),)


def _sum_kernel(outs: Outs, x: TensorSpec, dims: tuple[int, ...], keepdim: bool) -> Kernel:
    axes, dtype = dims_of(dims, x.rank), np.dtype(outs[0].dtype)
    if x.dtype == outs[0].dtype:
        return lambda a: _add(a, axis=axes, keepdims=keepdim)
    return lambda a: _add(a, axis=axes, dtype=dtype, keepdims=keepdim)


def _mean_kernel(_outs: Outs, x: TensorSpec, dims: tuple[int, ...], keepdim: bool) -> Kernel:
    axes, count = dims_of(dims, x.rank), scalar_of(_count(x, dims), x.dtype)
    return lambda a: np.true_divide(_add(a, axis=axes, keepdims=keepdim), count)


def _extremum(ufunc: Any) -> Callable[..., Kernel]:
    def kernel_of(_outs: Outs, x: TensorSpec, dims: tuple[int, ...], keepdim: bool) -> Kernel:
        axes = dims_of(dims, x.rank)
        return lambda a: ufunc.reduce(a, axis=axes, keepdims=keepdim)

    return kernel_of


def _reads(factor: int) -> Callable[..., int]:
    return lambda _outs, x, *_: factor * x.numel


register("sum(Tensor self, ints dims=(), bool keepdim=False)", infer=_infer_sum, kernel=_sum_kernel, flops=_reads(1))
register("mean(Tensor self, ints dims=(), bool keepdim=False)", infer=_infer_mean, kernel=_mean_kernel,
         flops=_reads(1), scratch=lambda outs, *_: outs[0].nbytes)  # fmt: skip
for _name, _ufunc in (("amax", np.maximum), ("amin", np.minimum)):
    register(f"{_name}(Tensor self, ints dims=(), bool keepdim=False)", infer=_infer_extremum,
             kernel=_extremum(_ufunc), flops=_reads(1))  # fmt: skip


# --- variance and norms ------------------------------------------------------------------------------------------


def _infer_var(x: TensorSpec, dims: tuple[int, ...], _correction: Any, keepdim: bool) -> Outs:
    return _infer_mean(x, dims, keepdim)


def _var_kernel(_outs: Outs, x: TensorSpec, dims: tuple[int, ...], correction: Any, keepdim: bool) -> Kernel:
    """Σ (x - mean)² / max(0, n - correction)."""
    axes, count = dims_of(dims, x.rank), _count(x, dims)
    n, left = scalar_of(count, x.dtype), scalar_of(max(0, count - correction), x.dtype)

    def kernel(a: Any) -> Any:
        centred = np.asarray(a - _add(a, axis=axes, keepdims=True) / n)
        np.square(centred, out=centred)
        return np.true_divide(_add(centred, axis=axes, keepdims=keepdim), left)

    return kernel


def _infer_norm(x: TensorSpec, order: Any, dims: tuple[int, ...], keepdim: bool) -> Outs:
    need(order in (1, 2, math.inf), f"the order of a norm is 1, 2 or inf, got {order}")
    need(order != math.inf or _count(x, dims) > 0, "an empty set has no largest element")
    return _infer_mean(x, dims, keepdim)


def _norm_scratch(outs: Outs, x: TensorSpec, *_: Any) -> int:
    return x.nbytes + outs[0].nbytes


def _norm_kernel(_outs: Outs, x: TensorSpec, order: Any, dims: tuple[int, ...], keepdim: bool) -> Kernel:
    axes = dims_of(dims, x.rank)
    if order == 2:
        return lambda a: np.sqrt(_add(np.square(a), axis=axes, keepdims=keepdim))
    ufunc: Any = np.add if order == 1 else np.maximum
    return lambda a: ufunc.reduce(np.absolute(a), axis=axes, keepdims=keepdim)


register("var(Tensor self, ints dims=(), Scalar correction=1, bool keepdim=False)", infer=_infer_var,
         kernel=_var_kernel, flops=_reads(4), scratch=lambda outs, x, *_: x.nbytes + 3 * outs[0].nbytes)  # fmt: skip
register("vector_norm(Tensor self, Scalar ord, ints dims=(), bool keepdim=False)", infer=_infer_norm,
         kernel=_norm_kernel, flops=_reads(2), scratch=_norm_scratch)  # fmt: skip


# --- where the extremum is ---------------------------------------------------------------------------------------


def _infer_arg(x: TensorSpec, dim: int | None, keepdim: bool) -> Outs:
    need(x.dtype != "bool", "bool has no order")
    dims = () if dim is None else (dim_of(dim, x.rank),)
    need(_count(x, dims) > 0, "an empty set has no extremum")
    return (_reduced(x, dims, keepdim, "int64"),)


def _arg_kernel(function: Any) -> Callable[..., Kernel]:
    def kernel_of(outs: Outs, x: TensorSpec, dim: int | None, _keepdim: bool) -> Kernel:
        axis = None if dim is None or x.rank == 0 else dim_of(dim, x.rank)
        shape = outs[0].shape
        return lambda a: np.asarray(function(a, axis=axis), np.int64).reshape(shape)

    return kernel_of


for _name, _function in (("argmax", np.argmax), ("argmin", np.argmin)):
    # NumPy copies the operand when the axis is not the last one in memory.
    register(f"{_name}(Tensor self, int? dim=None, bool keepdim=False)", infer=_infer_arg,
             kernel=_arg_kernel(_function), flops=_reads(1), scratch=_norm_scratch)  # fmt: skip
