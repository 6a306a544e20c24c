"""What is known of an aten overload before it is recorded.

A step has no side effects. An op that writes into its first operand is recorded as the op that gives the new value; a
view is recorded as a way to read its base, with an inverse by which a write to the view becomes a write to the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

_ATEN: Final = torch.ops.aten

# Python numbers that may change from step to step (Adam's corrected step size): the arguments in which they stand, and
# that a tensor can take in their place. If they do change, they become inputs of the Plan (`compile`).
LIFTED: Final[dict[str, tuple[str, ...]]] = {
    "aten::add.Tensor": ("other", "alpha"),
    "aten::sub.Tensor": ("other", "alpha"),
    "aten::mul.Tensor": ("other",),
    "aten::div.Tensor": ("other",),
    "aten::addcmul": ("value",),
    "aten::addcdiv": ("value",),
}

# Every tensor is contiguous for whoever holds a pointer, so a view is always possible there.
_SPELT: Final = {
    _ATEN.view.default: _ATEN.reshape.default,
    _ATEN._unsafe_view.default: _ATEN.reshape.default,
    _ATEN._reshape_alias.default: _ATEN.reshape.default,
}

# For an op that no Plan has: what to write instead.
_INSTEAD: Final = {
    "nonzero": "torch.where with three arguments, or a product with a mask",
    "index": "torch.where with three arguments, or a product with a mask, if the index is a mask",
    "masked_select": "torch.where with three arguments, or a product with a mask",
    "unique": "a one-hot comparison with a fixed list of values",
    "_unique2": "a one-hot comparison with a fixed list of values",
    "sort": "amax, amin, argmax or argmin",
    "topk": "amax or argmax",
    "median": "mean, or amax and amin",
    "prod": "exp(log(x).sum()) for positive x",
    "cumsum": "a product with a triangular matrix of ones",
    "std": "var(...).sqrt()",
    "equal": "(a == b).all() kept as a tensor, or fetch both",
    "is_same_size": "a comparison of .shape",
    "as_strided": "slices and reshape",
    "rand_like": "torch.rand(x.shape) here, sent to the agent",
    "randn_like": "torch.randn(x.shape) here, sent to the agent",
    "bernoulli": "a mask drawn here and sent to the agent",
    "native_dropout": "model.eval(), or a mask drawn here and sent to the agent",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpInfo:
    """`op`: the overload to record. `names`: of its positional arguments. `writes`: the first operand gets the result.
    `view`: the result is a view of the first operand. `refusal`: why it can't be
    recorded, "" if it can. `lifted`: arguments whose number may change."""

    name: str
    op: Any
    names: tuple[str, ...]
    lifted: frozenset[str]
    writes: bool = False
    view: bool = False
    refusal: str = ""


def instead_of(name: str) -> str:
    """What to write instead of the op `aten::name.overload`, as the end of a sentence; "" if nothing is known."""
    plain = name.removeprefix("aten::").partition(".")[0]
    return f"; write {_INSTEAD[plain]}" if plain in _INSTEAD else ""


@cache
def info_of(func: Any) -> OpInfo:
    """What is known of the overload `func`."""
    schema: Any = func._schema
    plain = schema.name.removeprefix("aten::")
    names = tuple(argument.name for argument in schema.arguments)
    instead = instead_of(schema.name)

    def refused(why: str) -> OpInfo:
        return OpInfo(name=func.name(), op=func, names=names, lifted=frozenset(), refusal=why + instead)

    if torch.Tag.nondeterministic_seeded in func.tags:
        return refused("it is random, and a Plan gives the same result for the same input")
    if torch.Tag.dynamic_output_shape in func.tags and func is not _ATEN.index.Tensor:  # which may be static: see there
        return refused("the shape of its result depends on values")
    if torch.Tag.data_dependent_output in func.tags or any(
        str(result.type) not in ("Tensor", "List[Tensor]") for result in schema.returns
    ):
        return refused("its result is a Python value that depends on values")
    if func is _ATEN.as_strided.default:
        return refused("it reads memory that is not here")
    written = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    op: Any = func
    if written:
        if [argument.name for argument in written] != [schema.arguments[0].name]:
            return refused("it writes into an `out` tensor; use its result instead")
        packet = getattr(_ATEN, plain.removesuffix("_"), None)
        op = getattr(packet, func._overloadname, None) if packet is not None and plain.endswith("_") else None
        if op is None:
            return refused("it writes in place and has no form that gives a new tensor")
    op = _SPELT.get(op, op)
    return OpInfo(
        name=op.name(),
        op=op,
        names=names,
        lifted=frozenset(LIFTED.get(op.name(), ())),
        writes=bool(written),
        view=func.is_view,
    )


View = tuple[Any, tuple[Any, ...]]  # op, its arguments after the first


def unviewed(view: View, shape: tuple[int, ...]) -> Callable[[Any, Any, Callable[..., Any]], Any] | None:
    """How a write to the view becomes a write to what it views, of this shape: (base, new value of the view, apply) ->
    new base. None where there is no such way (the view shows an element twice, or is one of several)."""
    op, args = view
    rank = len(shape)
    if op is _ATEN.reshape.default or op in (_ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.default):
        return lambda _, new, apply: apply(_ATEN.reshape.default, new, shape)
    if op is _ATEN.t.default:
        return lambda _, new, apply: apply(_ATEN.t.default, new)
    if op is _ATEN.transpose.int:
        return lambda _, new, apply: apply(_ATEN.transpose.int, new, *args)
    if op is _ATEN.permute.default:
        order = [dim % rank for dim in args[0]]
        inverse = tuple(order.index(dim) for dim in range(rank))
        return lambda _, new, apply: apply(_ATEN.permute.default, new, inverse)
    if op is _ATEN.select.int:
        return lambda base, new, apply: apply(_ATEN.select_scatter.default, base, new, *args)
    if op is _ATEN.slice.Tensor:
        return lambda base, new, apply: apply(_ATEN.slice_scatter.default, base, new, *args)
    return None
