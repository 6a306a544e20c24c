"""What an op of the table is: a schema, a shape rule, a NumPy kernel, and what they cost.

Schema language, one line an op: `name(Kind param, Kind param=default, ...)`. The kinds:

    Tensor   Tensor?   Tensors   Tensors?     a value; or null; a list of values; a list of values or nulls
    Num                                       a value or a Scalar (at least one operand of an op is a value)
    Scalar   Scalar?                          an integer, a float or a bool; or null
    int  int?  bool  dtype  str               dtype is the name of one, as text
    ints ints? bools                          a list

On the wire every argument is present and none is a default: defaults serve only those who build Plans.
`infer`, `kernel` and the costs get the arguments with each value replaced by its `TensorSpec`, already checked
against the schema. `kernel` is called once, when a program is prepared; what it returns is called with the ndarrays of
the node's values in order of appearance, and gives the result (a tuple of them if there are several). Values are never
written to after they were made. A kernel may hand back NumPy scalars for rank 0 and takes them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from sordino_common.errors import LocalError, PlanError
from sordino_common.plan.spec import ITEM_BYTES, TensorSpec
from sordino_common.plan.values import Arg, Ref

Outs: TypeAlias = tuple[TensorSpec, ...]
# Arguments are of many types, which the schema has checked: the one place in this package where Any is let in.
Infer: TypeAlias = Callable[..., Outs]
Kernel: TypeAlias = Callable[..., Any]
Cost: TypeAlias = Callable[..., int]

REQUIRED: Final = object()
_MAX_LIST: Final = 10_000  # tensors of a cat, entries of a list


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a schema."""

    kind: str
    name: str
    default: Any = REQUIRED


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op. `view`: the result may share the storage of the first value among the arguments; `may_copy`: but it may
    as well be memory of its own. `flops(outs, *args)` counts operations; `scratch(outs, *args)` the bytes of memory
    that the kernel holds at most beside its results; `held(outs, *args)` those of the tables that it is prepared with
    and keeps."""

    name: str
    schema: str
    params: tuple[Param, ...]
    infer: Infer
    kernel: Callable[..., Kernel]
    flops: Cost
    scratch: Cost
    held: Cost
    view: bool
    may_copy: bool


_TABLE: Final[dict[str, Op]] = {}
OPS: Final[Mapping[str, Op]] = MappingProxyType(_TABLE)


def _nothing(_outs: Outs, *_args: object) -> int:
    return 0


def one_per_element(outs: Outs, *_args: object) -> int:
    """The usual count: an operation per element of the results."""
    return sum(out.numel for out in outs)


def register(
    schema: str,
    *,
    infer: Infer,
    kernel: Callable[..., Kernel],
    flops: Cost = one_per_element,
    scratch: Cost = _nothing,
    held: Cost = _nothing,
    view: bool = False,
    may_copy: bool = False,
) -> None:
    """Put an op into the table. Called by the family modules when they are loaded, by nobody else."""
    name, params = _parse(schema)
    if name in _TABLE:
        raise LocalError(f"op {name!r} is registered twice")
    _TABLE[name] = Op(
        name=name,
        schema=schema,
        params=params,
        infer=infer,
        kernel=kernel,
        flops=flops,
        scratch=scratch,
        held=held,
        view=view,
        may_copy=may_copy,
    )


def _parse(schema: str) -> tuple[str, tuple[Param, ...]]:
    match = re.fullmatch(r"(\w+)\((.*)\)", schema)
    if not match:
        raise LocalError(f"op schema {schema!r} is not name(Kind param, ...)")
    params = []
    for text in filter(None, match.group(2).split(", ")):
        kind, _, rest = text.partition(" ")
        name, equals, default = rest.partition("=")
        if kind not in _KINDS:
            raise LocalError(f"op schema {schema!r}: kind {kind!r} is unknown")
        params.append(Param(kind, name, _DEFAULTS[default] if equals else REQUIRED))
    return match.group(1), tuple(params)


_DEFAULTS: Final[dict[str, Any]] = {
    "0": 0,
    "1": 1,
    "None": None,
    "True": True,
    "False": False,
    "()": (),
    "1.0": 1.0,
    "0.01": 0.01,
    "-1.0": -1.0,
    "none": "none",
}


def op_named(name: object) -> Op:
    """The op of that name. `PlanError` if the table has none."""
    op = _TABLE.get(name) if isinstance(name, str) else None
    if op is None:
        raise PlanError(f"op {str(name)[:60]!r} is not in the table")
    return op


def resolve(args: Sequence[Arg], specs: Sequence[TensorSpec]) -> tuple[Any, ...]:
    """The arguments with each reference replaced by the spec of its value."""
    return tuple(_resolve(arg, specs) for arg in args)


def _resolve(arg: Arg, specs: Sequence[TensorSpec]) -> Any:
    if isinstance(arg, Ref):
        return specs[arg.value]
    if isinstance(arg, tuple):
        return tuple(_resolve(item, specs) for item in arg)
    return arg


def infer_outs(name: str, args: Sequence[Arg], specs: Sequence[TensorSpec]) -> Outs:
    """Specs of the op's results, given those of all values before it. Raises `PlanError` naming the op and shapes."""
    op = op_named(name)
    if len(args) != len(op.params):
        raise PlanError(f"op {name} takes {len(op.params)} arguments, got {len(args)}: {op.schema}")
    resolved = resolve(args, specs)
    for param, arg in zip(op.params, resolved, strict=True):
        if not _KINDS[param.kind](arg):
            raise PlanError(f"op {name}: `{param.name}` must be {param.kind}, got {str(arg)[:80]}; {op.schema}")
    try:
        return op.infer(*resolved)
    except PlanError as error:
        shown = ", ".join(_shown(arg) for arg in resolved)
        raise PlanError(f"op {name}({shown[:400]}): {error}") from None


def _shown(arg: Any) -> str:
    if isinstance(arg, tuple):
        return "[" + ", ".join(_shown(item) for item in arg[:12]) + (", ..." if len(arg) > 12 else "") + "]"
    return str(arg)[:60]


# --- kinds -------------------------------------------------------------------------------------------------------


def _is_tensor(arg: object) -> bool:
    return isinstance(arg, TensorSpec)


def _is_scalar(arg: object) -> bool:
    return isinstance(arg, bool | int | float)


def _is_int(arg: object) -> bool:
    return type(arg) is int


def _is_list(arg: object, item: Callable[[object], bool]) -> bool:
    return isinstance(arg, tuple) and len(arg) <= _MAX_LIST and all(item(entry) for entry in arg)


_KINDS: Final[dict[str, Callable[[object], bool]]] = {
    "Tensor": _is_tensor,
    "Tensor?": lambda arg: arg is None or _is_tensor(arg),
    "Tensors": lambda arg: _is_list(arg, _is_tensor),
    "Tensors?": lambda arg: _is_list(arg, lambda item: item is None or _is_tensor(item)),
    "Num": lambda arg: _is_tensor(arg) or _is_scalar(arg),
    "Scalar": _is_scalar,
    "Scalar?": lambda arg: arg is None or _is_scalar(arg),
    "int": _is_int,
    "int?": lambda arg: arg is None or _is_int(arg),
    "bool": lambda arg: isinstance(arg, bool),
    "str": lambda arg: isinstance(arg, str),
    "dtype": lambda arg: isinstance(arg, str) and arg in ITEM_BYTES,
    "ints": lambda arg: _is_list(arg, _is_int),
    "ints?": lambda arg: arg is None or _is_list(arg, _is_int),
    "bools": lambda arg: _is_list(arg, lambda item: isinstance(item, bool)),
}
