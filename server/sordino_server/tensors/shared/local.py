"""Fixed point in this process: `FixedPrecisionTensor` over a `LocalTensor` of int64, and its own table of operations.

    v stands as x = round(v 2^f)      + - neg sum views: on x as it is      products: (x y) >> f, towards -infinity

Every operation is exact in integers but for the bits that a product or a mean drops: at most 2^-f each. A result that
might leave 63 bits is refused instead of wrapping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sordino_common.errors import LocalError
from sordino_common.ring.fixed import FRACTION_BITS, decode_fixed, encode_fixed
from sordino_common.ring.matmul import matmul
from sordino_server.tensors.chain import ChainTensor, LocalTensor
from sordino_server.tensors.errors import UnsupportedOperation, WrongPlace
from sordino_server.tensors.lines import user_line
from sordino_server.tensors.ops import instead_of
from sordino_server.tensors.pointer import PointerTensor
from sordino_server.tensors.shared.links import FixedPrecisionTensor, SharedTensor

if TYPE_CHECKING:
    from sordino_common.spdz.lowering import Ranges
    from sordino_server.tensors.fleet import RemoteAgent

I64 = npt.NDArray[np.int64]
_ATEN: Final = torch.ops.aten
_MOST: Final = 2.0**62


class LocalFixed(FixedPrecisionTensor):
    """Fixed point over a `LocalTensor` of int64. `child.get()` shows the integers."""

    child: LocalTensor  # it stays what it was made with

    @staticmethod
    def __new__(cls, integers: Tensor, fraction_bits: int, dtype: torch.dtype = torch.float32) -> Any:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=dtype)

    def __init__(self, integers: Tensor, fraction_bits: int, dtype: torch.dtype = torch.float32) -> None:
        self.child = LocalTensor(integers)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.parent = None
        self._bits = fraction_bits

    @property
    def f(self) -> int:
        return self._bits

    @property
    def integers(self) -> I64:
        """x, int64."""
        found: I64 = self.child.get().numpy()
        return found

    def get(self) -> Tensor:
        """As `float_precision`."""
        return self.float_precision()

    def float_precision(self) -> Tensor:
        """v = x 2^-f, a plain tensor."""
        return torch.from_numpy(np.array(decode_fixed(self.integers, self.f))).to(self.dtype)

    def fix_precision(self, f: int = FRACTION_BITS) -> LocalFixed:
        """The same numbers with `f` fraction bits."""
        fixed: LocalFixed = fix_precision(self.float_precision(), f)
        return fixed

    def share(
        self, *agents: RemoteAgent, ranges: float | Ranges | None = None, security: str = "active"
    ) -> SharedTensor:
        """These very integers, masked here, on a committee of agents; see `PointerFleet.share`."""
        if not agents:
            raise WrongPlace("share: name the agents that are to keep the shares")
        return agents[0].fleet.share(self, *agents, ranges=ranges, security=security)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub describes another function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = _first(args)
        function = OPS.get(func)
        if function is None:
            known = ", ".join(sorted({op.__name__.partition(".")[0] for op in OPS}))
            raise UnsupportedOperation(
                f"{user_line()}: {func.name()} on {first.chain}: fixed point has {known}; go on in floats with "
                f".float_precision(){instead_of(func.name())}"
            )
        for entry in args:
            if isinstance(entry, ChainTensor) and not isinstance(entry, LocalFixed):
                raise WrongPlace(
                    f"{func.name()}: operands on different links ({first.chain}; {entry.chain}); share both, or none"
                )
            if isinstance(entry, LocalFixed) and entry.f != first.f:
                raise WrongPlace(
                    f"{func.name()}: {first.f} and {entry.f} fraction bits; bring them together with .fix_precision(f)"
                )
        return _made(first, function(first, args, kwargs or {}))


class PointerFixed(FixedPrecisionTensor):
    """Of a tensor on an agent: in what precision it is to be shared. It has no operations of its own."""

    child: PointerTensor  # it stays what it was made with

    @staticmethod
    def __new__(cls, pointer: PointerTensor, fraction_bits: int) -> Any:
        return Tensor._make_wrapper_subclass(cls, pointer.shape, dtype=pointer.dtype)

    def __init__(self, pointer: PointerTensor, fraction_bits: int) -> None:
        self.child = pointer  # pyright: ignore[reportIncompatibleVariableOverride]
        self.parent = None
        self._bits = fraction_bits

    @property
    def f(self) -> int:
        return self._bits

    def float_precision(self) -> PointerTensor:
        return self.child

    def share(
        self, *agents: RemoteAgent, ranges: float | Ranges | None = None, security: str = "active"
    ) -> SharedTensor:
        shared: SharedTensor = self.child.share(*agents, ranges=ranges, security=security, f=self.f)
        return shared

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub describes another function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise UnsupportedOperation(
            f"{user_line()}: {func.name()} on {_first(args).chain}: compute before fix_precision, where the data is, "
            f"or after .share(...), on shares"
        )


def fix_precision(tensor: Tensor, f: int = FRACTION_BITS) -> Any:
    """Fixed point with `f` fraction bits of a tensor that is here (a `LocalFixed`) or on an agent (a `PointerFixed`).

    Raises `WrongPlace` for what can't be: integers, NaN, too large, or on another link."""
    if not 4 <= f <= 24:
        raise WrongPlace(f"fix_precision: {f} fraction bits; 4 to 24 leave room for the numbers and for products")
    if isinstance(tensor, PointerTensor) and not isinstance(tensor, SharedTensor):
        return PointerFixed(tensor, f)
    if isinstance(tensor, LocalTensor):
        tensor = tensor.get()
    if isinstance(tensor, ChainTensor):
        raise WrongPlace(f"fix_precision: {tensor.chain} is fixed point already")
    if not tensor.dtype.is_floating_point:
        raise WrongPlace(f"fix_precision: {tensor.dtype} has no fraction; convert it with .float()")
    try:
        integers = encode_fixed(tensor.detach().cpu().double().numpy(), f)
    except LocalError as error:
        raise WrongPlace(f"fix_precision: {error}") from None
    dtype = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    return LocalFixed(torch.from_numpy(np.array(integers)), f, dtype)


