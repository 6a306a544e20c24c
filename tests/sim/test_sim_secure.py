"""Federated averaging over secure sums, with real agents, helpers and boxes on the simulated fleet, and with liars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers_play import BasePlay
from helpers_sim import boston_secure, write_faults
from sordino_common import messages as m
from sordino_common.errors import ConfigError, FleetUnavailable, PolicyRefusal, SordinoError
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_server.job import Job
from sordino_server.model import Traced, make_model, trace_job
from sordino_server.rounds.effects import Checkpoint, Effect, Result
from sordino_server.rounds.events import Answered, Event, RoundStarted
from sordino_server.rounds.fedavg import federated_averaging
from sordino_server.rounds.fedavg_secure import secure_averaging
from sordino_server.store import RunStore
from sordino_sim.harness import SERVER
from sordino_sim.runner import simulate

RUN = "secure-1"


JOBS: dict[tuple[str, ...], Job] = {}


def job_with(*overrides: str) -> Job:
    return JOBS.setdefault(overrides, boston_secure(*overrides))


TRACED = {}


def traced(job: Job) -> Traced:
    if id(job) not in TRACED:
        TRACED[id(job)] = trace_job(job, make_model(job))
    return TRACED[id(job)]


class Play(BasePlay):
    """A job over secure sums, or with `plain` the same by plain averaging."""

    name = RUN

    def __init__(self, *overrides: str, plain: bool = False, **more: Any) -> None:
        self.plain = plain
        self.traced = traced(job_with(*overrides))
        super().__init__(job_with(*overrides), **more)

    def rounds(self, resumed: Checkpoint | None) -> Generator[Effect, Result, Checkpoint]:
        programs, params = self.traced.programs, self.traced.params
        if self.plain:
            return federated_averaging(self.job.spec, run=RUN, programs=programs, params=params, resumed=resumed)
        return secure_averaging(
            self.job.spec, run=RUN, programs=programs, params=params, world=self.fleet.world(), resumed=resumed
        )


@pytest.fixture(scope="module")
def calm() -> Checkpoint:
    return Play().run()


def changed(message: m.Message, **fields: object) -> m.Message:
    return type(message)(**{**{name: getattr(message, name) for name in message.__struct_fields__}, **fields})


# --- the way it should be ------------------------------------------------------------------------------------------


def test_one_round_is_that_of_plain_averaging_but_for_rounding() -> None:
    """Off by at most n 2^-(f+1) W / Σ rows; with 8 devices of about as many rows each that is half a unit of 2^-16."""
    secure = Play("train.rounds=1").run()
    plain = Play("train.rounds=1", plain=True).run()
    rows = [share.rows for share in plain.record.shares.values()]
    bound = len(rows) * 2.0**-17 * max(rows) / sum(rows)
    for ours, theirs in zip(secure.params, plain.params, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=bound + 1e-7, rtol=0)
    assert secure.record.loss == pytest.approx(plain.record.loss, abs=1e-5)
    assert secure.record.metrics["test_mse"] == pytest.approx(plain.record.metrics["test_mse"], rel=1e-3)
    assert secure.record.test_rows == plain.record.test_rows
    assert secure.steps == plain.steps


def test_nothing_but_sums_reaches_the_server() -> None:
    play = Play("train.rounds=1")
    final = play.run()
    assert {type(message) for _, message in play.sent} == {
        m.Described, m.PlanReady, m.Contribution, m.SumSeedsChecked, m.SumShare
    }  # fmt: skip
    assert all(share.loss is None for share in final.record.shares.values())
    assert final.record.loss is not None
    # One contribution of each device to each of two sums; boxes for each helper; one share of each helper and sum.
    assert len(play.of(m.Contribution)) == 16
    assert len(play.of(m.SumShare)) == 4
    assert {name for name, _ in play.of(m.SumShare)} == {"helper-0", "helper-1"}
    contribution = play.of(m.Contribution)[0][1]
    assert isinstance(contribution, m.Contribution)
    # Bytes per parameter: 13*8+8+8+1 parameters and 7 extras in Z_2^32.
    assert (contribution.masked.dtype, contribution.masked.shape) == ("uint32", (121 + 7,))


def test_the_same_seed_gives_the_same_bits_whoever_the_helpers_are(calm: Checkpoint) -> None:
    again = Play().run()
    three = Play("secure_aggregation.helpers=3").run()
    for state in (again, three):
        for ours, theirs in zip(state.params, calm.params, strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_words_of_64_bits_give_the_same_sum(calm: Checkpoint) -> None:
    wide = Play("secure_aggregation.bits=64").run()
    for ours, theirs in zip(wide.params, calm.params, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_the_simulator_runs_such_a_job_from_its_file() -> None:
    done = simulate(boston_secure(), with_baseline=False)
    assert done.summary["security"] == "secure-aggregation"
    assert (done.summary["helpers"], done.summary["minimum_cohort"]) == (2, 5)
    assert (done.summary["agents"], done.summary["dropouts"]) == (8, 0)


@pytest.mark.mqtt
@pytest.mark.parametrize("transport", ["mqtt", "processes"])
def test_the_same_over_a_broker_and_as_processes(transport: str) -> None:
    quick = ("train.rounds=1", "simulation.agents=5")
    memory = simulate(boston_secure(*quick), with_baseline=False)
    real = simulate(boston_secure(*quick, "train.join_s=60"), transport=transport, with_baseline=False)  # type: ignore[arg-type]
    assert real.summary["params_sha256"] == memory.summary["params_sha256"]


# --- dropouts and lost parties -------------------------------------------------------------------------------------


def at_round(number: int, action: Callable[[Play], None], *, after_s: float) -> Callable[[Play, Event], None]:
    """`action` so long after the round's first attempt begins."""
    happened = []

    def on_event(play: Play, event: Event) -> None:
        if isinstance(event, RoundStarted) and event.round == number and not happened:
            happened.append(event)
            play.loop.call_at(play.loop.now_s() + after_s, lambda: action(play))

    return on_event


