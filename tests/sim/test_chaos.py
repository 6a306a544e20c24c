"""Chaos on the virtual clock: schedules drawn from seeds, and after each the law of `helpers_chaos`.

`make soak` plays ten times as many schedules.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from helpers_chaos import Watch
from helpers_sim import EXAMPLES, QUICK, boston, boston_secure, boston_shares
from sordino_common.errors import ConfigError, SordinoError
from sordino_server.cli import run_cli
from sordino_server.job import Job, load_job
from sordino_server.rounds.events import Note
from sordino_sim import runner
from sordino_sim.chaos import HARMLESS, draw_faults
from sordino_sim.cli import app
from sordino_sim.faults import FaultSchedule, plan_faults
from sordino_sim.runner import Simulated, simulate
from sordino_sim.scenario import Scenario

FULL = os.environ.get("SORDINO_SOAK") == "1"
MANY = 20 if FULL else 2
SLOW = ("simulation.network.latency_s=0.05", "train.straggler_s=60", "train.round_deadline_s=120", "train.join_s=20")
WORDS = {"broker", "server", "cut", "clock", "flood"}
pytestmark = pytest.mark.soak


def private(*overrides: str) -> Job:
    """Noised gradients over secure sums, with budgets that pay for the retries."""
    quick = ("train.rounds=3", "simulation.agents=6", "train.evaluate_every=0", "train.retries=3")
    return load_job(
        EXAMPLES / "boston-dp.yaml",
        overrides=(*quick, *SLOW, "train.quorum=4", "simulation.budget={epsilon: 40.0, delta: 1.0e-5}", *overrides),
    )


def chaos(job: Job, seed: int, patch: pytest.MonkeyPatch, *, harmless: bool, span_s: float = 1.0) -> Simulated:
    """One run under the schedule that `seed` draws."""

    def drawn(job: Job, scenario: Scenario, *_: object, **__: object) -> FaultSchedule:
        agents, helpers = scenario.agents, tuple(scenario.helpers)
        file = draw_faults(
            seed, agents=agents, helpers=helpers, rounds=job.spec.train.rounds, span_s=span_s, harmless=harmless
        )
        return plan_faults(file, agents=agents, helpers=helpers, seed=1, transport="memory", where="chaos", marks={})

    patch.setattr(runner, "fault_schedule", drawn)
    return simulate(job, with_baseline=False)


def require_named(failed: dict[int, SordinoError]) -> None:
    """What ended a run says who was not there, and that it can go on."""
    for seed, error in failed.items():
        assert error.exit_code == 3, (seed, error)
        assert any(word in str(error) for word in ("missing", "offline", "restarted")), (seed, error)


def test_a_schedule_is_a_value_of_its_seed(tmp_path: Path) -> None:
    agents = [f"agent-{index:02d}" for index in range(4)]
    drawn = [draw_faults(seed, agents=agents, rounds=5) for seed in range(50)]
    assert drawn == [draw_faults(seed, agents=agents, rounds=5) for seed in range(50)]
    assert {fault.do for file in drawn for fault in file.faults} == {*HARMLESS, "die", "leave", "return", "slow"}
    over_mqtt = [draw_faults(seed, agents=agents, rounds=5, transport="mqtt") for seed in range(50)]
    assert "cut" not in {fault.do for file in over_mqtt for fault in file.faults}
    (tmp_path / "faults.yaml").write_text("faults: []\n")
    with pytest.raises(ConfigError, match=r"--faults and --chaos both give a schedule"):
        simulate(boston(), faults=tmp_path / "faults.yaml", chaos=1)


def test_the_command_line_plays_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    quick = [part for item in (*QUICK, *SLOW) for part in ("--set", item)]
    command = [
        "run",
        str(EXAMPLES / "boston-fedavg.yaml"),
        *quick,
        "--chaos",
        "3",
        "--no-baseline",
        "--json",
        "--quiet",
    ]
    assert run_cli(app, command, program="sordino-sim") == 0
    assert json.loads(capsys.readouterr().out)["faults"]


@pytest.mark.parametrize("make", [boston, boston_secure], ids=["plain", "secure"])
def test_what_only_delays_changes_no_bit(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broker restarts, cuts, clocks set by days, floods, a killed server: the parameters of an undisturbed run."""
    job: Job = make(*SLOW, "train.rounds=4", "train.quorum=1.0")  # type: ignore[operator]
    calm = simulate(job, with_baseline=False).summary["params_sha256"]
    happened: set[str] = set()
    for seed in range(MANY):
        with monkeypatch.context() as patch:
            watch = Watch().begin(patch)
            done = chaos(job, seed, patch, harmless=True)
        assert done.summary["params_sha256"] == calm, seed
        assert done.summary["dropouts"] == 0, seed
        watch.check()
        happened |= {
            word
            for fault in done.summary["faults"]
            for word in ("broker", "server", "cut", "clock", "flood")
            if word in fault["what"]
        }
    assert happened == {"broker", "server", "cut", "clock", "flood"}
    assert len(HARMLESS) == len(happened)


