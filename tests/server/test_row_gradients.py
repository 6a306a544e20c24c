"""Law: the gradient Plan's rows are what `torch.func.vmap(grad)` gives, and what mixes rows is refused at its line."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from helpers_models import CASES, Case, arrays, clipped_gradients, torch_loss, torch_optimizer
from sordino_common.errors import PlanError
from sordino_common.plan.gradients import OuterRows, RowGradients, WholeRows, require_apply, row_gradients
from sordino_common.plan.interpreter import NumpyProgram
from sordino_common.plan.plan import decode_plan
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.torch_executor import TorchProgram
from sordino_common.plan.values import Plan
from sordino_server.trace.optimizers import Adam, Optimizer, Sgd
from sordino_server.trace.row_gradients import apply_plan, gradient_plan

EXECUTORS = (NumpyProgram, TorchProgram)
X, Y = TensorSpec("float32", (4,)), TensorSpec("float32", ())


def traced(case: Case, rows: int, model: nn.Module) -> tuple[Plan, RowGradients]:
    plan = gradient_plan(model, loss=case.loss, x=case.x, y=case.y, batch_rows=rows)
    decoded = decode_plan(plan.data)
    assert decoded == plan.plan
    return decoded, row_gradients(decoded)


def whole(layout: RowGradients, outputs: list[np.ndarray]) -> list[np.ndarray]:
    """[B, *shape] for every block."""
    return [
        outputs[block.output]
        if isinstance(block, WholeRows)
        else np.einsum("bm,bn->bmn", outputs[block.left], outputs[block.right])
        for block in layout.blocks
    ]


def by_vmap(model: nn.Module, loss: str, x: Tensor, y: Tensor) -> list[np.ndarray]:
    """The oracle: PyTorch's own gradient of its own loss, row by row."""
    named = {name: p.detach() for name, p in model.named_parameters()}

    def of_row(params: dict[str, Tensor], x_row: Tensor, y_row: Tensor) -> Tensor:
        prediction = functional_call(model, params, (x_row.unsqueeze(0),), tie_weights=True)
        return torch_loss(loss, prediction, y_row.unsqueeze(0))

    gradients = vmap(grad(of_row), in_dims=(None, 0, 0))(named, x, y)
    return [gradients[name].numpy() for name in named]


def assert_rows_are(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        scale = max(1e-6, float(np.abs(theirs).max(initial=0)))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6 * max(scale, 1))


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("name", CASES)
def test_rows_equal_vmap_of_grad(name: str, rows: int) -> None:
    case = CASES[name]
    model = case.model()
    plan, layout = traced(case, rows, model)
    assert layout.rows == rows
    assert [block.name for block in layout.blocks] == [key for key, _ in model.named_parameters()]
    x, y = case.batch(rows)
    expected = by_vmap(model, case.loss, x, y)
    losses = torch_loss(case.loss, model(x), y, reduction="none").detach().numpy()
    for program in EXECUTORS:
        outputs = program(plan).run([*arrays(list(model.parameters())), x.numpy(), y.numpy()])
        assert_rows_are(whole(layout, outputs), expected)
        np.testing.assert_allclose(outputs[layout.loss], losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_rows_equal_vmap_of_grad_over_drawn_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, inputs, hidden, outputs = (int(n) for n in rng.integers(1, 7, 4))
    activation = (nn.Sigmoid, nn.ReLU, nn.Tanh)[seed % 3]
    if seed % 2:
        loss = ("mse", "bce_with_logits")[seed % 4 // 2]
        case = Case(
            build=lambda: nn.Sequential(
                nn.Linear(inputs, hidden, bias=seed % 3 > 0), activation(), nn.Linear(hidden, 1)
            ),
            loss=loss,
            x=TensorSpec("float32", (inputs,)),
        )
    else:
        channels, kernel, side = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(6, 10))
        stride, padding = int(rng.integers(1, 3)), int(rng.integers(0, 2))
        pool = (nn.MaxPool2d, nn.AvgPool2d)[seed % 4 // 2](2)
        body = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel, stride=stride, padding=padding), activation(), pool, nn.Flatten()
        )
        width = body(torch.zeros(1, channels, side, side)).shape[1]
        case = Case(
            build=lambda: nn.Sequential(
                nn.Conv2d(channels, hidden, kernel, stride=stride, padding=padding),
                activation(),
                pool,
                nn.Flatten(),
                nn.Linear(width, outputs + 1),
            ),
            loss="cross_entropy",
            x=TensorSpec("float32", (channels, side, side)),
            classes=outputs + 1,
        )
    model = case.model(seed)
    plan, layout = traced(case, rows, model)
    x, y = case.batch(rows, seed)
    found = NumpyProgram(plan).run([*arrays(list(model.parameters())), x.numpy(), y.numpy()])
    assert_rows_are(whole(layout, found), by_vmap(model, case.loss, x, y))