def test_dropouts_before_the_cut_cost_nothing() -> None:
    def drop(play: Play) -> None:
        for name in ("agent-01", "agent-04", "agent-06"):
            play.fleet.die(name)

    play = Play(on_event=at_round(2, drop, after_s=0.001))
    final = play.run()
    assert final.record.attempts == 1
    assert final.record.dropouts == 3
    assert final.record.shares["agent-01"].outcome == "missing"
    assert len([share for share in final.record.shares.values() if share.outcome == "answered"]) == 5
    # No share was asked for more than once: the sum is over who was left.
    assert len(play.of(m.SumShare)) == 2 * 4


def test_a_device_that_dies_after_its_contribution_is_in_the_sum(calm: Checkpoint) -> None:
    """It is not needed any more."""
    play = Play("train.rounds=1", "train.evaluate_every=0")
    done: list[str] = []

    def die(one: Play, event: Event) -> None:
        mine = isinstance(event, Answered) and (event.name, event.purpose) == ("agent-03", "update of round 1")
        if mine and not done:
            done.append("agent-03")
            one.fleet.die("agent-03")

    play.on_event = die
    final = play.run()
    assert done
    assert final.record.shares["agent-03"].outcome == "answered"
    assert final.params[0].tobytes() == play.saved[0].params[0].tobytes()


