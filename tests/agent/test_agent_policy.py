"""The policy as a table: who may ask for what, and whether the refusal says which setting to change."""

from __future__ import annotations

import pytest

from helpers_agent import DOUBLE_PLAN, EVALUATE_PLAN, TRAIN_PLAN, bench, data_ref, evaluate_command, train_command
from sordino_agent.policy import Policy
from sordino_common import messages as m
from sordino_common.channel.roster import Roster, RosterEntry
from sordino_common.errors import PolicyRefusal
from sordino_common.plan.plan import plan_id

DEFAULT = Policy()
PINNED = Policy(plans=(plan_id(TRAIN_PLAN).hex(),))
ONLY_TRAIN = Policy(plans="any", datasets={"toy": ("train",)})


@pytest.mark.parametrize(
    ("policy", "check", "setting"),
    [
        (DEFAULT, lambda p: p.require_job("describe"), None),
        (DEFAULT, lambda p: p.require_job("tensors"), "policy.jobs"),
        (Policy(jobs=()), lambda p: p.require_job("describe"), "policy.jobs"),
        (DEFAULT, lambda p: p.require_plan(plan_id(TRAIN_PLAN)), "policy.plans"),
        (PINNED, lambda p: p.require_plan(plan_id(TRAIN_PLAN)), None),
        (PINNED, lambda p: p.require_plan(plan_id(DOUBLE_PLAN)), "policy.plans"),
        (Policy(plans="any"), lambda p: p.require_plan(plan_id(DOUBLE_PLAN)), None),
        (DEFAULT, lambda p: p.require_dataset("toy", "train"), None),
        (ONLY_TRAIN, lambda p: p.require_dataset("toy", "train"), None),
        (ONLY_TRAIN, lambda p: p.require_dataset("toy", "evaluate"), "policy.datasets"),
        (ONLY_TRAIN, lambda p: p.require_dataset("other", "train"), "policy.datasets"),
        (Policy(jobs=("describe",)), lambda p: p.require_dataset("toy", "train"), "policy.jobs"),
        (DEFAULT, lambda p: p.require_model("boiler"), "policy.jobs"),
        (Policy(jobs=("spdz-model",)), lambda p: p.require_model("boiler"), "policy.models"),
        (Policy(jobs=("spdz-model",), models=("pump",)), lambda p: p.require_model("boiler"), "policy.models"),
        (Policy(jobs=("spdz-model",), models=("boiler",)), lambda p: p.require_model("boiler"), None),
        (Policy(jobs=("spdz-model",), models="any"), lambda p: p.require_model("boiler"), None),
        (DEFAULT, lambda p: p.require_fetch(None, None), "policy.fetch"),
        (DEFAULT, lambda p: p.require_fetch(plan_id(DOUBLE_PLAN), None), "policy.fetch"),
        (Policy(fetch=(plan_id(DOUBLE_PLAN).hex(),)), lambda p: p.require_fetch(plan_id(DOUBLE_PLAN), None), None),
        (Policy(fetch=(plan_id(DOUBLE_PLAN).hex(),)), lambda p: p.require_fetch(None, None), "policy.fetch"),
        (Policy(fetch="any"), lambda p: p.require_fetch(None, None), None),
        (Policy(fetch="sent"), lambda p: p.require_fetch(None, None), None),
        (
            Policy(fetch="sent"),
            lambda p: p.require_fetch(bytes(32), frozenset({bytes(32)})),
            "listing, in policy.fetch",
        ),
        (Policy(fetch="any"), lambda p: p.require_fetch(None, frozenset()), "never leave the device"),
        (Policy(fetch="any"), lambda p: p.require_fetch(bytes(32), frozenset({bytes(32)})), None),
        (Policy(fetch=("00" * 32,)), lambda p: p.require_fetch(bytes(32), frozenset({bytes(32)})), None),
        (
            Policy(fetch=("00" * 32,)),
            lambda p: p.require_fetch(bytes(32), frozenset({bytes(32), bytes([1]) * 32})),
            "01",
        ),
        (DEFAULT, lambda p: p.require_fetch(bytes(32), frozenset({bytes(32)})), "listing, in policy.fetch"),
    ],
)
def test_table(policy: Policy, check, setting: str | None) -> None:
    if setting is None:
        check(policy)
        return
    with pytest.raises(PolicyRefusal, match=setting):
        check(policy)


