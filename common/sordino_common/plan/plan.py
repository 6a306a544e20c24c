"""A Plan as bytes: canonical CBOR, and its identity, the SHA-256 of those bytes.

    ["sordino-plan", 1, name,
     [[name, role, dtype, shape], ...],          inputs
     [array, ...],                               constants
     [[op, args, [[dtype, shape], ...]], ...],   nodes
     [[name, role, value], ...]]                 outputs

An argument is null, a bool, an integer, a float (no NaN), text, a list of arguments, or `{"v": n}`: the value number n.
A Plan has exactly one encoding: arguments are complete (no defaults on the wire), and the codec takes only canonical
CBOR. `decode_plan` gives back a Plan that is valid in every respect, or raises `CodecError` or `PlanError`.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

from sordino_common.errors import PlanError
from sordino_common.messages.array import Array
from sordino_common.messages.codec import Limits, decode, encode
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.validation import MAX_ARG_DEPTH, validate_plan
from sordino_common.plan.values import Arg, Input, Node, Output, Plan, PlanLimits, Ref

__all__ = [
    "DEFAULT_PLAN_LIMITS",
    "FORMAT",
    "VERSION",
    "Arg",
    "Input",
    "Node",
    "Output",
    "Plan",
    "PlanLimits",
    "Ref",
    "decode_plan",
    "encode_plan",
    "plan_id",
]

FORMAT: Final = "sordino-plan"
VERSION: Final = 1
DEFAULT_PLAN_LIMITS: Final = PlanLimits()
_REF_KEY: Final = "v"


def encode_plan(plan: Plan, limits: PlanLimits = DEFAULT_PLAN_LIMITS) -> bytes:
    """Canonical CBOR of `plan`, which is validated first: `PlanError` on a Plan that a device would refuse."""
    validate_plan(plan, limits)
    data = encode(
        [
            FORMAT,
            VERSION,
            plan.name,
            [[entry.name, entry.role, entry.spec.dtype, entry.spec.shape] for entry in plan.inputs],
            plan.constants,
            [
                [node.op, [_arg_to_wire(arg) for arg in node.args], [[out.dtype, out.shape] for out in node.outs]]
                for node in plan.nodes
            ],
            [[entry.name, entry.role, entry.value] for entry in plan.outputs],
        ]
    )
    if len(data) > limits.encoded_bytes:
        raise PlanError(f"the Plan takes {len(data)} bytes, at most {limits.encoded_bytes} are allowed")
    return data


def decode_plan(data: bytes, limits: PlanLimits = DEFAULT_PLAN_LIMITS) -> Plan:
    """The Plan that `data` encodes, fully validated. Raises `CodecError` (bytes) or `PlanError` (content)."""
    codec_limits = Limits(
        payload_bytes=limits.encoded_bytes, depth=MAX_ARG_DEPTH + 6, items=40 * limits.nodes + 100_000
    )
    outer = decode(data, codec_limits)
    if not (isinstance(outer, list) and len(outer) == 7 and outer[0] == FORMAT):
        raise PlanError(f"not a Plan: expected [{FORMAT!r}, version, name, inputs, constants, nodes, outputs]")
    _, version, name, inputs, constants, nodes, outputs = outer
    if type(version) is not int or version != VERSION:
        raise PlanError(f"Plan format version {str(version)[:20]} is not known here, expected {VERSION}")
    if not all(isinstance(constant, Array) for constant in _list(constants, "constants")):
        raise PlanError("constants: expected arrays")
    plan = Plan(
        name=_text(name, "name"),
        inputs=tuple(_input(entry) for entry in _list(inputs, "inputs")),
        constants=tuple(constants),
        nodes=tuple(_node(entry, index) for index, entry in enumerate(_list(nodes, "nodes"))),
        outputs=tuple(_output(entry) for entry in _list(outputs, "outputs")),
    )
    validate_plan(plan, limits)
    return plan


def plan_id(data: bytes) -> bytes:
    """SHA-256 of an encoded Plan: its identity."""
    return hashlib.sha256(data).digest()


def _arg_to_wire(arg: Arg) -> object:
    if isinstance(arg, Ref):
        return {_REF_KEY: arg.value}
    if isinstance(arg, tuple):
        return [_arg_to_wire(item) for item in arg]
    return arg


def _arg_from_wire(value: Any, where: str) -> Arg:
    # The codec has bounded the nesting already.
    if isinstance(value, dict):
        if set(value) != {_REF_KEY} or type(value[_REF_KEY]) is not int:
            raise PlanError(f"{where}: a reference is {{{_REF_KEY!r}: number}}")
        return Ref(value[_REF_KEY])
    if isinstance(value, list):
        return tuple(_arg_from_wire(item, where) for item in value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return value
    raise PlanError(f"{where}: {type(value).__name__} (or NaN) is no argument")


def _input(entry: Any) -> Input:
    name, role, dtype, shape = _fields(entry, 4, "input", "[name, role, dtype, shape]")
    return Input(_text(name, "input"), _text(role, "input"), _spec(dtype, shape, f"input {str(name)[:80]!r}"))


def _node(entry: Any, index: int) -> Node:
    where = f"node {index}"
    op, args, outs = _fields(entry, 3, where, "[op, args, outs]")
    where = f"node {index} ({_text(op, where)[:40]})"
    specs = []
    for out in _list(outs, where):
        dtype, shape = _fields(out, 2, where, "[dtype, shape]")
        specs.append(_spec(dtype, shape, where))
    return Node(op, tuple(_arg_from_wire(arg, where) for arg in _list(args, where)), tuple(specs))


def _output(entry: Any) -> Output:
    name, role, value = _fields(entry, 3, "output", "[name, role, value]")
    if type(value) is not int:
        raise PlanError(f"output {str(name)[:80]!r}: the value's number is not an integer")
    return Output(_text(name, "output"), _text(role, "output"), value)


def _spec(dtype: Any, shape: Any, where: str) -> TensorSpec:
    try:
        return TensorSpec(dtype, tuple(_list(shape, "shape")))
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def _fields(entry: Any, count: int, where: str, expected: str) -> list[Any]:
    if not isinstance(entry, list) or len(entry) != count:
        raise PlanError(f"{where}: expected {expected}")
    return entry


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"{where}: expected a list, got {type(value).__name__}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{where}: expected text, got {type(value).__name__}")
    return value
