"""Jobs on shares in the simulator: real agents, the real server, cheaters among them, and what else goes wrong."""

from __future__ import annotations

import io
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from helpers_sim import boston_shares, write_faults
from sordino_common.errors import ConfigError, RemoteError
from sordino_common.spdz.errors import CommitmentError, EquivocationError, MacCheckError
from sordino_server.progress import line_of, result_line
from sordino_server.rounds.effects import Effect, Result
from sordino_server.rounds.events import Note, RunStarted
from sordino_server.rounds.spdz_session import Session
from sordino_sim.harness import SimulatedFleet
from sordino_sim.runner import Simulated, simulate, without_wall_clock
from sordino_sim.tamper import Tamper, read_tamper

SUMMARY_FIELDS = {
    *("security", "compute_agents", "online_rounds_per_step", "opened_bytes_per_step_per_party"),
    *("preprocessing_bytes_per_step", "mac_checks", "mask_at_edge_retries", "overhead_vs_torch"),
    *("dealer_seconds", "online_seconds"),
}


def near(done: Simulated, other: Simulated) -> None:
    """The same model, but for the masks' roundings."""
    for name, value in done.result.tensors.items():
        assert np.abs(value - other.result.tensors[name]).max() < 0.02, name


def warnings(done: Simulated) -> list[str]:
    return [event.text for event in done.events if isinstance(event, Note) and event.level == "warning"]


def test_boston_on_shares_learns_what_plain_pytorch_learns() -> None:
    done = simulate(boston_shares("train.rounds=4"))
    summary = done.summary
    assert summary.keys() >= SUMMARY_FIELDS
    assert summary["metrics"]["test_mse"] == pytest.approx(summary["baseline"]["test_mse"], rel=0.02)
    assert summary["security"] == "active"
    assert (summary["rounds"], summary["steps"], summary["mac_checks"]) == (4, 24, 12)
    assert summary["compute_agents"] == 3
    assert summary["online_rounds_per_step"] == 7
    assert summary["sessions"] == 1
    assert summary["opened"] == {"model": "server", "loss": "server"}
    assert [record.round for record in done.result.records] == [1, 2, 3, 4]
    assert all(record.loss is not None for record in done.result.records)


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = (simulate(boston_shares(), with_baseline=False) for _ in range(2))
    clock = {"dealer_seconds", "online_seconds"}
    kept = [{k: v for k, v in without_wall_clock(one.summary).items() if k not in clock} for one in (first, second)]
    assert kept[0] == kept[1]


def test_preprocessing_that_is_dealt_first_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[int] = []
    deal_ahead = Session._deal_ahead

    def watched(session: Session) -> Generator[Effect, Result, None]:
        yield from deal_ahead(session)
        dealt.append(session.dealing.dealt)

    monkeypatch.setattr(Session, "_deal_ahead", watched)
    first, beside = (
        simulate(boston_shares(f"spdz.preprocessing={when}"), with_baseline=False) for when in ("first", "beside")
    )
    for name, value in first.result.tensors.items():
        assert np.array_equal(value, beside.result.tensors[name])
    assert first.summary["mac_checks"] == beside.summary["mac_checks"]
    assert len(dealt) == 1 and dealt[0] > 1  # of the first run only


@pytest.mark.parametrize("members", [2, 4])
def test_committees_of_two_and_four(members: int) -> None:
    done = simulate(boston_shares(f"spdz.compute_agents={members}", f"spdz.zones={members}"))
    assert done.summary["compute_agents"] == members
    assert done.summary["metrics"]["test_mse"] == pytest.approx(done.summary["baseline"]["test_mse"], rel=0.02)


def test_passive_is_named_loudly() -> None:
    done = simulate(boston_shares("spdz.security=passive"))
    assert done.summary["security"] == "passive"
    assert done.summary["mac_checks"] == 0
    assert any(text.startswith("security: passive. A single cheating compute agent") for text in warnings(done))
    started = next(event for event in done.events if isinstance(event, RunStarted))
    assert "PASSIVE" in (line_of(started, rounds=2) or "")
    assert result_line(done.summary).startswith("security PASSIVE (cheating would not be seen)")


def test_a_model_that_stays_shared_is_scored_on_shares() -> None:
    done = simulate(boston_shares("spdz.outputs.model=nobody"))
    hidden, seen = done.summary, simulate(boston_shares(), with_baseline=False).summary
    assert done.result.tensors == {}
    assert hidden["metrics"]["test_mse"] == pytest.approx(seen["metrics"]["test_mse"], rel=0.01)
    assert hidden["test_rows"] == seen["test_rows"] == 101
    assert hidden["opened"] == {"loss": "server"}
    assert hidden["sessions"] == 2


# --- cheaters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("opening", MacCheckError, "MacCheckError: agent-0. *: the MAC check after step 3 failed"),
        ("mac", MacCheckError, "MacCheckError: agent-0. *: the MAC check after step 3 failed"),
        ("correction", MacCheckError, "MacCheckError: agent-0. *: the MAC check after step . failed"),
        ("equivocation", EquivocationError, "somebody told different members different things"),
        ("seed", CommitmentError, "agent-01 opened a seed that it had not committed to"),
        ("commitment", CommitmentError, "agent-01 opened a seed that it had not committed to"),
    ],
)
def test_a_cheater_is_found_by_name_and_nothing_is_output(
    what: str, error: type[RemoteError], text: str, tmp_path: Path
) -> None:
    tamper = read_tamper(f"agent=1,step=3,gate=2,bit=17,what={what}")
    with pytest.raises(error, match=text) as caught:
        simulate(boston_shares(), tamper=tamper, with_baseline=False, store_folder=tmp_path)
    assert caught.value.exit_code == 4
    assert not list(tmp_path.rglob("*.safetensors"))  # it was found before the first checkpoint


