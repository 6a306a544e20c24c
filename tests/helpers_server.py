"""A fleet of scripted agents behind a fake endpoint on a virtual loop: the server's tests need no wire and no Plans.

The agents learn the mean of their own numbers: parameters are one vector w [2], a round moves w towards (mean, rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from sordino_common import messages as m
from sordino_common.clock import VirtualLoop
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_server.conductor import Conductor
from sordino_server.job import DataSpec, EvaluateSpec, JobSpec, ModelSpec, SgdSpec, TrainSpec
from sordino_server.rounds.events import Event
from sordino_server.rounds.fedavg import Programs
from sordino_server.rounds.roll import Program

PLAN_A, PLAN_B = b"\xa1" * 32, b"\xb2" * 32
PROGRAMS = Programs(
    train=Program(plan=b"train", plan_id=PLAN_A),
    evaluate=Program(plan=b"evaluate", plan_id=PLAN_B),
    evaluate_rows=4,
    row_names=("loss",),
)


def job_spec(**train: object) -> JobSpec:
    fields: dict[str, object] = {
        "rounds": 4, "batch_rows": 4, "local_epochs": 1.0, "seed": 7, "quorum": 0.5, "round_deadline_s": 60.0,
        "straggler_s": 10.0, "join_s": 5.0, "retries": 1,
    }  # fmt: skip
    return JobSpec(
        job="toy",
        mode="federated",
        model=ModelSpec(file="toy.py"),
        data=DataSpec(dataset="toy", features=("a",), target="b", task="regression", standardize="fleet"),
        loss="mse",
        optimizer=SgdSpec(lr=0.1),
        train=TrainSpec(**{**fields, **train}),  # type: ignore[arg-type]
        evaluate=EvaluateSpec(),
    )


@dataclass
class Agent:
    """`delay_s` before every answer. `mute`: message types never answered. `answer`: replaces an answer."""

    name: str
    rows: int = 10
    delay_s: float = 0.1
    boot: int = 1
    online: bool = True
    mute: tuple[type[m.Message], ...] = ()
    answer: Callable[[Agent, m.Message, m.Message], m.Message] | None = None
    dataset: str = "toy"
    plans: set[bytes] = field(default_factory=set)
    seen: list[m.Message] = field(default_factory=list)

    def reply(self, message: m.Message) -> m.Message | None:
        number = float(sum(self.name.encode()) % 13)
        match message:
            case m.Describe():
                column = {"dtype": "float64", "shape": ()}
                info = m.DatasetInfo(
                    name=self.dataset, tags=(), train_rows=self.rows, test_rows=self.rows // 2,
                    columns=(m.ColumnInfo(name="a", **column), m.ColumnInfo(name="b", **column)),
                )  # fmt: skip
                return m.Described(
                    version="1", executor="numpy", memory_bytes=1, store_bytes=1, payload_bytes=1, plan_seconds=1.0,
                    datasets=(info,),
                )  # fmt: skip
            case m.PlanPut(plan=plan):
                plan_id = PLAN_A if plan == b"train" else PLAN_B
                self.plans.add(plan_id)
                return m.PlanReady(plan_id=plan_id, peak_bytes=1, flops=1)
            case m.Moments(columns=columns):
                values = np.linspace(number, number + 1, self.rows)
                sums = from_numpy(np.full(len(columns), values.sum()))
                squares = from_numpy(np.full(len(columns), (values**2).sum()))
                return m.MomentsResult(rows=self.rows, sums=sums, squares=squares)
            case m.Train():
                if message.plan_id not in self.plans:
                    return m.Refused(command="train", code="unknown-plan", reason="no such Plan here")
                w = to_numpy(message.params[0])
                rng = np.random.default_rng([message.seed, message.round, *self.name.encode()])
                update = (0.3 * (np.array([number, self.rows]) - w) + rng.normal(size=2)).astype(np.float32)
                return m.Trained(
                    run=message.run, round=message.round, attempt=message.attempt, rows=self.rows, steps=3,
                    update=(from_numpy(update),), loss_sum=3.0 * number, seconds=self.delay_s,
                )  # fmt: skip
            case m.Evaluate():
                w = to_numpy(message.params[0])
                return m.Evaluated(
                    run=message.run, round=message.round, rows=self.rows // 2, names=("loss",),
                    sums=(float(abs(w[0] - number)),), seconds=0.0,
                )  # fmt: skip
            case _:
                return None


@dataclass(frozen=True)
class Arrived:
    sender: str
    message: m.Message
    correlation: bytes
    context: bytes = b""


class Fleet:
    """Endpoint and agents in one. `events` holds what the conductor reported."""

    def __init__(self, agents: Iterable[Agent], *, loop: VirtualLoop | None = None) -> None:
        self.loop = loop or VirtualLoop()
        self.agents = {agent.name: agent for agent in agents}
        self.events: list[Event] = []
        self.conductor = Conductor(loop=self.loop, observer=self.events.append)
        self.conductor.attach(self, members=lambda: tuple(self.agents), traffic=lambda: (self.up, self.down))
        self.up = self.down = 0
        self._correlations = 0
        for agent in self.agents.values():
            if agent.online:
                self.conductor.on_presence(agent.name, True, agent.boot)

    def send(
        self,
        to: str,
        message: m.Message,
        *,
        expires_s: float | None = None,
        on_outcome: Callable[[bool, str], None] | None = None,
    ) -> bytes:
        self._correlations += 1
        correlation = self._correlations.to_bytes(16, "big")
        agent, boot = self.agents[to], self.agents[to].boot
        self.down += 100

        def arrive() -> None:
            if not agent.online or agent.boot != boot:
                return
            agent.seen.append(message)
            if isinstance(message, agent.mute):
                return
            reply = agent.reply(message)
            if reply is not None and agent.answer is not None:
                reply = agent.answer(agent, message, reply)
            if reply is not None:
                self.loop.call_at(self.loop.now_s() + agent.delay_s, lambda: deliver(reply))

        def deliver(reply: m.Message) -> None:
            if agent.online and agent.boot == boot:
                self.up += 50
                self.conductor.on_message(Arrived(agent.name, reply, correlation))

        self.loop.call_at(self.loop.now_s() + 0.01, arrive)
        return correlation

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        self.loop.call_at(when_s, action)

    def die(self, name: str) -> None:
        self.agents[name].online = False
        self.conductor.on_presence(name, False, self.agents[name].boot)

    def come_back(self, name: str, *, reboot: bool = True) -> None:
        agent = self.agents[name]
        agent.online = True
        if reboot:
            agent.boot += 1
            agent.plans.clear()
        self.conductor.on_presence(name, True, agent.boot)

    def finish(self, *, within_s: float = 10_000.0) -> None:
        assert self.loop.run_until(lambda: self.conductor.done, deadline_s=within_s)

    def told(self, kind: type) -> list:  # type: ignore[type-arg]
        return [event for event in self.events if isinstance(event, kind)]
