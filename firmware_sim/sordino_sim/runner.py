"""A job from its file to its summary, on a simulated fleet."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from sordino_common.clock import VirtualLoop
from sordino_common.errors import ConfigError, LocalError
from sordino_common.messages.protocol import ProtocolVersion
from sordino_common.transport.reactor import Reactor
from sordino_server.baseline import public_pool
from sordino_server.checkpoint_files import Tensors
from sordino_server.conductor import Conductor
from sordino_server.job import Job
from sordino_server.rounds.events import Event, Note, Observer, RoundDone, RunStarted, silent
from sordino_server.rounds.spdz import World
from sordino_server.run import RunnableLoop, RunResult, new_run_id, run_job
from sordino_server.store import RunStore
from sordino_sim.broker import LocalBroker
from sordino_sim.chaos import draw_faults
from sordino_sim.descriptors import require_descriptors
from sordino_sim.director import Director, ServerKilled, Stage
from sordino_sim.faults import FaultSchedule, TransportName, load_faults, plan_faults
from sordino_sim.fleet_dir import write_fleet
from sordino_sim.harness import SERVER, SimulatedFleet
from sordino_sim.processes import ProcessFleet
from sordino_sim.scenario import Scenario, scenario_of
from sordino_sim.tamper import Tamper
from sordino_sim.wires import MemoryWire, MqttWire

# What differs between two runs of one job and seed: everything else in the summary is the same to the bit.
WALL_CLOCK_FIELDS: Final = ("seconds", "overhead_vs_torch", "memory_per_agent_bytes", "baseline.seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A finished simulation: the run as the server sees it, with the simulator's own fields in `summary`."""

    result: RunResult
    summary: Mapping[str, Any]
    events: tuple[Event, ...]


class Company(Stage, Protocol):
    """A fleet to run a job on: simulated agents in this process, or processes."""

    @property
    def loop(self) -> RunnableLoop:
        """The server's; there once the server is."""
        ...

    @property
    def members(self) -> tuple[str, ...]: ...

    def start_server(self) -> Conductor: ...

    def world(self) -> World:
        """The server's, for a job on shares; there once the server is."""
        ...

    def kill_server(self) -> None: ...

    def start_agents(self) -> None: ...

    def resident_bytes(self) -> int: ...

    def close(self) -> None: ...


def simulate(
    job: Job,
    *,
    transport: TransportName = "memory",
    faults: Path | None = None,
    chaos: int | None = None,
    observer: Observer = silent,
    store_folder: Path | None = None,
    with_baseline: bool = True,
    tamper: Tamper | None = None,
    protocols: Mapping[str, ProtocolVersion] | None = None,
) -> Simulated:
    """Run the job on a fleet made for it.

    `memory`: on a virtual clock, through the simulated network. `mqtt`: in this process and in real time, through a
    mosquitto of our own. `processes`: the same, but every agent is a process. `faults`: a schedule instead of the job's
    own; `chaos`: the seed of one that is drawn (`chaos.py`). Checkpoints go to `store_folder`, or to a folder that is
    gone afterwards. `tamper`: one party of the job's committee cheats. `protocols`: parties that speak another version
    (not with `processes`). Raises what `run_job` raises, and `ConfigError`."""
    if tamper is not None and (not job.spec.on_shares or transport == "processes"):
        raise ConfigError("--tamper needs a job of mode spdz, and --transport memory or mqtt: real agents don't cheat")
    if tamper is not None and tamper.agent >= job.spec.shares.committee:
        raise ConfigError(f"--tamper: the committee has {job.spec.shares.committee} agents, from 0")
    if protocols and transport == "processes":
        raise LocalError("simulate: processes speak the version that they are of")
    scenario = scenario_of(job)
    schedule = fault_schedule(job, scenario, faults, transport=transport, chaos=chaos)
    for setting, why in scenario.without_effect(transport):
        observer(Note(text=f"{setting} has no effect with --transport {transport}: {why}", level="warning"))
    with tempfile.TemporaryDirectory(prefix="sordino-sim-") as scratch, ExitStack() as stack:
        company: Company
        match transport:
            case "memory":
                loop = VirtualLoop()
                network = scenario.network(server=SERVER)
                wire = MemoryWire(loop, network=network)
                company = SimulatedFleet(scenario, loop=loop, wire=wire, network=network, protocols=protocols)
            case "mqtt":
                require_descriptors(len(scenario.boards) + len(scenario.helpers))
                reactor = stack.enter_context(Reactor())
                broker = stack.enter_context(LocalBroker(Path(scratch) / "broker"))
                company = SimulatedFleet(
                    scenario, loop=reactor, wire=MqttWire(reactor, broker), network=None, protocols=protocols
                )
            case "processes":
                company = ProcessFleet(write_fleet(scenario, Path(scratch) / "fleet"))
        if tamper is not None and isinstance(company, SimulatedFleet):
            company.make_party = tamper.make_party()
        done = _drive(
            scenario,
            company=company,
            schedule=schedule,
            observer=observer,
            store_folder=store_folder or Path(scratch) / "runs",
            transport=transport,
            with_baseline=with_baseline,
            publish=store_folder is not None,
        )
    if tamper is not None and not tamper.happened:
        raise ConfigError("--tamper: nothing was tampered with, the run was over before; name an earlier step")
    return done


