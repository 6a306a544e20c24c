"""A model that an agent provides, in the simulator: the same bits as by the server, to whom it never comes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from helpers_mosquitto import require_mosquitto
from helpers_sim import boston_shares, write_faults
from sordino_common import messages as m
from sordino_common.errors import ConfigError
from sordino_server.conductor import Conductor
from sordino_server.rounds.events import Note
from sordino_server.rounds.spdz_session import ModelMissing, SessionRefused
from sordino_sim.harness import SimulatedAgent, SimulatedFleet
from sordino_sim.runner import Simulated, simulate
from sordino_sim.scenario import Scenario

INFER = (
    "train.rounds=0",
    "spdz.inference={split: test, batch_rows: 16}",
    "spdz.outputs={model: nobody, loss: nobody, prediction: owners}",
    "spdz.evaluate=shares",
)


def notes(done: Simulated) -> list[str]:
    return [event.text for event in done.events if isinstance(event, Note)]


def bits(done: Simulated) -> object:
    return done.summary["params_sha256"]


@pytest.fixture(scope="module")
def by_server() -> Simulated:
    return simulate(boston_shares(), with_baseline=False)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, m.Message]]:
    """Everything that the server is sent."""
    found: list[tuple[str, m.Message]] = []
    original = Conductor.on_message

    def watch(self: Conductor, incoming: object) -> None:
        found.append((incoming.sender, incoming.message))  # type: ignore[attr-defined]
        original(self, incoming)  # type: ignore[arg-type]

    monkeypatch.setattr(Conductor, "on_message", watch)
    return found


@pytest.fixture
def fleets(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedFleet]:
    made: list[SimulatedFleet] = []
    original = SimulatedFleet.start_agents

    def remember(self: SimulatedFleet) -> None:
        made.append(self)
        original(self)

    monkeypatch.setattr(SimulatedFleet, "start_agents", remember)
    return made


def states(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """To whom masked parameters come, in order."""
    from sordino_agent.spdz import room
    from sordino_agent.spdz.session import Session

    came: list[str] = []
    original = Session.on_state

    def watch(self: Session, sender: str, message: m.SpdzState) -> None:
        came.append(f"{sender} to {self._agent}")
        original(self, sender, message)

    for table in (room._OF_PEERS, room._OF_THE_DEALER):
        monkeypatch.setitem(table, m.SpdzState, watch)  # type: ignore[arg-type]  # they are dicts
    return came


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["agent-00", "agent-03"])  # a party, and one that is none
def test_training_gives_the_bits_of_the_same_model_by_the_server(
    owner: str, by_server: Simulated, heard: list[tuple[str, m.Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    came = states(monkeypatch)
    done = simulate(boston_shares(f"spdz.model_from={owner}"), with_baseline=False)
    assert bits(done) == bits(by_server)
    assert done.summary["security"] == "active"
    assert (done.summary["model_from"], by_server.summary["model_from"]) == (owner, "server")
    assert sorted(came) == [f"{owner} to agent-0{k}" for k in range(3) if f"agent-0{k}" != owner]
    assert not [message for _, message in heard if isinstance(message, m.SpdzState | m.SpdzInput | m.SpdzShares)]


def test_there_is_no_comparison_with_parameters_that_are_not_known() -> None:
    assert simulate(boston_shares("spdz.model_from=agent-03", "train.rounds=1")).summary["baseline"] is None


def test_a_dealer_of_its_own_deals_for_an_owner_of_the_model() -> None:
    first, second = (
        simulate(boston_shares("spdz.dealer=midas", *more), with_baseline=False)
        for more in ((), ("spdz.model_from=agent-03",))
    )
    assert bits(first) == bits(second)


def test_a_run_that_resumes_does_not_ask_for_the_model_again(
    by_server: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = states(monkeypatch)
    faults = write_faults(tmp_path, "round: 2, after_s: 0.1, do: server-kill")
    done = simulate(boston_shares("spdz.model_from=agent-03"), faults=faults, with_baseline=False)
    assert done.summary["sessions"] == 2
    assert len(came) == 3  # of the first session, by each of its parties
    for name, value in done.result.tensors.items():
        assert np.abs(value - by_server.result.tensors[name]).max() < 0.002


@pytest.mark.parametrize("owner", ["server", "agent-00", "agent-03"])
def test_a_mask_at_the_edge_costs_a_session_and_not_the_run(
    owner: str, by_server: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a chance of 2^-26 a parameter: a model of a million would fail one run in sixty."""
    edges = iter([True])
    monkeypatch.setattr("sordino_common.spdz.owner.at_edge", lambda opened, bits: next(edges, False))
    done = simulate(boston_shares(f"spdz.model_from={owner}"), with_baseline=False)
    assert done.summary["sessions"] == 2
    assert any("came near the edge of the ring; a new session draws another" in text for text in notes(done))
    for name, value in done.result.tensors.items():
        assert np.abs(value - by_server.result.tensors[name]).max() < 0.002


