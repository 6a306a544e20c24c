"""The baseline: same start, same rows, same epochs; its scaling equals the fleet's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sordino_common import messages as m
from sordino_common.errors import ConfigError, PlanError
from sordino_common.plan.arrays import from_numpy
from sordino_server.baseline import Pooled, pooled_scaling, public_pool, run_baseline
from sordino_server.job import Job, load_job
from sordino_server.model import make_model, trace_job
from sordino_server.rounds.scaling import fleet_columns, scaling_of

EXAMPLES = Path(__file__).parents[2] / "examples"


def boston(*overrides: str) -> tuple[Job, Pooled]:
    job = load_job(EXAMPLES / "boston-fedavg.yaml", overrides=overrides)
    pooled = public_pool(job)
    assert pooled is not None
    return job, pooled


def test_it_learns_and_is_reproducible() -> None:
    job, pooled = boston("train.rounds=3")
    first, again = (run_baseline(job, pooled, agents=10, stopwatch=lambda: 0.0) for _ in range(2))
    assert first == again
    assert len(first.curve) == 3
    assert first.epochs == 30
    assert first.metrics["test_mse"] == first.curve[-1]["test_mse"] < 30.0 < pooled.test.columns["MEDV"].var()


def test_the_caller_breathes_between_steps_off_the_clock() -> None:
    """Or the broker ends a connection that nobody looks after, and a watchdog the service."""
    job, pooled = boston("train.rounds=3")
    now_s, breaths = 0.0, 0

    def stopwatch() -> float:
        nonlocal now_s
        now_s += 0.01
        return now_s

    def breathe() -> None:
        nonlocal now_s, breaths
        now_s += 1000.0
        breaths += 1

    result = run_baseline(job, pooled, agents=10, stopwatch=stopwatch, breathe=breathe)
    assert result.metrics == run_baseline(job, pooled, agents=10).metrics
    assert breaths >= 10
    assert 0.5 * breaths < result.seconds < 1000.0


def test_local_steps_become_epochs() -> None:
    job, pooled = boston("train.rounds=2", "train={rounds: 2, local_steps: 4, batch_rows: 10, seed: 1}")
    assert run_baseline(job, pooled, agents=10).epochs == pytest.approx(2 * 4 * 10 * 10 / 405)


def test_the_fleets_scaling_is_the_pools() -> None:
    job, pooled = boston()
    columns = fleet_columns(job.spec.data)
    results = {}
    for k, rows in enumerate(np.array_split(np.arange(pooled.train.rows), 7)):
        values = np.stack([pooled.train.columns[name][rows] for name in columns], axis=1)
        results[f"agent-{k}"] = m.MomentsResult(
            rows=len(rows), sums=from_numpy(values.sum(0)), squares=from_numpy((values**2).sum(0))
        )
    fleet, pool = scaling_of(job.spec.data, results), pooled_scaling(job.spec, pooled.train)
    np.testing.assert_allclose(fleet.offset, pool.offset, rtol=1e-10)
    np.testing.assert_allclose(fleet.scale, pool.scale, rtol=1e-9)
    assert (fleet.target_offset, fleet.target_scale) == pytest.approx((pool.target_offset, pool.target_scale))


def test_constant_columns_keep_scale_1() -> None:
    job, _ = boston()
    columns = fleet_columns(job.spec.data)
    rows, value = 40, 1e6 / 3
    sums = np.full(len(columns), 0.0)
    for _ in range(rows):
        sums += value
    result = m.MomentsResult(
        rows=rows, sums=from_numpy(sums), squares=from_numpy(np.full(len(columns), rows * value**2))
    )
    assert set(scaling_of(job.spec.data, {"a": result}).scale) == {1.0}


def test_tensor_columns_are_scaled_by_all_their_elements() -> None:
    job = load_job(EXAMPLES / "mnist-cnn-fedavg.yaml", overrides=[
        "data={dataset: mnist, features: [image], shape: [1, 28, 28], target: digit, task: multiclass}"
    ])  # fmt: skip
    pooled = public_pool(job)
    assert pooled is not None
    images = pooled.train.columns["image"].astype(np.float64)
    result = m.MomentsResult(
        rows=len(images), sums=from_numpy(np.array([images.sum()])), squares=from_numpy(np.array([(images**2).sum()]))
    )
    fleet, pool = scaling_of(job.spec.data, {"a": result}), pooled_scaling(job.spec, pooled.train)
    assert fleet.offset == pytest.approx(pool.offset)
    assert fleet.scale == pytest.approx(pool.scale)


# --- the user's model file -----------------------------------------------------------------------------------------

UNSUPPORTED = """\
import torch

