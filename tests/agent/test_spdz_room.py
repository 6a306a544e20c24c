"""Sessions on shares at the agent: what is refused by name and by text, what is burnt, who may say what."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pytest

from helpers_agent import SERVER, TRAIN_PLAN, data_ref, small_table
from helpers_channel import entry, roster
from helpers_shares import (
    LOWERED,
    NAMES,
    OPEN,
    ROWS,
    SHARES_POLICY,
    Committee,
    Conduct,
    Packet,
    committee,
    fleet_roster,
    open_command,
)
from sordino_agent.budget import BudgetSpec
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.executor import Cancel, InlineExecutor, OnDone
from sordino_agent.policy import Limits, Policy
from sordino_agent.service import link_settings
from sordino_agent.spdz.bench import Bench
from sordino_agent.spdz.corrections import Corrections
from sordino_agent.spdz.policy import SpdzPolicy
from sordino_agent.spdz.session import MASK_BYTES, MASK_STEPS
from sordino_agent.spdz.tasks import SpdzOpenFacts, SpdzOpenTask, SpdzTask
from sordino_agent.tasks import Outcome, Task
from sordino_agent.workshop import Programs, plan_limits
from sordino_common import messages as m
from sordino_common.channel.roster import Roster
from sordino_common.errors import LimitExceeded
from sordino_common.messages.spdz import CORRECTION_PART_BYTES
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.spdz.check import Sums
from sordino_common.spdz.effects import Effect
from sordino_common.spdz.errors import CorrectionError
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.party import Party

SESSION = open_command().session


def with_policy(**changes: object) -> Policy:
    return msgspec.structs.replace(SHARES_POLICY, **changes)


def with_shares(**changes: object) -> Policy:
    return with_policy(spdz=msgspec.structs.replace(OPEN, **changes))


# --- the way it should be ------------------------------------------------------------------------------------------


def test_a_session_runs_to_its_end_and_every_party_reports() -> None:
    made = committee()
    made.open(open_command())
    assert made.ready() == set(NAMES)
    conduct = Conduct(made, open_command())
    assert conduct.run()
    for name in NAMES:
        made.tell(name, m.SpdzClose(session=SESSION))
    made.settle()
    closed = made.said(m.SpdzClosed)
    assert len(closed) == 3
    assert all(isinstance(one, m.SpdzClosed) and one.counters.checks == 3 for one in closed)
    assert all(core.running == () for core in made.wire.cores.values())


def test_what_opens_is_what_the_clear_computation_gives() -> None:
    made = committee()
    made.open(open_command())
    conduct = Conduct(made, open_command())
    assert conduct.run()
    models = [
        value
        for message in made.said(m.SpdzChecked)
        for value in message.outputs
        if value.names == ("w", "b")  # type: ignore[attr-defined]
    ]
    assert len(models) == 3
    assert models[0] == models[1] == models[2]  # every copy agrees
    opened = (to_numpy(models[0].values[0]) - conduct.masks[6]["w"]) / 2.0**14
    assert np.all(np.abs(opened) < 4.0)
    assert opened.ravel()[2] > opened.ravel()[0] > 0.0  # towards [1, 2, 3]


def test_shares_and_rows_travel_between_agents_only_in_the_sessions_context() -> None:
    made = committee()
    made.open(open_command())
    assert Conduct(made, open_command()).run()
    for packet in made.wire.sent:
        secret = isinstance(packet.message, m.SpdzShares | m.SpdzInput)
        assert secret == (packet.context == SESSION) or isinstance(packet.message, m.SpdzAbort)
        if secret:
            assert SERVER not in (packet.sender, packet.to)


def test_one_message_per_party_and_round() -> None:
    made = committee()
    made.open(open_command())
    conduct = Conduct(made, open_command())
    assert conduct.run()
    rounds = len(conduct.spec.circuit.rounds)
    shares = [p for p in made.wire.sent if isinstance(p.message, m.SpdzShares) and p.sender == "agent-00"]
    to_one = [p for p in shares if p.to == "agent-01"]
    assert len(to_one) <= 6 * rounds + 3 * 4  # steps x rounds, and four messages per check


# --- refusals ------------------------------------------------------------------------------------------------------

REFUSALS = {
    "a Plan that is not allowed": (
        with_policy(plans=("00" * 32,)),
        {},
        "policy",
        "is not among the 1 Plans that may run here; the device's owner can add it to policy.plans",
    ),
    "no computing": (
        with_policy(jobs=("spdz-data",)),
        {},
        "policy",
        "jobs of kind `spdz-compute` are not served here (served: spdz-data)",
    ),
    "no rows": (with_policy(jobs=("spdz-compute",)), {}, "policy", "jobs of kind `spdz-data` are not served here"),
    "a dataset that is closed": (
        with_policy(datasets={"toy": ("train",)}),
        {},
        "policy",
        "dataset 'toy' may not be used for `spdz-data` here; its owner can allow it in policy.datasets",
    ),
    "an output that is not allowed": (
        with_shares(outputs={"loss": (SERVER,)}),
        {},
        "policy",
        "output 'model' may not open to server here; the device's owner can allow it in policy.spdz.outputs",
    ),
    "an output to somebody else": (
        SHARES_POLICY,
        {"outputs": (m.SpdzOutput(name="loss", receiver="agent-02"),)},
        "policy",
        "output 'loss' may not open to agent-02 here",
    ),
    "a committee too small": (
        with_shares(min_committee=4),
        {},
        "policy",
        "a committee of 3 is too small: this device demands 4 compute agents (policy.spdz.min_committee)",
    ),
    "passive": (
        SHARES_POLICY,
        {"security": "passive"},
        "policy",
        (
            "the session has security passive: a single cheating member could falsify results or learn rows; this "
            "device demands active (policy.spdz.security)"
        ),
    ),
    "another dealer": (
        with_shares(dealers=("hub",)),
        {},
        "policy",
        "server may not deal for this device (policy.spdz.dealers)",
    ),
    "a dealer that computes": (
        SHARES_POLICY,
        {"dealer": "agent-01"},
        "policy",
        "agent-01 is the dealer and would be a party: whoever deals the masks must not hold masked values",
    ),
    "a stranger": (
        SHARES_POLICY,
        {"parties": ("agent-00", "agent-01", "agent-99")},
        "roster",
        "agent-99 has no key in the roster of epoch 1: nothing is shared with a stranger",
    ),
    "a session without us": (
        SHARES_POLICY,
        {"parties": ("agent-01", "agent-02"), "rows": (m.SpdzRows(owner="agent-01", rows=14),)},
        "policy",
        "is neither a party nor an owner of rows or of the model in this session, nor does it read an output",
    ),
    "another circuit": (
        SHARES_POLICY,
        {"circuit": bytes(32)},
        "circuit",
        "another version of the software, or a lie",
    ),
    "another digest": (
        SHARES_POLICY,
        {"digest": bytes(32)},
        "circuit",
        "the session's digest is not that of its own numbers",
    ),
    "other row counts": (
        SHARES_POLICY,
        {"rows": tuple(m.SpdzRows(owner=name, rows=7) for name in NAMES)},
        "command",
        "dataset 'toy' has 20 train rows, the session counts on 7",
    ),
    "too few rows": (
        with_policy(min_rows=21),
        {},
        "policy",
        "dataset 'toy': a session on shares over 20 rows; policy.min_rows on the device is 21",
    ),
    "no columns": (SHARES_POLICY, {"data": None}, "policy", "does not say which columns"),
    "unknown columns": (SHARES_POLICY, {"data": data_ref(dataset="other")}, "unknown-data", "other"),
    "no such output": (
        with_shares(outputs={"secret": (SERVER,)}),
        {"outputs": (m.SpdzOutput(name="secret", receiver=SERVER),)},
        "command",
        "the Plan has no output 'secret' to open; it has loss",
    ),
    "a checkpoint between checks": (
        SHARES_POLICY,
        {"checkpoints": (3,)},
        "command",
        "a checkpoint after 3 steps, but the check comes every 2",
    ),
    "a state that is not here": (
        SHARES_POLICY,
        {"state_from": None, "resume": m.SpdzPoint(session=b"another-session-", step=4), "first_step": 4},
        "unknown-checkpoint",
        "this device has no checkpoint of run toy-1 after 4 steps of session 616e6f746865722d73657373696f6e2d",
    ),
    "an unknown setting": (
        SHARES_POLICY,
        {"settings": (m.SpdzNumber(name="backdoor", value=1.0),)},
        "protocol",
        "lowering setting 'backdoor' = 1 is not known to this version",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_by_name(what: str) -> None:
    policy, changes, code, text = REFUSALS[what]
    made = committee(policy=policy)
    made.open(open_command(**changes), names=["agent-00"])  # type: ignore[arg-type]
    refused = made.refusal("agent-00")
    assert refused.command == "spdz-open"
    assert refused.code == code
    assert text in refused.reason
    assert made.wire.cores["agent-00"].running == ()


@pytest.mark.parametrize(
    ("known", "policy", "text"),
    [
        (
            fleet_roster(zones=("a",)),
            with_shares(zones=2),
            "the committee stands in 1 zone (a): this device demands 2 (policy.spdz.zones)",
        ),
        (
            fleet_roster(agent_01=("data",)),
            SHARES_POLICY,
            "agent-01 has the roles data in the roster, not compute",
        ),
        (
            fleet_roster(agent_01=("compute", "dealer", "data")),
            SHARES_POLICY,
            "agent-01 has the role dealer and would be a party: whoever deals the masks must not hold masked values",
        ),
        (
            roster(
                entries=[
                    entry(SERVER, roles=("server", "data", "compute")),
                    *(entry(name, roles=("data", "compute")) for name in NAMES),
                ]
            ),
            SHARES_POLICY,
            "server is the dealer and would be a party: whoever deals the masks must not hold masked values",
        ),
    ],
)
def test_refused_for_who_is_who(known: object, policy: Policy, text: str) -> None:
    made = committee(policy=policy, known=known)  # type: ignore[arg-type]
    parties = (*NAMES[:2], SERVER) if text.startswith("server") else NAMES
    made.open(open_command(parties=parties), names=["agent-00"])
    refused = made.refusal("agent-00")
    assert refused.code == "policy"
    assert text in refused.reason


def test_the_default_policy_allows_no_session() -> None:
    made = committee(policy=Policy())
    made.open(open_command(), names=["agent-00"])
    assert made.refusal("agent-00").code == "policy"
    assert SpdzPolicy().security == "active"
    assert SpdzPolicy().outputs == {}


def test_preprocessing_that_does_not_fit_is_refused() -> None:
    made = committee(limits=Limits(memory_bytes=64 << 20, spdz_bytes=1 << 10))
    made.open(open_command(), names=["agent-00"])
    refused = made.refusal("agent-00")
    assert refused.code == "limit"
    assert (
        "limits.spdz_bytes on the device is 1024: raise it there, or give the job a smaller batch_rows"
        in refused.reason
    )


BATCH_BYTES = 8 * 8 * 4  # of masked rows: 8 rows of three features and a target
AT_ONCE_BYTES = BATCH_BYTES + 8 * max(LOWERED.circuit.opened_elements) + 8 * 4  # and w, b


def _open(agent: str, *, message_bytes: int) -> SpdzOpenFacts:
    """What the worker of `agent` says of a session of two parties and three owners."""
    programs = Programs(executor="numpy", limits=plan_limits(64 << 20))
    catalogue = MemoryCatalogue([small_table(rows=ROWS[agent] + 5, test=5, seed=7)])
    task = SpdzOpenTask(
        command=open_command(parties=NAMES[:2]),
        plan=TRAIN_PLAN,
        agent=agent,
        min_rows=2,
        held_bytes=1 << 20,
        message_bytes=message_bytes,
    )
    return Bench(catalogue=catalogue, plan_of=lambda data: programs.load(data).plan).open(task, None)


@pytest.mark.parametrize(
    ("agent", "message_bytes", "text"),
    [
        ("agent-00", BATCH_BYTES - 1, f"a batch's masked rows may take {BATCH_BYTES} bytes"),
        ("agent-02", BATCH_BYTES - 1, f"a batch's masked rows may take {BATCH_BYTES} bytes"),  # an owner only
        (
            "agent-00",
            AT_ONCE_BYTES - 1,
            f"a batch's masked rows, the largest round and the state may take {AT_ONCE_BYTES} bytes",
        ),
        ("agent-01", AT_ONCE_BYTES, "a part of a correction may take"),
    ],
)
def test_what_no_message_of_this_device_may_carry_is_refused_before_the_session(
    agent: str, message_bytes: int, text: str
) -> None:
    with pytest.raises(LimitExceeded) as refused:
        _open(agent, message_bytes=message_bytes)
    assert str(refused.value).startswith(text)
    assert str(refused.value).endswith(
        f"limits.payload_bytes on the device is {message_bytes}: raise it there, or give the job a smaller batch_rows"
    )


def test_it_is_the_devices_own_limit_that_a_session_is_held_against() -> None:
    made = committee(limits=Limits(memory_bytes=64 << 20, payload_bytes=512))  # the Plan has less, a correction more
    made.open(open_command(), names=["agent-00"])
    refused = made.refusal("agent-00")
    assert refused.code == "limit"
    assert "a part of a correction may take" in refused.reason
    assert "limits.payload_bytes on the device is 512" in refused.reason


def test_an_owner_of_rows_needs_room_for_a_batch_of_them_and_no_more() -> None:
    assert _open("agent-02", message_bytes=BATCH_BYTES).batch_bytes == BATCH_BYTES


def test_a_session_from_another_than_the_server_is_refused() -> None:
    made = committee()
    made.tell("agent-00", open_command(), sender="agent-01")
    made.settle()
    assert made.wire.cores["agent-00"].running == ()
    assert made.ready() == set()


# --- burning -------------------------------------------------------------------------------------------------------


def test_a_session_is_burnt_before_anything_of_it_leaves() -> None:
    made = committee()
    made.open(open_command(), names=["agent-00"])
    assert made.journals["agent-00"].is_burnt(SESSION)
    made.open(open_command(), names=["agent-00"])
    refused = made.refusal("agent-00")
    assert refused.code == "session-reused"
    assert (
        f"session {SESSION.hex()} was used on this device before; a session runs once, open a new one" in refused.reason
    )


def test_after_a_restart_a_burnt_session_is_refused() -> None:
    made = committee()
    made.open(open_command())
    conduct = Conduct(made, open_command())
    conduct.begin()
    conduct.deal()
    made.settle()
    again = committee(journals=made.journals)  # the same disks
    again.open(open_command())
    assert again.ready() == set()
    assert {again.refusal(name).code for name in NAMES} == {"session-reused"}


def test_steps_are_burnt_before_the_first_share_leaves() -> None:
    made = committee()
    burnt: list[tuple[int, int, tuple[int, int]]] = []

    def watch(packet: Packet) -> tuple[Packet, ...]:
        if isinstance(packet.message, m.SpdzShares):
            journal = made.journals[packet.sender]
            burnt.extend((s.step, s.attempt, journal.burnt_steps(SESSION)) for s in packet.message.shares)
        return (packet,)

    made.wire.bend = watch
    made.open(open_command())
    assert Conduct(made, open_command()).run()
    assert burnt
    assert all(step < upto and attempt <= last for step, attempt, (upto, last) in burnt)


def test_a_run_goes_on_from_its_checkpoint_in_a_new_session() -> None:
    made = committee()
    made.open(open_command())
    conduct = Conduct(made, open_command(steps=6))
    assert conduct.run()
    point = m.SpdzPoint(session=SESSION, step=4)
    second = open_command(session=b"session-00000002", first_step=4, state_from=None, resume=point)
    made.wire.to_server.clear()
    assert conduct.masks.keys() >= {4}
    made.open(second)
    # Confirmed beyond 4, the checkpoint after 6 steps is what is kept.
    assert made.refusal("agent-00").code == "unknown-checkpoint"
    made.wire.to_server.clear()
    third = open_command(
        session=b"session-00000003", first_step=6, steps=10, state_from=None, checkpoints=(10,),
        resume=m.SpdzPoint(session=SESSION, step=6),
    )  # fmt: skip
    made.open(third)
    assert made.ready() == set(NAMES)
    assert Conduct(made, third, masks=dict(conduct.masks[6])).run()


# --- who may say what ----------------------------------------------------------------------------------------------


def running() -> tuple[Committee, Conduct]:
    made = committee()
    made.open(open_command())
    conduct = Conduct(made, open_command())
    conduct.begin()
    made.settle()
    return made, conduct


SHARE = m.SpdzShares(shares=(m.SpdzShare(kind="open", step=0, attempt=0, round=0, payload=bytes(8)),))
INPUT = m.SpdzInput(
    terms=m.terms_of(open_command()),
    attempt=0,
    batches=(m.SpdzValues(step=0, names=("x",), values=(from_numpy(np.zeros((1, 3), np.int64)),)),),
)


@pytest.mark.parametrize(
    ("message", "sender", "context"),
    [
        (SHARE, SERVER, SESSION),  # never from the server
        (INPUT, SERVER, SESSION),
        (SHARE, SERVER, b""),
        (SHARE, "agent-01", b""),  # only in the session's own context
        (INPUT, "agent-01", b""),
        (SHARE, "agent-01", b"another-session-"),
        (SHARE, "hub", SESSION),  # only from its parties
        (INPUT, "hub", SESSION),
        (m.SpdzOutputs(outputs=()), "hub", SESSION),
        (m.SpdzConfirm(session=SESSION, step=3), "agent-01", b""),  # the server's words
        (m.SpdzRestart(session=SESSION, step=0, attempt=1), "agent-01", b""),
        (m.SpdzClose(session=SESSION), "agent-01", b""),
        (m.SpdzCorrection(session=SESSION, step=0, attempt=0, part=0, parts=1, data=b""), "agent-01", b""),
        (m.SpdzMasks(session=SESSION, outputs=()), "agent-01", b""),
        (m.SpdzState(session=SESSION, terms=bytes(32), names=(), values=()), "agent-01", b""),
        (
            m.SpdzSetup(session=SESSION, party_seed=bytes(32), mac_key=bytes(16), owner_seed=None, state_seed=None),
            "agent-01",
            b"",
        ),
        (m.SpdzAbort(session=SESSION, code="mac-check", reason="made up"), "hub", b""),
    ],
)
def test_what_is_not_from_who_may_say_it_changes_nothing(message: m.Message, sender: str, context: bytes) -> None:
    made, conduct = running()
    core = made.wire.cores["agent-00"]
    before = core.refusals
    made.tell("agent-00", message, sender=sender, context=context)
    made.settle()
    assert core.refusals == before + 1
    assert made.said(m.SpdzAbort) == []
    conduct.heard = len(made.wire.to_server)
    conduct.deal()
    assert core.running  # it goes on


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (
            m.SpdzShares(shares=(m.SpdzShare(kind="open", step=0, attempt=0, round=99, payload=bytes(8)),)),
            "protocol",
            "agent-01",
        ),
        (
            m.SpdzShares(shares=(m.SpdzShare(kind="open", step=0, attempt=0, round=0, payload=bytes(9)),)),
            "protocol",
            "agent-01",
        ),
        (
            m.SpdzInput(
                terms=m.terms_of(open_command()),
                attempt=0,
                batches=(m.SpdzValues(step=0, names=("z",), values=(from_numpy(np.zeros((1, 3), np.int64)),)),),
            ),
            "protocol",
            "agent-01",
        ),
    ],
)
def test_a_member_that_breaks_the_protocol_ends_the_session_and_is_named(
    message: m.Message, code: str, text: str
) -> None:
    made, conduct = running()
    made.tell("agent-00", message, sender="agent-01", context=SESSION)
    made.tell("agent-00", _from(message), sender="agent-02", context=SESSION)
    conduct.deal()
    made.settle()
    abort = made.abort("agent-00")
    assert abort.code == code
    assert text in abort.reason
    assert all(core.running == () for core in made.wire.cores.values())  # everybody was told


def _from(message: m.Message) -> m.Message:
    """A second sender, so that a round is complete."""
    return message if isinstance(message, m.SpdzShares) else SHARE


def test_a_party_that_is_silent_is_named() -> None:
    made = committee()
    made.wire.bend = lambda packet: () if packet.sender == "agent-02" and packet.context else (packet,)
    made.open(open_command())
    conduct = Conduct(made, open_command())
    assert not conduct.run(until_s=60.0)
    abort = made.abort("agent-00")
    assert abort.code == "silence"
    assert "nothing came for 30 s; waiting for step 0: the rows of agent-02" in abort.reason


def _run_watched(monkeypatch: pytest.MonkeyPatch, command: m.SpdzOpen) -> tuple[list[list[str]], Committee]:
    """The events of every task of a session that runs to its end."""
    tasks: list[list[str]] = []
    submit = InlineExecutor.submit

    def watch(executor: InlineExecutor, task: Task, on_done: OnDone) -> Cancel:
        if isinstance(task, SpdzTask):
            tasks.append(["setup"] * (task.setup is not None) + [event.what for event in task.events])
        return submit(executor, task, on_done)

    with monkeypatch.context() as patch:
        patch.setattr(InlineExecutor, "submit", watch)
        made = committee()
        made.open(command)
        assert Conduct(made, command).run()
    return tasks, made


def test_a_correction_that_comes_early_crosses_with_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    command = open_command()
    tasks, made = _run_watched(monkeypatch, command)
    monkeypatch.setattr("sordino_agent.spdz.mailbox.MOST_EARLY", 0)
    hasty, other = _run_watched(monkeypatch, command)
    for kind in (m.SpdzChecked, m.SpdzClosed):
        assert made.said(kind) == other.said(kind)
    corrections = [sum(events.count("correction") for events in all_) for all_ in (tasks, hasty)]
    assert corrections == [command.steps] * 2
    alone = [sum(set(events) == {"correction"} for events in all_) for all_ in (tasks, hasty)]
    assert alone[0] < alone[1]


def test_a_worker_that_catches_up_when_its_outcomes_have_left_changes_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing of it to the next task."""
    command = open_command()
    left: list[bool] = []
    guard, compute = Party._guard, InlineExecutor._compute

    def watched(party: Party, *arguments: object, **named: object) -> list[Effect]:
        left.append(bool(party._put_off))
        return guard(party, *arguments, **named)  # type: ignore[arg-type]

    def leisurely(executor: InlineExecutor, task: Task) -> tuple[Outcome, float]:
        done = compute(executor, task)
        executor._workshop.catch_up()  # type: ignore[attr-defined]
        before.append(len(left))
        return done

    monkeypatch.setattr(Party, "_guard", watched)
    before: list[int] = []
    _, hasty = _run_watched(monkeypatch, command)
    assert any(left)
    left.clear()
    monkeypatch.setattr(InlineExecutor, "_compute", leisurely)
    _, made = _run_watched(monkeypatch, command)
    firsts = {0, *before} - {len(left)}  # of a task
    assert not any(left[first] for first in firsts)
    for kind in (m.SpdzChecked, m.SpdzClosed):
        assert made.said(kind) == hasty.said(kind)
    assert made.models == hasty.models


