"""The simulated world around a job: which boards, which network, who holds which rows.

A job file says nothing of it. It comes from `--scenario FILE` (below), and `--profile` and `--set simulate.KEY=VALUE`
change single figures:

    profile: pi4                       # or a mix: {pi3: 6, pi-zero2: 4}, dealt out in this order, then again
    data: {split: dirichlet, alpha: 0.3, min_rows: 8}
    network:
      latency_s: 0.02                  # each figure replaces the profiles' own
      loss: 0.01
      partitions: [{start_s: 10, end_s: 14, agents: [agent-03]}]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sordino_common.config import load_config, parse_config
from sordino_common.errors import ConfigError
from sordino_common.messages.base import Name
from sordino_sim.network import LinkSpec, Partition, SimulatedNetwork
from sordino_sim.partition import Rows, partition_dirichlet, partition_iid
from sordino_sim.profiles import DEFAULT_PROFILE, DeviceProfile, profile

_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
_Chance = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
_Bps = Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]


class PartitionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing passes between the broker and `agents` (none given: everybody) from `start_s` until `end_s`."""

    start_s: _Seconds
    end_s: _Seconds
    agents: tuple[Name, ...] = ()


class NetworkSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What replaces the profiles' links. `None` leaves a figure as the profile has it."""

    latency_s: _Seconds | None = None
    jitter_s: _Seconds | None = None
    up_bps: _Bps | None = None
    down_bps: _Bps | None = None
    loss: _Chance | None = None
    duplicate: _Chance | None = None
    reorder: _Chance | None = None
    reorder_s: _Seconds | None = None
    lossy: bool = False
    partitions: tuple[PartitionSettings, ...] = ()

    def changes(self) -> dict[str, float]:
        """The figures that were given."""
        names = ("latency_s", "jitter_s", "up_bps", "down_bps", "loss", "duplicate", "reorder", "reorder_s")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class DataSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the rows are dealt out to the agents."""

    split: Literal["iid", "dirichlet"] = "iid"
    alpha: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    min_rows: Annotated[int, msgspec.Meta(ge=1)] = 2  # one row to train on, one to test with


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Boards, network and data split of a simulation."""

    profile: str | dict[str, Annotated[int, msgspec.Meta(ge=1)]] = DEFAULT_PROFILE
    network: NetworkSettings = NetworkSettings()
    data: DataSettings = DataSettings()

    def profiles(self, agents: Sequence[str]) -> dict[str, DeviceProfile]:
        """The board of every agent. Raises `ConfigError` for a profile that there is not."""
        if isinstance(self.profile, str):
            one = profile(self.profile)
            return dict.fromkeys(agents, one)
        if not self.profile:
            raise ConfigError("scenario: `profile` is an empty mix; expected a name, or names with counts")
        cycle = [profile(name) for name, count in self.profile.items() for _ in range(count)]
        return {agent: cycle[index % len(cycle)] for index, agent in enumerate(agents)}

    def simulated_network(self, agents: Sequence[str], *, server: str, seed: int) -> SimulatedNetwork:
        """The links of these agents' boards with the scenario's changes; the server sits beside the broker."""
        changes = self.network.changes()
        links = {name: board.link.worse(**changes) for name, board in self.profiles(agents).items()}
        return SimulatedNetwork(
            seed=seed,
            default=LinkSpec(),
            links=links | {server: profile("server").link},
            partitions=[
                Partition(start_s=cut.start_s, end_s=cut.end_s, names=frozenset(cut.agents))
                for cut in self.network.partitions
            ],
            lossy=self.network.lossy,
        )

    def split(self, targets: NDArray[np.generic], *, agents: int, seed: int) -> list[Rows]:
        """Row indices per agent, every row once."""
        data = self.data
        if data.split == "iid":
            return partition_iid(len(targets), agents=agents, seed=seed, min_rows=data.min_rows)
        return partition_dirichlet(targets, agents=agents, alpha=data.alpha, seed=seed, min_rows=data.min_rows)

    def describe(self) -> dict[str, object]:
        """For the summary: what was simulated, as plain values."""
        plain = msgspec.to_builtins(self)
        assert isinstance(plain, dict)
        network: dict[str, object] = dict(self.network.changes())
        if self.network.lossy:
            network["lossy"] = True
        if self.network.partitions:
            network["partitions"] = plain["network"]["partitions"]
        plain["network"] = network
        return plain


def load_scenario(path: Path | None, *, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in the file at `path`, or the default one, after `overrides` of the form key.path=value."""
    if path is None:
        return parse_config("{}", Scenario, where="scenario", overrides=overrides)
    return load_config(path, Scenario, overrides=overrides)