def test_linear_layers_leave_as_two_factors() -> None:
    """No [B, m, n] is made for them, in whichever way they are written."""

    class OwnWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(4, 6))
            self.second = nn.Parameter(torch.randn(3, 6))
            self.last = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(torch.tanh(x @ self.first) @ self.second.t()))

    case = Case(build=OwnWeights, loss="mse", x=X)
    plan, layout = traced(case, 5, case.model())
    kinds = {block.name: type(block) for block in layout.blocks}
    assert kinds == {
        "first": OuterRows,
        "second": OuterRows,
        "last.weight": OuterRows,
        "last.bias": WholeRows,
    }
    assert max(out.numel for node in plan.nodes for out in node.outs) <= 5 * 6


def test_the_dimension_that_vmap_leaves_costs_nothing() -> None:
    """13-64-1 over 32 rows: 14 operations, none of them on [32, 1, 64]."""
    mlp = nn.Sequential(nn.Linear(13, 64), nn.Sigmoid(), nn.Linear(64, 1))
    plan = gradient_plan(mlp, loss="mse", x=TensorSpec("float32", (13,)), y=Y, batch_rows=32).plan
    assert len(plan.nodes) <= 14
    assert max(out.rank for node in plan.nodes for out in node.outs) == 2
    layout = row_gradients(plan)
    assert [block.rides for block in layout.blocks if isinstance(block, WholeRows)] == [0, 3]


@pytest.mark.parametrize("program", EXECUTORS)
def test_outputs_for_reading_only_are_the_same(program) -> None:
    case = CASES["cnn-relu-max"]
    model = case.model()
    plan, _ = traced(case, 3, model)
    x, y = case.batch(3)
    inputs = [*arrays(list(model.parameters())), x.numpy(), y.numpy()]
    ready = program(plan)
    for ours, shared in zip(ready.run(inputs), ready.run(inputs, own=False), strict=True):
        np.testing.assert_array_equal(ours, shared)


def test_a_linear_layer_over_a_sequence_has_whole_rows() -> None:
    """Its gradient is a sum of outer products, one for each place of the sequence."""
    case = Case(
        build=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)),
        loss="mse",
        x=TensorSpec("float32", (2, 3)),
    )
    model = case.model()
    plan, layout = traced(case, 5, model)
    assert [type(block) for block in layout.blocks] == [WholeRows, WholeRows, OuterRows, WholeRows]
    x, y = case.batch(5)
    found = NumpyProgram(plan).run([*arrays(list(model.parameters())), x.numpy(), y.numpy()])
    assert_rows_are(whole(layout, found), by_vmap(model, case.loss, x, y))


@pytest.mark.parametrize("name", ["mlp-relu-bce", "cnn-relu-max", "cnn-sigmoid-avg", "normalised", "tied"])
def test_padding_rows_change_no_other_row(name: str) -> None:
    """A sample of any size, zero included, runs in a Plan of B rows: the rest is zeros and ignored. Bit for bit."""
    case = CASES[name]
    model = case.model()
    plan, layout = traced(case, 5, model)
    x, y = (batch.numpy() for batch in case.batch(5))
    program, params = NumpyProgram(plan), arrays(list(model.parameters()))
    full = whole(layout, program.run([*params, x, y]))
    for sample in (0, 1, 4):
        padded_x, padded_y = np.zeros_like(x), np.zeros_like(y)
        padded_x[:sample], padded_y[:sample] = x[:sample], y[:sample]
        for ours, theirs in zip(whole(layout, program.run([*params, padded_x, padded_y])), full, strict=True):
            np.testing.assert_array_equal(ours[:sample], theirs[:sample])
            assert np.isfinite(ours).all()


@pytest.mark.parametrize("name", ["mlp-relu-bce", "cnn-relu-max", "cnn-sigmoid-avg", "own-lines", "normalised"])
@pytest.mark.parametrize(("rows", "clip_norm"), [(1, 0.1), (6, 0.5), (6, 1e3)])
def test_the_clipped_mean_equals_a_loop_over_rows(name: str, rows: int, clip_norm: float) -> None:
    case = CASES[name]
    model = case.model()
    plan, layout = traced(case, rows, model)
    x, y = case.batch(rows)
    outputs = NumpyProgram(plan).run([*arrays(list(model.parameters())), x.numpy(), y.numpy()])
    blocks = [block.astype(np.float64).reshape(rows, -1) for block in whole(layout, outputs)]
    norms = np.sqrt(sum((block * block).sum(1) for block in blocks))
    factors = np.minimum(1.0, clip_norm / np.maximum(norms, 1e-30))
    for block, want in zip(blocks, clipped_gradients(model, case.loss, x, y, clip_norm), strict=True):
        np.testing.assert_allclose(factors @ block / rows, want.numpy().reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [Sgd(lr=0.05), Sgd(lr=0.05, momentum=0.9), Adam(lr=0.01)], ids=str)
