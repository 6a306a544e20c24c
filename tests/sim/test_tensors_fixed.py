"""Fixed point in this process: its table of operations against floats, what it refuses, how it is shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sordino_server as sordino
from sordino_server.tensors.errors import HiddenValue, UnsupportedOperation, WrongPlace

ULP = 2.0**-14
# Operation, and how many units in the last place it may be off for operands up to 4 in size, encoded to half a unit.
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "add": (lambda x, y: x + y, 1),
    "number": (lambda x, y: 2.5 - x + 1, 1),
    "sub": (lambda x, y: x - y, 1),
    "neg": (lambda x, y: -x, 0.5),
    "mul": (lambda x, y: x * y, 5),
    "scaled": (lambda x, y: x * 0.5, 2),
    "plain": (lambda x, y: x * torch.full((3, 4), 0.25), 2),
    "matmul": (lambda x, y: x @ y.t(), 17),
    "batched": (lambda x, y: torch.matmul(x.unsqueeze(0), y.t().unsqueeze(0)), 17),
    "sum": (lambda x, y: x.sum(), 6),
    "columns": (lambda x, y: x.sum(dim=0, keepdim=True), 2),
    "mean": (lambda x, y: x.mean(dim=1), 2),
    "all": (lambda x, y: x.mean(), 2),
    "views": (lambda x, y: x.t().reshape(3, 4)[1:, 0].expand(2, 2), 0.5),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_it_computes_is_off_by_units_in_the_last_place(name: str) -> None:
    function, units = OPERATIONS[name]
    generator = torch.Generator().manual_seed(len(name))
    x, y = ((8 * torch.rand(3, 4, generator=generator) - 4) for _ in range(2))
    found = function(sordino.fix_precision(x), sordino.fix_precision(y))
    assert isinstance(found, sordino.FixedPrecisionTensor)
    want = function(x.double(), y.double())
    assert found.shape == want.shape
    assert float((found.float_precision().double() - want).abs().max()) <= units * ULP + 1e-6


def test_the_link_shows_its_integers_below_and_no_value() -> None:
    fixed = sordino.LocalTensor(torch.tensor([1.5, -0.25])).fix_precision(f=10)
    assert repr(fixed) == "FixedPrecisionTensor(f=10) > LocalTensor > Tensor float32[2]"
    assert fixed.child.get().tolist() == [1536, -256]
    assert torch.equal(fixed.fix_precision(f=12).child.get(), torch.tensor([6144, -1024]))
    assert torch.equal(fixed.get(), torch.tensor([1.5, -0.25]))
    with pytest.raises(HiddenValue):
        fixed.tolist()


def test_what_has_no_meaning_is_refused_by_name() -> None:
    fixed = sordino.fix_precision(torch.ones(2, 2))
    with pytest.raises(
        UnsupportedOperation,
        match=r"test_tensors_fixed.py:\d+: aten::relu on FixedPrecisionTensor\(f=14\) .*float_prec",
    ):
        torch.relu(fixed)
    for operation, words in (
        (lambda: fixed + sordino.fix_precision(torch.ones(2, 2), f=12), "14 and 12 fraction bits"),
        (lambda: sordino.fix_precision(torch.ones(2, dtype=torch.int64)), r"convert it with \.float"),
        (lambda: sordino.fix_precision(torch.tensor([float("nan")])), "not finite"),
        (lambda: sordino.fix_precision(torch.ones(2), f=40), "4 to 24"),
        (lambda: fixed.share(), "name the agents"),
        (lambda: fixed.reconstruct(), "it is not shared"),
    ):
        with pytest.raises((WrongPlace, UnsupportedOperation), match=words):
            operation()


def test_nothing_wraps_in_silence() -> None:
    large = sordino.fix_precision(torch.full((2, 2), 2.0**20), f=24)
    for operation in (lambda: large * large, lambda: large @ large):
        with pytest.raises(UnsupportedOperation, match="may need more than 62 bits"):
            operation()


def test_these_very_integers_are_shared() -> None:
    with sordino.simulate(agents=2) as fleet:
        fixed = sordino.fix_precision(torch.tensor([1.0, 1 / 3]), f=10)
        shared = fixed.share(*fleet)
        assert "FixedPrecisionTensor(f=10) > MPCTensor" in repr(shared)
        assert torch.equal(shared.reconstruct().child.get(), fixed.child.get())
        with pytest.raises(WrongPlace, match="has 10 fraction bits, not 12"):
            fleet.share(fixed, *fleet, f=12)
