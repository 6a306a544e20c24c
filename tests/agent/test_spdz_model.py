"""An agent provides a session's first parameters: what it refuses, what leaves it, and what comes of another's lies."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from helpers_agent import SERVER, linear_training_plan
from helpers_channel import entry
from helpers_channel import roster as roster_of
from helpers_shares import (
    NAMES,
    SETTINGS,
    SHARES_POLICY,
    Committee,
    Conduct,
    Packet,
    committee,
    fleet_roster,
    open_command,
)
from sordino_agent.data.models import FileModels, MemoryModels, first_state
from sordino_agent.errors import ModelFileError, ModelMismatch, UnknownModel
from sordino_agent.models import ModelFile
from sordino_agent.policy import Policy
from sordino_common import messages as m
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.spdz.errors import OutOfRange
from sordino_common.spdz.opening import spec_of

OWNER = "agent-03"  # of the model: neither a party nor an owner of rows
EVERYBODY = (*NAMES, OWNER)
W = np.array([[0.5], [-1.25], [2.0]], dtype=np.float32)
B = np.array([0.25], dtype=np.float32)
POLICY = msgspec.structs.replace(SHARES_POLICY, jobs=(*SHARES_POLICY.jobs, "spdz-model"), models=("boiler",))


def npz(**tensors: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **tensors)  # type: ignore[arg-type]
    return file.getvalue()


def command(**changes: object) -> m.SpdzOpen:
    return open_command(**{"state_from": OWNER, "model": "boiler", **changes})


SESSION = command().session


def company(
    model: bytes | None = None, *, policy: Policy = POLICY, owner: str = OWNER, names: Sequence[str] = EVERYBODY
) -> Committee:
    provides = {owner: {"boiler": npz(w=W, b=B) if model is None else model}}
    return committee(names, policy=policy, provides=provides)


def opened(made: Committee, conduct: Conduct) -> dict[str, np.ndarray]:
    """The parameters after the last step, as they opened to the server."""
    values = [v for c in made.said(m.SpdzChecked) for v in c.outputs if v.names == ("w", "b")]  # type: ignore[attr-defined]
    return {
        name: (to_numpy(value) - conduct.masks[conduct.command.steps][name]) / 2.0**14
        for name, value in zip(values[0].names, values[0].values, strict=True)
    }


def played(asked: m.SpdzOpen, made: Committee) -> Conduct:
    made.open(asked)
    assert made.ready() == set(made.wire.cores)
    conduct = Conduct(made, asked)
    assert conduct.run()
    return conduct


# --- the way it should be ------------------------------------------------------------------------------------------


def test_the_result_is_to_the_bit_that_of_the_same_parameters_by_the_server() -> None:
    by_agent = company()
    first = opened(by_agent, played(command(), by_agent))
    by_server = committee(EVERYBODY, policy=POLICY)
    asked = command(state_from=SERVER, model=None)
    by_server.open(asked, names=NAMES)
    conduct = Conduct(by_server, asked)
    conduct.first = {"w": W, "b": B}
    assert conduct.run()
    second = opened(by_server, conduct)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    # and it has learned: [1, 2, 3] is nearer than before
    assert np.abs(first["w"].ravel() - [1, 2, 3]).sum() < np.abs(W.ravel() - [1, 2, 3]).sum()


@pytest.mark.parametrize("owner", NAMES)
def test_a_party_that_owns_rows_may_own_the_model_too(owner: str) -> None:
    made = company(owner=owner, names=NAMES)
    played(command(state_from=owner), made)


def test_masked_parameters_go_to_parties_in_the_sessions_context_once_and_never_to_the_server() -> None:
    made = company()
    conduct = played(command(), made)
    states = [packet for packet in made.wire.sent if isinstance(packet.message, m.SpdzState)]
    assert [(packet.sender, packet.to, packet.context) for packet in states] == [(OWNER, n, SESSION) for n in NAMES]
    assert states[0].message == states[1].message == states[2].message
    masked = {n: to_numpy(v) for n, v in zip(states[0].message.names, states[0].message.values, strict=True)}  # type: ignore[attr-defined]
    # What leaves has nothing of the value: an element near zero is as far from zero as any other.
    assert all(np.abs(value.astype(np.float64)).max() > 2.0**40 for value in masked.values())
    assert conduct.spec.digest == command().digest


def test_the_owner_is_told_when_it_is_over() -> None:
    made = company()
    played(command(), made)
    for name in EVERYBODY:
        made.tell(name, m.SpdzClose(session=SESSION))
    made.settle()
    closed = {p.sender: p.message for p in made.wire.to_server if isinstance(p.message, m.SpdzClosed)}
    assert set(closed) == set(EVERYBODY)
    assert closed[OWNER].rows == 0
    assert all(core.running == () for core in made.wire.cores.values())


def test_a_session_that_resumes_asks_for_no_model() -> None:
    made = company()
    conduct = played(command(), made)
    for name in EVERYBODY:
        made.tell(name, m.SpdzClose(session=SESSION))
    made.settle()
    made.wire.sent.clear()
    made.wire.to_server.clear()
    point = m.SpdzPoint(session=SESSION, step=6)
    second = command(
        session=b"session-00000002", first_step=6, steps=8, checkpoints=(8,), state_from=None, model=None, resume=point
    )
    made.open(second, names=NAMES)
    assert Conduct(made, second, masks=conduct.masks[6]).run()
    assert not [packet for packet in made.wire.sent if isinstance(packet.message, m.SpdzState)]


# --- refusals ------------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[Policy, bytes, dict[str, object], str, str]] = {
    "no models": (
        SHARES_POLICY,
        npz(w=W, b=B),
        {},
        "policy",
        "jobs of kind `spdz-model` are not served here",
    ),
    "another model": (
        msgspec.structs.replace(POLICY, models=("pump",)),
        npz(w=W, b=B),
        {},
        "policy",
        "model 'boiler' may not be input into a session here; its owner can allow it in policy.models",
    ),
    "no name": (POLICY, npz(w=W, b=B), {"model": None}, "policy", "a model of this device but does not say which"),
    "an unknown model": (
        msgspec.structs.replace(POLICY, models="any"),
        npz(w=W, b=B),
        {"model": "pump"},
        "unknown-model",
        "no model 'pump' here; there are: boiler",
    ),
    "a shape": (
        POLICY,
        npz(w=W.reshape(1, 3), b=B),
        {},
        "model",
        "model 'boiler', tensor 'w': expected float32[3, 1], found float32[1, 3]",
    ),
    "a dtype": (
        POLICY,
        npz(w=W, b=B.astype(np.float64)),
        {},
        "model",
        "model 'boiler', tensor 'b': expected float32[1], found float64[1]",
    ),
    "a tensor too few": (
        POLICY, npz(w=W), {}, "model", "model 'boiler' has no tensor 'b', which the Plan takes; it has w"
    ),
    "a tensor too many": (
        POLICY, npz(w=W, b=B, c=B), {}, "model", "model 'boiler' has a tensor 'c', the Plan takes w, b only"
    ),
    "a value out of its range": (
        POLICY,
        npz(w=W * 10, b=B),
        {},
        "out-of-range",
        "model 'boiler', tensor 'w': a value is beyond the 16 that the job states (spdz.ranges.params); raise",
    ),
    "not a number": (POLICY, npz(w=W * np.nan, b=B), {}, "out-of-range", "tensor 'w': NaN or infinite"),
    "no file": (POLICY, b"no zip", {}, "model-file", "model 'boiler' can't be read on this device"),
    "an output that the model's owner does not allow": (
        msgspec.structs.replace(POLICY, spdz=msgspec.structs.replace(POLICY.spdz, outputs={"loss": (SERVER,)})),
        npz(w=W, b=B),
        {},
        "policy",
        "output 'model' may not open to server here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_the_owner_refuses_by_name(what: str) -> None:
    policy, model, changes, code, text = REFUSALS[what]
    made = company(model, policy=policy)
    made.open(command(**changes), names=[OWNER])
    refused = made.refusal(OWNER)
    assert (refused.command, refused.code) == ("spdz-open", code)
    assert text in refused.reason
    assert made.wire.cores[OWNER].running == ()
    assert "/" not in refused.reason  # no path leaves the device


def test_an_agent_of_another_session_is_not_asked_for_its_model() -> None:
    made = company()
    made.open(command(state_from=SERVER), names=[OWNER])
    assert "agent-03 is neither a party nor an owner of rows or of the model" in made.refusal(OWNER).reason


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        (("compute",), "agent-03 has the roles compute in the roster, not data"),
        (
            ("data", "dealer"),
            "agent-03 has the role dealer and would be an owner of the model: whoever deals the masks must not hold",
        ),
    ],
)
def test_parties_refuse_who_must_not_provide(roles: tuple[str, ...], text: str) -> None:
    entries = [entry(SERVER, roles=("server", "dealer"))]
    entries += [entry(name, roles=("data", "compute"), zone=name) for name in NAMES]
    made = committee(NAMES, policy=POLICY, known=roster_of(entries=[*entries, entry(OWNER, roles=roles, zone="z")]))
    made.open(command(), names=["agent-00"])
    assert text in made.refusal("agent-00").reason
    assert fleet_roster(EVERYBODY).entry(OWNER).roles == ("compute", "data")


# --- lies ----------------------------------------------------------------------------------------------------------


def changed(
    change: Callable[[np.ndarray], np.ndarray], *, only: str | None = None
) -> Callable[[Packet], Sequence[Packet]]:
    """Bends what the owner sends (to `only`): `change` of D of w."""

    def bend(packet: Packet) -> Sequence[Packet]:
        if not isinstance(packet.message, m.SpdzState) or only not in (None, packet.to):
            return (packet,)
        values = (
            from_numpy(np.ascontiguousarray(change(to_numpy(packet.message.values[0])))),
            packet.message.values[1],
        )
        message = msgspec.structs.replace(packet.message, values=values)
        return (
            Packet(sender=packet.sender, to=packet.to, message=message, correlation=bytes(16), context=packet.context),
        )

    return bend


@pytest.mark.parametrize(
    ("change", "only", "codes", "text"),
    [
        (lambda d: d[:2], None, {"protocol"}, "first parameters of agent-03: w: expected int64[3, 1], got int64[2, 1]"),
        # Far beyond its range: every identity over the integers breaks.
        (
            lambda d: d + (np.int64(1) << np.int64(61)),
            None,
            {"mac-check"},
            "a value left the range that the job states",
        ),
        # One party is told other parameters than the rest.
        (lambda d: d + np.int64(1 << 20), "agent-01", {"equivocation"}, "different"),
    ],
)
def test_an_owner_that_lies_is_found(
    change: Callable[[np.ndarray], np.ndarray], only: str | None, codes: set[str], text: str
) -> None:
    made = company()
    made.wire.bend = changed(change, only=only)
    asked = command()
    made.open(asked)
    assert not Conduct(made, asked).run()
    aborts = made.said(m.SpdzAbort)
    assert {abort.code for abort in aborts} <= {*codes, "session-dead"}, aborts  # type: ignore[attr-defined]
    assert any(text in abort.reason for abort in aborts), aborts  # type: ignore[attr-defined]
    assert not [value for c in made.said(m.SpdzChecked) for value in c.outputs]  # type: ignore[attr-defined]


def test_an_owner_that_was_told_of_other_outputs_shows_it() -> None:
    """Its policy has agreed to a session in which no model opens; the parties were told of another one."""
    made = company()
    for name in EVERYBODY:
        made.tell(name, command(outputs=()) if name == OWNER else command())
    made.settle()
    assert made.ready() == set(EVERYBODY)
    assert not Conduct(made, command()).run()
    assert {abort.code for abort in made.said(m.SpdzAbort)} == {"equivocation"}  # type: ignore[attr-defined]
    assert "agent-03 was told other terms of this session" in made.abort().reason


@pytest.mark.parametrize("r", [(1 << 63) - 1, -(1 << 63) + 2])
def test_a_mask_at_the_edge_of_the_ring_is_seen_before_anything_leaves(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sordino_common.spdz.owner.state_mask", lambda spec, seed, entry: np.full(entry.wire.shape, r, np.int64)
    )
    made = company(npz(w=W * 0, b=B * 0))
    made.open(command())
    Conduct(made, command()).begin()
    made.settle()
    assert made.abort(OWNER).code == "state-at-edge"
    assert "the mask of w came near the edge of the ring; a new session draws another" in made.abort(OWNER).reason
    assert not [packet for packet in made.wire.sent if isinstance(packet.message, m.SpdzState)]


def begun() -> tuple[Committee, Conduct]:
    """A session in which the owner's parameters have not come: they are held back."""
    made = company()
    made.wire.bend = lambda packet: (
        () if isinstance(packet.message, m.SpdzState) and packet.sender == OWNER else (packet,)
    )
    made.open(command())
    conduct = Conduct(made, command())
    conduct.begin()
    conduct.deal()
    made.settle()
    return made, conduct


