"""What one broker and one server bear: N agents over a real mosquitto; server, broker, agents are processes apart.

    python benchmarks/bench_scale.py                       # 30, 100 and 300 agents
    python benchmarks/bench_scale.py --agents 300 --rounds 8

answered     agents whose answer counted in the last measured round
packets, kB  of an agent and a round: both ways, acknowledgements included; packets as the server counts them
x model      those bytes over the parameters' own bytes both ways (exact)
server kB    what the server's process grows by per agent, from before they come until after the last round
broker kB    the same of mosquitto
broker %     mosquitto's share of all processor time of the measured rounds; server %, agents % the same
x steps      server's processor time of an agent and a round, over one training step by the NumPy interpreter
linear       processor time of server and broker for an agent and a round, over that in the smallest fleet: 1 is linear

The agents share two processes of simulated devices: their part of the time says nothing of real ones.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import multiprocessing
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from step_inputs import step_inputs
from timing import best_seconds

from sordino_agent.status import resident_bytes
from sordino_common.plan.executors import load_program
from sordino_common.plan.plan import decode_plan
from sordino_common.transport.reactor import Reactor
from sordino_server.job import Job, load_job
from sordino_server.model import make_model, trace_job
from sordino_server.rounds.events import Event, RoundDone, RunStarted
from sordino_server.run import run_job
from sordino_server.store import RunStore
from sordino_sim.broker import LocalBroker
from sordino_sim.descriptors import require_descriptors
from sordino_sim.harness import SimulatedFleet
from sordino_sim.scenario import scenario_of
from sordino_sim.wires import MqttWire

MODEL = """
from torch import nn

def make_model():
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 48), nn.ReLU(), nn.Linear(48, 10))
"""
JOB = """
job: scale
mode: federated
model: {{file: model.py}}
data: {{dataset: mnist, features: [image], shape: [1, 28, 28], target: digit, task: multiclass,
       standardize: given, offset: [0.0], scale: [255.0]}}
loss: cross_entropy
optimizer: {{name: sgd, lr: 0.1}}
train: {{rounds: {rounds}, local_steps: 1, batch_rows: 4, evaluate_every: 0, join_s: 600, round_deadline_s: 600,
        straggler_s: 300, quorum: 1.0}}
