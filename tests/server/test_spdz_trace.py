"""Jobs on secret shares up to the circuit: the job file, polynomial activations, losses, Plans, the plain baseline."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers_job import Edit, refuses, written_job
from helpers_lowering import F, fixed, run_float64
from sordino_common.errors import ConfigError, PlanError
from sordino_common.plan.spec import TensorSpec
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.lowering import Ranges, Settings, lower
from sordino_common.spdz.reference import error_bounds, evaluate, trace
from sordino_common.spdz.spec import Schedule
from sordino_server.baseline import Owned, Pooled, public_pool, run_shares_baseline
from sordino_server.job import Job, load_job
from sordino_server.model import make_model
from sordino_server.model_spdz import SharedModel, settings_of_job, steps_of, trace_spdz, with_steps
from sordino_server.trace.activations import Activations, fitted, polynomial_activations
from sordino_server.trace.losses import BinaryCrossEntropy, MeanSquaredError, OneHot, PolynomialLogistic
from sordino_server.trace.optimizers import Sgd
from sordino_server.trace.steps import prediction_plan, training_plan

EXAMPLES = Path(__file__).parents[2] / "examples"
FITS = fitted(3, 8.0)


# --- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [3, 5])
@pytest.mark.parametrize("interval", [2.0, 5.0, 8.0])
def test_the_fit_is_the_best_in_the_mean(degree: int, interval: float) -> None:
    """Any other coefficients have a larger squared error; the cubic on [-8, 8] is the published one."""
    z = np.linspace(-interval, interval, 40_001)
    for fit, truth in (
        (fitted(degree, interval).sigmoid, 1 / (1 + np.exp(-z))),
        (fitted(degree, interval).tanh, np.tanh(z)),
    ):
        p = fit(torch.from_numpy(z)).numpy()
        best = ((p - truth) ** 2).mean()
        assert math.sqrt(best) == pytest.approx(fit.rms_error, rel=1e-2)
        assert np.abs(p - truth).max() == pytest.approx(fit.largest_error, rel=1e-3)
        for k in range(len(fit.coefficients)):
            for nudge in (-1e-3, 1e-3):
                moved = p + nudge * (z / interval) ** (2 * k + 1)
                assert ((moved - truth) ** 2).mean() > best
    known = fitted(3, 8.0).sigmoid  # Kim et al. (2018), table 2: 0.5 + 1.20096 (z/8) - 0.81562 (z/8)^3
    assert [round(known.coefficients[0] * 8, 3), round(known.coefficients[1] * 512, 3)] == [1.201, -0.816]


@pytest.mark.parametrize("interval", [0.5, 8.0, 64.0])
def test_the_fit_does_not_depend_on_the_quadrature(interval: float) -> None:
    """The same coefficients to 1e-9 by Gauss and Legendre's rule with 400 nodes on the whole interval."""
    u, weight = np.polynomial.legendre.leggauss(400)
    for fit, truth in (
        (fitted(5, interval).sigmoid, 1 / (1 + np.exp(-u * interval))),
        (fitted(5, interval).tanh, np.tanh(u * interval)),
    ):
        powers = np.stack([u, u**3, u**5], axis=1) * np.sqrt(weight)[:, None]
        found = np.linalg.lstsq(powers, (truth - fit.constant) * np.sqrt(weight), rcond=None)[0]
        assert fit.coefficients == pytest.approx(
            [c / interval**k for c, k in zip(found, (1, 3, 5), strict=True)], rel=1e-9
        )


