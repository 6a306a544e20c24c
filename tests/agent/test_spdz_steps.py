"""Stepwise sessions at the agent: what goes in and stays, who may say so, and what a server or a member can't get."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers_agent import SERVER
from helpers_shares import Committee, Packet, committee, open_command
from sordino_agent.policy import Limits, Policy
from sordino_agent.spdz.policy import SpdzPolicy
from sordino_agent.spdz.shelf import Shelf, Source, Taken
from sordino_agent.store import TensorStore
from sordino_common import messages as m
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.plan.plan import encode_plan, plan_id
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Input, Node, Output, Plan, Ref
from sordino_common.ring.fixed import encode_fixed
from sordino_common.spdz.lowering import Settings, lower
from sordino_common.spdz.opening import numbers_of, spec_of
from sordino_common.spdz.owner import given_mask, mask_given
from sordino_common.spdz.spec import origin_of
from sordino_server.dealer.desk import DealerDesk

PAIR = ("agent-00", "agent-01")
F32 = TensorSpec("float32", (2,))
PLAN = encode_plan(
    Plan(
        name="product",
        inputs=(Input("a", "state", F32), Input("b", "state", F32)),
        constants=(),
        nodes=(Node("mul", (Ref(0), Ref(1)), (F32,)),),
        outputs=(Output("z", "value", 2), Output("copy", "value", 0)),
    )
)
SETTINGS = Settings(rooms={"a": 56})  # a may be the product of an earlier step, whose masks are larger
ALLOWED = Policy(
    jobs=("describe", "tensors", "spdz-compute", "spdz-data"),
    plans="any",
    fetch="any",
    min_rows=2,
    spdz=SpdzPolicy(outputs={"tensors": (SERVER,)}),
)
VALUES = {"a": np.array([1.5, -2.0], np.float32), "b": np.array([0.5, 3.0], np.float32)}


def lowered() -> Any:
    from sordino_common.plan.plan import decode_plan

    return lower(decode_plan(PLAN), plan_id=plan_id(PLAN), settings=SETTINGS)


LOWERED = lowered()


def tid(k: int) -> bytes:
    return k.to_bytes(16, "big")


def stepwise(**changes: Any) -> m.SpdzOpen:
    fields: dict[str, Any] = {
        "plan_id": plan_id(PLAN), "circuit": LOWERED.digest, "settings": numbers_of(SETTINGS), "parties": PAIR,
        "steps": 100, "check_every": 1, "rows": (), "outputs": (), "data": None, "state_from": None,
        "checkpoints": (), "ahead": 1, "idle_s": 600.0, "digest": bytes(32),
    }  # fmt: skip
    command = open_command(**{**fields, **changes})
    if "digest" in changes:
        return command
    return msgspec.structs.replace(command, digest=spec_of(command, LOWERED.circuit, LOWERED.digest).digest)


class Conduct:
    """Server and dealer of one stepwise session, by hand."""

    def __init__(self, made: Committee, command: m.SpdzOpen | None = None) -> None:
        self.made = made
        self.command = command or stepwise()
        self.spec = spec_of(self.command, LOWERED.circuit, LOWERED.digest)
        self.desk = DealerDesk(
            self.command, self.spec, random=random.Random(5).randbytes, masks=None, stopwatch=lambda: 0.0
        )
        made.open(self.command, names=self.command.parties)
        setups = self.desk.setups()
        for name in self.command.parties:
            made.tell(name, setups[name])
            made.tell(name, m.SpdzConfirm(session=self.command.session, step=0))
        made.settle()

    def origin(self, step: int, name: str) -> bytes:
        return origin_of(self.spec, step, 0, name)

    def command_of(self, step: int, **changes: Any) -> m.SpdzStep:
        """By default the server gives both inputs, and the product stays."""
        given = tuple(m.SpdzGiven(name=name, owner=SERVER, tensor_id=None) for name in "ab")
        fields: dict[str, Any] = {
            "session": self.command.session, "step": step, "kept": (), "given": given,
            "keep": (m.SpdzKeep(name="z", tensor_id=tid(100 + step)),), "opened": (), "moved": (), "drops": (),
            "lease_s": 60.0,
        }  # fmt: skip
        return m.SpdzStep(**{**fields, **changes})

    def play(
        self,
        step: m.SpdzStep,
        *,
        masks: Mapping[str, Any] | None = None,
        told: Mapping[str, m.SpdzStep] | None = None,
        deal: bool = True,
    ) -> None:
        """Tell the step, give what is the server's to give, deal. `told`: another step to some."""
        made, session = self.made, self.command.session
        ours = {entry.name: encode_fixed(VALUES[entry.name]) for entry in step.given if entry.owner == SERVER}
        masked = mask_given(self.spec, self.desk.giver_seed(SERVER), step.step, ours)
        for name in self.command.parties:
            said = (told or {}).get(name, step)
            made.tell(name, said)
            if masked:
                gift = m.SpdzState(
                    session=session, terms=m.terms_of_step(self.command, said), step=step.step, names=tuple(masked),
                    values=tuple(from_numpy(value) for value in masked.values()),
                )  # fmt: skip
                made.tell(name, gift)
        if deal:
            fed = dict(masks or {})
            for entry in self.spec.state_inputs:
                for gift_ in step.given:
                    if gift_.name == entry.name:
                        r = given_mask(self.spec, self.desk.giver_seed(gift_.owner), entry, step.step)
                        fed[entry.name] = np.asarray(r >> np.int64(entry.shift))
            self.desk.feed(step.step, fed)
            name, parts = self.desk.deal()
            for part in parts:
                made.tell(name, part)
        made.settle()

    def confirm(self, done: int) -> None:
        self.desk.confirm(done)
        for name in self.command.parties:
            self.made.tell(name, m.SpdzConfirm(session=self.command.session, step=done))
        self.made.settle()

    def checked(self) -> int:
        found = self.made.said(m.SpdzChecked)
        return min((one.step for one in found), default=0) if len(found) >= len(self.command.parties) else 0  # type: ignore[attr-defined]


