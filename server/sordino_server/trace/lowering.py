"""Lower a captured graph to ops of the table, one fx node at a time.

On the way: what depends on known tensors only is computed now; a tensor whose elements are all equal becomes a scalar
operand; views of views, permutations of permutations and multiplications by constants in a row become one. Each of
these changes at most the last bit of a float32 result.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from sordino_common.errors import PlanError
from sordino_common.plan.spec import FLOATS, TensorSpec
from sordino_common.plan.values import Arg, Ref
from sordino_server.trace.capture import changed_buffer
from sordino_server.trace.draft import DTYPES, Draft, DraftValue, Held, spec_of
from sordino_server.trace.origins import META, UNKNOWN, Origin
from sordino_server.trace.overloads import CREATORS, OPERATORS, OVERLOADS, SAME, VIEWS, Dims, Require
from sordino_server.trace.peephole import Peephole

# Known tensors up to this size are computed on while tracing; beyond, a Plan could not carry them anyway.
_FOLDED_ELEMENTS = 1 << 22


def lower(graph: GraphModule, draft: Draft, *, name: str, by_rows: bool = False) -> list[Ref]:
    """Append the graph's operations to `draft`; returns its results. `by_rows`: see `Peephole`.

    Raises `PlanError` with the user's line for what has no place in a Plan.
    """
    return _Lowering(graph, draft, name, by_rows).run()


class _Call:
    """One aten call: its arguments by name, defaults filled in, tensors as `Ref` or `Held`."""

    __slots__ = ("arguments", "node", "origin", "overload", "spec")

    def __init__(self, node: FxNode, arguments: dict[str, Any], origin: Origin, place: str) -> None:
        self.node = node
        self.overload = overload_name(node)
        self.arguments = arguments
        self.origin = origin
        value = node.meta.get("val")
        self.spec = spec_of(value, place) if isinstance(value, Tensor) else None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


def overload_name(node: FxNode) -> str:
    """ "mm.default" for torch.ops.aten.mm.default; other namespaces and functions keep their full name."""
    return (
        str(node.target).removeprefix("aten.") if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
    )


class _Lowering:
    def __init__(self, graph: GraphModule, draft: Draft, name: str, by_rows: bool) -> None:
        self.graph = graph
        self.draft = draft
        self.name = name
        self.peephole = Peephole(draft, by_rows=by_rows)
        self.values: dict[FxNode, Any] = {}
        self.origin = UNKNOWN  # of the call that is being lowered

    def run(self) -> list[Ref]:
        inputs = 0
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = Ref(inputs)
                inputs += 1
            elif node.op == "get_attr":
                self.values[node] = Held(getattr(self.graph, str(node.target)))
            elif node.op == "call_function":
                if node.target is operator.getitem:
                    source, index = node.args
                    self.values[node] = self.values[source][index]
                else:
                    self.values[node] = self.call(node)
            elif node.op == "output":
                return [self.ref(self.values[result]) for result in node.args[0]]
        raise PlanError(f"{self.name}: the trace has no output")

    # --- one call ------------------------------------------------------------------------------------------------

    def call(self, node: FxNode) -> Any:
        origin: Origin = node.meta.get(META, UNKNOWN)
        self.origin = origin
        self.refuse_what_no_plan_has(node, origin)
        call = _Call(node, self.arguments(node), origin, f"{self.name}: {origin}: aten op {overload_name(node)}")
        folded = self.fold(call)
        if folded is not None:
            return folded
        overload = call.overload
        if overload in SAME:
            return call["self"]
        if overload in VIEWS or (overload == "as_strided.default" and _is_view(call)):
            return self.peephole.view(self.ref(call["self"]), self.shape(call), origin)
        if overload == "permute.default":
            return self.peephole.permute(self.ref(call["self"]), tuple(call["dims"]), origin)
        if overload == "expand.default":
            return self.peephole.expand(self.ref(call["self"]), self.shape(call), origin)
        if overload in ("_to_copy.default", "to.dtype"):
            return self.cast(self.ref(call["self"]), self.spec(call).dtype, origin)
        if overload in ("sum.default", "sum.dim_IntList"):
            return self.sum(call)
        if overload == "var.correction":
            return self.checked(self.variance(call), self.spec(call), origin)
        if overload == "var_mean.correction":
            x, dims = self.ref(call["self"]), tuple(call["dim"] or ())
            return (self.variance(call), *self.emit("mean", (x, dims, call["keepdim"]), origin))
        if overload in ("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar"):
            return self.where(call)
        if overload in OPERATORS:
            return self.binary(call)
        if overload in OVERLOADS:
            return self.plain(call)
        raise PlanError(
            f"{self.name}: {origin}: aten op {overload} is not in the op table of Plans; write this step with ops that "
            f"are (sordino_common.plan.ops lists them) or choose another layer"
        )

    def arguments(self, node: FxNode) -> dict[str, Any]:
        target: Any = node.target
        given = dict(node.kwargs)
        given.update(zip((argument.name for argument in target._schema.arguments), node.args, strict=False))
        for argument in target._schema.arguments:
            if argument.name not in given:
                given[argument.name] = argument.default_value if argument.has_default_value() else None
        return {key: self.value(value) for key, value in given.items()}

    def value(self, argument: Any) -> Any:
        if isinstance(argument, FxNode):
            return self.values[argument]
        if isinstance(argument, list | tuple):
            return tuple(self.value(item) for item in argument)
        return argument

    def refuse_what_no_plan_has(self, node: FxNode, origin: Origin) -> None:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise PlanError(f"{self.name}: {origin}: {target} is no aten op, and a Plan has nothing else")
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise PlanError(
                f"{self.name}: {origin}: aten op {overload_name(node)} is random, and a Plan gives the same result for "
                f"the same "
                f"input; set dropout to p=0 (or leave it out) and draw noise outside the model"
            )
        if target._schema.is_mutable:
            raise PlanError(f"{self.name}: {changed_buffer(origin)} (aten op {overload_name(node)})")
        if target is torch.ops.aten._local_scalar_dense.default:
            raise PlanError(
                f"{self.name}: {origin}: .item() (aten op {overload_name(node)}) takes a value out of a tensor, but a "
                f"Plan is the same "
                f"list of operations for every input; keep it a tensor"
            )

    # --- known tensors -------------------------------------------------------------------------------------------

    def fold(self, call: _Call) -> Any:
        """The result, if it can be known now: made of nothing, or of known tensors only."""
        meta = call.node.meta.get("val")
        if call.overload in CREATORS:
            fill = CREATORS[call.overload]
            assert isinstance(meta, Tensor)
            return Held(
                torch.full((), call["fill_value"] if fill is None else fill, dtype=meta.dtype).expand(meta.shape)
            )
        refs, held = _tensors(list(call.arguments.values()))
        results = meta if isinstance(meta, tuple | list) else (meta,)
        if refs or any(not isinstance(result, Tensor) or result.numel() > _FOLDED_ELEMENTS for result in results):
            return None
        if not held and call.overload not in _SOURCES:
            return None
        target: Any = call.node.target
        args = {key: _unwrapped(value) for key, value in call.arguments.items()}
        positional = [args.pop(argument.name) for argument in target._schema.arguments if not argument.kwarg_only]
        with torch.no_grad():
            result = target(*positional, **args)
        return Held(result) if isinstance(result, Tensor) else tuple(Held(item) for item in result)

    def ref(self, value: DraftValue) -> Ref:
        """A numbered value: a known tensor becomes a constant of the Plan, or a `full` if one number says it all."""
        if isinstance(value, Ref):
            return value
        if value.scalar is not None and value.tensor.numel() > 1 and math.isfinite(value.scalar):
            spec = spec_of(value.tensor, self.name)
            return self.draft.emit("full", (spec.shape, value.scalar, spec.dtype), self.origin)[0]
        constant = self.draft.constant(value)
        return self.cast(constant, "bool", self.origin) if value.tensor.dtype == torch.bool else constant

    # --- ops with rules of their own -----------------------------------------------------------------------------

    def binary(self, call: _Call) -> DraftValue:
        op, names = OPERATORS[call.overload]
        out = self.spec(call)
        left, right = (self.operand(call[name], call, other) for name, other in (names, names[::-1]))
        if op in ("add", "sub"):
            alpha = call["alpha"]
            if alpha != 1 and not isinstance(right, Ref):
                right, alpha = right * alpha, 1
            return self.checked(self.peephole.sum_of(op, left, right, alpha, out, call.origin), out, call.origin)
        return self.checked(self.peephole.product_of(op, left, right, out, call.origin), out, call.origin)

    def operand(self, value: Any, call: _Call, other: str) -> Any:
        """A `Ref`, or a Python number.

        A number for a scalar, and for a known tensor of equal elements that only scales or shifts the other operand.
        """
        if not isinstance(value, Held):
            return value
        partner = call[other]
        if isinstance(partner, Ref) and value.scalar is not None and math.isfinite(value.scalar):
            spec, out = self.draft.spec(partner), self.spec(call)
            kind = DTYPES[value.tensor.dtype]
            # The scalar must not widen or narrow what the tensor would have done to shape and dtype.
            if spec.shape == out.shape and (spec.dtype == kind or spec.dtype in FLOATS):
                return value.scalar
        return self.ref(value)

    def where(self, call: _Call) -> DraftValue:
        out = self.spec(call)
        condition = self.ref(call["condition"])
        choices = [call["self"], call["other"]]
        for index in (0, 1):
            held, partner = choices[index], choices[1 - index]
            if isinstance(held, Held) and isinstance(partner, Ref) and held.scalar is not None:
                full = self.draft.spec(partner).shape == out.shape or self.draft.spec(condition).shape == out.shape
                if full and self.draft.spec(partner).dtype == out.dtype and math.isfinite(held.scalar):
                    choices[index] = held.scalar
        args = (condition, *(self.ref(item) if isinstance(item, Held) else item for item in choices))
        return self.one("where", args, call)

    def sum(self, call: _Call) -> DraftValue:
        out = self.spec(call)
        x = self.ref(call["self"])
        if out.dtype in FLOATS:
            x = self.cast(x, out.dtype, call.origin)
        dims: tuple[int, ...] = tuple(call.arguments.get("dim") or ())
        shape = self.draft.spec(x).shape
        summed = [shape[dim] for dim in dims] if dims else list(shape)
        if all(size == 1 for size in summed) and self.draft.spec(x).dtype == out.dtype:
            return self.peephole.view(x, out.shape, call.origin)  # a sum of one term each
        return self.one("sum", (x, dims, bool(call.arguments.get("keepdim"))), call)

    def variance(self, call: _Call) -> Ref:
        correction = 1 if call["correction"] is None else call["correction"]
        dims = tuple(call["dim"] or ())
        return self.emit("var", (self.ref(call["self"]), dims, correction, call["keepdim"]), call.origin)[0]

    def plain(self, call: _Call) -> Any:
        op, sources = OVERLOADS[call.overload]
        args: list[Arg] = []
        for source in sources:
            if isinstance(source, Require):
                if call[source.name] != source.value:
                    raise PlanError(
                        f"{self.name}: {call.origin}: aten op {call.overload} with {source.name}={call[source.name]} "
                        f"is not in the op table of Plans, only {source.name}={source.value}"
                    )
            elif isinstance(source, Dims):
                args.append(tuple(call[source.name] or ()))
            else:
                args.append(self.argument(call[source]) if isinstance(source, str) else source.value)
        results = self.emit(op, tuple(args), call.origin)
        if op == "convolution_backward":  # the op gives only what the mask asks for, aten gives None for the rest
            given = iter(results)
            return tuple(next(given) if wanted else None for wanted in call["output_mask"])
        if len(results) == 1:
            return self.checked(results[0], self.spec(call), call.origin)
        return results

    def argument(self, value: Any) -> Arg:
        if isinstance(value, Ref | Held):
            return self.ref(value)
        if isinstance(value, tuple):
            return tuple(self.argument(item) for item in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise PlanError(f"{self.name}: a {type(value).__name__} is no argument of a Plan's op")

    # --- helpers -------------------------------------------------------------------------------------------------

    def cast(self, x: Ref, dtype: str, origin: Origin) -> Ref:
        return x if self.draft.spec(x).dtype == dtype else self.emit("to", (x, dtype), origin)[0]

    def one(self, op: str, args: tuple[Arg, ...], call: _Call) -> Ref:
        (result,) = self.emit(op, args, call.origin)
        return self.checked(result, self.spec(call), call.origin)

    def emit(self, op: str, args: tuple[Arg, ...], origin: Origin) -> tuple[Ref, ...]:
        try:
            return self.peephole.emit(op, args, origin)
        except PlanError as error:
            raise PlanError(f"{self.name}: {error}") from None

    def checked(self, result: Ref, expected: TensorSpec, origin: Origin) -> Ref:
        """The op table and PyTorch must agree on every result; where they don't, the rule here is wrong."""
        if self.draft.spec(result) != expected:
            raise PlanError(
                f"{self.name}: {origin}: the op table gives {self.draft.spec(result)} where PyTorch gives {expected}; "
                f"please report this model"
            )
        return result

    def spec(self, call: _Call) -> TensorSpec:
        if call.spec is None:
            raise PlanError(f"{self.name}: {call.origin}: aten op {call.overload} gives no single tensor")
        return call.spec

    def shape(self, call: _Call) -> tuple[int, ...]:
        return self.spec(call).shape