class Layers(nn.Module):
    """The same activation in every way that PyTorch spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 4)
        self.sigmoid, self.tanh = nn.Sigmoid(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        z = self.dense(x)
        ways = [self.sigmoid(z), torch.sigmoid(z), z.sigmoid(), torch.nn.functional.sigmoid(z), torch.special.expit(z)]
        tanhs = [self.tanh(z), torch.tanh(z), z.tanh(), torch.nn.functional.tanh(z)]
        return torch.stack(ways).sum(0) + torch.stack(tanhs).sum(0)


def test_every_spelling_becomes_the_polynomial_and_comes_back() -> None:
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(5, 3)
    before = model(x)
    z = model.dense(x)
    with polynomial_activations(FITS) as used:
        inside = model(x)
    assert used == {"sigmoid", "tanh"}
    torch.testing.assert_close(inside, 5 * FITS.sigmoid(z) + 4 * FITS.tanh(z))
    torch.testing.assert_close(model(x), before)
    with polynomial_activations(FITS), pytest.raises(PlanError, match="sigmoid_ changes a tensor in place"):
        torch.randn(2).sigmoid_()


def test_autograd_gives_the_polynomials_own_derivative() -> None:
    z = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    for fit in (fitted(5, 6.0).sigmoid, fitted(5, 6.0).tanh):
        (slope,) = torch.autograd.grad(fit(z).sum(), z)
        c1, c3, c5 = fit.coefficients
        torch.testing.assert_close(slope, (c1 + 3 * c3 * z**2 + 5 * c5 * z**4).detach())
        (back,) = torch.autograd.grad(fit.integral(z).sum(), z)
        torch.testing.assert_close(back, fit(z).detach())


def test_the_logistic_loss_is_near_the_true_one_and_its_gradient_is_its_derivative() -> None:
    loss, true = PolynomialLogistic(fit=fitted(5, 6.0).sigmoid), BinaryCrossEntropy()
    p = torch.linspace(-5, 5, 41, requires_grad=True)
    for y in (torch.zeros(41), torch.ones(41)):
        rows = loss.rows(p, y)
        assert float((rows - true.rows(p, y)).detach().abs().max()) < 0.13
        (slope,) = torch.autograd.grad(rows.sum(), p)
        torch.testing.assert_close(slope, loss.gradient(p, y).detach(), atol=1e-5, rtol=1e-5)


def test_one_hot_losses_want_one_number_a_class() -> None:
    loss = OneHot(inner=MeanSquaredError())
    target = torch.eye(3)[torch.tensor([0, 2])]
    prediction = torch.tensor([[0.9, 0.0, 0.1], [0.2, 0.5, 0.3]])
    assert loss.agree(prediction, target) is prediction
    value, correct = loss.metric_rows(prediction, target)
    assert correct.tolist() == [1.0, 0.0]
    torch.testing.assert_close(value, ((prediction - target) ** 2).mean(1))
    with pytest.raises(PlanError, match=r"returns float32 \[2, 2\] for one-hot targets of float32 \[2, 3\]"):
        loss.agree(prediction[:, :2], target)


@pytest.mark.parametrize("bad", [(4, 8.0), (3, 0.0), (3, 1e9)])
def test_no_such_fit(bad: tuple[int, float]) -> None:
    with pytest.raises(ConfigError, match="activation: "):
        fitted(*bad)


# --- the job file --------------------------------------------------------------------------------------------------

JOB = """\
job: toy
mode: spdz
model:
  file: model.py
data:
  dataset: toy
  features: [a, b]
  target: y
  task: regression
loss: mse
optimizer: {name: sgd, lr: 0.1}
train:
  rounds: 3
  local_epochs: 1
  batch_rows: 8
spdz:
  compute_agents: 2
  ranges: {x: 4}
"""
MODEL = """\
from torch import nn

def make_model():
    return nn.Sequential(
        nn.Linear(2, 3),
        nn.Sigmoid(),
        nn.Linear(3, 1),
    )
