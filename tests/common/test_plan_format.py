"""Plans as bytes: golden vectors, what is refused and why, limits, and mutated bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest

from helpers_messages import mutate
from helpers_plan import Builder, fill, image_step, linear_step, one_op, spec_of
from sordino_common.errors import CodecError, PlanError
from sordino_common.messages.array import Array
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.ops import OPS
from sordino_common.plan.plan import DEFAULT_PLAN_LIMITS, decode_plan, encode_plan, plan_id
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Plan, Ref

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent.parent / "vectors" / "plan_format.json").read_text("utf-8"))
PLANS = {"linear_step": linear_step, "image_step": image_step}


@pytest.mark.parametrize("name", sorted(VECTORS["good"]))
def test_golden(name: str) -> None:
    vector = VECTORS["good"][name]
    data = bytes.fromhex(vector["data"])
    plan = decode_plan(data)
    assert plan == PLANS[name]()
    assert encode_plan(plan) == data
    assert plan_id(data).hex() == vector["plan_id"]
    program = NumpyProgram(plan)
    assert (program.cost.peak_bytes, program.cost.flops) == (vector["peak_bytes"], vector["flops"])
    for output, expected in zip(program.run(fill(plan)), vector["outputs"], strict=True):
        np.testing.assert_allclose(output.reshape(-1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(VECTORS["bad"]))
def test_bad_twins_are_refused(name: str) -> None:
    vector = VECTORS["bad"][name]
    with pytest.raises((PlanError, CodecError), match=vector["error"]):
        decode_plan(bytes.fromhex(vector["data"]))


def _limited(**changes: int) -> Any:
    return dataclasses.replace(DEFAULT_PLAN_LIMITS, **changes)


def test_limits_hold_before_anything_runs() -> None:
    plan = linear_step()
    data, cost = encode_plan(plan), NumpyProgram(plan).cost
    decode_plan(data, _limited(peak_bytes=cost.peak_bytes, flops=cost.flops, nodes=len(plan.nodes)))
    for limits, text in (
        (_limited(nodes=len(plan.nodes) - 1), "nodes, at most"),
        (_limited(entries=3), "4 inputs, at most 3"),
        (_limited(value_bytes=47), "takes 48 bytes, at most 47"),
        (_limited(peak_bytes=cost.peak_bytes - 1), "at its peak"),
        (_limited(flops=cost.flops - 1), "operations, at most"),
    ):
        with pytest.raises(PlanError, match=text):
            decode_plan(data, limits)
        with pytest.raises(PlanError, match=text):
            encode_plan(plan, limits)
    with pytest.raises(CodecError, match="bytes, at most"):
        decode_plan(data, _limited(encoded_bytes=len(data) - 1))
    with pytest.raises(PlanError, match="the Plan takes"):
        encode_plan(plan, _limited(encoded_bytes=len(data) - 1))


def test_prepared_tables_count() -> None:
    """Ten thousand poolings over one large image share no memory: their tables alone are past the limit."""
    b = Builder("tables")
    x = b.input("x", "x", "float32", 1, 1000, 1000)
    for _ in range(200):
        best, _ = b.node("max_pool2d_with_indices", x, (1, 1), (1, 1), (0, 0), (1, 1), False)
    b.output("best", "value", best)
    with pytest.raises(PlanError, match="at its peak"):
        encode_plan(b.build())


def test_constants_of_all_dtypes() -> None:
    b = Builder("constants")
    values = [np.arange(3, dtype=dtype) for dtype in ("float32", "float64", "int32", "int64", "uint8")]
    for number, ref in enumerate([b.constant(value) for value in values]):
        b.output(f"c{number}", "value", ref)
    plan = decode_plan(encode_plan(b.build()))
    for output, value in zip(NumpyProgram(plan).run([]), values, strict=True):
        np.testing.assert_array_equal(output, value, strict=True)
        assert output.flags.writeable
    wide = Plan("wide", (), (Array("uint64", (1,), bytes(8)),), (), b.build().outputs[:1])
    with pytest.raises(PlanError, match="uint64"):
        encode_plan(wide)


def test_numbers_of_wrong_python_types_are_refused() -> None:
    """What a tracer might leave in: NumPy scalars, enum-like integers, lists."""
    b = Builder("types")
    x = b.input("x", "x", "float32", 2)
    b.output("y", "value", b.node("add", x, 1, 1))
    plan = b.build()
    for wrong in (np.float64(1.0), np.int64(1), [1], object()):
        node = dataclasses.replace(plan.nodes[0], args=(Ref(0), wrong, 1))
        with pytest.raises(PlanError, match="is no argument"):
            encode_plan(dataclasses.replace(plan, nodes=(node,)))
    with pytest.raises(PlanError, match="natural number"):
        TensorSpec("float32", (np.int64(3),))  # type: ignore[arg-type]


def _edit(data: bytes, rng: random.Random) -> bytes:
    """Canonical CBOR again, after one to three edits of the content: the bytes are well-formed, the Plan may not be."""
    outer = cbor2.loads(data)
    for _ in range(rng.randint(1, 3)):
        place: Any = outer
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], list | dict) and place[key] and rng.random() < 0.9:
                place = place[key]
                continue
            number = place[key] if type(place[key]) is int else 1
            values = (0, 1, 2, -1, number + 1, number - 1, 1 << 40, (1 << 63) - 1, True, None, 0.5, 1e300, "add", "mul")
            values += ("float64", "bool", "int64", "max_pool2d_with_indices", [], [1], {"v": rng.randrange(30)})
            if isinstance(place, list) and rng.random() < 0.2:
                place.insert(key, place[key]) if rng.random() < 0.5 else place.pop(key)
            else:
                place[key] = rng.choice(values)
            break
    return cbor2.dumps(outer, canonical=True)


@pytest.mark.soak
def test_mutated_plans_raise_only_named_errors_and_run() -> None:
    """A mutated Plan is refused by name, or is a valid Plan: then its bytes are canonical, and it runs (or refuses an
    index) to the shapes that it declares."""
    trials = 100_000 if os.environ.get("SORDINO_SOAK") else 4_000
    rng = random.Random(20_240_521)
    originals = [encode_plan(linear_step()), encode_plan(image_step())]
    limits = _limited(peak_bytes=1 << 22, flops=10**7)
    accepted = 0
    for trial in range(trials):
        data = (mutate if trial % 4 < 2 else _edit)(originals[trial % 2], rng)
        plan = _refused(lambda data=data: decode_plan(data, limits), (PlanError, CodecError), "")
        if plan is None:
            continue
        accepted += 1
        assert encode_plan(plan, limits) == data
        program = NumpyProgram(plan)
        assert program.cost.peak_bytes <= 1 << 22
        outputs = _refused(lambda plan=plan, program=program: program.run(fill(plan)), (PlanError,), "outside")
        if outputs is not None:
            specs = plan.specs()
            for entry, output in zip(plan.outputs, outputs, strict=True):
                assert TensorSpec(output.dtype.name, output.shape) == specs[entry.value]
    assert accepted > trials // 100


_DIMS = (0, 1, 1, 2, 3, 4)
_INTS = (0, 0, 1, 1, 2, 3, -1, -2, 5, 1 << 20, 1 << 40, (1 << 63) - 1, 1 - (1 << 63))
_SCALARS = (*_INTS, 0.5, -1.0, 1e300, float("inf"), float("-inf"), True, False)


def _any_array(rng: random.Random) -> Any:
    dtype = rng.choice(("float32", "float32", "float32", "float64", "int64", "int64", "int32", "uint8", "bool"))
    shape = tuple(rng.choice(_DIMS) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 4))))
    return np.asarray(np.random.default_rng(rng.getrandbits(32)).integers(-2, 4, shape)).astype(dtype)


def _any_arg(kind: str, rng: random.Random) -> Any:
    """An argument of that kind, sensible or not."""
    if kind.endswith("?") and rng.random() < 0.3:
        return None
    match kind.rstrip("?"):
        case "Tensor":
            return _any_array(rng)
        case "Tensors":
            return [
                None if kind[-1] == "?" and rng.random() < 0.3 else _any_array(rng) for _ in range(rng.randint(0, 3))
            ]
        case "Num":
            return _any_array(rng) if rng.random() < 0.7 else rng.choice(_SCALARS)
        case "Scalar":
            return rng.choice(_SCALARS)
        case "int":
            return rng.choice(_INTS)
        case "ints":
            return [rng.choice(_INTS[: rng.choice((4, 8, 13))]) for _ in range(rng.randint(0, 4))]
        case "bool":
            return rng.random() < 0.5
        case "bools":
            return [rng.random() < 0.5 for _ in range(rng.choice((2, 3, 3, 3)))]
        case "dtype":
            return rng.choice(("float32", "float64", "int64", "int32", "uint8", "bool"))
        case "str":
            return rng.choice(("none", "tanh", ""))
    raise AssertionError(kind)


@pytest.mark.soak
@pytest.mark.parametrize("op", sorted(OPS))
def test_any_arguments_are_refused_by_name_or_give_what_was_inferred(op: str) -> None:
    trials = 20_000 if os.environ.get("SORDINO_SOAK") else 150
    rng = random.Random(op)
    limits = _limited(peak_bytes=1 << 22, flops=10**6)
    for _ in range(trials):
        args = [_any_arg(param.kind, rng) for param in OPS[op].params]
        made = _refused(lambda args=args: one_op(op, *args), (PlanError,), op)
        if made is None or _refused(lambda made=made: encode_plan(made[0], limits), (PlanError,), "") is None:
            continue
        plan, arrays = made
        outputs = _refused(lambda plan=plan, arrays=arrays: NumpyProgram(plan).run(arrays), (PlanError,), "outside")
        for output, spec in zip(outputs or (), plan.nodes[0].outs, strict=False):
            assert spec_of(output) == spec


def _refused(call: Callable[[], Any], errors: tuple[type[Exception], ...], text: str) -> Any:
    """The result, or None if one of `errors` was raised with `text` in a message of bounded length."""
    try:
        return call()
    except errors as error:
        message = str(error)
    assert text in message
    assert len(message) < 2_000
    return None
