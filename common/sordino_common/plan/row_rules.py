"""How each op of the table moves rows: given where the rows of its operands lie, where they lie in its results.

A value that depends on the batch carries `Rows(dim, inner)`: the element with index i in dimension `dim` depends on
row (i // inner) mod B of the batch and on no other, whatever its other indices. So `inner` neighbours belong to one
row, and then the next row's come (B rows, as often as the dimension is long): what a view makes of [B, O, ...] as
[B·O, ...], which is how B images become the groups of one convolution. In terms of the elements in memory order, a row
is a digit of an element's number, and a view changes no element's number.

A rule is called only if some operand has rows, only for B >= 2 (so a dimension with rows is never broadcast), and never
with an empty operand that has rows: an empty value depends on nothing. It raises `Mixes` where one element of a result
would depend on two rows, and where it can't tell. An op without a rule mixes. A rule speaks about dependence bit by
bit: the kernels compute an element of a result from the same operands by the same operations in the same order,
whatever stands elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from sordino_common.plan.ops.base import Outs
from sordino_common.plan.ops.rules import dim_of, dims_of
from sordino_common.plan.ops.shaping import slice_bounds
from sordino_common.plan.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Rows:
    """Index i of dimension `dim` belongs to row (i // inner) mod B."""

    dim: int
    inner: int = 1


Tag: TypeAlias = Rows | None  # None: depends on no row at all


@dataclass(frozen=True, slots=True)
class Value:
    """An operand of a rule."""

    spec: TensorSpec
    tag: Tag

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape


class Mixes(Exception):
    """One element of the result depends on several rows, for all that the rule knows. It never leaves the walk."""


# rule(B, results' specs, *arguments with each reference replaced by its Value) -> a tag per result
Rule: TypeAlias = Callable[..., tuple[Tag, ...]]


def values_in(args: Sequence[Any]) -> Iterator[Value]:
    """The operands among the arguments, left to right."""
    for arg in args:
        if isinstance(arg, Value):
            yield arg
        elif isinstance(arg, tuple):
            yield from values_in(arg)


def _common(tags: Sequence[Tag]) -> Rows:
    """The one place where the rows of several operands lie, each seen from the result. At least one has rows."""
    found = {tag for tag in tags if tag is not None}
    if len(found) != 1:
        raise Mixes("the rows of its operands don't lie in the same place")
    return found.pop()


def _moved(tag: Tag, by: int) -> Tag:
    return None if tag is None else Rows(tag.dim + by, tag.inner)


def _kept(tag: Rows, dims: Sequence[int], what: str) -> None:
    """Refuse an op that works along the dimension in which the rows lie."""
    if tag.dim in dims:
        raise Mixes(f"{what} dimension {tag.dim}, in which the rows lie")


def _rows_of(x: Value) -> Rows:
    assert x.tag is not None  # a rule of one operand is called only if that one has rows
    return x.tag


# --- elementwise -------------------------------------------------------------------------------------------------


def _elementwise(_rows: int, outs: Outs, *args: Any) -> tuple[Tag, ...]:
    """Operands broadcast from the right."""
    rank = outs[0].rank
    return (_common([_moved(value.tag, rank - value.spec.rank) for value in values_in(args)]),)


# --- reductions --------------------------------------------------------------------------------------------------


def _reduced(x: Value, dims: tuple[int, ...], keepdim: bool) -> Rows:
    tag = _rows_of(x)
    gone = dims_of(dims, x.spec.rank)
    _kept(tag, gone, "it reduces over")
    return Rows(tag.dim if keepdim else tag.dim - sum(d < tag.dim for d in gone), tag.inner)


def _reduce(_rows: int, _outs: Outs, x: Value, *rest: Any) -> tuple[Tag, ...]:
    """(x, dims, keepdim), with an argument of the op's own before or after `dims`."""
    (dims,) = (arg for arg in rest if isinstance(arg, tuple))
    return (_reduced(x, dims, rest[-1]),)


def _arg(_rows: int, _outs: Outs, x: Value, dim: int | None, keepdim: bool) -> tuple[Tag, ...]:
    return (_reduced(x, () if dim is None else (dim,), keepdim),)


def _softmax(_rows: int, _outs: Outs, x: Value, dim: int) -> tuple[Tag, ...]:
    _kept(_rows_of(x), (dim_of(dim, x.spec.rank),), "it normalises over")
    return (x.tag,)


# --- matrix products ---------------------------------------------------------------------------------------------


def _product(x: Value, y: Value) -> Rows:
    """[..., n, k] @ [..., k, m]: rows may lie in the leading dimensions of both, in n of x, or in m of y."""
    last = x.spec.rank - 1
    for operand, inner in ((x, last), (y, last - 1)):
        if operand.tag is not None and operand.tag.dim == inner:
            raise Mixes(f"it sums over dimension {inner}, in which the rows lie")
    return _common([x.tag, y.tag])  # n of x against m of y are different dimensions, so they can't be taken for one


def _mm(_rows: int, _outs: Outs, x: Value, y: Value) -> tuple[Tag, ...]:
    return (_product(x, y),)


def _addmm(_rows: int, outs: Outs, bias: Value, x: Value, y: Value, *_scalars: Any) -> tuple[Tag, ...]:
    tags = [_moved(bias.tag, outs[0].rank - bias.spec.rank)]
    if x.tag is not None or y.tag is not None:
        tags.append(_product(x, y))
    return (_common(tags),)


# --- shapes ------------------------------------------------------------------------------------------------------


def _view(rows: int, _outs: Outs, x: Value, size: tuple[int, ...]) -> tuple[Tag, ...]:
    """The number of an element in memory order has the row as a digit: (number // stride) mod B. The result's rows lie
    in the dimension that holds this digit whole."""
    tag = _rows_of(x)
    stride = tag.inner * math.prod(x.shape[tag.dim + 1 :])
    step = 1  # elements from one index of dimension d to the next
    for d in reversed(range(len(size))):
        if stride % step == 0 and (step * size[d]) % (stride * rows) == 0:
            return (Rows(d, stride // step),)
        step *= size[d]
    raise Mixes(f"rows of {list(x.shape)} are cut or joined in {list(size)}")


def _permute(_rows: int, _outs: Outs, x: Value, dims: tuple[int, ...]) -> tuple[Tag, ...]:
    tag = _rows_of(x)
    return (Rows([dim_of(dim, x.spec.rank) for dim in dims].index(tag.dim), tag.inner),)


def _expand(_rows: int, _outs: Outs, x: Value, size: tuple[int, ...]) -> tuple[Tag, ...]:
    return (_moved(x.tag, len(size) - x.spec.rank),)


def _slice(_rows: int, _outs: Outs, x: Value, dim: int, start: Any, end: Any, step: int) -> tuple[Tag, ...]:
    tag, at = _rows_of(x), dim_of(dim, x.spec.rank)
    if at == tag.dim and (*slice_bounds(x.shape[at], start, end, step), step) != (0, x.shape[at], 1):
        raise Mixes(f"it takes a part of dimension {at}, in which the rows lie")
    return (tag,)


def _select(_rows: int, _outs: Outs, x: Value, dim: int, _index: int) -> tuple[Tag, ...]:
    tag, at = _rows_of(x), dim_of(dim, x.spec.rank)
    _kept(tag, (at,), "it takes one index of")
    return (_moved(tag, -1 if at < tag.dim else 0),)


def _cat(_rows: int, _outs: Outs, tensors: tuple[Value, ...], dim: int) -> tuple[Tag, ...]:
    tag = _common([x.tag for x in tensors])
    _kept(tag, (dim_of(dim, tensors[0].spec.rank),), "it joins tensors along")
    return (tag,)


def _pad(_rows: int, _outs: Outs, x: Value, pad: tuple[int, ...], _value: Any) -> tuple[Tag, ...]:
    tag = _rows_of(x)
    padded = [x.spec.rank - 1 - pair for pair in range(len(pad) // 2) if pad[2 * pair] or pad[2 * pair + 1]]
    _kept(tag, padded, "it pads")
    return (tag,)


def _flip(_rows: int, _outs: Outs, x: Value, dims: tuple[int, ...]) -> tuple[Tag, ...]:
    _kept(_rows_of(x), dims_of(dims, x.spec.rank) if dims else (), "it turns round")
    return (x.tag,)


def _repeat(_rows: int, _outs: Outs, x: Value, repeats: tuple[int, ...]) -> tuple[Tag, ...]:
    """Repeated along the rows' own dimension they come round again: the same index modulo B."""
    return (_moved(x.tag, len(repeats) - x.spec.rank),)


def _slice_scatter(_rows: int, _outs: Outs, x: Value, src: Value, dim: int, *_: Any) -> tuple[Tag, ...]:
    tag = _common([x.tag, src.tag])
    _kept(tag, (dim_of(dim, x.spec.rank),), "it writes into a part of")
    return (tag,)


def _select_scatter(_rows: int, _outs: Outs, x: Value, src: Value, dim: int, _index: int) -> tuple[Tag, ...]:
    at = dim_of(dim, x.spec.rank)
    tag = _common([x.tag, _moved(src.tag, 1 if src.tag is not None and src.tag.dim >= at else 0)])
    _kept(tag, (at,), "it writes into one index of")
    return (tag,)


# --- indices -----------------------------------------------------------------------------------------------------


def _along(tag: Rows, dim: int, operands: Sequence[Value]) -> None:
    """Rows must not lie in the dimension that is indexed, and be of one length in all operands."""
    _kept(tag, (dim,), "it picks by index along")
    if len({operand.shape[tag.dim] for operand in operands}) != 1:
        raise Mixes(f"its operands differ in the length of dimension {tag.dim}, in which the rows lie")


def _gather(_rows: int, _outs: Outs, x: Value, dim: int, index: Value) -> tuple[Tag, ...]:
    """out[.., i, ..] = x[.., index[.., i, ..], ..]"""
    tag = _common([x.tag, index.tag])
    if x.tag is not None:
        _along(tag, dim_of(dim, x.spec.rank), (x, index))
    return (tag,)


def _scatter(_rows: int, _outs: Outs, x: Value, dim: int, index: Value, src: Any) -> tuple[Tag, ...]:
    """out[.., index[.., i, ..], ..] = or += src[.., i, ..]"""
    operands = tuple(values_in((x, index, src)))
    tag = _common([operand.tag for operand in operands])
    _along(tag, dim_of(dim, x.spec.rank), operands)
    return (tag,)


def _index(_rows: int, outs: Outs, x: Value, indices: tuple[Value | None, ...]) -> tuple[Tag, ...]:
    """x[i, j, :, ...]: rows of x in a dimension that is not indexed, or rows of the indices in a table without any."""
    places = [place for place, index in enumerate(indices) if index is not None]
    front = places[0] if places[-1] - places[0] + 1 == len(places) else 0
    given = [index for index in indices if index is not None]
    wide = max(index.spec.rank for index in given)  # dimensions that stand in the place of the indexed ones
    tag = x.tag
    if tag is None:
        return (_moved(_common([_moved(index.tag, wide - index.spec.rank) for index in given]), front),)
    _kept(tag, places, "it picks by index along")
    if any(index.tag is not None for index in given):
        raise Mixes("both the table and the indices have rows")
    before = sum(d not in places for d in range(tag.dim))
    return (Rows(before + (wide if before >= front else 0), tag.inner),)


def _embedding(_rows: int, _outs: Outs, weight: Value, indices: Value) -> tuple[Tag, ...]:
    if weight.tag is not None:
        raise Mixes("its table depends on rows")
    return (indices.tag,)


# --- convolution -------------------------------------------------------------------------------------------------
# Channels are cut into groups; the channels of one group must all be of one row. `per` is the number of groups that a
# row has side by side: group g belongs to row (g // per) mod B.


def _groups(tag: Rows, dim: int, channels: int) -> int:
    """`per`, for rows that lie among channels (dimension `dim`), `channels` to a group."""
    if tag.dim != dim:
        raise Mixes(f"its rows lie in dimension {tag.dim}, not in the channels ({dim})")
    if tag.inner % channels:
        raise Mixes("a group of channels has several rows")
    return tag.inner // channels


def _one_per(found: Sequence[int]) -> int:
    if len(set(found)) != 1:
        raise Mixes("the groups of its operands are not of the same rows")
    return found[0]


def _convolution(_rows: int, _outs: Outs, x: Value, weight: Value, bias: Value | None, *rest: Any) -> tuple[Tag, ...]:
    groups = rest[-1]
    kernels = [operand for operand in (weight, bias) if operand is not None and operand.tag is not None]
    if x.tag is not None and x.tag.dim == 0:
        if kernels:
            raise Mixes("images and kernels both have rows, and not as groups")
        return (x.tag,)
    outputs = weight.shape[0] // groups
    per = [] if x.tag is None else [_groups(x.tag, 1, weight.shape[1])]
    for kernel in kernels:
        assert kernel.tag is not None
        per.append(_groups(kernel.tag, 0, outputs))
    return (Rows(1, outputs * _one_per(per)),)


def _convolution_backward(
    _rows: int, _outs: Outs, grad: Value, x: Value, weight: Value, _bias: Any, *rest: Any
) -> tuple[Tag, ...]:
    """The input's gradient is of grad and weight; the weight's of grad and x, the bias's of grad, over all images."""
    *_, groups, mask = rest
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    tags: list[Tag] = []
    if mask[0]:
        tags.append(_grad_input(grad, weight, inputs, outputs))
    if mask[1]:
        tags.append(_grad_kernel([(grad, outputs), (x, inputs)], outputs))
    if mask[2]:
        tags.append(_grad_kernel([(grad, outputs)], outputs))
    return tuple(tags)


def _grad_input(grad: Value, weight: Value, inputs: int, outputs: int) -> Tag:
    if grad.tag is not None and grad.tag.dim == 0:
        if weight.tag is not None:
            raise Mixes("images and kernels both have rows, and not as groups")
        return grad.tag
    per = [] if grad.tag is None else [_groups(grad.tag, 1, outputs)]
    if weight.tag is not None:
        per.append(_groups(weight.tag, 0, outputs))
    return Rows(1, inputs * _one_per(per)) if per else None


def _grad_kernel(operands: Sequence[tuple[Value, int]], outputs: int) -> Tag:
    per = []
    for operand, channels in operands:
        if operand.tag is not None and operand.tag.dim == 0:
            raise Mixes("it sums over the images, in which the rows lie")
        if operand.tag is not None:
            per.append(_groups(operand.tag, 1, channels))
    return Rows(0, outputs * _one_per(per)) if per else None


# --- pooling -----------------------------------------------------------------------------------------------------


def _pool(_rows: int, _outs: Outs, *args: Any) -> tuple[Tag, ...]:
    """Planes [H, W] are pooled one by one; all operands are of one rank."""
    operands = tuple(values_in(args))
    tag = _common([operand.tag for operand in operands])
    rank = operands[0].spec.rank
    _kept(tag, (rank - 2, rank - 1), "it pools over")
    return (tag,)


def _max_pool(rows: int, outs: Outs, x: Value, *_geometry: Any) -> tuple[Tag, ...]:
    return _pool(rows, outs, x) * 2


# --- the table ---------------------------------------------------------------------------------------------------

ELEMENTWISE: Final = (
    *("add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"),
    *("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"),
    *("where", "clamp", "to", "clone", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos"),
    *("tanh", "sigmoid", "erf", "neg", "abs", "sign", "floor", "ceil", "round", "trunc"),
    *("relu", "gelu", "leaky_relu", "elu", "hardtanh"),
)

# `full` and `arange` have no operand. `index_put` has no rule.
RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        **dict.fromkeys(ELEMENTWISE, _elementwise),
        **dict.fromkeys(("sum", "mean", "amax", "amin", "var", "vector_norm"), _reduce),
        **dict.fromkeys(("argmax", "argmin"), _arg),
        **dict.fromkeys(("softmax", "log_softmax"), _softmax),
        **dict.fromkeys(("mm", "bmm"), _mm),
        **dict.fromkeys(("scatter", "scatter_add"), _scatter),
        **dict.fromkeys(
            (
                "max_pool2d_with_indices_backward",
                "avg_pool2d",
                "avg_pool2d_backward",
                "adaptive_avg_pool2d",
                "adaptive_avg_pool2d_backward",
            ),
            _pool,
        ),
        "max_pool2d_with_indices": _max_pool,
        "addmm": _addmm,
        "view": _view,
        "permute": _permute,
        "expand": _expand,
        "slice": _slice,
        "select": _select,
        "cat": _cat,
        "pad": _pad,
        "flip": _flip,
        "repeat": _repeat,
        "slice_scatter": _slice_scatter,
        "select_scatter": _select_scatter,
        "gather": _gather,
        "index": _index,
        "embedding": _embedding,
        "convolution": _convolution,
        "convolution_backward": _convolution_backward,
    }
)