def made_with(policy: Policy = ALLOWED, **more: Any) -> Committee:
    made = committee(policy=policy, **more)
    for name in made.wire.cores:
        made.tell(name, m.PlanPut(plan=PLAN))
    made.settle()
    made.wire.to_server.clear()
    return made


def store_of(made: Committee, name: str) -> TensorStore:
    store: TensorStore = made.wire.cores[name]._store
    return store


def kept(conduct: Conduct, k: int, name: str = "a", *, step: int = 0, output: str = "z") -> m.SpdzKept:
    return m.SpdzKept(name=name, tensor_id=tid(k), origin=conduct.origin(step, output))


SERVER_GIVES_B = (m.SpdzGiven(name="b", owner=SERVER, tensor_id=None),)


def one_step(policy: Policy = ALLOWED, **more: Any) -> tuple[Committee, Conduct, dict[str, Any]]:
    """A committee that keeps a·b under id 100, and its mask."""
    made = made_with(policy, **more)
    conduct = Conduct(made)
    conduct.play(conduct.command_of(0))
    assert conduct.checked() == 1
    masks = {"a": conduct.desk.output_masks(0)["z"]}
    conduct.confirm(1)
    made.wire.to_server.clear()
    return made, conduct, masks


# --- the way it should be ------------------------------------------------------------------------------------------


def test_what_stays_goes_into_a_later_step_and_opens_to_the_server() -> None:
    made, conduct, masks = one_step()
    step = conduct.command_of(1, kept=(kept(conduct, 100),), given=SERVER_GIVES_B, opened=("z",), drops=(tid(100),))
    conduct.play(step, masks=masks)
    copies = [value for one in made.said(m.SpdzChecked) for value in one.outputs]  # type: ignore[attr-defined]
    assert [copy.names for copy in copies] == [("z",)] * 2
    assert copies[0].values == copies[1].values
    x = (to_numpy(copies[0].values[0]) - conduct.desk.output_masks(1)["z"]) / 2.0**14
    assert np.allclose(x, VALUES["a"] * VALUES["b"] ** 2, atol=1e-3)
    for name in PAIR:
        store = store_of(made, name)
        assert len(store) == 1  # the first is dropped, the second kept
        assert len(store_of(made, "agent-02")) == 0