def test_who_dies_at_random_costs_its_round_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, failed = list[int](), dict[int, SordinoError]()
    for seed in range(MANY):
        with monkeypatch.context() as patch:
            watch = Watch().begin(patch)
            try:
                done = chaos(boston_secure(*SLOW, "train.rounds=4"), seed, patch, harmless=False)
            except SordinoError as error:
                failed[seed] = error
            else:
                ended.append(seed)
                assert done.summary["rounds"] == 4
                for record in done.result.records:
                    for name, share in record.shares.items():
                        assert share.outcome == "answered" or share.note, (seed, record.round, name)
        watch.check()
    require_named(failed)
    assert len(ended) >= MANY // 2


def test_privacy_is_charged_for_whatever_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices, helpers and server die at random. No ledger ever has fewer entries than answers have left, and the run
    counts what was begun in vain."""
    released = 0
    ended, failed = list[int](), dict[int, SordinoError]()
    for seed in range(MANY):
        with monkeypatch.context() as patch:
            watch = Watch().begin(patch)
            try:
                done = chaos(private(), seed, patch, harmless=False, span_s=0.5)
            except SordinoError as error:
                failed[seed] = error
            else:
                ended.append(seed)
                spent = done.summary["privacy"]
                # The job's epsilon pays for three releases: one that a fault voids is one round less.
                assert done.summary["rounds"] <= spent["releases"] == max(watch.begun.values()) == 3
        watch.check()
        released += sum(len(found) for found in watch.released.values())
    require_named(failed)
    assert released > 5 * MANY and (ended or not FULL)


def test_sessions_on_shares_survive_or_end_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    job = boston_shares(
        "train.rounds=2", "spdz.checkpoint_every=4", "train.retries=3", "simulation.network.latency_s=0.02"
    )
    calm = simulate(job, with_baseline=False)
    ended, failed = list[int](), dict[int, SordinoError]()
    for seed in range(MANY):
        with monkeypatch.context() as patch:
            watch = Watch().begin(patch)
            try:
                done = chaos(job, seed, patch, harmless=False, span_s=0.3)
            except SordinoError as error:
                failed[seed] = error
            else:
                ended.append(seed)
                mse = done.summary["metrics"]["test_mse"]
                assert abs(mse - calm.summary["metrics"]["test_mse"]) < 0.2 * mse, seed
        watch.check()
        assert watch.opened
    require_named(failed)
    assert ended or not FULL


def test_a_clock_beyond_the_rosters_expiry_is_named_and_its_return_mends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Eleven years on, the roster of a simulation has expired for that device; the others go on."""
    path = tmp_path / "faults.yaml"
    path.write_text(
        "faults:\n"
        "  - {round: 1, do: clock, agents: [agent-02], by_s: 350000000}\n"
        "  - {round: 3, do: clock, agents: [agent-02], by_s: -350000000}\n"
    )
    with caplog.at_level(logging.WARNING, "sordino.agent"):
        done = simulate(boston(*SLOW, "train.rounds=6"), faults=path, with_baseline=False)
    outcomes = [record.shares["agent-02"].outcome for record in done.result.records if "agent-02" in record.shares]
    assert "missing" in outcomes and outcomes[-1] == "answered", outcomes
    said = [event.text for event in done.events if isinstance(event, Note)]
    assert any("without agent-02: no answer" in text for text in said), said
    assert any("roster" in record.message and "expired" in record.message for record in caplog.records)


def test_a_flood_is_named_and_the_others_rounds_go_on(tmp_path: Path) -> None:
    """Also over secure sums, where what devices say unasked is listened to. Its own answers drown in it, no other's."""
    path = tmp_path / "faults.yaml"
    path.write_text("faults: [{round: 1, do: flood, agents: [agent-03], per_s: 1000, for_s: 20}]\n")
    for job in (boston(*SLOW, "train.straggler_s=5"), boston_secure(*SLOW, "train.straggler_s=5")):
        done = simulate(job, faults=path, with_baseline=False)
        assert done.summary["rounds"] == job.spec.train.rounds
        for record in done.result.records:
            lost = {name for name, share in record.shares.items() if share.outcome != "answered"}
            assert lost <= {"agent-03"} and len(record.shares) >= 7, record
        said = [event.text for event in done.events if isinstance(event, Note)]
        assert [text for text in said if "agent-03 floods this server: 100 messages" in text], said
        refused = [text for text in said if "a packet of agent-03 was refused" in text]
        assert 0 < len(refused) <= 20 * (1 + int(done.summary["virtual_seconds"] / 60))


@pytest.mark.mqtt
def test_a_flood_over_a_real_broker(tmp_path: Path) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text("faults: [{round: 1, do: flood, agents: [agent-03], per_s: 300, for_s: 30}]\n")
    job = boston("simulation.agents=5", "train.rounds=3", "train.straggler_s=20", "train.round_deadline_s=60")
    done = simulate(job, transport="mqtt", faults=path, with_baseline=False)
    for record in done.result.records:
        lost = {name for name, share in record.shares.items() if share.outcome != "answered"}
        assert lost <= {"agent-03"}, record
    said = [event.text for event in done.events if isinstance(event, Note)]
    assert [text for text in said if "a packet of agent-03 was refused" in text], said
