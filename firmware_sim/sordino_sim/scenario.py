"""The simulated world around a job: which boards, which network, who holds which rows.

It is the job's `simulation` section. A profile is a name (`pi4`) or a mix
(`pi3:6,pi-zero2:4`: six and four, in this order, then again).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sordino_agent.budget import BudgetSpec
from sordino_agent.data.table import Split, Table, table_of
from sordino_common.errors import ConfigError
from sordino_server.baseline import Owned
from sordino_server.job import Job
from sordino_server.job_spdz import SERVER
from sordino_server.model import make_model
from sordino_server.public_data import Table as PublicTable
from sordino_server.public_data import load_public, split_rows
from sordino_sim.faults import TransportName
from sordino_sim.network import LinkSpec, SimulatedNetwork
from sordino_sim.partition import Rows, partition_dirichlet, partition_iid
from sordino_sim.profiles import DEFAULT_PROFILE, DeviceProfile, profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """N agents by name, their boards, and their rows of the job's dataset."""

    job: Job
    seed: int
    boards: Mapping[str, DeviceProfile]

    @property
    def dealer(self) -> str | None:
        """The job's dealer, if that is not the server."""
        return self.job.spec.shares.dealer if self.job.spec.on_shares else None

    @property
    def zones(self) -> Mapping[str, str]:
        """Every device stands in one of as many zones as the job asks its committee to span, by turns."""
        count = self.job.spec.shares.zones if self.job.spec.on_shares else 1
        return {name: f"zone-{index % count}" for index, name in enumerate(self.boards)} if count > 1 else {}

    @property
    def helpers(self) -> Mapping[str, str]:
        """Devices without rows that help in secure sums, each with its zone: one more than the job needs, so that one
        may fail."""
        secure = self.job.spec.secure
        return {} if secure is None else {f"helper-{k}": f"helpers-{k}" for k in range(secure.helpers + 1)}

    @property
    def receivers(self) -> tuple[str, ...]:
        """Agents to whom the job opens something, by name."""
        outputs = self.job.spec.shares.outputs
        return tuple(sorted({outputs.model, outputs.prediction} & set(self.boards))) if self.job.spec.on_shares else ()

    @property
    def agents(self) -> tuple[str, ...]:
        return tuple(self.boards)

    @property
    def budgets(self) -> Mapping[str, BudgetSpec]:
        """The privacy budget of each agent's dataset, by the agent's name; of those that have one."""
        given = self.job.spec.simulation.budget
        if given is None:
            return {}
        budget = BudgetSpec(epsilon=given.epsilon, rho=given.rho, delta=given.delta)
        return dict.fromkeys(self.agents[: given.agents], budget)

    def network(self, *, server: str) -> SimulatedNetwork:
        """The boards' links with the job's changes; the server sits beside the broker."""
        spec = self.job.spec.simulation.network
        bps = None if spec.bandwidth_bytes_s is None else 8.0 * spec.bandwidth_bytes_s
        figures = {
            "latency_s": spec.latency_s,
            "jitter_s": spec.jitter_s,
            "up_bps": bps,
            "down_bps": bps,
            "loss": spec.loss,
            "duplicate": spec.duplication,
            "reorder": spec.reordering,
        }
        changes = {name: value for name, value in figures.items() if value is not None}
        links = {name: board.link.worse(**changes) for name, board in self.boards.items()}
        return SimulatedNetwork(seed=self.seed, default=LinkSpec(), links=links | {server: profile("server").link})

    def tables(self) -> dict[str, Table]:
        """Every agent's own rows. The test rows are those that the baseline is tested on, dealt out evenly; the train
        rows are split as the job says. Every row of the source is with exactly one agent. Raises `ConfigError`."""
        simulation, data = self.job.spec.simulation, self.job.spec.data
        if simulation.data is None:
            raise self.job.error("simulation.data", "the simulator needs a data set: boston, pima or mnist")
        source = load_public(simulation.data)
        for name in (*data.features, data.target):
            if name not in source.columns:
                known = ", ".join(source.columns)
                raise self.job.error("data", f"{simulation.data} has no column {name!r}; it has {known}")
        train, test = split_rows(source.rows, simulation.test_fraction, self.seed)
        count = len(self.boards)
        train_parts = self._split(np.asarray(source.columns[data.target])[train], count)
        # With fewer test rows than agents some have none to test on; the sums over the fleet are the same.
        test_parts = partition_iid(len(test), agents=count, seed=self.seed, min_rows=0)
        tables = {}
        for name, train_part, test_part in zip(self.boards, train_parts, test_parts, strict=True):
            mine, held_out = source.take(train[train_part]), source.take(test[test_part])
            tables[name] = table_of(
                data.dataset, columns=mine.columns, tags=(simulation.data,), test_columns=held_out.columns
            )
        return tables

    def models(self) -> dict[str, dict[str, bytes]]:
        """Agent -> model's name -> .npz file, of the agent that the job has provide the first parameters: the file that
        `simulation.model` names, or the parameters that the server would have begun with. Raises `ConfigError`."""
        shares, path = self.job.spec.shares, self.job.spec.simulation.model
        if not self.job.spec.on_shares or shares.model_from == SERVER:
            if path is not None:
                raise self.job.error("simulation.model", "is only used with spdz.model_from: an agent")
            return {}
        if shares.model_from not in self.boards:
            known = f"{self.agents[0]} to {self.agents[-1]}"
            raise self.job.error("spdz.model_from", f"the simulated fleet has no {shares.model_from}, it has {known}")
        return {shares.model_from: {shares.model or self.job.spec.job: self._model_file(path)}}

    def _model_file(self, path: str | None) -> bytes:
        if path is not None:
            file = self.job.path.parent / path
            try:
                return file.read_bytes()
            except OSError as error:
                raise self.job.error("simulation.model", f"{file}: can't be read: {error.strerror}") from None
        state = make_model(self.job).state_dict()
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value.numpy() for name, value in state.items() if value.is_floating_point()})
        return buffer.getvalue()

    def owned(self, rows: Sequence[tuple[str, int]]) -> Owned:
        """Every owner's train rows and all test rows, for the baseline of a job on shares."""
        tables = self.tables()

        def part(name: str, split: Split) -> PublicTable:
            table = tables[name]
            return PublicTable(name=name, columns={k: v[table.rows(split)] for k, v in table.columns.items()})

        tests = [part(name, "test") for name in tables]
        test = {k: np.concatenate([table.columns[k] for table in tests]) for k in tests[0].columns}
        return Owned(
            train=tuple((name, part(name, "train")) for name, _ in rows), test=PublicTable(name="test", columns=test)
        )

    def without_effect(self, transport: TransportName) -> list[tuple[str, str]]:
        """(setting, why) of what the job asks to be simulated and this transport does not simulate."""
        simulation = self.job.spec.simulation
        idle = []
        if transport == "processes" and simulation.profile is not None:
            idle.append(("simulation.profile", "processes compute as fast as this machine does"))
        if transport != "memory" and self._network_changes():
            idle.append(("simulation.network", "packets go through a real broker on this machine"))
        return idle

    def describe(self, transport: TransportName) -> dict[str, object]:
        """For the summary: what was simulated, as plain values; None where this transport simulates nothing."""
        simulation = self.job.spec.simulation
        counts: dict[str, int] = {}
        for board in self.boards.values():
            counts[board.name] = counts.get(board.name, 0) + 1
        profile = next(iter(counts)) if len(counts) == 1 else counts
        return {
            "profile": profile if transport != "processes" else None,
            "network": self._network_changes() if transport == "memory" else None,
            "partition": simulation.partition,
            "alpha": simulation.alpha if simulation.partition == "dirichlet" else None,
            "seed": self.seed,
        }

    def _network_changes(self) -> dict[str, object]:
        network = self.job.spec.simulation.network
        settings = {name: getattr(network, name) for name in network.__struct_fields__}
        return {name: value for name, value in settings.items() if value is not None}

    def _split(self, targets: NDArray[np.generic], count: int) -> list[Rows]:
        simulation = self.job.spec.simulation
        if simulation.partition == "iid":
            return partition_iid(len(targets), agents=count, seed=self.seed)
        return partition_dirichlet(targets, agents=count, alpha=simulation.alpha, seed=self.seed)


def scenario_of(job: Job) -> Scenario:
    """The scenario of a job. The seed is the one by which the baseline's rows are split. Raises `ConfigError`."""
    simulation = job.spec.simulation
    seed = job.spec.train.seed if simulation.seed is None else simulation.seed
    boards = _mix(simulation.profile or DEFAULT_PROFILE)
    names = agent_names(simulation.agents)
    return Scenario(job=job, seed=seed, boards={name: boards[index % len(boards)] for index, name in enumerate(names)})


def agent_names(count: int) -> tuple[str, ...]:
    """agent-00 .. agent-09: as many digits as the last one needs, two at least, so that they sort as they count."""
    digits = max(2, len(str(count - 1)))
    return tuple(f"agent-{index:0{digits}d}" for index in range(count))


def _mix(text: str) -> Sequence[DeviceProfile]:
    boards: list[DeviceProfile] = []
    for part in text.split(","):
        name, colon, number = part.strip().partition(":")
        if colon and not (number.isdigit() and 1 <= int(number) <= 100_000):
            raise ConfigError(f"profile {text!r}: expected a name, or names with counts such as pi3:6,pi-zero2:4")
        boards += [profile(name)] * (int(number) if colon else 1)
    return boards
