"""Plans for the lowering's tests: float64 twins, one-op Plans with public indices, runs in fixed point."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sordino_common.plan.arrays import NdArray, from_numpy, to_numpy
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.ops import infer_outs
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Input, Node, Output, Plan, Ref
from sordino_common.spdz.lowering import Lowered, Ranges, Settings, lower

F = 14
PLAN_ID = b"\x07" * 32


def secret_op(op: str, *args: Any) -> tuple[Plan, list[NdArray]]:
    """A Plan of the one node `op(*args)`: float arrays are inputs x, other arrays public constants."""
    arrays: list[NdArray] = []

    def collect(arg: Any) -> None:
        if isinstance(arg, np.ndarray):
            arrays.append(arg)
        elif isinstance(arg, list | tuple):
            for item in arg:
                collect(item)

    collect(args)
    secret = [array for array in arrays if array.dtype.kind == "f"]
    public = [array for array in arrays if array.dtype.kind != "f"]
    numbers = {id(array): k for k, array in enumerate([*secret, *public])}

    def lift(arg: Any) -> Any:
        if isinstance(arg, np.ndarray):
            return Ref(numbers[id(arg)])
        return tuple(lift(item) for item in arg) if isinstance(arg, list | tuple) else arg

    lifted = tuple(lift(arg) for arg in args)
    specs = [TensorSpec(array.dtype.name, array.shape) for array in (*secret, *public)]
    outs = infer_outs(op, lifted, specs)
    plan = Plan(
        name=op,
        inputs=tuple(Input(f"in{k}", "x", specs[k]) for k in range(len(secret))),
        constants=tuple(from_numpy(array) for array in public),
        nodes=(Node(op, lifted, outs),),
        outputs=tuple(Output(f"out{k}", "value", len(specs) + k) for k in range(len(outs))),
    )
    return plan, secret


def in_float64(plan: Plan) -> Plan:
    """The same Plan with float64 for float32."""

    def wide(spec: TensorSpec) -> TensorSpec:
        return TensorSpec("float64", spec.shape) if spec.dtype == "float32" else spec

    def arg_of(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(arg_of(item) for item in arg)
        return "float64" if arg == "float32" else arg

    constants = []
    for constant in plan.constants:
        array = to_numpy(constant)
        constants.append(from_numpy(array.astype(np.float64)) if array.dtype == np.float32 else constant)
    return replace(
        plan,
        inputs=tuple(Input(entry.name, entry.role, wide(entry.spec)) for entry in plan.inputs),
        constants=tuple(constants),
        nodes=tuple(Node(n.op, tuple(map(arg_of, n.args)), tuple(map(wide, n.outs))) for n in plan.nodes),
    )


def fixed(array: Any, bits: int = F) -> Any:
    return np.rint(np.asarray(array, np.float64) * 2.0**bits).astype(np.int64)


def run_float64(plan: Plan, inputs: dict[tuple[str, str], Any], bits: int = F) -> dict[tuple[str, str], NdArray]:
    """The Plan over (nearly) the reals on the very numbers that the fixed-point inputs stand for."""
    wide = in_float64(plan)
    arrays = [np.asarray(inputs[entry.name, entry.role] * 2.0**-bits, np.float64) for entry in plan.inputs]
    found = NumpyProgram(wide).run(arrays)
    return {(entry.name, entry.role): np.asarray(value) for entry, value in zip(plan.outputs, found, strict=True)}


def lowered(plan: Plan, **ranges: Any) -> Lowered:
    """Under ranges that random small numbers keep."""
    return lower(plan, plan_id=PLAN_ID, settings=Settings(fraction_bits=F, ranges=Ranges(**{"x": 16.0, **ranges})))