def test_an_agents_tensor_is_masked_by_itself() -> None:
    made = made_with()
    conduct = Conduct(made)
    made.tell("agent-01", m.TensorPut(tensor_id=tid(1), value=from_numpy(VALUES["a"]), lease_s=60.0))
    given = (m.SpdzGiven(name="a", owner="agent-01", tensor_id=tid(1)), *SERVER_GIVES_B)
    conduct.play(conduct.command_of(0, given=given, opened=("z",)))
    (first, _) = [value for one in made.said(m.SpdzChecked) for value in one.outputs]  # type: ignore[attr-defined]
    x = (to_numpy(first.values[0]) - conduct.desk.output_masks(0)["z"]) / 2.0**14
    assert np.allclose(x, VALUES["a"] * VALUES["b"], atol=1e-3)
    gifts = [p for p in made.wire.sent if isinstance(p.message, m.SpdzState) and p.sender == "agent-01"]
    assert {(p.to, p.context) for p in gifts} == {("agent-00", conduct.command.session)}  # to members, in the context


def test_an_idle_session_closes_in_order_and_another_silence_than_within_a_step_ends_it() -> None:
    made, conduct, _ = one_step()
    for name in PAIR:
        made.tell(name, m.SpdzClose(session=conduct.command.session))
    made.settle()
    assert len(made.said(m.SpdzClosed)) == 2
    assert all(core.room.running == () for core in made.wire.cores.values())

    made, conduct, _ = one_step()
    made.loop.advance(590.0)
    assert not made.said(m.SpdzAbort)
    made.loop.advance(20.0)
    assert {one.code for one in made.said(m.SpdzAbort)} == {"silence"}  # type: ignore[attr-defined]
    made, conduct, masks = one_step()
    conduct.play(conduct.command_of(1, kept=(kept(conduct, 100),), given=SERVER_GIVES_B), masks=masks, deal=False)
    made.loop.advance(40.0)
    assert made.abort().code == "silence"


# --- what a server can't get ---------------------------------------------------------------------------------------


def test_a_masked_value_leaves_for_nobody() -> None:
    made, _, _ = one_step()
    made.tell("agent-00", m.TensorGet(tensor_id=tid(100)))
    made.settle()
    assert made.refusal("agent-00").code == "policy"
    assert "leaves for nobody" in made.refusal("agent-00").reason
    made.wire.to_server.clear()
    run = m.TensorRun(plan_id=plan_id(PLAN), inputs=(tid(100), tid(100)), outputs=(tid(7), tid(8)), lease_s=60.0)
    made.tell("agent-00", run)
    made.settle()
    assert made.refusal("agent-00").code == "policy"
    made.wire.to_server.clear()
    made.tell("agent-00", m.TensorPut(tensor_id=tid(100), value=from_numpy(VALUES["a"]), lease_s=60.0))
    made.settle()
    assert made.refusal("agent-00").code == "conflict"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"kept": "other-step"}, "conflict", "is not the shared value that it is said to be"),
        ({"kept": "other-output"}, "conflict", "is not the shared value"),
        ({"kept": "unknown"}, "unknown-tensor", "is not here"),
        ({"kept": "plain"}, "conflict", "is not the shared value"),
        ({"keep": (m.SpdzKeep(name="z", tensor_id=tid(100)),)}, "conflict", "takes a new id"),
        ({"keep": (m.SpdzKeep(name="q", tensor_id=tid(9)),)}, "command", "has no output 'q'"),
        ({"opened": ("q",)}, "command", "has no output 'q'"),
        ({"given": ()}, "command", "the circuit takes"),
        (
            {"given": (m.SpdzGiven(name="b", owner="agent-02", tensor_id=tid(1)),)},
            "policy",
            "with committees of which it is a member",
        ),
        ({"given": (m.SpdzGiven(name="b", owner="agent-00", tensor_id=None),)}, "policy", "a member"),
        ({"given": (m.SpdzGiven(name="b", owner="agent-00", tensor_id=tid(77)),)}, "unknown-tensor", "is not here"),
        ({"given": (m.SpdzGiven(name="b", owner="agent-00", tensor_id=tid(100)),)}, "policy", "leaves for nobody"),
    ],
)  # fmt: skip
def test_a_step_is_refused_by_name_and_nothing_changes(changes: dict[str, Any], code: str, words: str) -> None:
    made, conduct, masks = one_step()
    made.tell("agent-00", m.TensorPut(tensor_id=tid(50), value=from_numpy(VALUES["a"]), lease_s=60.0))
    entries = {
        "other-step": kept(conduct, 100, step=1), "other-output": kept(conduct, 100, output="copy"),
        "unknown": kept(conduct, 101), "plain": kept(conduct, 50),
    }  # fmt: skip
    fields: dict[str, Any] = {"kept": (kept(conduct, 100),), "given": SERVER_GIVES_B, **changes}
    if isinstance(fields["kept"], str):
        fields["kept"] = (entries[fields["kept"]],)
    made.settle()
    made.wire.to_server.clear()
    made.tell("agent-00", conduct.command_of(1, **fields))
    made.settle()
    refused = made.refusal("agent-00")
    assert refused.code == code
    assert words in refused.reason
    conduct.play(conduct.command_of(1, kept=(kept(conduct, 100),), given=SERVER_GIVES_B), masks=masks)
    assert conduct.checked() == 2  # the session goes on


