"""One rule per op, a family a module: what the op becomes on secret values.

elementwise   add sub neg mul div pow clone to
matmul        mm bmm addmm
reductions    sum mean
shaping       view permute expand slice select flip repeat pad gather index embedding cat slice_scatter select_scatter
convolution   convolution convolution_backward
pooling       avg_pool2d adaptive_avg_pool2d, each with its _backward
refused       ops that are named and refused
"""

from sordino_common.spdz.lowering.rules import convolution, elementwise, matmul, pooling, reductions, shaping
from sordino_common.spdz.lowering.rules.base import RULES, Array, Value, Walk, computed
from sordino_common.spdz.lowering.rules.refused import REFUSED

__all__ = [
    "REFUSED",
    "RULES",
    "Array",
    "Value",
    "Walk",
    "computed",
    "convolution",
    "elementwise",
    "matmul",
    "pooling",
    "reductions",
    "shaping",
]
