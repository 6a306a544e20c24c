"""Writes plan_format.json anew. Run it only when the Plan format or an op's rule changes on purpose, and read the
difference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import cbor2

from helpers_plan import fill, image_step, linear_step
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.plan import encode_plan, plan_id
from sordino_common.plan.values import Plan

INF = float("inf")


def hexed(value: object) -> str:
    return cbor2.dumps(value, canonical=True).hex()


def loaded() -> Any:
    """The linear step as the list that its bytes encode."""
    return cbor2.loads(encode_plan(linear_step()))


def bad(error: str, edit: Any) -> dict[str, str]:
    outer = loaded()
    replaced = edit(outer)
    return {"data": hexed(outer if replaced is None else replaced), "error": error}


def one(op: str, args: list[Any], outs: list[Any], error: str, shape: list[int] | None = None) -> dict[str, str]:
    """A Plan of one node over one float32 input."""
    size = [4] if shape is None else shape
    outer = ["sordino-plan", 1, "bad", [["x", "x", "float32", size]], [], [[op, args, outs]], [["y", "value", 0]]]
    return {"data": hexed(outer), "error": error}


def put(*path: Any) -> Any:
    """An edit: put the last of `path` at the place that the others name."""
    *places, last, value = path

    def edit(outer: Any) -> None:
        for place in places:
            outer = outer[place]
        outer[last] = value

    return edit


def good(plan: Plan) -> dict[str, Any]:
    data = encode_plan(plan)
    program = NumpyProgram(plan)
    return {
        "data": data.hex(),
        "plan_id": plan_id(data).hex(),
        "peak_bytes": program.cost.peak_bytes,
        "flops": program.cost.flops,
        "outputs": [output.astype(float).reshape(-1).tolist() for output in program.run(fill(plan))],
    }


def refusals() -> dict[str, dict[str, str]]:
    data = encode_plan(linear_step())
    x, f32 = {"v": 0}, "float32"
    conv = [[1, 1], [0, 0], [1, 1], False, [0, 0], 1]
    return {
        "bad_trailing_byte": {"data": data.hex() + "00", "error": "1 bytes after the end"},
        "bad_truncated": {"data": data[:-1].hex(), "error": "CBOR: "},
        "bad_empty": {"data": "", "error": "CBOR: "},
        "bad_not_canonical_int": {"data": data.replace(b"\x6csordino-plan\x01", b"\x6csordino-plan\x18\x01").hex(),
                                  "error": "not the shortest form"},
        "bad_magic": bad("not a Plan", put(0, "pickle")),
        "bad_version": bad("version 2", put(1, 2)),
        "bad_version_bool": bad("version True", put(1, True)),
        "bad_not_a_list": {"data": hexed({"nodes": []}), "error": "not a Plan"},
        "bad_name_empty": bad("1 to 200 printable", put(2, "")),
        "bad_name_control": bad("1 to 200 printable", put(2, "a\nb")),
        "bad_inputs_map": bad("inputs: expected a list", put(3, {})),
        "bad_input_role": bad("role 'weights'", put(3, 0, 1, "weights")),
        "bad_input_twice": bad("same role and name", put(3, 1, 0, "weight")),
        "bad_input_dtype": bad("dtype 'float16'", put(3, 0, 2, "float16")),
        "bad_input_dtype_object": bad("dtype 'object'", put(3, 0, 2, "object")),
        "bad_input_negative": bad("natural number", put(3, 0, 3, [-1, 3])),
        "bad_input_bool_dim": bad("natural number", put(3, 0, 3, [True, 3])),
        "bad_input_huge": bad("larger than 2", put(3, 0, 3, [1 << 40, 1 << 40])),
        "bad_input_huge_beside_zero": bad("larger than 2", put(3, 0, 3, [0, 1 << 62])),
        "bad_input_too_large": bad("takes 4294967296 bytes", put(3, 0, 3, [1 << 30])),
        "bad_input_rank": bad("at most 8 dimensions", put(3, 0, 3, [1] * 9)),
        "bad_constant_not_array": bad("expected arrays", put(4, [1, 2])),
        "bad_node_fields": bad(r"node 0: expected \[op, args, outs\]", put(5, 0, ["permute"])),
        "bad_op_unknown": bad("'os.system' is not in the table", put(5, 0, 0, "os.system")),
        "bad_op_dunder": bad("'__class__' is not in the table", put(5, 0, 0, "__class__")),
        "bad_op_number": bad("expected text", put(5, 0, 0, 7)),
        "bad_forward_reference": bad("refers to value 9", put(5, 0, 1, 0, {"v": 9})),
        "bad_self_reference": bad("refers to value 4", put(5, 0, 1, 0, {"v": 4})),
        "bad_negative_reference": bad("refers to value -1", put(5, 0, 1, 0, {"v": -1})),
        "bad_reference_key": bad("a reference is", put(5, 0, 1, 0, {"w": 0})),
        "bad_reference_bool": bad("a reference is", put(5, 0, 1, 0, {"v": True})),
        "bad_out_shape": bad(r"declares float32\[3, 2\], the op gives float32\[3, 1\]", put(5, 0, 2, 0, 1, [3, 2])),
        "bad_out_dtype": bad("declares float64", put(5, 0, 2, 0, 0, "float64")),
        "bad_out_missing": bad("declares nothing", put(5, 0, 2, [])),
        "bad_args_short": bad("takes 2 arguments, got 1", put(5, 0, 1, [x])),
        "bad_arg_kind": bad("`dims` must be ints", put(5, 0, 1, 1, [1.0, 0.0])),
        "bad_arg_bytes": bad("bytes", put(5, 0, 1, 1, b"\x00")),
        "bad_arg_deep": bad("nested deeper", put(5, 0, 1, 1, [[[[[0]]]]])),
        "bad_arg_nan": one("add", [x, float("nan"), 1], [[f32, [4]]], "NaN"),
        "bad_arg_wide_int": one("add", [x, (1 << 64) - 1, 1], [[f32, [4]]], "64 bits"),
        "bad_outputs_none": bad("no outputs", put(6, [])),
        "bad_output_value": bad("refers to value 99", put(6, 0, 2, 99)),
        "bad_output_negative": bad("refers to value -1", put(6, 0, 2, -1)),
        "bad_output_role": bad("role 'x'", put(6, 0, 1, "x")),
        "bad_output_twice": bad("same role and name", put(6, 1, 0, "weight")),
        "bad_full_giant": one("full", [[1 << 20, 1 << 20], 0.0, f32], [[f32, [1 << 20, 1 << 20]]], "bytes, at most"),
        "bad_expand_giant": one("expand", [x, [1 << 36, 4]], [[f32, [1 << 36, 4]]], "bytes, at most"),
        "bad_repeat_giant": one("repeat", [x, [1 << 40]], [[f32, [1 << 42]]], "larger than 2"),
        "bad_repeat_negative": one("repeat", [x, [-1]], [[f32, [4]]], "natural number"),
        "bad_pad_giant": one("pad", [x, [1 << 50, 0], 0], [[f32, [4]]], "larger than 2"),
        "bad_pad_negative": one("pad", [x, [-2, 0], 0], [[f32, [2]]], "at least 0"),
        "bad_arange_giant": one("arange", [0, 1 << 50, 1, "int64"], [["int64", [1 << 50]]], "larger than 2"),
        "bad_arange_step": one("arange", [0, 4, 0, "int64"], [["int64", [4]]], "step is not 0"),
        "bad_arange_inf": one("arange", [0.0, INF, 1.0, f32], [[f32, [4]]], "bounds are finite"),
        "bad_view_size": one("view", [x, [2, 3]], [[f32, [2, 3]]], "can't be viewed"),
        "bad_view_minus_one": one("view", [x, [-1]], [[f32, [4]]], "natural number"),
        "bad_select_outside": one("select", [x, 0, 4], [[f32, []]], "outside dimension"),
        "bad_slice_step": one("slice", [x, 0, 0, 4, 0], [[f32, [4]]], "at least 1"),
        "bad_amax_of_nothing": one("amax", [x, [0], False], [[f32, []]], "empty set", [0]),
        "bad_dim": one("softmax", [x, 1], [[f32, [4]]], "dimension 1"),
        "bad_dim_twice": one("sum", [x, [0, -1], False], [[f32, []]], "one twice"),
        "bad_mm_inner": one("mm", [x, x], [[f32, [2, 3]]], "inner", [2, 3]),
        "bad_index_dtype": one("gather", [x, 0, x], [[f32, [4]]], "index is int64"),
        "bad_index_mask": one("index", [x, [None]], [[f32, [4]]], "all indices are null"),
        "bad_conv_stride": one("convolution", [x, x, None, [0, 1], *conv[1:]], [[f32, [4]]], "stride is at least 1",
                               [1, 1, 3, 3]),
        "bad_conv_groups": one("convolution", [x, x, None, *conv[:-1], 0], [[f32, [4]]], "groups", [1, 1, 3, 3]),
        "bad_conv_dilation": one("convolution", [x, x, None, [1], [0], [1 << 40], *conv[3:]], [[f32, [4]]],
                                 "dilation is at least", [1, 1, 3, 3]),
        "bad_conv_padding_giant": one("convolution", [x, x, None, [1 << 20], [1 << 20], *conv[2:]],
                                      [[f32, [1, 1, 3, 3]]], "at its peak", [1, 1, 3, 3]),
        "bad_conv_transposed": one("convolution", [x, x, None, *conv[:3], True, *conv[4:]], [[f32, [4]]],
                                   "transposed", [1, 1, 3, 3]),
        "bad_pool_kernel_zero": one("avg_pool2d", [x, [0], [1], [0], False, True, None], [[f32, [4]]],
                                    "kernel_size is at least 1", [1, 3, 3]),
        "bad_pool_divisor": one("avg_pool2d", [x, [1], [1], [0], False, True, 0], [[f32, [4]]], "not 0", [1, 3, 3]),
        "bad_pool_padding": one("avg_pool2d", [x, [2], [1], [2], False, True, None], [[f32, [4]]], "half", [1, 3, 3]),
        "bad_scalar_dtype": one("full", [[2], 300, "uint8"], [["uint8", [2]]], "does not fit into uint8"),
    }  # fmt: skip


def main() -> None:
    plans = {"linear_step": linear_step(), "image_step": image_step()}
    target = Path(__file__).parent / "plan_format.json"
    content = {"good": {name: good(plan) for name, plan in plans.items()}, "bad": refusals()}
    target.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