def test_an_owner_that_is_gone_is_missed_by_name(tmp_path: Path) -> None:
    faults = write_faults(tmp_path, "round: 1, after_s: 0.0, do: die, agents: [agent-03]")
    with pytest.raises(Exception, match=r"a session can't open; missing: agent-03") as caught:
        simulate(boston_shares("spdz.model_from=agent-03"), faults=faults, with_baseline=False)
    assert getattr(caught.value, "exit_code", None) == 3


# --- inference only ------------------------------------------------------------------------------------------------


def predictions(fleet: SimulatedFleet) -> dict[str, np.ndarray]:
    found = {}
    for agent in fleet.agents.values():
        (name,) = agent.models
        assert name.endswith("-predictions")
        found[agent.name] = np.load(io.BytesIO(agent.models[name]))["prediction"]
    return found


def test_a_model_is_used_and_never_shown(fleets: list[SimulatedFleet], heard: list[tuple[str, m.Message]]) -> None:
    done = simulate(boston_shares(*INFER, "spdz.model_from=agent-03"))
    other = simulate(boston_shares(*INFER))
    mine, theirs = (predictions(fleet) for fleet in fleets)
    assert sum(len(values) for values in mine.values()) == done.summary["test_rows"] == 101
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    assert done.summary["metrics"] == other.summary["metrics"]
    assert done.result.tensors == {}
    assert (done.summary["rounds"], done.summary["steps"], done.summary["baseline"]) == (0, 0, None)
    assert done.summary["mac_checks"] > 0 and done.summary["agents"] == 4
    assert not [message for _, message in heard if isinstance(message, m.SpdzState)]


def test_what_was_trained_serves_from_where_it_opened(fleets: list[SimulatedFleet], tmp_path: Path) -> None:
    """An agent gets a model, keeps it, and lets others use it without showing it."""
    trained = simulate(boston_shares("spdz.outputs.model=agent-03", "spdz.evaluate=shares"), with_baseline=False)
    (file,) = [data for run, data in fleets[0].agents["agent-03"].models.items() if not run.endswith("-predictions")]
    (tmp_path / "trained.npz").write_bytes(file)
    job = boston_shares(*INFER, "spdz.model_from=agent-03", f"simulation.model={tmp_path / 'trained.npz'}")
    served = simulate(job)
    assert served.summary["metrics"]["test_mse"] == pytest.approx(trained.summary["metrics"]["test_mse"], rel=1e-3)


def test_predictions_open_to_one_agent_that_the_owners_allow(fleets: list[SimulatedFleet]) -> None:
    jobs = [
        boston_shares(*INFER[:2], f"spdz.outputs={{model: nobody, prediction: {to}}}") for to in ("owners", "agent-03")
    ]
    theirs, his = (simulate(job) for job in jobs)
    assert (theirs.summary["opened"], his.summary["opened"]) == ({"prediction": "owners"}, {"prediction": "agent-03"})
    assert any("predictions of 101 test rows are with agent-03, and nowhere else" in text for text in notes(his))
    ((_, file),) = fleets[1].agents["agent-03"].models.items()
    assert [len(agent.models) for agent in fleets[1].agents.values()] == [0, 0, 0, 1]
    read = np.load(io.BytesIO(file))
    assert set(read) == {f"prediction/agent-0{k}" for k in range(4)}
    for name, values in predictions(fleets[0]).items():
        assert np.array_equal(read[f"prediction/{name}"], values)


@pytest.mark.parametrize("more", [(), ("spdz.dealer=midas",)])
def test_who_reads_need_not_compute(fleets: list[SimulatedFleet], more: tuple[str, ...]) -> None:
    job = boston_shares(
        *INFER[:2], "spdz.outputs={model: nobody, prediction: agent-03}", "spdz.compute_agents=2", *more
    )
    done = simulate(job)
    assert any("are with agent-03" in text for text in notes(done))
    assert [len(agent.models) for agent in fleets[0].agents.values()] == [0, 0, 0, 1]


def test_one_owner_that_does_not_allow_it_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SimulatedFleet._start

    def strict(self: SimulatedFleet, agent: SimulatedAgent) -> None:
        wide = self.policy
        if agent.name == "agent-01":
            narrow = msgspec.structs.replace(wide.spdz, outputs={"prediction": ("*owners",)})
            self.policy = msgspec.structs.replace(wide, spdz=narrow)
        original(self, agent)
        self.policy = wide

    monkeypatch.setattr(SimulatedFleet, "_start", strict)
    job = boston_shares(*INFER[:2], "spdz.outputs={model: nobody, prediction: agent-03}")
    with pytest.raises(
        SessionRefused, match=r"agent-01 refuses .*'prediction' may not open to agent-03 here"
    ) as caught:
        simulate(job)
    assert caught.value.exit_code == 4


