"""`sordino-sim` as a command: exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers_sim import EXAMPLES, QUICK, write_faults
from sordino_server.cli import run_cli
from sordino_sim.cli import app, lines_of

BOSTON = str(EXAMPLES / "boston-fedavg.yaml")
SETTINGS = [part for item in (*QUICK, "train.rounds=2") for part in ("--set", item)]


def sim(*arguments: str) -> int:
    return run_cli(app, list(arguments), program="sordino-sim")


def test_json_is_one_object_on_stdout_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sordino_sim.cli",
            "run",
            BOSTON,
            *SETTINGS,
            "--json",
            "--report",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["job"] == "boston-fedavg" and summary["baseline"]["test_mse"] > 0
    assert "round 2/2" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["virtual_seconds"] > 0


def test_for_people_it_says_what_was_learned_and_how_long_it_would_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = write_faults(tmp_path, "round: 2, do: leave, agents: [agent-03]")
    arguments = ["--agents", "4", "--seed", "3", "--profile", "pi3:1,pi5:3", "--faults", str(faults), "--no-baseline"]
    assert sim("run", BOSTON, *SETTINGS, *arguments, "--quiet") == 0
    out = capsys.readouterr().out
    for words in ("test_mse", "4 agents, 2 rounds", "on 1 pi3, 3 pi5 it would take about", "memory per agent"):
        assert words in out
    assert "fault in round 2: agent-03 left" in out


def test_a_fault_of_many_agents_names_the_first() -> None:
    summary: dict[str, Any] = dict.fromkeys(("virtual_seconds", "memory_per_agent_bytes"))
    summary |= dict.fromkeys(("agents", "rounds", "steps", "bytes_up", "bytes_down", "dropouts", "seconds"), 0)
    summary |= {"run": "r", "metrics": {}, "baseline": None, "privacy": None, "overhead_vs_torch": None}
    names = [f"agent-{k}" for k in range(9)]
    for count, words in (
        (1, "agent-0 died"),
        (6, "agent-0, agent-1, agent-2, agent-3, agent-4, agent-5 died"),
        (9, "agent-0, agent-1, agent-2, agent-3, agent-4, agent-5 and 3 more died"),
    ):
        faults = [{"round": 2, "what": f"{', '.join(names[:count])} died"}, {"round": 3, "what": "the broker restarts"}]
        assert lines_of({**summary, "faults": faults})[-2:] == [
            f"fault in round 2: {words}", "fault in round 3: the broker restarts"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "gone.yaml"], "gone.yaml"),
        (["run", BOSTON, "--transport", "pigeon"], "pigeon"),
        (["run", BOSTON, "--profile", "pi9"], "pi9"),
        (["run", BOSTON, "--agents", "0"], "agents"),
        (["run", BOSTON, "--faults", "gone-faults.yaml"], "gone-faults.yaml"),
        (["run", BOSTON, "--set", "train.rounds=many"], "train.rounds"),
        (["run", BOSTON, "--agents", "1000"], "1000 agents"),
    ],
)
def test_usage_and_configuration_errors_are_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sim(*arguments) == 2
    said = capsys.readouterr()
    assert words in said.err and said.out == ""


def test_a_fault_that_the_transport_does_not_simulate_is_exit_2_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = write_faults(tmp_path, "round: 2, do: slow, agents: [agent-03]")
    assert sim("run", BOSTON, *SETTINGS, "--transport", "processes", "--faults", str(faults), "--json") == 2
    said = capsys.readouterr()
    assert said.out == "" and "round 1" not in said.err
    assert f"{faults}:2:16: faults[0]: `do: slow` needs --transport memory or mqtt, not processes" in said.err


@pytest.mark.mqtt
def test_a_profile_that_has_no_effect_is_said_to_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--agents", "2", "--transport", "processes", "--profile", "pi3", "--no-baseline", "--json"]
    assert sim("run", BOSTON, *SETTINGS, *settings) == 0
    said = capsys.readouterr()
    assert "warning: simulation.profile has no effect with --transport processes: processes compute" in said.err
    assert json.loads(said.out)["simulated"]["profile"] is None


def test_a_missed_quorum_is_exit_3_and_names_the_agents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = write_faults(tmp_path, "round: 2, after_s: 0.005, do: die, agents: [agent-00, agent-01, agent-02]")
    assert sim("run", BOSTON, *SETTINGS, "--set", "train.quorum=8", "--faults", str(faults), "--json") == 3
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert said.out == "" and all(name in last for name in ("agent-00", "agent-01", "agent-02"))


def test_a_fleet_on_disk_is_ready_for_the_real_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "fleet"
    assert sim("fleet", BOSTON, str(folder), "--agents", "3") == 0
    out = capsys.readouterr().out
    for words in ("mosquitto -c", "sordino-agent run", f"sordino train {BOSTON} --fleet {folder}"):
        assert words in out
    assert sorted(path.name for path in (folder / "agents").iterdir()) == ["agent-00", "agent-01", "agent-02"]
    assert (folder / "agents" / "agent-00" / "state" / "agent.key").stat().st_mode & 0o077 == 0
    assert sim("fleet", BOSTON, str(folder)) == 2
    assert "not empty" in capsys.readouterr().err
