"""`sordino privacy plan`: figures, words, page, refusals; all before anything runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sordino_common.errors import ConfigError
from sordino_common.privacy.budget import Budget
from sordino_common.privacy.rdp import ZERO, compose, curve
from sordino_server.accounting.accountant import epsilon_pld, epsilon_rdp
from sordino_server.accounting.adversary import NOT_COVERED
from sordino_server.accounting.privacy_plan import plan_privacy
from sordino_server.accounting.privacy_show import plan_html, plan_json, write_plan
from sordino_server.accounting.privacy_words import paragraph
from sordino_server.cli import app, run_cli
from sordino_server.guarantee import guarantee_of
from sordino_server.job import Job, load_job
from sordino_server.model import make_model
from sordino_server.progress import number

EXAMPLES = Path(__file__).parents[2] / "examples"
PRIVATE = sorted(path.stem for path in EXAMPLES.glob("*.yaml") if "\nprivacy:" in path.read_text())
JOB = """\
job: toy
mode: federated
model: {file: model.py}
data: {dataset: toy, features: [a, b], target: y, task: regression, standardize: none}
loss: mse
optimizer: {name: sgd, lr: 0.1}
train: {rounds: 20, local_steps: 3, batch_rows: 8}
privacy:
  unit: record
  noise_multiplier: 2.0
  delta: 1.0e-5
  clip_norm: 1.5
  sampling_rate: 0.1
  accountant: rdp