@pytest.mark.parametrize(
    ("policy", "message", "words"),
    [
        (Policy(jobs=("train",)), m.Describe(), ("`describe`", "served: train", "policy.jobs")),
        (DEFAULT, m.PlanPut(plan=TRAIN_PLAN), (plan_id(TRAIN_PLAN).hex(), "policy.plans")),
        (DEFAULT, train_command(), ("policy.plans",)),
        (ONLY_TRAIN, evaluate_command(), ("'toy'", "`evaluate`", "policy.datasets")),
        (ONLY_TRAIN, m.Moments(dataset="toy", columns=("y",)), ("policy.datasets",)),
        (DEFAULT, m.TensorGet(tensor_id=bytes(16)), ("`tensors`", "policy.jobs")),
        (DEFAULT, m.TensorDrop(tensor_ids=()), ("policy.jobs",)),
        (DEFAULT, m.Moments(dataset="toy", columns=("y",)), None),
        (Policy(min_rows=31), m.Moments(dataset="toy", columns=("y",)), ("30 rows", "policy.min_rows", "31")),
        (Policy(min_rows=30), m.Moments(dataset="toy", columns=("y",)), None),
    ],
)
def test_core_refuses_by_policy(policy: Policy, message: m.Message, words: tuple[str, ...] | None) -> None:
    place = bench(policy=policy)
    answer = place.ask(message)
    if words is None:
        assert not isinstance(answer, m.Refused)
        return
    assert isinstance(answer, m.Refused)
    assert (answer.command, answer.code) == (message.kind, "policy")
    assert all(word in answer.reason for word in words), answer.reason
    assert place.core.refusals == 1


@pytest.mark.parametrize(("split", "rows"), [("train", 30), ("test", 10)])
def test_min_rows_holds_for_training_and_evaluation(split: str, rows: int) -> None:
    place = bench(policy=Policy(plans="any", min_rows=rows + 1))
    place.ask(m.PlanPut(plan=TRAIN_PLAN))
    place.ask(m.PlanPut(plan=EVALUATE_PLAN))
    answer = place.ask(train_command() if split == "train" else evaluate_command(data=data_ref(split="test")))
    assert isinstance(answer, m.Refused)
    assert answer.code == "policy"
    assert f"over {rows} rows" in answer.reason


def test_commands_of_anybody_but_the_server_are_refused() -> None:
    place = bench()
    for message in (m.Describe(), m.Health(), train_command(), m.TensorGet(tensor_id=bytes(16))):
        answer = place.ask(message, sender="pi-02")
        assert isinstance(answer, m.Refused)
        assert answer.code == "policy"
        assert "'server'" in answer.reason
    assert place.core.refusals == 4


def test_a_server_that_the_roster_does_not_name_is_refused() -> None:
    place = bench()
    other = RosterEntry(name="other-server", sign_key=b"s" * 32, box_key=b"b" * 32, roles=("server",))
    place.core.on_roster(Roster(fleet="lab", epoch=3, issued_s=0, expires_s=9, entries=(other,)))
    answer = place.ask(m.Describe())
    assert isinstance(answer, m.Refused)
    assert "other-server" in answer.reason


def test_answers_are_counted_and_never_answered() -> None:
    place = bench()
    place.tell(m.Refused(command="train", code="policy", reason="no"), sender="pi-02")
    place.tell(m.TensorDropped(dropped=1))
    assert place.outbox.sent == []
    assert place.core.refusals == 2


def test_description_leaves_out_datasets_that_no_job_may_use() -> None:
    place = bench(policy=Policy(datasets={"toy": ()}))
    answer = place.ask(m.Describe())
    assert isinstance(answer, m.Described)
    assert answer.datasets == ()