@pytest.mark.parametrize("moment", ["seeds", "cut"])
def test_a_lost_helper_voids_the_sum_and_another_takes_its_place(moment: str, calm: Checkpoint) -> None:
    """The next attempt has a fresh session and number, fresh seeds, and the same result."""
    lost: list[str] = []

    def change(name: str, message: m.Message) -> m.Message | None:
        due = isinstance(message, m.SumSeedsChecked if moment == "seeds" else m.SumShare)
        if name == "helper-0" and due and not lost:
            lost.append(name)
            play.loop.call_at(play.loop.now_s(), lambda: play.fleet.die("helper-0"))
            return None
        return message

    play = Play(change=change)
    final = play.run()
    assert lost
    first = play.saved[0].record
    assert first.attempts == 2
    assert first.dropouts == 0
    assert "helper helper-0 is lost: went offline; 2 attempts left" in play.notes()
    assert {name for name, _ in play.of(m.SumShare)} >= {"helper-1", "helper-2"}
    sessions = [message.session for _, message in play.of(m.Contribution)]  # type: ignore[attr-defined]
    assert len(set(sessions)) == 5  # two rounds of two sums each, and the one that came to nothing
    for ours, theirs in zip(final.params, calm.params, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_without_another_helper_the_run_ends_by_name() -> None:
    def change(name: str, message: m.Message) -> m.Message | None:
        return None if name.startswith("helper") and isinstance(message, m.SumShare) else message

    play = Play(change=change)
    with pytest.raises(FleetUnavailable, match=r"helper-0 in helpers-0 \(no share of helper helper-0, helper-1"):
        play.run()
    assert "no share of helper helper-0, helper-1 in time; 2 attempts left" in play.notes()


def test_a_helper_that_is_silent_about_seeds_is_found_out(calm: Checkpoint) -> None:
    def change(name: str, message: m.Message) -> m.Message | None:
        return None if name == "helper-1" and isinstance(message, m.SumSeedsChecked) else message

    play = Play(change=change)
    final = play.run()
    assert "0 contributions, 5 are needed; 8 wait for helper helper-1; 2 attempts left" in play.notes()
    assert final.params[0].tobytes() == calm.params[0].tobytes()


def test_a_killed_server_goes_on_under_new_numbers(calm: Checkpoint) -> None:
    def kill(play: Play) -> None:
        play.fleet.kill_server()
        play.loop.call_at(play.loop.now_s() + 1.0, play.start_server)

    play = Play(on_event=at_round(2, kill, after_s=0.05))
    final = play.run()
    assert play.sums > 4
    for ours, theirs in zip(final.params, calm.params, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_numbers_of_sums_are_never_given_twice(tmp_path: Path) -> None:
    with RunStore(tmp_path, wall_s=lambda: 0.0) as store:
        assert [store.next_sum("a"), store.next_sum("a"), store.next_sum("b")] == [1, 2, 1]
    with RunStore(tmp_path, wall_s=lambda: 0.0) as store:
        assert store.next_sum("a") == 3


# --- liars ---------------------------------------------------------------------------------------------------------


def bad_words(message: m.Contribution) -> m.Message:
    return changed(message, masked=from_numpy(np.zeros(3, np.uint32)))


LIES: dict[str, tuple[Callable[[m.Contribution], m.Message], str]] = {
    "another length": (bad_words, r"its vector is uint32\[3\], expected uint32\[128\]"),
    "another dtype": (
        lambda c: changed(c, masked=from_numpy(to_numpy(c.masked).astype(np.uint64))), r"its vector is uint64\[128\]",
    ),
    "a box too few": (lambda c: changed(c, boxes=c.boxes[:1]), "1 sealed seeds for 2 helpers"),
    "garbage in a box": (lambda c: changed(c, boxes=(b"garbage", c.boxes[1])), "helper helper-0 rejects its seed"),
    "boxes swapped": (lambda c: changed(c, boxes=c.boxes[::-1]), "rejects its seed: sealed-box: the signature"),
    "another session": (lambda c: changed(c, session=bytes(16)), "a contribution to another sum"),
    "endless time": (lambda c: changed(c, seconds=float("inf")), "claims to have taken inf seconds"),
    "another message": (lambda c: m.TensorDropped(dropped=1), "answered with tensor-dropped"),
    "a refusal": (lambda c: m.Refused(command="sum-update", code="limit", reason="no\x1b[2J"), r"limit: no \[2J"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_bad_contribution_is_excluded_by_name_and_the_rest_is_exact(lie: str) -> None:
    bend, why = LIES[lie]

    def change(name: str, message: m.Message) -> m.Message | None:
        return bend(message) if name == "agent-02" and isinstance(message, m.Contribution) else message

    def silent(name: str, message: m.Message) -> m.Message | None:
        return None if name == "agent-02" and isinstance(message, m.Contribution) else message

    one = ("train.rounds=1", "train.evaluate_every=0")
    play = Play(*one, change=change)
    final = play.run()
    assert final.record.attempts == 1
    share = final.record.shares["agent-02"]
    assert share.outcome == "refused"
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(share.note)
    assert sum(one.outcome == "answered" for one in final.record.shares.values()) == 7
    rest = Play(*one, change=silent).run()  # the same, had it said nothing
    assert rest.record.shares["agent-02"].outcome == "missing"
    for ours, theirs in zip(final.params, rest.params, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_a_second_contribution_changes_nothing(calm: Checkpoint) -> None:
    def change(name: str, message: m.Message) -> m.Message | None:
        if name == "agent-02" and isinstance(message, m.Contribution):
            other = play.fleet.agents["agent-02"].endpoint
            assert other is not None
            other.send(SERVER, changed(message, masked=from_numpy(np.ones(128, np.uint32))))
        return message

    play = Play(change=change)
    final = play.run()
    for ours, theirs in zip(final.params, calm.params, strict=True):
        assert ours.tobytes() == theirs.tobytes()


HELPER_LIES: dict[str, tuple[Callable[[m.Message], m.Message], str]] = {
    "a share of another set": (
        lambda s: changed(s, members=bytes(32)) if isinstance(s, m.SumShare) else s, "a share of another set",
    ),
    "a share of another length": (
        lambda s: changed(s, share=from_numpy(np.zeros(3, np.uint32))) if isinstance(s, m.SumShare) else s,
        "its share is uint32[3], expected uint32[128]",
    ),
    "seeds of another session": (
        lambda s: changed(s, session=bytes(16)) if isinstance(s, m.SumSeedsChecked) else s, "seeds of another sum",
    ),
    "another message": (
        lambda s: m.TensorDropped(dropped=1) if isinstance(s, m.SumSeedsChecked) else s, "answers with tensor-dropped",
    ),
    "a refusal of the cut": (
        lambda s: m.Refused(command="sum-cut", code="policy", reason="policy.min_cohort")
        if isinstance(s, m.SumShare) else s,
        "helper helper-0 refuses: policy: policy.min_cohort",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", HELPER_LIES)
def test_a_helper_that_lies_is_replaced(lie: str, calm: Checkpoint) -> None:
    bend, why = HELPER_LIES[lie]

    def change(name: str, message: m.Message) -> m.Message | None:
        return bend(message) if name == "helper-0" else message

    play = Play(change=change)
    final = play.run()
    assert why in play.notes()
    assert play.saved[0].record.attempts == 2
    for ours, theirs in zip(final.params, calm.params, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_a_share_that_is_wrong_in_its_words_is_poison_and_not_privacy() -> None:
    """A helper can falsify a sum, as a contributor can; nothing finds that, and SECURITY.md says so."""

    def change(name: str, message: m.Message) -> m.Message | None:
        if name == "helper-0" and isinstance(message, m.SumShare) and message.share.dtype == "uint32":
            words = to_numpy(message.share).copy()
            words[0] += 1 << 20
            return changed(message, share=from_numpy(words))
        return message

    poisoned = Play("train.rounds=1", change=change).run()
    plain = Play("train.rounds=1").run()
    assert not np.array_equal(poisoned.params[0], plain.params[0])


# --- too few -------------------------------------------------------------------------------------------------------


def test_no_sum_over_fewer_than_the_minimum() -> None:
    def change(name: str, message: m.Message) -> m.Message | None:
        dropped = name in ("agent-00", "agent-01", "agent-02", "agent-03") and isinstance(message, m.Contribution)
        return None if dropped else message

    play = Play("train.retries=1", "train.quorum=1", change=change)
    with pytest.raises(
        FleetUnavailable, match=r"update of round 1: no sum in 2 attempts; missing: agent-00 \(no answer"
    ):
        play.run(within_s=10_000)
    assert "4 contributions, 5 are needed; 1 attempts left" in play.notes()
    assert not play.of(m.SumShare)  # no helper was asked to open anything


def test_policies_that_forbid_it_end_the_run_as_such() -> None:
    def change(name: str, message: m.Message) -> m.Message | None:
        if isinstance(message, m.Contribution):
            return m.Refused(command="sum-update", code="policy", reason="see policy.min_cohort")
        return message

    play = Play("train.retries=0", change=change)
    with pytest.raises(PolicyRefusal, match=r"agent-00 \(policy: see policy.min_cohort\)"):
        play.run()


def test_budgets_that_are_spent_end_the_run_as_such() -> None:
    def change(name: str, message: m.Message) -> m.Message | None:
        if isinstance(message, m.Contribution):
            return m.Refused(command="sum-update", code="budget", reason="spent")
        return message

    play = Play("train.retries=0", change=change)
    with pytest.raises(SordinoError, match="The privacy budget of agent-00, agent-01") as caught:
        play.run()
    assert caught.value.exit_code == 5


def test_a_fleet_smaller_than_the_minimum_says_so() -> None:
    play = Play("simulation.agents=4", "train.retries=0")
    with pytest.raises(FleetUnavailable, match="4 are ready, 5 are needed"):
        play.run()


def test_rows_that_add_up_to_nonsense_stop_the_run() -> None:
    """A liar at the words themselves: it adds 2^20 to the low limb of the rows. Devices have described theirs."""

    def change(name: str, message: m.Message) -> m.Message | None:
        if name == "agent-02" and isinstance(message, m.Contribution) and message.masked.shape == (128,):
            words = to_numpy(message.masked).copy()
            words[121] += 1 << 20
            return changed(message, masked=from_numpy(words))
        return message

    play = Play("train.rounds=1", change=change)
    play.run()
    assert "rows together, the devices described" in play.notes()


# --- the job -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.standardize=fleet", "data.offset"),
        ("data.target_standardize=fleet", "target_standardize"),
        ("limits.update_norm=5", "can't be checked with secure_aggregation"),
        ("train.agents=4", "4 a round is fewer than secure_aggregation.minimum, 5"),
        ("secure_aggregation.minimum=1", "secure_aggregation.minimum"),
        ("secure_aggregation.helpers=4", "secure_aggregation.helpers"),
        ("secure_aggregation.bits=16", "secure_aggregation.bits"),
        ("secure_aggregation.zone=2", "zone"),
        ("mode=spdz", "secure_aggregation"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        boston_secure(override)


def test_the_block_and_the_word_true() -> None:
    assert boston_secure("secure_aggregation=true").spec.secure is not None
    assert boston_secure("secure_aggregation=false").spec.secure is None
    spec = boston_secure("secure_aggregation.helpers=3").spec.secure
    assert spec is not None
    assert (spec.helpers, spec.minimum, spec.bits) == (3, 5, None)


def test_numbers_that_fit_no_word_are_refused_with_the_figures() -> None:
    play = Play("secure_aggregation.bits=32", "secure_aggregation.fraction_bits=28")
    with pytest.raises(ConfigError, match=r"entries up to 17179869184 can reach 137438953472, and 32-bit"):
        play.run()


def test_records_hold_no_loss_of_a_device(calm: Checkpoint) -> None:
    assert {share.loss for share in calm.record.shares.values()} == {None}
    assert dataclasses.asdict(calm.record)["loss"] is not None


# --- faults from a file --------------------------------------------------------------------------------------------


def test_a_fault_file_may_name_helpers(tmp_path: Path) -> None:
    """helper-0 dies when the second round begins, and comes back in the third, under another boot."""
    rounds = ("train.rounds=4", "train.evaluate_every=0")
    calm = simulate(boston_secure(*rounds), with_baseline=False)
    faults = write_faults(tmp_path, "round: 2, do: die, agents: [helper-0]", "round: 3, do: return, agents: [helper-0]")
    done = simulate(boston_secure(*rounds), faults=faults, with_baseline=False)
    assert [fault["what"] for fault in done.summary["faults"]] == ["helper-0 died", "helper-0 returned"]
    assert done.summary["params_sha256"] == calm.summary["params_sha256"]
    assert [record.attempts for record in done.result.records] == [1, 2, 1, 1]
    assert done.summary["dropouts"] == 0


def test_a_fault_on_a_helper_that_is_not_there_is_refused(tmp_path: Path) -> None:
    faults = write_faults(tmp_path, "round: 2, do: die, agents: [helper-3]")
    with pytest.raises(ConfigError, match="no agent 'helper-3' in this fleet"):
        simulate(boston_secure(), faults=faults, with_baseline=False)


@pytest.mark.mqtt
@pytest.mark.slow
def test_a_helpers_process_is_killed(tmp_path: Path) -> None:
    """kill -9 of a real helper as a round begins: the sum is void, another helper takes its place."""
    quick = ("train.rounds=2", "train.evaluate_every=0", "simulation.agents=5", "train.join_s=60")
    calm = simulate(boston_secure(*quick), with_baseline=False)
    faults = write_faults(tmp_path, "round: 2, do: die, agents: [helper-0]")
    done = simulate(boston_secure(*quick), transport="processes", faults=faults, with_baseline=False)
    assert done.summary["params_sha256"] == calm.summary["params_sha256"]
    assert [record.attempts for record in done.result.records][1] in (1, 2)  # dead before it was chosen, or after
