"""The job's `privacy` block: what is taken, and where refusals point."""

from __future__ import annotations

from pathlib import Path

import pytest

from sordino_common.errors import ConfigError
from sordino_server.job import job_from_json, job_to_json, load_job
from sordino_server.job_privacy import DataRangesSpec, DevicePrivacySpec, PrivacySpec, is_secure

RECORD = """\
job: toy
mode: federated
model:
  file: model.py
data:
  dataset: toy
  features: [a, b]
  target: y
  task: regression
  standardize: none
loss: mse
optimizer: {name: sgd, lr: 0.1}
train:
  rounds: 3
  local_steps: 2
  batch_rows: 8
privacy:
  unit: record
  epsilon: 0.5
  delta: 1.0e-5
  clip_norm: 1.0
  sampling_rate: 0.1
"""
DEVICE = RECORD.replace("unit: record", "unit: device").replace("  sampling_rate: 0.1\n", "") + (
    "secure_aggregation: true\n"
)


def written(folder: Path, text: str, *edits: tuple[str, str]) -> Path:
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (folder / "model.py").write_text("")
    (folder / "job.yaml").write_text(text)
    return folder / "job.yaml"


def test_a_record_job(tmp_path: Path) -> None:
    job = load_job(written(tmp_path, RECORD))
    privacy = job.spec.privacy
    assert privacy == PrivacySpec(unit="record", epsilon=0.5, delta=1e-5, clip_norm=1.0, sampling_rate=0.1)
    assert (privacy.noise_at, privacy.grid_bits, privacy.accountant) == ("device", 16, "pld")
    assert not is_secure(job.spec)
    assert job_from_json(job_to_json(job), job.path).spec == job.spec


def test_a_device_job(tmp_path: Path) -> None:
    job = load_job(written(tmp_path, DEVICE))
    assert job.spec.privacy is not None
    assert job.spec.privacy.noise_at == "aggregate"
    assert is_secure(job.spec)


def test_both_units(tmp_path: Path) -> None:
    extra = "  device: {noise_multiplier: 0.7, clip_norm: 2.0}\nsecure_aggregation: {helpers: 2}\n"
    job = load_job(written(tmp_path, RECORD + extra))
    assert job.spec.privacy is not None
    assert job.spec.privacy.device == DevicePrivacySpec(noise_multiplier=0.7, clip_norm=2.0)


def test_noise_in_the_sum_of_a_step(tmp_path: Path) -> None:
    edit = ("local_steps: 2", "local_steps: 1")
    job = load_job(written(tmp_path, RECORD + "  noise: aggregate\nsecure_aggregation: true\n", edit))
    assert job.spec.privacy is not None
    assert job.spec.privacy.noise_at == "aggregate"


def test_ranges_of_one_pair_or_of_one_for_each() -> None:
    assert DataRangesSpec(features=(0.0, 1.0)).of_features(2) == ((0.0, 1.0), (0.0, 1.0))
    assert DataRangesSpec(features=((0.0, 1.0), (-5.0, 5.5))).of_features(2) == ((0.0, 1.0), (-5.0, 5.5))
    assert DataRangesSpec(features=((0.0, 1.0), 3.0)).of_features(2) is None


@pytest.mark.parametrize("off", ["null", "~"])
def test_privacy_can_be_switched_off(tmp_path: Path, off: str) -> None:
    assert load_job(written(tmp_path, RECORD), overrides=[f"privacy={off}"]).spec.privacy is None


