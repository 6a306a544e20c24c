"""Law of the op table: by NumPy = by torch, in shape, dtype and value, over drawn shapes, empty and size 1 included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers_plan import CASES, Gen, one_op, spec_of
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.ops import OPS
from sordino_common.plan.plan import decode_plan, encode_plan
from sordino_common.plan.torch_executor import _TABLE, TorchProgram


def test_every_op_has_a_case_and_a_torch_line() -> None:
    assert set(CASES) == set(OPS)
    assert set(_TABLE) | {"to", "full", "arange"} == set(OPS)


@pytest.mark.parametrize("op", sorted(OPS))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_numpy_equals_torch(op: str, data: st.DataObject) -> None:
    plan, arrays = one_op(op, *CASES[op](Gen(data)))
    before = [array.copy() for array in arrays]
    results = NumpyProgram(plan).run(arrays)
    expected = TorchProgram(plan).run(arrays)
    for ours, theirs, spec in zip(results, expected, plan.nodes[0].outs, strict=True):
        assert spec_of(ours) == spec
        assert spec_of(theirs) == spec
        tolerance = 1e-12 if ours.dtype == np.float64 else 2e-5
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert ours.flags.writeable
        assert theirs.flags.writeable
        assert not any(np.shares_memory(ours, array) for array in arrays)
        assert not any(np.shares_memory(theirs, array) for array in arrays)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert decode_plan(encode_plan(plan)) == plan


@pytest.mark.parametrize(
    ("shape", "repeats"), [((0, 0), (1 << 40, 1 << 40)), ((1, 0, 0, 1), (1 << 20, 1 << 40, 1 << 40, 1 << 20))]
)
def test_nothing_can_be_repeated_any_number_of_times(shape: tuple[int, ...], repeats: tuple[int, ...]) -> None:
    plan, arrays = one_op("repeat", np.zeros(shape, np.float32), list(repeats))
    for program in (NumpyProgram(plan), TorchProgram(plan)):
        (result,) = program.run(arrays)
        assert spec_of(result) == plan.nodes[0].outs[0]