@pytest.mark.parametrize("change", [{"parties": ("agent-00", "agent-02")}, {"security": "passive"}])
def test_a_value_is_of_use_to_its_own_committee_only(change: dict[str, Any]) -> None:
    policy = msgspec.structs.replace(ALLOWED, spdz=SpdzPolicy(outputs={"tensors": (SERVER,)}, security="passive"))
    made, conduct, _ = one_step(policy)
    other = Conduct(made, stepwise(session=b"session-00000002", run="toy-2", **change))
    made.wire.to_server.clear()
    made.tell("agent-00", other.command_of(0, kept=(kept(conduct, 100),), given=SERVER_GIVES_B))
    made.settle()
    assert made.refusal("agent-00").code == "conflict"
    assert "another committee, under another dealer or security" in made.refusal("agent-00").reason


@pytest.mark.parametrize("number", [0, 2])
def test_a_step_is_told_once_and_in_order(number: int) -> None:
    made, conduct, _ = one_step()
    made.tell("agent-00", conduct.command_of(number))
    made.settle()
    assert made.abort("agent-00").code == "protocol"
    assert made.refusal("agent-00").code == "protocol"
    assert len(store_of(made, "agent-00")) == 0  # and whoever cheats gets nothing more out of it


def test_the_same_step_with_another_tensor_is_refused() -> None:
    """A second value under the mask of the first would tell the difference of both."""
    made = made_with()
    conduct = Conduct(made)
    for k in (1, 2):
        made.tell("agent-00", m.TensorPut(tensor_id=tid(k), value=from_numpy(VALUES["a"] * k), lease_s=60.0))
    for k in (1, 2):
        given = (m.SpdzGiven(name="a", owner="agent-00", tensor_id=tid(k)), *SERVER_GIVES_B)
        made.tell("agent-00", conduct.command_of(0, given=given))
    made.settle()
    gifts = [p for p in made.wire.sent if isinstance(p.message, m.SpdzState) and p.sender == "agent-00"]
    assert len(gifts) <= 1
    assert made.abort("agent-00").code == "protocol"


def test_no_room_is_told_before_anything_is_masked() -> None:
    made = made_with(limits=Limits(memory_bytes=64 << 20))
    made.wire.cores["agent-00"]._store.budget_bytes = 100  # type: ignore[misc]
    conduct = Conduct(made)
    made.tell("agent-00", conduct.command_of(0))
    made.settle()
    assert made.refusal("agent-00").code == "limit"
    assert "limits.store_bytes" in made.refusal("agent-00").reason


# --- what policies say ---------------------------------------------------------------------------------------------


def refused(policy: Policy, *, opened: Sequence[str] = (), rows: bool = False) -> str:
    """Why agent-00 refuses a step with its tensor as input a."""
    made = made_with(policy)
    if rows:
        load = m.TensorLoad(
            tensor_id=tid(1), dataset="toy", columns=("f0",), split="train", dtype="float32", lease_s=60.0
        )
        made.tell("agent-00", load)
    else:
        made.tell("agent-00", m.TensorPut(tensor_id=tid(1), value=from_numpy(VALUES["a"]), lease_s=60.0))
    conduct = Conduct(made)
    made.wire.to_server.clear()
    given = (m.SpdzGiven(name="a", owner="agent-00", tensor_id=tid(1)), *SERVER_GIVES_B)
    made.tell("agent-00", conduct.command_of(0, given=given, opened=tuple(opened)))
    made.settle()
    found = made.said(m.Refused, "agent-00")
    return "" if not found else f"{found[0].code}: {found[0].reason}"  # type: ignore[attr-defined]


