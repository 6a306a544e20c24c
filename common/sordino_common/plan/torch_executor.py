"""`TorchProgram`: the same Plan through torch, on the CPU or a GPU. The only module of common that imports torch.

Every op of the table has its line here; what is not in this table can't be called, whatever a Plan says.
Indices are checked before torch sees them: on a GPU an index out of range would end the process's CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from sordino_common.errors import LimitExceeded, PlanError
from sordino_common.plan.analysis import PlanCost
from sordino_common.plan.arrays import NdArray, to_numpy
from sordino_common.plan.interpreter import UNBOUNDED, check_inputs
from sordino_common.plan.ops import resolve
from sordino_common.plan.ops.elementwise import result_dtype_of_choice
from sordino_common.plan.ops.rules import dims_of, float_of, result_dtype
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.validation import validate_plan
from sordino_common.plan.values import Arg, Plan, Ref, refs

_Call: TypeAlias = Callable[..., Any]

_DTYPES: Final = {
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_aten = torch.ops.aten


def _in_range(index: Any, low: int, high: int, what: str) -> None:
    if index.numel() and (int(index.min()) < low or int(index.max()) >= high):
        raise PlanError(f"{what}: an index is outside [{low}, {high})")


def _pow(x: Any, y: Any) -> Any:
    """The overload that eager torch takes: for a scalar exponent it has short cuts (0.5 is the square root)."""
    if not isinstance(x, torch.Tensor):
        return _aten.pow.Scalar(x, y)
    return (_aten.pow.Tensor_Tensor if isinstance(y, torch.Tensor) else _aten.pow.Tensor_Scalar)(x, y)


def _gather(x: Any, dim: int, index: Any) -> Any:
    _in_range(index, 0, x.shape[dim] if x.dim() else 1, "gather")
    return _aten.gather.default(x, dim, index)


def _scatter(x: Any, dim: int, index: Any, src: Any) -> Any:
    _in_range(index, 0, x.shape[dim] if x.dim() else 1, "scatter")
    return (_aten.scatter.src if isinstance(src, torch.Tensor) else _aten.scatter.value)(x, dim, index, src)


def _scatter_add(x: Any, dim: int, index: Any, src: Any) -> Any:
    _in_range(index, 0, x.shape[dim] if x.dim() else 1, "scatter_add")
    return _aten.scatter_add.default(x, dim, index, src)


def _check_indices(x: Any, indices: list[Any], what: str) -> None:
    for size, index in zip(x.shape, indices, strict=False):
        if index is not None:
            _in_range(index, -size, size, what)


def _index(x: Any, indices: list[Any]) -> Any:
    _check_indices(x, indices, "index")
    return _aten.index.Tensor(x, indices)


def _index_put(x: Any, indices: list[Any], values: Any, accumulate: bool) -> Any:
    _check_indices(x, indices, "index_put")
    return _aten.index_put.default(x, indices, values, accumulate)


def _embedding(weight: Any, indices: Any) -> Any:
    _in_range(indices, 0, weight.shape[0], "embedding")
    return _aten.embedding.default(weight, indices)


def _max_pool_backward(grad: Any, x: Any, *rest: Any) -> Any:
    _in_range(rest[-1], 0, x.shape[-2] * x.shape[-1], "max_pool2d_with_indices_backward")
    return _aten.max_pool2d_with_indices_backward.default(grad, x, *rest)


def _convolution_backward(*args: Any) -> Any:
    kept = [
        result for result, wanted in zip(_aten.convolution_backward.default(*args), args[-1], strict=True) if wanted
    ]
    return kept[0] if len(kept) == 1 else tuple(kept)


def _all_dims(function: _Call) -> _Call:
    """An empty list of dimensions means all of them; written out, since torch's ops differ on the empty list."""
    return lambda x, dims, keepdim: function(x, list(dims_of(tuple(dims), x.dim())), keepdim)


def _var(x: Any, dims: Any, correction: Any, keepdim: bool) -> Any:
    return torch.var(x, list(dims_of(tuple(dims), x.dim())), correction=correction, keepdim=keepdim)


def _vector_norm(x: Any, order: Any, dims: Any, keepdim: bool) -> Any:
    return _aten.linalg_vector_norm.default(x, order, list(dims_of(tuple(dims), x.dim())), keepdim)


def _flip(x: Any, dims: Any) -> Any:
    return _aten.flip.default(x, dims) if x.dim() else x.clone()