# --- the table ---------------------------------------------------------------------------------------------------


def _first(args: Sequence[Any]) -> Any:
    for entry in args:
        for item in entry if isinstance(entry, list | tuple) else (entry,):
            if isinstance(item, FixedPrecisionTensor):
                return item
    raise LocalError("no fixed point among the operands")


def _made(first: LocalFixed, value: I64) -> LocalFixed:
    return LocalFixed(torch.from_numpy(np.array(value, dtype=np.int64)), first.f, first.dtype)


def _operand(first: LocalFixed, entry: Any) -> I64:
    """An operand as integers of the same scale. Plain tensors and numbers are encoded."""
    if isinstance(entry, LocalFixed):
        return entry.integers
    values = entry.detach().double().numpy() if isinstance(entry, Tensor) else np.asarray(float(entry))
    try:
        return encode_fixed(values, first.f)
    except LocalError as error:
        raise WrongPlace(str(error)) from None


def _largest(x: I64) -> float:
    return float(np.abs(x.astype(np.float64)).max()) if x.size else 0.0


def _within(what: str, bound: float) -> None:
    if bound >= _MOST:
        raise UnsupportedOperation(f"{what} in fixed point: a result may need more than 62 bits; scale the operands")


def _added(sign: int) -> Callable[..., I64]:
    def function(first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]) -> I64:
        alpha = kwargs.get("alpha", 1)
        if alpha != 1:
            raise UnsupportedOperation("add with alpha in fixed point; multiply first")
        x, y = (_operand(first, entry) for entry in args[:2])
        _within("a sum", _largest(x) + _largest(y))
        return np.asarray(np.add(x, sign * y))

    return function


def _rsub(first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]) -> I64:
    return _added(-1)(first, (args[1], args[0]), {"alpha": args[2] if len(args) > 2 else 1})


def _mul(first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]) -> I64:
    x, y = (_operand(first, entry) for entry in args[:2])
    _within("a product", _largest(x) * _largest(y))
    return np.right_shift(np.multiply(x, y), first.f)


def _matmul(first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]) -> I64:
    x, y = (_operand(first, entry) for entry in args[:2])
    _within("a matrix product", _largest(x) * _largest(y) * max(1, x.shape[-1]))
    return np.right_shift(matmul(x, y), first.f)


def _addmm(first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]) -> I64:
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        raise UnsupportedOperation("addmm with beta or alpha in fixed point; multiply first")
    return np.add(_operand(first, args[0]), _matmul(first, args[1:], {}))


def _sum(first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]) -> I64:
    x, dims, keepdim = _reduced(first, args, kwargs)
    _within("a sum", _largest(x) * max(1, x.size))
    return np.asarray(x.sum(axis=dims, keepdims=keepdim, dtype=np.int64))


def _mean(first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]) -> I64:
    x, dims, keepdim = _reduced(first, args, kwargs)
    count = math.prod(x.shape) if dims is None else math.prod(x.shape[dim] for dim in dims)
    if not count:
        raise UnsupportedOperation("the mean of nothing in fixed point")
    _within("a mean", _largest(x) * max(1, x.size))
    return np.asarray(np.floor_divide(x.sum(axis=dims, keepdims=keepdim, dtype=np.int64), count))


def _reduced(
    first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[I64, tuple[int, ...] | None, bool]:
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    return first.integers, None if not dims else tuple(dims), keepdim


def _local(func: Any) -> Callable[..., I64]:
    """An operation on positions, or a negation: of the integers as they are."""

    def function(first: LocalFixed, args: Sequence[Any], kwargs: dict[str, Any]) -> I64:
        plain = [torch.from_numpy(entry.integers) if isinstance(entry, LocalFixed) else entry for entry in args]
        result: I64 = func(*plain, **kwargs).numpy()
        return result

    return function


OPS: Final[dict[Any, Callable[..., I64]]] = {
    _ATEN.add.Tensor: _added(1),
    _ATEN.sub.Tensor: _added(-1),
    _ATEN.rsub.Scalar: _rsub,
    _ATEN.mul.Tensor: _mul,
    _ATEN.mm.default: _matmul,
    _ATEN.bmm.default: _matmul,
    _ATEN.addmm.default: _addmm,
    _ATEN.sum.default: _sum,
    _ATEN.sum.dim_IntList: _sum,
    _ATEN.mean.default: _mean,
    _ATEN.mean.dim: _mean,
    **{
        func: _local(func)
        for func in (
            *(_ATEN.neg.default, _ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default),
            *(_ATEN.reshape.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.expand.default),
            *(_ATEN.select.int, _ATEN.slice.Tensor, _ATEN.clone.default, _ATEN.detach.default),
        )
    },
    _ATEN.view.default: _local(_ATEN.reshape.default),
    _ATEN._unsafe_view.default: _local(_ATEN.reshape.default),
}