"""


def written(folder: Path, *edits: Edit, model: str = MODEL) -> Path:
    return written_job(folder, JOB, *edits, model=model)


def test_the_block_has_defaults_and_bounds(tmp_path: Path) -> None:
    spdz = load_job(written(tmp_path)).spec.shares
    assert (spdz.committee, spdz.security, spdz.check_every, spdz.fraction_bits) == (2, "active", 1, 14)
    assert (spdz.outputs.model, spdz.outputs.loss, spdz.outputs.prediction) == ("server", "nobody", "owners")
    assert (spdz.checkpoint_steps, spdz.evaluates, spdz.inference) == (100, "clear", None)
    assert (
        load_job(
            written(tmp_path, ("  ranges: {x: 4}\n", "")), overrides=["spdz.check_every=8"]
        ).spec.shares.checkpoint_steps
        == 104
    )
    hidden = load_job(written(tmp_path), overrides=["spdz.outputs.model=nobody"]).spec.shares
    assert hidden.evaluates == "shares"
    named = load_job(written(tmp_path), overrides=["spdz.compute_agents=[agent-1, agent-2, agent-3]"]).spec.shares
    assert named.committee == 3


REFUSED = {
    "too few": (("compute_agents: 2", "compute_agents: 1"), r":17:3: spdz.compute_agents: Expected `int` >= 2"),
    "five": (("compute_agents: 2", "compute_agents: 5"), r":17:3: spdz.compute_agents: Expected `int` <= 4"),
    "one twice": (("compute_agents: 2", "compute_agents: [a, a]"), r":17:3: spdz.compute_agents: an agent is named tw"),
    "dealer computes": (
        ("compute_agents: 2", "compute_agents: [a, b]\n  dealer: a"),
        r":18:3: spdz.dealer: a is also a compute agent: who deals masks must never see a masked value",
    ),
    "first by another": (
        ("ranges: {x: 4}", "preprocessing: first\n  dealer: midas"),
        r":18:3: spdz.preprocessing: first takes the server as the dealer, and here midas deals; say beside, or leave",
    ),
    "unknown key": (("ranges: {x: 4}", "ranges: {z: 4}"), r":18:12: spdz.ranges.z: Object contains unknown field `z`"),
    "unknown in block": (("compute_agents: 2", "parties: 2"), r":17:3: spdz.parties: Object contains unknown"),
    "security": (("compute_agents: 2", "security: none"), r":17:3: spdz.security: Invalid enum value 'none'"),
    "security outside": (("mode: spdz", "mode: spdz\nsecurity: active"), r":3:1: security: with mode spdz, say it in"),
    "adam": (("{name: sgd, lr: 0.1}", "{name: adam, lr: 0.1}"), r":11:1: optimizer: adam divides by square roots"),
    "degree": (("ranges: {x: 4}", "activation: {degree: 4}"), r":18:16: spdz.activation.degree: Invalid enum value 4"),
    "zones": (("ranges: {x: 4}", "zones: 3"), r":18:3: spdz.zones: 2 compute agents can't stand in 3 zones"),
    "checkpoints": (
        ("ranges: {x: 4}", "check_every: 8\n  checkpoint_every: 12"),
        r":19:3: spdz.checkpoint_every: 12 is no multiple of check_every, 8",
    ),
    "model to owners": (("ranges: {x: 4}", "outputs: {model: owners}"), r":18:13: spdz.outputs.model: opens to server"),
    "clear": (
        ("ranges: {x: 4}", "evaluate: clear\n  outputs: {model: nobody}"),
        r":18:3: spdz.evaluate: clear takes a model that opens to the server, but spdz.outputs.model is nobody",
    ),
    "a model's name without its agent": (
        ("ranges: {x: 4}", "model: boiler"),
        r":18:3: spdz.model: names a model of an agent; say which agent with spdz.model_from",
    ),
    "a dealer that provides": (
        ("ranges: {x: 4}", "model_from: midas\n  dealer: midas"),
        r":18:3: spdz.model_from: midas deals: who knows the masks must not be who masks the parameters",
    ),
    "nothing trained and nothing inferred": (
        ("rounds: 3", "rounds: 0"),
        r":13:3: train.rounds: with 0 rounds nothing is trained: say what is inferred \(spdz.inference\)",
    ),
    "nothing trained that could open": (
        ("rounds: 3\n  local_epochs: 1\n  batch_rows: 8\nspdz:", "rounds: 0\n  batch_rows: 8\nspdz:\n  inference: {}"),
        r"spdz.outputs.model: with train.rounds 0 no model comes out that could open; say nobody",
    ),
    "privacy": (
        ("mode: spdz", "mode: spdz\nprivacy: {unit: record, epsilon: 1, delta: 1.0e-5}"),
        r":3:1: privacy: is not offered on secret shares",
    ),
    "cross entropy": (
        ("task: regression\nloss: mse", "task: multiclass\nloss: cross_entropy"),
        r":10:1: loss: cross_entropy does not fit task multiclass in mode spdz, which takes mse or bce_with_logits",
    ),
    "no classes": (("task: regression", "task: multiclass"), r":5:1: data: on secret shares task multiclass needs da"),
    "classes": (("task: regression", "task: regression\n  classes: 3"), r":10:3: data.classes: is only used with mode"),
    "limits": (("train:", "limits: {update_norm: 1}\ntrain:"), r":12:1: limits: bound what agents send in federated"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_errors_name_line_and_column(what: str, tmp_path: Path) -> None:
    edit, expected = REFUSED[what]
    refuses(written(tmp_path, edit), expected)


def test_steps_of_rounds() -> None:
    job = load_job(EXAMPLES / "boston-spdz.yaml").spec
    assert sum(steps_of(job, 405)) == round(100 * 405 / 32)
    assert len(steps_of(job, 405)) == 10
    short = load_job(EXAMPLES / "boston-spdz.yaml", overrides=["train.max_steps=130"]).spec
    assert steps_of(short, 405) == (127, 3)
    local = load_job(EXAMPLES / "mnist-cnn-spdz.yaml").spec
    assert steps_of(local, 4000) == (50,) * 5


# --- Plans and circuits --------------------------------------------------------------------------------------------

# rounds, opened elements, preprocessing bytes (active): what the README says of the examples
FIGURES = {
    "boston-spdz": (7, 11_234, 285_920),
    "boston-paper-spdz": (12, 3_514, 82_016),
    "pima-spdz": (9, 2_979, 80_584),
    "mnist-cnn-spdz": (9, 136_213, 5_639_512),
}


def shared(name: str, *overrides: str) -> tuple[Job, SharedModel]:
    job = load_job(EXAMPLES / f"{name}.yaml", overrides=overrides)
    return job, trace_spdz(job, make_model(job))


@pytest.mark.parametrize("name", FIGURES)
def test_what_the_examples_cost(name: str) -> None:
    job, model = shared(name)
    circuit = model.train.lowered.circuit
    dealt = layout_of(circuit).preprocessing_bytes(active=True)
    assert (len(circuit.rounds), circuit.gate_elements, dealt) == FIGURES[name]
    assert model.train.lowered.retry_chance < 0.01
    assert model.train.lowered.max_steps > 10**6
    assert model.activations == {"sigmoid"}
    # Lowered again from the Plan's bytes, as every agent does it.
    again = lower(model.train.traced.plan, plan_id=model.train.plan_id, settings=settings_of_job(job.spec))
    assert again.digest == model.train.lowered.digest
    assert (model.predict is not None) == (name == "mnist-cnn-spdz")


def test_a_model_that_stays_hidden_is_scored_and_used_on_shares() -> None:
    _, model = shared("boston-spdz", "spdz.outputs.model=nobody", "spdz.inference={batch_rows: 16}")
    assert model.score is not None
    assert model.predict is not None
    assert [(o.name, o.role) for o in model.score.lowered.circuit.outputs] == [("loss", "row"), ("prediction", "row")]
    assert [(o.name, o.role) for o in model.predict.lowered.circuit.outputs] == [("prediction", "row")]
    assert with_steps(model.train, 10) is model.train
    longer = with_steps(model.train, model.train.lowered.max_steps + 1)
    assert longer.lowered.max_steps > model.train.lowered.max_steps


def models() -> dict[str, tuple[nn.Module, OneHot | MeanSquaredError | PolynomialLogistic, TensorSpec, TensorSpec]]:
    torch.manual_seed(3)
    floats, one = TensorSpec("float32", (4,)), TensorSpec("float32", ())
    logistic = PolynomialLogistic(fit=FITS.sigmoid)
    mlp = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 1))
    deep = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 1))
    conv = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2, stride=2), nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3),
    )  # fmt: skip
    return {
        "mlp": (mlp, MeanSquaredError(), floats, one),
        "deep": (deep, logistic, floats, one),
        "cnn": (conv, OneHot(inner=logistic), TensorSpec("float32", (2, 6, 6)), TensorSpec("float32", (3,))),
    }


@pytest.mark.parametrize("name", ["mlp", "deep", "cnn"])
@pytest.mark.parametrize("degree", [3, 5])
@pytest.mark.parametrize("optimizer", [Sgd(lr=0.1), Sgd(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)])
def test_training_on_integers_follows_float64_within_the_bound(name: str, degree: int, optimizer: Sgd) -> None:
    """20 steps. Each one: all outputs of the circuit against the Plan over float64 from the same state."""
    model, loss, x, y = models()[name]
    with polynomial_activations(fitted(degree, 4.0)):
        traced = training_plan(model, loss=loss, optimizer=optimizer, x=x, y=y, batch_rows=6)
    ranges = Ranges(x=3, y=1, params=3, state=3, values=16, preactivations=4, updates=0.5)
    low = lower(traced.plan, plan_id=traced.plan_id, settings=Settings(ranges=ranges))
    rng = np.random.default_rng(0)
    state = {(name, "param"): fixed(value.detach().numpy()) for name, value in model.named_parameters()}
    for entry in traced.plan.inputs:
        if entry.role == "state":
            state[entry.name, "state"] = np.zeros(entry.spec.shape, np.int64)
    for _ in range(20):
        rows = {
            ("x", "x"): fixed(np.clip(rng.standard_normal((6, *x.shape)), -3, 3)),
            ("y", "y"): fixed(rng.integers(0, 2, (6, *y.shape)).astype(float)),
        }
        values = trace(low.circuit, {**state, **rows}, rng)
        bounds, expected = error_bounds(low, values), run_float64(traced.plan, {**state, **rows})
        for output in low.circuit.outputs:
            key = (output.name, output.role)
            error = np.abs(values[output.wire] * 2.0**-F - expected[key])
            assert (error <= bounds[output.wire] + 1e-9).all()
            assert bounds[output.wire].max() < (2.0**-7 if key[1] != "loss" else 2.0**-4)
            if key in state:
                state[key] = values[output.wire]


def test_prediction_on_integers() -> None:
    model, _, x, _ = models()["cnn"]
    with polynomial_activations(FITS):
        traced = prediction_plan(model, x=x, batch_rows=2)
        image = torch.randn(2, 2, 6, 6)
        with torch.no_grad():
            expected = model(image).numpy()
    low = lower(traced.plan, plan_id=traced.plan_id, settings=Settings(ranges=Ranges(x=4, preactivations=8)))
    inputs = {(name, "param"): fixed(value.detach().numpy()) for name, value in model.named_parameters()}
    found = evaluate(low.circuit, {**inputs, ("x", "x"): fixed(image.numpy())})["prediction", "row"]
    np.testing.assert_allclose(found * 2.0**-F, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (MODEL.replace("Sigmoid", "ReLU"), r"\(module '1', ReLU\).* node \d+ \(relu\): not offered on secret"),
        (MODEL.replace("nn.Sigmoid()", "nn.Softmax(1)"), r"\(module '1', Softmax\).*\(softmax\): .* loss mse on one"),
        (MODEL, r"\(module '1', Sigmoid\).* may reach .*, but the polynomial was fitted on \[-8, 8\]; state what"),
    ],
)  # fmt: skip
def test_refusals_name_the_models_line(model: str, text: str, tmp_path: Path) -> None:
    job = load_job(written(tmp_path, model=model))
    with pytest.raises(PlanError, match=text):
        trace_spdz(job, make_model(job))


def test_first_parameters_of_an_agent_are_not_the_servers_to_check(tmp_path: Path) -> None:
    overrides = ["spdz.ranges={params: 0.001, preactivations: 8}", "spdz.model_from=agent-01"]
    job = load_job(written(tmp_path), overrides=overrides)
    assert trace_spdz(job, make_model(job)).parameters == 13


def test_first_parameters_must_be_in_range(tmp_path: Path) -> None:
    job = load_job(written(tmp_path), overrides=["spdz.ranges={params: 0.001, preactivations: 8}"])
    with pytest.raises(ConfigError, match=r"parameter 0\.weight starts at .*, beyond spdz.ranges.params 0.001"):
        trace_spdz(job, make_model(job))


# --- baseline ------------------------------------------------------------------------------------------------------


def owned_by(job: Job, agents: int) -> Owned:
    pool = public_pool(job)
    assert isinstance(pool, Pooled)
    parts = np.array_split(np.arange(pool.train.rows), agents)
    return Owned(train=tuple((f"agent-{k}", pool.train.take(part)) for k, part in enumerate(parts)), test=pool.test)


@pytest.mark.parametrize(("name", "metric"), [("boston-spdz", "test_mse"), ("pima-spdz", "test_accuracy")])
def test_the_baseline_learns_and_integers_follow_it(name: str, metric: str) -> None:
    """A fifth of the example's training: plain PyTorch against the circuit on integers, same rows, same order."""
    job, model = shared(name, "train.rounds=2")
    owned, bits = owned_by(job, 3), job.spec.shares.fraction_bits
    rows = tuple((owner, table.rows) for owner, table in owned.train)
    schedule = Schedule(rows=rows, batch_rows=job.spec.train.batch_rows, seed=job.spec.train.seed)
    steps = steps_of(job.spec, schedule.total)
    plain = run_shares_baseline(job, owned, schedule=schedule, steps=steps)
    again = run_shares_baseline(job, owned, schedule=schedule, steps=steps)
    assert plain.metrics == again.metrics
    assert plain.epochs == pytest.approx(sum(steps) * schedule.batch_rows / schedule.total)

    from sordino_server import baseline

    scaling = baseline.pooled_scaling(job.spec, owned.pooled)
    tensors = {owner: baseline._tensors(job.spec, scaling, table) for owner, table in owned.train}
    circuit, rng = model.train.lowered.circuit, np.random.default_rng(0)
    state = {(k, "param"): fixed(v, bits) for k, v in zip(model.names, model.params, strict=True)}
    for entry in circuit.inputs:
        if entry.role == "state":
            state[entry.name, "state"] = np.zeros(entry.wire.shape, np.int64)
    for number in range(sum(steps)):
        x, y = baseline._batch(tensors, schedule, number)
        batch = {("x", "x"): fixed(x.numpy(), bits), ("y", "y"): fixed(y.numpy(), bits)}
        found = evaluate(circuit, {**state, **batch}, rng)
        state = {key: found[key] for key in state}
    trained = make_model(job)
    trained.load_state_dict({k: torch.tensor(state[k, "param"] / 2.0**bits, dtype=torch.float32) for k in model.names})
    test_x, test_y = baseline._tensors(job.spec, scaling, owned.test)
    with polynomial_activations(model.fits):
        reached = baseline._evaluate(job.spec, trained, scaling, test_x, test_y)
    if metric == "test_mse":
        assert reached[metric] == pytest.approx(plain.metrics[metric], rel=0.02)
        assert plain.metrics[metric] < 40
    else:
        assert reached[metric] == pytest.approx(plain.metrics[metric], abs=0.01)
        assert plain.metrics[metric] > 0.6


def test_one_hot_rows_in_the_baseline() -> None:
    job = load_job(EXAMPLES / "mnist-cnn-spdz.yaml", overrides=["train.rounds=1", "train.local_steps=2"])
    owned = owned_by(job, 2)
    rows = tuple((owner, table.rows) for owner, table in owned.train)
    plain = run_shares_baseline(job, owned, schedule=Schedule(rows=rows, batch_rows=32, seed=1), steps=(2,))
    assert set(plain.metrics) == {"test_accuracy", "test_loss"}
    assert isinstance(fitted(3, 8.0), Activations)
