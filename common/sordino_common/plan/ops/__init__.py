"""The closed op table. `OPS[name]` has the schema (argument list), shape rule, kernel and costs of each op.

Names are aten's, overloads folded in. Where aten has many ops for one thing, the table has one:

    view                     view, reshape, squeeze, unsqueeze, flatten: an explicit size, no -1
    permute                  permute, t, transpose
    expand                   explicit size, no -1
    to, clone                _to_copy / casts; copies and aliases
    full                     full, full_like, scalar_tensor, zeros, ones, empty: explicit size and dtype
    softmax, log_softmax     _softmax, _log_softmax without half_to_float
    sum, mean, amax, var     dims [] means all; `sum` of bool and integers is int64
    vector_norm              linalg_vector_norm: (self, ord, dims, keepdim)
    add, sub, mul, div, ...  Tensor and Scalar overloads; either operand may be a scalar (1 - x is sub(1, x, 1))
    pad                      constant_pad_nd
    scatter                  scatter.src and scatter.value
    convolution_backward     results: only those of output_mask, in order

Every argument is given on the wire; `Param.default` is for builders.

    elementwise   add sub mul div pow maximum minimum eq ne lt le gt ge logical_and logical_or bitwise_and bitwise_or
                  bitwise_xor where clamp
    unary         exp expm1 log log1p sqrt reciprocal rsqrt sin cos tanh sigmoid erf neg abs sign floor ceil round trunc
                  relu bitwise_not logical_not gelu leaky_relu elu hardtanh to clone full arange
    reductions    sum mean amax amin var vector_norm argmax argmin
    matmul        mm bmm addmm
    shaping       view permute expand slice select cat pad flip repeat slice_scatter select_scatter
    softmax       softmax log_softmax
    indexing      gather scatter scatter_add index index_put embedding
    convolution   convolution convolution_backward
    pooling       max_pool2d_with_indices, avg_pool2d, adaptive_avg_pool2d, each with its _backward
"""

from sordino_common.plan.ops import (
    convolution,
    elementwise,
    indexing,
    matmul,
    pooling,
    reductions,
    shaping,
    softmax,
    unary,
)
from sordino_common.plan.ops.base import OPS, REQUIRED, Op, Param, infer_outs, op_named, resolve

__all__ = [
    "OPS",
    "REQUIRED",
    "Op",
    "Param",
    "convolution",
    "elementwise",
    "indexing",
    "infer_outs",
    "matmul",
    "op_named",
    "pooling",
    "reductions",
    "resolve",
    "shaping",
    "softmax",
    "unary",
]