class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(13, 1)

    def forward(self, x):
        return self.l(torch.fft.fft(x).real)

def make_model():
    return M()
"""

MODEL_ERRORS = {
    "syntax": ("def make_model(:\n", ConfigError, r"m.py:1: the model file can't be imported: SyntaxError"),
    "import": ("import torch\nimport nothing_like_this\n", ConfigError, r"m.py:2: .*ModuleNotFoundError"),
    "factory": ("def make():\n    pass\n", ConfigError, r"has no function make_model"),
    "arguments": (
        "def make_model(depth):\n    pass\n",
        ConfigError,
        r"--set model.args: make_model\(...\) in .*m.py does not take them: make_model\(\) missing 1 required",
    ),
    "type error inside": (
        "def make_model():\n    len(3)\n",
        ConfigError,
        r"m.py:2: make_model\(...\) failed: TypeError",
    ),
    "raises": ("def make_model():\n    x = 1\n    return 1 / 0\n", ConfigError, r"m.py:3: make_model\(...\) failed"),
    "no module": ("def make_model():\n    return 3\n", ConfigError, r"returned int, expected a torch.nn.Module"),
    "nan": (
        "from torch import nn\ndef make_model():\n m = nn.Linear(13, 1)\n m.bias.data[0] = float('nan')\n return m\n",
        ConfigError,
        r"parameter bias starts with values that are not finite",
    ),
    "unsupported op": (
        UNSUPPORTED,
        PlanError,
        r"m.py:9",
    ),
}


@pytest.mark.parametrize("what", MODEL_ERRORS)
def test_errors_in_the_model_name_its_line(what: str, tmp_path: Path) -> None:
    source, kind, pattern = MODEL_ERRORS[what]
    (tmp_path / "m.py").write_text(source)
    text = (EXAMPLES / "boston-fedavg.yaml").read_text().replace("models/mlp.py", "m.py")
    (tmp_path / "job.yaml").write_text(text)
    job = load_job(tmp_path / "job.yaml", overrides=["model={file: m.py}"])
    with pytest.raises(kind, match=pattern):
        trace_job(job, make_model(job))


def test_the_same_seed_gives_the_same_start() -> None:
    job, _ = boston()
    first, again = trace_job(job, make_model(job)), trace_job(job, make_model(job))
    assert [p.tobytes() for p in first.params] == [p.tobytes() for p in again.params]
    assert first.programs == again.programs
    other, _ = boston("train.seed=2")
    assert trace_job(other, make_model(other)).params[0].tobytes() != first.params[0].tobytes()


@pytest.mark.parametrize(
    ("changes", "batch", "epochs"),
    [
        ((), 405, 4.0),  # a round is one step on all rows
        (("privacy.sampling_rate=0.25",), 101, 4 * 101 / 405),
        (("privacy.noise=device", "privacy.sampling_rate=0.5", "train.local_steps=3"), 20, 4 * 3 * 10 * 20 / 405),
    ],
)
def test_a_private_jobs_batch_is_its_expected_sample(changes: tuple[str, ...], batch: int, epochs: float) -> None:
    job = load_job(EXAMPLES / "boston-dp.yaml", overrides=("train.rounds=4", *changes))
    pooled = public_pool(job)
    assert pooled is not None
    seen: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear) and module.training:
            seen.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        found = run_baseline(job, pooled, agents=10)
    finally:
        hook.remove()
    assert max(seen) == batch
    assert found.epochs == pytest.approx(epochs)
    assert found.metrics["test_mse"] < 60.0
