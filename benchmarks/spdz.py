"""What a training step on secret shares costs, against eager PyTorch's own step: MLP 13-64-1, batch 32, MSE, SGD.

    python benchmarks/spdz.py            counts, then two members and a dealer in this process
    python benchmarks/spdz.py --products products of the sizes that other frameworks publish

Over a real broker, beside rounds x raw broadcast + arithmetic: `bench_spdz_wire.py`, or `--wire` here.

Time of one process, one thread: `online` is both members together, openings handed over as bytes; `dealer` is all of
the preprocessing. Everything is measured in turns in one run; read the ratios.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import secrets
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sordino_common.plan.spec import TensorSpec
from sordino_common.ring.prg import Seed
from sordino_common.spdz.circuit import Circuit, CircuitInput, CircuitOutput, Gate, Product, Wire
from sordino_common.spdz.dealing import Dealer
from sordino_common.spdz.effects import Broadcast, Effect, Retry
from sordino_common.spdz.layout import layout_of
from sordino_common.spdz.lowering import Ranges, Settings, lower
from sordino_common.spdz.owner import InputOwner, mask_state
from sordino_common.spdz.party import Party
from sordino_common.spdz.spec import Schedule, SessionSpec
from sordino_server.trace.optimizers import Sgd
from sordino_server.trace.steps import training_plan

ROWS, FEATURES, HIDDEN, LR = 32, 13, 64, 1 / 64
C1, C3 = 0.1978, -0.0043  # any cubic will do here


class CubicSigmoid(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 0.5 + C1 * z + C3 * z**3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), CubicSigmoid(), nn.Linear(HIDDEN, 1))


def boston_step() -> Circuit:
    traced = training_plan(
        model(),
        loss="mse",
        optimizer=Sgd(lr=LR),
        x=TensorSpec("float32", (FEATURES,)),
        y=TensorSpec("float32", ()),
        batch_rows=ROWS,
    )
    settings = Settings(ranges=Ranges(x=8.0, y=8.0, params=4.0, values=64.0, preactivations=8.0, updates=1.0))
    return lower(traced.plan, plan_id=traced.plan_id, settings=settings).circuit


@dataclass
class Clock:
    """Seconds spent where."""

    dealer: float = 0.0
    online: float = 0.0
    check: float = 0.0
    steps: int = 0
    retries: int = 0


@dataclass
class Session:
    """A dealer and n members in this process; every opening is encoded and decoded."""

    spec: SessionSpec
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.dealer = Dealer(self.spec, Seed(secrets.token_bytes(32)))
        self.parties = [
            Party(self.spec, k, self.dealer.setup(k), random=secrets.token_bytes) for k in range(len(self.spec.parties))
        ]
        rng = np.random.default_rng(0)
        self.values = {e.name: _fixed(rng.uniform(-1, 1, e.wire.shape)) for e in self.spec.row_inputs}
        self.owner = InputOwner(self.spec, "owner", self.dealer.owner_seed("owner"))
        state = {e.name: _fixed(rng.uniform(-0.2, 0.2, e.wire.shape)) for e in self.spec.state_inputs}
        masked = mask_state(self.spec, self.dealer.state_seed(), state)
        for party in self.parties:
            party.on_state(masked)

    def step(self, number: int) -> None:
        """One step; if it meets the edge of the ring, again."""
        attempt = self.dealer.next_attempt
        while not self._attempt(number, attempt):
            attempt += 1
            self.clock.retries += 1
            self.dealer.rewind(number, attempt)
            for party in self.parties:
                party.on_restart(number, attempt)
        self.dealer.confirm(number)
        self.clock.steps += 1

    def _attempt(self, number: int, attempt: int) -> bool:
        begun = time.perf_counter()
        deal = self.dealer.deal(number, attempt)
        dealt = time.perf_counter()
        masked = self.owner.masked(number, attempt, self.values)
        queue: deque[tuple[int, Effect]] = deque()
        for k, party in enumerate(self.parties):
            if k == deal.corrected:
                queue += ((k, e) for e in party.on_correction(number, attempt, deal.correction))
            queue += ((k, e) for e in party.on_input("owner", number, attempt, masked))
        opened, again = dealt, False
        while queue:
            sender, effect = queue.popleft()
            again = again or isinstance(effect, Retry)
            if not isinstance(effect, Broadcast):
                continue
            if effect.kind == "check-1" and opened == dealt:
                opened = time.perf_counter()
            place = (effect.kind, effect.step, effect.attempt, effect.round, effect.payload)
            for k, party in enumerate(self.parties):
                if k != sender:
                    queue += ((k, e) for e in party.on_message(sender, *place))
                    while party.has_work:
                        queue += ((k, e) for e in party.work())
        ended = time.perf_counter()
        self.clock.dealer += dealt - begun
        self.clock.online += ended - dealt
        self.clock.check += ended - opened if opened != dealt else 0.0
        return not again


def _fixed(values: Any) -> Any:
    return np.rint(values * 2**14).astype(np.int64)


def session(circuit: Circuit, *, n: int, security: str, steps: int, check_every: int) -> Session:
    rows = [entry.wire.shape[0] for entry in circuit.inputs if entry.role == "x"]
    spec = SessionSpec(
        session=secrets.token_bytes(16),
        circuit=circuit,
        circuit_digest=bytes(32),
        parties=tuple(f"agent-{k}" for k in range(n)),
        security="active" if security == "active" else "passive",
        steps=steps,
        check_every=check_every,
        retries=8,
        schedule=Schedule(rows=(("owner", rows[0]),), batch_rows=rows[0], seed=0),
    )
    return Session(spec)


def eager() -> Callable[[], None]:
    """PyTorch's own step on the same model."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    x, y = torch.randn(ROWS, FEATURES), torch.randn(ROWS, 1)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()

    return step