def test_preprocessing_and_a_word_of_the_server_may_come_before_the_secrets() -> None:
    """What waits for a set-up waits as long as it takes, also if it is confirmed again and again that it goes on."""
    command = open_command()
    said = []
    for first in (False, True):
        made = committee()
        made.open(command)
        conduct = Conduct(made, command)
        if first:
            conduct.deal()
            for _ in range(3):
                made.loop.advance(command.silence_s * 0.6)
                assert not [packet for packet in made.wire.sent if isinstance(packet.message, m.SpdzInput)]
                conduct.confirm(0)
                made.settle()
        assert conduct.run()
        said.append(made.said(m.SpdzChecked))
    assert said[0] == said[1]


def test_a_task_without_events_is_a_portion_of_a_check_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are portions, whatever comes meanwhile."""
    command = open_command()
    tasks, _ = _run_watched(monkeypatch, command)
    checks = len(command.parties) * command.steps // command.check_every
    portions = Sums(layout_of(LOWERED.circuit)).portions(command.check_every)
    assert sum(not events for events in tasks) == checks * portions


def test_rows_are_masked_and_sent_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sordino_agent.spdz.session.MASK_STEPS", 3)
    tasks, made = _run_watched(monkeypatch, open_command())
    assert max(events.count("mask") for events in tasks) == 1
    sent = [packet.message for packet in made.wire.sent if isinstance(packet.message, m.SpdzInput)]
    assert {len(message.batches) for message in sent} <= {1, 2, 3}
    assert max(len(message.batches) for message in sent) == 3  # of the four that may run ahead


@pytest.mark.parametrize(("most_bytes", "batches"), [(BATCH_BYTES - 1, 1), (2 * BATCH_BYTES, 2), (1 << 20, 4)])
def test_a_portion_of_rows_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch, most_bytes: int, batches: int) -> None:
    monkeypatch.setattr("sordino_agent.spdz.session.MASK_BYTES", most_bytes)
    _, made = _run_watched(monkeypatch, open_command())
    sent = [packet.message for packet in made.wire.sent if isinstance(packet.message, m.SpdzInput)]
    assert max(len(message.batches) for message in sent) == batches  # four may run ahead


def test_a_portion_of_rows_fits_a_message_to_a_device_with_the_least_limits() -> None:
    least = Limits(payload_bytes=1 << 10, plans_bytes=1 << 10)
    batch = m.SpdzValues(
        step=1 << 40,
        names=("x" * 200, "y" * 200),
        values=(m.Array("int64", (1, 1, 1, 1, 1, 1, 1, MASK_BYTES // MASK_STEPS // 8), bytes(MASK_BYTES // MASK_STEPS)),
                m.Array("int64", (1, 1, 1, 1, 1, 1, 1, 0), b"")),
    )  # fmt: skip
    message = m.SpdzInput(terms=bytes(32), attempt=1 << 20, batches=(batch,) * MASK_STEPS)
    assert MASK_BYTES < len(m.encode_message(message)) <= link_settings(least).max_message_bytes


def test_shares_of_round_after_round_are_bounded() -> None:
    made, _ = running()
    for number in range(80):
        share = m.SpdzShare(kind="open", step=0, attempt=0, round=number, payload=bytes(8))
        made.tell("agent-00", m.SpdzShares(shares=(share,)), sender="agent-01", context=SESSION)
    made.settle()
    abort = made.abort("agent-00")
    assert abort.code == "protocol"
    assert "agent-01 sends shares of round after round that others have not reached" in abort.reason


def test_corrections_beyond_the_window_are_refused() -> None:
    made, _ = running()
    far = m.SpdzCorrection(session=SESSION, step=8, attempt=0, part=0, parts=1, data=b"")
    made.tell("agent-00", far)
    made.settle()
    abort = made.abort("agent-00")
    assert abort.code == "correction"
    assert "a correction of step 8, with 0 steps confirmed and 4 agreed to be dealt ahead" in abort.reason


@pytest.mark.parametrize(
    ("changes", "times", "text"),
    [
        ({"attempt": 2}, 1, "a correction of step 5 under attempt 2, this session is at attempt 0"),
        ({"parts": 2}, 1, "a correction of step 5 in 2 parts, the circuit's has 1"),
        ({"parts": 3, "part": 2}, 1, "a correction of step 5 in 3 parts, the circuit's has 1"),
        ({"attempt": 1}, 2, "the correction of step 5 attempt 1 came twice"),
        ({}, 2, "the correction of step 5 attempt 0 came twice"),
    ],
)
def test_who_deals_does_not_decide_how_much_waits_here(changes: dict[str, int], times: int, text: str) -> None:
    """One correction for each step of the window, of this attempt or the next, in the parts that its size makes."""
    made = committee()
    made.open(open_command())
    values: dict[str, object] = {"step": 5, "attempt": 0, "part": 0, "parts": 1, **changes}
    for _ in range(times):
        made.tell("agent-00", m.SpdzCorrection(session=SESSION, data=bytes(8), **values))  # type: ignore[arg-type]
    made.settle()
    abort = made.abort("agent-00")
    assert abort.code == "correction"
    assert text in abort.reason


def test_corrections_are_put_together_and_what_is_late_is_dropped() -> None:
    def part(step: int, attempt: int, number: int, data: bytes) -> m.SpdzCorrection:
        return m.SpdzCorrection(session=SESSION, step=step, attempt=attempt, part=number, parts=2, data=data)

    corrections = Corrections(first=2, ahead=4, nbytes=CORRECTION_PART_BYTES + 1)
    assert corrections.take(part(2, 0, 1, b"b")) is None
    assert corrections.take(part(2, 0, 1, b"b")) is None  # the same again
    with pytest.raises(CorrectionError, match="two different parts 1 of the correction of step 2"):
        corrections.take(part(2, 0, 1, b"c"))
    assert corrections.take(part(2, 0, 0, b"a")) == b"ab"
    assert corrections.take(part(5, 1, 0, b"c")) is None  # of an attempt that we have not heard of
    assert corrections.take(part(4, 0, 0, b"d")) is None
    corrections.restart(1)
    assert corrections.take(part(5, 1, 1, b"d")) == b"cd"
    for late in (part(4, 0, 1, b"e"), part(2, 0, 0, b"a"), part(2, 0, 1, b"b")):
        assert corrections.take(late) is None
    assert corrections.take(part(6, 2, 0, b"f")) is None
    corrections.confirm(7)
    for late in (part(6, 2, 1, b"f"), part(5, 1, 0, b"c"), part(5, 1, 1, b"d")):
        assert corrections.take(late) is None
    assert not corrections._parts and not corrections._whole
    with pytest.raises(CorrectionError, match="a correction of step 15, with 7 steps confirmed"):
        corrections.take(part(15, 1, 0, b"g"))


def test_who_speaks_in_a_session_that_is_over_is_told() -> None:
    made, _ = running()
    made.wire.cores["agent-00"].room.drain()
    made.settle()
    made.wire.sent.clear()
    made.tell("agent-00", SHARE, sender="agent-01", context=SESSION)
    made.settle()
    (answer,) = [p.message for p in made.wire.sent if p.sender == "agent-00" and p.to == "agent-01"]
    assert isinstance(answer, m.SpdzAbort)
    assert answer.code == "unknown-session"


def test_channels_of_a_session_are_given_back() -> None:
    made, _ = running()
    made.wire.cores["agent-00"].room.drain()
    made.loop.advance(20.0)
    assert ("agent-00", "agent-01", SESSION) in made.wire.ended


def test_a_server_that_restarts_ends_its_sessions() -> None:
    made, _ = running()
    core = made.wire.cores["agent-00"]
    core.on_presence(SERVER, True, 1)
    assert core.running
    core.on_presence(SERVER, True, 2)
    assert core.running == ()


def test_a_cancelled_run_ends_its_session() -> None:
    made, _ = running()
    made.tell("agent-00", m.Cancel(run="toy-1", round=None))
    made.settle()
    assert made.wire.cores["agent-00"].running == ()


def test_a_model_that_opens_to_an_agent_is_stored_there_and_nowhere_else() -> None:
    made = committee()
    command = open_command(outputs=(m.SpdzOutput(name="model", receiver="agent-00"),))
    made.open(command)
    conduct = Conduct(made, command)
    assert conduct.run()
    made.tell("agent-00", conduct.desk.masks_for(6, conduct.masks[6]))
    made.settle()
    assert list(made.models["agent-00"]) == ["toy-1"]
    assert made.models["agent-01"] == {}
    assert made.models["agent-00"]["toy-1"].startswith(b"PK")


def test_nothing_secret_is_shown() -> None:
    setup = m.SpdzSetup(session=SESSION, party_seed=b"s" * 32, mac_key=b"k" * 16, owner_seed=None, state_seed=None)
    assert "ssss" not in repr(setup)
    assert "kkkk" not in repr(setup)


def test_rows_under_a_privacy_budget_do_not_enter_a_session() -> None:
    made = committee()
    made.wire.cores["agent-00"].reconfigure(SHARES_POLICY, {"toy": BudgetSpec(epsilon=1.0, delta=1e-5)})
    made.open(open_command())
    (refused,) = made.said(m.Refused)
    assert isinstance(refused, m.Refused)
    assert refused.code == "budget"
    assert "`spdz-open` would show something of its rows without noise" in refused.reason


# --- a server that tells one member this and another that ---------------------------------------------------------

LIES: dict[str, dict[str, object]] = {
    "nothing opens": {"outputs": ()},
    "the model opens to an agent": {"outputs": (m.SpdzOutput(name="model", receiver="agent-00"),)},
    "fewer checkpoints": {"checkpoints": (6,)},
}


def lied_to(lie: str) -> dict[str, m.SpdzOpen]:
    """What each was told: agent-01 something else than the others."""
    return {name: open_command() if name == "agent-01" else open_command(**LIES[lie]) for name in NAMES}


@pytest.mark.parametrize("lie", LIES)
def test_parties_that_were_told_different_things_open_nothing(lie: str) -> None:
    """One permissive party would be enough for the server, if the others' policies had seen another session. Here the
    owners' word is bent, too, so that only the parties' check is left to find it."""
    made, told = committee(), lied_to(lie)

    def bend(packet: Packet) -> tuple[Packet, ...]:
        if not isinstance(packet.message, m.SpdzInput):
            return (packet,)
        message = msgspec.structs.replace(packet.message, terms=m.terms_of(told[packet.to]))
        return (Packet(sender=packet.sender, to=packet.to, message=message, correlation=bytes(16), context=SESSION),)

    made.wire.bend = bend
    for name, command in told.items():
        made.tell(name, command)
    made.settle()
    assert made.ready() == set(NAMES)  # each by itself sees nothing wrong
    assert not Conduct(made, open_command()).run()
    assert "equivocation" in {abort.code for abort in made.said(m.SpdzAbort)}  # type: ignore[attr-defined]
    assert not made.said(m.SpdzChecked)


@pytest.mark.parametrize("lie", LIES)
def test_what_an_owner_was_told_goes_along_with_its_rows(lie: str) -> None:
    made = committee()
    for name, command in lied_to(lie).items():
        made.tell(name, command)
    made.settle()
    assert not Conduct(made, open_command()).run()
    aborts = made.said(m.SpdzAbort)
    assert {abort.code for abort in aborts} == {"equivocation"}  # type: ignore[attr-defined]
    assert "was told other terms of this session than this device" in aborts[0].reason  # type: ignore[attr-defined]
    assert not made.said(m.SpdzChecked)


def test_terms_are_all_but_what_an_owner_alone_is_told() -> None:
    command = open_command()
    assert m.terms_of(command) == m.terms_of(msgspec.structs.replace(command, data=None, model="boiler"))
    changes: dict[str, object] = {
        "run": "toy-2", "dealer": "midas", "security": "passive", "steps": 7, "outputs": (), "checkpoints": (),
        "state_from": "agent-00", "ahead": 5, "parties": NAMES[:2], "retries": 3, "silence_s": 31.0,
    }  # fmt: skip
    terms = {m.terms_of(msgspec.structs.replace(command, **{key: value})) for key, value in changes.items()}
    assert len(terms | {m.terms_of(command)}) == len(changes) + 1


# --- who only reads ------------------------------------------------------------------------------------------------

READER = "agent-03"
READS = {"outputs": (m.SpdzOutput(name="model", receiver=READER),)}


@pytest.mark.parametrize("allowed", [True, False])
def test_an_agent_that_only_reads_is_a_member_if_all_policies_allow_it(allowed: bool) -> None:
    outputs = {"model": (READER,)} if allowed else {"model": (SERVER,)}
    made = committee((*NAMES, READER), policy=with_shares(outputs=outputs))
    made.open(open_command(**READS))
    assert made.ready() == ({*NAMES, READER} if allowed else set())
    if not allowed:
        assert {made.refusal(name).code for name in (*NAMES, READER)} == {"policy"}
        return
    conduct = Conduct(made, open_command(**READS))
    setups = conduct.desk.setups()
    assert set(setups) == {*NAMES, READER, SERVER}
    secrets = ("party_seed", "mac_key", "owner_seed", "state_seed")
    assert [getattr(setups[READER], name) for name in secrets] == [None] * 4
    assert conduct.run()
    masks = conduct.masks[6]
    made.tell(READER, conduct.desk.masks_for(6, {name: masks[name] for name in ("w", "b")}))
    made.tell(READER, m.SpdzClose(session=SESSION))
    made.settle()
    (file,) = made.models[READER].values()
    assert np.load(io.BytesIO(file))["w"].shape == (3, 1)
    assert made.said(m.SpdzClosed, READER)


def test_who_reads_a_model_waits_for_it_before_it_closes() -> None:
    """Messages are not ordered: the server's word that all is over may come before the dealer's masks."""
    made = committee((*NAMES, READER), policy=with_shares(outputs={"model": (READER,)}))
    made.open(open_command(**READS))
    conduct = Conduct(made, open_command(**READS))
    assert conduct.run()
    made.tell(READER, m.SpdzClose(session=SESSION))
    made.settle()
    assert not made.said(m.SpdzClosed, READER)
    made.tell(READER, conduct.desk.masks_for(6, {name: conduct.masks[6][name] for name in ("w", "b")}))
    made.settle()
    assert made.said(m.SpdzClosed, READER)


def test_a_dealer_must_not_read() -> None:
    made = committee(policy=with_shares(outputs={"model": ("midas",)}), known=fleet_with_dealer())
    made.open(open_command(outputs=(m.SpdzOutput(name="model", receiver="midas"),)), names=["agent-00"])
    assert (
        "midas has the role dealer and would be a reader of an output: whoever deals" in made.refusal("agent-00").reason
    )


def fleet_with_dealer() -> Roster:
    entries = [entry(SERVER, roles=("server", "dealer")), entry("midas", roles=("dealer",))]
    return roster(entries=[*entries, *(entry(name, roles=("data", "compute")) for name in NAMES)])


def test_row_results_open_to_one_agent_only_where_every_row_comes_once() -> None:
    made = committee(policy=with_shares(outputs={"loss": ("agent-00",)}))
    made.open(open_command(outputs=(m.SpdzOutput(name="loss", receiver="agent-00"),)), names=["agent-00"])
    assert made.refusal("agent-00").code == "command"
    assert (
        "output 'loss' opens to an agent row by row, in a session over every row once"
        in made.refusal("agent-00").reason
    )