def with_policy(**changes: Any) -> Policy:
    return msgspec.structs.replace(ALLOWED, **changes)


def test_what_the_policy_allows_goes_in_and_opens() -> None:
    assert refused(ALLOWED, opened=("z", "copy")) == ""


def test_an_owner_may_let_others_compute_and_give_nothing() -> None:
    assert "jobs of kind `spdz-data` are not served here" in refused(with_policy(jobs=("tensors", "spdz-compute")))


def test_nothing_opens_unless_the_policy_names_tensors() -> None:
    closed = with_policy(spdz=SpdzPolicy(outputs={"loss": (SERVER,)}))
    assert "policy.spdz.outputs (tensors: [server])" in refused(closed, opened=("z",))
    assert refused(closed) == ""


def test_what_opens_must_be_fetchable_too() -> None:
    assert refused(with_policy(fetch="sent"), opened=("z",)) == ""
    assert "may not leave the device" in refused(with_policy(fetch="none"), opened=("z",))


def test_rows_of_a_dataset() -> None:
    """As for pointers: rows never open, what comes of them does if all Plans between are listed."""
    assert refused(ALLOWED, opened=("z",), rows=True) == ""
    assert "rows of a dataset, which never leave the device" in refused(ALLOWED, opened=("copy",), rows=True)
    reason = refused(with_policy(fetch="sent"), opened=("z",), rows=True)
    assert f"listing, in policy.fetch, all Plans that made it: {plan_id(PLAN).hex()}" in reason
    assert refused(with_policy(fetch=(plan_id(PLAN).hex(),)), opened=("z",), rows=True) == ""
    only_here = with_policy(datasets={"toy": ("tensors",)})
    assert "may not be used for `spdz-data` here" in refused(only_here, rows=True)


def test_a_member_that_was_told_another_step() -> None:
    made, conduct, masks = one_step()
    step = conduct.command_of(1, kept=(kept(conduct, 100),), given=SERVER_GIVES_B)
    # What is to stay is not the same for all: the check tells, before anything opens.
    other = msgspec.structs.replace(step, keep=(m.SpdzKeep(name="copy", tensor_id=tid(101)),))
    conduct.play(step, masks=masks, told={"agent-01": other})
    assert {one.code for one in made.said(m.SpdzAbort)} == {"equivocation"}  # type: ignore[attr-defined]
    assert not made.said(m.SpdzChecked)
    assert all(len(store_of(made, name)) == 0 for name in PAIR)


def test_members_of_a_passive_session_tell_one_another_which_step_they_were_told() -> None:
    """There is no check. One permissive member must not be enough to open what another's policy forbids."""
    policy = msgspec.structs.replace(ALLOWED, spdz=SpdzPolicy(outputs={"tensors": (SERVER,)}, security="passive"))
    made = made_with(policy)
    conduct = Conduct(made, stepwise(security="passive"))
    conduct.play(conduct.command_of(0))
    assert conduct.checked() == 1
    masks = {"a": conduct.desk.output_masks(0)["z"]}
    conduct.confirm(1)
    made.wire.to_server.clear()
    step = conduct.command_of(1, kept=(kept(conduct, 100),), given=SERVER_GIVES_B)
    opened = msgspec.structs.replace(step, opened=("z",))
    conduct.play(step, masks=masks, told={"agent-01": opened})
    assert {one.code for one in made.said(m.SpdzAbort)} == {"equivocation"}  # type: ignore[attr-defined]
    assert not made.said(m.SpdzChecked)
    assert not [p for p in made.wire.sent if isinstance(p.message, m.SpdzShares) and p.message.shares[0].step == 1]


# --- what opens to a member ----------------------------------------------------------------------------------------

