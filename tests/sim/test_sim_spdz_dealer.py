"""A dealer of its own: the server sees no masks but those of what opens to it; the dealer may die and come back."""

from __future__ import annotations

import numpy as np
import pytest

from helpers_sim import boston_shares
from sordino_common import messages as m
from sordino_common.clock import VirtualLoop
from sordino_common.errors import SordinoError
from sordino_server.conductor import Conductor
from sordino_server.dealer.masks import MaskStore
from sordino_server.model import make_model
from sordino_server.rounds.effects import Checkpoint
from sordino_server.run_shares import SharedRun, shared_run
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.runner import simulate
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MemoryWire

JOB = boston_shares("spdz.dealer=midas", "train.quorum=1.0", "spdz.checkpoint_every=4")


class Play:
    def __init__(self) -> None:
        self.loop = VirtualLoop()
        scenario = scenario_of(JOB)
        network = scenario.network(server=SERVER)
        self.fleet = SimulatedFleet(
            scenario, loop=self.loop, wire=MemoryWire(self.loop, network=network), network=network
        )
        self.conductor: Conductor = self.fleet.start_server()
        self.fleet.start_agents()
        self.saved: list[Checkpoint] = []

    def run(self) -> Checkpoint:
        shared: SharedRun = shared_run(JOB, make_model(JOB), self.fleet.world())
        self.conductor.start(shared.rounds("dealer-1", None), run="dealer-1", save=self.saved.append)
        assert self.loop.run_until(lambda: self.conductor.done, deadline_s=600.0)
        result: Checkpoint = self.conductor.result()
        return result


def test_a_dealer_of_its_own_gives_the_same_model() -> None:
    done = simulate(JOB)
    assert done.summary["metrics"]["test_mse"] == pytest.approx(done.summary["baseline"]["test_mse"], rel=0.02)
    assert done.summary["dealer_seconds"] > 0.0


def test_the_server_sees_no_masks_but_those_of_what_opens_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[m.Message] = []
    original = Conductor.on_message

    def watch(self: Conductor, incoming: object) -> None:
        seen.append(incoming.message)  # type: ignore[attr-defined]
        original(self, incoming)  # type: ignore[arg-type]

    monkeypatch.setattr(Conductor, "on_message", watch)
    play = Play()
    final = play.run()
    assert all(state.shared is not None and state.shared.masks == {} for state in play.saved)
    assert final.params
    setups = [message for message in seen if isinstance(message, m.SpdzSetup)]
    assert [(one.party_seed, one.mac_key, one.owner_seed) for one in setups] == [(None, None, None)]
    masks = {value.names for message in seen if isinstance(message, m.SpdzMasks) for value in message.outputs}
    params = tuple(name for name in next(iter(masks - {("loss",)})))
    assert masks == {("loss",), params}
    assert not any(isinstance(message, m.SpdzShares | m.SpdzInput | m.SpdzCorrection) for message in seen)


@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.5])
def test_a_dealer_that_dies_comes_back_with_its_masks(after_s: float) -> None:
    honest = Play().run()
    play = Play()

    def kill() -> None:
        play.fleet.kill_dealer()
        play.loop.call_at(play.loop.now_s() + 1.0, play.fleet.start_dealer)

    play.loop.call_at(play.loop.now_s() + after_s, kill)
    found = play.run()
    for value, right in zip(found.params, honest.params, strict=True):
        assert np.abs(value - right).max() < 0.02


def test_a_dealer_that_is_not_there_is_named() -> None:
    play = Play()
    play.loop.call_at(play.loop.now_s() + 0.1, play.fleet.kill_dealer)
    with pytest.raises(SordinoError, match="a session can't open; missing: midas"):
        play.run()


def test_a_model_that_stays_shared_with_a_dealer_of_its_own() -> None:
    done = simulate(boston_shares("spdz.dealer=midas", "spdz.outputs.model=nobody"))
    assert done.result.tensors == {}
    assert done.summary["metrics"]["test_mse"] == pytest.approx(done.summary["baseline"]["test_mse"], rel=0.05)


def test_masks_on_disk(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    for store in (MaskStore(tmp_path / "masks"), MaskStore(None)):
        masks = {"w": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.array(7, dtype=np.int64)}
        for step in (4, 8):
            store.save("run-1", bytes(16), step, masks)
        found = store.load("run-1", bytes(16), 4)
        assert all(np.array_equal(found[name], value) for name, value in masks.items())
        store.forget_before("run-1", bytes(16), 8)
        assert store.load("run-1", bytes(16), 8)
        with pytest.raises(SordinoError, match="holds no masks of run run-1 after 4 steps"):
            store.load("run-1", bytes(16), 4)
    (file,) = (tmp_path / "masks" / "run-1").iterdir()
    assert file.stat().st_mode & 0o077 == 0
