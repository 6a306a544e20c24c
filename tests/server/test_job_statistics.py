"""The statistics job: what it leaves out, what is refused at its line, and how noise is shared among questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from sordino_common.errors import ConfigError
from sordino_common.privacy.row_queries import norm_squared, sensitivity_squared
from sordino_server.job import Job, job_from_json, job_to_json, load_job
from sordino_server.job_statistics import columns_of, queries_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "boston-statistics.yaml"
ALL = (
    "statistics.moments={share: 2.0}",
    "statistics.count={}",
    "statistics.histograms=[{column: MEDV, bits: 3}]",
    "statistics.quantiles=[{column: LSTAT, bits: 5}]",
)


def job(*overrides: str) -> Job:
    return load_job(EXAMPLE, overrides=overrides)


def test_it_is_completed_by_the_linear_model_and_the_ranges() -> None:
    spec = job().spec
    assert spec.model.factory == "make_linear"
    assert spec.model.args == {"inputs": 3}
    assert spec.data.standardize == spec.data.target_standardize == "given"
    assert spec.data.offset == pytest.approx((6.3, 13.0, 18.0))
    assert spec.data.scale == pytest.approx((1.4, 13.0, 4.0))
    assert (spec.data.target_offset, spec.data.target_scale) == (22.5, 18.0)


def test_the_record_of_a_run_gives_the_same_job() -> None:
    made = job(*ALL)
    assert job_from_json(job_to_json(made), EXAMPLE).spec == made.spec


def test_questions_share_the_precision_as_the_job_says() -> None:
    spec = job(*ALL).spec
    queries = queries_of(spec)
    assert [query.kind for query in queries] == ["gram", "moments", "count", "histogram", "dyadic"]
    parts = [query.weight**2 * norm_squared(query) for query in queries]
    assert sum(parts) == sensitivity_squared(queries)
    for part, share in zip(parts, (1, 2, 1, 1, 1), strict=True):
        assert part / sum(parts) == pytest.approx(share / 6, rel=0.1)
    assert [column.name for column in columns_of(spec)] == ["RM", "LSTAT", "PTRATIO", "MEDV"]


REFUSALS = {
    "statistics={}": "statistics: asks for nothing",
    "secure_aggregation=false": "secure_aggregation: mode statistics needs it",
    "data.task=binary": "data.task: mode statistics takes regression",
    "data.standardize=fleet": "data.standardize: has no place in mode statistics",
    "data.ranges=null": "data.ranges: statistics need public bounds",
    "data.ranges.target=null": "data.ranges: statistics need public bounds",
    "data.ranges.features=[[0, 1]]": "data.ranges.features: expected one [lo, hi] for all, or a list of 3",
    "data.ranges.features=[[0, 1], [2, 1], [0, 1]]": "data.ranges.features.1: expected [lo, hi] with lo < hi",
    "data.ranges.target=[4, 4]": "data.ranges.target: expected [lo, hi] with lo < hi",
    "statistics.histograms=[{column: AGE}]": "statistics.histograms.0.column: AGE is neither a feature nor the target",
    "privacy.unit=device": "privacy.unit: mode statistics protects records",
    "privacy.clip_norm=1.0": "privacy.clip_norm: has no place in mode statistics",
    "privacy.sampling_rate=0.5": "privacy.sampling_rate: mode statistics asks all rows once",
    "privacy.noise=device": "privacy.noise: in mode statistics the aggregators add the noise",
    "privacy.noise_multiplier=2.0": "privacy: give exactly one of epsilon",
    "model={file: x.py}": "model: has no place in mode statistics",
    "optimizer={name: sgd, lr: 0.1}": "optimizer: has no place in mode statistics",
    "loss=mse": "loss: has no place in mode statistics",
    "train.rounds=2": "train.rounds: mode statistics has one round, not 2",
    "mode=federated": "model: is missing; mode federated needs it",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_refusals(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job(override)
    assert REFUSALS[override] in str(caught.value)


def test_statistics_have_a_mode_of_their_own() -> None:
    with pytest.raises(ConfigError, match="statistics: is only used with mode: statistics"):
        load_job(EXAMPLE.parent / "boston-fedavg.yaml", overrides=("statistics.count={}",))


def test_a_refusal_names_file_line_and_column(tmp_path: Path) -> None:
    text = EXAMPLE.read_text().replace("target: [4.5, 40.5]", "target: [40, 5]")
    line = next(k for k, one in enumerate(text.splitlines(), start=1) if "[40, 5]" in one)
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"job\.yaml:{line}:5: data\.ranges\.target: expected"):
        load_job(tmp_path / "job.yaml")
