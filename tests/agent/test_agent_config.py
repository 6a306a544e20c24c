"""The agent's YAML file: what it takes, and that every error names file, line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from sordino_agent.config import load_agent_config
from sordino_common.errors import ConfigError

KEY = "ab" * 32
GOOD = f"""\
agent:
  name: pi-01
  fleet: demo
  state_dir: state
operator_key: {KEY}
broker:
  host: localhost
datasets:
  - name: boston
    path: data/boston.csv
    features: [CRIM, ZN]
    target: MEDV
    tags: [housing]
    test_fraction: 0.2
policy:
  jobs: [describe, train]
  plans: any
  datasets:
    boston: [train]
limits:
  plan_seconds: 30
executor: numpy
"""


def load(tmp_path: Path, text: str):
    path = tmp_path / "agent.yaml"
    path.write_text(text, "utf-8")
    return load_agent_config(path)


def test_a_good_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded.config.agent.server == "server"
    assert loaded.config.policy.plans == "any"
    assert loaded.config.policy.fetch == "none"
    assert loaded.state_dir == tmp_path / "state"
    (spec,) = loaded.datasets()
    assert spec.path == str(tmp_path / "data/boston.csv")
    assert spec.offered == ("CRIM", "ZN", "MEDV")
    assert loaded.operator_key() == bytes.fromhex(KEY)
    assert loaded.broker().client_id == "sordino-demo-pi-01"


def test_defaults_deny(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("policy:")]
    policy = load(tmp_path, text).config.policy
    assert policy.plans == ()
    assert policy.fetch == "none"
    assert "tensors" not in policy.jobs


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("name: pi-01", "name: Pi_01", "2:3", ("agent.name", "regex")),
        ("name: pi-01", "name: server", "2:3", ("agent.name", "server's name")),
        ("plans: any", "plans: some", "17:3", ("policy.plans",)),
        ("plans: any", "plans: [abc]", "17:11", ("policy.plans[0]",)),
        ("jobs: [describe, train]", "jobs: [describe, fetch]", "16:20", ("policy.jobs[1]", "fetch")),
        ("    boston: [train]", "    bosten: [train]", "19:5", ("no such dataset", "boston")),
        ("    target: MEDV\n", "", "9:5", ("features and target come together",)),
        ("path: data/boston.csv", "path: data/boston.xls", "9:5", ("csv, npz or npy",)),
        ("test_fraction: 0.2", "test_fraction: 1.2", "14:5", ("test_fraction", "1.0")),
        ("plan_seconds: 30", "plan_seconds: -1", "21:3", ("limits.plan_seconds",)),
        ("plan_seconds: 30", "plan_secs: 30", "21:3", ("plan_secs",)),
        ("executor: numpy", "executor: jax", "22:1", ("executor", "jax")),
        ("host: localhost", "host: localhost\n  password: x", "6:1", ("without a username",)),
        ("  fleet: demo\n", "", "1:1", ("fleet",)),
    ],
)
def test_errors_name_line_and_column(tmp_path: Path, old: str, new: str, place: str, words: tuple[str, ...]) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert str(caught.value).startswith(f"{tmp_path}/agent.yaml:{place}: "), str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_dataset_twice(tmp_path: Path) -> None:
    text = GOOD.replace("policy:", "  - {name: boston, path: b.csv}\npolicy:")
    with pytest.raises(ConfigError, match=r"agent\.yaml:15:6: datasets\.1\.name: 'boston' is there twice"):
        load(tmp_path, text)


def test_models_are_named_once_and_the_policy_names_them(tmp_path: Path) -> None:
    text = GOOD.replace("policy:", "models:\n  - {name: boiler, path: models/a.npz}\npolicy:\n  models: [boiler]")
    loaded = load(tmp_path, text)
    (spec,) = loaded.models()
    assert spec.path == str(tmp_path / "models/a.npz")
    assert load(tmp_path, GOOD).config.policy.models == ()
    for old, new, message in (
        ("[boiler]", "[pump]", r":18:12: policy\.models\.0: no such model 'pump'; there are: boiler"),
        ("[boiler]", "any of them", r":18:3: policy\.models"),
        ("a.npz", "a.pt", r":16:5: models\[0\]: the ending of 'models/a\.pt' is not npz"),
        ("a.npz}", "a.npz}\n  - {name: boiler, path: b.npz}", r":17:6: models\.1\.name: 'boiler' is there twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path, text.replace(old, new))


def test_operator_key_in_a_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD.replace(KEY, "operator.pub"))
    with pytest.raises(ConfigError, match=r"agent\.yaml:5:1: operator_key.*No such file"):
        loaded.operator_key()
    (tmp_path / "operator.pub").write_text("nonsense\n")
    with pytest.raises(ConfigError, match="64 hex digits, found 8"):
        loaded.operator_key()
    (tmp_path / "operator.pub").write_text(KEY + "\n")
    assert loaded.operator_key() == bytes.fromhex(KEY)


def test_password_file_must_be_ones_own(tmp_path: Path) -> None:
    text = GOOD.replace("host: localhost", "host: localhost\n  username: pi").replace(
        "datasets:", "broker_password_file: pw\ndatasets:", 1
    )
    (tmp_path / "pw").write_text("hush\n")
    (tmp_path / "pw").chmod(0o644)
    loaded = load(tmp_path, text)
    with pytest.raises(ConfigError, match=r"agent\.yaml:9:1: .*chmod 600"):
        loaded.broker()
    (tmp_path / "pw").chmod(0o600)
    assert loaded.broker().password == "hush"
    assert "hush" not in repr(loaded.broker())
