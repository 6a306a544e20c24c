"""Matrix products: mm, addmm, bmm. BLAS takes transposed operands as they are; anything stranger is copied first."""

from __future__ import annotations

from typing import Any

import numpy as np

from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.rules import broadcast, check_scalar, need, scalar_of
from sordino_common.plan.spec import TensorSpec


def product(x: Any, y: Any) -> Any:
    """x @ y. np.matmul falls back to a plain loop, without BLAS, for operands whose inner strides are neither
    of (k, item) and (item, k): an expanded or sliced one is made contiguous instead. An outer product (the gradient
    of a linear layer for one example) is an elementwise one."""
    if x.shape[-1] == 1:
        return np.multiply(x, y)
    if x.strides[-1] != x.itemsize and x.strides[-2] != x.itemsize:
        x = np.ascontiguousarray(x)
    if y.strides[-1] != y.itemsize and y.strides[-2] != y.itemsize:
        y = np.ascontiguousarray(y)
    return np.matmul(x, y)


def _infer_product(rank: int, x: TensorSpec, y: TensorSpec) -> Outs:
    need(x.rank == y.rank == rank, f"takes two tensors of rank {rank}")
    need(x.dtype == y.dtype != "bool", "takes one dtype, and not bool")
    need(x.shape[-1] == y.shape[-2] and x.shape[:-2] == y.shape[:-2], "the inner (or batch) dimensions differ")
    return (TensorSpec(x.dtype, (*x.shape[:-1], y.shape[-1])),)


def _infer_addmm(bias: TensorSpec, x: TensorSpec, y: TensorSpec, beta: Any, alpha: Any) -> Outs:
    (out,) = _infer_product(2, x, y)
    need(bias.dtype == out.dtype, "takes one dtype")
    need(bias.rank <= 2 and broadcast(bias.shape, out.shape) == out.shape, "the bias does not broadcast to the product")
    check_scalar(beta, out.dtype)
    check_scalar(alpha, out.dtype)
    return (out,)


def _addmm_kernel(outs: Outs, _bias: TensorSpec, _x: TensorSpec, _y: TensorSpec, beta: Any, alpha: Any) -> Kernel:
    """beta·bias + alpha·(x @ y); with beta = 0 the bias does not count, not even its NaN."""
    factor, share = scalar_of(alpha, outs[0].dtype), scalar_of(beta, outs[0].dtype)

    def plain(bias: Any, x: Any, y: Any) -> Any:
        out = product(x, y)
        out += bias
        return out

    def scaled(bias: Any, x: Any, y: Any) -> Any:
        out = product(x, y)
        out *= factor
        if beta != 0:
            out += bias * share
        return out

    return plain if alpha == 1 and beta == 1 else scaled


def _work(outs: Outs, *args: Any) -> int:
    """Two operations per product."""
    x: TensorSpec = args[0] if len(args) == 2 else args[1]
    return 2 * outs[0].numel * x.shape[-1] + outs[0].numel


def _copies(_outs: Outs, *args: Any) -> int:
    return sum(arg.nbytes for arg in args if isinstance(arg, TensorSpec))


register("mm(Tensor self, Tensor mat2)", infer=lambda x, y: _infer_product(2, x, y), kernel=lambda *_: product,
         flops=_work, scratch=_copies)  # fmt: skip
register("bmm(Tensor self, Tensor mat2)", infer=lambda x, y: _infer_product(3, x, y), kernel=lambda *_: product,
         flops=_work, scratch=_copies)  # fmt: skip
register("addmm(Tensor self, Tensor mat1, Tensor mat2, Scalar beta=1, Scalar alpha=1)", infer=_infer_addmm,
         kernel=_addmm_kernel, flops=_work, scratch=_copies)  # fmt: skip