LENDING = msgspec.structs.replace(ALLOWED, spdz=SpdzPolicy(outputs={"tensors": ("agent-00",)}))


def moved(name: str = "z", to: str = "agent-00", k: int = 200) -> m.SpdzMoved:
    return m.SpdzMoved(name=name, to=to, tensor_id=tid(k), dtype="float32")


def told_masks(conduct: Conduct, step: int = 0, *, to: str = "agent-00", **values: Any) -> None:
    """The dealer's masks of the product, or `values`."""
    masks = values or {"z": conduct.desk.output_masks(step)["z"]}
    conduct.made.tell(to, conduct.desk.masks_for(step, masks))
    conduct.made.settle()


def test_an_output_opens_to_a_member_and_to_nobody_else() -> None:
    made = made_with(LENDING)
    conduct = Conduct(made)
    conduct.play(conduct.command_of(0, keep=(), moved=(moved(),)))
    assert conduct.checked() == 1
    assert not [value for one in made.said(m.SpdzChecked) for value in one.outputs]  # type: ignore[attr-defined]
    assert len(store_of(made, "agent-00")) == 0  # not before the masks are there
    told_masks(conduct)
    assert made.said(m.SpdzStored) == [m.SpdzStored(session=conduct.command.session, step=0)]
    stored = store_of(made, "agent-00").get(tid(200), now_s=made.loop.now_s())
    value = to_numpy(stored.value)
    assert value.dtype == np.float32
    assert np.allclose(value, VALUES["a"] * VALUES["b"], atol=1e-3)
    assert stored.shared is None
    assert len(store_of(made, "agent-01")) == 0
    outputs = [p for p in made.wire.sent if isinstance(p.message, m.SpdzOutputs)]
    assert not outputs  # what the member has itself is enough


def test_what_opened_to_a_member_counts_as_computed_from_rows() -> None:
    """Others' rows may be in it, of which its device knows nothing: that a value was only ever sent does not let it
    leave."""
    made = made_with(msgspec.structs.replace(LENDING, fetch="sent"))
    conduct = Conduct(made)
    conduct.play(conduct.command_of(0, keep=(), moved=(moved(),)))
    told_masks(conduct)
    made.wire.to_server.clear()
    made.tell("agent-00", m.TensorGet(tensor_id=tid(200)))
    made.settle()
    assert f"listing, in policy.fetch, all Plans that made it: {plan_id(PLAN).hex()}" in made.refusal("agent-00").reason


def test_own_rows_that_come_back_stay_rows() -> None:
    made = made_with(LENDING)
    load = m.TensorLoad(tensor_id=tid(1), dataset="toy", columns=("f0",), split="train", dtype="float32", lease_s=60.0)
    made.tell("agent-00", load)
    conduct = Conduct(made)
    shelf = Shelf(
        agent="agent-00",
        server=SERVER,
        store=store_of(made, "agent-00"),
        policy=lambda: LENDING,
        require_exact=lambda _dataset, _kind: None,
    )
    step = conduct.command_of(0, keep=(), moved=(moved("copy"),))
    taken = Taken(
        names=(),
        values=(),
        outputs={"copy": Source(made_by=None, lineage=frozenset(), datasets=frozenset({"toy"}))},
    )
    shelf.receive(conduct.command, step, taken, {"copy": from_numpy(VALUES["a"])}, now_s=made.loop.now_s())
    made.wire.to_server.clear()
    made.tell("agent-00", m.TensorGet(tensor_id=tid(200)))
    made.settle()
    assert "rows of a dataset, which never leave the device" in made.refusal("agent-00").reason


@pytest.mark.parametrize(
    ("entry", "policy", "code", "words"),
    [
        (moved(to="agent-02"), LENDING, "policy", "no party of the session"),
        (moved(to=SERVER), LENDING, "policy", "no party of the session"),
        (moved(to="agent-01"), LENDING, "policy", r"policy.spdz.outputs (tensors: [agent-01])"),
        (moved(), ALLOWED, "policy", r"policy.spdz.outputs (tensors: [agent-00])"),
        (moved("q"), LENDING, "command", "has no output 'q'"),
        (moved(), msgspec.structs.replace(LENDING, fetch="none"), "policy", "may not leave the device"),
    ],
)
def test_a_member_judges_what_opens_to_another(entry: m.SpdzMoved, policy: Policy, code: str, words: str) -> None:
    made = made_with(policy)
    conduct = Conduct(made)
    made.wire.to_server.clear()
    made.tell("agent-01", conduct.command_of(0, moved=(entry,)))
    made.settle()
    assert made.refusal("agent-01").code == code
    assert words in made.refusal("agent-01").reason


