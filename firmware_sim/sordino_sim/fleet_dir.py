"""A fleet on disk, as `sordino init`, `sordino-agent init`, `sordino roster add` and `sign` would have made it.

    DIR/fleet.yaml, *.key, roster.cbor    the server's home: `sordino train JOB --fleet DIR`
    DIR/agents/<name>/agent.yaml          one agent: `sordino-agent run DIR/agents/<name>`
    DIR/agents/<name>/data/*.npz          its rows, its held-out rows, a model that the job has it provide
    DIR/dealer/                           a dealer of its own, if the job has one: `sordino dealer run DIR/dealer`
    DIR/broker/mosquitto.conf             a broker on the loopback interface: `mosquitto -c ...`

Keys are real ones, fresh each time. The rows are those that the simulator would deal out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import yaml

from sordino_agent.budget import BudgetSpec
from sordino_agent.config import load_agent_config
from sordino_agent.data.table import Split, Table
from sordino_agent.enrol import enrol
from sordino_agent.policy import JOB_KINDS
from sordino_agent.spdz.policy import OWNERS
from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError
from sordino_server.dealer.process import REQUEST_FILE, enrol_dealer
from sordino_server.home import Home, create_home, read_request
from sordino_sim.broker import broker_config, free_port
from sordino_sim.scenario import Scenario

FLEET: Final = "local"
_HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFolder:
    """Where the parts of an on-disk fleet lie."""

    folder: Path
    agents: Mapping[str, Path]
    port: int
    dealer: Path | None = None
    helpers: Mapping[str, Path] = field(default_factory=dict)  # no data; in `processes`, agents like the others

    @property
    def broker_folder(self) -> Path:
        return self.folder / "broker"

    def home(self) -> Home:
        return Home(self.folder)


def write_fleet(scenario: Scenario, folder: Path, *, port: int | None = None) -> FleetFolder:
    """Make the whole fleet of `scenario` in `folder`. Raises `ConfigError`, also if there is one already."""
    port = port or free_port()
    tables, models = scenario.tables(), scenario.models()
    home = create_home(folder, fleet=FLEET, server="server", broker=f"{_HOST}:{port}")
    receivers = (home.spec.server, OWNERS, *scenario.receivers)
    paths: dict[str, Path] = {}
    for name, table in tables.items():
        paths[name] = folder / "agents" / name
        made = enrol(
            paths[name],
            name=name,
            fleet=FLEET,
            operator_key=home.operator_public().hex(),
            broker=f"{_HOST}:{port}",
        )
        home.add(read_request(made.request), roles=("data", "compute"), zone=scenario.zones.get(name))
        _write_rows(paths[name] / "data", table)
        for model, file in models.get(name, {}).items():
            write_atomically(paths[name] / "data" / f"{model}.npz", file, mode=0o600)
        _write_config(
            made.config,
            name=name,
            home=home,
            port=port,
            table=table,
            models=models.get(name, {}),
            receivers=receivers,
            budget=scenario.budgets.get(name),
        )
    helpers: dict[str, Path] = {}
    for name, zone in scenario.helpers.items():
        helpers[name] = folder / "agents" / name
        made = enrol(
            helpers[name],
            name=name,
            fleet=FLEET,
            operator_key=home.operator_public().hex(),
            broker=f"{_HOST}:{port}",
        )
        home.add(read_request(made.request), roles=("helper",), zone=zone)
        _write_config(made.config, name=name, home=home, port=port, table=None, models={}, receivers=receivers)
    if scenario.dealer is not None:
        enrol_dealer(
            folder / "dealer",
            name=scenario.dealer,
            fleet=FLEET,
            operator_key=home.operator_public().hex(),
            broker=f"{_HOST}:{port}",
            server=home.spec.server,
        )
        home.add(read_request(folder / "dealer" / REQUEST_FILE), roles=("dealer",), zone=None)
    home.sign(now_s=time.time())
    made_folder = FleetFolder(
        folder=folder,
        agents=paths,
        port=port,
        dealer=None if scenario.dealer is None else folder / "dealer",
        helpers=helpers,
    )
    made_folder.broker_folder.mkdir(exist_ok=True)
    (made_folder.broker_folder / "mosquitto.conf").write_text(broker_config(port), "utf-8")
    return made_folder


def _write_rows(folder: Path, table: Table) -> None:
    folder.mkdir(exist_ok=True)
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        rows = table.rows(split)
        with (folder / f"{split}.npz").open("wb") as file:
            columns = {name: column[rows] for name, column in table.columns.items()}
            np.savez(file, **columns)  # type: ignore[arg-type]  # the stub sees ** as allow_pickle, too


def _write_config(
    path: Path,
    *,
    name: str,
    home: Home,
    port: int,
    table: Table | None,
    models: Mapping[str, bytes],
    receivers: Sequence[str],
    budget: BudgetSpec | None = None,
) -> None:
    """agent.yaml with the dataset, and a policy that lets the job run: any Plan, and however few rows there are."""
    config = {
        "agent": {"name": name, "fleet": home.spec.fleet, "server": home.spec.server, "state_dir": "state"},
        "operator_key": home.operator_public().hex(),
        # Loopback, and tests that restart the broker: come back soon.
        "broker": {"host": _HOST, "port": port, "reconnect_least_s": 0.2, "reconnect_most_s": 2.0},
        "datasets": []
        if table is None
        else [
            {
                "name": table.name,
                "path": "data/train.npz",
                "test_path": "data/test.npz",
                "tags": list(table.tags),
                **({} if budget is None else {"budget": msgspec.to_builtins(budget)}),
            }
        ],
        "models": [{"name": model, "path": f"data/{model}.npz"} for model in models],
        "policy": {
            "jobs": [kind for kind in JOB_KINDS if kind != "tensors"],
            "plans": "any",
            "models": "any",
            "min_rows": 1,
            "exact_evaluation": True,
            "min_cohort": 2,
            "spdz": {
                "outputs": {what: list(receivers) for what in ("model", "loss", "prediction")},
                "security": "passive",
            },
        },
    }
    head = "# Made by `sordino-sim fleet`: a test fleet on one machine. The policy is wide open.\n"
    write_atomically(path, (head + yaml.safe_dump(config, sort_keys=False)).encode(), mode=0o600)
    load_agent_config(path)


def check_empty(folder: Path) -> None:
    """Raises `ConfigError` if something is in `folder`: a fleet is not written over other files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there and not empty; name a new folder")
