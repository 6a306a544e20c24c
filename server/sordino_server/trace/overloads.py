"""The explicit table: aten overload -> op of a Plan, and where each of the op's arguments comes from.

An argument is the name of an aten argument, `Fixed(value)`, or one of the markers below. Overloads that need more than
a rearrangement of arguments (arithmetic, shapes, casts) are in `lowering`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sordino_common.plan.values import Arg


@dataclass(frozen=True, slots=True)
class Fixed:
    """An argument that is the same in every call."""

    value: Arg


@dataclass(frozen=True, slots=True)
class Require:
    """Not an argument: the aten argument `name` must have this value, since the op has no such option."""

    name: str
    value: object


@dataclass(frozen=True, slots=True)
class Dims:
    """The dimensions in the aten argument `name`; none given means all, which the table writes as an empty list."""

    name: str


Source = str | Fixed | Require | Dims
_POOL: Final = ("kernel_size", "stride", "padding")
_CONV: Final = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
_UNARY: Final = (
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "erf",
    "neg",
    "abs",
    "sign",
    "floor",
    "ceil",
    "round",
    "trunc",
    "relu",
    "bitwise_not",
    "logical_not",
)


def _table() -> dict[str, tuple[str, tuple[Source, ...]]]:
    table: dict[str, tuple[str, tuple[Source, ...]]] = {
        "mm.default": ("mm", ("self", "mat2")),
        "bmm.default": ("bmm", ("self", "mat2")),
        "addmm.default": ("addmm", ("self", "mat1", "mat2", "beta", "alpha")),
        "mean.default": ("mean", ("self", Fixed(()), Fixed(False), Require("dtype", None))),
        "mean.dim": ("mean", ("self", Dims("dim"), "keepdim", Require("dtype", None))),
        "amax.default": ("amax", ("self", "dim", "keepdim")),
        "amin.default": ("amin", ("self", "dim", "keepdim")),
        "argmax.default": ("argmax", ("self", "dim", "keepdim")),
        "argmin.default": ("argmin", ("self", "dim", "keepdim")),
        "linalg_vector_norm.default": ("vector_norm", ("self", "ord", Dims("dim"), "keepdim", Require("dtype", None))),
        "_softmax.default": ("softmax", ("self", "dim", Require("half_to_float", False))),
        "_log_softmax.default": ("log_softmax", ("self", "dim", Require("half_to_float", False))),
        "clamp.default": ("clamp", ("self", "min", "max")),
        "clamp_min.default": ("clamp", ("self", "min", Fixed(None))),
        "clamp_max.default": ("clamp", ("self", Fixed(None), "max")),
        "gelu.default": ("gelu", ("self", "approximate")),
        "leaky_relu.default": ("leaky_relu", ("self", "negative_slope")),
        "elu.default": ("elu", ("self", "alpha", "scale", "input_scale")),
        "hardtanh.default": ("hardtanh", ("self", "min_val", "max_val")),
        "slice.Tensor": ("slice", ("self", "dim", "start", "end", "step")),
        "select.int": ("select", ("self", "dim", "index")),
        "slice_scatter.default": ("slice_scatter", ("self", "src", "dim", "start", "end", "step")),
        "select_scatter.default": ("select_scatter", ("self", "src", "dim", "index")),
        "cat.default": ("cat", ("tensors", "dim")),
        "constant_pad_nd.default": ("pad", ("self", "pad", "value")),
        "flip.default": ("flip", ("self", "dims")),
        "repeat.default": ("repeat", ("self", "repeats")),
        "gather.default": ("gather", ("self", "dim", "index", Require("sparse_grad", False))),
        "scatter.src": ("scatter", ("self", "dim", "index", "src")),
        "scatter.value": ("scatter", ("self", "dim", "index", "value")),
        "scatter_add.default": ("scatter_add", ("self", "dim", "index", "src")),
        "index.Tensor": ("index", ("self", "indices")),
        "index_put.default": ("index_put", ("self", "indices", "values", "accumulate")),
        "embedding.default": ("embedding", ("weight", "indices", Require("scale_grad_by_freq", False))),
        "convolution.default": ("convolution", ("input", "weight", "bias", *_CONV)),
        "convolution_backward.default": (
            "convolution_backward",
            ("grad_output", "input", "weight", "bias_sizes", *_CONV, "output_mask"),
        ),
        "max_pool2d_with_indices.default": ("max_pool2d_with_indices", ("self", *_POOL, "dilation", "ceil_mode")),
        "max_pool2d_with_indices_backward.default": (
            "max_pool2d_with_indices_backward",
            ("grad_output", "self", *_POOL, "dilation", "ceil_mode", "indices"),
        ),
        "avg_pool2d.default": ("avg_pool2d", ("self", *_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
        "avg_pool2d_backward.default": (
            "avg_pool2d_backward",
            ("grad_output", "self", *_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
        ),
        "_adaptive_avg_pool2d.default": ("adaptive_avg_pool2d", ("self", "output_size")),
        "_adaptive_avg_pool2d_backward.default": ("adaptive_avg_pool2d_backward", ("grad_output", "self")),
    }
    table |= {f"{name}.default": (name, ("self",)) for name in _UNARY}
    return table


OVERLOADS: Final = _table()

# Elementwise ops of two operands, each a tensor or a scalar: overload -> op and the names of the operands.
_BOTH: Final = ("self", "other")
OPERATORS: Final[dict[str, tuple[str, tuple[str, str]]]] = {
    **{f"{op}.{kind}": (op, _BOTH) for op in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    **{f"{op}.{kind}": (op, _BOTH) for op in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")},
    **{
        f"bitwise_{op}.{kind}": (f"bitwise_{op}", _BOTH) for op in ("and", "or", "xor") for kind in ("Tensor", "Scalar")
    },
    **{f"{op}.default": (op, _BOTH) for op in ("maximum", "minimum", "logical_and", "logical_or")},
    "pow.Tensor_Scalar": ("pow", ("self", "exponent")),
    "pow.Tensor_Tensor": ("pow", ("self", "exponent")),
    "pow.Scalar": ("pow", ("self", "exponent")),
}

# What only makes a tensor of known values: folded, whatever the tensor it takes its shape from.
CREATORS: Final[dict[str, float | None]] = {
    # overload -> the value it fills with, None if the call says so
    "full_like.default": None,
    "new_full.default": None,
    "zeros_like.default": 0.0,
    "ones_like.default": 1.0,
    "new_zeros.default": 0.0,
    "new_ones.default": 1.0,
    # Memory that nobody reads (a dummy weight whose shape alone counts): zeros, so that a Plan is deterministic.
    "empty_like.default": 0.0,
    "new_empty.default": 0.0,
    "empty.memory_format": 0.0,
    "empty_strided.default": 0.0,
    "new_empty_strided.default": 0.0,
}

# Reshapes, whose result's shape says everything.
VIEWS: Final = frozenset(
    {
        "view.default",
        "_unsafe_view.default",
        "reshape.default",
        "unsqueeze.default",
        "squeeze.default",
        "squeeze.dim",
        "squeeze.dims",
    }
)

# The same values under another name: values are never written to, so no copy is needed.
SAME: Final = frozenset(
    {
        "alias.default",
        "detach.default",
        "clone.default",
        "lift_fresh.default",
        "lift_fresh_copy.default",
        "contiguous.default",
    }
)
