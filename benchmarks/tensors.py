"""What eager style costs: a Boston-sized MLP trained through pointers against the same step as one traced Plan.

All variants run on the same agent, with the same messages: `tensor-run` for each step, and the loss is fetched. (On an
agent each, the one that takes turns less often is found asleep more often, and pays for it.) Turns are taken in one
run; the best of many slices counts.

    pointers    eager style: zero_grad, forward, backward, optimizer, loss.get().item()
    plan        the traced Plan, sent by hand; its loss is asked for when the step is answered
    at once     the same, its loss asked for right behind the step, as pointers ask for theirs
    pytorch     the part of eager style that is not ours: the same program, forward, backward, optimizer, on a tensor
                subclass whose dispatch does nothing but make the next empty tensor; in a loop of its own
    both        `pytorch`, then `at once`, in one step: what eager style would cost if recording and sending a step one
                after the other cost nothing beside PyTorch's own dispatch

The bar is pointers / plan, at most 1.3. pointers / at once is the same against the better way to send by hand, and
pointers / both shows what is ours. `both` is more than its parts: PyTorch's code is as cold after a wait as ours, and
so are the other processes after PyTorch's turn.

The bar is judged over a broker, as a fleet is reached: `agents` is mosquitto and `sordino-agent run` processes with
their workers, `mqtt` the same broker with the agents in this process, so that their work is in the time of both.
`memory` is the simulator's, where nothing but computing is left of a step: it shows what eager style costs this
process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from timing import best_seconds
from torch import nn

import sordino_server as sordino
from sordino_common.messages import Message, PlanPut, PlanReady, TensorGet, TensorRun, TensorStored, TensorValue
from sordino_server.job import load_job
from sordino_server.tensors.fleet import PointerFleet, RemoteAgent
from sordino_server.tensors.messages import question
from sordino_server.trace.tracing import trace
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

FEATURES, HIDDEN, LR = 13, 64, 0.01
WARM, COUNTED = 3, 20
TRANSPORTS = ("memory", "mqtt", "agents")
JOB = Path(__file__).resolve().parent.parent / "examples" / "boston-fedavg.yaml"
Step = Callable[[], None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def through_pointers(
    fleet: PointerFleet, agent: RemoteAgent, x: torch.Tensor, y: torch.Tensor
) -> tuple[Step, list[float]]:
    """A step in eager style, and the losses that it has seen."""
    model = fleet.send(network(), agent)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x_there, y_there = agent.send(x), agent.send(y)
    losses: list[float] = []

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x_there), y_there)
        loss.backward()
        optimizer.step()
        losses.append(loss.get().item())  # type: ignore[attr-defined]

    return step, losses


def as_a_plan(
    fleet: PointerFleet, agent: RemoteAgent, x: torch.Tensor, y: torch.Tensor
) -> tuple[Step, Step, list[float]]:
    """The same step, traced once and sent by hand: fetched when it is answered, or asked for at once."""
    params = [parameter.detach() for parameter in network().parameters()]

    def program(*tensors: torch.Tensor) -> list[torch.Tensor]:
        def loss_of(weights: list[torch.Tensor]) -> torch.Tensor:
            hidden = torch.tanh(nn.functional.linear(tensors[4], weights[0], weights[1]))
            return nn.functional.mse_loss(nn.functional.linear(hidden, weights[2], weights[3]), tensors[5])

        gradients, loss = torch.func.grad_and_value(loss_of)(list(tensors[:4]))
        return [loss, *[w - LR * g for w, g in zip(tensors[:4], gradients, strict=True)]]

    traced = trace(
        program,
        [*params, x, y],
        inputs=[(f"i{k}", "value") for k in range(6)],
        outputs=[(f"o{k}", "value") for k in range(5)],
        name="step",
    )
    kept = [agent.send(tensor) for tensor in (*params, x, y)]
    ids: list[bytes] = [pointer.cell.value.tensor_id or b"" for pointer in kept]
    drive, terms, name = fleet._driver.drive, fleet._terms, agent.name
    drive(question(terms, "plan", {name: PlanPut(plan=traced.data)}, PlanReady))
    drops: list[tuple[bytes, ...]] = [()]
    losses: list[float] = []

    def next_run() -> TensorRun:
        assert kept
        outputs = tuple(os.urandom(16) for _ in range(5))
        run = TensorRun(
            plan_id=traced.plan_id, inputs=tuple(ids), outputs=outputs, drops=drops[0], lease_s=terms.lease_s
        )
        drops[0] = (*ids[:4], outputs[0])
        ids[:4] = outputs[1:]
        return run

    def note(reply: Message) -> None:
        assert isinstance(reply, TensorValue)
        losses.append(float(torch.frombuffer(bytearray(reply.value.data), dtype=torch.float32)))

    def step() -> None:
        run = next_run()
        answers = drive(question(terms, "run", {name: run}, TensorStored))
        assert name in answers.replies, answers
        answers = drive(question(terms, "get", {name: TensorGet(tensor_id=run.outputs[0])}, TensorValue))
        note(answers.replies[name])

    def at_once() -> None:
        run = next_run()
        get = TensorGet(tensor_id=run.outputs[0])
        answers = drive(question(terms, "run", {name: run}, TensorStored, {name: get}))
        assert name in answers.replies, answers
        note(answers.behind[name])

    return step, at_once, losses


class Hollow(torch.Tensor):
    """A wrapper whose dispatch knows what comes: the next shape of `shapes`, None for a write."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    shapes: list[torch.Size | None] = []  # noqa: RUF012  # of the one program that runs on it
    place = 0
    learning = True

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if cls.learning:
            there = [torch.empty(a.shape, device="meta") if isinstance(a, Hollow) else a for a in args]
            result = func(*there, **(kwargs or {}))
            cls.shapes.append(None if func._schema.is_mutable else result.shape)
        shape = cls.shapes[cls.place]
        cls.place += 1
        return args[0] if shape is None else hollow(shape)


