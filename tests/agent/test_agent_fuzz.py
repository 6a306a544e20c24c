"""Mutated commands against AgentCore: only `Refused` under a named code or a right answer, bounded work, and it goes on
serving. `make soak` runs them all, `make test` a sample."""

from __future__ import annotations

import os
import random

import pytest

from helpers_agent import (
    DOUBLE_PLAN,
    EVALUATE_PLAN,
    TRAIN_PLAN,
    bench,
    data_ref,
    evaluate_command,
    mutate,
    small_table,
    train_command,
)
from helpers_messages import EXAMPLES
from sordino_agent.policy import Limits
from sordino_common import messages as m
from sordino_common.errors import CodecError
from sordino_common.plan.plan import plan_id

CASES = 100_000 if os.environ.get("SORDINO_SOAK") else 4_000
NAMED = {
    *("policy", "limit", "plan", "codec", "command", "unknown-plan", "unknown-tensor", "unknown-data", "conflict"),
    *("diverged", "busy", "cancelled", "dataset", "roster", "unknown-session"),
}


def seeds() -> list[bytes]:
    tensor = m.Array("float32", (4,), bytes(16))
    messages: list[m.Message] = [
        *EXAMPLES.values(),
        *(m.PlanPut(plan=plan) for plan in (TRAIN_PLAN, EVALUATE_PLAN, DOUBLE_PLAN)),
        train_command(),
        train_command(steps=0, epochs=1.5, data=data_ref(offset=(1.0, 2.0, 3.0), scale=(1.0, 2.0, 4.0))),
        evaluate_command(),
        m.Moments(dataset="toy", columns=("f0", "y")),
        m.TensorPut(tensor_id=bytes(16), value=tensor, lease_s=60.0),
        m.TensorRun(plan_id=plan_id(DOUBLE_PLAN), inputs=(bytes(16),), outputs=(bytes([1]) * 16,), lease_s=60.0),
        m.TensorGet(tensor_id=bytes(16)),
    ]
    return [m.encode_message(message) for message in messages]


ODDITIES: tuple[object, ...] = (
    *(0, 1, -1, 7, 1 << 24, (1 << 63) - 1, 0.0, -1.0, 1e308, 1e-308, float("inf"), float("nan"), None, True),
    *("", "toy", "y", "run-1", "f0", "train", "test", b"", bytes(16), bytes(32), plan_id(TRAIN_PLAN), TRAIN_PLAN),
    *([], ["f0"], ["f0", "f1", "f2"], [bytes(16)], [1.0, 0.0, 2.0], [m.Array("float32", (0, 3), b"")]),
)


def replace_a_part(data: bytes, rng: random.Random) -> bytes:
    """The message with one value, somewhere inside, replaced by an odd one of perhaps another type."""
    outer = m.decode(data)
    place, key = outer, 1
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
    alike = [odd for odd in ODDITIES if type(odd) is type(place[key])]
    place[key] = rng.choice(alike if alike and rng.random() < 0.8 else ODDITIES)
    return m.encode(outer)


@pytest.mark.soak
def test_mutated_commands() -> None:
    rng = random.Random(20_240_601)
    limits = Limits(memory_bytes=32 << 20, store_bytes=1 << 20, plan_seconds=60.0, plans_bytes=1 << 20)
    place = bench(small_table(), limits=limits)
    # A mutated number of steps must be stopped by its price and not by patience.
    place.core._desk._executor._seconds_of = lambda cost: 0.001 + 0.1 * cost.runs  # type: ignore[attr-defined]
    corpus = seeds()
    for plan in (TRAIN_PLAN, EVALUATE_PLAN, DOUBLE_PLAN):
        place.ask(m.PlanPut(plan=plan))
    handled = 0
    refused: dict[str, int] = {}
    for _ in range(CASES):
        seed = rng.choice(corpus)
        data = mutate(seed, rng) if rng.random() < 0.5 else replace_a_part(seed, rng)
        try:
            message = m.decode_message(data)
        except CodecError:
            continue
        handled += 1
        place.tell(message, sender=rng.choice(("server", "server", "server", "pi-02")))
        if rng.random() < 0.5:
            place.loop.advance(rng.random())
        for _, answer, _ in place.outbox.sent:
            if isinstance(answer, m.Refused):
                assert answer.code in NAMED, answer
                refused[answer.code] = refused.get(answer.code, 0) + 1
        place.outbox.sent.clear()
        assert len(place.core.health().running) <= limits.queue
    assert handled > CASES // 10
    assert {"policy", "plan"} <= refused.keys()
    place.loop.advance(10_000.0)
    place.outbox.sent.clear()
    for plan in (TRAIN_PLAN, EVALUATE_PLAN):
        assert isinstance(place.ask(m.PlanPut(plan=plan)), m.PlanReady)
    assert isinstance(place.ask(train_command(run="after")), m.Trained)
    assert isinstance(place.ask(evaluate_command(run="after")), m.Evaluated)


@pytest.mark.soak
def test_mutated_plans() -> None:
    """Plans get most of the fuzz: they are the only commands with a program inside."""
    rng = random.Random(7)
    place = bench(small_table())
    plans = (TRAIN_PLAN, EVALUATE_PLAN, DOUBLE_PLAN)
    for number in range(CASES // 2):
        data = mutate(rng.choice(plans), rng)
        answer = place.ask(m.PlanPut(plan=data))
        if isinstance(answer, m.PlanReady):  # still a Plan: then it must train, or be refused by name
            answer = place.ask(train_command(run=f"run-{number}", plan_id=plan_id(data)))
        if isinstance(answer, m.Refused):
            assert answer.code in NAMED, answer
        place.outbox.sent.clear()
    assert isinstance(place.ask(m.PlanPut(plan=TRAIN_PLAN)), m.PlanReady)
    assert isinstance(place.ask(train_command()), m.Trained)