def train(circuit: Circuit, *, turns: int, slice_steps: int) -> None:
    """Print the table, from the best slice of each variant."""
    variants = [
        ("passive, 2 members", 2, "passive", 8),
        ("active, 2 members, check every step", 2, "active", 1),
        ("active, 2 members, check every 32 steps", 2, "active", 32),
        ("active, 3 members, check every 32 steps", 3, "active", 32),
    ]
    steps = turns * slice_steps + slice_steps
    sessions = {name: session(circuit, n=n, security=s, steps=steps, check_every=k) for name, n, s, k in variants}
    reference = eager()
    for _ in range(50):
        reference()
    best_eager = float("inf")
    best: dict[str, Clock] = {}
    number = 0
    for turn in range(turns + 1):  # the first turn warms up
        begun = time.perf_counter()
        for _ in range(200):
            reference()
        best_eager = min(best_eager, (time.perf_counter() - begun) / 200)
        for name, one in sessions.items():
            one.clock = Clock()
            for k in range(slice_steps):
                one.step(number + k)
            before = best.get(name)
            if turn and (before is None or one.clock.online + one.clock.dealer < before.online + before.dealer):
                best[name] = replace(one.clock)
        number += slice_steps
    print(f"eager PyTorch, one thread: {best_eager * 1e6:.0f} us a step")
    print(f"{'':42} {'online':>8} {'check':>8} {'dealer':>8} {'online':>9} {'all':>9}")
    print(f"{'':42} {'us':>8} {'us':>8} {'us':>8} {'/ eager':>9} {'/ eager':>9}")
    for name, clock in best.items():
        online, dealer, check = (s / clock.steps for s in (clock.online, clock.dealer, clock.check))
        print(
            f"{name:42} {online * 1e6:8.0f} {check * 1e6:8.0f} {dealer * 1e6:8.0f} {online / best_eager:9.1f} "
            f"{(online + dealer) / best_eager:9.1f}"
        )


def counts(circuit: Circuit) -> None:
    outputs = sum(circuit.wire(number).numel for number in circuit.gates)
    opened = sum(circuit.opened_elements)
    print(f"rounds a step: {len(circuit.rounds)}, and 4 for a check")
    print(f"opened a step and party: {8 * opened} bytes = 8 x {outputs} outputs of gates")
    for security in ("passive", "active"):
        dealt = layout_of(circuit).preprocessing_bytes(active=security == "active")
        print(f"preprocessing a step, {security}: {dealt} bytes")


def product(kind: str, a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> Circuit:
    """One product with truncation, of two tensors that owners provide."""
    wires = [Wire(shape=shape, fraction_bits=14, magnitude=1.0, room=1 << 49) for shape in (a, b, out)]
    inputs = tuple(
        CircuitInput(name=name, role=role, wire=wire, shift=14, bound_bits=29)
        for name, role, wire in (("a", "x", wires[0]), ("b", "param", wires[1]))
    )
    gate = Gate(
        products=(Product(kind="mm" if kind == "mm" else "mul", a=0, b=1, coefficient=1),),
        terms=(),
        addend=0,
        shift=14,
        bound_bits=40,
        round=0,
        node=0,
        wire=wires[2],
    )
    return Circuit(
        plan_id=bytes(32),
        inputs=inputs,
        nodes=(gate,),
        outputs=(CircuitOutput(name="out", role="value", wire=2),),
        tables=(),
        constants=(),
    )


def products() -> None:
    cases = {
        "matmul 128x784x128 with truncation": product("mm", (128, 784), (784, 128), (128, 128)),
        "100,000 products with truncation": product("mul", (100_000, 1), (100_000, 1), (100_000, 1)),
    }
    a = torch.randint(-(2**60), 2**60, (128, 784))
    b = torch.randint(-(2**60), 2**60, (784, 128))
    begun = time.perf_counter()
    for _ in range(5):
        torch.matmul(a, b)
    print(f"torch int64 128x784x128: {(time.perf_counter() - begun) / 5 * 1e3:.1f} ms")
    for name, circuit in cases.items():
        for security in ("passive", "active"):
            one = session(circuit, n=2, security=security, steps=12, check_every=1)
            best = Clock(online=float("inf"), dealer=float("inf"))
            for k in range(11):
                one.clock = Clock()
                one.step(k)
                if k and one.clock.online + one.clock.dealer < best.online + best.dealer:
                    best = replace(one.clock)
            print(
                f"{name}, {security}: online {best.online * 1e3:.1f} ms (both members, check {best.check * 1e3:.1f}), "
                f"dealer {best.dealer * 1e3:.1f} ms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--wire", action="store_true", help="and over mosquitto, with agent processes")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.products:
        products()
        return
    circuit = boston_step()
    counts(circuit)
    train(circuit, turns=given.turns, slice_steps=32)
    if given.wire:
        sys.stdout.flush()
        subprocess.run([sys.executable, Path(__file__).with_name("bench_spdz_wire.py")], check=True)


if __name__ == "__main__":
    main()