def hollow(shape: torch.Size) -> torch.Tensor:
    return torch.Tensor._make_wrapper_subclass(Hollow, shape, dtype=torch.float32)  # type: ignore[no-any-return]


def pytorch_alone(x: torch.Tensor, y: torch.Tensor) -> Step:
    """The program with nothing recorded, sent or computed."""
    Hollow.shapes.clear()
    Hollow.place, Hollow.learning = 0, True
    model = network()
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(hollow(parameter.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x_hollow, y_hollow = hollow(x.shape), hollow(y.shape)

    def step() -> None:
        Hollow.place = 0
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x_hollow), y_hollow).backward()
        optimizer.step()

    Hollow.shapes.clear()
    step()
    Hollow.learning = False
    return step


def in_one_step(first: Step, second: Step) -> Step:
    def step() -> None:
        first()
        second()

    return step


@contextmanager
def fleet_of(transport: str) -> Iterator[tuple[PointerFleet, Any]]:
    """One agent, and the server's counters of messages and bytes."""
    if transport != "agents":
        with sordino.simulate(agents=1, transport=transport) as fleet:  # type: ignore[arg-type]  # memory or mqtt
            yield fleet, fleet._driver.fleet.server_endpoint.counters.total  # type: ignore[attr-defined]
        return
    with tempfile.TemporaryDirectory() as place:
        folder = write_fleet(scenario_of(load_job(JOB, overrides=["simulation.agents=1"])), Path(place) / "fleet")
        for agent in folder.agents.values():
            config = yaml.safe_load((agent / "agent.yaml").read_text("utf-8"))
            config["policy"] |= {"jobs": [*config["policy"]["jobs"], "tensors"], "fetch": "any"}
            (agent / "agent.yaml").write_text(yaml.safe_dump(config), "utf-8")
        with LocalBroker(folder.broker_folder, port=folder.port), AgentProcesses(folder) as agents:
            agents.start_all()
            with sordino.connect(folder.folder, wait_s=60.0) as fleet:
                yield fleet, fleet._driver._fleet.endpoint.counters.total  # type: ignore[attr-defined]


def main() -> None:
    """Print ratios and exact counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=404, help="rows of a step; Boston Housing has 404 to train on")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--transport", choices=[*TRANSPORTS, "all"], default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.randn(options.rows, FEATURES), torch.randn(options.rows, 1)
    for transport in TRANSPORTS if options.transport == "all" else (options.transport,):
        with fleet_of(transport) as (fleet, counters):
            steps: dict[str, Step] = {}
            (agent,) = fleet
            steps["pointers"], eager = through_pointers(fleet, agent, x, y)
            steps["plan"], steps["at once"], traced = as_a_plan(fleet, agent, x, y)
            for name in ("pointers", "plan"):
                for _ in range(WARM):
                    steps[name]()
            figures = {}
            for name, step in list(steps.items()):
                before = (counters.messages_sent, counters.packet_bytes_sent, counters.packet_bytes_received)
                for _ in range(COUNTED):
                    step()
                after = (counters.messages_sent, counters.packet_bytes_sent, counters.packet_bytes_received)
                figures[name] = [(b - a) / COUNTED for a, b in zip(before, after, strict=True)]
            assert torch.allclose(torch.tensor(eager), torch.tensor(traced[: len(eager)]), rtol=1e-4)
            steps["pytorch"] = pytorch_alone(x, y)
            steps["both"] = in_one_step(steps["pytorch"], steps["at once"])
            best = best_seconds(steps, rounds=options.rounds, slice_s=0.004)
        print(
            f"{transport}, rows {options.rows}; pointers / plan: {best['pointers'] / best['plan']:.2f}   "
            f"pointers / at once: {best['pointers'] / best['at once']:.2f}   "
            f"pointers / both: {best['pointers'] / best['both']:.2f}   both / plan: {best['both'] / best['plan']:.2f}"
        )
        for name, seconds in best.items():
            counts = "{:6.2f} messages {:7.0f} bytes sent {:7.0f} bytes received a step"
            print(f"  {name:9} {seconds * 1e3:7.2f} ms" + (counts.format(*figures[name]) if name in figures else ""))


if __name__ == "__main__":
    main()
