"""Ops that secrets can't go through yet, each with what would take its place. When one is built, its line goes and a
rule comes into its family's module (comparisons want one of their own)."""

from __future__ import annotations

from typing import Final

_COMPARE: Final = "needs a comparison of secrets"
_KNOWN: Final = f"{_COMPARE}; do it where the values are known: before they are shared, or on what opens"
_ITERATE: Final = "needs an iteration on secrets"
_POLYNOMIAL: Final = f"{_ITERATE}; write a polynomial in its place: sums, products and whole powers"
_SIGMOID: Final = "use a polynomial sigmoid (`spdz.activation` replaces torch.sigmoid and tanh by one)"

REFUSED: Final[dict[str, str]] = {
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"), _KNOWN),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"), _KNOWN),
    **dict.fromkeys(("relu", "leaky_relu", "elu", "hardtanh", "gelu"), f"{_COMPARE}; {_SIGMOID}"),
    "abs": f"{_COMPARE}; use the square",
    **dict.fromkeys(("maximum", "minimum", "clamp", "sign"), _KNOWN),
    **dict.fromkeys(("amax", "amin", "argmax", "argmin"), _KNOWN),
    **dict.fromkeys(("floor", "ceil", "round", "trunc"), _KNOWN),
    "max_pool2d_with_indices": f"{_COMPARE}; use average pooling",
    "max_pool2d_with_indices_backward": f"{_COMPARE}; use average pooling",
    **dict.fromkeys(("sigmoid", "tanh"), _SIGMOID),
    **dict.fromkeys(("softmax", "log_softmax"), f"{_ITERATE}; use loss mse on one-hot targets, or logistic"),
    **dict.fromkeys(("exp", "expm1", "log", "log1p", "erf", "sin", "cos"), _POLYNOMIAL),
    **dict.fromkeys(("sqrt", "rsqrt", "reciprocal", "vector_norm"), f"{_ITERATE} (Adam and norms need it; use sgd)"),
    "var": "is not offered yet; write it with means and squares",
    **dict.fromkeys(("scatter", "scatter_add", "index_put"), "writes at positions; not offered yet"),
}