simulation: {{agents: {agents}, data: mnist, profile: pi5}}
"""
PROCESSES = 2
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024


class _Port:
    """As much of a `LocalBroker` as `MqttWire` needs of one that runs elsewhere."""

    def __init__(self, port: int) -> None:
        self.port = port


def be_agents(path: Path, port: int, issued_s: int, part: int) -> None:
    """Every `PROCESSES`-th agent of the fleet, until SIGTERM."""
    over: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: over.append(number))
    scenario = scenario_of(load_job(path))
    with Reactor() as reactor:
        signal.set_wakeup_fd(reactor.wakeup_fd, warn_on_full_buffer=False)
        wire = MqttWire(reactor, _Port(port))  # type: ignore[arg-type]
        fleet = SimulatedFleet(scenario, loop=reactor, wire=wire, network=None, issued_s=issued_s)
        for index, agent in enumerate(fleet.agents.values()):
            if index % PROCESSES == part:
                fleet._start(agent)
        reactor.run_until(lambda: bool(over), deadline_s=float("inf"))
        fleet.close()


def measure(path: Path, job: Job, agents: int) -> dict[str, Any]:
    require_descriptors(agents)
    context = multiprocessing.get_context("fork")
    issued_s = int(time.time())
    marks: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = stack.enter_context(LocalBroker(folder / "broker"))
        assert broker.pid is not None
        broker_pid = broker.pid
        children = [
            context.Process(target=be_agents, args=(path, broker.port, issued_s, part)) for part in range(PROCESSES)
        ]
        reactor = stack.enter_context(Reactor())
        fleet = SimulatedFleet(
            scenario_of(job), loop=reactor, wire=MqttWire(reactor, broker), network=None, issued_s=issued_s
        )
        conductor = fleet.start_server()
        assert fleet.server_endpoint is not None
        counters = fleet.server_endpoint.counters.total

        def mark(answered: int) -> None:
            marks.append(
                {
                    "server_cpu": time.process_time(),
                    "broker_cpu": cpu_s(broker_pid),
                    "agents_cpu": sum(cpu_s(child.pid) for child in children if child.pid),
                    "server_rss": resident_bytes(),
                    "broker_rss": rss_bytes(broker_pid),
                    "packets": counters.packets_received + counters.packets_sent,
                    "bytes": counters.packet_bytes_received + counters.packet_bytes_sent,
                    "answered": answered,
                }
            )

        def watch(event: Event) -> None:
            if isinstance(event, RunStarted):
                mark(0)
                for child in children:
                    child.start()
            elif isinstance(event, RoundDone):
                mark(sum(share.outcome == "answered" for share in event.record.shares.values()))

        store = stack.enter_context(RunStore(folder / "runs", wall_s=reactor.wall_s))
        try:
            run_job(
                job,
                run="scale-1",
                conductor=conductor,
                loop=reactor,
                store=store,
                members=fleet.members,
                observer=watch,
            )
        finally:
            for child in children:
                if child.pid is not None:
                    child.terminate()
                    child.join(30)
            fleet.close()
    # The first round also describes agents, sends Plans and sets sessions up; the last one also evaluates.
    first, last = marks[1], marks[-2]
    rounds = len(marks) - 3
    spent = {name: last[f"{name}_cpu"] - first[f"{name}_cpu"] for name in ("server", "broker", "agents")}
    whole = sum(spent.values())
    return {
        "agents": agents,
        "answered": last["answered"],
        "packets": (last["packets"] - first["packets"]) / rounds / agents,
        "bytes": (last["bytes"] - first["bytes"]) / rounds / agents,
        "server_bytes": (last["server_rss"] - marks[0]["server_rss"]) / agents,
        "broker_bytes": (last["broker_rss"] - marks[0]["broker_rss"]) / agents,
        "shares": {name: value / whole for name, value in spent.items()},
        "server_s": spent["server"] / rounds / agents,
        "both_s": (spent["server"] + spent["broker"]) / rounds / agents,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What one broker and one server bear.")
    parser.add_argument("--agents", type=int, nargs="+", default=[30, 100, 300])
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.py").write_text(MODEL, "utf-8")
        path = Path(folder) / "job.yaml"
        path.write_text(JOB.format(rounds=given.rounds, agents=2), "utf-8")
        job = load_job(path)
        traced = trace_job(job, make_model(job))
        plan = decode_plan(traced.programs.train.plan)
        program, inputs = load_program(plan), step_inputs(plan, traced)
        step_s = best_seconds({"step": lambda: program.run(inputs)})["step"]
        moved = 2 * 4 * sum(param.size for param in traced.params)
        print(
            "agents  answered  packets      kB  x model  server kB  broker kB  broker %  server %  agents %"
            "  x steps  linear"
        )
        least = None
        for agents in given.agents:
            path.write_text(JOB.format(rounds=given.rounds, agents=agents), "utf-8")
            found = measure(path, load_job(path), agents)
            least = least or found["both_s"]
            shares = found["shares"]
            print(
                f"{agents:6d}  {found['answered']:8d}  {found['packets']:7.1f}  {found['bytes'] / 1e3:6.1f}"
                f"  {found['bytes'] / moved:7.4f}  {found['server_bytes'] / 1e3:9.0f}"
                f"  {found['broker_bytes'] / 1e3:9.1f}  {shares['broker']:8.1%}  {shares['server']:8.1%}"
                f"  {shares['agents']:8.1%}  {found['server_s'] / step_s:7.1f}  {found['both_s'] / least:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
