"""Statistics jobs on the simulated fleet: without noise they are the plain answers, with noise as good as is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sordino_common.errors import BudgetRefused
from sordino_server.job import Job, load_job
from sordino_server.model import make_model
from sordino_server.public_data import load_public, split_rows
from sordino_server.report import report_html
from sordino_server.run_statistics import statistics_run
from sordino_sim.runner import Simulated, simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "boston-statistics.yaml"
QUESTIONS = (
    "statistics.moments={}",
    "statistics.count={}",
    "statistics.histograms=[{column: MEDV, bits: 3}]",
    "statistics.quantiles=[{column: LSTAT, bits: 9, probabilities: [0.1, 0.5, 0.9]}]",
    "statistics.ridge={row_norm: 2.0, bias: 0.5, bits: 12}",
)
WIDE = ("data.ranges.features=[[3, 9], [0, 40], [12, 22.5]]", "data.ranges.target=[0, 60]")


def job(*overrides: str) -> Job:
    return load_job(EXAMPLE, overrides=overrides)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    del tmp_path_factory
    return simulate(job(*QUESTIONS, *WIDE, "privacy=null"))


def test_without_noise_the_findings_are_those_of_the_pooled_rows(exact: Simulated) -> None:
    summary = exact.summary
    table = load_public("boston")
    train, _ = split_rows(table.rows, 0.2, 1)
    found = summary["statistics"]
    assert found["count"] == {"rows": float(len(train)), "error": 0.0}
    for name in ("RM", "LSTAT", "PTRATIO", "MEDV"):
        column = table.columns[name][train]
        assert found["moments"][name]["mean"] == pytest.approx(column.mean(), rel=5e-3)
        assert found["moments"][name]["deviation"] == pytest.approx(column.std(), rel=1e-2)
        assert found["moments"][name]["mean_error"] == 0.0
    counts, _ = np.histogram(table.columns["MEDV"][train], bins=8, range=(0, 60))
    assert found["histograms"]["MEDV"]["counts"] == counts.tolist()
    quantiles = list(found["quantiles"]["LSTAT"].values())
    assert np.abs(np.array(quantiles) - np.quantile(table.columns["LSTAT"][train], [0.1, 0.5, 0.9])).max() < 0.2
    assert summary["privacy"] is None
    assert summary["security"] == "secure-aggregation"


def test_the_scaling_that_is_found_is_what_a_private_job_takes(exact: Simulated) -> None:
    found = exact.summary["statistics"]["scaling"]
    names = ("RM", "LSTAT", "PTRATIO")
    changes = [
        f"data.features=[{', '.join(names)}]",
        "model.args={inputs: 3}",
        *(f"data.{key}={found[key]}" for key in ("offset", "scale", "target_offset", "target_scale")),
    ]
    data = load_job(EXAMPLE.with_name("boston-dp.yaml"), overrides=changes).spec.data
    moments = exact.summary["statistics"]["moments"]
    assert data.offset == tuple(moments[name]["mean"] for name in names)
    assert data.scale == tuple(moments[name]["deviation"] for name in names)
    assert (data.target_offset, data.target_scale) == (moments["MEDV"]["mean"], moments["MEDV"]["deviation"])


def test_without_noise_ridge_is_least_squares_on_the_pooled_rows(exact: Simulated) -> None:
    summary = exact.summary
    assert summary["metrics"]["test_mse"] == pytest.approx(summary["baseline"]["test_mse"], rel=0.02)
    line = summary["statistics"]["ridge"]
    table = load_public("boston")
    train, _ = split_rows(table.rows, 0.2, 1)
    x = np.stack([*(table.columns[name][train] for name in ("RM", "LSTAT", "PTRATIO")), np.ones(len(train))], axis=1)
    best, *_ = np.linalg.lstsq(x, table.columns["MEDV"][train], rcond=None)
    np.testing.assert_allclose([*line["coefficients"].values(), line["intercept"]], best, rtol=0.05)
    assert line["regularization"] == 0.0


def test_the_report_draws_what_was_found(exact: Simulated) -> None:
    html = report_html(exact.result, exact.summary)
    for words in ("Ridge regression", "Moments", "Quantiles of LSTAT", "Histogram of MEDV", "bin 1, rows"):
        assert words in html
    assert "Training loss" not in html


def test_with_noise_the_epsilon_is_kept_and_said() -> None:
    summary = simulate(job()).summary
    privacy = summary["privacy"]
    assert privacy["epsilon"] <= 0.5
    assert privacy["epsilon"] > 0.499
    assert (privacy["unit"], privacy["delta"], privacy["releases"], privacy["clip_norm"]) == ("record", 1e-5, 1, None)
    assert "as long as the helper is honest" in privacy["adversary"]
    assert privacy["pld_epsilon"] <= privacy["rdp_epsilon"]
    # The mean of the target gives about 84; the simulator's seed fixes the noise.
    assert summary["metrics"]["test_mse"] < 80
    assert summary["statistics"]["ridge"]["regularization"] > 0


def test_a_second_release_is_refused_after_an_interruption() -> None:
    made = job()
    world = _World()
    run = statistics_run(made, make_model(made), world, begun=1)  # type: ignore[arg-type]
    with pytest.raises(BudgetRefused, match="another one is another release") as caught:
        run.rounds("run-1", None)
    assert caught.value.exit_code == 5


def test_devices_that_cant_pay_end_it_with_their_names() -> None:
    with pytest.raises(BudgetRefused, match="agent-00") as caught:
        simulate(job("simulation.budget={epsilon: 0.4, delta: 1.0e-5}"))
    assert caught.value.exit_code == 5


class _World:
    """Never asked: the run is refused before."""
