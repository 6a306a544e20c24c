"""`sordino plan show`: the report of a job before anything runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sordino_server.cli import app, run_cli
from sordino_server.job import load_job
from sordino_server.model import make_model
from sordino_server.model_spdz import trace_spdz
from sordino_server.plan_show import describe, memory_bytes, render

EXAMPLES = Path(__file__).parents[2] / "examples"


def call(*arguments: str | Path) -> int:
    return run_cli(app, [str(argument) for argument in arguments], program="sordino")


def test_a_job_on_shares_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "show", EXAMPLES / "boston-spdz.yaml", "--json", "--gates") == 0
    report = json.loads(capsys.readouterr().out)
    train = report["plans"]["train"]
    assert (report["job"], report["mode"], report["security"]) == ("boston-spdz", "spdz", "active")
    assert report["compute_agents"] == 3
    assert train["rounds"] == 7
    assert train["opened_elements"] == sum(train["opened_elements_by_round"]) == 11_234
    assert train["opened_bytes_per_step_per_party"] == 8 * 11_234
    assert train["input_bytes_per_step"] == 8 * 32 * 14
    assert (train["preprocessing_bytes_active"], train["preprocessing_bytes_passive"]) == (285_920, 182_544)
    assert train["preprocessing_bytes_per_step"] == train["preprocessing_bytes_active"]
    assert sum(train["gates"].values()) == len(train["all_gates"]) == 11
    assert train["gates"] == {"linear": 2, "mm": 5, "mul": 4}
    assert train["largest_bound"]["output"] == "param layers.2.weight"
    assert train["largest_bound"]["bound_bits"] == max(gate["bound_bits"] for gate in train["all_gates"])
    assert any("mlp.py" in gate["line"] and "Sigmoid" in gate["line"] for gate in train["all_gates"])
    assert [fit["name"] for fit in report["activations"]] == ["sigmoid"]
    assert report["activations"][0]["largest_error"] == pytest.approx(0.1143, abs=1e-4)
    assert report["plans"]["evaluate"]["runs"] == "in the clear"


def test_a_federated_job_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "show", EXAMPLES / "boston-fedavg.yaml", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["mode"], report["security"], report["parameters"]) == ("federated", "plain", 961)
    assert set(report["plans"]) == {"train", "evaluate"}
    assert report["plans"]["train"]["peak_bytes"] > 32 * 64 * 4
    assert "compute_agents" not in report


@pytest.mark.parametrize("name", ["boston-spdz", "mnist-cnn-spdz", "pima-fedavg"])
def test_the_tables_for_people(name: str) -> None:
    out = io.StringIO()
    report = describe(load_job(EXAMPLES / f"{name}.yaml"), gates=True)
    render(report, Console(file=out, width=200, color_system=None), base=EXAMPLES.parent)
    text = out.getvalue()
    assert name in text
    if name == "boston-spdz":
        for part in ("rounds per step", "11,234 elements, 89.9 kB", "largest bound", "param layers.2.weight",
                     "examples/models/mlp.py:23 (module 'layers.1', Sigmoid)", "error at most 0.114"):  # fmt: skip
            assert part in text
    if name == "mnist-cnn-spdz":
        assert "predict" in text
    if name == "pima-fedavg":
        assert "peak memory" in text


def test_passive_is_named_loudly() -> None:
    out = io.StringIO()
    job = load_job(EXAMPLES / "boston-spdz.yaml", overrides=["spdz.security=passive"])
    report = describe(job)
    render(report, Console(file=out, width=160, color_system=None))
    assert "security: passive - a cheating compute agent goes unnoticed" in out.getvalue()
    train = report["plans"]["train"]
    assert train["preprocessing_bytes_per_step"] == train["preprocessing_bytes_passive"]


def test_what_can_not_run_is_refused_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "show", EXAMPLES / "boston-spdz.yaml", "--set", "model.args.activation=relu") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "mlp.py:23 (module 'layers.1', ReLU): train Mlp mse: node 2 (relu): not offered on secret shares" in said.err
    assert call("plan", "show", EXAMPLES / "nothing.yaml") == 2
    assert call("plan", "show", EXAMPLES / "boston-spdz.yaml", "--set", "spdz.ranges={x: 12}") == 2
    assert "the polynomial was fitted on [-8, 8]" in capsys.readouterr().err


def test_plans_lists_every_plan_of_a_job_on_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plans", EXAMPLES / "mnist-cnn-spdz.yaml", "--json") == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    job = load_job(EXAMPLES / "mnist-cnn-spdz.yaml")
    shared = trace_spdz(job, make_model(job))
    assert shared.predict is not None
    assert plans["train"]["sha256"] == shared.train.plan_id.hex()
    assert plans["predict"]["sha256"] == shared.predict.plan_id.hex()
    assert set(plans) == {"train", "predict", "evaluate"}


def test_memory_grows_with_what_waits_for_the_check() -> None:
    job = load_job(EXAMPLES / "boston-spdz.yaml")
    circuit = trace_spdz(job, make_model(job)).train.lowered.circuit
    one, eight = (memory_bytes(circuit, active=True, steps=steps) for steps in (1, 8))
    assert memory_bytes(circuit, active=False, steps=8) < one < eight < 8 * one
