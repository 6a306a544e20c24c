"""Whole jobs on the simulated fleet: reproducible to the bit, and right in spite of what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers_sim import boston, write_faults
from sordino_common.errors import ConfigError, FleetUnavailable
from sordino_server.rounds.events import Note, Waiting
from sordino_sim.runner import Simulated, simulate, without_wall_clock


def notes(done: Simulated) -> str:
    return "\n".join(event.text for event in done.events if isinstance(event, Note))


@pytest.fixture(scope="module")
def calm() -> Simulated:
    """The job without faults, to compare with."""
    return simulate(boston())


def test_the_summary_has_all_that_the_interface_names(calm: Simulated) -> None:
    summary = calm.summary
    wanted = (
        "job mode security agents compute_agents rounds steps metrics baseline seconds overhead_vs_torch bytes_up "
        "bytes_down dropouts privacy virtual_seconds simulated memory_per_agent_bytes faults params_sha256"
    )
    assert not set(wanted.split()) - set(summary)
    assert (summary["agents"], summary["rounds"], summary["dropouts"]) == (10, 4, 0)
    assert summary["bytes_up"] > 0 < summary["bytes_down"]
    assert summary["simulated"]["profile"] == "pi4"
    assert 0.0 < summary["virtual_seconds"] < 60.0
    json.dumps(summary)


FLAT = """
from torch import nn

def make_model():
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 48), nn.ReLU(), nn.Linear(48, 10))
"""
THOUSAND = """
job: thousand
mode: federated
model: {file: flat.py}
data: {dataset: mnist, features: [image], shape: [1, 28, 28], target: digit, task: multiclass, standardize: none}
loss: cross_entropy
optimizer: {name: sgd, lr: 0.001}
train: {rounds: 2, local_steps: 1, batch_rows: 4, evaluate_every: 0}
simulation: {agents: 1000, data: mnist}
"""


@pytest.mark.slow
def test_a_thousand_agents_take_a_step_of_ten_thousand_parameters(tmp_path: Path) -> None:
    """In another process, so that what other tests left behind is not in the memory per agent."""
    (tmp_path / "flat.py").write_text(FLAT)
    (tmp_path / "job.yaml").write_text(THOUSAND)
    command = [sys.executable, "-m", "sordino_sim.cli", "run", str(tmp_path / "job.yaml"), "--json", "--no-baseline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["agents"], summary["steps"], summary["dropouts"]) == (1000, 2000, 0)
    parameter_bytes = 4 * 9_946 * 2000
    assert parameter_bytes < summary["bytes_up"] < 1.05 * parameter_bytes
    assert summary["memory_per_agent_bytes"] < 400_000


def test_it_learns_what_plain_torch_learns() -> None:
    """A small model and fewer rounds than the example's, which comes closer; deterministic, so no false alarms."""
    done = simulate(boston("train.rounds=40", "train.local_epochs=10"))
    assert done.summary["metrics"]["test_mse"] < 1.15 * done.summary["baseline"]["test_mse"]


_AGAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from helpers_sim import boston, write_faults
from sordino_sim.runner import simulate, without_wall_clock
from pathlib import Path
faults = Path(sys.argv[2])
done = simulate(boston("simulation.network.loss=0.02", "simulation.network.jitter_s=0.01"), faults=faults)
print(json.dumps(without_wall_clock(done.summary), sort_keys=True))
"""


def test_the_same_job_and_seed_give_the_same_bits_in_two_processes(tmp_path: Path) -> None:
    faults = write_faults(
        tmp_path,
        "round: 2, do: die, agents: 2, after_s: 0.01",
        "round: 3, do: return, agents: 1",
        "round: 3, do: broker-restart, down_s: 1, after_s: 0.02",
    )

    def summary(hash_seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", _AGAIN, str(Path(__file__).parents[1]), str(faults)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = summary("1")
    assert first == summary("4242")
    assert len(json.loads(first)["faults"]) == 3


def test_another_seed_is_another_run(calm: Simulated) -> None:
    other = simulate(boston("train.seed=2"))
    assert other.summary["params_sha256"] != calm.summary["params_sha256"]


def test_three_of_ten_killed_in_mid_round(tmp_path: Path, calm: Simulated) -> None:
    faults = write_faults(tmp_path, "round: 2, after_s: 0.005, do: die, agents: [agent-02, agent-05, agent-08]")
    done = simulate(boston(), faults=faults)
    summary = done.summary
    assert (summary["rounds"], summary["agents"]) == (4, 10)
    assert summary["dropouts"] == 3, "the round in which they died; afterwards nobody asks them"
    assert summary["faults"][0]["what"] == "agent-02, agent-05, agent-08 died"
    assert [len(record.shares) for record in done.result.records] == [10, 10, 7, 7]
    lost = {name for name, share in done.result.records[1].shares.items() if share.outcome == "missing"}
    assert lost == {"agent-02", "agent-05", "agent-08"}
    for name in sorted(lost):
        assert name in notes(done)
    # Seven tenths of the rows still learn nearly as well.
    assert summary["metrics"]["test_mse"] < 1.5 * calm.summary["metrics"]["test_mse"]


def test_an_agent_leaves_and_returns(tmp_path: Path) -> None:
    faults = write_faults(
        tmp_path,
        "round: 2, do: leave, agents: [agent-03]",
        "round: 3, do: return, agents: [agent-03], after_s: 0.001",
    )
    done = simulate(boston("train.rounds=6"), faults=faults)
    shares = [record.shares for record in done.result.records]
    assert "agent-03" in shares[0] and shares[0]["agent-03"].outcome == "answered"
    assert shares[-1]["agent-03"].outcome == "answered", "it is described and given the Plans anew, and takes part"
    assert "agent-03 is offline" in notes(done) and "agent-03 is online" in notes(done)
    assert done.summary["rounds"] == 6


def test_the_broker_restarts_in_mid_round_and_nothing_is_lost(tmp_path: Path, calm: Simulated) -> None:
    faults = write_faults(tmp_path, "round: 2, after_s: 0.005, do: broker-restart, down_s: 2")
    done = simulate(boston(), faults=faults)
    assert "the broker is away" in notes(done) and "the broker is back" in notes(done)
    assert done.summary["faults"][0]["what"] == "broker restarted, down for 2 s"
    assert done.summary["params_sha256"] == calm.summary["params_sha256"], "the same answers, only later"
    assert done.summary["virtual_seconds"] > calm.summary["virtual_seconds"] + 1.5


def test_a_killed_server_resumes_to_the_same_result(tmp_path: Path, calm: Simulated) -> None:
    faults = write_faults(tmp_path, "round: 3, after_s: 0.005, do: server-kill")
    done = simulate(boston(), faults=faults)
    assert done.summary["params_sha256"] == calm.summary["params_sha256"]
    assert "server killed" in notes(done) and "resumes" in notes(done)


def test_a_slow_agent_is_not_waited_for_longer_than_the_job_says(tmp_path: Path) -> None:
    faults = write_faults(tmp_path, "round: 2, do: slow, agents: [agent-06], factor: 100000")
    done = simulate(boston(), faults=faults)
    late = [record.shares["agent-06"] for record in done.result.records[2:] if "agent-06" in record.shares]
    assert late and all(share.outcome != "answered" for share in late)
    assert done.summary["rounds"] == 4


def test_a_network_cut_only_delays(tmp_path: Path, calm: Simulated) -> None:
    faults = write_faults(tmp_path, "round: 2, do: cut, agents: [agent-04], for_s: 2")
    done = simulate(boston(), faults=faults)
    assert done.summary["params_sha256"] == calm.summary["params_sha256"]
    assert done.result.records[1].seconds > 2.0


def test_a_missed_quorum_names_the_agents(tmp_path: Path) -> None:
    faults = write_faults(tmp_path, "round: 2, after_s: 0.005, do: die, agents: [agent-00, agent-01, agent-02]")
    with pytest.raises(FleetUnavailable) as caught:
        simulate(boston("train.quorum=8", "train.retries=1"), faults=faults)
    for name in ("agent-00", "agent-01", "agent-02"):
        assert name in str(caught.value)
    assert caught.value.exit_code == 3


def test_waiting_is_never_silent(tmp_path: Path) -> None:
    faults = write_faults(tmp_path, "round: 2, do: slow, agents: [agent-06], factor: 100000")
    done = simulate(boston("train.straggler_s=25"), faults=faults)
    assert any("agent-06" in event.names for event in done.events if isinstance(event, Waiting))


def test_a_slower_network_costs_virtual_time_only(calm: Simulated) -> None:
    done = simulate(boston("simulation.network.latency_s=0.3"))
    assert done.summary["params_sha256"] == calm.summary["params_sha256"]
    assert done.summary["virtual_seconds"] > calm.summary["virtual_seconds"] + 2.0


def test_a_fault_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        simulate(boston(), faults=tmp_path / "gone.yaml")


def test_without_wall_clock_keeps_everything_else(calm: Simulated) -> None:
    kept = without_wall_clock(calm.summary)
    assert "seconds" not in kept and "seconds" not in kept["baseline"]
    assert kept["params_sha256"] == calm.summary["params_sha256"]