def test_a_lender_needs_fetch_the_receiver_does_not() -> None:
    made = made_with(msgspec.structs.replace(LENDING, fetch="none"))
    conduct = Conduct(made)
    made.wire.to_server.clear()
    made.tell("agent-00", conduct.command_of(0, moved=(moved(),)))
    made.settle()
    assert not made.said(m.Refused, "agent-00")


def test_what_opens_to_a_member_needs_an_id_and_room_there() -> None:
    made, conduct, masks = one_step(msgspec.structs.replace(LENDING, fetch="any"))
    fields: dict[str, Any] = {"kept": (kept(conduct, 100),), "given": SERVER_GIVES_B, "keep": ()}
    made.tell("agent-00", conduct.command_of(1, **fields, moved=(moved(k=100),)))
    made.settle()
    assert made.refusal("agent-00").code == "conflict"
    made.wire.to_server.clear()
    made.wire.cores["agent-00"]._store.budget_bytes = 300  # type: ignore[misc]
    made.tell("agent-00", conduct.command_of(1, **fields, moved=(moved(),)))
    made.settle()
    assert made.refusal("agent-00").code == "limit"
    assert masks


@pytest.mark.parametrize("security", ["active", "passive"])
def test_a_member_that_was_not_told_what_opens_to_another(security: str) -> None:
    """The server would have the rows of who forbids it opened to who allows it."""
    spdz = SpdzPolicy(outputs={"tensors": (SERVER, "agent-00")}, security="passive")
    made = made_with(msgspec.structs.replace(ALLOWED, spdz=spdz))
    conduct = Conduct(made, stepwise(security=security))
    step = conduct.command_of(0, keep=(), moved=(moved(),))
    conduct.play(step, told={"agent-01": msgspec.structs.replace(step, moved=())})
    assert {one.code for one in made.said(m.SpdzAbort)} == {"equivocation"}  # type: ignore[attr-defined]
    assert not made.said(m.SpdzChecked)
    made.tell("agent-00", conduct.desk.masks_for(0, {"z": np.zeros(2, np.int64)}))
    made.settle()
    assert len(store_of(made, "agent-00")) == 0
    assert not made.said(m.SpdzStored)


@pytest.mark.parametrize("case", ["nothing", "twice", "other-output", "shape", "step", "lender"])
def test_masks_of_anything_else_end_the_session(case: str) -> None:
    made = made_with(LENDING)
    conduct = Conduct(made)
    conduct.play(conduct.command_of(0, keep=(), moved=() if case == "nothing" else (moved(),)))
    zeros = np.zeros(2, np.int64)
    match case:
        case "nothing":
            told_masks(conduct)
        case "twice":
            told_masks(conduct)
            told_masks(conduct)
        case "other-output":
            told_masks(conduct, copy=zeros)
        case "shape":
            told_masks(conduct, z=zeros[:1])
        case "step":
            told_masks(conduct, 1, z=zeros)
        case "lender":
            told_masks(conduct, to="agent-01")
    assert made.abort("agent-01" if case == "lender" else "agent-00").code == "protocol"
    assert len(store_of(made, "agent-00")) == (case == "twice")
    assert len(store_of(made, "agent-01")) == 0


def test_masks_come_from_the_dealer() -> None:
    made = made_with(LENDING)
    conduct = Conduct(made)
    conduct.play(conduct.command_of(0, keep=(), moved=(moved(),)))
    masks = conduct.desk.masks_for(0, {"z": np.zeros(2, np.int64)})
    for context in (b"", conduct.command.session):
        made.tell("agent-00", masks, sender="agent-01", context=context)
    made.settle()
    assert not made.said(m.SpdzStored)
    told_masks(conduct)
    assert made.said(m.SpdzStored)