def _drive(
    scenario: Scenario,
    *,
    company: Company,
    schedule: FaultSchedule,
    observer: Observer,
    store_folder: Path,
    transport: TransportName,
    with_baseline: bool,
    publish: bool,
) -> Simulated:
    """Run the scenario's job on `company`; after a `server-kill`, start the server again and resume."""
    job = scenario.job
    events: list[Event] = []
    gauge = _Gauge(len(company.members), company.resident_bytes)

    def watch(event: Event) -> None:
        events.append(event)
        observer(event)
        match event:
            case RunStarted():
                gauge.before()
                company.start_agents()
            case RoundDone():
                gauge.after()
            case _:
                pass
        director.on_event(event)

    with ExitStack() as stack:
        stack.callback(company.close)
        conductor = company.start_server()
        loop = company.loop
        director = Director(schedule=schedule, stage=company, loop=loop, observer=watch)
        store = stack.enter_context(RunStore(store_folder, wall_s=loop.wall_s))
        run = new_run_id(job, wall_s=loop.wall_s(), token=f"{scenario.seed:08x}")
        began_s, resume = loop.now_s(), False
        while True:
            try:
                result = run_job(
                    job,
                    run=run,
                    conductor=conductor,
                    loop=loop,
                    store=store,
                    members=company.members,
                    observer=watch,
                    resume=resume,
                    pooled=public_pool(job) if with_baseline else None,
                    world=company.world() if job.spec.needs_world else None,
                    owned=scenario.owned if with_baseline else lambda rows: None,
                    publish=publish,
                )
                break
            except ServerKilled:
                company.kill_server()
                watch(Note(text="the server starts again and resumes from its last checkpoint", level="warning"))
                conductor, resume = company.start_server(), True
        virtual_s = loop.now_s() - began_s if transport == "memory" else None
    for round_ in director.outstanding:
        watch(Note(text=f"the faults of round {round_} never came: the run was over before", level="warning"))
    summary = {
        **result.summary,
        "virtual_seconds": virtual_s,
        "simulated": {"transport": transport, **scenario.describe(transport)},
        "faults": [
            {"time_s": round(fault.time_s, 6), "round": fault.round, "what": fault.what} for fault in director.happened
        ],
        "memory_per_agent_bytes": gauge.per_agent_bytes,
        "params_sha256": digest_of(result.tensors),
    }
    return Simulated(result=result, summary=summary, events=tuple(events))


def fault_schedule(
    job: Job, scenario: Scenario, faults: Path | None, *, transport: TransportName, chaos: int | None = None
) -> FaultSchedule:
    """The schedule in `faults`, else one drawn from `chaos`, else the job's own, else none."""
    own = job.spec.simulation.faults
    if chaos is not None:
        if faults is not None:
            raise ConfigError("--faults and --chaos both give a schedule: name one")
        agents, helpers = scenario.agents, tuple(scenario.helpers)
        rounds = job.spec.train.rounds
        drawn = draw_faults(chaos, agents=agents, helpers=helpers, rounds=rounds, transport=transport)
        where = f"--chaos {chaos}"
        return plan_faults(
            drawn, agents=agents, helpers=helpers, seed=scenario.seed, transport=transport, where=where, marks={}
        )
    if faults is None and own is None:
        return FaultSchedule()
    path = faults if faults is not None else job.path.parent / str(own)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such fault schedule")
    return load_faults(
        path, agents=scenario.agents, seed=scenario.seed, transport=transport, helpers=tuple(scenario.helpers)
    )


def digest_of(tensors: Tensors) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the parameters, names ascending."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}|{value.dtype.str}|{value.shape}|".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def without_wall_clock(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary without what no two runs share (`WALL_CLOCK_FIELDS`)."""
    kept = {name: value for name, value in summary.items() if name not in WALL_CLOCK_FIELDS}
    if isinstance(kept.get("baseline"), Mapping):
        kept["baseline"] = {name: value for name, value in kept["baseline"].items() if name != "seconds"}
    return kept


class _Gauge:
    """How much memory grows from before the agents start until the first round is done, per agent.

    By then every agent has its keys, rows, sessions, Plans and its first answer cached. What the model's tracing
    takes was taken before; in one process, the server's part per agent is in it."""

    def __init__(self, agents: int, resident: Callable[[], int]) -> None:
        self._agents = agents
        self._resident = resident
        self._before: int | None = None
        self.per_agent_bytes: int | None = None

    def before(self) -> None:
        if self._before is None:
            gc.collect()
            self._before = self._resident()

    def after(self) -> None:
        if self.per_agent_bytes is None and self._before is not None:
            self.per_agent_bytes = max(0, self._resident() - self._before) // self._agents