# op -> function of the node's arguments, with tensors for values. `full`, `arange` and `to` need the device or a dtype
# and are made in `TorchProgram`.
_TABLE: Final[dict[str, _Call]] = {
    # elementwise
    "add": lambda x, y, alpha: _aten.add.Tensor(x, y, alpha=alpha),
    "sub": lambda x, y, alpha: _aten.sub.Tensor(x, y, alpha=alpha),
    "mul": _aten.mul.Tensor,
    "div": _aten.div.Tensor,
    "pow": _pow,
    "maximum": _aten.maximum.default,
    "minimum": _aten.minimum.default,
    "eq": _aten.eq.Tensor,
    "ne": _aten.ne.Tensor,
    "lt": _aten.lt.Tensor,
    "le": _aten.le.Tensor,
    "gt": _aten.gt.Tensor,
    "ge": _aten.ge.Tensor,
    "logical_and": _aten.logical_and.default,
    "logical_or": _aten.logical_or.default,
    "bitwise_and": _aten.bitwise_and.Tensor,
    "bitwise_or": _aten.bitwise_or.Tensor,
    "bitwise_xor": _aten.bitwise_xor.Tensor,
    "where": _aten.where.self,
    "clamp": _aten.clamp.default,
    # unary
    "exp": _aten.exp.default,
    "expm1": _aten.expm1.default,
    "log": _aten.log.default,
    "log1p": _aten.log1p.default,
    "sqrt": _aten.sqrt.default,
    "reciprocal": _aten.reciprocal.default,
    "rsqrt": _aten.rsqrt.default,
    "sin": _aten.sin.default,
    "cos": _aten.cos.default,
    "tanh": _aten.tanh.default,
    "sigmoid": _aten.sigmoid.default,
    "erf": _aten.erf.default,
    "neg": _aten.neg.default,
    "abs": _aten.abs.default,
    "sign": _aten.sign.default,
    "floor": _aten.floor.default,
    "ceil": _aten.ceil.default,
    "round": _aten.round.default,
    "trunc": _aten.trunc.default,
    "relu": _aten.relu.default,
    "bitwise_not": _aten.bitwise_not.default,
    "logical_not": _aten.logical_not.default,
    "gelu": lambda x, approximate: _aten.gelu.default(x, approximate=approximate),
    "leaky_relu": _aten.leaky_relu.default,
    "elu": _aten.elu.default,
    "hardtanh": _aten.hardtanh.default,
    "clone": lambda x: x,
    # reductions
    "sum": _all_dims(_aten.sum.dim_IntList),
    "mean": _all_dims(_aten.mean.dim),
    "amax": _all_dims(_aten.amax.default),
    "amin": _all_dims(_aten.amin.default),
    "var": _var,
    "vector_norm": _vector_norm,
    "argmax": _aten.argmax.default,
    "argmin": _aten.argmin.default,
    # matmul
    "mm": _aten.mm.default,
    "bmm": _aten.bmm.default,
    "addmm": lambda bias, x, y, beta, alpha: _aten.addmm.default(bias, x, y, beta=beta, alpha=alpha),
    # shaping
    "view": _aten.reshape.default,
    "permute": _aten.permute.default,
    "expand": _aten.expand.default,
    "slice": _aten.slice.Tensor,
    "select": _aten.select.int,
    "cat": _aten.cat.default,
    "pad": _aten.constant_pad_nd.default,
    "flip": _flip,
    "repeat": _aten.repeat.default,
    "slice_scatter": _aten.slice_scatter.default,
    "select_scatter": _aten.select_scatter.default,
    # softmax
    "softmax": lambda x, dim: _aten._softmax.default(x, dim, False),
    "log_softmax": lambda x, dim: _aten._log_softmax.default(x, dim, False),
    # indexing
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter_add,
    "index": _index,
    "index_put": _index_put,
    "embedding": _embedding,
    # convolution, pooling
    "convolution": _aten.convolution.default,
    "convolution_backward": _convolution_backward,
    "max_pool2d_with_indices": _aten.max_pool2d_with_indices.default,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "avg_pool2d": _aten.avg_pool2d.default,
    "avg_pool2d_backward": _aten.avg_pool2d_backward.default,
    "adaptive_avg_pool2d": _aten._adaptive_avg_pool2d.default,
    "adaptive_avg_pool2d_backward": _aten._adaptive_avg_pool2d_backward.default,
}