def test_gifts_come_from_who_gives() -> None:
    made, conduct, masks = one_step()
    step = conduct.command_of(1, kept=(kept(conduct, 100),), given=SERVER_GIVES_B)
    conduct.play(step, masks=masks, deal=False)
    gift = m.SpdzState(
        session=conduct.command.session, terms=m.terms_of_step(conduct.command, step), step=1, names=("b",),
        values=(from_numpy(np.zeros(2, np.int64)),),
    )  # fmt: skip
    made.wire.to_server.clear()
    made.tell("agent-00", gift, sender="agent-02", context=conduct.command.session)
    made.settle()
    assert not made.said(m.SpdzAbort)  # a stranger changes nothing
    made.tell("agent-00", gift, sender="agent-01", context=conduct.command.session)
    made.settle()
    assert made.abort("agent-00").code == "protocol"


def test_a_gift_under_other_terms_is_equivocation() -> None:
    made, conduct, _ = one_step()
    gift = m.SpdzState(
        session=conduct.command.session, terms=bytes(32), step=1, names=("b",),
        values=(from_numpy(np.zeros(2, np.int64)),),
    )  # fmt: skip
    made.tell("agent-00", gift, sender="agent-01", context=conduct.command.session)  # before the step is told
    made.settle()
    given = (m.SpdzGiven(name="b", owner="agent-01", tensor_id=tid(1)),)
    made.tell("agent-00", conduct.command_of(1, kept=(kept(conduct, 100),), given=given))
    made.settle()
    assert made.abort("agent-00").code == "equivocation"


def test_a_step_comes_from_the_server_only() -> None:
    made, conduct, masks = one_step()
    step = conduct.command_of(1, kept=(kept(conduct, 100),), given=SERVER_GIVES_B)
    for sender, context in (("agent-01", b""), ("agent-01", conduct.command.session), ("agent-02", b"")):
        made.tell("agent-00", step, sender=sender, context=context)
    made.settle()
    conduct.play(step, masks=masks)
    assert conduct.checked() == 2


def test_a_member_that_keeps_another_value_is_noticed() -> None:
    made, conduct, masks = one_step()
    store = store_of(made, "agent-01")
    held = store._tensors[tid(100)]
    bent = to_numpy(held.value) + 1
    store._tensors[tid(100)] = type(held)(
        value=from_numpy(bent), made_by=held.made_by, until_s=held.until_s, shared=held.shared
    )
    conduct.play(conduct.command_of(1, kept=(kept(conduct, 100),), given=SERVER_GIVES_B, opened=("z",)), masks=masks)
    assert {one.code for one in made.said(m.SpdzAbort)} == {"equivocation"}  # type: ignore[attr-defined]
    assert not made.said(m.SpdzChecked)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (np.zeros(3, np.float32), "command"),
        (np.zeros(2, np.int64), "command"),
        (np.array([9.0, 0.0], np.float32), "out-of-range"),
        (np.array([np.nan, 0.0], np.float32), "out-of-range"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_circuit_is_not_masked(value: Any, code: str) -> None:
    made = made_with()
    conduct = Conduct(made)
    made.tell("agent-01", m.TensorPut(tensor_id=tid(1), value=from_numpy(value), lease_s=60.0))
    given = (m.SpdzGiven(name="a", owner="agent-01", tensor_id=tid(1)), *SERVER_GIVES_B)
    conduct.play(conduct.command_of(0, given=given))
    assert made.abort("agent-01").code == code
    assert not [p for p in made.wire.sent if isinstance(p.message, m.SpdzState) and p.sender == "agent-01"]
    assert "9" not in made.abort("agent-01").reason.replace("0.9", "")


def test_scheduled_sessions_have_no_steps() -> None:
    made = made_with()
    made.tell("agent-00", m.PlanPut(plan=PLAN))
    packet = Packet(sender=SERVER, to="agent-00", message=stepwise(), correlation=bytes(16), context=b"")
    assert packet.message.idle_s == 600.0  # type: ignore[attr-defined]
    made.tell("agent-00", m.SpdzStep(
        session=b"session-unknown!", step=0, kept=(), given=(), keep=(), opened=(), moved=(), drops=(), lease_s=1.0
    ))  # fmt: skip
    made.settle()
    assert made.refusal("agent-00").code == "unknown-session"