def forged() -> m.SpdzState:
    zeros = (from_numpy(np.zeros((3, 1), np.int64)), from_numpy(np.zeros(1, np.int64)))
    return m.SpdzState(session=SESSION, terms=m.terms_of(command()), names=("w", "b"), values=zeros)


@pytest.mark.parametrize(
    ("sender", "context"),
    [
        ("agent-01", SESSION),
        ("agent-02", b""),
        (OWNER, b""),
        (OWNER, b"another-session-"),
        (SERVER, b""),
        (SERVER, SESSION),
    ],
)
def test_parameters_are_taken_from_the_owner_in_the_sessions_context_only(sender: str, context: bytes) -> None:
    made, _ = begun()
    before = len(made.said(m.SpdzAbort))
    made.tell("agent-00", forged(), sender=sender, context=context)
    made.settle()
    assert len(made.said(m.SpdzAbort)) == before
    assert made.wire.cores["agent-00"].running != ()  # it goes on waiting for the owner's
    assert not made.said(m.SpdzChecked)


def test_a_second_set_of_parameters_ends_the_session() -> None:
    made = company()
    made.open(command())
    conduct = Conduct(made, command())
    conduct.begin()
    made.settle()
    made.tell("agent-00", forged(), sender=OWNER, context=SESSION)
    made.settle()
    assert made.abort("agent-00").code == "protocol"
    assert "first parameters of agent-03: the first parameters came twice" in made.abort("agent-00").reason


