"""What has no place in a Plan is refused when the Plan is made, naming the op, the module and the user's line."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sordino_common.errors import LocalError, PlanError
from sordino_common.plan.spec import TensorSpec
from sordino_server.trace.optimizers import Sgd
from sordino_server.trace.row_gradients import gradient_plan
from sordino_server.trace.steps import evaluation_plan, training_plan
from sordino_server.trace.tracing import trace

X, Y = TensorSpec("float32", (4,)), TensorSpec("float32", ())
ROWS = 3


def train(model: nn.Module):
    return training_plan(model, loss="mse", optimizer=Sgd(lr=0.1), x=X, y=Y, batch_rows=ROWS)


def train_privately(model: nn.Module):
    return gradient_plan(model, loss="mse", x=X, y=Y, batch_rows=ROWS)


def evaluate(model: nn.Module):
    return evaluation_plan(model, loss="mse", x=X, y=Y, batch_rows=ROWS)


PLANS = [train, train_privately, evaluate]


class Inner(nn.Module):
    """Runs `body` on a line of its own."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = inner
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


def sorts(x: Tensor) -> Tensor:
    return torch.sort(x, dim=1).values  # HERE: sorts


def branches(x: Tensor) -> Tensor:
    if x.sum() > 0:  # HERE: branches
        return x
    return -x


def items(x: Tensor) -> Tensor:
    return x * x.sum().item()  # HERE: items


def through_numpy(x: Tensor) -> Tensor:
    return x + torch.from_numpy(x.detach().numpy() * 2.0)  # HERE: through_numpy


def masks(x: Tensor) -> Tensor:
    return x + x[x > 0].sum()  # HERE: masks


def randomly(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)  # HERE: randomly


def halves(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float32)  # HERE: halves


def raises(x: Tensor) -> Tensor:
    return x @ torch.ones(7, 7)  # HERE: raises


def line_of(name: str) -> str:
    """`file:line` of the line in this file that is marked so."""
    lines = inspect.getsource(inspect.getmodule(line_of)).splitlines()  # type: ignore[arg-type]
    (number,) = [index for index, text in enumerate(lines, start=1) if text.endswith(f"# HERE: {name}")]
    return f"{__file__}:{number}"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (sorts, "aten op sort"),
        (branches, "depends on the values"),
        (items, "item()"),
        (masks, "depends on the values"),
        (randomly, "random"),
        (halves, "aten op _to_copy.default: dtype bfloat16 is not one of float32,"),
        (raises, "can't be traced"),
    ],
)
def test_refused_at_the_users_line(body: Callable[[Tensor], Tensor], says: str, plan: Callable) -> None:
    with pytest.raises(PlanError) as caught:
        plan(Net(Inner(body)))
    text = str(caught.value)
    assert line_of(body.__name__) in text
    assert "'inner', Inner" in text
    assert says in text


@pytest.mark.parametrize("plan", PLANS)
def test_a_line_of_the_model_itself_is_named_as_that(plan: Callable) -> None:
    with pytest.raises(PlanError, match=r"\(the model itself, Sorting\): aten op sort") as caught:
        plan(Sorting())
    assert line_of("the model itself") in str(caught.value)


@pytest.mark.parametrize("plan", PLANS)
def test_values_taken_through_numpy_are_refused(plan: Callable) -> None:
    """The tracer can't see NumPy; comparing the Plan with the function on a batch can."""
    with pytest.raises(PlanError):
        plan(Net(Inner(through_numpy)))


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.sort(x, dim=1).values)  # HERE: the model itself


class UnknownBackward(nn.Module):
    """The forward op is in the table, an op of its derivative is not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.prod(x, 1, keepdim=True) * x  # HERE: product


def test_the_backward_pass_names_the_forwards_line() -> None:
    origins = train(Net(Inner(lambda x: torch.tanh(x) * x))).origins
    ours = [origin for origin in origins if "'inner', Inner" in origin]
    assert len(ours) >= 5  # tanh, product; their derivatives
    with pytest.raises(PlanError, match="'inner', UnknownBackward") as caught:
        train(Net(UnknownBackward()))
    assert line_of("product") in str(caught.value)


@pytest.mark.parametrize("plan", [train, train_privately])
def test_dropout_while_training_is_refused_and_without_effect_in_evaluation(plan: Callable) -> None:
    model = Net(nn.Dropout(0.5))
    with pytest.raises(PlanError, match=r"'inner', Dropout.*random.*p=0"):
        plan(model)
    evaluate(model)
    plan(Net(nn.Dropout(0.0)))


@pytest.mark.parametrize("plan", [train, train_privately])
def test_batch_norm_while_training_is_refused(plan: Callable) -> None:
    model = Net(nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"'inner', BatchNorm1d.*buffer.*GroupNorm"):
        plan(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    evaluate(model)  # running statistics are constants there


class Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)  # HERE: counting
        return x * self.calls


@pytest.mark.parametrize("plan", PLANS)
def test_a_buffer_that_changes_is_refused(plan: Callable) -> None:
    model = Net(Counting())
    with pytest.raises(PlanError, match="buffer") as caught:
        plan(model)
    assert line_of("counting") in str(caught.value)
    assert float(model.inner.calls) == 0.0  # type: ignore[arg-type]


class Tuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


def test_a_model_with_several_results_is_refused() -> None:
    with pytest.raises(PlanError, match=r"Tuple: forward returns tuple, expected one tensor"):
        train(Tuple())


def test_parameters_must_be_float32() -> None:
    with pytest.raises(PlanError, match=r"'weight' is float64, expected float32; call model.float"):
        train(nn.Linear(4, 1).double())
    with pytest.raises(PlanError, match="float16"):
        evaluate(nn.Linear(4, 1).half())


def test_parameters_must_be_on_the_cpu() -> None:
    with pytest.raises(PlanError, match="lives on meta, expected cpu"):
        train(nn.Linear(4, 1, device="meta"))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.spare = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("plan", [train, train_privately])
def test_a_parameter_without_influence_is_refused(plan: Callable) -> None:
    model = Unused()
    with pytest.raises(PlanError, match=r"does not depend on parameter 'spare.weight'; remove it or set"):
        plan(model)
    model.spare.requires_grad_(False)
    plan(model)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(PlanError, match="nothing to train"):
        train(nn.Linear(4, 1).requires_grad_(False))


def test_float64_data_is_refused() -> None:
    with pytest.raises(PlanError, match="x is float64"):
        training_plan(
            nn.Linear(4, 1), loss="mse", optimizer=Sgd(lr=0.1), x=TensorSpec("float64", (4,)), y=Y, batch_rows=1
        )


def test_names_must_match_what_the_function_takes_and_gives() -> None:
    with pytest.raises(LocalError, match="1 example inputs, but 0"):
        trace(lambda x: [x], [torch.ones(2)], inputs=[], outputs=[("y", "value")], name="t")
    with pytest.raises(LocalError, match="returns 1 tensors, but 2"):
        trace(
            lambda x: [x],
            [torch.ones(2)],
            inputs=[("x", "x")],
            outputs=[("y", "value"), ("z", "value")],
            name="t",
        )