def test_predictions_open_to_nobody_else() -> None:
    for to in ("server", "nobody"):
        job = boston_shares(*INFER[:2], f"spdz.outputs={{model: nobody, prediction: {to}}}")
        with pytest.raises(
            ConfigError, match=r"spdz.outputs.*: predictions open to who owns the rows \(owners\), or to"
        ):
            simulate(job)
    job = boston_shares(*INFER[:2], "spdz.outputs={model: nobody, prediction: agent-77}")
    with pytest.raises(ConfigError, match=r"spdz\.outputs\.prediction: agent-77 is not in the roster of epoch 1"):
        simulate(job)


@pytest.mark.mqtt
def test_over_a_real_broker(by_server: Simulated, fleets: list[SimulatedFleet]) -> None:
    require_mosquitto()
    done = simulate(
        boston_shares("spdz.model_from=agent-03", "train.quorum=1.0"), transport="mqtt", with_baseline=False
    )
    for name, value in done.result.tensors.items():
        assert np.abs(value - by_server.result.tensors[name]).max() < 0.002
    simulate(boston_shares(*INFER, "spdz.model_from=agent-00", "train.quorum=1.0"), transport="mqtt")
    assert sum(len(values) for values in predictions(fleets[-1]).values()) == 101


@pytest.mark.slow
@pytest.mark.mqtt
def test_by_processes(by_server: Simulated) -> None:
    require_mosquitto()
    done = simulate(
        boston_shares("spdz.model_from=agent-03", "train.quorum=1.0"), transport="processes", with_baseline=False
    )
    for name, value in done.result.tensors.items():
        assert np.abs(value - by_server.result.tensors[name]).max() < 0.002


# --- refusals ------------------------------------------------------------------------------------------------------


def npz(change: Callable[[str, np.ndarray], np.ndarray], folder: Path) -> str:
    """The job's own parameters, changed, as a file."""
    scenario = Scenario(job=boston_shares("spdz.model_from=agent-03"), seed=1, boards={"agent-03": None})  # type: ignore[dict-item]
    ((_, data),) = scenario.models()["agent-03"].items()
    tensors = {name: change(name, value) for name, value in np.load(io.BytesIO(data)).items()}
    np.savez(folder / "changed.npz", **tensors)  # type: ignore[arg-type]
    return f"simulation.model={folder / 'changed.npz'}"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda name, value: value.T, r"tensor '.*weight': expected float32\[\d+, \d+\], found float32\[\d+, \d+\]"),
        (lambda name, value: value.astype(np.float64), r"tensor '.*': expected float32\[.*\], found float64\["),
        (lambda name, value: value + 5, r"tensor '.*': a value is beyond the 4 that the job states"),
    ],
)
def test_an_owners_refusal_reaches_the_user(
    change: Callable[[str, np.ndarray], np.ndarray], text: str, tmp_path: Path
) -> None:
    job = boston_shares("spdz.model_from=agent-03", npz(change, tmp_path))
    with pytest.raises(SessionRefused, match="agent-03 refuses the session: .*" + text) as caught:
        simulate(job, with_baseline=False)
    assert caught.value.exit_code == 4


def test_an_owners_policy_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SimulatedFleet.start_agents

    def strict(self: SimulatedFleet) -> None:
        self.policy = msgspec.structs.replace(self.policy, models=())
        original(self)

    monkeypatch.setattr(SimulatedFleet, "start_agents", strict)
    with pytest.raises(
        SessionRefused, match=r"policy: model 'boston-spdz' may not be input .* policy\.models"
    ) as caught:
        simulate(boston_shares("spdz.model_from=agent-03"), with_baseline=False)
    assert caught.value.exit_code == 4


def test_a_missing_model_is_the_jobs_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scenario, "models", lambda self: {"agent-03": {"pump": b""}})
    with pytest.raises(
        ConfigError, match=r"--set spdz\.model_from: agent-03 does not have the model: .*no model 'boston-spdz' here"
    ) as caught:
        simulate(boston_shares("spdz.model_from=agent-03"), with_baseline=False)
    assert caught.value.exit_code == 2
    assert ModelMissing.exit_code == 2


def test_a_job_that_the_simulator_can_not_give_a_model_for(tmp_path: Path) -> None:
    for overrides, text in (
        (("spdz.model_from=agent-09",), "spdz.model_from: the simulated fleet has no agent-09, it has agent-00 to"),
        (("spdz.model_from=agent-00", "simulation.model=gone.npz"), "simulation.model: .*gone.npz: can't be read: No"),
        (("simulation.model=gone.npz",), "simulation.model: is only used with spdz.model_from: an agent"),
    ):
        with pytest.raises(ConfigError, match=text):
            simulate(boston_shares(*overrides), with_baseline=False)