def test_a_set_up_that_does_not_fit_who_provides_is_refused() -> None:
    for name, seed, text in (
        (OWNER, None, "a state's seed for who provides no parameters, or lacks one"),
        ("agent-00", bytes(32), "a state's seed for who provides no parameters, or lacks one"),
    ):
        made = company()
        made.open(command())
        setups = Conduct(made, command()).desk.setups()
        made.tell(name, msgspec.structs.replace(setups[name], state_seed=seed))
        made.tell(name, m.SpdzConfirm(session=SESSION, step=0))
        made.settle()
        assert made.abort(name).code == "protocol"
        assert text in made.abort(name).reason


# --- files ---------------------------------------------------------------------------------------------------------


def test_models_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "boiler.npz").write_bytes(npz(w=W, b=B))
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "pickled.npz", w=np.array([{"a": 1}], dtype=object))
    specs = [
        ModelFile(name=name, path=str(tmp_path / f"{name}.npz")) for name in ("boiler", "broken", "pickled", "gone")
    ]
    models = FileModels(specs, max_bytes=1 << 20)
    assert np.array_equal(models.tensors("boiler")["w"], W)
    for name, text in (
        ("broken", "not a readable NPZ"),
        ("pickled", "without pickles"),
        ("gone", "can't be read: No such"),
    ):
        with pytest.raises(ModelFileError, match=text) as caught:
            models.tensors(name)
        assert str(tmp_path) in str(caught.value)
        assert str(tmp_path) not in caught.value.public
    with pytest.raises(UnknownModel, match="no model 'pump' here; there are: boiler, broken, pickled, gone"):
        models.tensors("pump")


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "zeros.npz", w=np.zeros(1 << 18, np.float32))
    models = FileModels([ModelFile(name="zeros", path=str(tmp_path / "zeros.npz"))], max_bytes=1 << 16)
    with pytest.raises(ModelFileError, match=r"bytes when unpacked; limits\.memory_bytes allows 65536"):
        models.tensors("zeros")


def test_only_npz_files_are_configured() -> None:
    with pytest.raises(ValueError, match=r"the ending of 'model\.safetensors' is not npz"):
        ModelFile(name="boiler", path="model.safetensors")


def test_no_error_shows_a_value() -> None:
    asked = command()
    made = Conduct(company(), asked)
    spec = spec_of(asked, made.spec.circuit, made.spec.circuit_digest)
    wanted = {entry.name: entry.spec for entry in linear_training_plan().inputs if entry.role == "param"}
    for tensors, error in (
        ({"w": W * 1234.5, "b": B}, OutOfRange),
        ({"w": W.astype(np.float16), "b": B}, ModelMismatch),
    ):
        with pytest.raises(error) as caught:
            first_state("boiler", tensors, wanted=wanted, spec=spec, settings=SETTINGS)
        assert not any(digits in str(caught.value) for digits in ("1234", "617", "2469", "1.25"))
    assert MemoryModels({"boiler": npz(w=W)}).tensors("boiler").keys() == {"w"}
