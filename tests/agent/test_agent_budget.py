"""A dataset's budget at the agent: what is refused by name, and what `sordino-agent budget` says."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from helpers_agent import (
    EVALUATE_PLAN,
    OPEN_POLICY,
    TRAIN_PLAN,
    Bench,
    bench,
    data_ref,
    evaluate_command,
    train_command,
)
from sordino_agent.budget import BudgetSpec
from sordino_agent.budget_report import report
from sordino_agent.check import check
from sordino_agent.cli import main
from sordino_agent.config import load_agent_config
from sordino_agent.enrol import enrol
from sordino_agent.ledger import Charge, Ledger
from sordino_agent.ledger_mark import mark_path
from sordino_common import messages as m
from sordino_common.channel.identity import OperatorKey
from sordino_common.errors import ConfigError
from sordino_common.privacy.mechanism import Mechanism

BUDGET = BudgetSpec(epsilon=3.0, delta=1e-5)
GAUSS = Mechanism(unit="record", sensitivity_squared=1, sigma_squared=50)
SAMPLED = Mechanism(unit="record", sensitivity_squared=1, sigma_squared=2, sampling_threshold=1 << 26, count=4)


def guarded(**changes: object) -> Bench:
    made = bench(policy=msgspec.structs.replace(OPEN_POLICY, **changes))
    made.core.reconfigure(msgspec.structs.replace(OPEN_POLICY, **changes), {"toy": BUDGET})
    for plan in (TRAIN_PLAN, EVALUATE_PLAN):
        assert isinstance(made.ask(m.PlanPut(plan=plan)), m.PlanReady)
    return made


@pytest.mark.parametrize(
    "command",
    [
        train_command(),
        m.Moments(dataset="toy", columns=("f0",)),
        evaluate_command(data=data_ref(split="train")),
    ],
)
def test_train_rows_under_a_budget_never_leave_without_noise(command: m.Message) -> None:
    for exact in (False, True):
        answer = guarded(exact_evaluation=exact).ask(command)
        assert isinstance(answer, m.Refused)
        assert answer.code == "budget"
        assert "'toy' has a privacy budget (epsilon 3 at delta 1e-05)" in answer.reason
        assert command.kind in answer.reason
        assert "without noise" in answer.reason


def test_held_out_rows_leave_without_noise_only_if_the_owner_says_so() -> None:
    answer = guarded().ask(evaluate_command())
    assert isinstance(answer, m.Refused)
    assert answer.code == "policy"
    assert "policy.exact_evaluation: true" in answer.reason
    assert isinstance(guarded(exact_evaluation=True).ask(evaluate_command()), m.Evaluated)


def test_without_a_budget_nothing_changes() -> None:
    made = guarded()
    made.core.reconfigure(OPEN_POLICY, {})
    assert isinstance(made.ask(train_command()), m.Trained)
    assert isinstance(made.ask(evaluate_command()), m.Evaluated)


# --- configuration and command line --------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "agent"
    enrol(folder, name="pi-01", fleet="demo", operator_key=OperatorKey.generate().public.hex(), broker="127.0.0.1:1")
    rows = "\n".join(f"{k},{k * 2}" for k in range(40))
    (folder / "toy.csv").write_text(f"f0,y\n{rows}\n")
    configure(folder, "{name: toy, path: toy.csv, test_rows: 10, budget: {epsilon: 3.0, delta: 1.0e-5}}")
    return folder


def configure(folder: Path, *entries: str) -> None:
    path = folder / "agent.yaml"
    head, _, tail = path.read_text().partition("datasets:")
    tail = tail[tail.index("#  - name") if "#  - name" in tail else 0 :]
    listed = "".join(f"\n  - {entry}" for entry in entries) or " []"
    path.write_text(f"{head}datasets:{listed}\n{tail}")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("{epsilon: 3.0}", "delta"),
        ("{delta: 1.0e-5}", "give either epsilon or rho, with delta"),
        ("{epsilon: 3.0, rho: 0.1, delta: 1.0e-5}", "give either epsilon or rho, with delta"),
        ("{epsilon: 0, delta: 1.0e-5}", "epsilon"),
        ("{rho: 0.1, delta: 0.5}", "delta"),
        ("{rho: 0.1, delta: 1.0e-5, unit: record}", "unit"),
    ],
)
def test_a_bad_budget_is_told_with_its_place(home: Path, budget: str, words: str) -> None:
    configure(home, f"{{name: toy, path: toy.csv, budget: {budget}}}")
    with pytest.raises(ConfigError, match=r"agent.yaml:\d+:\d+: .*" + words):
        load_agent_config(home / "agent.yaml")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def spend(home: Path) -> None:
    ledger = Ledger(home / "state" / "ledger.sqlite", wall_s=lambda: 1.0)
    for k in range(3):
        ledger.charge(
            [Charge(dataset="toy", split="train", run="run-1", round=k, what="sum-gradient", mechanism=GAUSS)]
        )
    ledger.charge([Charge(dataset="toy", split="train", run="run-2", round=7, what="train", mechanism=SAMPLED)])
    ledger.close()


def test_the_budget_command_before_anything_was_spent(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "budget", str(home))
    assert code == 0
    assert "toy, train rows, unit record" in out
    assert "spent     epsilon 0 at delta 1e-05; budget epsilon 3 at delta 1e-05" in out
    assert "left      epsilon 3" in out
    assert not (home / "state" / "ledger.sqlite").exists()
    configure(home)
    assert "nothing was ever charged" in run(capsys, "budget", str(home))[1]


def test_the_budget_command_shows_runs_and_what_is_left(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spend(home)
    code, out, _ = run(capsys, "budget", str(home))
    assert code == 0
    assert "run-1: 3 answers (sum-gradient), 3 noised releases, rounds 0 to 2" in out
    assert "run-2: 1 answers (train), 4 noised releases, round 7" in out
    assert "like the last (noise multiplier 1.414, sampling rate 0.01562)" in out
    code, out, _ = run(capsys, "budget", str(home), "--json")
    (account,) = json.loads(out)
    assert code == 0
    assert (account["dataset"], account["split"], account["unit"]) == ("toy", "train", "record")
    assert account["rho"] is None  # rows were sampled
    assert 0.0 < account["epsilon"] < account["epsilon_limit"] == 3.0
    assert account["rounds_left"] > 0
    assert [one["run"] for one in account["runs"]] == ["run-1", "run-2"]


def test_rho_is_shown_for_plain_gaussians_and_datasets_without_a_budget_are_counted() -> None:
    ledger = Ledger(None)
    for _ in range(3):
        ledger.charge([Charge(dataset="toy", split="train", run="a", round=1, what="train", mechanism=GAUSS)])
    (account,) = report(ledger, {})
    assert account.rho == pytest.approx(0.03)
    assert account.budget is None
    assert account.rounds_left is None
    assert account.epsilon > 0.0
    (account,) = report(ledger, {"toy": BudgetSpec(rho=0.1, delta=1e-5)})
    assert account.rounds_left == 7


def test_a_lost_ledger_stops_every_command_with_its_remedy(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spend(home)
    (home / "state" / "ledger.sqlite").unlink()
    code, _, err = run(capsys, "budget", str(home))
    assert code == 2
    assert "the privacy ledger is missing" in err
    assert str(mark_path(home / "state" / "ledger.sqlite")) in err
    findings = [finding for finding in check(home / "agent.yaml", offline=True) if finding.what == "ledger"]
    assert [finding.level for finding in findings] == ["error"]
    assert main(["run", str(home)]) == 2


def test_check_reads_the_ledger_and_warns_of_rows_under_two_names(home: Path) -> None:
    spend(home)
    configure(
        home,
        "{name: toy, path: toy.csv, budget: {rho: 0.1, delta: 1.0e-5}}",
        "{name: again, path: toy.csv}",
    )
    findings = check(home / "agent.yaml", offline=True)
    (ledger,) = [finding for finding in findings if finding.what == "ledger"]
    assert (ledger.level, "4 entries" in ledger.text) == ("ok", True)
    (budget,) = [finding for finding in findings if finding.what == "budget"]
    assert "also offered as again" in budget.text
