"""Training, evaluation and moments against plain NumPy and plain PyTorch; the stream of batches; what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers_agent import (
    DOUBLE_PLAN,
    EVALUATE_PLAN,
    TRAIN_PLAN,
    data_ref,
    evaluate_command,
    small_table,
    train_command,
    workshop_of,
    zero_params,
)
from sordino_agent.batches import feature_rows, row_stream, step_count, target_rows
from sordino_agent.data.table import Table, table_of
from sordino_agent.errors import BadCommand, Cancelled, Diverged, UnknownData
from sordino_agent.tasks import EvaluateTask, MomentsTask, PlanTask, RunTask, TrainFacts, TrainTask
from sordino_common import messages as m
from sordino_common.errors import LimitExceeded, PlanError, PolicyRefusal
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.spec import TensorSpec

# --- the stream of batches ---------------------------------------------------------------------------------------


@given(rows=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**63 - 1), round_=st.integers(0, 9))
def test_stream_is_shuffled_passes_cut_into_batches(rows: int, batch: int, seed: int, round_: int) -> None:
    stream = row_stream(rows, batch_rows=batch, seed=seed, round=round_, name="pi-01")
    taken = list(itertools.islice(stream, 3 * rows // batch + 2))
    assert all(len(one) == batch for one in taken)
    joined = np.concatenate(taken)
    for start in range(0, len(joined) - rows + 1, rows):
        assert sorted(joined[start : start + rows]) == list(range(rows))


def test_stream_is_the_recorded_one() -> None:
    """The same command must give the same bytes on every device and in every later version."""
    stream = row_stream(7, batch_rows=5, seed=11, round=2, name="pi-01")
    assert [next(stream).tolist() for _ in range(3)] == STREAM
    other = row_stream(7, batch_rows=5, seed=11, round=2, name="pi-02")
    assert next(other).tolist() != STREAM[0]


STREAM = [[0, 2, 3, 6, 4], [1, 5, 1, 4, 0], [3, 5, 6, 2, 6]]


def test_stream_of_nothing_is_refused() -> None:
    with pytest.raises(BadCommand, match="0 rows"):
        next(row_stream(0, batch_rows=5, seed=1, round=1, name="a"))


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"), [(5, 9.0, 5), (0, 1.0, 3), (0, 0.01, 1), (0, 2.5, 8), (0, 0.0, 1)]
)
def test_step_count(steps: int, epochs: float, expected: int) -> None:
    assert step_count(steps=steps, epochs=epochs, rows=100, batch_rows=32) == expected


# --- features and targets ----------------------------------------------------------------------------------------


def test_scaling_and_joining() -> None:
    table = table_of("toy", {"a": np.array([1, 2, 3]), "b": np.array([[1.0, 2], [3, 4], [5, 6]]), "y": np.arange(3)})
    data = m.DataRef(
        dataset="toy", features=("b", "a"), target="y", split="train", offset=(1.0, 2.0, 3.0), scale=(2.0, 4.0, 0.5)
    )
    x = feature_rows(table, data, TensorSpec("float32", (9, 3)))
    assert x.dtype == np.float32
    assert x.tolist() == [[0.0, 0.0, -4.0], [1.0, 0.5, -2.0], [2.0, 1.0, 0.0]]
    data = m.DataRef(dataset="toy", features=("a",), target="y", split="train", target_offset=1.0, target_scale=2.0)
    assert target_rows(table, data, TensorSpec("float64", (9, 1))).tolist() == [[-0.5], [0.0], [0.5]]
    assert target_rows(table, data, TensorSpec("float32", (9,))).shape == (3,)
    plain = m.DataRef(dataset="toy", features=("a",), target="y", split="train")
    assert target_rows(table, plain, TensorSpec("int64", (9,))).tolist() == [0, 1, 2]


def test_tensor_columns_keep_or_take_their_shape() -> None:
    images = np.arange(2 * 6, dtype=np.uint8).reshape(2, 2, 3)
    table = table_of("toy", {"image": images, "y": np.zeros(2)})
    data = m.DataRef(dataset="toy", features=("image",), target="y", split="train", scale=(2.0,) * 6)
    x = feature_rows(table, data, TensorSpec("float32", (5, 1, 2, 3)))
    assert np.array_equal(x, images[:, None] / 2)
    one = m.DataRef(dataset="toy", features=("image",), target="y", split="train", offset=(1.0,), scale=(2.0,))
    x = feature_rows(table, one, TensorSpec("float32", (5, 2, 3)))
    assert np.array_equal(x, (images - 1.0) / 2)  # one entry stands for all elements


@pytest.mark.parametrize(
    ("changes", "spec", "words"),
    [
        ({"features": ("f0", "f1")}, TensorSpec("float32", (8, 3)), "2 numbers a row"),
        ({"features": ("f0", "none")}, TensorSpec("float32", (8, 2)), "no column 'none'"),
        ({"offset": (1.0,)}, TensorSpec("float32", (8, 3)), "offset has 1 entries"),
        ({"scale": (1.0, 0.0, 1.0)}, TensorSpec("float32", (8, 3)), "zero, NaN or infinite"),
        ({"scale": (1.0, float("nan"), 1.0)}, TensorSpec("float32", (8, 3)), "zero, NaN or infinite"),
        ({"scale": (5e-324, 1.0, 1.0)}, TensorSpec("float32", (8, 3)), "too large for float32"),
        ({}, TensorSpec("int64", (8, 3)), "not all are int64"),
    ],
)
def test_features_that_do_not_fit(changes: dict[str, object], spec: TensorSpec, words: str) -> None:
    fields = {"dataset": "toy", "features": ("f0", "f1", "f2"), "target": "y", "split": "train", **changes}
    with pytest.raises((BadCommand, UnknownData), match=words):
        feature_rows(small_table(), m.DataRef(**fields), spec)  # type: ignore[arg-type]


def test_a_target_scaled_to_nothing_is_refused() -> None:
    data = data_ref(target_scale=0.0)
    with pytest.raises(BadCommand, match="target_scale"):
        target_rows(small_table(), data, TensorSpec("float32", (8, 1)))


# --- training ----------------------------------------------------------------------------------------------------


def train_task(command: m.Train | None = None, *, plan: bytes = TRAIN_PLAN, min_rows: int = 2) -> TrainTask:
    return TrainTask(command=command or train_command(), plan=plan, agent="pi-01", min_rows=min_rows)


def trained(table: Table, task: TrainTask) -> TrainFacts:
    facts = workshop_of(table).prepare(task).run(None)
    assert isinstance(facts, TrainFacts)
    return facts


def test_training_equals_torch_on_the_same_batches() -> None:
    torch = pytest.importorskip("torch")
    table = small_table()
    facts = trained(table, train_task())
    model = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.tensor(np.stack([table.columns[f"f{i}"] for i in range(3)], axis=1)[table.train], dtype=torch.float32)
    y = torch.tensor(table.columns["y"][table.train], dtype=torch.float32)[:, None]
    stream = row_stream(30, batch_rows=8, seed=11, round=1, name="pi-01")
    total = 0.0
    for rows in itertools.islice(stream, 12):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert (facts.rows, facts.steps) == (30, 12)
    np.testing.assert_allclose(to_numpy(facts.update[0]), model.weight.detach().numpy().T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(to_numpy(facts.update[1]), model.bias.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert facts.loss_sum == pytest.approx(total, rel=1e-5)


def test_the_same_command_gives_the_same_bytes_and_another_round_others() -> None:
    first = trained(small_table(), train_task())
    assert first == trained(small_table(), train_task())
    assert first != trained(small_table(), train_task(train_command(round=2)))


def test_training_does_not_touch_its_input() -> None:
    params = zero_params()
    trained(small_table(), train_task(train_command(params=params)))
    assert params == zero_params()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_rows": 9}, "batches of 8 rows, the command says 9"),
        ({"params": zero_params()[:1]}, "takes 2 parameters, the command has 1"),
        ({"params": (zero_params()[0], zero_params()[0])}, r"input 'b' is float32\[1\], not float32\[3, 1\]"),
        ({"data": data_ref(split="test")}, "for evaluation only"),
        ({"data": data_ref(dataset="other")}, "no dataset 'other' here; there are: toy"),
    ],
)
def test_commands_that_do_not_fit_their_plan(changes: dict[str, object], words: str) -> None:
    with pytest.raises((BadCommand, UnknownData), match=words):
        workshop_of(small_table()).prepare(train_task(train_command(**changes)))


def test_plans_of_another_kind_are_refused() -> None:
    shop = workshop_of(small_table())
    with pytest.raises(BadCommand, match="gives back every param; 'w' is missing"):
        shop.prepare(train_task(plan=EVALUATE_PLAN))
    with pytest.raises(BadCommand, match="outputs of role row"):
        shop.prepare(EvaluateTask(command=evaluate_command(), plan=TRAIN_PLAN, min_rows=2))
    with pytest.raises(BadCommand, match="one input of role x"):
        shop.prepare(train_task(plan=DOUBLE_PLAN))
    with pytest.raises(PlanError):
        shop.prepare(PlanTask(plan=m.encode(["sordino-plan", 1])))


def test_divergence_is_named_and_not_sent() -> None:
    huge = tuple(from_numpy(np.full(array.shape, 1e30, np.float32)) for array in zero_params())
    with pytest.raises(Diverged, match="local step 1 of 12"):
        trained(small_table(), train_task(train_command(params=huge)))
    with pytest.raises(Diverged, match="local step 1 of 1"):
        trained(small_table(), train_task(train_command(params=huge, steps=1)))


def test_too_few_rows_are_refused_where_the_rows_are() -> None:
    with pytest.raises(PolicyRefusal, match="over 30 rows"):
        workshop_of(small_table()).prepare(train_task(min_rows=31))


def test_memory_is_checked_before_anything_is_made() -> None:
    with pytest.raises(LimitExceeded, match=r"limits\.memory_bytes"):
        workshop_of(small_table(rows=6000, test=10), memory_bytes=600_000).prepare(train_task())


def test_check_stops_training_between_nodes() -> None:
    calls = itertools.count()

    def check() -> None:
        if next(calls) == 25:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        workshop_of(small_table()).prepare(train_task()).run(check)
    assert next(calls) == 26


# --- evaluation, moments, stored tensors -------------------------------------------------------------------------


def test_evaluation_sums_over_every_row_once() -> None:
    table = small_table(rows=31, test=11)  # 11 rows are not a multiple of the batch of 8
    params = tuple(from_numpy(np.full(array.shape, 0.25, np.float32)) for array in zero_params())
    facts = workshop_of(table).prepare(
        EvaluateTask(command=evaluate_command(params=params), plan=EVALUATE_PLAN, min_rows=2)
    )
    result = facts.run(None)
    x = np.stack([table.columns[f"f{i}"] for i in range(3)], axis=1)[table.test]
    errors = (x.sum(axis=1) * 0.25 + 0.25 - table.columns["y"][table.test]) ** 2
    assert result.names == ("loss",)  # type: ignore[union-attr]
    assert result.rows == 11  # type: ignore[union-attr]
    assert result.sums[0] == pytest.approx(errors.sum(), rel=1e-5)  # type: ignore[union-attr]
    assert facts.cost.runs == 2


def test_moments_are_of_the_train_rows() -> None:
    table = small_table()
    task = MomentsTask(command=m.Moments(dataset="toy", columns=("y", "f0")), min_rows=2)
    result = workshop_of(table).prepare(task).run(None).result  # type: ignore[union-attr]
    values = table.columns["y"][table.train]
    assert result.rows == 30
    assert to_numpy(result.sums)[0] == pytest.approx(values.sum())
    assert to_numpy(result.squares)[0] == pytest.approx((values**2).sum())


def test_moments_of_a_tensor_column_are_over_all_its_elements() -> None:
    table = table_of("toy", {"image": np.arange(12.0).reshape(3, 2, 2)})
    task = MomentsTask(command=m.Moments(dataset="toy", columns=("image",)), min_rows=1)
    result = workshop_of(table).prepare(task).run(None).result  # type: ignore[union-attr]
    assert (result.rows, to_numpy(result.sums).tolist()) == (3, [66.0])


def test_moments_that_overflow_are_named() -> None:
    table = table_of("toy", {"a": np.array([1e200, 1.0])})
    with pytest.raises(Diverged, match="too large for float64"):
        workshop_of(table).prepare(MomentsTask(command=m.Moments(dataset="toy", columns=("a",)), min_rows=1)).run(None)


def test_a_plan_on_stored_tensors() -> None:
    value = from_numpy(np.arange(4, dtype=np.float32))
    facts = workshop_of().prepare(RunTask(plan=DOUBLE_PLAN, inputs=(value,))).run(None)
    assert to_numpy(facts.outputs[0]).tolist() == [0.0, 2.0, 4.0, 6.0]  # type: ignore[union-attr]
    wrong = from_numpy(np.arange(4, dtype=np.float64))
    with pytest.raises(BadCommand, match=r"input 't' is float32\[4\], not float64\[4\]"):
        workshop_of().prepare(RunTask(plan=DOUBLE_PLAN, inputs=(wrong,))).run(None)
    with pytest.raises(BadCommand, match="takes 1 tensors"):
        workshop_of().prepare(RunTask(plan=DOUBLE_PLAN, inputs=())).run(None)
