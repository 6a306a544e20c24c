"""Private training on the simulated fleet, with real agents, helpers, noise and ledgers."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers_play import BasePlay
from helpers_sim import EXAMPLES, write_faults
from sordino_agent.budget import BudgetSpec
from sordino_common import messages as m
from sordino_common.errors import BudgetRefused, ConfigError, FleetUnavailable
from sordino_common.plan.arrays import to_numpy
from sordino_server.cli import run_cli
from sordino_server.job import Job, load_job
from sordino_server.model import make_model, trace_job
from sordino_server.rounds.effects import Checkpoint, Effect, Result
from sordino_server.rounds.events import Event, Note, RoundDone, RoundStarted
from sordino_server.rounds.fedavg import federated_averaging
from sordino_server.run_private import PrivateRun, private_run
from sordino_sim.cli import app
from sordino_sim.runner import Simulated, simulate, without_wall_clock
from sordino_sim.scenario import scenario_of

QUICK = ("train.rounds=3", "simulation.agents=6", "train.evaluate_every=0", "train.join_s=5", "train.retries=1")
# So little noise that what comes out can be computed by hand, to about 1e-4.
STILL = ("privacy.epsilon=null", "privacy.noise_multiplier=0.0001")
LOCAL = ("privacy.noise=device", "train.local_steps=2")
DEVICE = ("privacy.unit=device", "privacy.noise=null", "privacy.sampling_rate=null")


def quick(*overrides: str, name: str = "boston-dp") -> Job:
    return load_job(EXAMPLES / f"{name}.yaml", overrides=(*QUICK, *overrides))


class Play(BasePlay):
    """A private run."""

    name = "private-1"

    def __init__(self, *overrides: str, **more: Any) -> None:
        self.private: PrivateRun | None = None
        super().__init__(quick(*overrides), **more)

    def rounds(self, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        self.private = private_run(self.job, make_model(self.job), self.fleet.world(), begun=self.begun)
        return self.private.rounds(self.name, resumed)

    def summary(self, final: Checkpoint) -> dict[str, Any]:
        assert self.private is not None
        return self.private.summary(final.record.round)["privacy"]  # type: ignore[no-any-return]


def pooled(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """All train rows as the devices feed them, standardised: x [R, 13], y [R]."""
    data = job.spec.data
    tables = scenario_of(job).tables().values()
    xs = [np.stack([t.columns[name][t.rows("train")] for name in data.features], axis=1) for t in tables]
    ys = [t.columns[data.target][t.rows("train")] for t in tables]
    x = (np.concatenate(xs) - np.array(data.offset)) / np.array(data.scale)
    return x, (np.concatenate(ys) - data.target_offset) / data.target_scale


# --- what is computed ----------------------------------------------------------------------------------------------


def test_a_round_is_a_step_on_the_mean_of_the_clipped_gradients_of_all_rows() -> None:
    play = Play(*STILL, "train.rounds=1")
    final = play.run()
    x, y = pooled(play.job)
    rows = 2.0 * (0.0 - y)[:, None] * np.concatenate([x, np.ones((len(x), 1))], axis=1)  # gradients at zero
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    gradient = (rows * np.minimum(1.0, 1.0 / np.maximum(norms, 1e-12))).sum(0) / len(x)
    weight, bias = final.params
    np.testing.assert_allclose(weight[0], -0.14 * gradient[:13], atol=2e-5)
    np.testing.assert_allclose(bias, -0.14 * gradient[13:], atol=2e-5)
    assert final.record.loss is None and all(share.loss is None for share in final.record.shares.values())


def test_the_optimizers_state_lives_on_the_server_and_in_checkpoints() -> None:
    momentum = Play(*STILL, "train.rounds=2", "optimizer.momentum=0.9")
    final = momentum.run()
    first = Play(*STILL, "train.rounds=1").run()
    again = Play(*STILL, "train.rounds=2").run()
    assert final.private is not None and [s.shape for s in final.private.optimizer] == [(1, 13), (1,)]
    # The second step of plain SGD is g2, with momentum 0.9 g1 + g2 at the same point.
    step1, step2 = first.params[0], again.params[0] - first.params[0]
    np.testing.assert_allclose(final.params[0], step1 + 0.9 * step1 + step2, atol=5e-5)


def test_the_unit_device_adds_the_mean_of_the_clipped_updates() -> None:
    job = quick(*DEVICE, *STILL, "train.rounds=1", "privacy.clip_norm=0.05")
    play = Play(*DEVICE, *STILL, "train.rounds=1", "privacy.clip_norm=0.05")
    updates: dict[str, np.ndarray] = {}

    class Plain(BasePlay):
        def rounds(self, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
            traced = trace_job(self.job, make_model(self.job))
            return federated_averaging(self.job.spec, run="plain", programs=traced.programs, params=traced.params)

    single = Plain(job)
    single.run()
    for name, message in single.of(m.Trained):
        assert isinstance(message, m.Trained)
        updates[name] = np.concatenate([to_numpy(array).ravel() for array in message.update]).astype(np.float64)
    clipped = [u * min(1.0, 0.05 / np.linalg.norm(u)) for u in updates.values()]
    final = play.run()
    ours = np.concatenate([param.ravel() for param in final.params])
    np.testing.assert_allclose(ours, np.mean(clipped, axis=0), atol=2e-5)
    assert any(np.linalg.norm(u) > 0.05 for u in updates.values()), "the clip norm was felt"


def test_noise_of_the_devices_alone_learns_the_same_with_and_without_secure_sums() -> None:
    """Every device takes two noised steps on all its rows; the mean is weighted by rows."""
    inside = Play(*LOCAL, *STILL, "train.rounds=2")
    secure = inside.run()
    outside = Play(*LOCAL, *STILL, "train.rounds=2", "secure_aggregation=false")
    bare = outside.run()
    for ours, theirs in zip(secure.params, bare.params, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-4)
    assert bare.record.loss is None and all(share.loss is None for share in bare.record.shares.values())
    assert secure.record.loss is None
    assert all(message.loss_sum == 0.0 for _, message in outside.of(m.Trained))  # type: ignore[attr-defined]
    assert inside.begun == outside.begun == 2
    assert inside.summary(secure)["releases"] == 4, "two steps in each of two releases"


def test_both_units_at_once() -> None:
    play = Play(*LOCAL, *STILL, "train.rounds=2", "privacy.device={noise_multiplier: 0.0001, clip_norm: 100.0}")
    final = play.run()
    alone = Play(*LOCAL, *STILL, "train.rounds=2").run()
    for ours, theirs in zip(final.params, alone.params, strict=True):  # here every device counts the same
        np.testing.assert_allclose(ours, theirs, atol=2e-2)
    told = play.summary(final)
    assert (told["unit"], told["releases"]) == ("record", 4)
    assert (told["device"]["unit"], told["device"]["releases"]) == ("device", 2)


# --- what is seen --------------------------------------------------------------------------------------------------


def test_nothing_but_noised_sums_reaches_the_server() -> None:
    play = Play("train.rounds=1")
    play.run()
    assert {type(message) for _, message in play.sent} == {
        m.Described, m.PlanReady, m.Contribution, m.SumSeedsChecked, m.SumShare
    }  # fmt: skip
    # A gradient and, after the last round, metrics: no extras with losses behind the gradient's 14 entries.
    shapes = {message.masked.shape for _, message in play.of(m.Contribution)}  # type: ignore[attr-defined]
    assert shapes == {(14,), (2,)}


def test_the_noise_in_the_sum_is_what_was_promised() -> None:
    """20 rounds of 14 entries: the updates' variance within a factor that 280 normal draws leave with a chance of less
    than 1e-6 (chi-square, Laurent and Massart 2000: |s²/σ² - 1| > 2 sqrt(t/280) + 2t/280 has a chance below 2e^-t)."""
    play = Play("train.rounds=20", "optimizer.lr=1.0e-9", "privacy.epsilon=0.1")
    moves: list[np.ndarray] = []
    before = [np.zeros(14)]

    def watch(_: BasePlay, event: Event) -> None:
        if isinstance(event, RoundDone):
            now = np.concatenate([p.ravel() for p in play.saved[-1].params]).astype(np.float64)
            moves.append((now - before[-1]) / 1e-9)
            before.append(now)

    play.on_event = watch
    final = play.run()
    rows = sum(share.rows for share in final.record.shares.values())
    told = play.summary(final)
    # The gradient hardly changes at this learning rate: what differs between rounds is noise.
    noise = (np.array(moves) - np.mean(moves, axis=0)) * rows
    expected = 3 * (told["noise_multiplier"] * told["clip_norm"]) ** 2  # two helpers and the server
    ratio = noise.var() * 20 / 19 / expected
    t = 15.0
    assert abs(ratio - 1.0) < 2 * np.sqrt(t / 266) + 2 * t / 266
    assert 0.099 < told["epsilon"] <= 0.1


def test_metrics_are_exact_sums_which_a_device_may_refuse() -> None:
    play = Play("train.rounds=1")
    for agent in play.fleet.agents.values():
        assert agent.core is not None
        agent.ledger.budgets = {"boston": BudgetSpec(epsilon=10.0, delta=1e-5)}
        agent.core.reconfigure(msgspec.structs.replace(agent.core._policy, exact_evaluation=False))
    final = play.run()
    assert final.record.metrics == {}
    assert "no metrics" in play.notes() and "exact_evaluation" in play.notes()


# --- what is counted -----------------------------------------------------------------------------------------------


def test_a_void_sum_is_paid_for_and_training_ends_within_its_epsilon() -> None:
    def change(name: str, message: m.Message) -> m.Message | None:
        if name == "helper-0" and isinstance(message, m.SumShare):
            return None if not lost else message
        return message

    lost: list[str] = []

    def watch(play: BasePlay, event: Event) -> None:
        if isinstance(event, RoundStarted) and event.attempt == 1:
            lost.append("helper-0")

    play = Play("train.round_deadline_s=20", change=change, on_event=watch)
    final = play.run(within_s=10_000)
    assert final.record.round == 2, "three releases were planned, one of them came to nothing"
    assert play.begun == 3
    assert "training ends after 2 of 3 rounds: 3 noised releases have begun" in play.notes()
    paid = (
        "it is paid for all the same: 1 of the 3 noised releases that epsilon is planned for have begun, and the budg"
    )
    assert paid + "ets of the 6 devices that contributed are charged" in play.notes()
    assert final.record.metrics["test_mse"] > 0.0, "the last round is evaluated, whatever makes it the last"
    told = play.summary(final)
    assert (told["releases"], told["rounds"]) == (3, 2)
    assert told["epsilon"] <= 0.5


def test_a_killed_server_does_not_forget_what_it_has_begun(tmp_path: Path) -> None:
    faults = write_faults(tmp_path, "round: 2, after_s: 0.004, do: server-kill")
    done = simulate(quick(), faults=faults, with_baseline=False)
    privacy = done.summary["privacy"]
    assert (done.summary["rounds"], privacy["releases"]) == (2, 3)
    assert privacy["epsilon"] <= 0.5
    assert done.summary["metrics"]["test_mse"] > 0.0
    texts = [event.text for event in done.events if isinstance(event, Note)]
    assert any("training ends after 2 of 3 rounds" in text for text in texts)


# --- budgets -------------------------------------------------------------------------------------------------------


def budgeted(play: Play, *names: str, epsilon: float) -> None:
    for name in names:
        play.fleet.agents[name].ledger.budgets = {"boston": BudgetSpec(epsilon=epsilon, delta=1e-5)}


def test_who_can_not_afford_it_is_named_and_the_others_go_on() -> None:
    play = Play("train.quorum=0.6", "secure_aggregation={helpers: 1, minimum: 3}")
    budgeted(play, "agent-03", epsilon=0.05)
    final = play.run()
    assert final.record.round == 3
    first = play.saved[0].record.shares
    assert first["agent-03"].outcome == "refused" and "budget" in first["agent-03"].note
    assert sum(share.outcome == "answered" for share in first.values()) == 5


@pytest.mark.parametrize("variant", [(), (*LOCAL, "secure_aggregation=false")])
def test_a_quorum_missed_for_budgets_is_exit_code_5_with_the_names(variant: tuple[str, ...]) -> None:
    play = Play("train.quorum=6", *variant)
    budgeted(play, "agent-01", "agent-04", epsilon=0.02)
    with pytest.raises(BudgetRefused, match=r"The privacy budget of agent-01, agent-04 can't pay for it") as caught:
        play.run()
    assert caught.value.exit_code == 5
    assert play.saved == []


def test_a_device_pays_for_what_it_contributes() -> None:
    play = Play(*LOCAL)
    budgeted(play, "agent-00", epsilon=20.0)
    play.run()
    ledger = play.fleet.agents["agent-00"].ledger
    entries = list(ledger.entries())
    assert [entry.charge.mechanism.count for entry in entries] == [2, 2, 2]
    assert play.private is not None
    assert {entry.charge.mechanism for entry in entries} == {play.private.private.guarantee.first.one}, (
        "device and server count the very same mechanism"
    )


# --- the whole job -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done() -> Simulated:
    return simulate(quick())


def test_the_summary_of_a_private_job(done: Simulated) -> None:
    summary = done.summary
    assert summary["security"] == "secure-aggregation"
    assert summary["train_loss"] is None
    assert summary["privacy"]["unit"] == "record" and 0.49 < summary["privacy"]["epsilon"] <= 0.5
    assert summary["metrics"]["test_mse"] > 0.0 and summary["baseline"]["test_mse"] > 0.0
    json.dumps(summary)


def test_the_same_seed_gives_the_same_bits(done: Simulated) -> None:
    again = simulate(quick(), with_baseline=True)
    assert without_wall_clock(again.summary) == without_wall_clock(done.summary)


def test_it_learns_at_epsilon_one_half() -> None:
    """30 rounds at the example's noise: far below the variance of the target, 84. By seed, so no false alarms."""
    found = simulate(load_job(EXAMPLES / "boston-dp.yaml"), with_baseline=False)
    assert found.summary["metrics"]["test_mse"] < 45.0


def test_a_sweep_over_epsilon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for item in QUICK for part in ("--set", item)]
    arguments = ["--sweep", "privacy.epsilon=0.5,8", "--report", str(tmp_path), "--quiet"]
    assert run_cli(app, ["run", str(EXAMPLES / "boston-dp.yaml"), *settings, *arguments], program="sordino-sim") == 0
    head, low, high = capsys.readouterr().out.splitlines()
    assert "plain PyTorch" in head and "noise multiplier" in head
    assert low.split()[0] == "0.5" and high.split()[0] == "8"
    assert "record-level differential privacy" in (tmp_path / "sweep.html").read_text()


def test_noise_that_no_setting_reaches_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"--set privacy.epsilon: epsilon 0.0001 at delta 1e-05 can't be kept over 3"):
        simulate(quick("privacy.epsilon=0.0001"))


def test_a_fleet_smaller_than_the_cohort_says_so() -> None:
    with pytest.raises(FleetUnavailable, match="are needed"):
        Play("simulation.agents=4").run()
