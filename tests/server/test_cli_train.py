"""`sordino train` on a real fleet, agents as processes: killed with SIGKILL, it goes on to the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers_mosquitto import require_mosquitto
from sordino_server.job import load_job
from sordino_server.model import make_model
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

pytestmark = [pytest.mark.mqtt, pytest.mark.slow]
JOB = Path(__file__).parents[2] / "examples" / "boston-fedavg.yaml"
CHANGES = ("--set", "train.rounds=40", "--set", "train.local_epochs=6", "--no-baseline")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    require_mosquitto()
    folder = tmp_path_factory.mktemp("fleet") / "lab"
    job = load_job(JOB, overrides=["simulation.agents=4"])
    made = write_fleet(scenario_of(job), folder)
    with LocalBroker(made.broker_folder, port=made.port), AgentProcesses(made) as agents:
        agents.start_all()
        yield folder


def sordino(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sordino_server.cli", *(str(argument) for argument in arguments)]


@contextmanager
def train(fleet: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = sordino("train", "--fleet", fleet, *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    """Read the log until a line with `words` comes."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return "".join(seen)
    raise AssertionError(f"{words!r} never came:\n{''.join(seen)}")


def test_killed_and_resumed_equals_uninterrupted(fleet: Path, tmp_path: Path) -> None:
    agents = subprocess.run(
        sordino("agents", "--fleet", fleet, "--json", "--wait", "30"), capture_output=True, text=True
    )
    assert agents.returncode == 0, agents.stderr
    rows = json.loads(agents.stdout)["agents"]
    assert [row["online"] for row in rows] == [True] * 4
    assert sum(d["train_rows"] for row in rows for d in row["datasets"]) == 405

    with train(fleet, JOB, "--run", "whole", "--json", *CHANGES) as whole:
        out, log = whole.communicate(timeout=240)
    assert whole.returncode == 0, log
    summary = json.loads(out)
    assert (summary["rounds"], summary["agents"], summary["dropouts"]) == (40, 4, 0)
    assert summary["bytes_up"] > 40 * 4 * 961 * 4

    with train(fleet, JOB, "--run", "cut", *CHANGES) as cut:
        wait_for(cut, "round 5/40")
        cut.kill()
    shown = subprocess.run(sordino("runs", "--fleet", fleet, "--json"), capture_output=True, text=True, check=True)
    states = {row["run"]: row["status"] for row in json.loads(shown.stdout)["runs"]}
    assert states == {"whole": "done", "cut": "stopped"}
    with train(fleet, "--resume", "cut", "--no-baseline") as resumed:
        _, log = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, log
    assert "going on at round" in log

    tensors = {}
    for run in ("whole", "cut"):
        path = tmp_path / f"{run}.safetensors"
        subprocess.run(sordino("export", run, "-o", path, "--fleet", fleet), check=True, capture_output=True)
        tensors[run] = load_file(path)
    assert tensors["whole"].keys() == tensors["cut"].keys()
    assert all(torch.equal(tensors["whole"][name], tensors["cut"][name]) for name in tensors["whole"])
    make_model(load_job(JOB)).load_state_dict(tensors["cut"])

    with train(fleet, JOB, "--run", "whole", "--json") as again:  # as systemd would
        out, log = again.communicate(timeout=60)
    assert (again.returncode, json.loads(out)) == (0, summary), log


def test_ctrl_c_ends_in_order_and_can_be_resumed(fleet: Path) -> None:
    with train(fleet, JOB, "--run", "halted", *CHANGES) as process:
        wait_for(process, "round 3/40")
        os.kill(process.pid, signal.SIGINT)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert log.splitlines()[-1] == "sordino: stopped by SIGINT; go on with --resume halted"
    shown = subprocess.run(sordino("show", "halted", "--fleet", fleet), capture_output=True, text=True, check=True)
    assert "interrupted" in shown.stdout
    with train(fleet, "--resume", "halted", "--no-baseline") as resumed:
        _, log = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, log


def test_a_changed_model_file_is_not_resumed(fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    model = tmp_path / "models" / "mlp.py"
    model.write_text((JOB.parent / "models" / "mlp.py").read_text())
    (tmp_path / "job.yaml").write_text(JOB.read_text())
    with train(fleet, tmp_path / "job.yaml", "--run", "edited", *CHANGES) as process:
        wait_for(process, "round 2/40")
    model.write_text(model.read_text() + "\n# another line\n")
    with train(fleet, "--resume", "edited") as resumed:
        _, log = resumed.communicate(timeout=60)
    assert resumed.returncode == 2
    assert "has changed since the run began" in log


def test_a_column_that_no_agent_has_is_the_jobs_mistake(fleet: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "job.yaml"
    text = JOB.read_text("utf-8").replace("models/mlp.py", str(JOB.parent / "models/mlp.py")).replace("INDUS", "INDUZ")
    wrong.write_text(text, "utf-8")
    row = next(number for number, line in enumerate(text.splitlines(), 1) if "INDUZ" in line)
    column = text.splitlines()[row - 1].index("INDUZ") + 1
    with train(fleet, wrong, "--no-baseline") as process:
        said, heard = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said == ""
    assert f"job.yaml:{row}:{column}: data.features.2: " in heard
    assert "has no column INDUZ; it has CRIM, ZN, INDUS" in heard