def test_the_step_equals_torch_optim(optimizer: Optimizer) -> None:
    case = CASES["mlp-tanh-mse"]
    model = case.model()
    _, layout = traced(case, 3, model)
    applied = apply_plan(model, optimizer=optimizer)
    plan = decode_plan(applied.data)
    require_apply(plan, layout)
    program = NumpyProgram(plan)
    params = arrays(list(model.parameters()))
    state = [np.zeros(entry.spec.shape, np.float32) for entry in plan.inputs if entry.role == "state"]
    theirs = torch_optimizer(optimizer, list(model.parameters()))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=generator) for p in params]
        results = program.run([*params, *state, *(g.numpy() for g in gradients)])
        params, state = results[: len(params)], results[len(params) :]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        theirs.step()
    for ours, parameter in zip(params, model.parameters(), strict=True):
        np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_frozen_parameters_have_no_rows_and_pass_through() -> None:
    case = CASES["mlp-tanh-mse"]
    model = case.model()
    next(iter(model.parameters())).requires_grad_(False)
    _, layout = traced(case, 3, model)
    assert [block.name for block in layout.blocks] == [key for key, _ in model.named_parameters()][1:]
    applied = apply_plan(model, optimizer=Adam(lr=0.1)).plan
    require_apply(applied, layout)
    assert applied.outputs[0].value == 0


def test_a_label_out_of_range_is_the_nearest_class() -> None:
    """A plain step stops at it; here that would tell of one row that it has such a label."""
    case = CASES["cnn-relu-max"]
    model = case.model()
    plan, layout = traced(case, 3, model)
    x, _ = case.batch(3)
    params, program = arrays(list(model.parameters())), NumpyProgram(plan)
    outside = program.run([*params, x.numpy(), np.array([-100, 3, 1 << 40], np.int64)])
    inside = program.run([*params, x.numpy(), np.array([0, 2, 2], np.int64)])
    for ours, theirs in zip(whole(layout, outside), whole(layout, inside), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- refusals ----------------------------------------------------------------------------------------------------


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.inner = Centre()
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.layer(x)))


class Centre(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)  # HERE: the rows meet


class ByTheSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(x.shape[0])


def refuse(model: nn.Module, told: str, x: TensorSpec = X, rows: int = 3) -> str:
    with pytest.raises(PlanError, match=told) as refused:
        gradient_plan(model, loss="mse", x=x, y=Y, batch_rows=rows)
    return str(refused.value)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_meet_in_the_model_are_refused_at_its_line(rows: int) -> None:
    text = refuse(Centred(), r"mixes the rows.*\(mean\).*reduces over dimension 0.*GroupNorm", rows=rows)
    lines, start = inspect.getsourcelines(Centre)
    line = start + next(i for i, text in enumerate(lines) if "HERE" in text)
    assert f"test_row_gradients.py:{line} (module 'inner', Centre)" in text


def test_statistics_over_the_batch_are_refused() -> None:
    image = TensorSpec("float32", (2, 4, 4))
    head = [nn.Flatten(), nn.Linear(32, 1)]
    text = refuse(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), *head), "mixes the rows", image)
    assert "module '0', BatchNorm2d" in text
    assert "use nn.GroupNorm or nn.LayerNorm" in text
    refuse(nn.Sequential(nn.BatchNorm2d(2), *head), "BatchNorm2d.*use nn.GroupNorm or nn.LayerNorm", image)
    refuse(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), "BatchNorm1d.*use nn.GroupNorm")


def test_a_prediction_that_depends_on_the_batch_size_is_refused() -> None:
    refuse(ByTheSize(), "must not depend on the size of the batch")


def test_an_unclamped_index_is_refused_and_tells_the_remedy() -> None:
    words = TensorSpec("int64", (2,))
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 1))
    text = refuse(model, r"embedding.*outside \[0, 5\).*clamp it to 0\.\.4", words)
    assert "module '0', Embedding" in text


def test_a_parameter_without_influence_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    refuse(Idle(), "does not depend on parameter 'idle.weight'")


def test_nothing_trainable_is_refused() -> None:
    model = nn.Linear(4, 1).requires_grad_(False)
    refuse(model, "nothing to train")
    with pytest.raises(PlanError, match="nothing to train"):
        apply_plan(model, optimizer=Sgd(lr=0.1))
