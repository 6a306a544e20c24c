"""A hostile server or member against an agent: what its policy promises holds, and its memory is bounded."""

from __future__ import annotations

import logging

import pytest

from helpers_agent import EVALUATE_PLAN, TRAIN_PLAN, bench, evaluate_command, train_command
from helpers_messages import EXAMPLES
from sordino_agent.policy import Limits, Policy
from sordino_common import messages as m
from sordino_common.errors import SessionError


def test_an_update_of_fewer_rows_than_the_policy_wants_is_refused() -> None:
    """min_rows is about rows that went into the answer, not about rows that are there: 1 step of 8 rows is 8 rows."""
    place = bench(policy=Policy(plans="any", min_rows=10))
    place.ask(m.PlanPut(plan=TRAIN_PLAN))
    answer = place.ask(train_command(steps=1))
    assert isinstance(answer, m.Refused)
    assert answer.code == "policy"
    assert "8 rows" in answer.reason
    assert isinstance(place.ask(train_command(steps=2)), m.Trained)


def test_repeats_of_a_running_train_are_bounded() -> None:
    place = bench(limits=Limits(memory_bytes=64 << 20, queue=8))
    place.ask(m.PlanPut(plan=TRAIN_PLAN))
    asked = [place.tell(train_command()) for _ in range(1000)]
    while place.loop.step():
        pass
    kinds = [answer.kind for correlation in asked for answer in place.answers(correlation)]
    assert kinds.count("trained") == 8
    assert kinds.count("refused") == 992


def test_every_command_of_a_member_that_is_not_the_server_is_refused() -> None:
    place = bench()
    place.ask(m.PlanPut(plan=TRAIN_PLAN))
    place.ask(m.PlanPut(plan=EVALUATE_PLAN))
    commands = [
        m.Describe(), m.Health(), m.PlanPut(plan=b"x"), m.Moments(dataset="toy", columns=("y",)), train_command(),
        evaluate_command(), m.Cancel(run="run-1", round=None), m.TensorGet(tensor_id=bytes(16)),
        m.TensorDrop(tensor_ids=()), m.TensorRun(plan_id=bytes(32), inputs=(), outputs=(), lease_s=1.0),
        m.TensorPut(tensor_id=bytes(16), value=m.Array("uint8", (1,), b"a"), lease_s=1.0), EXAMPLES["spdz-open"],
        *(EXAMPLES[kind] for kind in ("sum-update", "sum-metrics", "sum-gradient", "sum-statistics")),
        *(EXAMPLES[kind] for kind in ("sum-seeds", "sum-cut", "tensor-load", "tensor-renew")),
    ]  # fmt: skip
    before = place.core.health()
    for command in commands:
        answer = place.ask(command, sender="pi-02")
        assert isinstance(answer, m.Refused)
        assert answer.code == "policy"
    after = place.core.health()
    assert (after.plans, after.store_tensors, after.tasks_done) == (2, 0, before.tasks_done)
    covered = {type(command).kind for command in commands}
    answers = {"described", "health-report", "plan-ready", "refused", "moments-result", "trained", "evaluated",
               "tensor-stored", "tensor-value", "tensor-dropped", "contribution", "sum-seeds-checked",
               "sum-share"}  # fmt: skip
    rest = set(m.message_types()) - covered - answers
    assert rest == {kind for kind in EXAMPLES if kind.startswith("spdz-")} - covered  # of sessions: see test_spdz_room


def test_refused_packets_cannot_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Anybody who reaches the broker can cause them."""
    place = bench()
    with caplog.at_level(logging.WARNING, "sordino.agent"):
        for _ in range(5000):
            place.core.on_refusal("pi-02", SessionError("made up"))
        assert len(caplog.records) <= 20
        place.loop.advance(61.0)
        place.core.on_refusal("pi-02", SessionError("made up"))
    assert "4980" in caplog.text
    assert place.core.refusals == 5001