@pytest.mark.parametrize("bit", [0, 13, 40, 63])
def test_any_bit_of_an_opening(bit: int) -> None:
    with pytest.raises(MacCheckError):
        simulate(boston_shares(), tamper=Tamper(agent=2, step=0, gate=bit, bit=bit), with_baseline=False)


def test_in_a_passive_session_nobody_notices() -> None:
    """Why it has to be said so loudly."""
    job = boston_shares("spdz.security=passive")
    done = simulate(job, tamper=Tamper(agent=0, step=3, gate=2, bit=12), with_baseline=False)
    assert done.summary["mac_checks"] == 0


def test_tamper_options_that_make_no_sense() -> None:
    for text, why in [
        ("agent=1", "agent and step are needed"),
        ("agent=x,step=1", "agent is a number from 0; got 'x'"),
        ("agent=1,step=1,what=luck", "what is one of opening, mac, seed, commitment, correction, equivocation"),
        ("agent=1,steps=1", "expected key=value with keys agent, bit, gate, step, what"),
    ]:
        with pytest.raises(ConfigError, match=why):
            read_tamper(text)
    with pytest.raises(ConfigError, match="the committee has 3 agents, from 0"):
        simulate(boston_shares(), tamper=Tamper(agent=3, step=0))
    with pytest.raises(ConfigError, match="nothing was tampered with"):
        simulate(boston_shares(), tamper=Tamper(agent=0, step=99), with_baseline=False)
    with pytest.raises(ConfigError, match="real agents don't cheat"):
        simulate(boston_shares(), tamper=Tamper(agent=0, step=1), transport="processes")


# --- what else goes wrong ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("round_", "at_s"), [(1, 0.0), (1, 0.1), (1, 0.2), (2, 0.02), (2, 0.1)])
def test_a_party_that_dies_and_comes_back_costs_a_session_and_not_the_run(
    round_: int, at_s: float, tmp_path: Path
) -> None:
    faults = write_faults(
        tmp_path,
        f"round: {round_}, after_s: {at_s}, do: die, agents: [agent-01]",
        f"round: {round_}, after_s: {at_s + 2.0}, do: return, agents: [agent-01]",
    )
    job = boston_shares()
    done = simulate(job, faults=faults, with_baseline=False)
    near(done, simulate(job, with_baseline=False))
    assert done.summary["sessions"] == 2
    assert any("a new session goes on from step" in text for text in warnings(done))


def test_a_party_that_never_comes_back_is_named(tmp_path: Path) -> None:
    faults = write_faults(tmp_path, "round: 1, after_s: 0.1, do: die, agents: [agent-01]")
    with pytest.raises(Exception, match=r"step 0: a session can't open; missing: agent-01") as caught:
        simulate(boston_shares(), faults=faults, with_baseline=False)
    assert getattr(caught.value, "exit_code", None) == 3


@pytest.mark.parametrize("number", [1, 2])
def test_a_server_that_dies_resumes_from_its_checkpoint(number: int, tmp_path: Path) -> None:
    faults = write_faults(tmp_path, f"round: {number}, after_s: 0.1, do: server-kill")
    job = boston_shares()
    done = simulate(job, faults=faults, with_baseline=False)
    assert any("the server starts again and resumes" in text for text in warnings(done))
    near(done, simulate(job, with_baseline=False))


def test_a_broker_that_restarts_costs_nothing(tmp_path: Path) -> None:
    faults = write_faults(tmp_path, "round: 1, after_s: 0.2, do: broker-restart, down_s: 1.5")
    job = boston_shares()
    done = simulate(job, faults=faults, with_baseline=False)
    near(done, simulate(job, with_baseline=False))


def test_a_lossy_network_changes_nothing() -> None:
    job = boston_shares()
    lossy = boston_shares(
        "simulation.network.loss=0.05", "simulation.network.duplication=0.05", "simulation.network.reordering=0.1"
    )
    near(simulate(lossy, with_baseline=False), simulate(job, with_baseline=False))


def test_predictions_open_to_who_owns_the_rows() -> None:
    job = boston_shares(
        "spdz.inference={split: test, batch_rows: 16}", "spdz.outputs.model=nobody", "spdz.evaluate=shares"
    )
    fleets: list[SimulatedFleet] = []
    original = SimulatedFleet.start_agents

    def remember(self: SimulatedFleet) -> None:
        fleets.append(self)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedFleet, "start_agents", remember)
        done = simulate(job, with_baseline=False)
    notes = [event.text for event in done.events if isinstance(event, Note)]
    assert "predictions of 101 test rows are with their owners, and nowhere else" in notes
    rows = 0
    for agent in fleets[0].agents.values():
        (name,) = agent.models
        assert name.endswith("-predictions")
        predictions = np.load(io.BytesIO(agent.models[name]))["prediction"]
        assert predictions.shape[0] == len(agent.table.test)
        assert np.isfinite(predictions).all() and predictions.std() > 0.0
        rows += len(predictions)
    assert rows == done.summary["test_rows"] == 101
