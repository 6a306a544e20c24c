"""A job from its file to its summary, on a simulated fleet."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from sordino_common.clock import VirtualLoop
from sordino_common.errors import ConfigError
from sordino_server.baseline import public_pool
from sordino_server.job import Job
from sordino_server.rounds.events import Event, Note, Observer, RoundDone, RunStarted, silent
from sordino_server.run import RunnableLoop, RunResult, new_run_id, run_job
from sordino_server.store import RunStore, Tensors
from sordino_sim.director import Director, ServerKilled, refuse_cut
from sordino_sim.faults import FaultSchedule, load_faults
from sordino_sim.harness import SimulatedFleet
from sordino_sim.network import SimulatedNetwork
from sordino_sim.scenario import Scenario, scenario_of
from sordino_sim.wires import MemoryWire, Wire

TransportName = Literal["memory", "mqtt", "processes"]

# What differs between two runs of one job and seed: everything else in the summary is the same to the bit.
WALL_CLOCK_FIELDS: Final = ("seconds", "overhead_vs_torch", "memory_per_agent_bytes", "baseline.seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A finished simulation: the run as the server sees it, with the simulator's own fields in `summary`."""

    result: RunResult
    summary: Mapping[str, Any]
    events: tuple[Event, ...]


class _Stage:
    """The faults of a `SimulatedFleet` and of what connects it."""

    def __init__(self, fleet: SimulatedFleet, wire: Wire, network: SimulatedNetwork | None, loop: RunnableLoop) -> None:
        self._fleet = fleet
        self._wire = wire
        self._network = network
        self._loop = loop
        self.die = fleet.die
        self.leave = fleet.leave
        self.come_back = fleet.come_back
        self.slow_down = fleet.slow_down
        self.restart_broker = wire.restart_broker

    @property
    def away(self) -> tuple[str, ...]:
        return self._fleet.away

    def cut(self, names: frozenset[str], for_s: float) -> None:
        if self._network is None:
            raise refuse_cut("mqtt")
        now_s = self._loop.now_s()
        self._network.cut(names, start_s=now_s, end_s=now_s + for_s)


def simulate(
    job: Job,
    *,
    faults: Path | None = None,
    observer: Observer = silent,
    store_folder: Path | None = None,
    with_baseline: bool = True,
) -> Simulated:
    """Run the job on a simulated fleet over memory, on a virtual clock.

    `faults`: a schedule instead of the job's own. Checkpoints go to `store_folder`, or to a folder that is gone
    afterwards. Raises what `run_job` raises, and `ConfigError`."""
    scenario = scenario_of(job)
    schedule = fault_schedule(job, scenario, faults)
    loop = VirtualLoop()
    from_job = scenario.network(server="server")
    wire = MemoryWire(loop, network=from_job)
    fleet = SimulatedFleet(scenario, loop=loop, wire=wire)
    stage = _Stage(fleet, wire, from_job, loop)
    return drive(
        scenario,
        fleet=fleet,
        stage=stage,
        loop=loop,
        schedule=schedule,
        observer=observer,
        store_folder=store_folder,
        transport="memory",
        with_baseline=with_baseline,
    )


def drive(
    scenario: Scenario,
    *,
    fleet: SimulatedFleet,
    stage: _Stage,
    loop: RunnableLoop,
    schedule: FaultSchedule,
    observer: Observer,
    store_folder: Path | None,
    transport: TransportName,
    with_baseline: bool = True,
) -> Simulated:
    """Run the scenario's job on `fleet`; after a `server-kill`, start the server again and resume."""
    job = scenario.job
    events: list[Event] = []
    gauge = _Gauge(len(fleet.agents))
    director = Director(schedule=schedule, stage=stage, loop=loop, observer=lambda event: watch(event))

    def watch(event: Event) -> None:
        events.append(event)
        observer(event)
        match event:
            case RunStarted():
                gauge.before()
                fleet.start_agents()
            case RoundDone():
                gauge.after()
            case _:
                pass
        director.on_event(event)

    began_s = loop.now_s()
    run = new_run_id(job, wall_s=loop.wall_s(), token=f"{scenario.seed:08x}")
    with tempfile.TemporaryDirectory(prefix="sordino-sim-") as scratch:
        store = RunStore(store_folder or Path(scratch), wall_s=loop.wall_s)
        try:
            resume = False
            while True:
                conductor = fleet.start_server()
                try:
                    result = run_job(
                        job,
                        run=run,
                        conductor=conductor,
                        loop=loop,
                        store=store,
                        members=fleet.members,
                        observer=watch,
                        resume=resume,
                        pooled=public_pool(job) if with_baseline else None,
                    )
                    break
                except ServerKilled:
                    fleet.kill_server()
                    watch(Note(text="the server starts again and resumes from its last checkpoint", level="warning"))
                    resume = True
        finally:
            fleet.close()
            store.close()
    for round_ in director.outstanding:
        watch(Note(text=f"the faults of round {round_} never came: the run was over before", level="warning"))
    summary = {
        **result.summary,
        "virtual_seconds": loop.now_s() - began_s if transport == "memory" else None,
        "simulated": {"transport": transport, **scenario.describe()},
        "faults": [
            {"time_s": round(fault.time_s, 6), "round": fault.round, "what": fault.what} for fault in director.happened
        ],
        "memory_per_agent_bytes": gauge.per_agent_bytes,
        "params_sha256": digest_of(result.tensors),
    }
    return Simulated(result=result, summary=summary, events=tuple(events))


def fault_schedule(job: Job, scenario: Scenario, faults: Path | None) -> FaultSchedule:
    """The schedule in `faults`, else the job's own, else none."""
    own = job.spec.simulation.faults
    if faults is None and own is None:
        return FaultSchedule()
    path = faults if faults is not None else job.path.parent / str(own)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such fault schedule")
    return load_faults(path, agents=scenario.agents, seed=scenario.seed)


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
    """How much this process's memory grows from before the agents start until the first round is done, per agent.

    By then every agent has its keys, rows, sessions, Plans and its first answer cached. What the model's tracing
    takes was taken before; the server's part per agent is in it."""

    def __init__(self, agents: int, *, resident: Callable[[], int] | None = None) -> None:
        self._agents = agents
        self._resident = resident or resident_bytes
        self._before: int | None = None
        self.per_agent_bytes: int | None = None

    def before(self) -> None:
        if self._before is None:
            gc.collect()
            self._before = self._resident()

    def after(self) -> None:
        if self.per_agent_bytes is None and self._before is not None:
            self.per_agent_bytes = max(0, self._resident() - self._before) // self._agents


def resident_bytes() -> int:
    """This process's resident set (Linux)."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