"""
DEVICE = (
    JOB.replace("unit: record", "unit: device").replace("  sampling_rate: 0.1\n", "") + "secure_aggregation: true\n"
)


def written(folder: Path, text: str = JOB, *edits: tuple[str, str]) -> Path:
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (folder / "model.py").write_text("")
    (folder / "job.yaml").write_text(text)
    return folder / "job.yaml"


def loaded(folder: Path, text: str = JOB, *edits: tuple[str, str]) -> Job:
    return load_job(written(folder, text, *edits))


def test_epsilon_of_stated_noise(tmp_path: Path) -> None:
    plan = plan_privacy(loaded(tmp_path)).first
    assert (plan.steps.count, plan.steps.noise_multiplier, plan.target) == (60, 2.0, None)
    assert plan.found.epsilon == plan.found.rdp == epsilon_rdp([plan.steps], 1e-5)
    assert plan.found.pld == epsilon_pld([plan.steps], 1e-5)
    levels = [level.found.epsilon for level in plan.levels]
    assert levels == sorted(levels, reverse=True)
    assert plan.found.epsilon in levels


def test_noise_of_a_target(tmp_path: Path) -> None:
    plan = plan_privacy(loaded(tmp_path, JOB, ("noise_multiplier: 2.0", "epsilon: 0.7"))).first
    assert plan.target == 0.7
    assert 0.699 < plan.found.epsilon <= 0.7


def test_pld_needs_less_noise_than_rdp(tmp_path: Path) -> None:
    target = ("noise_multiplier: 2.0", "epsilon: 0.7")
    rdp = plan_privacy(loaded(tmp_path, JOB, target)).first
    pld = plan_privacy(loaded(tmp_path, JOB, target, ("accountant: rdp", "accountant: pld"))).first
    assert pld.steps.noise_multiplier < rdp.steps.noise_multiplier
    assert pld.found.accountant == "pld"
    assert 0.699 < pld.found.epsilon <= 0.7


def test_devices_are_counted_in_every_round(tmp_path: Path) -> None:
    plan = plan_privacy(loaded(tmp_path, DEVICE))
    assert (plan.first.unit, plan.first.steps.count, plan.first.steps.sampled) == ("device", 20, False)
    assert (plan.helpers, plan.local_steps) == (2, None)


def test_a_devices_budget_affords_the_plan_and_hardly_more(tmp_path: Path) -> None:
    for text in (JOB, DEVICE):
        plan = plan_privacy(loaded(tmp_path, text)).first
        cost = compose([curve(plan.steps)])
        assert Budget(epsilon=plan.ledger_epsilon, delta=1e-5).affords(ZERO, cost)
        assert not Budget(epsilon=plan.ledger_epsilon * 0.98, delta=1e-5).affords(ZERO, cost)


def test_both_units(tmp_path: Path) -> None:
    text = JOB + "  device: {noise_multiplier: 5.0, clip_norm: 2.0}\nsecure_aggregation: {helpers: 3}\n"
    plan = plan_privacy(loaded(tmp_path, text))
    assert plan.second is not None
    assert (plan.second.unit, plan.second.steps.count, plan.second.promise.clip_norm) == ("device", 20, 2.0)
    told = paragraph(plan)
    assert "Beside it, one device (all of its rows together) is protected with epsilon" in told
    assert "against the server, even together with all but one of the 3 helpers, the broker" in told
    assert plan_json(plan)["device"]["unit"] == "device"


# --- words ---------------------------------------------------------------------------------------------------------


def test_the_paragraph_names_unit_epsilon_delta_adversary_and_what_is_not_covered(tmp_path: Path) -> None:
    plan = plan_privacy(loaded(tmp_path, JOB, ("noise_multiplier: 2.0", "epsilon: 0.7")))
    told = paragraph(plan)
    assert told.startswith(
        "The job toy is planned with differential privacy for one record (one row of one device's data): epsilon 0.7 "
        "at delta 1e-05, for the whole run of 20 rounds of 3 steps. It means that whatever is made of the result, "
        "every outcome is at most 2.01"
    )
    assert "who held its presence for even odds beforehand can be sure of it to at most 67 % afterwards." in told
    assert "This holds against the server, the helpers, the broker, the other devices, and whoever is later" in told
    assert "Each device adds the whole noise before anything leaves it, so nobody else has to be trusted." in told
    assert f"Not covered: {'; '.join(NOT_COVERED)}. Training the same data again adds to what is spent" in told
    assert "refuses what passes the budget that its owner has set." in told


@pytest.mark.parametrize(
    ("helpers", "text"),
    [
        (1, "the server as long as the helper is honest, .* if they work together, nothing is promised"),
        (3, "the server, even together with all but one of the 3 helpers, .* if the server and all helpers work toget"),
    ],
)
def test_whom_noise_in_a_sum_holds_against(tmp_path: Path, helpers: int, text: str) -> None:
    import re

    job = loaded(tmp_path, DEVICE, ("secure_aggregation: true", f"secure_aggregation: {{helpers: {helpers}}}"))
    assert re.search(text, plan_privacy(job).first.promise.adversary)


def test_epsilon_is_rounded_up_in_words(tmp_path: Path) -> None:
    plan = plan_privacy(loaded(tmp_path))
    said = float(paragraph(plan).split("epsilon ")[1].split()[0])
    assert plan.first.found.epsilon <= said <= plan.first.found.epsilon * 1.01


def test_a_large_epsilon_is_called_by_its_name(tmp_path: Path) -> None:
    plan = plan_privacy(loaded(tmp_path, JOB, ("noise_multiplier: 2.0", "noise_multiplier: 0.3")))
    assert plan.first.found.epsilon > 20
    assert "An epsilon of this size promises next to nothing: whether a record took part may well be" in paragraph(plan)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    assert run_cli(app, ["privacy", "plan", str(path), "--set", "privacy.noise_multiplier=3"], program="sordino") == 0
    out = capsys.readouterr().out
    assert "noise multiplier      3.000 times the clip norm 1.5" in out
    assert "sampling rate         0.1 (Poisson)" in out
    assert [line.split()[0] for line in out.splitlines() if line.rstrip().endswith("planned")] == ["3.000"]
    assert "a device's budget     at least epsilon" in out
    assert "The job toy is planned with differential privacy for one record" in out


def test_json_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, DEVICE)
    arguments = ["privacy", "plan", str(path), "--json", "--report", str(tmp_path / "out")]
    assert run_cli(app, arguments, program="sordino") == 0
    said = capsys.readouterr()
    shown = json.loads(said.out)
    assert said.err == f"report: {tmp_path / 'out' / 'privacy.html'}\n"
    assert shown == json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert (shown["unit"], shown["releases"], shown["accountant"], shown["sampling_rate"]) == (
        "device",
        20,
        "rdp",
        None,
    )
    assert math.isclose(shown["epsilon"], shown["rdp_epsilon"])
    assert shown["moments_epsilon"] > shown["rdp_epsilon"] > shown["pld_epsilon"]
    html = (tmp_path / "out" / "privacy.html").read_text()
    assert "<svg" in html
    assert "Epsilon against noise, for one device" in html
    assert "<script" not in html


def test_the_page_escapes(tmp_path: Path) -> None:
    html = plan_html(plan_privacy(loaded(tmp_path)))
    assert "one device&#x27;s data" in html


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: the report can't be written: "):
        write_plan(plan_privacy(loaded(tmp_path)), tmp_path / "file")


def test_a_job_without_privacy_is_refused(tmp_path: Path) -> None:
    text = JOB[: JOB.index("privacy:")]
    with pytest.raises(ConfigError, match=r":2:1: mode: this job has no privacy block: there is nothing to plan"):
        plan_privacy(loaded(tmp_path, text))


def test_a_target_out_of_reach_is_refused_at_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits = [("noise_multiplier: 2.0", "epsilon: 0.0001"), ("rounds: 20", "rounds: 900000000")]
    path = written(tmp_path, JOB, *edits)
    assert run_cli(app, ["privacy", "plan", str(path)], program="sordino") == 2
    said = capsys.readouterr().err
    assert ":10:3: privacy.epsilon: epsilon 0.0001 at delta 1e-05 can't be kept over 2700000000 releases" in said
    assert "take fewer rounds or local steps" in said


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "mnist-dp" else []) for name in PRIVATE]
)
def test_what_is_planned_is_what_the_run_says(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every private example: the plan, made without a model, beside the summary of a run of the real model."""
    job = load_job(EXAMPLES / f"{name}.yaml")
    said = summary_of(job)
    assert said["epsilon"] <= said["target_epsilon"]
    assert run_cli(app, ["privacy", "plan", str(job.path), "--report", str(tmp_path)], program="sordino") == 0
    shown = json.loads((tmp_path / "privacy.json").read_text())
    figures = {"epsilon", "pld_epsilon", "rdp_epsilon", "moments_epsilon", "noise_multiplier"}
    words = "unit delta accountant clip_norm sampling_rate target_epsilon releases adversary noise_from not_covered"
    for key in words.split():
        assert shown[key] == said[key], key
    for key in figures:  # noise is found to within 1/10,000 of its variance
        assert shown[key] == pytest.approx(said[key], rel=2e-4), key
    printed = " ".join(capsys.readouterr().out.split())
    assert f"epsilon {number(shown['epsilon'])} at delta {said['delta']:g}, by {said['accountant']}" in printed
    assert f"This holds against {said['adversary']}. " in printed
    assert f"Not covered: {'; '.join(said['not_covered'])}. " in printed


def summary_of(job: Job) -> dict[str, Any]:
    """The summary's `privacy` after all planned releases, by the guarantee of the job's own model."""
    parameters = [] if job.spec.mode == "statistics" else list(make_model(job).parameters())
    guarantee = guarantee_of(
        job,
        gradient_length=max(1, sum(one.numel() for one in parameters if one.requires_grad)),
        update_length=max(1, sum(one.numel() for one in parameters)),
    )
    return guarantee.summary(begun=guarantee.first.releases, rounds=job.spec.train.rounds)


def test_statistics_have_a_bound_in_place_of_a_clip_norm() -> None:
    plan = plan_privacy(load_job(EXAMPLES / "boston-statistics.yaml"))
    assert plan.first.to_json()["clip_norm"] is None
    assert plan.first.bound == "the most that a row can add"
    assert plan.first.steps.count == 1