def _is_view(call: _Call) -> bool:
    """Whether an `as_strided` only reshapes: same elements, both sides contiguous, no offset."""
    source, result = call.node.args[0], call.node.meta["val"]
    before = source.meta["val"] if isinstance(source, FxNode) else None
    return (
        isinstance(before, Tensor)
        and not call["storage_offset"]
        and before.is_contiguous()
        and result.is_contiguous()
        and before.numel() == result.numel()
    )


# Makers of tensors out of numbers alone; everything else without tensor arguments (random ones) is not folded.
_SOURCES = frozenset(
    {
        "full.default",
        "scalar_tensor.default",
        "zeros.default",
        "ones.default",
        "arange.default",
        "arange.start",
        "arange.start_step",
        "eye.default",
        "eye.m",
        "linspace.default",
    }
)


def _tensors(values: list[Any]) -> tuple[list[Ref], list[Held]]:
    refs: list[Ref] = []
    held: list[Held] = []
    for value in values:
        if isinstance(value, Ref):
            refs.append(value)
        elif isinstance(value, Held):
            held.append(value)
        elif isinstance(value, tuple):
            inner = _tensors(list(value))
            refs += inner[0]
            held += inner[1]
    return refs, held


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Held):
        return value.tensor
    if isinstance(value, tuple):
        return [_unwrapped(item) for item in value]
    return value
