"""softmax and log_softmax over one dimension, shifted by the maximum so that nothing overflows."""

from __future__ import annotations

from typing import Any

import numpy as np

from sordino_common.plan.ops.base import Kernel, Outs, register
from sordino_common.plan.ops.rules import dim_of, need_float
from sordino_common.plan.spec import TensorSpec


def _infer(x: TensorSpec, dim: int) -> Outs:
    need_float(x)
    dim_of(dim, x.rank)
    return (x,)


def _kernel(x: TensorSpec, dim: int, *, log: bool) -> Kernel:
    axis = dim_of(dim, x.rank)
    if x.numel == 0:
        return lambda a: np.empty(a.shape, a.dtype)
    if x.rank == 0:  # one class: certain
        return lambda a: np.asarray(a - a) if log else np.asarray(np.exp(a - a))

    def softmax(a: Any) -> Any:
        out = np.subtract(a, np.maximum.reduce(a, axis=axis, keepdims=True))
        np.exp(out, out=out)
        out /= np.add.reduce(out, axis=axis, keepdims=True)
        return out

    def log_softmax(a: Any) -> Any:
        out = np.subtract(a, np.maximum.reduce(a, axis=axis, keepdims=True))
        out -= np.log(np.add.reduce(np.exp(out), axis=axis, keepdims=True))
        return out

    return log_softmax if log else softmax


register(
    "softmax(Tensor self, int dim)",
    infer=_infer,
    kernel=lambda _outs, x, dim: _kernel(x, dim, log=False),
    flops=lambda _outs, x, _dim: 14 * x.numel,
    scratch=lambda _outs, x, _dim: x.nbytes,
)
register(
    "log_softmax(Tensor self, int dim)",
    infer=_infer,
    kernel=lambda _outs, x, dim: _kernel(x, dim, log=True),
    flops=lambda _outs, x, _dim: 14 * x.numel,
    scratch=lambda _outs, x, _dim: 2 * x.nbytes,
)