_COMPARISONS: Final = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or"})
_NUMERIC: Final = frozenset(
    {"add", "sub", "mul", "div", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor", "where"}
)


class TorchProgram:
    """As `NumpyProgram`, by torch on `device`. Arrays come and go as ndarrays."""

    def __init__(self, plan: Plan, *, device: str = "cpu") -> None:
        self.plan: Final = plan
        self.cost: Final[PlanCost] = validate_plan(plan, UNBOUNDED)
        self._device = torch.device(device)
        self._inputs = [(entry.spec.shape, np.dtype(entry.spec.dtype)) for entry in plan.inputs]
        specs = plan.specs()
        self._template: list[Any] = [None] * len(specs)
        for number, constant in enumerate(plan.constants, start=len(plan.inputs)):
            self._template[number] = self._tensor(to_numpy(constant))
        self._steps = []
        first = plan.first_node_value()
        for node, dead in zip(plan.nodes, self.cost.dead_after, strict=True):
            call = self._call(node.op, node.outs, resolve(node.args, specs))
            args = self._operands(node.op, node.args, specs)
            self._steps.append((call, args, first, len(node.outs), dead))
            first += len(node.outs)

    @torch.no_grad()
    def run(
        self,
        inputs: Sequence[NdArray],
        *,
        check: Callable[[], None] | None = None,
        own: bool = True,
        quiet: bool = False,
    ) -> list[NdArray]:
        """See `NumpyProgram.run`. torch has no such warnings: `quiet` says nothing."""
        check_inputs(self.plan, self._inputs, inputs)
        values = self._template.copy()
        values[: len(inputs)] = [self._tensor(array) for array in inputs]
        index = -1
        try:
            for index, (call, args, first, count, dead) in enumerate(self._steps):  # noqa: B007  for the handlers
                if check is not None:
                    check()
                results = call(*[_fill(arg, values) for arg in args])
                values[first : first + count] = [results] if count == 1 else results
                for number in dead:
                    values[number] = None
        except PlanError as error:
            raise PlanError(f"node {index}: {error}") from None
        except (MemoryError, torch.OutOfMemoryError):
            raise LimitExceeded(f"node {index} ({self.plan.nodes[index].op}): no memory left") from None
        return [
            _array(values[entry.value], copy and own)
            for entry, copy in zip(self.plan.outputs, self.cost.copied, strict=True)
        ]

    def _tensor(self, array: NdArray) -> Any:
        # torch warns of read-only memory, since it could not keep itself from writing; we never write to a value.
        own = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
        return torch.from_numpy(own).to(self._device)

    def _call(self, op: str, outs: tuple[TensorSpec, ...], args: tuple[Any, ...]) -> _Call:
        if op == "to":
            dtype = _DTYPES[outs[0].dtype]
            return lambda x, _dtype: x.to(dtype, copy=True)
        if op == "full":
            size, value, name = args
            filled = torch.full((), value, dtype=_DTYPES[name], device=self._device).expand(size)
            return lambda *_: filled
        if op == "arange":
            start, end, step, name = args
            return lambda *_: torch.arange(start, end, step, dtype=_DTYPES[name], device=self._device)
        return _TABLE[op]

    def _operands(self, op: str, given: tuple[Arg, ...], specs: Sequence[TensorSpec]) -> tuple[Any, ...]:
        """The arguments as torch takes them: lists for tuples, and scalar operands as tensors of the op's dtype."""
        args: tuple[Any, ...] = given
        if op in _COMPARISONS or op in _NUMERIC:
            pair = args[1:3] if op == "where" else args[:2]
            x, y = resolve(pair, specs)
            dtype = result_dtype_of_choice(x, y) if op == "where" else result_dtype(x, y)
            if op == "div":
                dtype = float_of(dtype)
            made = [arg if isinstance(arg, Ref) else torch.tensor(arg, dtype=_DTYPES[dtype]) for arg in pair]
            args = (args[0], *made) if op == "where" else (*made, *args[2:])
        return tuple(
            _Template(arg) if isinstance(arg, tuple) and next(refs(arg), None) is not None else _plain(arg)
            for arg in args
        )


class _Template:
    """A list argument that holds references."""

    __slots__ = ("items",)

    def __init__(self, items: tuple[Arg, ...]) -> None:
        self.items = items


def _plain(arg: Any) -> Any:
    return list(arg) if isinstance(arg, tuple) else arg


def _fill(arg: Any, values: list[Any]) -> Any:
    if isinstance(arg, Ref):
        return values[arg.value]
    if isinstance(arg, _Template):
        return [_fill(item, values) for item in arg.items]
    return arg


def _array(tensor: Any, copy: bool) -> NdArray:
    array: NdArray = tensor.contiguous().cpu().numpy()
    return array.copy() if copy or not array.flags.writeable else array