NONE = ("  standardize: none\n", "")
REFUSALS = {
    "both": (RECORD, ("epsilon: 0.5", "epsilon: 0.5\n  noise_multiplier: 1"), r":17:1: privacy: give exactly one of"),
    "neither": (RECORD, ("  epsilon: 0.5\n", ""), r":17:1: privacy: give exactly one of epsilon .* and noise_multi"),
    "no rate": (RECORD, ("  sampling_rate: 0.1\n", ""), r":17:1: privacy: unit record needs sampling_rate: .*fixed"),
    "epochs": (
        RECORD,
        ("local_steps: 2", "local_epochs: 2"),
        r":15:3: train.local_epochs: with privacy of records, say train.local_steps: .*1 / sampling_rate",
    ),
    "noise in no sum": (
        RECORD,
        ("clip_norm: 1.0", "clip_norm: 1.0\n  noise: aggregate"),
        r":22:3: privacy.noise: aggregate means noise inside a secure sum: add secure_aggregation: true, or say noise",
    ),
    "device in the clear": (
        DEVICE,
        ("secure_aggregation: true\n", ""),
        r":18:3: privacy.unit: device needs secure_aggregation: true; without it the server sees each device's update",
    ),
    "sampled devices": (
        DEVICE,
        ("clip_norm: 1.0", "clip_norm: 1.0\n  sampling_rate: 0.5"),
        r":22:3: privacy.sampling_rate: is of unit record. Devices are chosen by the server, so .*counts in full",
    ),
    "device noise of devices": (
        DEVICE,
        ("clip_norm: 1.0", "clip_norm: 1.0\n  noise: device"),
        r":22:3: privacy.noise: for unit device, noise is added by the aggregators of the sum; leave it out",
    ),
    "device twice": (
        DEVICE,
        ("clip_norm: 1.0", "clip_norm: 1.0\n  device: {epsilon: 1, clip_norm: 1}"),
        r":22:3: privacy.device: is the second unit beside unit: record; here it is the first",
    ),
    "second unit in the clear": (
        RECORD,
        ("clip_norm: 1.0", "clip_norm: 1.0\n  device: {epsilon: 1, clip_norm: 1}"),
        r":22:3: privacy.device: noise for the device unit is added in a secure sum: add secure_aggregation: true",
    ),
    "second unit without noise": (
        RECORD + "secure_aggregation: true\n",
        ("clip_norm: 1.0", "clip_norm: 1.0\n  device: {clip_norm: 1}"),
        r":22:3: privacy.device: give exactly one of epsilon",
    ),
    "scaled by the fleet": (
        RECORD,
        ("standardize: none", "standardize: fleet"),
        r":10:3: data.standardize: fleet has every device send its columns' sums .*a job of mode statistics finds",
    ),
    "scaled by the fleet by default": (RECORD, NONE, r":5:1: data.standardize: fleet has every device send"),
    "target scaled by the fleet": (
        DEVICE,
        ("standardize: none", "standardize: none\n  target_standardize: fleet"),
        r":11:3: data.target_standardize: fleet has every device send its columns' sums without noise",
    ),
    "ranges for nothing": (
        RECORD,
        ("standardize: none", "standardize: none\n  ranges: {features: [0, 1]}"),
        r":11:3: data.ranges: is only used in mode statistics",
    ),
    "validate": (
        RECORD,
        ("mode: federated", "mode: federated\nvalidate: norm"),
        r":3:1: validate: norm is not built yet: it needs updates secret-shared between two compute agents",
    ),
    "validate what": (RECORD, ("mode: federated", "mode: federated\nvalidate: sign"), r":3:1: validate: Invalid enum"),
    "delta": (RECORD, ("delta: 1.0e-5", "delta: 1"), r":20:3: privacy.delta: Expected `float` <= 0.1"),
    "no delta": (RECORD, ("  delta: 1.0e-5\n", ""), r":17:1: privacy: Object missing required field `delta`"),
    "epsilon": (RECORD, ("epsilon: 0.5", "epsilon: 0"), r":19:3: privacy.epsilon: Expected `float` > 0"),
    "rate": (RECORD, ("sampling_rate: 0.1", "sampling_rate: 1.5"), r":22:3: privacy.sampling_rate: Expected `float`"),
    "unit": (RECORD, ("unit: record", "unit: row"), r":18:3: privacy.unit: Invalid enum value 'row'"),
    "grid": (
        RECORD,
        ("clip_norm: 1.0", "clip_norm: 1.0\n  grid_bits: 30"),
        r":22:3: privacy.grid_bits: Expected",
    ),
    "grid of rows": (
        RECORD,
        ("clip_norm: 1.0", "clip_norm: 1.0\n  grid_bits: 21"),
        r":22:3: privacy.grid_bits: of rows is at most 20: sums of finer steps are not exact",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_name_line_and_column(what: str, tmp_path: Path) -> None:
    text, edit, pattern = REFUSALS[what]
    with pytest.raises(ConfigError, match=pattern):
        load_job(written(tmp_path, text, edit))


def test_noise_in_the_sum_of_several_steps(tmp_path: Path) -> None:
    text = RECORD + "  noise: aggregate\nsecure_aggregation: true\n"
    with pytest.raises(ConfigError, match=r":23:3: privacy.noise: .*local_steps must be 1, not 2; for more steps betw"):
        load_job(written(tmp_path, text))


def test_both_units_with_noise_in_the_sum(tmp_path: Path) -> None:
    text = RECORD + "  noise: aggregate\n  device: {epsilon: 1, clip_norm: 1}\nsecure_aggregation: true\n"
    with pytest.raises(ConfigError, match=r":24:3: privacy.device: both units at once need noise: device"):
        load_job(written(tmp_path, text, ("local_steps: 2", "local_steps: 1")))


def test_ranges_without_privacy(tmp_path: Path) -> None:
    text = RECORD[: RECORD.index("privacy:")]
    with pytest.raises(ConfigError, match=r":11:3: data.ranges: is only used in mode statistics, to bound what a row"):
        load_job(written(tmp_path, text, ("standardize: none", "standardize: none\n  ranges: {features: [0, 1]}")))


def test_the_command_refuses_before_it_calls_anyone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sordino_server.cli import app, run_cli

    path = written(tmp_path, RECORD, ("standardize: none", "standardize: fleet"))
    for command in (["train", str(path), "--fleet", str(tmp_path / "none")], ["privacy", "plan", str(path)]):
        assert run_cli(app, command, program="sordino") == 2
        assert ":10:3: data.standardize: fleet has every device send its columns' sums" in capsys.readouterr().err
