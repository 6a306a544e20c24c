"""Tensors on secret shares: what is computed, what is shown, what is refused, what is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sordino_server as sordino
from sordino_server.tensors.errors import HiddenValue, UnsupportedOperation, WrongPlace
from sordino_server.tensors.fleet import PointerFleet


@pytest.fixture(scope="module")
def fleet() -> Iterator[PointerFleet]:
    with sordino.simulate(agents=3) as fleet:
        yield fleet


def test_two_tensors_added_and_multiplied(fleet: PointerFleet) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(3, 4), torch.randn(4, 2)
    alice, bob = fleet["alice"], fleet["bob"]
    xs, ys = fleet.share(x, alice, bob), fleet.share(y, bob, alice)
    assert repr(xs) == (
        "FixedPrecisionTensor(f=14) > MPCTensor[2, active] > PointerTensor(alice:…), PointerTensor(bob:…) float32[3, 4]"
    )
    z = (xs @ ys) * 2 + 1
    assert torch.allclose(z.get(), x @ y * 2 + 1, atol=1e-3)
    assert torch.allclose(xs.get(), x, atol=2**-14)
    assert torch.allclose((xs * xs - xs).mean(dim=0).get(), (x * x - x).mean(dim=0), atol=1e-3)


def test_links(fleet: PointerFleet) -> None:
    alice, bob, carol = fleet
    xs = fleet.share(torch.ones(2), alice, bob, carol, security="passive", f=12)
    assert isinstance(xs, sordino.FixedPrecisionTensor)
    below = xs.child
    assert isinstance(below, sordino.MPCTensor)
    assert below.parent is xs
    assert repr(below).startswith("MPCTensor[3, passive] > PointerTensor(alice:…), PointerTensor(bob:…), ")
    assert [share.parent for share in below.shares] == [below] * 3
    for operation in (lambda: below + 1, lambda: below.shares[0] + 1, below.get, below.shares[0].get):
        with pytest.raises(UnsupportedOperation):
            operation()
    fixed = xs.reconstruct()
    assert repr(fixed) == "FixedPrecisionTensor(f=12) > LocalTensor > Tensor float32[2]"
    assert torch.equal(fixed.float_precision(), torch.ones(2))


def test_values_are_hidden(fleet: PointerFleet) -> None:
    xs = fleet.share(torch.ones(()), *fleet)
    for operation in (bool, float, int, lambda t: t.item(), lambda t: t.tolist(), lambda t: t.numpy(), "{:.2f}".format):
        with pytest.raises(HiddenValue, match=r"\.get\(\)"):
            operation(xs)


def test_what_shares_cannot_compute_is_refused_at_the_users_line(fleet: PointerFleet) -> None:
    xs = fleet.share(torch.ones(2, 2), *fleet)
    for operation, words in (
        (lambda: torch.relu(xs), "relu.*MPCTensor.*comparison.*sordino.sigmoid"),
        (lambda: xs > 0, r"aten::gt.*comparison of secrets"),
        (lambda: xs.softmax(dim=1), "softmax.*MPCTensor"),
        (lambda: torch.sigmoid(xs), "sigmoid.*polynomial sigmoid.*sordino.sigmoid"),
        (lambda: xs / xs, "div.*MPCTensor"),
        (lambda: xs.sqrt(), "sqrt"),
    ):
        with pytest.raises(UnsupportedOperation, match=f"(?s)test_tensors_shares.py:[0-9]+: .*{words}"):
            operation()


def test_operands_are_not_brought_together_by_themselves(fleet: PointerFleet) -> None:
    alice, bob, carol = fleet
    xs = fleet.share(torch.ones(2), alice, bob)
    for other in (
        torch.ones(2),
        alice.send(torch.ones(2)),
        fleet.share(torch.ones(2), alice, carol),
        fleet.share(torch.ones(2), alice, bob, f=10),
        fleet.share(torch.ones(2), alice, bob, security="passive"),
        sordino.fix_precision(torch.ones(2)),
    ):
        with pytest.raises((WrongPlace, UnsupportedOperation)):
            xs + other
    with pytest.raises(WrongPlace, match="2 to 4 different agents"):
        fleet.share(torch.ones(2), alice)
    with pytest.raises(WrongPlace, match="beyond the 8 that is stated"):
        fleet.share(torch.full((2,), 9.0), alice, bob)
