"""Federated averaging over scripted agents: quorum, deadlines, deaths, returns, bad updates, order, resumption."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers_server import PROGRAMS, Agent, Fleet, job_spec
from sordino_common import messages as m
from sordino_common.errors import FleetUnavailable, PolicyRefusal
from sordino_common.plan.arrays import from_numpy
from sordino_server.rounds.effects import Checkpoint
from sordino_server.rounds.events import Note, RoundDone, RoundStarted, Waiting
from sordino_server.rounds.fedavg import federated_averaging
from sordino_server.rounds.roll import DataMismatch

START = (np.zeros(2, np.float32),)


def agents(count: int = 5, **fields: object) -> list[Agent]:
    return [Agent(f"agent-{k}", rows=10 + k, **fields) for k in range(count)]  # type: ignore[arg-type]


def begin(fleet: Fleet, *, resumed: Checkpoint | None = None, **train: object) -> list[Checkpoint]:
    saved: list[Checkpoint] = []
    generator = federated_averaging(job_spec(**train), run="toy-1", programs=PROGRAMS, params=START, resumed=resumed)
    fleet.conductor.start(generator, run="toy-1", save=saved.append)
    return saved


def run(fleet: Fleet, **train: object) -> tuple[Checkpoint, list[Checkpoint]]:
    saved = begin(fleet, **train)
    fleet.finish()
    return fleet.conductor.result(), saved


def test_everybody_trains_every_round() -> None:
    fleet = Fleet(agents())
    final, saved = run(fleet)
    assert [state.record.round for state in saved] == [1, 2, 3, 4]
    assert all(record.dropouts == 0 and len(record.shares) == 5 for record in (s.record for s in saved))
    assert final.steps == 4 * 5 * 3
    assert set(final.record.metrics) == {"test_mse"}
    assert final.record.test_rows == 5 + 5 + 6 + 6 + 7
    described = [message for message in fleet.agents["agent-0"].seen if isinstance(message, m.Describe)]
    assert len(described) == 1  # once per agent and boot
    assert sum(isinstance(message, m.PlanPut) for message in fleet.agents["agent-0"].seen) == 2
    total = sum(s.record.bytes_up for s in saved), sum(s.record.bytes_down for s in saved)
    assert total == (fleet.up, fleet.down)  # every byte is counted in exactly one round


def test_the_mean_is_weighted_by_rows() -> None:
    def fixed(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        if not isinstance(reply, m.Trained):
            return reply
        update = from_numpy(np.full(2, {"agent-0": 1.0, "agent-1": 4.0}[agent.name], np.float32))
        return m.Trained(
            run=reply.run, round=reply.round, attempt=reply.attempt, rows=agent.rows, steps=2, update=(update,),
            loss_sum={"agent-0": 2.0, "agent-1": 8.0}[agent.name], seconds=0.0,
        )  # fmt: skip

    fleet = Fleet([Agent("agent-0", rows=10, answer=fixed), Agent("agent-1", rows=30, answer=fixed)])
    final, _ = run(fleet, rounds=1)
    np.testing.assert_array_equal(final.params[0], np.full(2, (10 * 1 + 30 * 4) / 40, np.float32))
    assert final.record.loss == pytest.approx((10 * 1.0 + 30 * 4.0) / 40)


def test_the_result_does_not_depend_on_the_order_of_arrival() -> None:
    results = []
    for delays in ((0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.1, 0.4, 0.2, 0.3)):
        team = agents()
        for agent, delay_s in zip(team, delays, strict=True):
            agent.delay_s = delay_s
        results.append(run(Fleet(team))[0].params[0].tobytes())
    assert results[0] == results[1]


def test_agents_that_die_in_mid_round_do_not_stop_it() -> None:
    fleet = Fleet(agents(10, delay_s=1.0))
    saved = begin(fleet, rounds=5)
    assert fleet.loop.run_until(lambda: len(fleet.told(RoundStarted)) == 2, deadline_s=100.0)
    fleet.loop.advance(0.5)
    for k in range(3):
        fleet.die(f"agent-{k}")
    fleet.finish()
    final = fleet.conductor.result()
    assert len(saved) == 5
    hit = next(s.record for s in saved if s.record.dropouts)
    assert hit.dropouts == 3
    assert {name for name, share in hit.shares.items() if share.note == "went offline"} == {
        "agent-0", "agent-1", "agent-2"
    }  # fmt: skip
    assert hit.seconds < 10.0  # not the straggler's time, and not the deadline
    assert len(final.record.shares) == 7
    assert any("went offline" in note.text for note in fleet.told(Note))


def test_a_straggler_is_left_behind_and_told_to_stop() -> None:
    team = agents(4)
    team[2].delay_s = 25.0
    fleet = Fleet(team)
    saved = begin(fleet, rounds=2, join_s=30.0, evaluate_every=0)
    fleet.finish()
    assert saved[0].record.shares["agent-2"].outcome == "missing"
    assert "10 s of the quorum" in saved[0].record.shares["agent-2"].note
    assert saved[0].record.seconds == pytest.approx(10.1, abs=0.2)
    assert any(isinstance(message, m.Cancel) for message in team[2].seen)
    waiting = fleet.told(Waiting)
    assert any(event.names == ("agent-2",) and event.quorum == 2 for event in waiting)


def test_a_flapping_link_is_forgiven_and_a_reboot_joins_the_next_round() -> None:
    fleet = Fleet(agents(4, delay_s=2.0))
    saved = begin(fleet, rounds=3, evaluate_every=0)
    trainings = lambda: [e for e in fleet.events if isinstance(e, RoundStarted)]  # noqa: E731
    assert fleet.loop.run_until(lambda: len(trainings()) == 1, deadline_s=100.0)
    now_s = fleet.loop.now_s()
    # agent-0's connection drops and comes back; agent-1 reboots
    fleet.at(now_s + 0.5, lambda: fleet.conductor.on_presence("agent-0", False, 1))
    fleet.at(now_s + 1.5, lambda: fleet.conductor.on_presence("agent-0", True, 1))
    fleet.at(now_s + 0.6, lambda: fleet.die("agent-1"))
    fleet.at(now_s + 1.0, lambda: fleet.come_back("agent-1"))
    fleet.finish()
    assert saved[0].record.shares["agent-0"].outcome == "answered"
    assert saved[0].record.shares["agent-1"].note == "restarted"
    assert saved[1].record.shares["agent-1"].outcome == "answered"
    assert sum(isinstance(message, m.PlanPut) for message in fleet.agents["agent-1"].seen) == 4


def test_latecomers_join_at_the_next_round() -> None:
    team = agents(4, delay_s=1.0)
    team[3].online = False
    fleet = Fleet(team)
    saved = begin(fleet, rounds=5)
    assert fleet.loop.run_until(lambda: len(fleet.told(RoundStarted)) == 3, deadline_s=100.0)
    fleet.loop.advance(0.5)
    fleet.come_back("agent-3", reboot=False)
    fleet.finish()
    assert [("agent-3" in s.record.shares) for s in saved] == [False, False, False, True, True]


BAD = {
    "nan": (lambda r: {"update": (from_numpy(np.array([1, math.nan], np.float32)),)}, "not finite"),
    "shape": (lambda r: {"update": (from_numpy(np.zeros(3, np.float32)),)}, "expected float32[2]"),
    "dtype": (lambda r: {"update": (from_numpy(np.zeros(2, np.float64)),)}, "float64[2]"),
    "count": (lambda r: {"update": ()}, "0 tensors"),
    "rows": (lambda r: {"rows": 0}, "0 rows"),
    "loss": (lambda r: {"loss_sum": math.inf}, "loss is not finite"),
    "round": (lambda r: {"round": r.round + 1}, "answers toy-1 round"),
    "run": (lambda r: {"run": "another"}, "answers another"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_excluded_by_name(kind: str) -> None:
    change, words = BAD[kind]

    def spoil(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        if not isinstance(reply, m.Trained):
            return reply
        fields = {name: getattr(reply, name) for name in reply.__struct_fields__}
        return m.Trained(**{**fields, **change(reply)})

    team = agents(5)
    team[1].answer = spoil
    fleet = Fleet(team)
    _, saved = run(fleet, rounds=2)
    share = saved[0].record.shares["agent-1"]
    assert share.outcome == "refused"
    assert words in share.note
    assert saved[0].record.dropouts == 1
    assert any("without agent-1" in note.text for note in fleet.told(Note))
    honest = Fleet([agent for agent in agents(5) if agent.name != "agent-1"])
    # But for the moments, which agent-1 gave honestly, the others' result is what it would be without it.
    assert run(honest, rounds=2)[0].params[0].tobytes() == saved[1].params[0].tobytes()


def test_limits_refuse_large_norms_and_row_counts() -> None:
    team = agents(3)
    fleet = Fleet(team)
    saved: list[Checkpoint] = []
    spec = job_spec(rounds=1, quorum=1)
    from msgspec.structs import replace

    from sordino_server.job import LimitsSpec

    spec = replace(spec, limits=LimitsSpec(update_norm=1e-3, rows_per_agent=11))
    fleet.conductor.start(
        federated_averaging(spec, run="toy-1", programs=PROGRAMS, params=START), run="toy-1", save=saved.append
    )
    fleet.finish()
    with pytest.raises(FleetUnavailable, match=r"agent-0 \(the update's L2 norm .*agent-2 \(claims 12 rows"):
        fleet.conductor.result()


def test_a_missed_quorum_is_asked_again_from_those_missing_then_named() -> None:
    team = agents(4)
    for agent in team[1:]:
        agent.mute = (m.Train,)
    fleet = Fleet(team)
    begin(fleet)
    fleet.finish()
    with pytest.raises(FleetUnavailable) as caught:
        fleet.conductor.result()
    for name in ("agent-1", "agent-2", "agent-3"):
        assert f"{name} (no answer within 60 s)" in str(caught.value)
    asked = [(event.attempt, event.asked) for event in fleet.told(RoundStarted)]
    assert asked == [(0, ("agent-0", "agent-1", "agent-2", "agent-3")), (1, ("agent-1", "agent-2", "agent-3"))]
    trains = [message for message in team[1].seen if isinstance(message, m.Train)]
    assert [message.attempt for message in trains] == [0, 1]


def test_a_retry_keeps_the_answers_it_has() -> None:
    team = agents(4)
    for agent in team[1:]:
        agent.mute = (m.Train,)
    fleet = Fleet(team)
    saved = begin(fleet, rounds=1)
    assert fleet.loop.run_until(lambda: len(fleet.told(RoundStarted)) == 2, deadline_s=1000.0)
    for agent in team:
        agent.mute = ()
    fleet.finish()
    assert saved[0].record.attempts == 2
    assert saved[0].record.dropouts == 0
    assert saved[0].params[0].tobytes() == run(Fleet(agents(4)), rounds=1)[0].params[0].tobytes()


def test_nobody_there() -> None:
    team = agents(3)
    for agent in team:
        agent.online = False
    fleet = Fleet(team)
    begin(fleet)
    fleet.finish(within_s=200.0)
    with pytest.raises(FleetUnavailable, match=r"0 are ready, 2 are needed; missing: agent-0 \(offline\)"):
        fleet.conductor.result()
    assert fleet.told(Waiting)[0].names == ("agent-0", "agent-1", "agent-2")


def test_agents_without_the_data_are_left_out_at_once_with_the_reason() -> None:
    team = agents(3)
    team[0].dataset = "wages"
    fleet = Fleet(team)
    _, saved = run(fleet, rounds=2, quorum=1.0)
    assert all(set(s.record.shares) == {"agent-1", "agent-2"} for s in saved)
    assert any("agent-0 is left out: no dataset toy; it offers wages" in note.text for note in fleet.told(Note))
    for agent in team:
        agent.dataset = "wages"
    alone = Fleet(team)
    begin(alone)
    alone.finish(within_s=30.0)
    # No agent has it: that is the job's mistake.
    with pytest.raises(DataMismatch, match="no dataset toy; it offers wages") as mismatch:
        alone.conductor.result()
    assert mismatch.value.key == "data.dataset"
    team[1].dataset = "wards"
    mixed = Fleet(team)
    begin(mixed)
    mixed.finish(within_s=30.0)
    with pytest.raises(FleetUnavailable, match=r"agent-1 \(no dataset toy; it offers wards\)"):
        mixed.conductor.result()


@pytest.mark.parametrize("command", [m.Describe, m.PlanPut, m.Moments, m.Train])
def test_policies_that_leave_too_few_are_a_matter_of_policy(command: type[m.Message]) -> None:
    """And only they: as soon as one is missing for another reason, the fleet is what is unavailable."""

    def no(agent: Agent, message: m.Message, reply: m.Message) -> m.Message:
        forbids = isinstance(message, command)
        return m.Refused(command=command.kind, code="policy", reason="see policy.jobs") if forbids else reply

    team = agents(4)
    for agent in team[2:]:
        agent.answer = no
    fleet = Fleet(team)
    begin(fleet, quorum=3)
    fleet.finish(within_s=30.0)  # nobody is waited for: all are there
    with pytest.raises(PolicyRefusal, match=r"agent-2 \(policy: see policy.jobs\), agent-3 \(policy"):
        fleet.conductor.result()
    team[1].mute = (command,)
    mixed = Fleet(team)
    begin(mixed, quorum=3)
    mixed.finish(within_s=400.0)
    with pytest.raises(FleetUnavailable, match=r"agent-2 \(policy: see policy.jobs\)"):
        mixed.conductor.result()


def test_a_device_that_never_describes_itself_slows_only_some_rounds() -> None:
    team = agents(4)
    team[3].mute = (m.Describe,)
    fleet = Fleet(team)
    _, saved = run(fleet, rounds=16, evaluate_every=0)
    slow = [s.record.round for s in saved if s.record.seconds > 4.0]
    assert slow == [2, 4, 8, 16]


def test_a_cohort_is_drawn_from_seed_and_round() -> None:
    def cohorts(seed: int) -> list[frozenset[str]]:
        _, saved = run(Fleet(agents(10)), agents=4, seed=seed, rounds=6)
        return [frozenset(s.record.shares) for s in saved]

    first = cohorts(1)
    assert all(len(cohort) == 4 for cohort in first)
    assert len(set(first)) > 1
    assert first == cohorts(1)
    assert first != cohorts(2)


def test_resumed_equals_uninterrupted_to_the_bit() -> None:
    whole, saved = run(Fleet(agents()), rounds=6)
    for state in saved[:-1]:
        fleet = Fleet(agents())
        begin(fleet, rounds=6, resumed=state)
        fleet.finish()
        again = fleet.conductor.result()
        assert again.params[0].tobytes() == whole.params[0].tobytes()
        assert again.scaling == whole.scaling
        assert again.steps == whole.steps
        assert dict(again.record.metrics) == dict(whole.record.metrics)
        assert not any(isinstance(message, m.Moments) for message in fleet.agents["agent-0"].seen)


def test_max_steps_ends_the_run_after_the_round_that_reaches_it() -> None:
    final, saved = run(Fleet(agents()), rounds=100, max_steps=31, evaluate_every=0)
    assert len(saved) == 3  # 15 steps a round
    assert final.steps == 45
    assert final.record.metrics  # the last round is evaluated


def test_moments_scale_over_the_fleet() -> None:
    team = agents(3)
    final, _ = run(Fleet(team), rounds=1)
    values = [np.linspace(sum(a.name.encode()) % 13, sum(a.name.encode()) % 13 + 1, a.rows) for a in team]
    pooled = np.concatenate(values)
    assert final.scaling.offset[0] == pytest.approx(pooled.mean(), rel=1e-12)
    assert final.scaling.scale[0] == pytest.approx(pooled.std(), rel=1e-9)
    train = next(message for message in team[0].seen if isinstance(message, m.Train))
    assert train.data.offset == final.scaling.offset
    assert train.data.split == "train"


def test_every_round_is_reported() -> None:
    fleet = Fleet(agents())
    _, saved = run(fleet)
    assert [event.record for event in fleet.told(RoundDone)] == [s.record for s in saved]
