"""Agents in tests: an in-memory endpoint, small tables, and hand-written Plans for linear regression."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from helpers_channel import device
from sordino_agent.core import AgentCore
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.data.table import Table, table_of
from sordino_agent.executor import Executor, InlineExecutor
from sordino_agent.policy import Limits, Policy
from sordino_agent.store import TensorStore
from sordino_agent.tasks import TaskCost
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common import messages as m
from sordino_common.clock import Loop, VirtualLoop
from sordino_common.plan.arrays import from_numpy
from sordino_common.plan.plan import encode_plan, plan_id
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Input, Node, Output, Plan, Ref

SERVER = "server"
OPEN_POLICY = Policy(jobs=("describe", "moments", "train", "evaluate", "tensors"), plans="any", fetch="any", min_rows=2)


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """As `Incoming`."""

    sender: str
    message: m.Message
    correlation: bytes
    context: bytes = b""


@dataclass
class Outbox:
    """A `Sender` that keeps what it is given, after a trip through the codec."""

    sent: list[tuple[str, m.Message, bytes]] = field(default_factory=list)
    contexts: set[bytes] = field(default_factory=set)

    def send(
        self,
        to: str,
        message: m.Message,
        *,
        correlation: bytes | None = None,
        context: bytes = b"",
        expires_s: float | None = None,
        on_outcome: object = None,
    ) -> bytes:
        correlation = correlation or b""
        self.contexts.add(context)
        self.sent.append((to, m.decode_message(m.encode_message(message)), correlation))
        return correlation

    def end_context(self, peer: str, context: bytes) -> None:
        self.contexts.discard(context)


@dataclass
class Bench:
    """An `AgentCore` on virtual time with everything around it."""

    loop: VirtualLoop
    core: AgentCore
    outbox: Outbox
    asked: int = 0

    def tell(self, message: m.Message, *, sender: str = SERVER) -> bytes:
        self.asked += 1
        correlation = self.asked.to_bytes(16, "big")
        self.core.on_message(Arrived(sender=sender, message=message, correlation=correlation))  # type: ignore[arg-type]
        return correlation

    def answers(self, correlation: bytes) -> list[m.Message]:
        return [message for _, message, sent in self.outbox.sent if sent == correlation]

    def ask(self, message: m.Message, *, sender: str = SERVER) -> m.Message:
        """The one answer to `message`, once everything that is due has run."""
        correlation = self.tell(message, sender=sender)
        while self.loop.step():
            pass
        (answer,) = self.answers(correlation)
        return answer


def small_table(*, rows: int = 40, features: int = 3, seed: int = 7, name: str = "toy", test: int = 10) -> Table:
    """y = x·[1, 2, ..., D] + 0.5, float64 columns f0..f(D-1) and y."""
    x = np.random.default_rng(seed).normal(size=(rows, features))
    columns = {f"f{index}": x[:, index].copy() for index in range(features)}
    columns["y"] = x @ np.arange(1, features + 1, dtype=np.float64) + 0.5
    return table_of(name, columns, test_rows=test)


def workshop_of(*tables: Table, memory_bytes: int = 64 << 20) -> Workshop:
    programs = Programs(executor="numpy", limits=plan_limits(memory_bytes))
    return Workshop(catalogue=MemoryCatalogue(tables), programs=programs, memory_bytes=memory_bytes)


def one_second(_cost: TaskCost) -> float:
    return 1.0


def bench(
    *tables: Table,
    policy: Policy = OPEN_POLICY,
    limits: Limits | None = None,
    executor: Executor | None = None,
    loop: VirtualLoop | None = None,
    name: str = "pi-01",
    **more: object,
) -> Bench:
    limits = limits or Limits(memory_bytes=64 << 20, store_bytes=1 << 20)
    loop = loop or VirtualLoop()
    if executor is None:
        workshop = workshop_of(*(tables or (small_table(),)), memory_bytes=limits.memory_bytes)
        executor = InlineExecutor(loop, workshop=workshop, seconds_of=one_second, limit_s=limits.plan_seconds)
    core = make_core(loop, executor, policy=policy, limits=limits, name=name, **more)
    outbox = Outbox()
    core.attach(outbox)
    core.start()
    return Bench(loop=loop, core=core, outbox=outbox)


def make_core(
    loop: Loop, executor: Executor, *, policy: Policy, limits: Limits, name: str = "pi-01", **more: object
) -> AgentCore:
    """`more`: further arguments of `AgentCore`."""
    return AgentCore(
        name=name,
        server=SERVER,
        policy=policy,
        limits=limits,
        executor=executor,
        store=TensorStore(budget_bytes=limits.store_bytes),
        loop=loop,
        version="0.0-test",
        **{"identity": device(name), **more},  # type: ignore[arg-type]
    )


# --- Plans -------------------------------------------------------------------------------------------------------


def _f32(*shape: int) -> TensorSpec:
    return TensorSpec("float32", shape)


def linear_training_plan(*, features: int = 3, batch_rows: int = 8, lr: float = 0.1) -> Plan:
    """One SGD step on the mean squared error of y ≈ x w + b."""
    factor = 2.0 * lr / batch_rows
    nodes = (
        Node("addmm", (Ref(1), Ref(2), Ref(0), 1, 1), (_f32(batch_rows, 1),)),  # 4: prediction
        Node("sub", (Ref(4), Ref(3), 1), (_f32(batch_rows, 1),)),  # 5: error
        Node("mul", (Ref(5), Ref(5)), (_f32(batch_rows, 1),)),  # 6
        Node("mean", (Ref(6), (), False), (_f32(),)),  # 7: loss
        Node("permute", (Ref(2), (1, 0)), (_f32(features, batch_rows),)),  # 8
        Node("mm", (Ref(8), Ref(5)), (_f32(features, 1),)),  # 9
        Node("mul", (Ref(9), factor), (_f32(features, 1),)),  # 10
        Node("sub", (Ref(0), Ref(10), 1), (_f32(features, 1),)),  # 11: w
        Node("sum", (Ref(5), (0,), False), (_f32(1),)),  # 12
        Node("mul", (Ref(12), factor), (_f32(1),)),  # 13
        Node("sub", (Ref(1), Ref(13), 1), (_f32(1),)),  # 14: b
    )
    return Plan(
        name="train linear",
        inputs=(
            Input("w", "param", _f32(features, 1)),
            Input("b", "param", _f32(1)),
            Input("x", "x", _f32(batch_rows, features)),
            Input("y", "y", _f32(batch_rows, 1)),
        ),
        constants=(),
        nodes=nodes,
        outputs=(Output("w", "param", 11), Output("b", "param", 14), Output("loss", "loss", 7)),
    )


def linear_evaluation_plan(*, features: int = 3, batch_rows: int = 8) -> Plan:
    """The squared error of each row."""
    nodes = (
        Node("addmm", (Ref(1), Ref(2), Ref(0), 1, 1), (_f32(batch_rows, 1),)),  # 4
        Node("sub", (Ref(4), Ref(3), 1), (_f32(batch_rows, 1),)),  # 5
        Node("mul", (Ref(5), Ref(5)), (_f32(batch_rows, 1),)),  # 6
        Node("view", (Ref(6), (batch_rows,)), (_f32(batch_rows),)),  # 7
    )
    training = linear_training_plan(features=features, batch_rows=batch_rows)
    return Plan(
        name="evaluate linear",
        inputs=training.inputs,
        constants=(),
        nodes=nodes,
        outputs=(Output("loss", "row", 7),),
    )


def double_plan(count: int = 4) -> Plan:
    """A Plan on stored tensors: t -> 2 t."""
    return Plan(
        name="double",
        inputs=(Input("t", "value", _f32(count)),),
        constants=(),
        nodes=(Node("mul", (Ref(0), 2.0), (_f32(count),)),),
        outputs=(Output("twice", "value", 1),),
    )


TRAIN_PLAN = encode_plan(linear_training_plan())
EVALUATE_PLAN = encode_plan(linear_evaluation_plan())
DOUBLE_PLAN = encode_plan(double_plan())


def data_ref(*, split: str = "train", features: int = 3, dataset: str = "toy", **more: object) -> m.DataRef:
    names = tuple(f"f{index}" for index in range(features))
    return m.DataRef(dataset=dataset, features=names, target="y", split=split, **more)  # type: ignore[arg-type]


def zero_params(features: int = 3) -> tuple[m.Array, ...]:
    return from_numpy(np.zeros((features, 1), np.float32)), from_numpy(np.zeros(1, np.float32))


def train_command(**changes: object) -> m.Train:
    fields: dict[str, object] = {
        "run": "run-1",
        "round": 1,
        "attempt": 0,
        "plan_id": plan_id(TRAIN_PLAN),
        "data": data_ref(),
        "params": zero_params(),
        "batch_rows": 8,
        "steps": 12,
        "epochs": 0.0,
        "seed": 11,
    }
    return m.Train(**{**fields, **changes})  # type: ignore[arg-type]


def evaluate_command(**changes: object) -> m.Evaluate:
    fields: dict[str, object] = {
        "run": "run-1",
        "round": 1,
        "plan_id": plan_id(EVALUATE_PLAN),
        "data": data_ref(split="test"),
        "params": zero_params(),
        "batch_rows": 8,
    }
    return m.Evaluate(**{**fields, **changes})  # type: ignore[arg-type]


# --- mutation ----------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bytes flipped, cut, doubled or swapped."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at = rng.randrange(len(out))
        match rng.randrange(5):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                del out[at : at + rng.randint(1, 8)]
            case 3:
                out[at:at] = out[at : at + rng.randint(1, 8)]
            case 4:
                other = rng.randrange(len(out))
                out[at], out[other] = out[other], out[at]
    return bytes(out)
