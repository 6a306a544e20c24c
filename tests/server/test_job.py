"""The job file: what is taken, and where errors point."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers_job import Edit, refuses, written_job
from sordino_common.errors import ConfigError
from sordino_server.job import AdamSpec, SgdSpec, job_from_json, job_to_json, load_job, metrics_of, quorum_of

EXAMPLES = Path(__file__).parents[2] / "examples"

JOB = """\
job: toy
mode: federated
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
"""


def written(folder: Path, *edits: Edit) -> Path:
    return written_job(folder, JOB, *edits)


@pytest.mark.parametrize("name", ["boston-fedavg", "pima-fedavg", "mnist-cnn-fedavg"])
def test_the_examples_are_valid(name: str) -> None:
    job = load_job(EXAMPLES / f"{name}.yaml")
    assert job.spec.job == name
    assert job.spec.simulation.agents == 10
    again = job_from_json(job_to_json(job), job.path)
    assert again.spec == job.spec


def test_paths_are_relative_to_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.chdir("/")
    assert load_job(path).model_file == (tmp_path / "model.py").resolve()


def test_overrides_change_values(tmp_path: Path) -> None:
    path = written(tmp_path)
    job = load_job(path, overrides=["train.rounds=9", "optimizer={name: adam, lr: 0.01}", "train.quorum=0.25"])
    assert job.spec.train.rounds == 9
    assert job.spec.optimizer == AdamSpec(lr=0.01)
    assert quorum_of(job.spec.train, 10) == 3


EDITS = {
    "unknown key": (("loss: mse", "loss: mse\nlearning_rate: 1"), r":11:1: learning_rate: .*unknown field"),
    "spdz": (("mode: federated", "mode: federated\nspdz: {}"), r":3:1: spdz: is only used with mode: spdz"),
    "statistics": (("mode: federated", "mode: statistics"), r":3:1: model: has no place in mode statistics"),
    "no such mode": (("mode: federated", "mode: fed"), r":2:1: mode: there is no mode 'fed'"),
    "security": (("mode: federated", "mode: federated\nsecurity: active"), r":3:1: security: 'active' is not offered"),
    "loss of another task": (("loss: mse", "loss: cross_entropy"), r":10:1: loss: cross_entropy does not fit"),
    "target among features": (("target: y", "target: a"), r":8:3: data.target: a is also a feature"),
    "column twice": (("[a, b]", "[a, a]"), r":7:3: data.features: a column is named twice"),
    "given without vectors": (
        ("task: regression", "task: regression\n  standardize: given"),
        r"data.offset: standardize: given needs 2 entries, one per feature; got 0",
    ),
    "vectors without given": (
        ("task: regression", "task: regression\n  offset: [1.0, 2.0]"),
        r":10:3: data.offset: is only used with standardize: given, not with fleet",
    ),
    "shape with two features": (
        ("task: regression", "task: regression\n  shape: [4, 4]"),
        r":10:3: data.shape: shape \[4, 4\] needs one tensor-valued feature",
    ),
    "too wide to scale": (
        ("features: [a, b]", "features: [a]\n  shape: [3, 64, 64]"),
        r"data.standardize: 12288 numbers a row; at most 4096 can be scaled",
    ),
    "scaled labels": (
        ("task: regression", "task: binary\n  target_standardize: fleet"),
        r"loss: mse does not fit task binary",
    ),
    "both epochs and steps": (("local_epochs: 1", "local_epochs: 1\n  local_steps: 2"), r"either local_epochs or"),
    "neither": (("  local_epochs: 1\n", ""), r":12:1: train: give either local_epochs or local_steps"),
    "no rounds": (
        ("rounds: 3", "rounds: 0"),
        r":13:3: train.rounds: at least 1; 0, for inference only, is offered by mode spdz",
    ),
    "lr": (("lr: 0.1", "lr: 0"), r"optimizer.lr: Expected `float` > 0"),
    "optimizer": (("name: sgd", "name: lion"), r":11:13: optimizer.name: Invalid value 'lion'"),
    "nesterov": (("lr: 0.1", "lr: 0.1, nesterov: true"), r"optimizer.nesterov: needs a momentum above 0"),
    "metric": (("loss: mse", "loss: mse\nevaluate: {metrics: [accuracy]}"), r"accuracy is no metric of task regress"),
    "quorum above cohort": (
        ("rounds: 3", "rounds: 3\n  agents: 4\n  quorum: 5"),
        r"train.quorum: a quorum of 5 can't be reached by 4",
    ),
    "name": (("job: toy", "job: Toy"), r":1:1: job: Expected `str` matching regex"),
    "no model": (("file: model.py", "file: other.py"), r":4:3: model.file: there is no file .*other.py"),
}


@pytest.mark.parametrize("key", ["secure_aggregation: {helpers: 2}", "privacy: {unit: device, epsilon: 1}"])
def test_nothing_is_added_to_sums_on_shares(key: str, tmp_path: Path) -> None:
    path = written(tmp_path, ("mode: federated", f"mode: spdz\n{key}"))
    if key.startswith("privacy"):
        path.write_text(path.read_text().replace("epsilon: 1", "epsilon: 1, delta: 1.0e-5, clip_norm: 1"))
    with pytest.raises(ConfigError, match=r":3:1: \w+: is not offered on secret shares: nobody sees updates"):
        load_job(path)


@pytest.mark.parametrize("what", EDITS)
def test_errors_name_line_and_column(what: str, tmp_path: Path) -> None:
    edit, pattern = EDITS[what]
    refuses(written(tmp_path, edit), pattern)


def test_an_override_is_to_blame_for_its_own_value(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--set mode: there is no mode 'quantum'; there are: federated, statistics, spdz"
    ):
        load_job(written(tmp_path), overrides=["mode=quantum"])
    with pytest.raises(ConfigError, match=r"^--set train.rounds: "):
        load_job(written(tmp_path), overrides=["train.rounds=0"])


def test_quorum_is_a_count_or_a_share(tmp_path: Path) -> None:
    job = load_job(written(tmp_path))
    assert [quorum_of(job.spec.train, n) for n in (1, 2, 3, 10, 11)] == [1, 1, 2, 5, 6]
    job = load_job(written(tmp_path), overrides=["train.quorum=4"])
    assert quorum_of(job.spec.train, 100) == 4
    job = load_job(written(tmp_path), overrides=["train.quorum=0.7"])
    assert quorum_of(job.spec.train, 10) == 7  # 0.7 * 10 is a little more than 7 in binary


def test_default_metrics_fit_the_task(tmp_path: Path) -> None:
    assert metrics_of(load_job(written(tmp_path)).spec) == ("mse",)
    assert metrics_of(load_job(EXAMPLES / "pima-fedavg.yaml").spec) == ("accuracy", "loss")
    assert isinstance(load_job(written(tmp_path)).spec.optimizer, SgdSpec)
