"""Pointers: ops, views, writes, what is sent, what is refused, what fails there."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sordino_server as sordino
from sordino_agent.policy import Policy
from sordino_common.errors import LocalError
from sordino_server.tensors.errors import HiddenValue, RemoteFailure, UnsupportedOperation, WrongPlace
from sordino_server.tensors.fleet import PointerFleet, RemoteAgent, Sent


@pytest.fixture
def fleet() -> Iterator[PointerFleet]:
    with sordino.simulate(agents=2) as fleet:
        yield fleet


@pytest.fixture
def alice(fleet: PointerFleet) -> RemoteAgent:
    return fleet["alice"]


def runs(fleet: PointerFleet) -> list[Sent]:
    return [sent for sent in fleet.trace() if sent.kind == "tensor-run"]


def stored(agent: RemoteAgent) -> int:
    driver: Any = agent.fleet._driver
    core = driver.fleet.agents[agent.name].core
    return int(core.health().store_tensors)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sordino_server as s, sys; assert 'torch' not in sys.modules; assert 'PointerTensor' in s.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_pointer_shows_is_chain_dtype_and_shape(alice: RemoteAgent) -> None:
    x = alice.send(torch.tensor([[123.5, 2.0]]))
    assert repr(x) == str(x) == f"{x}" == "PointerTensor(alice) float32[1, 2]"
    assert repr(x.sum().requires_grad_()) == "PointerTensor(alice) float32[], requires_grad"
    assert (x.child, x.parent, list(x.links())) == (None, None, [x])
    assert repr(sordino.LocalTensor(torch.ones(2))) == "LocalTensor > Tensor float32[2]"


def test_nothing_is_sent_before_it_is_needed_and_dead_code_never(fleet: PointerFleet, alice: RemoteAgent) -> None:
    x = alice.send(torch.tensor([1.0, 2.0, 3.0]))
    dead = [x.exp() for _ in range(5)]
    del dead
    y = (x * 2).sum() + (x * 2).sum()  # computed once
    assert not runs(fleet)
    assert y.get() == 24.0
    (run,) = runs(fleet)
    assert (run.nodes, run.outputs) == (3, 1)
    assert all(line.split(":")[0] == __file__ for line in run.lines)


def test_the_second_equal_program_sends_no_plan(fleet: PointerFleet, alice: RemoteAgent) -> None:
    bob = fleet["bob"]
    for agent in (alice, alice, bob, alice):
        x = agent.send(torch.arange(4.0))
        assert torch.equal((x * x + 1).get(), torch.arange(4.0) ** 2 + 1)
    assert [(run.agent, run.new) for run in runs(fleet)] == [
        ("alice", True),
        ("alice", False),
        ("bob", True),
        ("alice", False),
    ]
    assert fleet.compiler.traces == 1


def test_a_result_is_asked_for_behind_its_run(
    fleet: PointerFleet, alice: RemoteAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver: Any = fleet._driver
    core, drive, turns = driver.fleet.agents["alice"].core, driver.drive, []
    monkeypatch.setattr(driver, "drive", lambda generator: turns.append(1) or drive(generator))
    x = alice.send(torch.arange(3.0))
    for overtakes, trips, gets in ((False, 1, 1), (True, 2, 2)):
        kept = [(x * 2).sum() for _ in range(2)]  # the one that is asked for is the first output, whatever else is sent
        assert kept[1].get() == 6.0
        if overtakes:  # the run
            monkeypatch.setattr(core._desk, "after", lambda runs, then: then())
        kept = [x * 2, (x * 2).sum()]
        del turns[:]
        since = len(fleet.trace())
        assert kept[1].get() == 6.0
        assert len(turns) == trips
        assert [sent.kind for sent in fleet.trace()[since:]].count("tensor-get") == gets


def test_numbers_that_change_become_inputs(fleet: PointerFleet, alice: RemoteAgent) -> None:
    x = alice.send(torch.tensor([1.0, 2.0]))
    for step in range(6):
        assert torch.equal((x * (0.5 + step) + 0.25).get(), torch.tensor([1.0, 2.0]) * (0.5 + step) + 0.25)
    assert [run.new for run in runs(fleet)] == [True, True, False, False, False, False]


def test_calls_that_only_look_alike_are_told_apart(alice: RemoteAgent) -> None:
    plain = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    x, whole = alice.send(plain), alice.send(torch.arange(4))
    for number in (1, 1.0, True, 0.0, -0.0, 2, 2.5):
        assert torch.equal((whole * number).get(), torch.arange(4) * number)
        assert (whole * number).get().dtype == (torch.arange(4) * number).dtype
        for op in (torch.pow, torch.mul, torch.ge, lambda t, n: n / t.clamp(min=n)):
            got, want = op(x, number).get(), op(plain, number)
            assert (got.dtype, str(got)) == (want.dtype, str(want))  # -0 is not 0, nor is it equal to nan
    for keep in (True, False):
        for dims in ((0,), (1,), (0, 1)):
            assert torch.equal(x.sum(dims, keepdim=keep).get(), plain.sum(dims, keepdim=keep))
    assert x.to(torch.int64).get().dtype == torch.int64
    assert x.to(torch.float64).get().dtype == torch.float64


def test_writes_reach_views_and_views_reach_their_base(alice: RemoteAgent) -> None:
    plain = torch.arange(12.0).reshape(3, 4)
    x = alice.send(plain)

    def program(t: torch.Tensor) -> list[torch.Tensor]:
        row, turned, flat, tail = t[1], t.t(), t.view(-1), t[:, 2:]
        inner = tail.t()[0]
        t += 1
        row *= 2
        turned[0] = 7
        flat[5:7].zero_()
        inner.add_(100)
        t.detach()[2, 3] = -1
        return [t, row, turned, flat, tail, inner]

    for got, want in zip(program(x), program(plain.clone()), strict=True):
        assert torch.equal(got.get(), want)  # type: ignore[attr-defined]


def test_views_follow_their_base_over_a_flush(fleet: PointerFleet, alice: RemoteAgent) -> None:
    x = alice.send(torch.zeros(4))
    view = x[1:3]
    assert torch.equal(view.get(), torch.zeros(2))
    x += 1
    fleet.flush()
    assert torch.equal(view.get(), torch.ones(2))
    view += 1
    assert torch.equal(x.get(), torch.tensor([1.0, 2.0, 2.0, 1.0]))


def test_move_and_copies(fleet: PointerFleet, alice: RemoteAgent) -> None:
    bob = fleet["bob"]
    x = alice.send(torch.ones(2, requires_grad=True))
    moved = x.move(bob)
    assert moved.requires_grad
    assert repr(moved) == "PointerTensor(bob) float32[2], requires_grad"
    assert x.move(alice) is x
    other = copy.deepcopy(x)
    with torch.no_grad():
        other += 1
    assert torch.equal(x.get(), torch.ones(2))


def test_dtypes_travel(alice: RemoteAgent) -> None:
    for dtype in (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool):
        plain = torch.tensor([[1, 0, 3]]).to(dtype)
        x = alice.send(plain)
        assert torch.equal(x.get(), plain)
        assert torch.equal((x == x).get(), plain == plain)
    with pytest.raises(WrongPlace, match="dtype complex64 is not one of"):
        alice.send(torch.ones(2, dtype=torch.complex64))
    assert alice.send(torch.ones(3)).double().get().dtype == torch.float64
    assert torch.equal((alice.send(torch.arange(3)) * 0.5).get(), torch.arange(3) * 0.5)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: f"{x.sum():.2f}",
        lambda x: 1.0 in x,
        lambda x: [0, 1][x.sum()],
        lambda x: copy.copy(x),
    ],
)
def test_values_are_not_told(alice: RemoteAgent, ask: Any) -> None:
    x = alice.send(torch.tensor([12345.5, 1.0]))
    with pytest.raises(
        HiddenValue, match=r"needs the values of PointerTensor\(alice\) .* fetch .* with \.get\(\)"
    ) as e:
        ask(x)
    assert "12345" not in str(e.value)


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (lambda x: x.sort(), "aten::sort on PointerTensor(alice): {line}: aten op sort.default is not in the op table"),
        (lambda x: x.cumsum(0), "write a product with a triangular matrix of ones"),
        (lambda x: x[x > 0], "write torch.where with three arguments, or a product with a mask"),
        (lambda x: torch.rand_like(x), "it is random"),
        (lambda x: torch.equal(x, x), "write (a == b).all() kept as a tensor, or fetch both"),
        (lambda x: torch.add(x, x, out=x.clone()), "writes into an `out` tensor"),
        (lambda x: x.to("meta"), "where PointerTensor(alice) computes is its owner's choice"),
        (lambda x: x.expand(2, 3).add_(1), "writes into a view (aten::expand)"),
        (lambda x: x.reconstruct(), "reconstruct on PointerTensor(alice): it is not shared"),
        (lambda x: x.float_precision(), "float_precision on PointerTensor(alice): it is no fixed point"),
        (lambda x: setattr(x, "data", x), "assignment to .data"),
    ],
)
def test_operations_without_meaning_are_refused_by_name(alice: RemoteAgent, op: Any, words: str) -> None:
    x = alice.send(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(UnsupportedOperation) as refusal:
        op(x)
    place = next(part for part in str(refusal.value).split() if part.startswith(__file__)) if "{line}" in words else ""
    assert words.format(line=place.rstrip(":")) in str(refusal.value)
    assert torch.equal((x + 1).get(), torch.tensor([2.0, 3.0, 4.0]))  # nothing has changed


def test_operands_in_different_places_are_refused(fleet: PointerFleet, alice: RemoteAgent) -> None:
    x, y = alice.send(torch.ones(3)), fleet["bob"].send(torch.ones(3))
    with pytest.raises(WrongPlace, match=r"one operand is on alice, another on bob; bring them together with \.move"):
        x + y
    with pytest.raises(WrongPlace, match=r"one operand is here .* send it first with agent\.send"):
        x + torch.ones(3)
    with pytest.raises(WrongPlace, match="write a remote value into a tensor that is here"):
        torch.ones(3).add_(x)
    with pytest.raises(WrongPlace, match="no agent 'dave' in this fleet; there are alice, bob"):
        fleet["dave"]
    assert torch.equal((x * torch.tensor(2.0)).get(), torch.full((3,), 2.0))  # a number, as PyTorch has it


def test_a_remote_failure_names_the_users_own_line(fleet: PointerFleet, alice: RemoteAgent) -> None:
    table, fine = alice.send(torch.arange(3.0)), alice.send(torch.ones(2))
    row = alice.send(torch.tensor([1, 9]))
    picked = torch.gather(table, 0, row)  # the line
    text = Path(__file__).read_text("utf-8").splitlines()
    line = next(k for k, words in enumerate(text, 1) if words.endswith("# the line"))
    with pytest.raises(RemoteFailure, match=re.escape(f"{__file__}:{line}")) as failure:
        (picked * 2).get()
    assert (failure.value.agent, failure.value.reason.split(":")[0]) == ("alice", "plan")
    with pytest.raises(RemoteFailure):
        picked + 1  # whoever uses it is told
    assert torch.equal((fine + 1).get(), torch.full((2,), 2.0))


def test_of_two_equal_programs_the_one_that_fails_is_named(alice: RemoteAgent) -> None:
    table = alice.send(torch.arange(3.0))
    good, bad = alice.send(torch.tensor([1, 2])), alice.send(torch.tensor([1, 9]))
    assert (torch.gather(table, 0, good) * 2).sum().get() == 6.0
    picked = torch.gather(table, 0, bad)  # the bad one
    text = Path(__file__).read_text("utf-8").splitlines()
    line = next(k for k, words in enumerate(text, 1) if words.endswith("# the bad one"))
    with pytest.raises(RemoteFailure, match=re.escape(f"(recorded at {__file__}:{line})")):
        (picked * 2).sum().get()


@pytest.mark.parametrize("cell", ["<stdin>", "<ipython-input-7-0a1b2c>", "/tmp/ipykernel_42/1234.py"])
def test_lines_of_a_prompt_or_a_notebook_are_the_users(alice: RemoteAgent, cell: str) -> None:
    space: dict[str, Any] = {"x": alice.send(torch.ones(3)), "torch": torch}
    code = "y = x + 1\n\ny.cumsum(0)"
    with pytest.raises(UnsupportedOperation, match=re.escape(f"{cell}:3: ")):
        exec(compile(code, cell, "exec"), space)


def test_a_policy_refusal_is_told_and_what_was_recorded_is_kept() -> None:
    with sordino.simulate(agents=1, policy=Policy(jobs=("tensors",), plans="any")) as fleet:
        x = fleet["alice"].send(torch.ones(2))
        with pytest.raises(RemoteFailure, match=r"get on alice: policy: .*policy\.fetch"):
            x.get()
    with sordino.simulate(agents=1, policy=Policy(jobs=("tensors",), fetch="any")) as fleet:
        x = fleet["alice"].send(torch.ones(2))
        y = x + 1
        for _ in range(2):
            with pytest.raises(RemoteFailure, match=r"policy\.plans"):
                y.get()
        driver: Any = fleet._driver
        core = driver.fleet.agents["alice"].core
        core._policy = Policy(jobs=("tensors",), plans="any", fetch="any")
        assert torch.equal(y.get(), torch.full((2,), 2.0))


def test_a_store_that_is_full_refuses_by_name(alice: RemoteAgent) -> None:
    held = [alice.send(torch.zeros(1 << 21)) for _ in range(3)]
    with pytest.raises(RemoteFailure, match=r"limit: tensor store: .*limits\.store_bytes"):
        held += [alice.send(torch.zeros(1 << 21)) for _ in range(2)]


def test_what_dies_here_is_freed_there_with_the_next_run(fleet: PointerFleet, alice: RemoteAgent) -> None:
    x = alice.send(torch.ones(3))
    for _ in range(4):
        x = x + 1
        fleet.flush()
        gc.collect()
    assert stored(alice) <= 2  # the last one, and the one that its run has read
    assert not [sent for sent in fleet.trace() if sent.kind == "tensor-drop"]
    fleet.close()
    assert [sent.kind for sent in fleet.trace()][-1] == "tensor-drop"
    with pytest.raises(LocalError, match="this fleet is closed; its tensors are freed"):
        x.get()
