"""Law: a Plan, run by NumPy or by torch, does what plain PyTorch does."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch
from torch import nn

from helpers_models import (
    CASES,
    arrays,
    batches_of,
    mnist_cnn,
    run_steps,
    torch_loss,
    torch_optimizer,
)
from sordino_common.errors import ConfigError, PlanError
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.plan import decode_plan, plan_id
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.torch_executor import TorchProgram
from sordino_server.trace.optimizers import Adam, Sgd
from sordino_server.trace.row_gradients import gradient_plan
from sordino_server.trace.steps import evaluation_plan, training_plan

CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32, a few steps: rounding differs, and each step builds on the last
PLAIN = Sgd(lr=0.1)
EXECUTORS = (NumpyProgram, TorchProgram)


def reference(case, model, optimizer, batches):
    """(parameters, losses) of plain PyTorch."""
    model = copy.deepcopy(model)
    own = torch_optimizer(optimizer, list(model.parameters()))
    losses = []
    for x, y in batches:
        own.zero_grad()
        loss = torch_loss(case.loss, model(x), y)
        loss.backward()
        own.step()
        losses.append(float(loss.detach()))
    return arrays(list(model.parameters())), losses


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 7])
def test_training_equals_pytorch(name: str, rows: int) -> None:
    case = CASES[name]
    model = case.model()
    batches = batches_of(case, rows, 4)
    traced = training_plan(model, loss=case.loss, optimizer=PLAIN, x=case.x, y=case.y, batch_rows=rows)
    assert decode_plan(traced.data) == traced.plan
    assert plan_id(traced.data) == traced.plan_id
    assert len(traced.origins) == len(traced.plan.nodes)
    expected, expected_losses = reference(case, model, PLAIN, batches)
    for program in EXECUTORS:
        params, losses = run_steps(program(traced.plan), traced.plan, arrays(list(model.parameters())), batches)
        np.testing.assert_allclose(losses, expected_losses, **CLOSE)
        for got, want in zip(params, expected, strict=True):
            np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize(
    "optimizer",
    [
        Sgd(lr=0.05, momentum=0.9),
        Sgd(lr=0.05, momentum=0.9, nesterov=True),
        Sgd(lr=0.05, weight_decay=0.01),
        Sgd(lr=0.05, momentum=0.5, nesterov=True, weight_decay=0.1),
        Adam(lr=0.01),
        Adam(lr=0.01, beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.05),
    ],
    ids=str,
)
def test_optimizers_equal_torch_optim(optimizer: Sgd | Adam) -> None:
    case = CASES["mlp-tanh-mse"]
    model = case.model()
    batches = batches_of(case, 6, 12)
    traced = training_plan(model, loss=case.loss, optimizer=optimizer, x=case.x, y=case.y, batch_rows=6)
    params, losses = run_steps(NumpyProgram(traced.plan), traced.plan, arrays(list(model.parameters())), batches)
    expected, expected_losses = reference(case, model, optimizer, batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-3, atol=1e-5)
    for got, want in zip(params, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp-sigmoid-mse", "mlp-relu-bce", "cnn-relu-max", "cnn-sigmoid-avg"])
@pytest.mark.parametrize("rows", [1, 5])
def test_evaluation_equals_pytorch(name: str, rows: int) -> None:
    case = CASES[name]
    model = case.model()
    x, y = case.batch(rows)
    traced = evaluation_plan(model, loss=case.loss, x=case.x, y=case.y, batch_rows=rows)
    assert [(entry.role, traced.plan.specs()[entry.value].shape) for entry in traced.plan.outputs] == [
        ("row", (rows,))
    ] * len(traced.plan.outputs)
    with torch.no_grad():
        prediction = model(x)
    hits = prediction.argmax(1) == y if case.classes else (prediction.squeeze(-1) > 0) == (y > 0.5)
    for program in EXECUTORS:
        loss, *rest = program(traced.plan).run([*arrays(list(model.parameters())), x.numpy(), y.numpy()])
        np.testing.assert_allclose(loss, torch_loss(case.loss, prediction, y, reduction="none").numpy(), **CLOSE)
        assert len(rest) == (0 if case.loss == "mse" else 1)
        for correct in rest:
            np.testing.assert_array_equal(correct, hits.float().numpy())


def test_sizes_of_the_plans() -> None:
    """Plans are short. Counted with torch 2.13, batch 32: the MLP 13-64-1's SGD step is 26 nodes over 8 ops; the MNIST
    CNN's is 31 over 20; its gradients of rows are 31 over 21 (derivatives of the losses are stated, views and factors
    merged, outer products left apart).
    """
    mlp = nn.Sequential(nn.Linear(13, 64), nn.Sigmoid(), nn.Linear(64, 1))
    x, y = TensorSpec("float32", (13,)), TensorSpec("float32", ())
    step = training_plan(mlp, loss="mse", optimizer=PLAIN, x=x, y=y, batch_rows=32)
    image, label = TensorSpec("float32", (1, 28, 28)), TensorSpec("int64", ())
    cnn = training_plan(mnist_cnn(), loss="cross_entropy", optimizer=PLAIN, x=image, y=label, batch_rows=32)
    private = gradient_plan(mnist_cnn(), loss="cross_entropy", x=image, y=label, batch_rows=32)
    sizes = [(len(t.plan.nodes), len({node.op for node in t.plan.nodes})) for t in (step, cnn, private)]
    for (nodes, ops), (most_nodes, most_ops) in zip(sizes, [(35, 10), (45, 25), (45, 25)], strict=True):
        assert nodes <= most_nodes
        assert ops <= most_ops


def test_tracing_is_fast() -> None:
    """Under 2 seconds a Plan once PyTorch's decompositions are loaded; measured 0.05 to 0.6 s. Best of three, since
    the machine may be busy."""
    image, label = TensorSpec("float32", (1, 28, 28)), TensorSpec("int64", ())
    seconds = []
    for _ in range(3):
        start = time.process_time()
        gradient_plan(mnist_cnn(), loss="cross_entropy", x=image, y=label, batch_rows=16)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2.0


def test_frozen_parameters_pass_through() -> None:
    case = CASES["mlp-tanh-mse"]
    model = case.model()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    batches = batches_of(case, 4, 3)
    optimizer = Adam(lr=0.1)
    traced = training_plan(model, loss=case.loss, optimizer=optimizer, x=case.x, y=case.y, batch_rows=4)
    assert not any(entry.name.endswith("0.weight") for entry in traced.plan.inputs if entry.role == "state")
    params, _ = run_steps(NumpyProgram(traced.plan), traced.plan, arrays(list(model.parameters())), batches)
    np.testing.assert_array_equal(params[0], first.numpy())
    assert not np.array_equal(params[1], list(model.parameters())[1].detach().numpy())


def test_a_trace_leaves_the_model_alone() -> None:
    case = CASES["own-lines"]
    model = case.model().eval()
    before = copy.deepcopy(model.state_dict())
    training_plan(model, loss=case.loss, optimizer=PLAIN, x=case.x, y=case.y, batch_rows=3)
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_parameters_are_one_input() -> None:
    case = CASES["tied"]
    traced = training_plan(case.model(), loss=case.loss, optimizer=PLAIN, x=case.x, y=case.y, batch_rows=2)
    names = [entry.name for entry in traced.plan.inputs if entry.role == "param"]
    assert names == ["encode.weight", "out.weight", "out.bias"]


def test_several_targets_are_averaged() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    spec_x, spec_y = TensorSpec("float32", (3,)), TensorSpec("float32", (4,))
    traced = training_plan(model, loss="mse", optimizer=PLAIN, x=spec_x, y=spec_y, batch_rows=5)
    params, (loss,) = run_steps(NumpyProgram(traced.plan), traced.plan, arrays(list(model.parameters())), [(x, y)])
    expected = nn.functional.mse_loss(model(x), y)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for got, parameter in zip(params, model.parameters(), strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(got, (parameter - 0.1 * parameter.grad).detach().numpy(), **CLOSE)


@pytest.mark.parametrize(
    ("loss", "outputs", "y"),
    [
        ("mse", 3, TensorSpec("float32", ())),
        ("mse", 1, TensorSpec("float32", (3,))),
        ("mse", 2, TensorSpec("float32", (1,))),
        ("mse", 1, TensorSpec("int64", ())),
        ("bce_with_logits", 2, TensorSpec("float32", ())),
        ("cross_entropy", 3, TensorSpec("float32", ())),
        ("cross_entropy", 3, TensorSpec("int64", (1,))),
        ("cross_entropy", 1, TensorSpec("int64", ())),
    ],
)
def test_shapes_that_would_broadcast_are_refused(loss: str, outputs: int, y: TensorSpec) -> None:
    """[B, 1] against [B] would be [B, B] in PyTorch; here only a last axis of length 1 is dropped, all else refused."""
    with pytest.raises(PlanError, match=f"loss {loss}.*expected"):
        training_plan(
            nn.Linear(2, outputs), loss=loss, optimizer=PLAIN, x=TensorSpec("float32", (2,)), y=y, batch_rows=3
        )


def test_a_column_target_of_one_is_no_ambiguity() -> None:
    model = nn.Linear(2, 1)
    x = TensorSpec("float32", (2,))
    flat = training_plan(model, loss="mse", optimizer=PLAIN, x=x, y=TensorSpec("float32", ()), batch_rows=3)
    column = training_plan(model, loss="mse", optimizer=PLAIN, x=x, y=TensorSpec("float32", (1,)), batch_rows=3)
    features, target = torch.randn(3, 2), torch.randn(3)
    start = arrays(list(model.parameters()))
    ours = run_steps(NumpyProgram(flat.plan), flat.plan, start, [(features, target)])
    theirs = run_steps(NumpyProgram(column.plan), column.plan, start, [(features, target[:, None])])
    assert ours[1] == pytest.approx(theirs[1])


def test_a_label_out_of_range_stops_the_step() -> None:
    case = CASES["cnn-relu-max"]
    model = case.model()
    traced = training_plan(model, loss=case.loss, optimizer=PLAIN, x=case.x, y=case.y, batch_rows=2)
    x, _ = case.batch(2)
    for label in (3, -1, -100):
        y = np.array([0, label], np.int64)
        with pytest.raises(PlanError, match="outside"):
            NumpyProgram(traced.plan).run([*arrays(list(model.parameters())), x.numpy(), y])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sgd(lr=0.0),
        lambda: Sgd(lr=float("nan")),
        lambda: Sgd(lr=0.1, momentum=1.0),
        lambda: Sgd(lr=0.1, nesterov=True),
        lambda: Sgd(lr=0.1, weight_decay=-1.0),
        lambda: Adam(lr=-0.1),
        lambda: Adam(lr=0.1, beta1=1.0),
        lambda: Adam(lr=0.1, beta2=-0.1),
        lambda: Adam(lr=0.1, eps=0.0),
    ],
)
def test_optimizer_settings_are_checked(make) -> None:
    with pytest.raises(ConfigError, match=r"optimizer .*expected"):
        make()


def test_unknown_loss_and_bad_sizes_are_told() -> None:
    x, y = TensorSpec("float32", (2,)), TensorSpec("float32", ())
    with pytest.raises(ConfigError, match="mse, bce_with_logits, cross_entropy"):
        training_plan(nn.Linear(2, 1), loss="hinge", optimizer=PLAIN, x=x, y=y, batch_rows=1)
    with pytest.raises(ConfigError, match="batch_rows"):
        training_plan(nn.Linear(2, 1), loss="mse", optimizer=PLAIN, x=x, y=y, batch_rows=0)
    with pytest.raises(ConfigError, match="batch_rows"):
        gradient_plan(nn.Linear(2, 1), loss="mse", x=x, y=y, batch_rows=0)
