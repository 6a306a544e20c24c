"""AgentCore on virtual time: answers, idempotence, cancelling, limits, drain, and what no command can fetch."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from helpers_agent import (
    DOUBLE_PLAN,
    EVALUATE_PLAN,
    OPEN_POLICY,
    TRAIN_PLAN,
    Arrived,
    Bench,
    bench,
    data_ref,
    evaluate_command,
    linear_training_plan,
    one_second,
    train_command,
    zero_params,
)
from helpers_messages import EXAMPLES
from sordino_agent.data.catalogue import FileCatalogue
from sordino_agent.data.table import table_of
from sordino_agent.datasets import DatasetSpec
from sordino_agent.executor import InlineExecutor
from sordino_agent.policy import Limits
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common import messages as m
from sordino_common.channel.roster import Roster, RosterEntry
from sordino_common.clock import VirtualLoop
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.plan import encode_plan, plan_id


def ready(**more: object) -> Bench:
    """A bench that has both Plans."""
    place = bench(**more)  # type: ignore[arg-type]
    for plan in (TRAIN_PLAN, EVALUATE_PLAN):
        assert isinstance(place.ask(m.PlanPut(plan=plan)), m.PlanReady)
    return place


def refused(answer: m.Message, code: str) -> str:
    assert isinstance(answer, m.Refused), answer
    assert answer.code == code, answer
    return answer.reason


# --- answers -----------------------------------------------------------------------------------------------------


def test_describe_before_and_after_the_datasets_are_read() -> None:
    place = bench()
    early, late = place.tell(m.Describe()), place.tell(m.Describe())
    assert place.answers(early) == []
    place.loop.advance(2.0)
    (one,), (two,) = place.answers(early), place.answers(late)
    assert one == two
    assert isinstance(one, m.Described)
    (info,) = one.datasets
    assert (info.name, info.train_rows, info.test_rows) == ("toy", 30, 10)
    assert (one.version, one.executor, one.memory_bytes) == ("0.0-test", "numpy", 64 << 20)


def test_plan_put_train_evaluate() -> None:
    place = bench()
    ready_ = place.ask(m.PlanPut(plan=TRAIN_PLAN))
    assert isinstance(ready_, m.PlanReady)
    assert ready_.plan_id == plan_id(TRAIN_PLAN)
    assert ready_.flops > 0
    assert place.ask(m.PlanPut(plan=TRAIN_PLAN)) == ready_
    trained = place.ask(train_command())
    assert isinstance(trained, m.Trained)
    assert (trained.run, trained.round, trained.attempt) == ("run-1", 1, 0)
    assert (trained.rows, trained.steps, trained.seconds) == (30, 12, 1.0)  # the modelled second, not the wall's
    place.ask(m.PlanPut(plan=EVALUATE_PLAN))
    before, after = (place.ask(evaluate_command(params=params)) for params in (zero_params(), trained.update))
    assert isinstance(before, m.Evaluated)
    assert isinstance(after, m.Evaluated)
    assert (after.names, after.rows) == (("loss",), 10)
    assert after.sums[0] < before.sums[0]


def test_unknown_plan_says_what_to_do() -> None:
    assert "put it" in refused(bench().ask(train_command()), "unknown-plan")


def test_a_plan_that_is_none() -> None:
    refused(bench().ask(m.PlanPut(plan=b"\xa0")), "plan")
    refused(bench().ask(m.PlanPut(plan=b"\xff")), "codec")


def test_plans_make_room_for_new_ones() -> None:
    place = bench(limits=Limits(memory_bytes=64 << 20, plans_bytes=4096))
    place.ask(m.PlanPut(plan=TRAIN_PLAN))
    for rate in (0.2, 0.3, 0.4, 0.5):
        place.ask(m.PlanPut(plan=encode_plan(linear_training_plan(lr=rate))))
    refused(place.ask(train_command()), "unknown-plan")
    refused(place.ask(m.PlanPut(plan=bytes(3000))), "limit")


def test_health_counts() -> None:
    place = ready()
    place.ask(train_command())
    place.ask(train_command(run="run-2", batch_rows=9))
    place.tell(train_command(run="run-3"))
    health = place.ask(m.Health())
    place.tell(train_command(run="run-4"))
    assert place.core.health().running == ("train run-4 round 1",)
    assert isinstance(health, m.HealthReport)
    assert (health.tasks_done, health.tasks_failed, health.refusals, health.plans) == (3, 1, 1, 2)
    assert health.running == ("train run-3 round 1",)
    assert health.uptime_s == place.loop.now_s() - 1.0


def test_answers_go_back_in_the_context_of_the_command() -> None:
    place = bench()
    place.core.on_message(Arrived(sender="server", message=m.Health(), correlation=bytes(16), context=b"run"))  # type: ignore[arg-type]
    assert place.outbox.contexts == {b"run"}


def test_unknown_kinds_are_refused_by_name() -> None:
    class Unheard(m.Message, frozen=True, kw_only=True):
        kind = "unheard-of"

    assert "'unheard-of'" in refused(bench().ask(Unheard()), "policy")


# --- idempotence -------------------------------------------------------------------------------------------------


def test_a_repeat_while_it_runs_waits_with_it() -> None:
    place = ready()
    done = place.core.health().tasks_done
    first, second = place.tell(train_command()), place.tell(train_command())
    assert place.core.health().running == ("train run-1 round 1",)
    place.loop.advance(5.0)
    assert place.answers(first) == place.answers(second) != []
    assert place.core.health().tasks_done == done + 1


def test_a_repeat_afterwards_gets_the_same_answer_at_once() -> None:
    place = ready()
    first = place.ask(train_command())
    again = place.tell(train_command())
    assert place.answers(again) == [first]
    assert place.ask(train_command(attempt=1)) != first
    assert place.core.health().tasks_done == 4


@pytest.mark.parametrize("finished", [False, True])
def test_a_repeat_with_other_contents_is_refused(finished: bool) -> None:
    place = ready()
    first = place.tell(train_command())
    if finished:
        place.loop.advance(5.0)
    other = tuple(from_numpy(to_numpy(array) + 1) for array in zero_params())
    for change in ({"params": other}, {"seed": 12}, {"steps": 13}, {"data": data_ref(target_scale=2.0)}):
        assert "attempt" in refused(place.ask(train_command(**change)), "conflict")
    place.loop.advance(5.0)
    assert len(place.answers(first)) == 1


def test_a_result_too_large_to_keep_is_computed_again() -> None:
    place = ready(limits=Limits(memory_bytes=64 << 20, results_bytes=10))
    assert place.ask(train_command()) == place.ask(train_command())
    assert place.core.health().tasks_done == 4


def test_a_failure_is_not_kept() -> None:
    place = bench()
    refused(place.ask(train_command()), "unknown-plan")
    place.ask(m.PlanPut(plan=TRAIN_PLAN))
    assert isinstance(place.ask(train_command()), m.Trained)


# --- cancelling, queue, drain ------------------------------------------------------------------------------------


def test_cancel_stops_a_round_or_a_run() -> None:
    place = ready()
    asked = [place.tell(train_command(round=number)) for number in (1, 2, 3)]
    other = place.tell(train_command(run="run-2"))
    place.tell(m.Cancel(run="run-1", round=2))
    place.loop.advance(0.1)
    assert [len(place.answers(one)) for one in asked] == [0, 1, 0]
    refused(place.answers(asked[1])[0], "cancelled")
    place.tell(m.Cancel(run="run-1", round=None))
    place.tell(m.Cancel(run="nobody", round=None))
    place.loop.advance(5.0)
    refused(place.answers(asked[0])[0], "cancelled")
    refused(place.answers(asked[2])[0], "cancelled")
    assert isinstance(place.answers(other)[0], m.Trained)
    assert isinstance(place.ask(train_command()), m.Trained)  # a cancelled round may be asked for again


def test_the_queue_is_bounded() -> None:
    place = ready(limits=Limits(memory_bytes=64 << 20, queue=2))
    asked = [place.tell(train_command(round=number)) for number in range(4)]
    assert [len(place.answers(one)) for one in asked] == [0, 0, 1, 1]
    assert "limits.queue" in refused(place.answers(asked[3])[0], "busy")
    place.loop.advance(5.0)
    assert isinstance(place.ask(train_command(round=9)), m.Trained)


def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    place = ready()
    first = place.tell(train_command())
    idle: list[float] = []
    place.core.drain(lambda: idle.append(place.loop.now_s()))
    late = place.tell(train_command(round=2))
    refused(place.answers(late)[0], "draining")
    assert idle == []
    place.loop.advance(5.0)
    assert isinstance(place.answers(first)[0], m.Trained)
    assert len(idle) == 1
    assert isinstance(place.ask(m.Health()), m.HealthReport)


def test_drain_of_an_idle_agent_is_immediate() -> None:
    place = ready()
    idle: list[bool] = []
    place.core.drain(lambda: idle.append(True))
    assert idle == [True]


# --- limits ------------------------------------------------------------------------------------------------------


def test_a_plan_over_its_time_fails_at_the_limit() -> None:
    place = ready(limits=Limits(memory_bytes=64 << 20, plan_seconds=1.5))
    place.core._desk._executor._seconds_of = lambda cost: cost.runs * 0.5  # type: ignore[attr-defined]
    start_s = place.loop.now_s()
    assert "limits.plan_seconds" in refused(place.ask(train_command()), "limit")
    assert place.loop.now_s() == start_s + 1.5
    assert isinstance(place.ask(train_command(round=2, steps=3)), m.Trained)


def test_commands_over_the_payload_limit_are_refused() -> None:
    place = ready(limits=Limits(memory_bytes=64 << 20, payload_bytes=2048))
    big = (from_numpy(np.zeros((600, 1), np.float32)), zero_params()[1])
    assert "limits.payload_bytes" in refused(place.ask(train_command(params=big)), "limit")


def test_divergence_reaches_the_server_by_name() -> None:
    huge = tuple(from_numpy(np.full(array.shape, 1e30, np.float32)) for array in zero_params())
    assert "learning rate" in refused(ready().ask(train_command(params=huge)), "diverged")


def test_a_bug_is_told_by_its_type_only(monkeypatch: pytest.MonkeyPatch) -> None:
    place = ready()

    def broken(*_: object, **__: object) -> None:
        raise ValueError("row 17 holds 12345.678")

    monkeypatch.setattr("sordino_agent.compute.train", broken)
    reason = refused(place.ask(train_command()), "local-error")
    assert "ValueError" in reason
    assert "12345" not in reason
    monkeypatch.setattr(place.core._desk, "submit_once", broken)
    assert "12345" not in refused(place.ask(train_command(round=2)), "local-error")
    assert isinstance(place.ask(m.Health()), m.HealthReport)


# --- tensors -----------------------------------------------------------------------------------------------------

ONE, TWO = bytes(16), bytes([1]) * 16
VALUE = m.Array("float32", (4,), struct.pack("<4f", 1, 2, 3, 4))


def test_tensors_put_run_get_drop() -> None:
    place = bench()
    place.ask(m.PlanPut(plan=DOUBLE_PLAN))
    stored = place.ask(m.TensorPut(tensor_id=ONE, value=VALUE, lease_s=60.0))
    assert isinstance(stored, m.TensorStored)
    assert (stored.tensor_ids, stored.budget_bytes) == ((ONE,), 1 << 20)
    run = m.TensorRun(plan_id=plan_id(DOUBLE_PLAN), inputs=(ONE,), outputs=(TWO,), lease_s=60.0)
    assert isinstance(place.ask(run), m.TensorStored)
    got = place.ask(m.TensorGet(tensor_id=TWO))
    assert isinstance(got, m.TensorValue)
    assert to_numpy(got.value).tolist() == [2, 4, 6, 8]
    assert place.ask(m.TensorDrop(tensor_ids=(ONE, TWO, TWO))) == m.TensorDropped(dropped=2)
    refused(place.ask(m.TensorGet(tensor_id=ONE)), "unknown-tensor")
    refused(place.ask(run), "unknown-tensor")


def test_tensor_leases_end() -> None:
    place = bench()
    place.ask(m.TensorPut(tensor_id=ONE, value=VALUE, lease_s=5.0))
    place.loop.advance(6.0)
    refused(place.ask(m.TensorGet(tensor_id=ONE)), "unknown-tensor")
    assert place.core.health().store_tensors == 0


def test_fetching_is_decided_by_the_plan_that_made_the_tensor() -> None:
    place = bench(policy=replace(OPEN_POLICY, fetch=(plan_id(DOUBLE_PLAN).hex(),)))
    place.ask(m.PlanPut(plan=DOUBLE_PLAN))
    place.ask(m.TensorPut(tensor_id=ONE, value=VALUE, lease_s=60.0))
    place.ask(m.TensorRun(plan_id=plan_id(DOUBLE_PLAN), inputs=(ONE,), outputs=(TWO,), lease_s=60.0))
    assert "policy.fetch" in refused(place.ask(m.TensorGet(tensor_id=ONE)), "policy")
    assert isinstance(place.ask(m.TensorGet(tensor_id=TWO)), m.TensorValue)


def test_what_a_task_is_about_to_make_is_dropped_when_it_is_over() -> None:
    """Else it would be there later, and nobody would know; and a task that was called off runs on for a moment."""
    place = bench(limits=Limits(memory_bytes=64 << 20, queue=3))
    place.ask(m.PlanPut(plan=DOUBLE_PLAN))
    place.ask(m.TensorPut(tensor_id=ONE, value=VALUE, lease_s=60.0))
    run = m.TensorRun(plan_id=plan_id(DOUBLE_PLAN), inputs=(ONE,), outputs=(TWO,), lease_s=60.0)
    asked, drops = place.tell(run), [place.tell(m.TensorDrop(tensor_ids=(TWO,))) for _ in range(4)]
    assert [len(place.answers(one)) for one in (asked, *drops)] == [0, 0, 0, 0, 1]
    assert "limits.queue" in refused(place.answers(drops[3])[0], "busy")
    assert place.ask(m.TensorDrop(tensor_ids=(bytes([9]) * 16,))) == m.TensorDropped(
        dropped=0
    )  # no task makes this one
    place.loop.advance(5.0)
    assert isinstance(place.answers(asked)[0], m.TensorStored)
    assert [place.answers(one) for one in drops[:3]] == [[m.TensorDropped(dropped=n)] for n in (1, 0, 0)]
    assert place.core.health().store_tensors == 1

    asked = place.tell(run)
    place.tell(m.Cancel(run=m.task_of(TWO), round=None))
    stopped = place.tell(m.TensorDrop(tensor_ids=(TWO,)))
    place.loop.advance(5.0)
    refused(place.answers(asked)[0], "cancelled")
    assert place.answers(stopped) == [m.TensorDropped(dropped=0)]


def test_what_a_task_is_about_to_make_is_handed_out_when_it_is_over() -> None:
    place = bench(policy=replace(OPEN_POLICY, fetch=(plan_id(DOUBLE_PLAN).hex(),)))
    place.ask(m.PlanPut(plan=DOUBLE_PLAN))
    place.ask(m.TensorPut(tensor_id=ONE, value=VALUE, lease_s=60.0))
    run = m.TensorRun(plan_id=plan_id(DOUBLE_PLAN), inputs=(ONE,), outputs=(TWO,), lease_s=60.0)
    early = place.tell(m.TensorGet(tensor_id=TWO))
    asked, got, stranger = (
        place.tell(run),
        place.tell(m.TensorGet(tensor_id=TWO)),
        place.tell(m.TensorGet(tensor_id=TWO), sender="agent-01"),
    )
    refused(place.answers(early)[0], "unknown-tensor")
    refused(place.answers(stranger)[0], "policy")
    assert place.answers(got) == []
    place.loop.advance(5.0)
    assert isinstance(place.answers(asked)[0], m.TensorStored)
    (value,) = place.answers(got)
    assert isinstance(value, m.TensorValue)
    assert to_numpy(value.value).tolist() == [2, 4, 6, 8]


def test_what_a_task_does_not_make_after_all_is_refused_when_it_is_over() -> None:
    place = bench(policy=replace(OPEN_POLICY, fetch="none"), limits=Limits(memory_bytes=64 << 20, queue=1))
    place.ask(m.PlanPut(plan=DOUBLE_PLAN))
    place.ask(m.TensorPut(tensor_id=ONE, value=VALUE, lease_s=60.0))
    for outputs, code, word in (((TWO, bytes([2]) * 16), "unknown-tensor", "not here"), ((TWO,), "policy", "fetch")):
        place.tell(m.TensorRun(plan_id=plan_id(DOUBLE_PLAN), inputs=(ONE,), outputs=outputs, lease_s=60.0))
        waits, crowd = (place.tell(m.TensorGet(tensor_id=TWO)) for _ in range(2))
        assert "limits.queue" in refused(place.answers(crowd)[0], "busy")
        assert place.answers(waits) == []
        place.loop.advance(5.0)
        assert word in refused(place.answers(waits)[0], code)


def test_tensor_run_with_the_wrong_number_of_outputs_stores_nothing() -> None:
    place = bench()
    place.ask(m.PlanPut(plan=DOUBLE_PLAN))
    place.ask(m.TensorPut(tensor_id=ONE, value=VALUE, lease_s=60.0))
    run = m.TensorRun(plan_id=plan_id(DOUBLE_PLAN), inputs=(ONE,), outputs=(TWO, bytes([2]) * 16), lease_s=60.0)
    assert "gives 1 tensors" in refused(place.ask(run), "command")
    assert place.core.health().store_tensors == 1


# --- rows stay ---------------------------------------------------------------------------------------------------

SENTINELS = (123456.7890625, 987654.3203125)  # exact in float64, and no other number here looks like them


def _walk(value: object) -> list[bytes]:
    """Every number and byte string in a message, as bytes that can be searched."""
    if isinstance(value, m.Array):
        return [value.data]
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, str):
        return [value.encode()]
    if isinstance(value, bool | int | float):
        return [struct.pack("<d", float(value)), repr(value).encode()]
    if isinstance(value, tuple):
        return [found for item in value for found in _walk(item)]
    fields = getattr(value, "__struct_fields__", ())
    return [found for field in fields for found in _walk(getattr(value, field))]


def test_no_command_fetches_rows() -> None:
    """Every registered message is sent, with the datasets' and Plans' true names, to an agent that allows everything.
    No answer holds a cell of the table in float32, float64 or decimal notation."""
    rows = 24
    marks = np.array([SENTINELS[index % 2] + index for index in range(rows)])
    columns = {f"f{index}": marks * (index + 1) for index in range(3)}
    columns["y"] = marks[::-1].copy()
    columns["CRIM"], columns["ZN"], columns["MEDV"] = marks.copy(), marks * 7, marks * 9
    place = bench(table_of("toy", columns, test_rows=8), table_of("boston", columns, test_rows=8))
    for plan in (TRAIN_PLAN, EVALUATE_PLAN, DOUBLE_PLAN):
        place.ask(m.PlanPut(plan=plan))
    scaled = data_ref(offset=(1e5,) * 3, scale=(1e6,) * 3, target_offset=1e5, target_scale=1e6)
    commands: list[m.Message] = [
        *EXAMPLES.values(),
        *(example for _ in range(2) for example in EXAMPLES.values()),  # again, now that tensors are there
        train_command(data=scaled, steps=1),
        train_command(run="run-2", data=scaled, steps=0, epochs=2.0),
        train_command(run="run-3"),
        evaluate_command(data=data_ref(split="train")),
        evaluate_command(data=data_ref(split="test")),
        *(m.Moments(dataset=name, columns=(column,)) for name in ("toy", "boston") for column in columns),
        m.TensorPut(tensor_id=ONE, value=VALUE, lease_s=60.0),
        m.TensorRun(plan_id=plan_id(DOUBLE_PLAN), inputs=(ONE,), outputs=(TWO,), lease_s=60.0),
        m.TensorGet(tensor_id=ONE),
        m.TensorGet(tensor_id=TWO),
    ]
    assert {type(command) for command in commands} >= set(m.message_types().values())
    for command in commands:
        place.tell(command)
        while place.loop.step():
            pass
    cells = {float(cell) for column in columns.values() for cell in column}
    needles = {struct.pack(code, cell) for cell in cells for code in ("<d", "<f", ">d", ">f")}
    needles |= {repr(cell).encode() for cell in cells}
    kinds = set()
    for _, message, _ in place.outbox.sent:
        kinds.add(message.kind)
        found = b"\0".join(_walk(message))
        assert not any(needle in found for needle in needles), message
    assert kinds >= {"described", "trained", "evaluated", "moments-result", "tensor-value", "refused", "health-report"}

    assert any(
        needle in b"\0".join(_walk(m.MomentsResult(rows=1, sums=from_numpy(marks[:1]), squares=VALUE)))
        for needle in needles
    )  # the walk would find one


def test_path_and_cells_stay_when_a_file_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_text("y\nsecret-cell\n")
    loop = VirtualLoop()
    shop = Workshop(
        catalogue=FileCatalogue([DatasetSpec(name="toy", path=str(path))], max_bytes=1 << 20),
        programs=Programs(executor="numpy", limits=plan_limits(1 << 20)),
        memory_bytes=1 << 20,
    )
    executor = InlineExecutor(loop, workshop=shop, seconds_of=one_second)
    place = bench(executor=executor, loop=loop)
    reason = refused(place.ask(m.Moments(dataset="toy", columns=("y",))), "dataset")
    assert "sordino-agent check" in reason
    assert "patients" not in reason
    assert "secret" not in reason
    described = place.ask(m.Describe())
    assert isinstance(described, m.Described)
    assert described.datasets == ()


def test_a_device_that_the_roster_does_not_list_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    place = bench()
    server = RosterEntry(name="server", sign_key=b"s" * 32, box_key=b"b" * 32, roles=("server",))
    device = RosterEntry(name=place.core.name, sign_key=b"d" * 32, box_key=b"D" * 32, roles=("data",))
    with caplog.at_level(logging.WARNING, "sordino.agent"):
        place.core.on_roster(Roster(fleet="lab", epoch=1, issued_s=0, expires_s=9, entries=(device, server)))
        assert caplog.text == ""
        place.core.on_roster(Roster(fleet="lab", epoch=2, issued_s=0, expires_s=9, entries=(server,)))
    assert "event=not-in-roster epoch=2" in caplog.text and "sordino roster add" in caplog.text
